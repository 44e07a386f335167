"""`scripts/gpu.sh` without a GPU: every part is rehearsed, goes on where it was, and its figures become tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from scripts.gpu import parts
from scripts.gpu.__main__ import PARTS
from scripts.gpu.parts import Scale, Skip, run_part

ROOT = Path(__file__).parents[1]


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = ["bash", "scripts/gpu.sh", *map(str, arguments)]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def report(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.gpu.report", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_part_is_rehearsed_and_reported(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        figures = json.loads((tmp_path / f"{part}.json").read_text())
        assert figures["complete"] and figures["steps"]
        assert not any("out_of_memory" in step for step in figures["steps"].values())
    parity = json.loads((tmp_path / "parity.json").read_text())["steps"]
    exact = [step for name, step in parity.items() if "float32" in name and "bfloat16" not in name]
    assert all(step["cases"] == step["kept_equal"] == step["ids_equal"] > 0 for step in exact)
    served = json.loads((tmp_path / "serve.json").read_text())["steps"]
    assert all(step["answers_differing"] == 0 < step["answers"] for step in served.values())
    assert not json.loads((tmp_path / "tests.json").read_text())["steps"]["tests/test_generation.py"]["failed"]

    again = run_script(tmp_path, "--rehearse")
    assert again.stdout.splitlines() == [f"{part}: complete" for part in PARTS]

    tables = report(tmp_path)
    assert tables.returncode == 0, tables.stderr
    for part in PARTS:
        assert f"#### {part}: tiny, cpu" in tables.stdout
    columns = {line.count("|") for line in tables.stdout.splitlines() if line.startswith("| towers")}
    assert len(columns) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = run_script(tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no GPU: torch finds no accelerator here; --rehearse tries every part, small, on the CPU"
    ]
    assert not (tmp_path / "out").exists()


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    done = run_script(tmp_path, "speed")
    assert (done.returncode, done.stderr) == (
        2,
        'error: part "speed" is unknown: use parity, stages, methods, loop, serve, training, tests\n',
    )
    done = report(tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path} holds no figures: run `bash scripts/gpu.sh {tmp_path}` on a machine with a GPU\n"
    )


@pytest.fixture
def scale() -> Scale:
    return Scale.choose(is_rehearsal=True)


def test_a_part_that_was_cut_off_goes_on_with_the_next_step(scale: Scale, tmp_path: Path) -> None:
    calls = []

    def step(name: str, fails: bool = False):
        def work() -> dict:
            calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"value": name}

        return work

    with pytest.raises(KeyboardInterrupt):
        run_part("x", {"a": step("a"), "b": step("b", fails=True), "c": step("c")}, scale, tmp_path)
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["steps"] == {"a": {"value": "a"}} and not figures["complete"]
    assert run_part("x", {name: step(name) for name in "abc"}, scale, tmp_path)
    assert calls == ["a", "b", "b", "c"]
    assert json.loads((tmp_path / "x.json").read_text())["complete"]


def test_a_part_stops_when_its_time_is_up(scale: Scale, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(parts, "PART_SECONDS", -1)
    assert not run_part("x", {"a": dict}, scale, tmp_path)
    assert capsys.readouterr().out == "x: time is up; the same command goes on with a\n"


def test_what_the_machine_cannot_do_is_written_down(scale: Scale, tmp_path: Path, monkeypatch) -> None:
    def too_much() -> dict:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 80 GiB. GPU 0 has ...")

    def lacks() -> dict:
        raise Skip("flash_attn is not installed")

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert run_part("x", {"big": too_much, "flash": lacks}, scale, tmp_path)
    steps = json.loads((tmp_path / "x.json").read_text())["steps"]
    assert steps == {"big": {"out_of_memory": "out of memory"}, "flash": {"skipped": "flash_attn is not installed"}}


def test_figures_of_two_machines_are_not_mixed(scale: Scale, tmp_path: Path, monkeypatch) -> None:
    run_part("x", {"a": dict}, scale, tmp_path)
    monkeypatch.setattr(Scale, "describe", lambda self: {"device": "another"})
    with pytest.raises(InputError, match=r"x.json is from another machine or model \(cpu, tiny, .*take another folder"):
        run_part("x", {"b": dict}, scale, tmp_path)
