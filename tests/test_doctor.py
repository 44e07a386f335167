"""`python -m llava.doctor`: a line per subject, and what to mend."""

import sys
from importlib import metadata

import pytest
import torch

from llava import doctor
from llava.doctor import FAULT, NOTE, OK, Finding, main
from llava.errors import InputError, run_command

SUBJECTS = {
    *("python", "packages", "attention", "quantisation", "training", "tokenizer.model", "hub", "memory", "disk"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test looks for the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns its exit code, its lines and its errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        try:
            run_command(main)
            code = 0
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return call


def by_subject(findings):
    return {each.subject: each for each in findings}


def test_every_subject_has_a_line_and_a_sound_machine_ends_well(run):
    code, lines, errors = run()
    subjects = {line.split(":")[0].split()[-1] for line in lines}
    assert code == 0 and errors == "" and subjects >= SUBJECTS
    assert all(line.split()[0] in (OK, NOTE) for line in lines)


def test_a_checkpoint_is_held_against_the_memory(run):
    _, lines, _ = run("playground/shapes/checkpoints/llava-shapes")
    (line,) = [line for line in lines if "memory" in line]
    assert line.startswith("ok") and " MB, --load-4bit " in line and "llava-shapes fits in float32 " in line


def test_a_name_that_is_no_checkpoint_is_refused_before_anything_is_looked_at(run):
    code, lines, errors = run("no-such-folder")
    assert code == 2 and lines == [] and errors.startswith("error: no folder no-such-folder: give one with")


def test_7b_weighs_what_its_tensors_weigh_and_says_what_fits():
    counts = 6_738_415_616 + 20_979_712  # Llama 2 7B, and the projector: 1024 x 4096 + 4096 x 4096 and their biases
    float16 = doctor.SLACK * 2 * counts
    device = torch.device("cpu")
    roomy = doctor.weigh("llava-v1.5-7b", device, 40 * 10**9)
    assert roomy.state == OK and "float32" in roomy.text and "--load-4bit" in roomy.text
    middle = doctor.weigh("llava-v1.5-7b", device, 20 * 10**9)
    assert "float32" not in middle.text
    weight = float(middle.text.split("bfloat16 ")[1].split(" GB")[0]) * 1e9
    assert float16 < weight < float16 + 2 * 10**9  # towers in float32
    tight = doctor.weigh("llava-v1.5-7b", device, 2 * 10**9)
    assert tight.state == NOTE and "does not fit" in tight.text and "--load-4bit" in tight.text


def test_a_python_without_the_packages_is_told_at_once_how_to_get_them(monkeypatch):
    monkeypatch.setattr(doctor, "list_missing", lambda: ["torch", "yaml"])
    python, packages = doctor.examine()
    assert python.subject == "python" and packages.state == doctor.FAULT
    assert packages.text.startswith("this Python lacks torch, pyyaml; run '")


def test_packages_that_are_missing_or_too_old_are_named_with_the_mend(monkeypatch):
    real = metadata.version
    versions = {"transformers": "4.37.2"}

    def version(name):
        if name in ("torch", "datasets"):
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2", "datasets>=4", "transformers>=5", "numpy>=2"])
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "is_there", lambda package: package in ("llava", "transformers"))
    found = by_subject(doctor.look_at_packages())
    assert found["torch"].state == FAULT and "-m pip install 'torch>=2'" in found["torch"].text
    assert found["datasets"].state == NOTE
    assert found["transformers"].text.startswith("4.37.2 is not >=5; mend: ")
    assert found["packages"].text.startswith("1 of 4 as llava asks for")


def test_a_look_that_goes_wrong_is_a_finding_and_the_others_go_on(run, monkeypatch):
    def explode():
        raise RuntimeError("driver\nlost")

    monkeypatch.setattr(doctor, "look_at_accelerator", explode)
    code, lines, errors = run()
    assert code == 2 and errors == "1 fault\n"
    assert "FAULT accelerator: cannot be looked at: RuntimeError: driver lost" in lines
    assert any(line.startswith("ok    disk") for line in lines)


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do_instead(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (finding,) = doctor.look_at_hub()
    assert finding.state == NOTE and "127.0.0.1:9 cannot be reached" in finding.text and "HF_ENDPOINT" in finding.text
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    (finding,) = doctor.look_at_hub()
    assert finding.state == NOTE and "no address cannot be reached" in finding.text


def test_a_pair_of_sentencepiece_and_protobuf_that_does_not_fit_is_named(monkeypatch):
    def refuse(name):
        raise TypeError("gencode 7.36.1, runtime 6.33.6")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    (finding,) = doctor.look_at_sentencepiece()
    assert finding.state == NOTE and "pip install -U protobuf" in finding.text and "6.33.6" in finding.text


def test_a_mistake_of_the_user_is_not_a_finding():
    with pytest.raises(InputError, match="no folder nowhere"):
        list(doctor.examine("nowhere"))


def test_a_finding_is_one_line_with_its_state_first():
    assert str(Finding("hub", NOTE, "offline")) == "note  hub: offline"
