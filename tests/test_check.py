"""`python -m llava.check`: one line per part of a checkpoint, exit code 0 or 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.check import main
from llava.errors import run_command

NAME, BASE, PART = "llava-v1.5-tiny84-TRIM", "lmsys/vicuna-tiny-v1.5", "liuhaotian/llava-v1.5-mlp2x-tiny-pretrain"
TOWER = "openai/clip-vit-tiny-patch14-84"
SUBJECTS = [
    *("config.json", "files", "tensors", "values", "generation_config.json", "tokenizer", "image processor"),
    *("vision tower", "text tower"),
]


@pytest.fixture
def place(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (NAME, BASE, PART, TOWER):
        shutil.copytree(golden / "checkpoints" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command; returns its exit code and lines."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["check", *arguments])
        try:
            run_command(main)
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out.splitlines()

    return run


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_sound_checkpoint_has_a_line_per_part(place: Path, check):
    code, lines = check(NAME)
    assert code == 0
    assert [line[6:].split(":")[0] for line in lines] == SUBJECTS
    assert all(line.startswith("ok ") for line in lines)
    text = "\n".join(lines)
    for words in (
        "3 layers of width 64",
        "2 weight files",
        "37, as",
        "1000 tokens, prompts start with <s>",
        "36 patches",
    ):
        assert words in text


def test_a_part_is_checked_with_its_base(place: Path, check):
    (place / PART / "adapter_config.json").unlink(missing_ok=True)
    code, lines = check(PART, "--model-base", BASE)
    assert (code, "30 of the base model, 4 on it" in "\n".join(lines)) == (0, True)
    code, lines = check(PART)
    assert code == 2
    assert "FAULT files: liuhaotian/llava-v1.5-mlp2x-tiny-pretrain holds projector weights only" in "\n".join(lines)


def test_every_fault_is_reported_not_only_the_first(place: Path, check):
    edit(place / NAME / "generation_config.json", temperature="hot")
    (place / NAME / "tokenizer.model").write_bytes(b"")
    edit(place / TOWER / "preprocessor_config.json", crop_size=224)
    shard = place / NAME / "pytorch_model-00002-of-00002.bin"
    weights = torch.load(shard, weights_only=True)
    next(iter(weights.values())).view(-1)[0] = float("inf")
    torch.save(weights | {"model.extra.bias": torch.zeros(2)}, shard)
    code, lines = check(NAME)
    faults = {line[6:].split(":")[0]: line for line in lines if line.startswith("FAULT")}
    assert code == 2
    assert list(faults) == ["tensors", "values", "generation_config.json", "tokenizer", "image processor"]
    assert "first model.extra.bias" in faults["tensors"]
    assert "holds inf or NaN" in faults["values"]


@pytest.mark.parametrize(
    ("values", "subject"),
    [({"image_aspect_ratio": "PAD"}, "config.json"), ({"mm_vision_tower": "./no"}, "vision tower")],
)
def test_a_fault_that_others_depend_on_is_reported_once(place: Path, check, values: dict, subject: str):
    edit(place / NAME / "config.json", **values)
    code, lines = check(NAME)
    assert code == 2
    assert [line[6:].split(":")[0] for line in lines if line.startswith("FAULT")] == [subject]


def test_a_chat_template_that_config_names_and_the_tokenizer_lacks_is_a_fault(place: Path, check):
    edit(place / NAME / "config.json", conv_mode="chat_template")
    code, lines = check(NAME)
    (fault,) = (line for line in lines if line.startswith("FAULT"))
    assert code == 2 and "FAULT tokenizer: " in fault and "has no chat template: name a conversation template" in fault


def test_an_absent_checkpoint_is_a_fault(place: Path, check):
    code, lines = check("./nowhere")
    assert code == 2
    assert "FAULT config.json: checkpoint folder ./nowhere is not there" in lines[0]


def test_help_loads_no_torch():
    code = "import sys; sys.argv = ['check', '--help']\nimport llava.check\n" + (
        "try:\n    llava.check.main()\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ, stdout=-3).returncode == 0
