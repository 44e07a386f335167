"""What VQAv2, GQA, VizWiz and TextVQA have in common: one picture and a short answer per question.

Questions come from LLaVA's question files, or are built from the benchmark's own; annotations are single JSON
documents, of which every field that a metric reads is checked, so that a wrong file is named instead of a wrong number
given.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import InputError
from llava.eval.prompting import derive_query
from llava.eval.sources import find_file, load_question_file
from llava.eval.task import Question, Row
from llava.eval.upload import write_content

Kind = TypeVar("Kind")

SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
KIND_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


def load_pictured_questions(path: Path, image_folder: Path) -> list[Question]:
    """Read a LLaVA question file in which every question is about a picture; one without cannot be asked."""
    return [
        replace(question, fault="the record has no image") if not question.images and not question.fault else question
        for question in load_question_file(path, image_folder)
    ]


def build_question(identity: int | str, text: str, image: Path) -> Question:
    """Make a question as a line of a LLaVA question file would have it."""
    return Question(id=identity, prompt=text, query=derive_query(text), images=(image,), category="default")


def find_first(candidates: Sequence[Path]) -> Path:
    """Return the first of several places of a file that is there.

    Raises:
        InputError: none is; names the first, where the documentation puts the file.
    """
    return next((path for path in candidates if path.is_file()), None) or find_file(candidates[0])


def read_document(path: Path) -> Any:
    """Read a file that is one JSON document.

    Raises:
        InputError: it is missing or is not JSON.
    """
    try:
        return json.loads(find_file(path).read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None


def take(record: Any, name: str, kind: type[Kind], where: str) -> Kind:
    """Return a field of an annotation.

    Args:
        record: the annotation.
        name: the field.
        kind: what it must be.
        where: file and record, for the message.

    Raises:
        InputError: the annotation is no object, or the field is missing or something else.
    """
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise InputError(f'{where}: "{name}" must be {KIND_NAMES[kind]}')
    return value


def take_references(record: Any, where: str) -> list[str]:
    """Return people's answers of a VQAv2 or VizWiz annotation: the field `answers`, of objects with an `answer`.

    Raises:
        InputError: there are none, or one is no string.
    """
    references = [take(each, "answer", str, f"{where} answers") for each in take(record, "answers", list, where)]
    if not references:
        raise InputError(f'{where}: "answers" is empty')
    return references


def require_annotations(
    questions: Sequence[Question],
    names: Sequence[Any],
    annotated: Collection[Any],
    annotation_file: Path,
    required: Collection[Any] | None = None,
) -> None:
    """Make sure that questions and annotations are of the same set, as the official scorers do.

    Args:
        questions: all questions of the benchmark.
        names: what each question's annotation is found by.
        annotated: what there are annotations of.
        annotation_file: where they are from.
        required: the annotations that need a question; None for all.

    Raises:
        InputError: a question has no annotation, or, unless a broken question could explain it, the other way round.
    """
    known = set(annotated)
    unknown = [
        name for question, name in zip(questions, names, strict=True) if name not in known and not question.fault
    ]
    if unknown:
        raise InputError(
            f"{annotation_file} has no annotation of {len(unknown)} questions (such as {unknown[0]}); "
            "questions and annotations must be of the same split"
        )
    unasked = set(annotated if required is None else required).difference(names)
    if unasked and not any(question.fault for question in questions):
        raise InputError(
            f"{annotation_file} annotates {len(unasked)} questions that the question file does not ask "
            f"(such as {min(map(str, unasked))}); questions and annotations must be of the same split"
        )


def require_any(answers: Mapping[str, Row], benchmark: str) -> None:
    """Make sure that there is something to score.

    Raises:
        InputError: there is not.
    """
    if not answers:
        raise InputError(f"{benchmark}: none of the questions has an answer")


def write_upload(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write what a server reads: one line of JSON, to the byte as the published scripts write it; return the path."""
    return write_content(path, json.dumps(records).encode())
