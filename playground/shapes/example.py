"""Pick one image of the generated POPE files and a question about an object in it, for the demo to draw.

`python -m playground.shapes.example --data DIR --number K` prints the image's path and the question, one per line.
"""

import argparse
import json
import sys
from pathlib import Path

from llava.errors import InputError, run_command


def find_example(data: Path, number: int) -> tuple[Path, str]:
    """Find the first question with the answer yes about an image.

    Args:
        data: the folder that `generate --out` wrote.
        number: number of the image, from 0, by file name.

    Raises:
        InputError: there are no POPE files, or fewer images.
    """
    root = data / "eval" / "pope"
    labels = root / "coco" / "coco_pope_random.json"
    if not labels.is_file():
        raise InputError(f"no POPE files under {data}: python -m playground.shapes.generate --out {data} writes them")
    rows = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()]
    shown = {row["image"]: row["text"] for row in reversed(rows) if row["label"] == "yes"}
    images = sorted(shown)
    if not 0 <= number < len(images):
        raise InputError(f"--number {number}: {labels} has {len(images)} images, counted from 0")
    return root / "val2014" / images[number], shown[images[number]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pick an image and a question about an object in it.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--number", type=int, default=0)
    arguments = parser.parse_args()
    image, question = find_example(arguments.data, arguments.number)
    sys.stdout.write(f"{image}\n{question}\n")


if __name__ == "__main__":
    run_command(main)
