"""MMBench dev on shapes: each question once per rotation of its options."""

import base64
import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import choice
from playground.shapes.file import Drawing

FILE = "mmbench_dev_20230712.tsv"
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split")  # fmt: skip
ROTATION_STEP = 1_000_000
SECOND_LEVEL = {
    "object": "coarse perception",
    "color": "finegrained_perception (instance-level)",
    "shape": "finegrained_perception (instance-level)",
    "place": "relation_reasoning",
    "number": "finegrained_perception (instance-level)",
}


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write the English table."""
    write_table(folder / FILE, drawings, chooser)


def write_table(path: Path, drawings: Sequence[Drawing], chooser: random.Random, chinese: bool = False) -> None:
    """Write a table: the base rows of all questions, then the rows of each rotation."""
    questions = [(drawing, choice.choose_any(drawing.scene, chooser)) for drawing in drawings]
    rows = []
    for rotation in range(choice.MAX_OPTIONS):
        for index, (drawing, asked) in enumerate(questions, 1):
            if rotation < len(asked.options):
                rows.append(make_row(index, rotation, drawing, asked, chinese))
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


def make_row(index: int, rotation: int, drawing: Drawing, asked: choice.Choice, chinese: bool) -> dict[str, object]:
    """Return a question's row with its options and answer rotated `rotation` steps to the right."""
    number = len(asked.options)
    options = [asked.options[(place - rotation) % number] for place in range(number)]
    return {
        "index": index + rotation * ROTATION_STEP,
        "question": asked.text_cn if chinese else asked.text,
        "hint": "",
        **dict(zip("ABCD", [*options, *[""] * (choice.MAX_OPTIONS - number)], strict=True)),
        "answer": choice.LETTERS[(asked.answer + rotation) % number],
        "category": asked.kind,
        "image": base64.b64encode(drawing.encode("PNG")).decode(),
        "source": "shapes",
        "l2-category": SECOND_LEVEL[asked.kind],
        "comment": "",
        "split": "dev",
    }
