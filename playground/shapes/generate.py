"""Write the embedded world's files: training sets in LLaVA's format, the twelve benchmarks, and calibration images.

Every benchmark has its official file layout and its own images. Training and evaluation images come from different
seeds.

Run: `python -m playground.shapes.generate --out DIR --train-images N --eval-images M --seed S` writes

    DIR/train/images/*.png  pretrain.json  finetune.json  letters.json  text.json  exam.json
    DIR/eval/<benchmark's folder>/...
    DIR/calibrate/images/*.png  calibrate.jsonl
"""

import argparse
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava.cli import print_now
from llava.errors import InputError, run_command
from llava.terminal import make_bar
from playground.shapes import conversation, sentence
from playground.shapes.benchmark import FOLDERS
from playground.shapes.file import NUM_PROCESSES, draw_many, draw_one, write_lines, write_samples
from playground.shapes.world import Scene

CHUNK_SIZE = 64
CALIBRATE_IMAGES = 200
MAX_EVAL_IMAGES = 10_000  # per benchmark: the distance between the seeds of two benchmarks
ORDER = ("pope", *(name for name in FOLDERS if name != "pope"))  # POPE has the first images


@dataclass(frozen=True)
class DrawnImage:
    """An image on disk: its file name in the image folder, and its contents."""

    file: str
    scene: Scene


def draw_images(folder: Path, split: str, count: int, seed: int) -> list[DrawnImage]:
    """Draw `count` images of a split into a folder, in parallel."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    with ProcessPoolExecutor(NUM_PROCESSES) as pool, make_bar(f"images, {split}", count, "image") as progress:
        for image in pool.map(partial(draw_image, folder, split, seed), range(count), chunksize=CHUNK_SIZE):
            images.append(image)
            progress.update()
    return images


def draw_image(folder: Path, split: str, seed: int, index: int) -> DrawnImage:
    drawing = draw_one(seed, split, index)
    file = f"shapes_{index:012d}.png"
    drawing.save(folder / file)
    return DrawnImage(file, drawing.scene)


def write_train(folder: Path, count: int, samples_per_image: int, seed: int) -> None:
    """Write the training images and the JSON files."""
    images = draw_images(folder / "images", "train", count, seed)
    chooser = random.Random(seed)
    captions = (conversation.describe(index, each.file, each.scene) for index, each in enumerate(images))
    write_samples(folder / "pretrain.json", captions)
    exam_chooser = random.Random(seed + 1)
    finetune, letters, text, exam = [], [], [], []
    for turn in range(samples_per_image):
        for index, image in enumerate(images):
            other = chooser.choice(images)
            finetune.append(conversation.converse(f"{turn}-{index}", image, other, chooser))
            for samples, shares in ((letters, conversation.FIRST_WORDS), (text, conversation.WORDS)):
                samples.append(conversation.converse_in_words(f"{turn}-{index}", image.scene, chooser, shares))
            exam.append(conversation.ask_once(f"{turn}-{index}", image, exam_chooser))
    write_samples(folder / "finetune.json", finetune)
    write_samples(folder / "letters.json", letters)
    write_samples(folder / "text.json", text)
    write_samples(folder / "exam.json", exam)


def write_eval(folder: Path, count: int, seed: int, names: tuple[str, ...] = ORDER) -> None:
    """Write benchmarks, each on `count` images of its own.

    Args:
        folder: the data root; every benchmark gets its usual folder in it.
        count: images per benchmark.
        seed: seed of the images and of the choice of questions.
        names: names of the benchmarks.
    """
    with make_bar("benchmarks", len(names), "benchmark") as progress:
        for name in names:
            module, place = FOLDERS[name]
            first = ORDER.index(name) * MAX_EVAL_IMAGES
            drawings = draw_many("eval", seed, range(first, first + count))
            module.write(folder / place, drawings, random.Random(seed))
            progress.update()


def write_calibrate(folder: Path, count: int, seed: int) -> None:
    """Write images with one query each and the box of the object it asks about (the input of `llava.calibrate`)."""
    chooser = random.Random(seed)
    rows = []
    for image in draw_images(folder / "images", "calibrate", count, seed):
        question = sentence.ask_present(image.scene, chooser)
        boxes = [question.about.box]
        rows.append({"image": f"images/{image.file}", "query": question.text + sentence.SUFFIX, "boxes": boxes})
    write_lines(folder / "calibrate.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded world's training and evaluation files.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--eval-images", type=int, default=200, help="images per benchmark")
    parser.add_argument("--benchmarks", default=" ".join(ORDER), help="names of the benchmarks to write")
    parser.add_argument("--calibrate-images", type=int, default=CALIBRATE_IMAGES)
    parser.add_argument("--samples-per-image", type=int, default=4, help="finetuning conversations per image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if min(arguments.train_images, arguments.eval_images, arguments.calibrate_images, arguments.seed) < 0:
        raise InputError("numbers of images and the seed must not be negative")
    if arguments.eval_images > MAX_EVAL_IMAGES:
        raise InputError(f"--eval-images {arguments.eval_images}: at most {MAX_EVAL_IMAGES}")
    names = tuple(arguments.benchmarks.split())
    unknown = [name for name in names if name not in FOLDERS]
    if unknown:
        raise InputError(f"--benchmarks: no benchmark {unknown[0]!r}; known: {', '.join(FOLDERS)}")
    if arguments.train_images:
        write_train(arguments.out / "train", arguments.train_images, arguments.samples_per_image, arguments.seed)
    if arguments.eval_images:
        write_eval(arguments.out / "eval", arguments.eval_images, arguments.seed, names)
    if arguments.calibrate_images:
        write_calibrate(arguments.out / "calibrate", arguments.calibrate_images, arguments.seed)
    print_now(f"written to {arguments.out}")


if __name__ == "__main__":
    run_command(main)
