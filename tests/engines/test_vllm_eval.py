"""An evaluation on vLLM writes the answers file of the plain run; scripts/test_vllm.sh runs this in its environment."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from llava.eval.benchmarks import BENCHMARKS
from llava.signals import is_alive
from playground.shapes.generate import write_eval
from playground.shapes.wide_heads import write_wide_heads
from tests.serve.acceptance import ROOT, list_processes

NAMES = ("pope", "textvqa")
NUM_IMAGES = 12
OPTIONS = {"enforce_eager": True, "block_size": 32}
ON_VLLM = ("--engine", "vllm", "--vllm-options", json.dumps(OPTIONS))
LIMIT_SECONDS = 600
"""How long a command may take on a busy machine."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with wider heads (`model`), and benchmarks of shapes (`eval`)."""
    folder = tmp_path_factory.mktemp("world")
    write_wide_heads(folder / "model")
    write_eval(folder / "eval", NUM_IMAGES, seed=3, names=NAMES)
    return folder


@contextmanager
def start(world: Path, name: str, answers: Path, *options: str) -> Iterator[subprocess.Popen]:
    root = BENCHMARKS[name].find_root(world / "eval")
    command = [sys.executable, "-m", "llava.eval", "answer", name, "--root", str(root), "--answers", str(answers)]
    model = ["--model-path", str(world / "model"), "--device", "cpu", "--reduce", "TRIM:-1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *model, *options], cwd=ROOT, text=True, **pipes) as process:
        yield process


def answer(world: Path, name: str, answers: Path, *options: str) -> str:
    """Answer a benchmark; returns what is told on stderr."""
    with start(world, name, answers, *options) as process:
        _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, told
    return told


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_answers_file_is_that_of_the_plain_run(world: Path) -> None:
    """TextVQA's answers are long, and its query is not the prompt."""
    plain, other = world / "plain.jsonl", world / "vllm.jsonl"
    answer(world, "textvqa", plain)
    answer(world, "textvqa", other, *ON_VLLM)
    assert read_rows(other) == read_rows(plain)
    assert len({row["text"] for row in read_rows(plain)}) > 1


def test_a_run_that_is_told_to_end_leaves_no_process_and_goes_on_where_it_stopped(world: Path) -> None:
    plain, answers = world / "again.plain.jsonl", world / "again.jsonl"
    answer(world, "pope", plain)
    parts = Path(f"{answers}.parts/0.jsonl")
    with start(world, "pope", answers, *ON_VLLM, "--batch-size", "1") as process:
        end = time.monotonic() + LIMIT_SECONDS
        while not (parts.exists() and parts.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        processes = list_processes(process.pid)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM and len(processes) > 2, told
    while any(map(is_alive, processes)):
        assert time.monotonic() < end + LIMIT_SECONDS
        time.sleep(0.1)
    assert "questions are answered already" in answer(world, "pope", answers, *ON_VLLM)
    assert read_rows(answers) == read_rows(plain)
