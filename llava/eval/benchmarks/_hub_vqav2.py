"""VQAv2 from the hub: `validation` (scored here) and `testdev`, whose upload must also list the questions of `test`.

A picture's name is the published one, from its id.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables

DATASET = "lmms-lab/VQAv2"
TEST_COLUMNS = ("question_id", "image_id", "question", "image")
PREFIX = "llava_vqav2_mscoco_"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class Vqav2Val(HubForm):
    """The validation split, with its answers."""

    dataset = DATASET
    tables: ClassVar[Tables] = {
        "questions": HubTable("validation", (*TEST_COLUMNS, "question_type", "answer_type", "answers")),
    }
    files = (f"{PREFIX}val2014.jsonl", VAL_QUESTIONS, VAL_ANNOTATIONS)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions (LLaVA's and the official form), annotations and pictures."""
        asked, official, annotations = [], [], []
        for row in rows["questions"]:
            asked.append(save_question(row, "val2014", layout))
            ids = {"image_id": row["image_id"], "question_id": row["question_id"]}
            official.append({**ids, "question": row["question"]})
            annotations.append(
                {
                    "question_type": row["question_type"],
                    "multiple_choice_answer": row.get("multiple_choice_answer"),
                    "answers": list(number_answers(row["answers"])),
                    "answer_type": row["answer_type"],
                    **ids,
                }
            )
        head = {"data_type": "mscoco", "data_subtype": "val2014", "info": {}, "license": {}}
        layout.write_json(VAL_QUESTIONS, {**head, "task_type": "Open-Ended", "questions": official})
        layout.write_json(VAL_ANNOTATIONS, {**head, "annotations": annotations})
        layout.write_lines(f"{PREFIX}val2014.jsonl", asked)


class Vqav2TestDev(HubForm):
    """The split of the papers, without answers."""

    dataset = DATASET
    tables: ClassVar[Tables] = {
        "questions": HubTable("testdev", TEST_COLUMNS),
        "upload": HubTable("test", ("question_id", "image_id", "question"), columns_only=True),
    }
    files = (f"{PREFIX}test-dev2015.jsonl", f"{PREFIX}test2015.jsonl")

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write the questions asked, with their pictures, and those that an upload lists."""
        questions = [save_question(row, "test2015", layout) for row in rows["questions"]]
        layout.write_lines(f"{PREFIX}test2015.jsonl", (make_question(row, "test2015") for row in rows["upload"]))
        layout.write_lines(f"{PREFIX}test-dev2015.jsonl", questions)


def save_question(row: HubRow, folder: str, layout: Layout) -> dict[str, Any]:
    """Save a row's picture and return its question."""
    question = make_question(row, folder)
    layout.save_image(f"{folder}/{question['image']}", row["image"])
    return question


def make_question(row: HubRow, folder: str) -> dict[str, Any]:
    """Make a line of LLaVA's question file."""
    return {
        "question_id": row["question_id"],
        "image": f"COCO_{folder}_{int(row['image_id']):012d}.jpg",
        "text": row["question"] + SHORT_ANSWER_LINE,
        "category": "default",
    }


def number_answers(answers: Iterable[Any]) -> Iterable[dict[str, Any]]:
    """Give the ten answers their numbers where the dataset has dropped them."""
    for number, answer in enumerate(answers, start=1):
        yield {"answer_id": number, **({"answer": answer} if isinstance(answer, str) else answer)}
