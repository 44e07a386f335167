"""TextVQA's val split on shapes: prompts have the line of OCR tokens, but no question needs it."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.benchmark.vqav2 import NUM_ANNOTATORS
from playground.shapes.file import Drawing, write_json, write_lines
from playground.shapes.world import PICTURE_SIZE

QUESTIONS_PER_IMAGE = 2


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `train_images/`, the annotations and LLaVA's question file."""
    data, lines = [], []
    for index, drawing in enumerate(drawings):
        image = f"{index:016x}"
        drawing.save(folder / f"train_images/{image}.jpg")
        asked = {}
        for _ in range(QUESTIONS_PER_IMAGE):
            question = sentence.ask_with_ocr(drawing.scene, chooser)
            asked.setdefault(question.text, question)
        for text, question in asked.items():
            data.append(
                {
                    "question": text.lower(),
                    "image_id": image,
                    "image_classes": [],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": PICTURE_SIZE,
                    "image_height": PICTURE_SIZE,
                    "answers": [question.answer] * NUM_ANNOTATORS,
                    "question_tokens": text.lower().rstrip("?").split(),
                    "question_id": len(data) + 1,
                    "set_name": "val",
                }
            )
            lines.append(
                {"question_id": image, "image": f"{image}.jpg", "text": question.prompt, "category": "default"}
            )
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": data})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
