"""VizWiz: photographs and spoken questions of blind people, each answered by ten others; many cannot be answered.

Splits:
    val: `val.json` (official questions and answers), `llava_val.jsonl` (questions; built from `val.json` where absent),
        images in `val/`. Scored here.
    test: `llava_test.jsonl` (or the official `test.json`), images in `test/`. Its answers are not public: a server
        scores what `export` writes.

Source of the rules: the VizWiz API. As in LLaVA, answers go through the TextVQA normaliser before they are scored or
uploaded; the scores of the untouched answers are under `raw`. The official task of predicting whether a question can be
answered wants a number per question; here it is 0 where the answer is `unanswerable`, else 1.

On the hub: lmms-lab/VizWiz-VQA has ten answers per question without the annotators' confidence, which no metric reads,
and the type of the answer as `category`; whether a question can be answered follows from that type.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import (
    PeopleAnswers,
    build_question,
    build_questions,
    find_first,
    from_eval_zip,
    judge_upload,
    load_question_file,
    read_document,
    require_annotations,
    take,
    take_people_answers,
    write_upload,
)
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubTable, Layout, ReadTable, question_line, safe_name
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
SUFFIX = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT_ANSWER_LINE}"
OFFICIAL_FOLDER = "Annotations"
"""Folder inside the official archive; its files may stay there."""


# --------------------------------------------------------------------------------------------------------------- hub
HUB_DATASET = "lmms-lab/VizWiz-VQA"


def convert_val(read_table: ReadTable, layout: Layout) -> None:
    """Write the validation split, with its answers."""
    questions, records = [], []
    for number, row in enumerate(read_table("questions")):
        questions.append(save_question(row, VAL, number, layout))
        records.append(
            {
                "image": questions[-1]["image"],
                "question": row["question"],
                "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in row["answers"]],
                "answer_type": row["category"],
                "answerable": int(row["category"] != UNANSWERABLE),
            }
        )
    layout.write_json("val.json", records)
    layout.write_lines("llava_val.jsonl", questions)


def convert_test(read_table: ReadTable, layout: Layout) -> None:
    """Write the split of the papers, without answers."""
    questions = [save_question(row, TEST, number, layout) for number, row in enumerate(read_table("questions"))]
    layout.write_lines("llava_test.jsonl", questions)


def save_question(row: HubRow, split: str, number: int, layout: Layout) -> dict[str, Any]:
    """Save a row's image and return its line of LLaVA's question file; the dataset's id is the image's name."""
    name = safe_name(row["question_id"], HUB_DATASET)
    image = name if "." in name else f"{name}.jpg"
    layout.save_image(f"{split}/{image}", row["image"])
    return question_line(number, image, row["question"].capitalize() + SUFFIX)


VAL_FORM = HubForm(
    HUB_DATASET,
    {"questions": HubTable(VAL, ("question_id", "image", "question", "answers", "category"))},
    ("val.json", "llava_val.jsonl"),
    convert_val,
)
TEST_FORM = HubForm(
    HUB_DATASET,
    {"questions": HubTable(TEST, ("question_id", "image", "question"))},
    ("llava_test.jsonl",),
    convert_test,
)


# --------------------------------------------------------------------------------------------------------- downloads
VIZWIZ_PAGE = "https://vizwiz.org/tasks-and-datasets/vqa/"
VIZWIZ_ADDRESS = "https://vizwiz.cs.colorado.edu/VizWiz_final"
DOWNLOADS = (
    Download(
        (Place(f"{VAL}.json", 4_319, also=(f"{OFFICIAL_FOLDER}/{VAL}.json",)),),
        VIZWIZ_PAGE,
        f"{VIZWIZ_ADDRESS}/vqa_data/Annotations.zip",
        unpack_in="",
        splits=(VAL,),
    ),
    from_eval_zip(f"llava_{TEST}.jsonl", splits=(TEST,)),
    *(
        Download(
            (Place(f"{split}/", number),),
            VIZWIZ_PAGE,
            f"{VIZWIZ_ADDRESS}/images/{split}.zip",
            unpack_in="",
            splits=(split,),
        )
        for split, number in {VAL: 4_319, TEST: 8_000}.items()
    ),
)


# --------------------------------------------------------------------------------------------------------- benchmark
@dataclass(frozen=True)
class VizWiz(Benchmark):
    """VizWiz: accuracy on val.

    Attributes:
        split: None is val where its annotations are in the folder, because only it can be scored here; else test, the
            split of the papers, for the server.
    """

    name = "vizwiz"
    row = "VizWiz val (Acc)"
    folders = ("vizwiz",)
    hub: ClassVar[Mapping[str, HubForm]] = {TEST: TEST_FORM, VAL: VAL_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {TEST: Extent(8_000, 8_000), VAL: Extent(4_319, 4_319)}
    server = "EvalAI challenge 2185 (VizWiz-VQA)"

    split: str | None = None

    def with_split(self, split: str) -> "VizWiz":
        if split not in (VAL, TEST):
            raise InputError(f"vizwiz has no split {split!r}; known: {VAL}, {TEST}")
        return VizWiz(split)

    def load(self, root: Path) -> list[Question]:
        split = self.split_in(root)
        path = root / f"llava_{split}.jsonl"
        official = next(filter(Path.is_file, official_places(root, split)), None)
        if official and not path.is_file():
            return load_official_questions(official, root / split)
        return load_question_file(path, root / split, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        if self.split_in(root) != VAL:
            return None
        return score_vizwiz(self.load(root), answers, find_first(official_places(root, VAL)))

    def place_answers(self, root: Path, run: str) -> Path:
        return root / ("answers/val" if self.split_in(root) == VAL else "answers") / f"{run}.jsonl"

    def place_upload(self, root: Path, run: str) -> Path | None:
        return None if self.split_in(root) == VAL else root / "answers_upload" / run

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        upload = make_upload(answers, self.load(root))
        return [write_upload(destination / f"vizwiz_{self.split_in(root)}.json", upload)]

    def split_in(self, root: Path) -> str:
        return self.split or (VAL if any(map(Path.is_file, official_places(root, VAL))) else TEST)


# --------------------------------------------------------------------------------------------- questions and answers
def official_places(root: Path, split: str) -> list[Path]:
    return [root / f"{split}.json", root / OFFICIAL_FOLDER / f"{split}.json"]


def read_official(path: Path) -> list[Any]:
    records = read_document(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path} must be a list of questions")
    return records


def load_official_questions(path: Path, image_folder: Path) -> list[Question]:
    """Read the official file; the questions are numbered and worded as in LLaVA's question file."""

    def build(number: int, record: object) -> Question:
        where = f"{path.name} question {number}"
        text = take(record, "question", str, where).capitalize() + SUFFIX
        return build_question(number, text, image_folder / take(record, "image", str, where))

    return build_questions(read_official(path), build)


def image_name(question: Question) -> str:
    """Return the name of a question's image, by which its annotation is found; of a broken question its id."""
    return question.images[0].name if question.images else str(question.id)


def read_vizwiz_answers(path: Path) -> dict[str, PeopleAnswers]:
    """Read the official annotations by the name of their image, in their order."""
    annotations = {}
    for number, record in enumerate(read_official(path)):
        where = f"{path} question {number}"
        answerable = bool(take(record, "answerable", int, where))
        annotations[take(record, "image", str, where)] = take_people_answers(record, where, answerable=answerable)
    return annotations


# ------------------------------------------------------------------------------------------------------------- score
def score_vizwiz(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> Scores:
    """Score answers (by question key) to all questions of val, by the official rules."""
    # 1. An annotation belongs to the one question about its image.
    annotations = read_vizwiz_answers(annotation_file)
    names = list(map(image_name, questions))
    require_annotations(questions, names, annotations, annotation_file)
    repeated, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"vizwiz: several questions are about {repeated}; there must be one per image")
    pairs = {}
    for key, question, row in VizWiz.pair(questions, answers):
        if image_name(question) not in annotations:
            raise InputError(f"vizwiz: question {question.id} has an answer, but is broken: {question.fault}")
        pairs[image_name(question)] = (key, row["text"])
    answered = {name: annotation for name, annotation in annotations.items() if name in pairs}
    # 2. What counts is what LLaVA uploads of an answer; the untouched answers are scored as well.
    verdicts = [judge_upload(*pairs[name], annotation, grade_vizwiz) for name, annotation in answered.items()]
    main = summarize_answers(answered, [str(each.parsed) for each in verdicts], [each.points for each in verdicts])
    texts = [each.prediction for each in verdicts]
    grades = [grade_vizwiz(text, each.references) for text, each in zip(texts, answered.values(), strict=True)]
    exact = main["accuracy_unrounded"]
    scores = {**main, "raw": summarize_answers(answered, texts, grades)}
    return VizWiz().sum_up(verdicts, scores, {"Accuracy": exact["overall"], **exact["perAnswerType"]})


def summarize_answers(
    answered: Mapping[str, PeopleAnswers], texts: Sequence[str], grades: Sequence[float]
) -> dict[str, Any]:
    """List the official numbers of answers, given the annotations of their questions by image and their grades."""
    annotations = answered.values()
    labels = [not each.answerable for each in annotations]
    called = [normalize_vizwiz(text) == UNANSWERABLE for text in texts]
    unanswerability = {
        "average_precision": 100 * average_precision(labels, list(map(float, called))),
        "f1_score": 100 * f1_score(labels, called),
    }
    return {
        **summarize_grades(grades, {"perAnswerType": [each.answer_type for each in annotations]}, round_half_even),
        "unanswerability": {name: round_half_even(value) for name, value in unanswerability.items()},
        "unanswerability_unrounded": unanswerability,
        "per_image": {name: round_half_even(100 * grade) for name, grade in zip(answered, grades, strict=True)},
    }


# ------------------------------------------------------------------------------------------------------------ upload
def make_upload(answers: Mapping[str, Row], questions: Sequence[Question]) -> list[dict[str, str]]:
    """Make the upload: an entry for each question, in their order; the server wants an answer to each."""
    upload = []
    for question in questions:
        row = answers.get(VizWiz.key(question))
        if row is None:
            raise InputError(f"vizwiz: question {question.id} has no answer, and the server wants one to each")
        upload.append({"image": image_name(question), "answer": normalize_m4c(row["text"])})
    return upload
