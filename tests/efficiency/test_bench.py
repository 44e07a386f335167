"""The benchmark commands run, at sizes that say nothing: the slow tier."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "eval_loop": ["--images", "2", "--questions-per-image", "3"],
    "selection": ["--size", "tiny", "--batch-size", "1", "2", "--reduce", "every"],
    "end_to_end": ["--size", "tiny"],
    "growth": ["--size", "tiny", "--images", "1", "2", "--questions", "1", "2", "--sides", "8", "12"],
    "memory_flat": ["--questions", "40"],
    "loading": ["--size", "tiny"],
    "evidence": ["--runs", "3", "--flips", "0.1"],
    "serve": ["--requests", "6", "--clients", "1", "3"],
    "train_speed": ["--size", "tiny", "--pocket-batch", "2"],
    "train_throughput": ["--model", "random", "--size", "tiny", "--batch", "2", "--passes", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_runs_and_writes_its_figures(name, tmp_path):
    command = [sys.executable, "-m", f"scripts.bench.{name}", *COMMANDS[name], "--json", str(tmp_path / "x.json")]
    command += [] if name in ("memory_flat", "evidence", "serve") else ["--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "x.json").read_text())["machine"]["threads"] >= 1
