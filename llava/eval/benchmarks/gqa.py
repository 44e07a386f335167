"""GQA: compositional questions about scenes, on the balanced test-dev split.

Files: `llava_gqa_testdev_balanced.jsonl` (questions), and in `data/`: `images/`, `testdev_balanced_questions.json`
(answers and question types), optionally `testdev_balanced_choices.json` (which the real test-dev has not). The JSON
files may also lie beside the question file.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import (
    find_first,
    load_question_file,
    read_document,
    require_annotations,
    take,
    write_upload,
)
from llava.eval.benchmarks._hub_gqa import GqaTestdev
from llava.eval.hub import HubForm
from llava.eval.metrics.gqa import clean_prediction, score_gqa

QUESTION_FILE = "llava_gqa_testdev_balanced.jsonl"
IMAGE_FOLDER = "data/images"
DATA_FOLDER = "data"
ANNOTATION_FILE = "testdev_balanced_questions.json"
CHOICES_FILE = "testdev_balanced_choices.json"
PREDICTION_FILE = "testdev_balanced_predictions.json"


class Gqa(Benchmark):
    """GQA: accuracy on the balanced questions of test-dev."""

    name = "gqa"
    row = "GQA (Acc)"
    folders = ("gqa",)
    hub: ClassVar[Mapping[str, HubForm]] = {"testdev_balanced": GqaTestdev()}

    def load(self, root: Path) -> list[Question]:
        """Read the questions."""
        return load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Compute every number of the official script that the files at hand allow."""
        questions = self.load(root)
        path = find_first(places(root, ANNOTATION_FILE))
        records = read_annotations(path)
        balanced = {identity for identity, record in records.items() if record["isBalanced"]}
        require_annotations(questions, [str(question.id) for question in questions], records, path, required=balanced)
        predictions = {each["questionId"]: each["prediction"] for each in make_predictions(answers.values())}
        if balanced.isdisjoint(predictions):
            raise InputError("GQA: none of the balanced questions has an answer")
        scores = score_gqa(records, predictions, read_choices(root, balanced))
        return Scores(
            headline=scores["accuracy"],
            scores=scores,
            count=len(balanced.intersection(predictions)),
            columns={"Accuracy": scores["accuracy"], "Binary": scores["binary"], "Open": scores["open"]},
        )

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the file that GQA's own script reads, in the order of the answers file."""
        return [write_upload(destination / PREDICTION_FILE, make_predictions(answers.values()))]


def places(root: Path, name: str) -> list[Path]:
    """List where a file of GQA may lie: in the published layout, or beside the question file."""
    return [root / DATA_FOLDER / name, root / name]


def make_predictions(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Write answers as GQA's script reads them."""
    return [{"questionId": str(row["question_id"]), "prediction": clean_prediction(row["text"])} for row in rows]


def read_annotations(path: Path) -> dict[str, dict[str, Any]]:
    """Read GQA's questions by id.

    Raises:
        InputError: the file is missing, or a question of it lacks something that the metrics read.
    """
    records = read_document(path)
    if not isinstance(records, dict) or not records:
        raise InputError(f"{path} must be an object of questions by id")
    for identity, record in records.items():
        check_annotation(record, f"{path} question {identity}")
    return records


def check_annotation(record: Any, where: str) -> None:
    """Make sure that a question has what the metrics read.

    Raises:
        InputError: it has not.
    """
    for name in ("question", "answer"):
        take(record, name, str, where)
    take(record, "isBalanced", bool, where)
    for name in ("structural", "semantic"):
        take(take(record, "types", dict, where), name, str, f"{where} types")
    if "global" not in take(record, "groups", dict, where):
        raise InputError(f'{where}: "groups" must have "global", which may be null')
    for step in take(record, "semantic", list, where):
        for name in ("operation", "argument"):
            take(step, name, str, f"{where} semantic")


def read_choices(root: Path, balanced: Iterable[str]) -> dict[str, dict[str, list[str]]] | None:
    """Read the valid and plausible answers, if there is such a file.

    Raises:
        InputError: a balanced question is not in it.
    """
    path = next((path for path in places(root, CHOICES_FILE) if path.is_file()), None)
    if path is None:
        return None
    choices = read_document(path)
    return {
        identity: {
            name: take(take(choices, identity, dict, str(path)), name, list, f"{path} question {identity}")
            for name in ("valid", "plausible")
        }
        for identity in balanced
    }
