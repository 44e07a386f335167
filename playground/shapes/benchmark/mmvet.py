"""MM-Vet on shapes: free-form answers that must contain certain names, by the capabilities they need."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_json, write_lines
from playground.shapes.world import Scene

ALL_OF = "<AND>"


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `images/`, `mm-vet.json` and LLaVA's question file."""
    official, lines = {}, []
    for drawing in drawings:
        text, answer, capability = ask(drawing.scene, chooser)
        identity = f"v1_{len(lines)}"
        image = f"{identity}.png"
        drawing.save(folder / "images" / image)
        official[identity] = {
            "imagename": image,
            "question": text,
            "answer": answer,
            "imagesource": "shapes",
            "capability": capability,
        }
        lines.append({"image": image, "text": text, "category": "conv", "question_id": len(lines)})
    write_json(folder / "mm-vet.json", official)
    write_lines(folder / "llava-mm-vet.jsonl", lines)


def ask(scene: Scene, chooser: random.Random) -> tuple[str, str, list[str]]:
    """Make a question; returns its text, what an answer must contain, and the capabilities it needs."""
    names = [item.name for item in sentence.sort_objects(scene)]
    asked = [
        (sentence.DESCRIBE, ALL_OF.join(names), ["rec", "gen"]),
        (sentence.tell_number(scene).text, ALL_OF.join([str(len(names)), *names]), ["rec", "math"]),
    ]
    colors, places = sentence.ask_color(scene), sentence.ask_place(scene)
    if colors:
        question = chooser.choice(colors)
        asked.append((question.text, question.answer, ["rec"]))
    if places:
        question = chooser.choice(places)
        asked.append((question.text, question.answer, ["rec", "spat"]))
    return chooser.choice(asked)
