"""Damaged questions, annotations and answers of every benchmark: the right headline or one line, never a traceback.

The damage is generated: every value of a record, and the record itself, is replaced by each of `DAMAGES`. Where the
replacement is of another JSON kind than the value, the headline must stay what it was, or the score be refused.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, row_key
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.judge import ExactJudge
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, score_answers
from llava.files import write_jsonl
from tests.eval.test_promises import FOLDERS

GONE = object()
DAMAGES: dict[str, Any] = {
    "gone": GONE,
    "null": None,
    "empty list": [],
    "list": ["no", 1],
    "list of null": [None],
    "object": {"answer": None},
    "true": True,
    "negative": -1,
    "fraction": 0.5,
    "huge": 10**30,
    "empty text": "",
    "text": "no",
    "digits": "7",
    "half a surrogate pair": "\ud83d",
    "control characters": "\x1b[31m\x00",
}
FILES = {
    "vqav2": ("v2_mscoco_val2014_annotations.json", "llava_vqav2_mscoco_val2014.jsonl"),
    "gqa": ("testdev_balanced_questions.json", "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_choices.json"),
    "vizwiz": ("val.json", "llava_val.jsonl"),
    "sqa": ("problems.json", "pid_splits.json"),
    "textvqa": ("TextVQA_0.5.1_val.json",),
    "pope": ("coco/coco_pope_popular.json", "llava_pope_test.jsonl"),
    "mme": ("llava_mme.jsonl",),
    "mmbench": (),  # MMBench-CN is the same code; damaged tables come below
    "seed": ("SEED-Bench.json", "llava-seed-bench.jsonl"),
    "llavabench": ("answers_gpt4.jsonl", "context.jsonl", "questions.jsonl"),
    "mmvet": ("mm-vet.json", "llava-mm-vet.jsonl"),
}
RECORD = 3
"""Number of the record that is damaged, from 0."""

Steps = tuple[str | int, ...]


def find_values(data: Any, steps: Steps = ()) -> Iterator[Steps]:
    """Name the document itself, and every value of one record of each list or table in it."""
    yield steps
    if isinstance(data, dict):
        named = list(data)
        # A table of records by id has many entries alike; one of them is enough.
        for name in named[RECORD : RECORD + 1] if len(named) > 20 else named:
            yield from find_values(data[name], (*steps, name))
    elif isinstance(data, list) and data:
        number = min(RECORD, len(data) - 1)
        yield from find_values(data[number], (*steps, number))


def replace(data: Any, steps: Steps, value: Any) -> Any:
    """Return a copy of a document with one value replaced; None for "gone" where nothing can be left out."""
    if not steps:
        return value
    copy = json.loads(json.dumps(data))
    holder = copy
    for step in steps[:-1]:
        holder = holder[step]
    if value is GONE:
        del holder[steps[-1]]
    else:
        holder[steps[-1]] = value
    return copy


def find_value(data: Any, steps: Steps) -> Any:
    for step in steps:
        data = data[step]
    return data


def kind_of(value: Any) -> type:
    return float if type(value) is int else type(value)


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of each benchmark's folder that tests may spoil, if they mend it."""
    copies = {}
    for name, task in BENCHMARKS.items():
        root = tmp_path_factory.mktemp("broken") / name
        shutil.copytree(golden / "oracle" / FOLDERS.get(name, name), root)
        # Some oracles lack answers on purpose; complete, a further one that is lost shows.
        rows = read_answers(root / "answers.jsonl")
        known = {row_key(row, task.key_fields) for row in rows}
        heads = [question.head() for question in task.load(root)]
        lost = [head | {"text": ""} for head in heads if row_key(head, task.key_fields) not in known]
        write_jsonl(root / "answers.jsonl", [*rows, *lost])
        copies[name] = root
    return copies


def score(task: Benchmark, root: Path, answers: Path | None = None) -> float:
    judge = ExactJudge(task) if task.uses_judge == "always" else None
    return score_answers(task, answers or root / "answers.jsonl", root, judge=judge).headline


def check(task: Benchmark, root: Path, right: float | None, where: str, answers: Path | None = None) -> None:
    """Score damaged data; `right` is what the headline must be if it is given, None for any number."""
    try:
        headline = score(task, root, answers)
    except InputError as error:
        assert str(error), where
        return
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    assert math.isfinite(headline), where
    assert right is None or headline == pytest.approx(right, abs=1e-9), where


def read_file(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    is_lines = path.suffix == ".jsonl" or path.parent.name == "coco"
    return [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)


def write_file(path: Path, data: Any) -> None:
    is_lines = (path.suffix == ".jsonl" or path.parent.name == "coco") and isinstance(data, list)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in data) if is_lines else json.dumps(data))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [name for name, files in FILES.items() if files])
def test_a_damaged_file_of_the_benchmark_gives_the_right_headline_or_one_line(
    name: str, damage: str, folders: dict[str, Path]
) -> None:
    task, root = find_benchmark(name), folders[name]
    right = score(task, root)
    for file in FILES[name]:
        path = root / file
        original, data = path.read_bytes(), read_file(path)
        try:
            for steps in find_values(data):
                if DAMAGES[damage] is GONE and not steps:
                    continue
                # A list that lacks an item is a list of other data.
                is_item = DAMAGES[damage] is GONE and isinstance(steps[-1], int)
                other_kind = kind_of(find_value(data, steps)) is not kind_of(DAMAGES[damage]) and not is_item
                write_file(path, replace(data, steps, DAMAGES[damage]))
                check(task, root, right if other_kind else None, f"{file} {steps}: {damage}")
        finally:
            path.write_bytes(original)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_answer_gives_the_right_headline_or_one_line(
    name: str, damage: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    task, root = find_benchmark(name), folders[name]
    right, rows = score(task, root), read_answers(root / "answers.jsonl")
    for steps in [(), *((column,) for column in rows[RECORD])]:
        if DAMAGES[damage] is GONE and not steps:
            continue
        other_kind = kind_of(find_value(rows[RECORD], steps)) is not kind_of(DAMAGES[damage])
        changed = [*rows[:RECORD], replace(rows[RECORD], steps, DAMAGES[damage]), *rows[RECORD + 1 :]]
        write_jsonl(tmp_path / "answers.jsonl", changed)
        check(task, root, right if other_kind else None, f"{steps}: {damage}", tmp_path / "answers.jsonl")


TABLE = "mmbench_dev_20230712.tsv"
NEEDED = ("index", "question", "A", "B", "image")
CELLS = ("", " ", "nan", "None", "E", "abc", "-1", "1.5", "7", '"', "a\tb", "\x00", "Z" * 200, "١", "1e6")


def read_tsv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def write_tsv(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def test_a_table_of_mmbench_that_lacks_a_column_gives_the_right_headline_or_one_line(folders: dict[str, Path]) -> None:
    task, root, path = find_benchmark("mmbench"), folders["mmbench"], folders["mmbench"] / TABLE
    original, right, rows = path.read_bytes(), score(task, root), read_tsv(path)
    try:
        for column, title in enumerate(rows[0]):
            for changed in (
                [row[:column] + row[column + 1 :] for row in rows],
                [[*row[:column], f"other {title}", *row[column + 1 :]] if row is rows[0] else row for row in rows],
            ):
                write_tsv(path, changed)
                try:
                    assert score(task, root) == pytest.approx(right, abs=1e-9)
                    assert title not in NEEDED
                except InputError as error:
                    # Without an option's column the answers are about other options; without the right ones only a
                    # server can score.
                    assert title in NEEDED or title in ("C", "D", "hint", "answer")
                    assert title not in NEEDED or f"lacks the column {title}" in str(error)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_a_damaged_cell_of_mmbench_ends_in_no_traceback(cell: str, folders: dict[str, Path]) -> None:
    task, root, path = find_benchmark("mmbench"), folders["mmbench"], folders["mmbench"] / TABLE
    original, rows = path.read_bytes(), read_tsv(path)
    try:
        for column, title in enumerate(rows[0]):
            changed = [list(row) for row in rows]
            changed[RECORD + 1][column] = cell
            write_tsv(path, changed)
            check(task, root, None, f"{title}: {cell!r}")
    finally:
        path.write_bytes(original)


BY_ID = [name for name, task in BENCHMARKS.items() if task.key_fields == ("question_id",)]


@pytest.mark.parametrize("name", BY_ID)
def test_answers_of_other_tools_have_an_id_and_a_text(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    task, root = find_benchmark(name), folders[name]
    rows = read_answers(root / "answers.jsonl")
    write_jsonl(tmp_path / "bare.jsonl", [{name: row[name] for name in ("question_id", "text")} for row in rows])
    assert score(task, root, tmp_path / "bare.jsonl") == pytest.approx(score(task, root), abs=1e-9)


@pytest.mark.parametrize("name", BY_ID)
def test_ids_of_the_other_json_type_find_their_questions(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    task, root = find_benchmark(name), folders[name]
    rows = read_answers(root / "answers.jsonl")
    for row in rows:
        row["question_id"] = turn_type(row["question_id"])
    write_jsonl(tmp_path / "turned.jsonl", rows)
    assert score(task, root, tmp_path / "turned.jsonl") == pytest.approx(score(task, root), abs=1e-9)


def turn_type(identity: int | str) -> int | str:
    if isinstance(identity, int):
        return str(identity)
    return int(identity) if identity.isdecimal() else identity


@pytest.mark.parametrize("name", BENCHMARKS)
def test_half_a_surrogate_pair_in_every_answer_can_be_scored_and_exported(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    task, root = find_benchmark(name), folders[name]
    rows = [row | {"text": row["text"] + "\ud83d"} for row in read_answers(root / "answers.jsonl")]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    assert math.isfinite(score(task, root, tmp_path / "answers.jsonl"))
    if name.startswith("mmbench"):
        pytest.importorskip("openpyxl")
    if task.server or task.upload_folder:
        files = export_answers(task, tmp_path / "answers.jsonl", root, tmp_path / "out")
        assert all(file.stat().st_size for file in files)


@pytest.mark.parametrize("label", ["No", "NO"])
def test_the_case_of_popes_labels_does_not_count(label: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pope, root = find_benchmark("pope"), tmp_path / "pope"
    shutil.copytree(folders["pope"], root)
    for path in (root / "coco").glob("*.json"):
        path.write_text(path.read_text().replace('"label": "no"', f'"label": "{label}"'))
        assert label in path.read_text()
    assert score(pope, root) == pytest.approx(score(pope, folders["pope"]), abs=1e-9)
