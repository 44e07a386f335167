"""VQAv2's val split on shapes: short answers, the same from all ten annotators."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_json

KINDS = {"presence": 0.35, "check": 0.1, "color": 0.2, "shape": 0.15, "place": 0.1, "number": 0.1}
QUESTIONS_PER_IMAGE = 2
NUM_ANNOTATORS = 10
HEAD = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `val2014/`, the question file and the annotation file."""
    questions, annotations = [], []
    for index, drawing in enumerate(drawings, 1):
        drawing.save(folder / f"val2014/COCO_val2014_{index:012d}.jpg")
        for number in range(QUESTIONS_PER_IMAGE):
            asked = sentence.ask_any(drawing.scene, chooser, KINDS)
            name = {"image_id": index, "question_id": index * 1000 + number}
            questions.append({**name, "question": asked.text})
            answer = asked.answer.lower()
            annotations.append(
                {
                    "question_type": " ".join(asked.text.lower().split()[:2]),
                    "multiple_choice_answer": answer,
                    "answers": agree(answer),
                    **name,
                    "answer_type": classify(answer),
                }
            )
    head = {**HEAD, "task_type": "Open-Ended"}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**HEAD, "annotations": annotations})


def agree(answer: str) -> list[dict[str, object]]:
    """Give the same answer ten times, once per annotator."""
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": person + 1} for person in range(NUM_ANNOTATORS)]


def classify(answer: str) -> str:
    """Return an answer's type, as in VQAv2."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"
