"""POPE: is there such an object in the picture? Yes or no, in three categories of wrong objects.

Files: `llava_pope_test.jsonl` (questions), `coco/coco_pope_<category>.json` (labels, JSON lines), `val2014/`
(pictures). Source of the rules: AoiDragon/POPE `evaluate.py`. The i-th question of a category goes with the i-th
label of its file, so the files are compared line by line before anything is scored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.judging import Judge
from llava.eval.metrics.yes_no import YesNoCounts, count_yes_no, divide, parse_yes_no
from llava.eval.sources import load_question_file, read_records
from llava.eval.task import Question, Row, Scores, Task, row_key

QUESTION_FILE = "llava_pope_test.jsonl"
IMAGE_FOLDER = "val2014"
LABEL_FOLDER = "coco"
LABEL_PREFIX = "coco_pope_"

LABEL_COMMIT = "e3e39262"
"""Commit of AoiDragon/POPE that LLaVA's question file was made from."""
PINNED_RANDOM_COUNT, LATEST_RANDOM_COUNT = 2910, 3000
WORDING_OF_COMMITS = {"in the imange": "in the image"}
"""The pinned commit's typo. Later label files lack it; with the same labels in the same order they serve as well."""


class Pope(Task):
    """POPE on COCO: the mean F1 of the adversarial, popular and random categories."""

    name = "pope"
    row = "POPE (Avg. F1)"

    def load(self, root: Path) -> list[Question]:
        """Read the questions; where the labels are at hand, check at once that they fit."""
        questions = load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER)
        questions = [
            Question(id=question.id, category=question.category, fault="the record has no image")
            if not question.images and not question.fault
            else question
            for question in questions
        ]
        if (root / LABEL_FOLDER).is_dir() and not any(question.fault for question in questions):
            pair_labels(questions, root / LABEL_FOLDER)
        return questions

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score each category, and average them."""
        return score_pope(self.load(root), answers, root / LABEL_FOLDER)


def score_pope(questions: list[Question], answers: Mapping[str, Row], label_folder: Path) -> Scores:
    """Score answers against the label files of a folder.

    Args:
        questions: all of the question file, in its order.
        answers: rows by question key; questions without a row take no part.
        label_folder: with `coco_pope_<category>.json` files.

    Raises:
        InputError: questions and labels do not fit together, or nothing was answered.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for question, label in pair_labels(questions, label_folder):
        row = answers.get(row_key(question.head(), Pope.key_fields))
        if row is not None:
            pairs.setdefault(str(question.category), []).append((parse_yes_no(row["text"]), label))
    if not pairs:
        raise InputError("POPE: none of the questions has an answer")
    counts = {category: count_yes_no(compared) for category, compared in pairs.items()}
    average_f1 = divide(100 * sum(each.f1 for each in counts.values()), len(counts))
    average_accuracy = divide(100 * sum(each.accuracy for each in counts.values()), len(counts))
    return Scores(
        headline=average_f1,
        scores={
            "categories": {category: list_counts(each) for category, each in counts.items()},
            "average_f1": average_f1,
            "average_accuracy": average_accuracy,
        },
        count=sum(each.num_questions for each in counts.values()),
        columns={"F1": average_f1, "Accuracy": average_accuracy},
    )


def list_counts(counts: YesNoCounts) -> dict[str, Any]:
    """List a category's numbers under the official names; ratios are fractions."""
    return {
        "TP": counts.true_positive,
        "FP": counts.false_positive,
        "TN": counts.true_negative,
        "FN": counts.false_negative,
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "yes_ratio": counts.yes_ratio,
        "n": counts.num_questions,
    }


def pair_labels(questions: list[Question], folder: Path) -> list[tuple[Question, str]]:
    """Give each question its label, after making sure that questions and label files say the same.

    Raises:
        InputError: a category has no label file, the counts differ, or a question differs from its label's question.
    """
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        if question.category is None:
            raise InputError(f"{QUESTION_FILE}: question {question.id} names no category, so its label cannot be told")
        by_category.setdefault(question.category, []).append(question)
    pairs = []
    for category, members in by_category.items():
        path = folder / f"{LABEL_PREFIX}{category}.json"
        labels = read_records(path)
        if len(labels) != len(members):
            raise InputError(explain_count(path, len(labels), category, len(members)))
        for line, (question, label) in enumerate(zip(members, labels, strict=True), start=1):
            check_label(question, label, f"{path} line {line}")
            pairs.append((question, label["label"]))
    return pairs


def explain_count(path: Path, num_labels: int, category: str, num_questions: int) -> str:
    """Say that a label file has the wrong length, and where the right one is."""
    message = f"{path} has {num_labels} lines, {QUESTION_FILE} has {num_questions} {category} questions"
    if (num_labels, num_questions) == (LATEST_RANDOM_COUNT, PINNED_RANDOM_COUNT):
        return f"{message}: take the file from commit {LABEL_COMMIT} of AoiDragon/POPE, not from its latest version"
    return f"{message}; both must come from the same version (AoiDragon/POPE commit {LABEL_COMMIT})"


def check_label(question: Question, label: Mapping[str, Any], where: str) -> None:
    """Make sure that a label belongs to a question: same picture, same first line of text.

    Raises:
        InputError: it does not, or it is no label.
    """
    if not all(isinstance(label.get(name), str) for name in ("text", "image", "label")):
        raise InputError(f'{where}: "text", "image" and "label" must be strings')
    if question.fault:
        return
    asked = unify_wording(question.prompt.split("\n")[0])
    if asked != unify_wording(label["text"]) or question.images[0].name != Path(label["image"]).name:
        raise InputError(
            f'{where} is about "{label["text"]}" on {label["image"]}, question {question.id} asks "{asked}" on '
            f"{question.images[0].name}; both must come from the same version (AoiDragon/POPE commit {LABEL_COMMIT})"
        )


def unify_wording(text: str) -> str:
    """Drop the one difference in wording between the versions of the label files."""
    for typo, right in WORDING_OF_COMMITS.items():
        text = text.replace(typo, right)
    return text
