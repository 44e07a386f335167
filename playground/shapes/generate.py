"""Write the embedded world's files: LLaVA training sets, POPE's evaluation set, and pictures with known object places.

Layouts are the published ones. Training and evaluation pictures come from different seeds.

Run: `python -m playground.shapes.generate --out DIR --train-images N --eval-images M --seed S` writes

    DIR/train/images/*.png  pretrain.json  finetune.json  single.json  text.json
    DIR/eval/pope/val2014/*.png  coco/coco_pope_*.json  llava_pope_test.jsonl
    DIR/calibrate/images/*.png  calibrate.jsonl
"""

import argparse
import json
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava.errors import InputError, run_command
from playground.shapes import conversation, pope, sentence
from playground.shapes.world import SPLITS, Scene, draw_scene

NUM_PROCESSES = 2
CHUNK_SIZE = 64
CALIBRATE_IMAGES = 200


@dataclass(frozen=True)
class Picture:
    """A picture on disk: its file name inside the image folder, and what is in it."""

    file: str
    scene: Scene


def draw_pictures(folder: Path, split: str, count: int, seed: int, prefix: str = "shapes") -> list[Picture]:
    """Draw `count` pictures of a split into a folder, in parallel."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(draw_picture, folder, prefix, (seed, SPLITS[split]))
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        return list(pool.map(draw, range(count), chunksize=CHUNK_SIZE))


def draw_picture(folder: Path, prefix: str, seed: tuple[int, int], index: int) -> Picture:
    """Draw and save one picture."""
    picture, scene = draw_scene(*seed, index)
    file = f"{prefix}_{index:012d}.png"
    picture.save(folder / file, compress_level=1)
    return Picture(file, scene)


def write_train(folder: Path, count: int, samples_per_image: int, seed: int) -> None:
    """Write the training pictures and the four JSON files."""
    pictures = draw_pictures(folder / "images", "train", count, seed)
    chooser = random.Random(seed)
    write_json(folder / "pretrain.json", [conversation.describe(index, each.file, each.scene)
                                          for index, each in enumerate(pictures)])  # fmt: skip
    finetune, single, text = [], [], []
    for turn in range(samples_per_image):
        for index, picture in enumerate(pictures):
            other = chooser.choice(pictures)
            finetune.append(conversation.converse(f"{turn}-{index}", picture, other, chooser))
            single.append(conversation.ask_once(f"{turn}-{index}", picture, chooser))
            text.append(conversation.converse_in_words(f"{turn}-{index}", picture.scene, chooser))
    write_json(folder / "finetune.json", finetune)
    write_json(folder / "single.json", single)
    write_json(folder / "text.json", text)


def write_eval(folder: Path, count: int, seed: int) -> None:
    """Write POPE's pictures, label files and question file."""
    pictures = draw_pictures(folder / "val2014", "eval", count, seed, prefix="shapes_val2014")
    categories = pope.make_categories([(each.file, each.scene) for each in pictures], random.Random(seed))
    (folder / "coco").mkdir(exist_ok=True)
    for category, questions in categories.items():
        write_lines(folder / "coco" / f"coco_pope_{category}.json", pope.label_lines(questions))
    write_lines(folder / "llava_pope_test.jsonl", pope.question_lines(categories))


def write_calibrate(folder: Path, count: int, seed: int) -> None:
    """Write pictures with one query each, and where the asked-for object is (the input of `llava.calibrate`)."""
    chooser = random.Random(seed)
    rows = []
    for picture in draw_pictures(folder / "images", "calibrate", count, seed):
        question = sentence.ask_present(picture.scene, chooser)
        boxes = [question.about.box]
        rows.append({"image": f"images/{picture.file}", "query": question.text + sentence.SUFFIX, "boxes": boxes})
    write_lines(folder / "calibrate.jsonl", rows)


def write_json(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a list of samples, one to a line, so that a person can look into the file."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description="Write the embedded world's training and evaluation files.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--eval-images", type=int, default=200)
    parser.add_argument("--calibrate-images", type=int, default=CALIBRATE_IMAGES)
    parser.add_argument("--samples-per-image", type=int, default=4, help="finetuning conversations per picture")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if min(arguments.train_images, arguments.eval_images, arguments.calibrate_images, arguments.seed) < 0:
        raise InputError("numbers of images and the seed must not be negative")
    if arguments.train_images:
        write_train(arguments.out / "train", arguments.train_images, arguments.samples_per_image, arguments.seed)
    if arguments.eval_images:
        write_eval(arguments.out / "eval" / "pope", arguments.eval_images, arguments.seed)
    if arguments.calibrate_images:
        write_calibrate(arguments.out / "calibrate", arguments.calibrate_images, arguments.seed)


if __name__ == "__main__":
    run_command(main)
