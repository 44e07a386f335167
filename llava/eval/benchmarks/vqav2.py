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

from llava.download.table import Download, Place
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Extent, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import (
    COCO_PAGE,
    COCO_VAL2014,
    COCO_VAL2014_BYTES,
    COCO_VAL2014_IMAGES,
    PeopleAnswers,
    build_question,
    build_questions,
    from_eval_zip,
    judge_upload,
    load_question_file,
    read_document,
    read_records,
    require_annotations,
    take,
    take_people_answers,
    write_upload,
)
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubTable, Layout, ReadTable, question_line
from llava.eval.metrics.means import mean_percent
from llava.eval.metrics.vqa_accuracy import (
    grade_vqa,
    grade_vqa_before_2021,
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


def convert_val(read_table: ReadTable, layout: Layout) -> None:
    """Write the validation split, with its answers."""
    asked, official, annotations = [], [], []
    for row in read_table("questions"):
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


def convert_test_dev(read_table: ReadTable, layout: Layout) -> None:
    """Write the split of the papers, without answers; an upload also lists the questions of `test`."""
    questions = [save_question(row, TEST_DEV, layout) for row in read_table("questions")]
    layout.write_lines(f"{PREFIX}{TEST}.jsonl", (word_question(row, TEST) for row in read_table("upload")))
    layout.write_lines(f"{PREFIX}{TEST_DEV}.jsonl", questions)


def save_question(row: HubRow, split: str, layout: Layout) -> dict[str, Any]:
    question = word_question(row, split)
    layout.save_image(f"{IMAGE_FOLDERS[split]}/{question['image']}", row["image"])
    return question


def word_question(row: HubRow, split: str) -> dict[str, Any]:
    image = name_coco_image(split, int(row["image_id"]))
    return question_line(row["question_id"], image, row["question"] + SHORT_ANSWER_LINE)


VAL_FORM = HubForm(
    HUB_DATASET,
    {"questions": HubTable("validation", (*HUB_COLUMNS, "image", "question_type", "answer_type", "answers"))},
    (f"{PREFIX}{VAL}.jsonl", VAL_QUESTIONS, VAL_ANNOTATIONS),
    convert_val,
)
TEST_DEV_FORM = HubForm(
    HUB_DATASET,
    {
        "questions": HubTable("testdev", (*HUB_COLUMNS, "image")),
        "upload": HubTable("test", HUB_COLUMNS, columns_only=True),
    },
    (f"{PREFIX}{TEST_DEV}.jsonl", f"{PREFIX}{TEST}.jsonl"),
    convert_test_dev,
)


# --------------------------------------------------------------------------------------------------------- downloads
VQA_PAGE, VQA_ADDRESS = "https://visualqa.org/download.html", "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
DOWNLOADS = (
    Download(
        (Place(VAL_QUESTIONS, 214_354, also=(f"{PREFIX}{VAL}.jsonl",)),),
        VQA_PAGE,
        f"{VQA_ADDRESS}/v2_Questions_Val_mscoco.zip",
        unpack_in="",
        size=3_494_929,
        splits=(VAL,),
    ),
    Download(
        (Place(VAL_ANNOTATIONS, 214_354),),
        VQA_PAGE,
        f"{VQA_ADDRESS}/v2_Annotations_Val_mscoco.zip",
        unpack_in="",
        size=10_518_930,
        splits=(VAL,),
    ),
    Download(
        (Place(f"{IMAGE_FOLDERS[VAL]}/", COCO_VAL2014_IMAGES),),
        COCO_PAGE,
        COCO_VAL2014,
        unpack_in="",
        size=COCO_VAL2014_BYTES,
        splits=(VAL,),
    ),
    from_eval_zip(f"{PREFIX}{TEST_DEV}.jsonl", f"{PREFIX}{TEST}.jsonl", splits=(TEST_DEV, TEST)),
    Download(
        (Place(f"{IMAGE_FOLDERS[TEST]}/", 81_434),),
        COCO_PAGE,
        "http://images.cocodataset.org/zips/test2015.zip",
        unpack_in="",
        splits=(TEST_DEV, TEST),
    ),
)


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
    hub: ClassVar[Mapping[str, HubForm]] = {TEST_DEV: TEST_DEV_FORM, VAL: VAL_FORM}
    downloads = DOWNLOADS
    official: ClassVar[Mapping[str, Extent]] = {
        TEST_DEV: Extent(107_394, 36_807),
        TEST: Extent(447_793, 81_434),
        VAL: Extent(214_354, 40_504),
    }
    server = "EvalAI challenge 830 (VQA)"

    split: str | None = None

    def with_split(self, split: str) -> "Vqav2":
        """Return VQAv2 on `val2014`, `test-dev2015` or `test2015`; `val` and `test` mean the first two."""
        return Vqav2(find_split(split))

    def load(self, root: Path) -> list[Question]:
        split = self.split_in(root)
        path, image_folder = root / f"{PREFIX}{split}.jsonl", root / IMAGE_FOLDERS[split]
        if split == VAL and not path.is_file():
            return load_official_questions(root / VAL_QUESTIONS, image_folder)
        return load_question_file(path, image_folder, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores | None:
        if self.split_in(root) != VAL:
            return None
        return score_vqav2(self.load(root), answers, root / VAL_ANNOTATIONS)

    def place_answers(self, root: Path, run: str) -> Path:
        return root / "answers" / f"{PREFIX}{self.split_in(root)}" / run / "merge.jsonl"

    def place_upload(self, root: Path, run: str) -> Path | None:
        split = self.split_in(root)
        return None if split == VAL else root / "answers_upload" / f"{PREFIX}{split}" / run

    def export(self, answers: Mapping[str, Row], root: Path, destination: Path) -> list[Path]:
        split = self.split_in(root)
        upload = make_upload(answers.values(), list_upload_ids(root, split))
        return [write_upload(destination / f"vqav2_{split}.json", upload)]

    def split_in(self, root: Path) -> str:
        return self.split or (VAL if (root / VAL_ANNOTATIONS).is_file() else TEST_DEV)


def find_split(name: str) -> str:
    split = SHORT_NAMES.get(name, name.removeprefix(PREFIX))
    if split not in IMAGE_FOLDERS:
        raise InputError(f"vqav2 has no split {name!r}; known: {', '.join(IMAGE_FOLDERS)}")
    return split


# --------------------------------------------------------------------------------------------- questions and answers
def name_coco_image(split: str, image_id: int) -> str:
    """Name the file of a COCO image; test-dev2015 has images of test2015."""
    return f"COCO_{IMAGE_FOLDERS[split]}_{image_id:012d}.jpg"


def load_official_questions(path: Path, image_folder: Path) -> list[Question]:
    """Read the official file of val2014; the questions are worded as LLaVA words those of test-dev2015."""

    def build(number: int, record: object) -> Question:
        where = f"{path.name} question {number}"
        text = take(record, "question", str, where) + SHORT_ANSWER_LINE
        image = image_folder / name_coco_image(VAL, take(record, "image_id", int, where))
        return build_question(take(record, "question_id", int, where), text, image)

    return build_questions(take(read_document(path), "questions", list, str(path)), build)


def read_vqa_answers(path: Path) -> dict[int, PeopleAnswers]:
    """Read the official annotations by question id, in their order."""
    annotations = {}
    for number, record in enumerate(take(read_document(path), "annotations", list, str(path))):
        where = f"{path} annotation {number}"
        identity, question_type = take(record, "question_id", int, where), take(record, "question_type", str, where)
        annotations[identity] = take_people_answers(record, where, question_type=question_type)
    return annotations


# ------------------------------------------------------------------------------------------------------------- score
def score_vqav2(questions: Sequence[Question], answers: Mapping[str, Row], annotation_file: Path) -> Scores:
    """Score answers (by question key) to all questions of val2014, by the official rules.

    `raw` are the scores of the answers as they are, `variants` those of the rules before 2021.
    """
    annotations = read_vqa_answers(annotation_file)
    require_annotations(questions, [question.id for question in questions], annotations, annotation_file)
    pairs = {question.id: (key, row["text"]) for key, question, row in Vqav2.pair(questions, answers)}
    answered = {identity: annotation for identity, annotation in annotations.items() if identity in pairs}
    verdicts = [judge_upload(*pairs[identity], annotation, grade_vqa) for identity, annotation in answered.items()]

    def grade(rule: Callable[[str, Sequence[str]], float], texts: Iterable[str]) -> list[float]:
        return [rule(text, each.references) for text, each in zip(texts, answered.values(), strict=True)]

    texts, uploads = [each.prediction for each in verdicts], [str(each.parsed) for each in verdicts]
    main = summarize_answers(answered, [each.points for each in verdicts])
    exact = main["accuracy_unrounded"]
    scores = {
        **main,
        "raw": summarize_answers(answered, grade(grade_vqa, texts)),
        "variants": {
            "pre2021_scorer_on_raw": round_half_up(mean_percent(grade(grade_vqa_before_2021, texts))),
            "pre2021_scorer_on_upload": round_half_up(mean_percent(grade(grade_vqa_before_2021, uploads))),
        },
    }
    return Vqav2().sum_up(verdicts, scores, {"Accuracy": exact["overall"], **exact["perAnswerType"]})


def summarize_answers(answered: Mapping[int, PeopleAnswers], grades: Sequence[float]) -> dict[str, Any]:
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
        path = root / f"{PREFIX}{TEST}.jsonl"
        return [take(record, "question_id", int, str(path)) for record in read_records(path)]
    return [question.id for question in Vqav2(VAL).load(root) if not question.fault]


def make_upload(rows: Iterable[Row], ids: Sequence[int | str]) -> list[dict[str, Any]]:
    """Make the upload: an entry for each id, with an empty answer where there is none."""
    texts = {str(row["question_id"]): normalize_m4c(row["text"]) for row in rows}
    foreign = texts.keys() - set(map(str, ids))
    if foreign:
        raise InputError(
            f"vqav2: {len(foreign)} answers are to questions that the upload does not list (such as {min(foreign)})"
        )
    return [{"question_id": identity, "answer": texts.get(str(identity), "")} for identity in ids]
