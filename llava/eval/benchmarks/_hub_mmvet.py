"""MM-Vet from the hub: questions with answers and capabilities.

The dataset does not tell which questions share a picture file: each gets its own, under the question's name.
"""

from typing import ClassVar

from llava.errors import InputError
from llava.eval.hub import HubForm, HubRows, HubTable, Layout, Tables, guess_suffix, safe_name

QUESTION_FILE = "llava-mm-vet.jsonl"
ANNOTATION_FILE = "mm-vet.json"
KEY_PREFIX = "v1_"


class MMVet(HubForm):
    """All 218 questions."""

    dataset = "lmms-lab/MMVet"
    tables: ClassVar[Tables] = {
        "questions": HubTable("test", ("question_id", "image", "question", "answer", "image_source", "capability"))
    }
    files = (QUESTION_FILE, ANNOTATION_FILE)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, annotations and pictures."""
        questions, annotations = [], {}
        for row in rows["questions"]:
            key = safe_name(row["question_id"], self.dataset)
            image = f"{key}{guess_suffix(row['image'])}"
            layout.save_image(f"images/{image}", row["image"])
            annotations[key] = {
                "imagename": image,
                "question": row["question"],
                "answer": row["answer"],
                "imagesource": row["image_source"],
                "capability": [name.strip() for name in row["capability"].split(",")],
            }
            questions.append(
                {"image": image, "text": row["question"], "category": "conv", "question_id": find_number(key)}
            )
        layout.write_json(ANNOTATION_FILE, annotations)
        layout.write_lines(QUESTION_FILE, questions)


def find_number(key: str) -> int:
    """Return the number of `v1_<number>`, the question's id in LLaVA's file.

    Raises:
        InputError: the key has another form.
    """
    number = key.removeprefix(KEY_PREFIX)
    if not number.isdecimal():
        raise InputError(f"MM-Vet: question_id {key!r} is not {KEY_PREFIX}<number>")
    return int(number)
