"""The comparison with lmms-eval runs, at a size that says nothing, and its answers are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: bash scripts/test_clients.sh FOLDER")


def test_the_benchmark_compares_equal_answers_and_writes_its_figures(tmp_path: Path) -> None:
    size = ("--images", "2", "--questions-per-image", "3", "--rounds", "1", "--batch-sizes", "1", "2")
    command = [sys.executable, "-m", "scripts.bench.clients", *size, "--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "x.json").read_text())
    names = ["our runner", "llava_trim", "lmms-eval llava, batch 1", "lmms-eval llava, batch 2"]
    assert figures["same_answers"] == dict.fromkeys(names, 6)
    assert all(len(values) == 1 and values[0] > 0 for values in figures["seconds"].values())
