"""What benchmarks share: LLaVA's archive, question files, annotations whose fields are checked, files for a server.

A file that is missing or is not JSON stops the command. A single broken record of a question file does not: it becomes
a `Question` with a `fault`, is reported at the end, and leaves the answers incomplete. Every field of an annotation
that a metric reads is checked, so that a wrong file is named instead of a wrong number given.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Question, Verdict
from llava.eval.metrics.vqa_accuracy import rank_references
from llava.eval.metrics.vqa_text import normalize_m4c
from llava.files import FileError, parse_record, read_json, read_jsonl, read_lines, write_text
from llava.prompt import query_of

Kind = TypeVar("Kind")

DOWNLOAD_HINT = "`python -m llava.eval download TASK` fetches it; playground/data/eval/README.md says what goes where"
KIND_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


# ---------------------------------------------------------------------------------------------------------- downloads
COCO_PAGE = "https://cocodataset.org/#download"
COCO_VAL2014 = "http://images.cocodataset.org/zips/val2014.zip"
COCO_VAL2014_IMAGES, COCO_VAL2014_BYTES = 40_504, 6_645_013_297


def from_eval_zip(*names: str, splits: tuple[str, ...] = ()) -> Download:
    """Describe question files of a benchmark that LLaVA's `eval.zip` holds, which is unpacked in the data root."""
    return Download(
        tuple(map(Place, names)),
        page="https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md",
        by_hand="a browser (Google Drive)",
        archive="eval.zip",
        unpack_in="..",
        splits=splits,
    )


# ---------------------------------------------------------------------------------------------------------- questions
def load_question_file(path: Path, image_folder: Path, *, needs_image: bool = False) -> list[Question]:
    """Read a LLaVA question file: one `{"question_id", "image", "text"}` object per line.

    `image` may be a list of names, or be absent for a question of text alone (with `needs_image` that is a fault).
    Names are looked up in `image_folder`. A file of which no record can be used is refused.
    """
    questions = []
    for number, line in read_lines(path, DOWNLOAD_HINT):
        where = f"{path.name} line {number}"
        try:
            question = _make_question(parse_record(line, where), where, image_folder)
        except FileError as fault:
            question = Question(id=where, fault=str(fault).removeprefix(where).lstrip(": "))
        if needs_image and not question.images and not question.fault:
            question = replace(question, fault="the record has no image")
        questions.append(question)
    if not questions:
        raise InputError(f"{path} is empty")
    if all(question.fault for question in questions):
        raise InputError(f"{path} is not a question file: {questions[0].id}: {questions[0].fault}")
    return questions


def _make_question(record: Mapping[str, Any], where: str, image_folder: Path) -> Question:
    """Make the question of one record; a record without id is called `where`."""
    identity, category = record.get("question_id"), record.get("category")
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        return Question(id=where, fault='"question_id" must be a number or a string')
    text = record.get("text")
    if not isinstance(category, str | int | None):
        return Question(id=identity, fault=f'{where}: "category" must be a string')
    if not isinstance(text, str):
        return Question(id=identity, category=category, fault=f'{where}: "text" must be a string')
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        return Question(id=identity, category=category, fault=f'{where}: "image" must be a file name or a list of them')
    images = tuple(image_folder / name for name in names)
    return Question(id=identity, prompt=text, query=query_of(text), images=images, category=category)


def build_questions(records: Sequence[object], build: Callable[[int, object], Question]) -> list[Question]:
    """Make questions of an official file's records, counted from 0; a record that cannot be used is a fault."""
    questions = []
    for number, record in enumerate(records):
        try:
            questions.append(build(number, record))
        except InputError as fault:
            questions.append(Question(id=f"record {number}", fault=str(fault)))
    return questions


def build_question(identity: int | str, text: str, image: Path) -> Question:
    """Make a question as a line of a LLaVA question file would have it."""
    return Question(id=identity, prompt=text, query=query_of(text), images=(image,), category="default")


# -------------------------------------------------------------------------------------------------------- annotations
def read_document(path: Path) -> Any:
    """Read a benchmark's file that is one JSON document; a missing one is named with where to get it."""
    return read_json(path, DOWNLOAD_HINT)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a benchmark's JSON Lines file of objects, all of them intact."""
    return read_jsonl(path, DOWNLOAD_HINT)


def find_first(candidates: Sequence[Path]) -> Path:
    """Return the first place of a file that is there; where none is, the documented place is named, the first."""
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"no such file: {candidates[0]}; {DOWNLOAD_HINT}")


def take(record: object, name: str, kind: type[Kind], where: str) -> Kind:
    """Return a field of an annotation, which must be of a kind; `where` names file and record in the message."""
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise InputError(f'{where}: "{name}" must be {KIND_NAMES[kind]}')
    return value


def take_strings(record: object, name: str, where: str) -> list[str]:
    """Return a field of an annotation that must be a list of strings, at least one."""
    values = take(record, name, list, where)
    if not values or not all(isinstance(value, str) for value in values):
        raise InputError(f'{where}: "{name}" must be a list of strings, at least one')
    return values


@dataclass(frozen=True)
class PeopleAnswers:
    """What ten people answered to a question of VQAv2 or VizWiz, and the groups that it belongs to.

    `answerable`: whether the image answers it at all (VizWiz).
    """

    references: Sequence[str]
    answer_type: str
    question_type: str = ""
    answerable: bool = True


def take_people_answers(record: object, where: str, **more: Any) -> PeopleAnswers:
    """Read an official annotation: `answers`, a list of objects with an `answer`, and `answer_type`."""
    references = [take(each, "answer", str, f"{where} answers") for each in take(record, "answers", list, where)]
    if not references:
        raise InputError(f'{where}: "answers" is empty')
    return PeopleAnswers(references, take(record, "answer_type", str, where), **more)


def judge_upload(key: str, text: str, people: PeopleAnswers, grade: Callable[[str, Sequence[str]], float]) -> Verdict:
    """Return the verdict on an answer: LLaVA uploads it after TextVQA's normaliser, and that is what is graded."""
    uploaded, references = normalize_m4c(text), people.references
    points, category = grade(uploaded, references), people.answer_type
    return Verdict(key, text, rank_references(references), points, parsed=uploaded, category=category)


def require_annotations(
    questions: Sequence[Question],
    names: Sequence[int | str],
    annotated: Collection[int | str],
    annotation_file: Path,
    required: Collection[int | str] | None = None,
) -> None:
    """Refuse questions and annotations of different sets, as the official scorers do.

    A broken question could be that of any annotation, so that with one no annotation counts as unasked.

    Args:
        questions: all questions of the benchmark.
        names: what each question's annotation is found by.
        annotated: what there are annotations of.
        annotation_file: where they are from.
        required: the annotations that need a question; None for all.
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


# ------------------------------------------------------------------------------------------------------------ uploads
def write_upload(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write what a server reads: JSON on one line without a newline, to the byte as the released scripts write it."""
    return write_text(path, json.dumps(records))
