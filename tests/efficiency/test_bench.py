"""The benchmark commands run, at sizes that say nothing: the slow tier."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import side_by_side, varying_budgets

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
    "train_packing": ["--size", "tiny", "--layers", "1", "--pocket-samples", "4", "--random-samples", "2"],
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


@pytest.mark.slow
def test_one_checkpoint_in_place_of_four_differs_from_none_at_any_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(varying_budgets, "train", lambda args, budget, logs: ROOT / side_by_side.CHECKPOINT)
    sizes = ["--train-images", "2", "--images", "1", "--budgets", "4", "12"]
    monkeypatch.setattr(sys, "argv", ["", "--work", str(tmp_path), "--json", str(tmp_path / "x.json"), *sizes])
    varying_budgets.main()
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["budget"], row["task"]) for row in rows] == [
        (budget, task) for budget in (4, 12) for task in ("pope", "gqa", "vqav2", "mean")
    ]
    assert all(set(row["scores"]) == {"4", "12", "4-12"} and len(set(row["scores"].values())) == 1 for row in rows)
    assert all(row["difference"]["value"] == 0 for row in rows if row["task"] != "mean")
    assert "| scored at | benchmark | trained at 4 | trained at 12 | trained at 4-12 | 4-12 less own, 95 % |" in (
        capsys.readouterr().out
    )
