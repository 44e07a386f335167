"""SEED-Bench from the hub: pictures, and of each video the middle one of the frames that the dataset has.

LLaVA takes the middle frame of the video itself; the dataset's frames are a sample of it, so that video questions need
not see quite the same picture. The headline is about pictures.
"""

from typing import Any, ClassVar

from llava.eval.hub import LETTER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables, safe_name

QUESTION_FILE = "llava-seed-bench.jsonl"
ANNOTATION_FILE = "SEED-Bench.json"
FIELDS = (
    "answer",
    "choice_a",
    "choice_b",
    "choice_c",
    "choice_d",
    "data_id",
    "data_type",
    "question",
    "question_id",
    "question_type_id",
)
TYPE_NAMES = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
    "Action Recognition",
    "Action Prediction",
    "Procedure Understanding",
)
"""Of types 1 to 12."""


class SeedBench(HubForm):
    """All questions."""

    dataset = "lmms-lab/SEED-Bench"
    tables: ClassVar[Tables] = {"questions": HubTable("test", (*FIELDS, "image"))}
    files = (QUESTION_FILE, ANNOTATION_FILE)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, annotations and pictures."""
        questions, annotations = [], []
        for row in rows["questions"]:
            identity = str(row["question_id"])
            image = name_picture(row, identity, self.dataset)
            layout.save_image(image, choose_picture(row["image"]))
            segment = {"segment": row["segment"]} if row.get("segment") else {}
            annotations.append({**{name: row[name] for name in FIELDS}, "question_id": identity, **segment})
            questions.append(make_question(row, identity, image))
        layout.write_json(
            ANNOTATION_FILE,
            {"questions": annotations, "question_type": {name: 1 + number for number, name in enumerate(TYPE_NAMES)}},
        )
        layout.write_lines(QUESTION_FILE, questions)


def is_video(row: HubRow) -> bool:
    """Tell whether a question is about a video."""
    return row["data_type"] == "video"


def name_picture(row: HubRow, identity: str, dataset: str) -> str:
    """Return a picture's published path; those of pictures have no suffix."""
    if is_video(row):
        return f"SEED-Bench-video-image/{row['question_type_id']}_{safe_name(identity, dataset)}.png"
    return f"SEED-Bench-image/{safe_name(row['data_id'], dataset)}"


def choose_picture(cell: Any) -> Any:
    """Return the one picture, or the middle one of several frames."""
    return (cell[len(cell) // 2] if cell else None) if isinstance(cell, list) else cell


def make_question(row: HubRow, identity: str, image: str) -> dict[str, Any]:
    """Make a line of LLaVA's question file; ids of pictures are numbers there."""
    options = [f"{letter}. {row[f'choice_{letter.lower()}']}" for letter in "ABCD"]
    return {
        "image": image,
        "text": "\n".join([row["question"], *options]) + LETTER_LINE,
        "category": TYPE_NAMES[int(row["question_type_id"]) - 1],
        "question_id": identity if is_video(row) or not identity.isdecimal() else int(identity),
    }
