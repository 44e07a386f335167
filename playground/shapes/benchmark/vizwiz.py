"""VizWiz's val split on shapes: one question per image; some questions are unanswerable."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.benchmark.vqav2 import agree, classify
from playground.shapes.file import Drawing, write_json


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `val/` and `val.json`."""
    rows = []
    for index, drawing in enumerate(drawings):
        image = f"VizWiz_val_{index:08d}.jpg"
        drawing.save(folder / "val" / image)
        asked = sentence.ask_blind(drawing.scene, chooser)
        answer = asked.answer.lower()
        answerable = asked.answer != sentence.UNANSWERABLE
        rows.append(
            {
                "image": image,
                "question": asked.text.lower(),
                "answers": [{name: row[name] for name in ("answer_confidence", "answer")} for row in agree(answer)],
                "answer_type": classify(answer) if answerable else "unanswerable",
                "answerable": int(answerable),
            }
        )
    write_json(folder / "val.json", rows)
