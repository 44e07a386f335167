"""Read question and annotation files, with errors that name the file and the line.

A file that is missing or is no JSON at all stops the command. A single broken record of a question file does not: it
becomes a `Question` with a `fault`, is reported at the end, and leaves the answers incomplete.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.prompting import derive_query
from llava.eval.task import Question

DOWNLOAD_GUIDE = "playground/data/eval/README.md"


def find_file(path: Path) -> Path:
    """Return `path` if it is a file.

    Raises:
        InputError: otherwise, with the place that tells what to download.
    """
    if path.is_file():
        return path
    raise InputError(f"no such file: {path}; {DOWNLOAD_GUIDE} tells what to download and where it goes")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a UTF-8 text file with their numbers, counted from 1."""
    try:
        lines = find_file(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of objects, all of them intact.

    Raises:
        InputError: the file is missing or empty, or a line is not a JSON object.
    """
    records = []
    for number, line in read_lines(path):
        record, fault = _parse_record(line)
        if fault:
            raise InputError(f"{path} line {number}: {fault}")
        records.append(record)
    if not records:
        raise InputError(f"{path} is empty")
    return records


def load_question_file(path: Path, image_folder: Path) -> list[Question]:
    """Read a LLaVA question file: one `{"question_id", "image", "text"}` object per line.

    `image` may be a list of names, or be absent for a question of text alone.

    Args:
        path: the question file.
        image_folder: where the `image` names of the records are looked up.

    Raises:
        InputError: the file is missing, empty or not a single record of it is sound.
    """
    questions = []
    for number, line in read_lines(path):
        record, fault = _parse_record(line)
        where = f"{path.name} line {number}"
        questions.append(Question(id=where, fault=fault) if fault else _make_question(record, where, image_folder))
    if not questions:
        raise InputError(f"{path} is empty")
    if all(question.fault for question in questions):
        raise InputError(f"{path} is not a question file: {questions[0].id}: {questions[0].fault}")
    return questions


def _parse_record(line: str) -> tuple[dict[str, Any], str | None]:
    """Parse a JSON object; return it and None, or an empty one and what is wrong."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(record, dict):
        return {}, f"a JSON object is needed, not {type(record).__name__}"
    return record, None


def _make_question(record: dict[str, Any], where: str, image_folder: Path) -> Question:
    """Make the question of one record; `where` stands for the id of a record that has none."""
    identity, category = record.get("question_id"), record.get("category")
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        return Question(id=where, category=category, fault='"question_id" must be a number or a string')
    text = record.get("text")
    if not isinstance(text, str):
        return Question(id=identity, category=category, fault=f'{where}: "text" must be a string')
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        return Question(id=identity, category=category, fault=f'{where}: "image" must be a file name or a list of them')
    images = tuple(image_folder / name for name in names)
    return Question(id=identity, prompt=text, query=derive_query(text), images=images, category=category)
