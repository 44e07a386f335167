"""VizWiz: photographs and spoken questions of blind people, each answered by ten others; many cannot be answered.

Splits:
    val: `val.json` (official questions and answers), `llava_val.jsonl` (questions; built from `val.json` where absent),
        pictures in `val/`. Scored here.
    test: `llava_test.jsonl` (or the official `test.json`), pictures in `test/`. Its answers are not public: a server
        scores what `export` writes.

Source of the rules: the VizWiz API. As in LLaVA, answers go through the TextVQA normaliser before they are scored or
uploaded; the scores of the answers as they are stand under `raw`. The official task of telling whether a question can
be answered wants a number per question; here it is 0 where the answer is `unanswerable`, else 1.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, row_key
from llava.eval.benchmarks._files import (
    SHORT_ANSWER_SUFFIX,
    build_question,
    find_first,
    load_question_file,
    read_document,
    require_annotations,
    require_any,
    take,
    take_references,
    write_upload,
)
from llava.eval.benchmarks._hub_vizwiz import VizWizTest, VizWizVal
from llava.eval.hub import HubForm
from llava.eval.metrics.vqa_accuracy import (
    UNANSWERABLE,
    average_precision,
    f1_score,
    grade_vizwiz,
    normalize_vizwiz,
    round_half_even,
    summarize_grades,
)
from llava.eval.metrics.vqa_text import normalize_m4c

VAL, TEST = "val", "test"
SUFFIX = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT_ANSWER_SUFFIX}"
OFFICIAL_FOLDER = "Annotations"
"""Folder inside the official archive; its files may stay there."""


@dataclass(frozen=True)
class VizWiz(Benchmark):
    """VizWiz: accuracy on val.

    Attributes:
        split: None is val where its annotations are at hand, because only there a score is to be had; else test, the
            split of the papers, for the server.
    """

    name = "vizwiz"
    row = "VizWiz val (Acc)"
    folders = ("vizwiz",)
    hub: ClassVar[Mapping[str, HubForm]] = {"test": VizWizTest(), "val": VizWizVal()}
    server = "EvalAI challenge 2185 (VizWiz-VQA)"

    split: str | None = None

    def with_split(self, split: str) -> "VizWiz":
        """Return VizWiz on `val` or `test`."""
        if split not in (VAL, TEST):
            raise InputError(f"vizwiz has no split {split!r}; known: {VAL}, {TEST}")
        return VizWiz(split)

    def load(self, root: Path) -> list[Question]:
        """Read the questions of the split."""
        split = self.split_in(root)
        path = root / f"llava_{split}.jsonl"
        official = next(filter(Path.is_file, official_places(root, split)), None)
        if official and not path.is_file():
            return build_questions(official, root / split)
        return load_question_file(path, root / split, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        """Score val as the official scorer does; the answers of test are not public."""
        if self.split_in(root) != VAL:
            return None
        require_any(answers, "VizWiz")
        return score_vizwiz(self.load(root), answers, find_first(official_places(root, VAL)))

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the upload file `vizwiz_<split>.json`."""
        upload = make_upload(answers, self.load(root))
        return [write_upload(destination / f"vizwiz_{self.split_in(root)}.json", upload)]

    def split_in(self, root: Path) -> str:
        """Return the split, chosen by what is in a folder where none was named."""
        return self.split or (VAL if any(map(Path.is_file, official_places(root, VAL))) else TEST)


def official_places(root: Path, split: str) -> list[Path]:
    """List where the official file of a split may lie."""
    return [root / f"{split}.json", root / OFFICIAL_FOLDER / f"{split}.json"]


def read_official(path: Path) -> list[Any]:
    """Read an official file: a list of records.

    Raises:
        InputError: it is missing or something else.
    """
    records = read_document(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path} must be a list of questions")
    return records


def build_questions(path: Path, image_folder: Path) -> list[Question]:
    """Build the questions from the official file, numbered and worded as in LLaVA's question file."""
    questions = []
    for number, record in enumerate(read_official(path)):
        where = f"{path.name} question {number}"
        try:
            text = take(record, "question", str, where).capitalize() + SUFFIX
            questions.append(build_question(number, text, image_folder / take(record, "image", str, where)))
        except InputError as fault:
            questions.append(Question(id=number, fault=str(fault)))
    return questions


def read_annotations(path: Path) -> dict[str, dict[str, Any]]:
    """Read the annotations by picture, in their order, each with its `references` (the ten answers).

    Raises:
        InputError: the file is missing, or something else.
    """
    annotations = {}
    for number, record in enumerate(read_official(path)):
        where = f"{path} question {number}"
        annotations[take(record, "image", str, where)] = {
            "answer_type": take(record, "answer_type", str, where),
            "answerable": bool(take(record, "answerable", int, where)),
            "references": take_references(record, where),
        }
    return annotations


def score_vizwiz(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> Scores:
    """Score answers by the official rules.

    Args:
        questions: all of val.
        answers: rows by question key, at least one.
        annotation_file: the official file of val.

    Raises:
        InputError: questions and annotations are not of the same set, or a picture has several questions.
    """
    annotations = read_annotations(annotation_file)
    names = [name_picture(question) for question in questions]
    require_annotations(questions, names, annotations, annotation_file)
    if len(set(names)) < len(names):
        repeated, _ = Counter(names).most_common(1)[0]
        raise InputError(f"vizwiz: several questions are about {repeated}; there must be one per picture")
    rows = {
        name: answers.get(row_key(each.head(), VizWiz.key_fields)) for name, each in zip(names, questions, strict=True)
    }
    texts = {name: row["text"] for name in annotations if (row := rows.get(name)) is not None}
    main = summarize_answers({name: normalize_m4c(text) for name, text in texts.items()}, annotations)
    exact = main["accuracy_unrounded"]
    return Scores(
        headline=exact["overall"],
        scores={**main, "raw": summarize_answers(texts, annotations)},
        count=len(texts),
        columns={"Accuracy": exact["overall"], **exact["perAnswerType"]},
    )


def name_picture(question: Question) -> str:
    """Return the name of a question's picture, by which its annotation is found; of a broken question its id."""
    return question.images[0].name if question.images else str(question.id)


def summarize_answers(texts: Mapping[str, str], annotations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Grade answers and list the official numbers.

    Args:
        texts: answers by picture, in the order of the annotations.
        annotations: by picture.
    """
    grades = [grade_vizwiz(text, annotations[name]["references"]) for name, text in texts.items()]
    groupings = {"perAnswerType": [annotations[name]["answer_type"] for name in texts]}
    labels = [not annotations[name]["answerable"] for name in texts]
    called = [normalize_vizwiz(text) == UNANSWERABLE for text in texts.values()]
    unanswerability = {
        "average_precision": 100 * average_precision(labels, [float(each) for each in called]),
        "f1_score": 100 * f1_score(labels, called),
    }
    return {
        **summarize_grades(grades, groupings, round_half_even),
        "unanswerability": {name: round_half_even(value) for name, value in unanswerability.items()},
        "unanswerability_unrounded": unanswerability,
        "per_image": {name: round_half_even(100 * grade) for name, grade in zip(texts, grades, strict=True)},
    }


def make_upload(answers: Mapping[str, Row], questions: Sequence[Question]) -> list[dict[str, str]]:
    """Make the upload: an entry for each question, in their order.

    Raises:
        InputError: a question has no answer; the server wants them all.
    """
    upload = []
    for question in questions:
        row = answers.get(row_key(question.head(), VizWiz.key_fields))
        if row is None:
            raise InputError(f"vizwiz: question {question.id} has no answer, and the server wants one to each")
        upload.append({"image": name_picture(question), "answer": normalize_m4c(row["text"])})
    return upload
