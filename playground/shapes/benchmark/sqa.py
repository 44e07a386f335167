"""ScienceQA on shapes: multiple choice about an image or about a description of one."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import choice, sentence
from playground.shapes.file import Drawing, write_json

IMAGE_SHARE = 0.75
HINT_SHARE = 0.5
SUBJECTS = {"object": "natural science", "color": "natural science", "shape": "natural science",
            "place": "social science", "number": "language science"}  # fmt: skip
GRADES = tuple(f"grade{number}" for number in range(1, 13))


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `problems.json`, `pid_splits.json`, LLaVA's question file and `images/test/`."""
    problems, items = {}, []
    for index, drawing in enumerate(drawings, 1):
        identity = str(index)
        has_image = chooser.random() < IMAGE_SHARE
        asked = (choice.choose_any if has_image else choice.choose_described)(drawing.scene, chooser)
        if has_image:
            drawing.save(folder / "images/test" / identity / "image.png")
            hint = choice.write_hint(drawing.scene).removeprefix("Context: ") if chooser.random() < HINT_SHARE else ""
        else:
            hint = sentence.IMAGE_IN_WORDS.format(sentence.describe(drawing.scene).answer).strip()
        problems[identity] = describe(asked, hint, has_image, chooser.choice(GRADES))
        text = asked.lines(hint=f"Context: {hint}" if hint else None)
        item = {"id": identity, "image": f"{identity}/image.png"} if has_image else {"id": identity}
        turns = [
            {"from": "human", "value": "<image>\n" * has_image + text},
            {"from": "gpt", "value": asked.letter},
        ]
        items.append({**item, "conversations": turns})
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    write_json(folder / "llava_test_CQM-A.json", items)


def describe(asked: choice.Choice, hint: str, has_image: bool, grade: str) -> dict[str, object]:
    """Return a question in the form of ScienceQA's file."""
    return {
        "question": asked.text,
        "choices": list(asked.options),
        "answer": asked.answer,
        "hint": hint,
        "image": "image.png" if has_image else None,
        "task": "closed choice",
        "grade": grade,
        "subject": SUBJECTS[asked.kind],
        "topic": asked.kind,
        "category": asked.kind,
        "skill": f"Name the {asked.kind}",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
