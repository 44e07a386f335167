"""VQAv2: open questions about photographs, each answered by ten people.

Splits:
    val2014: `llava_vqav2_mscoco_val2014.jsonl` (or, without it, the official `v2_OpenEnded_..._questions.json`),
        `v2_mscoco_val2014_annotations.json`, images in `val2014/`. Scored here.
    test-dev2015, test2015: `llava_vqav2_mscoco_<split>.jsonl`, images in `test2015/`. Their answers are not public: a
        server scores what `export` writes, which lists every question of `llava_vqav2_mscoco_test2015.jsonl`.

Source of the rules: GT-Vision-Lab/VQA at 2021-03-11. As in LLaVA, answers go through the TextVQA normaliser before they
are scored or uploaded; the scores of the untouched answers are under `raw`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores, Verdict, row_key
from llava.eval.benchmarks._files import (
    build_question,
    load_question_file,
    read_document,
    read_records,
    require_annotations,
    require_any,
    take,
    take_references,
    write_upload,
)
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables
from llava.eval.metrics.vqa_accuracy import (
    average_percent,
    grade_vqa,
    grade_vqa_before_2021,
    rank_references,
    round_half_up,
    summarize_grades,
)
from llava.eval.metrics.vqa_text import normalize_m4c

VAL, TEST_DEV, TEST = "val2014", "test-dev2015", "test2015"
IMAGE_FOLDERS = {VAL: "val2014", TEST_DEV: "test2015", TEST: "test2015"}
SHORT_NAMES = {"val": VAL, "test": TEST_DEV, "test-dev": TEST_DEV}
PREFIX = "llava_vqav2_mscoco_"
"""Of LLaVA's question files and of the folders of answers; the name of the split follows."""
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


# --------------------------------------------------------------------------------------------------------------- hub
HUB_DATASET = "lmms-lab/VQAv2"
HUB_COLUMNS = ("question_id", "image_id", "question")


class HubVal(HubForm):
    """The validation split, with its answers."""

    dataset = HUB_DATASET
    tables: ClassVar[Tables] = {
        "questions": HubTable("validation", (*HUB_COLUMNS, "image", "question_type", "answer_type", "answers")),
    }
    files = (f"{PREFIX}{VAL}.jsonl", VAL_QUESTIONS, VAL_ANNOTATIONS)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        asked, official, annotations = [], [], []
        for row in rows["questions"]:
            asked.append(save_question(row, VAL, layout))
            ids = {"image_id": row["image_id"], "question_id": row["question_id"]}
            official.append({**ids, "question": row["question"]})
            annotations.append(
                {
                    "question_type": row["question_type"],
                    "multiple_choice_answer": row.get("multiple_choice_answer"),
                    # The dataset may have dropped the numbers of the ten answers.
                    "answers": [
                        {"answer_id": number, **({"answer": answer} if isinstance(answer, str) else answer)}
                        for number, answer in enumerate(row["answers"], start=1)
                    ],
                    "answer_type": row["answer_type"],
                    **ids,
                }
            )
        head = {"data_type": "mscoco", "data_subtype": VAL, "info": {}, "license": {}}
        layout.write_json(VAL_QUESTIONS, {**head, "task_type": "Open-Ended", "questions": official})
        layout.write_json(VAL_ANNOTATIONS, {**head, "annotations": annotations})
        layout.write_lines(f"{PREFIX}{VAL}.jsonl", asked)


class HubTestDev(HubForm):
    """The split of the papers, without answers; an upload also lists the questions of `test`."""

    dataset = HUB_DATASET
    tables: ClassVar[Tables] = {
        "questions": HubTable("testdev", (*HUB_COLUMNS, "image")),
        "upload": HubTable("test", HUB_COLUMNS, columns_only=True),
    }
    files = (f"{PREFIX}{TEST_DEV}.jsonl", f"{PREFIX}{TEST}.jsonl")

    def convert(self, rows: HubRows, layout: Layout) -> None:
        questions = [save_question(row, TEST_DEV, layout) for row in rows["questions"]]
        layout.write_lines(f"{PREFIX}{TEST}.jsonl", (word_question(row, TEST) for row in rows["upload"]))
        layout.write_lines(f"{PREFIX}{TEST_DEV}.jsonl", questions)


def save_question(row: HubRow, split: str, layout: Layout) -> dict[str, Any]:
    """Save a row's image and return its line of LLaVA's question file."""
    question = word_question(row, split)
    layout.save_image(f"{IMAGE_FOLDERS[split]}/{question['image']}", row["image"])
    return question


def word_question(row: HubRow, split: str) -> dict[str, Any]:
    """Return a row's line of LLaVA's question file."""
    image, text = coco_file_name(split, int(row["image_id"])), row["question"] + SHORT_ANSWER_LINE
    return {"question_id": row["question_id"], "image": image, "text": text, "category": "default"}


# --------------------------------------------------------------------------------------------------------- benchmark
@dataclass(frozen=True)
class Vqav2(Benchmark):
    """VQAv2: accuracy on val2014.

    Attributes:
        split: None is val2014 where its annotations are in the folder, because only it can be scored here; else
            test-dev2015, the split of the papers, for the server.
    """

    name = "vqav2"
    row = "VQAv2 val (Acc)"
    folders = ("vqav2",)
    hub: ClassVar[Mapping[str, HubForm]] = {TEST_DEV: HubTestDev(), VAL: HubVal()}
    server = "EvalAI challenge 830 (VQA)"

    split: str | None = None

    def with_split(self, split: str) -> "Vqav2":
        """Return VQAv2 on `val2014`, `test-dev2015` or `test2015`; `val` and `test` mean the first two."""
        return Vqav2(find_split(split))

    def load(self, root: Path) -> list[Question]:
        split = self.split_in(root)
        path, image_folder = root / f"{PREFIX}{split}.jsonl", root / IMAGE_FOLDERS[split]
        if split == VAL and not path.is_file():
            return build_questions(root / VAL_QUESTIONS, image_folder)
        return load_question_file(path, image_folder, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        if self.split_in(root) != VAL:
            return None
        require_any(answers, "VQAv2")
        return score_vqav2(self.load(root), answers, root / VAL_ANNOTATIONS)

    def place_answers(self, root: Path, run: str) -> Path:
        return root / "answers" / f"{PREFIX}{self.split_in(root)}" / run / "merge.jsonl"

    def place_upload(self, root: Path, run: str) -> Path | None:
        split = self.split_in(root)
        return None if split == VAL else root / "answers_upload" / f"{PREFIX}{split}" / run

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        """Write the upload file `vqav2_<split>.json`."""
        split = self.split_in(root)
        upload = make_upload(answers.values(), list_upload_ids(root, split))
        return [write_upload(destination / f"vqav2_{split}.json", upload)]

    def split_in(self, root: Path) -> str:
        """Return the split, chosen by what is in a folder where none was named."""
        return self.split or (VAL if (root / VAL_ANNOTATIONS).is_file() else TEST_DEV)


def find_split(name: str) -> str:
    """Return a split's full name.

    Raises:
        InputError: there is no such split.
    """
    split = SHORT_NAMES.get(name, name.removeprefix(PREFIX))
    if split not in IMAGE_FOLDERS:
        raise InputError(f"vqav2 has no split {name!r}; known: {', '.join(IMAGE_FOLDERS)}")
    return split


# --------------------------------------------------------------------------------------------- questions and answers
def coco_file_name(split: str, image_id: int) -> str:
    """Return the file name of a COCO image; test-dev2015 has images of test2015."""
    return f"COCO_{IMAGE_FOLDERS[split]}_{image_id:012d}.jpg"


def build_questions(path: Path, image_folder: Path) -> list[Question]:
    """Build the questions of val2014 from the official file, worded as LLaVA words those of test-dev2015."""
    questions = []
    for number, record in enumerate(take(read_document(path), "questions", list, str(path))):
        where = f"{path.name} question {number}"
        try:
            text = take(record, "question", str, where) + SHORT_ANSWER_LINE
            image = image_folder / coco_file_name(VAL, take(record, "image_id", int, where))
            questions.append(build_question(take(record, "question_id", int, where), text, image))
        except InputError as fault:
            questions.append(Question(id=where, fault=str(fault)))
    return questions


@dataclass(frozen=True)
class VqaAnswers:
    """The ten people's answers to a question, and the groups that it belongs to."""

    references: Sequence[str]
    answer_type: str
    question_type: str


def read_vqa_answers(path: Path) -> dict[int, VqaAnswers]:
    """Read the official annotations by question id, in their order.

    Raises:
        InputError: the file is missing, or something else.
    """
    annotations = {}
    for number, record in enumerate(take(read_document(path), "annotations", list, str(path))):
        where = f"{path} annotation {number}"
        types = (take(record, name, str, where) for name in ("answer_type", "question_type"))
        annotations[take(record, "question_id", int, where)] = VqaAnswers(take_references(record, where), *types)
    return annotations


# ------------------------------------------------------------------------------------------------------------- score
def score_vqav2(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> Scores:
    """Score answers by the official rules, and by those before 2021 (`variants`).

    Args:
        questions: all of val2014.
        answers: rows by question key, at least one.
        annotation_file: the official annotations.

    Raises:
        InputError: questions and annotations are not of the same set.
    """
    annotations = read_vqa_answers(annotation_file)
    require_annotations(questions, [question.id for question in questions], annotations, annotation_file)
    rows = {row["question_id"]: row for row in answers.values()}
    answered = {identity: annotation for identity, annotation in annotations.items() if identity in rows}
    verdicts = [judge_answer(rows[identity], annotation) for identity, annotation in answered.items()]

    def grade(rule: Callable[[str, Sequence[str]], float], texts: Iterable[str]) -> list[float]:
        return [rule(text, each.references) for text, each in zip(texts, answered.values(), strict=True)]

    texts, uploaded = [each.prediction for each in verdicts], [str(each.parsed) for each in verdicts]
    main = summarize_answers(answered, [each.points for each in verdicts])
    older = {
        "pre2021_scorer_on_raw": average_percent(grade(grade_vqa_before_2021, texts)),
        "pre2021_scorer_on_upload": average_percent(grade(grade_vqa_before_2021, uploaded)),
    }
    exact = main["accuracy_unrounded"]
    return Scores(
        headline=exact["overall"],
        scores={
            **main,
            "raw": summarize_answers(answered, grade(grade_vqa, texts)),
            "variants": {name: round_half_up(value) for name, value in older.items()},
        },
        count=len(verdicts),
        columns={"Accuracy": exact["overall"], **exact["perAnswerType"]},
        verdicts=verdicts,
    )


def judge_answer(row: Row, annotation: VqaAnswers) -> Verdict:
    """Grade what LLaVA uploads of an answer."""
    text, references = row["text"], annotation.references
    uploaded, key = normalize_m4c(text), row_key(row, Vqav2.key_fields)
    points, category = grade_vqa(uploaded, references), annotation.answer_type
    return Verdict(key, text, rank_references(references), points, parsed=uploaded, category=category)


def summarize_answers(answered: Mapping[int, VqaAnswers], grades: Sequence[float]) -> dict[str, Any]:
    """List the official numbers of answers, given the annotations of their questions by id and their grades."""
    groupings = {
        "perAnswerType": [annotation.answer_type for annotation in answered.values()],
        "perQuestionType": [annotation.question_type for annotation in answered.values()],
    }
    per_question = {str(identity): round_half_up(100 * grade) for identity, grade in zip(answered, grades, strict=True)}
    return {**summarize_grades(grades, groupings, round_half_up), "per_question": per_question}


# ------------------------------------------------------------------------------------------------------------ upload
def list_upload_ids(root: Path, split: str) -> list[int | str]:
    """List the questions of an upload, in its order: all of test2015 for both test splits, as the server wants it."""
    if split != VAL:
        return [record.get("question_id") for record in read_records(root / f"{PREFIX}{TEST}.jsonl")]
    return [question.id for question in Vqav2(VAL).load(root) if not question.fault]


def make_upload(rows: Iterable[Row], ids: Sequence[int | str]) -> list[dict[str, Any]]:
    """Make the upload: an entry for each id, with an empty answer where there is none.

    Raises:
        InputError: an answer belongs to none of the ids.
    """
    texts = {row["question_id"]: normalize_m4c(row["text"]) for row in rows}
    foreign = texts.keys() - set(ids)
    if foreign:
        raise InputError(
            f"vqav2: {len(foreign)} answers are to questions that the upload does not list "
            f"(such as {min(map(str, foreign))})"
        )
    return [{"question_id": identity, "answer": texts.get(identity, "")} for identity in ids]
