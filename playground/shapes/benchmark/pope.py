"""POPE on shapes: is an object there? The three categories choose the absent objects in different ways.

`random` asks for any absent object, `popular` for the absent objects most frequent in the set, `adversarial` for absent
objects that share colour or shape, or both, with present ones (the original takes objects that often occur together).
In every category yes and no alternate, with at most three of each per image.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from playground.shapes import sentence
from playground.shapes.file import Drawing, write_lines
from playground.shapes.world import Scene

QUESTIONS_PER_ANSWER = 3
FIRST_ID = {"adversarial": 1, "popular": 20000001, "random": 10000001}  # in the order of LLaVA's question file

Question = tuple[str, str, str]  # image file, text without suffix, label


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write `val2014/`, the label files and the question file."""
    images = []
    for index, drawing in enumerate(drawings):
        file = f"shapes_val2014_{index:012d}.png"
        drawing.save(folder / "val2014" / file)
        images.append((file, drawing.scene))
    categories = make_categories(images, chooser)
    for category, questions in categories.items():
        write_lines(folder / "coco" / f"coco_pope_{category}.json", label_lines(questions))
    write_lines(folder / "llava_pope_test.jsonl", question_lines(categories))


def make_categories(images: Sequence[tuple[str, Scene]], chooser: random.Random) -> dict[str, list[Question]]:
    """Make the questions of all three categories.

    Args:
        images: file name and contents of each image.
        chooser: the random generator.

    Returns:
        Questions by category; all categories ask about the same present objects.
    """
    counts = Counter(item.name for _, scene in images for item in scene.objects)
    categories: dict[str, list[Question]] = {category: [] for category in FIRST_ID}
    for file, scene in images:
        number = min(QUESTIONS_PER_ANSWER, len(scene.objects))
        present = [item.name for item in chooser.sample(scene.objects, number)]
        absent = sentence.absent_names(scene)
        chosen = {
            "adversarial": sentence.confusable_names(scene, chooser)[:number],
            "popular": sorted(absent, key=lambda name: -counts[name])[:number],
            "random": chooser.sample(absent, number),
        }
        for category, names in chosen.items():
            for there, missing in zip(present, names, strict=True):
                categories[category].append((file, sentence.ask_presence(there), "yes"))
                categories[category].append((file, sentence.ask_presence(missing), "no"))
    return categories


def label_lines(questions: Sequence[Question]) -> Iterator[dict[str, object]]:
    """Yield the rows of a category's label file, `coco/coco_pope_<category>.json`."""
    for index, (file, text, label) in enumerate(questions, 1):
        yield {"question_id": index, "image": file, "text": text, "label": label}


def question_lines(categories: Mapping[str, Sequence[Question]]) -> Iterator[dict[str, object]]:
    """Yield the rows of `llava_pope_test.jsonl`: all categories, with the short-answer suffix."""
    for category, first_id in FIRST_ID.items():
        for index, (file, text, _) in enumerate(categories[category]):
            full = text + sentence.SUFFIX
            yield {"question_id": first_id + index, "image": file, "text": full, "category": category}
