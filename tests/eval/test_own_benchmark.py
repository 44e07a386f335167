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
    pytest.importorskip("matplotlib")
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.json"
    task = [example, "--root", tmp_path / "data" / "colors", "--answers", answers]
    answered = run("answer", *task, "--model-path", tiny_checkpoint, "--max-new-tokens", 4)
    assert answered.returncode == 0, answered.stderr
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2]
    rows[0]["text"] = "Red."
    references = tmp_path / "data" / "colors" / "answers.jsonl"
    references.write_text(references.read_text().replace("red", "Red"))
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
    (tmp_path / "folder.py").mkdir()
    problems = {"empty.py": "must define one subclass", "missing.py": "no such file", "folder.py": "is a folder, not"}
    for name, words in problems.items():
        done = run("score", tmp_path / name, "--root", tmp_path, "--answers", tmp_path / "a.jsonl")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_reference_that_is_missing_is_named_in_one_line(example: Path, tmp_path: Path) -> None:
    root, answers = tmp_path / "data" / "colors", tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": number, "text": "Red"}) + "\n" for number in range(3)))
    lines = (root / "answers.jsonl").read_text().splitlines(keepends=True)
    (root / "answers.jsonl").write_text("".join(lines[:2]))
    done = run("score", example, "--root", root, "--answers", answers)
    assert done.returncode == 2
    assert done.stderr == f'error: {root / "answers.jsonl"}: "2" must be a string\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Colors(Benchmark):", "class Colors(Benchmark:", "{file} line 13: "),
        ("from pathlib import Path", "from nowhere import Path", "{file} line 7: ModuleNotFoundError: No module named"),
        (
            "    max_new_tokens = 16",
            "    max_new_tokens = 1 / 0",
            "{file} line 19: ZeroDivisionError: division by zero",
        ),
        (
            '    name = "colors"\n',
            "",
            "{file} line 13: class Colors needs the attribute name, a string, such as name =",
        ),
        ('    row = "Colors (Acc)"\n', "", "{file} line 13: class Colors needs the attribute row, a string"),
        ('    folders = ("colors",)\n', "", "{file} line 13: class Colors needs the attribute folders, a tuple"),
        ('("colors",)', '"colors"', "{file} line 13: class Colors needs the attribute folders, a tuple"),
        ("def load(", "def read(", "{file} line 13: class Colors needs the method load"),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_line_that_names_the_place(
    example: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    code = example.read_text(encoding="utf-8")
    assert code.count(old) == 1
    example.write_text(code.replace(old, new), encoding="utf-8")
    done = run("score", example, "--root", tmp_path, "--answers", tmp_path / "a.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words.format(file=example)}")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_may_use_dataclasses_and_annotations_that_are_strings(example: Path, tmp_path: Path) -> None:
    code = example.read_text(encoding="utf-8")
    head, tail = code.split("\n\n\nclass Colors")
    head = head.replace(
        "from collections", "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom collections"
    )
    example.write_text(f"{head}\n\n\n@dataclass\nclass Hue:\n    word: str\n\n\nclass Colors{tail}", encoding="utf-8")
    done = run("score", example, "--root", tmp_path, "--answers", tmp_path / "a.jsonl")
    assert done.stderr.startswith(f"error: no such file: {tmp_path / 'questions.jsonl'}")
