"""LLaVA-Bench on shapes: questions in three categories, with reference answers that are sentences."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_lines


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `images/`, questions, captions and reference answers."""
    questions, captions, references = [], [], []
    for index, drawing in enumerate(drawings, 1):
        image = f"{index:03d}.jpg"
        drawing.save(folder / "images" / image)
        described = sentence.describe(drawing.scene)
        captions.append({"id": f"{index:03d}", "image": image, "caption": described.answer})
        colors = sentence.tell_color(drawing.scene)
        asked = {"detail": described, "complex": sentence.tell_number(drawing.scene)}
        if colors:
            asked = {"conv": chooser.choice(colors), **asked}
        for category, question in asked.items():
            identity = len(questions)
            row = {"question_id": identity, "image": image, "category": category, "text": question.prompt}
            questions.append(row)
            references.append(
                {
                    "question_id": identity,
                    "prompt": question.prompt,
                    "answer_id": f"reference{identity}",
                    "model_id": "generator",
                    "metadata": {},
                    "text": question.answer,
                }
            )
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "context.jsonl", captions)
    write_lines(folder / "answers_gpt4.jsonl", references)
