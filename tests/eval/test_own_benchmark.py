"""A benchmark is one file: the example of docs/adding_a_benchmark.md, from a folder of its own, in every command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.eval.test_commands import run

REPOSITORY = Path(__file__).parents[2]
COLORS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The document's example as a file outside of the package, with three questions beside it."""
    document = (REPOSITORY / "docs" / "adding_a_benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    root = tmp_path / "data" / "colors"
    (root / "images").mkdir(parents=True)
    questions, answers = [], []
    for number, (word, color) in enumerate(COLORS.items()):
        Image.new("RGB", (40, 30), color).save(root / "images" / f"{word}.png")
        questions.append({"question_id": number, "image": f"{word}.png", "text": "What color is it?"})
        answers.append({"question_id": number, "answer": word})
    for name, records in (("questions", questions), ("answers", answers)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = tmp_path / "colors.py"
    file.write_text(code, encoding="utf-8")
    return file


def test_the_example_passes_the_repositorys_lint(example: Path) -> None:
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--config", REPOSITORY / "pyproject.toml", example]
        done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_thirteenth_benchmark_runs_through_every_command(
    example: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    task = [example, "--root", tmp_path / "data" / "colors", "--answers", answers]
    answered = run("answer", *task, "--model-path", tiny_checkpoint, "--max-new-tokens", 4)
    assert answered.returncode == 0, answered.stderr
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2]
    rows[0]["text"] = "Red."
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = run("score", *task, "--json", scores)
    assert scored.stdout == "Colors (Acc)\t33.33\n", scored.stderr
    wrong = run("wrong", *task)
    assert wrong.returncode == 0, wrong.stderr
    assert "green" in wrong.stdout
    assert "red.png" not in wrong.stdout
    drawn = run("wrong", *task, "--draw", tmp_path / "wrong", "--limit", 1)
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((tmp_path / "wrong").glob("*.png"))) == 1
    report = run("report", f"tiny={scores}", f"again={scores}")
    assert "Colors (Acc)" in report.stdout
    assert "33.33" in report.stdout


def test_a_file_without_a_benchmark_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    for name, words in (("empty.py", "must define one subclass"), ("missing.py", "no such file")):
        done = run("score", tmp_path / name, "--root", tmp_path, "--answers", tmp_path / "a.jsonl")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
