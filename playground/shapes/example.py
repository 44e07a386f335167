"""Name one picture of the written POPE files and a question about something that it shows, for the demo to draw.

`python -m playground.shapes.example --data DIR --number K` prints the picture's path and the question, a line each.
"""

import argparse
import json
import sys
from pathlib import Path

from llava.errors import InputError, run_command


def find_example(data: Path, number: int) -> tuple[Path, str]:
    """Find the first question with the answer yes about the picture of that number.

    Args:
        data: the folder that `generate --out` wrote.
        number: which picture, from 0, in the order of the questions.

    Raises:
        InputError: there are no POPE files, or not so many pictures.
    """
    root = data / "eval" / "pope"
    labels = root / "coco" / "coco_pope_random.json"
    if not labels.is_file():
        raise InputError(f"no POPE files under {data}: python -m playground.shapes.generate --out {data} writes them")
    rows = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()]
    shown = {row["image"]: row["text"] for row in reversed(rows) if row["label"] == "yes"}
    pictures = sorted(shown)
    if not 0 <= number < len(pictures):
        raise InputError(f"--number {number}: {labels} has {len(pictures)} pictures, counted from 0")
    return root / "val2014" / pictures[number], shown[pictures[number]]


def main() -> None:
    """Print the example."""
    parser = argparse.ArgumentParser(description="Name a picture and a question about something that it shows.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--number", type=int, default=0)
    arguments = parser.parse_args()
    image, question = find_example(arguments.data, arguments.number)
    sys.stdout.write(f"{image}\n{question}\n")


if __name__ == "__main__":
    run_command(main)
