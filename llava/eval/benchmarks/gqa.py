"""GQA: compositional questions about scenes, on the balanced test-dev split.

Files: `llava_gqa_testdev_balanced.jsonl` (questions), and in `data/`: `images/`, `testdev_balanced_questions.json`
(answers and question types), optionally `testdev_balanced_choices.json` (which the real test-dev has not). The JSON
files may also be beside the question file.

On the hub: questions and images are two configurations of lmms-lab/GQA, joined by the image's id. Question by question
the same as LLaVA's file, which is in shuffled order. What the finer metrics read (types, groups, semantic steps,
entailed questions) is taken where the dataset has it; where it has not, accuracy stays right and the break-down has one
group of unknown type.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores, Verdict
from llava.eval.benchmarks._files import (
    find_first,
    from_eval_zip,
    load_question_file,
    read_document,
    require_annotations,
    take,
    take_strings,
    write_upload,
)
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubTable, Layout, ReadTable, question_line, safe_name
from llava.eval.metrics.gqa import GqaRecord, clean_prediction, score_gqa

QUESTION_FILE = "llava_gqa_testdev_balanced.jsonl"
DATA_FOLDER = "data"
IMAGE_FOLDER = f"{DATA_FOLDER}/images"
ANNOTATION_FILE = "testdev_balanced_questions.json"
CHOICES_FILE = "testdev_balanced_choices.json"
PREDICTION_FILE = "testdev_balanced_predictions.json"


# --------------------------------------------------------------------------------------------------------------- hub
UNKNOWN = "unknown"
TYPES = ("structural", "semantic", "detailed")
STEP_FIELDS = ("operation", "argument", "dependencies")


def convert_testdev(read_table: ReadTable, layout: Layout) -> None:
    """Write the balanced questions of test-dev."""
    for row in read_table("images"):
        layout.save_image(f"{IMAGE_FOLDER}/{safe_name(row['id'], 'images')}.jpg", row["image"])
    questions, annotations = [], {}
    for row in read_table("questions"):
        identity, image = str(row["id"]), f"{safe_name(row['imageId'], 'questions')}.jpg"
        annotations[identity] = make_annotation(row)
        questions.append(question_line(identity, image, row["question"] + SHORT_ANSWER_LINE))
    layout.write_json(f"{DATA_FOLDER}/{ANNOTATION_FILE}", annotations)
    layout.write_lines(QUESTION_FILE, questions)


def make_annotation(row: HubRow) -> dict[str, Any]:
    types, groups = parse_cell(row.get("types")) or {}, parse_cell(row.get("groups")) or {}
    steps = list_steps(parse_cell(row.get("semantic")))
    return {
        "semantic": [{name: step.get(name) for name in STEP_FIELDS} for step in steps],
        "entailed": [str(each) for each in parse_cell(row.get("entailed")) or []],
        "equivalent": [str(each) for each in parse_cell(row.get("equivalent")) or []],
        "question": row["question"],
        "imageId": row["imageId"],
        "isBalanced": bool(row["isBalanced"]),
        "groups": {"global": groups.get("global"), "local": groups.get("local")},
        "answer": row["answer"],
        "semanticStr": row.get("semanticStr") or "",
        "types": {name: types.get(name) or UNKNOWN for name in TYPES},
        "fullAnswer": row.get("fullAnswer") or "",
    }


def parse_cell(cell: object) -> Any:
    """Return a cell's value; lists and records may be stored as text, in JSON or Python's form."""
    if not isinstance(cell, str):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError):
            continue
    return None


def list_steps(cell: Any) -> list[dict[str, Any]]:
    """Return the steps of a question's program; a list of records may be stored as a record of lists."""
    if isinstance(cell, dict):
        names = [name for name in STEP_FIELDS if name in cell]
        return [dict(zip(names, step, strict=True)) for step in zip(*(cell[name] for name in names), strict=True)]
    return list(cell or [])


TESTDEV = HubForm(
    "lmms-lab/GQA",
    {
        "questions": HubTable(
            "testdev", ("id", "imageId", "question", "answer", "isBalanced"), config="testdev_balanced_instructions"
        ),
        "images": HubTable("testdev", ("id", "image"), config="testdev_balanced_images"),
    },
    (QUESTION_FILE, f"{DATA_FOLDER}/{ANNOTATION_FILE}"),
    convert_testdev,
)


# --------------------------------------------------------------------------------------------------------- downloads
GQA_PAGE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
DOWNLOADS = (
    from_eval_zip(QUESTION_FILE),
    Download(
        (Place(f"{DATA_FOLDER}/{ANNOTATION_FILE}", 12_578, also=(ANNOTATION_FILE,)),),
        GQA_PAGE,
        "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
        unpack_in=DATA_FOLDER,
        only=(ANNOTATION_FILE,),
        size=1_400_000_000,
    ),
    Download(
        (Place(f"{IMAGE_FOLDER}/", 148_854),),
        GQA_PAGE,
        "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        unpack_in=DATA_FOLDER,
        size=20_300_000_000,
    ),
)
"""Of the images 398 are asked about; there is no smaller archive of these."""


# --------------------------------------------------------------------------------------------------------- benchmark
class Gqa(Benchmark):
    """GQA: accuracy on the balanced questions of test-dev."""

    name = "gqa"
    row = "GQA (Acc)"
    folders = ("gqa",)
    answers_file = "answers/llava_gqa_testdev_balanced/{run}/merge.jsonl"
    upload_folder = "answers/llava_gqa_testdev_balanced/{run}"
    hub: ClassVar[Mapping[str, HubForm]] = {"testdev_balanced": TESTDEV}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {"testdev_balanced": Extent(12_578, 398)}

    def load(self, root: Path) -> list[Question]:
        return load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Compute every number of the official script that the files in the folder allow."""
        questions = self.load(root)
        path = find_first(places(root, ANNOTATION_FILE))
        records = read_scene_questions(path)
        balanced = {identity for identity, record in records.items() if record["isBalanced"]}
        require_annotations(questions, [str(question.id) for question in questions], records, path, required=balanced)
        # Only balanced questions have verdicts; the others count for consistency.
        pairs = self.pair(questions, answers)
        predictions = {str(question.id): clean_prediction(row["text"]) for _, question, row in pairs}
        verdicts = []
        for key, question, row in pairs:
            identity = str(question.id)
            said, record = predictions[identity], records[identity]
            if identity in balanced:
                points, category = float(said == record["answer"]), record["types"]["structural"]
                verdicts.append(Verdict(key, row["text"], record["answer"], points, parsed=said, category=category))
        if not verdicts:
            raise InputError("gqa: none of the balanced questions has an answer")
        scores = score_gqa(records, predictions, read_choices(root, balanced))
        columns = {"Accuracy": scores["accuracy"], "Binary": scores["binary"], "Open": scores["open"]}
        return self.sum_up(verdicts, scores, columns)

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the file that GQA's own script reads, in the order of the answers file."""
        return [write_upload(destination / PREDICTION_FILE, make_predictions(answers.values()))]


def make_predictions(rows: Iterable[Row]) -> list[dict[str, str]]:
    return [{"questionId": str(row["question_id"]), "prediction": clean_prediction(row["text"])} for row in rows]


# ------------------------------------------------------------------------------------------------------- annotations
def places(root: Path, name: str) -> list[Path]:
    """List where a file of GQA may be: in LLaVA's layout, or beside the question file."""
    return [root / DATA_FOLDER / name, root / name]


def read_scene_questions(path: Path) -> dict[str, GqaRecord]:
    """Read GQA's questions by id, each with what the metrics read."""
    records = read_document(path)
    if not isinstance(records, dict) or not records:
        raise InputError(f"{path} must be an object of questions by id")
    for identity, record in records.items():
        check_scene_question(record, f"{path} question {identity}")
    return records


def check_scene_question(record: object, where: str) -> None:
    """Make sure that a question has what the metrics read."""
    for name in ("question", "answer"):
        take(record, name, str, where)
    take(record, "isBalanced", bool, where)
    types, groups = take(record, "types", dict, where), take(record, "groups", dict, where)
    for name in ("structural", "semantic"):
        take(types, name, str, f"{where} types")
    if types.get("detailed") is not None:
        take(types, "detailed", str, f"{where} types")
    if "global" not in groups or not isinstance(groups["global"], str | None):
        raise InputError(f'{where}: "groups" must have "global", a string or null')
    if record.get("entailed"):
        take_strings(record, "entailed", where)
    for step in take(record, "semantic", list, where):
        for name in ("operation", "argument"):
            take(step, name, str, f"{where} semantic")


def read_choices(root: Path, balanced: Iterable[str]) -> dict[str, dict[str, list[str]]] | None:
    """Read the valid and plausible answers to the balanced questions, if there is such a file."""
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
