"""GQA's testdev on shapes: questions by structural and semantic type, in random order."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_json, write_lines

# Kind of question: its structural type, semantic type and last operation.
TYPES = {
    "presence": ("verify", "obj", "exist"),
    "color": ("query", "attr", "query: color"),
    "shape": ("query", "cat", "query: shape"),
    "place": ("query", "rel", "query: place"),
    "two": ("choose", "attr", "choose color"),
}
QUESTIONS_PER_IMAGE = 2
FIRST_ID = 201000000


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `data/images/`, the official questions and LLaVA's question file."""
    official, lines = {}, []
    for index, drawing in enumerate(drawings):
        image = f"n{index}"
        drawing.save(folder / f"data/images/{image}.jpg")
        for number in range(QUESTIONS_PER_IMAGE):
            kind = chooser.choice([kind for kind in TYPES if sentence.KINDS[kind](drawing.scene, chooser)])
            asked = chooser.choice(sentence.KINDS[kind](drawing.scene, chooser))
            identity = str(FIRST_ID + index * QUESTIONS_PER_IMAGE + number)
            official[identity] = describe(identity, image, kind, asked)
            lines.append(
                {"question_id": identity, "image": f"{image}.jpg", "text": asked.prompt, "category": "default"}
            )
    chooser.shuffle(lines)
    write_json(folder / "data/testdev_balanced_questions.json", official)
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)


def describe(identity: str, image: str, kind: str, asked: sentence.Question) -> dict[str, object]:
    """Return a question in the form of GQA's file."""
    structural, semantic, operation = TYPES[kind]
    about = asked.about.name if asked.about else "object"
    steps = [
        {"operation": "select", "argument": about, "dependencies": []},
        {"operation": operation, "argument": "", "dependencies": [0]},
    ]
    return {
        "semantic": steps,
        "entailed": [],
        "equivalent": [identity],
        "question": asked.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": kind, "local": f"{kind}-{about}"},
        "answer": asked.answer.lower(),
        "semanticStr": f"select: {about}->{operation}",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": kind, "semantic": semantic, "structural": structural},
        "fullAnswer": asked.answer,
    }
