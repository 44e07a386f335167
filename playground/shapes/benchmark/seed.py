"""SEED-Bench (image) on shapes: multiple choice with four options."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import choice
from playground.shapes.file import Drawing, write_json, write_lines

QUESTION_TYPES = {
    "Scene Understanding": 1, "Instance Identity": 2, "Instance Attributes": 3, "Instance Location": 4,
    "Instances Counting": 5, "Spatial Relation": 6, "Instance Interaction": 7, "Visual Reasoning": 8,
    "Text Understanding": 9, "Action Recognition": 10, "Action Prediction": 11, "Procedure Understanding": 12,
}  # fmt: skip
TYPE_OF_KIND = {"object": "Instance Identity", "color": "Instance Attributes", "shape": "Instance Attributes",
                "place": "Instance Location"}  # fmt: skip
QUESTIONS_PER_IMAGE = 2
NUM_OPTIONS = 4
FIRST_ID = 101


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `SEED-Bench-image/`, `SEED-Bench.json` and LLaVA's question file."""
    questions, lines = [], []
    for index, drawing in enumerate(drawings):
        image = f"{index}_{index}"
        drawing.save(folder / "SEED-Bench-image" / image)
        for _ in range(QUESTIONS_PER_IMAGE):
            asked = choice.choose_any(drawing.scene, chooser, NUM_OPTIONS)
            while asked.kind == "number":  # there are only three numbers, and four options
                asked = choice.choose_any(drawing.scene, chooser, NUM_OPTIONS)
            identity, category = FIRST_ID + len(lines), TYPE_OF_KIND[asked.kind]
            options = {f"choice_{letter.lower()}": option
                       for letter, option in zip(choice.LETTERS, asked.options, strict=False)}  # fmt: skip
            questions.append(
                {
                    "answer": asked.letter,
                    **options,
                    "data_id": image,
                    "data_type": "image",
                    "question": asked.text,
                    "question_id": str(identity),
                    "question_type_id": QUESTION_TYPES[category],
                }
            )
            lines.append(
                {
                    "question_id": identity,
                    "image": f"SEED-Bench-image/{image}",
                    "text": asked.question().prompt,
                    "category": category,
                }
            )
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": QUESTION_TYPES})
    write_lines(folder / "llava-seed-bench.jsonl", lines)
