"""The answers file: one JSON object per line, in question order.

Its columns are the published ones: question_id, prompt, text, answer_id, model_id, metadata, and what a benchmark
adds. Rows are matched with questions by key, never by position. `store` writes the file while a run goes on.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.benchmark import Question, Row, index_questions, row_key

ANSWER_ID_LENGTH = 22
# The alphabet of the `shortuuid` package, whose ids the published answers files carry: no 0, 1, I, O, l.
ANSWER_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
MAX_NAMED_IDS = 5


def make_row(question: Question, text: str, model_id: str, metadata: Mapping[str, Any]) -> Row:
    """Make the line of one answer.

    Args:
        question: what was asked.
        text: the answer, without surrounding white space.
        model_id: name of the checkpoint.
        metadata: numbers about this answer, such as the visual tokens kept.
    """
    head = question.head()
    return {
        "question_id": head.pop("question_id"),
        "prompt": head.pop("prompt"),
        "text": text,
        **head,
        "answer_id": make_answer_id(model_id, question),
        "model_id": model_id,
        "metadata": dict(metadata),
    }


def make_answer_id(model_id: str, question: Question) -> str:
    """Make a 22-character id that looks like the published random ones, but is the same in every run.

    A run that was killed and resumed must write the same file as one that was left alone.
    """
    name = json.dumps([model_id, question.head()], sort_keys=True)
    number = uuid.uuid5(uuid.NAMESPACE_URL, name).int
    digits = []
    for _ in range(ANSWER_ID_LENGTH):
        number, digit = divmod(number, len(ANSWER_ID_ALPHABET))
        digits.append(ANSWER_ID_ALPHABET[digit])
    return "".join(reversed(digits))


def dump_row(row: Row) -> str:
    """Write a row as one line, with its newline."""
    return json.dumps(row) + "\n"


def parse_rows(content: bytes, name: str) -> list[Row]:
    """Parse the lines of an answers file.

    A last line that is torn, as a killed writer leaves it, is ignored.

    Args:
        content: the file.
        name: how an error calls it.

    Raises:
        InputError: a line other than the last is not a JSON object with a question_id.
    """
    *lines, tail = content.split(b"\n")
    rows = [_parse_row(line, f"{name} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if tail.strip():
        try:
            rows.append(_parse_row(tail, name))
        except InputError:
            return rows
    return rows


def read_answers(path: Path) -> list[Row]:
    """Read an answers file, of this package or of another one that writes the same columns.

    Raises:
        InputError: there is no such file, or a line in it is broken.
    """
    try:
        return parse_rows(path.read_bytes(), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"no answers file {path}; `python -m llava.eval answer` makes it") from None


def write_answers(path: Path, rows: Iterable[Row]) -> None:
    """Write an answers file as a whole: it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(map(dump_row, rows))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the file system (no permission, no such place, disk full) into a user's one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def pair_answers(questions: Sequence[Question], rows: Iterable[Row], key_fields: Sequence[str]) -> dict[str, Row]:
    """Match answers with questions by key.

    Args:
        questions: all questions of the benchmark.
        rows: answers, in any order.
        key_fields: columns that together name a question.

    Returns:
        The row of each answered question by its key.

    Raises:
        InputError: an answer to no question of the benchmark, two different answers to the same one, or two questions
            of one key.
    """
    known = index_questions(questions, key_fields)
    paired: dict[str, Row] = {}
    for row in rows:
        key = row_key(row, key_fields)
        if key not in known:
            raise InputError(f"an answer belongs to no question of this benchmark: {', '.join(key_fields)} = {key}")
        if key in paired and paired[key]["text"] != row["text"]:
            raise InputError(f"two different answers to one question: {', '.join(key_fields)} = {key}")
        paired.setdefault(key, row)
    return paired


def name_questions(questions: Sequence[Question]) -> str:
    """Name questions by id for a message; of many, the first few."""
    named = ", ".join(str(question.id) for question in questions[:MAX_NAMED_IDS])
    rest = len(questions) - MAX_NAMED_IDS
    return f"{named} and {rest} more" if rest > 0 else named


def _parse_row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise InputError(f"{where} is not JSON") from None
    if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
        raise InputError(f'{where} is not an answer: a JSON object with "question_id" and "text" is needed')
    return row
