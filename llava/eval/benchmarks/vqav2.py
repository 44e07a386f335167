"""VQAv2: open questions about photographs, each answered by ten people.

Splits:
    val2014: `llava_vqav2_mscoco_val2014.jsonl` (or, without it, the official `v2_OpenEnded_..._questions.json`),
        `v2_mscoco_val2014_annotations.json`, pictures in `val2014/`. Scored here.
    test-dev2015, test2015: `llava_vqav2_mscoco_<split>.jsonl`, pictures in `test2015/`. Their answers are not public: a
        server scores what `export` writes, which lists every question of `llava_vqav2_mscoco_test2015.jsonl`.

Source of the rules: GT-Vision-Lab/VQA at 2021-03-11. As in LLaVA, answers go through the TextVQA normaliser before they
are scored or uploaded; the scores of the answers as they are stand under `raw`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import (
    SHORT_ANSWER_SUFFIX,
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
from llava.eval.benchmarks._hub_vqav2 import Vqav2TestDev, Vqav2Val
from llava.eval.hub import HubForm
from llava.eval.metrics.vqa_accuracy import (
    average_percent,
    grade_vqa,
    grade_vqa_before_2021,
    round_half_up,
    summarize_grades,
)
from llava.eval.metrics.vqa_text import normalize_m4c

VAL, TEST_DEV, TEST = "val2014", "test-dev2015", "test2015"
IMAGE_FOLDERS = {VAL: "val2014", TEST_DEV: "test2015", TEST: "test2015"}
SHORT_NAMES = {"val": VAL, "test": TEST_DEV, "test-dev": TEST_DEV}
QUESTION_FILE_PREFIX = "llava_vqav2_mscoco_"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@dataclass(frozen=True)
class Vqav2(Benchmark):
    """VQAv2: accuracy on val2014.

    Attributes:
        split: None is val2014 where its annotations are at hand, because only there a score is to be had; else
            test-dev2015, the split of the papers, for the server.
    """

    name = "vqav2"
    row = "VQAv2 val (Acc)"
    folders = ("vqav2",)
    hub: ClassVar[Mapping[str, HubForm]] = {"test-dev2015": Vqav2TestDev(), "val2014": Vqav2Val()}
    server = "EvalAI challenge 830 (VQA)"

    split: str | None = None

    def with_split(self, split: str) -> "Vqav2":
        """Return VQAv2 on `val2014`, `test-dev2015` or `test2015`; `val` and `test` mean the first two."""
        return Vqav2(find_split(split))

    def load(self, root: Path) -> list[Question]:
        """Read the questions of the split."""
        split = self.split_in(root)
        path, image_folder = question_file(root, split), root / IMAGE_FOLDERS[split]
        if split == VAL and not path.is_file():
            return build_questions(root / VAL_QUESTIONS, image_folder)
        return load_question_file(path, image_folder, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        """Score val2014 as the official scorer does; the other splits have no public answers."""
        if self.split_in(root) != VAL:
            return None
        require_any(answers, "VQAv2")
        return score_vqav2(self.load(root), answers, root / VAL_ANNOTATIONS)

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
    split = SHORT_NAMES.get(name, name.removeprefix(QUESTION_FILE_PREFIX))
    if split not in IMAGE_FOLDERS:
        raise InputError(f"vqav2 has no split {name!r}; known: {', '.join(IMAGE_FOLDERS)}")
    return split


def question_file(root: Path, split: str) -> Path:
    """Return where a split's LLaVA question file goes."""
    return root / f"{QUESTION_FILE_PREFIX}{split}.jsonl"


def build_questions(path: Path, image_folder: Path) -> list[Question]:
    """Build the questions of val2014 from the official file, worded as LLaVA words those of test-dev2015."""
    questions = []
    for number, record in enumerate(take(read_document(path), "questions", list, str(path))):
        where = f"{path.name} question {number}"
        try:
            text = take(record, "question", str, where) + SHORT_ANSWER_SUFFIX
            image = image_folder / f"COCO_{VAL}_{take(record, 'image_id', int, where):012d}.jpg"
            questions.append(build_question(take(record, "question_id", int, where), text, image))
        except InputError as fault:
            questions.append(Question(id=where, fault=str(fault)))
    return questions


def read_annotations(path: Path) -> dict[int, dict[str, Any]]:
    """Read the annotations by question id, in their order, each with its `references` (the ten answers) besides.

    Raises:
        InputError: the file is missing, or something else.
    """
    annotations = {}
    for number, record in enumerate(take(read_document(path), "annotations", list, str(path))):
        where = f"{path} annotation {number}"
        annotations[take(record, "question_id", int, where)] = {
            "answer_type": take(record, "answer_type", str, where),
            "question_type": take(record, "question_type", str, where),
            "references": take_references(record, where),
        }
    return annotations


def score_vqav2(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> Scores:
    """Score answers by the official rules, and by those before 2021 (`variants`).

    Args:
        questions: all of val2014.
        answers: rows by question key, at least one.
        annotation_file: the official annotations.

    Raises:
        InputError: questions and annotations are not of the same set.
    """
    annotations = read_annotations(annotation_file)
    require_annotations(questions, [question.id for question in questions], annotations, annotation_file)
    by_id = {row["question_id"]: row["text"] for row in answers.values()}
    texts = {identity: by_id[identity] for identity in annotations if identity in by_id}
    uploaded = {identity: normalize_m4c(text) for identity, text in texts.items()}
    main = summarize_answers(uploaded, annotations)
    exact = main["accuracy_unrounded"]
    variants = {
        "pre2021_scorer_on_raw": round_half_up(average_percent(grade_all(grade_vqa_before_2021, texts, annotations))),
        "pre2021_scorer_on_upload": round_half_up(
            average_percent(grade_all(grade_vqa_before_2021, uploaded, annotations))
        ),
    }
    return Scores(
        headline=exact["overall"],
        scores={**main, "raw": summarize_answers(texts, annotations), "variants": variants},
        count=len(texts),
        columns={"Accuracy": exact["overall"], **exact["perAnswerType"]},
    )


def grade_all(
    grade: Callable[[str, Sequence[str]], float], texts: Mapping[int, str], annotations: Mapping[int, Mapping[str, Any]]
) -> list[float]:
    """Grade answers by a rule."""
    return [grade(text, annotations[identity]["references"]) for identity, text in texts.items()]


def summarize_answers(texts: Mapping[int, str], annotations: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Grade answers and list the official numbers.

    Args:
        texts: answers by question id, in the order of the annotations.
        annotations: by question id.
    """
    grades = grade_all(grade_vqa, texts, annotations)
    groupings = {
        "perAnswerType": [annotations[identity]["answer_type"] for identity in texts],
        "perQuestionType": [annotations[identity]["question_type"] for identity in texts],
    }
    per_question = {str(identity): round_half_up(100 * grade) for identity, grade in zip(texts, grades, strict=True)}
    return {**summarize_grades(grades, groupings, round_half_up), "per_question": per_question}


def list_upload_ids(root: Path, split: str) -> list[int | str]:
    """List the questions of an upload, in its order: all of test2015 for both test splits, as the server wants it."""
    if split != VAL:
        return [record.get("question_id") for record in read_records(question_file(root, TEST))]
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
