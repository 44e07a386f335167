"""The sample images of the page (`llava.serve.demo`), with questions that the pocket model answers rightly.

`python -m playground.shapes.samples` writes `sample_images/`: the images, and `samples.json`, which lists each with its
questions. They are scenes of the evaluation split, which no model has seen.
"""

import argparse
import sys
from io import BytesIO
from pathlib import Path

from llava.errors import run_command
from llava.files import write_bytes, write_json
from playground.shapes.world import SPLITS, draw_scene

FOLDER = Path(__file__).parent / "sample_images"
LIST = "samples.json"
SEED = 7
SAMPLES = {
    13: (
        "What shape is the purple object?",
        "What shape is the green object?",
        "Is there a white triangle in the image?",
        "How many objects are in the image?",
    ),
    9: ("What color is the circle?", "What shape is the blue object?", "Is there a red circle in the image?"),
    14: ("What color is the square?", "What color is the triangle?", "Is there a white triangle in the image?"),
    19: (
        "What shape is the white object?",
        "Is there a yellow cross in the image?",
        "How many objects are in the image?",
    ),
}
"""Number of each scene, and its questions."""


def write_samples(folder: Path) -> None:
    """Write the images and their list.

    Args:
        folder: is made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, questions in SAMPLES.items():
        image, scene = draw_scene(SEED, SPLITS["eval"], number)
        name = f"{'_and_'.join(item.name for item in scene.objects)}.png".replace(" ", "_")
        buffer = BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        write_bytes(folder / name, buffer.getvalue())
        rows.append({"image": name, "questions": list(questions)})
    write_json(folder / LIST, rows, indent=2)


def main() -> None:
    argparse.ArgumentParser(prog="python -m playground.shapes.samples", description=__doc__.split("\n")[0]).parse_args()
    write_samples(FOLDER)
    sys.stdout.write(f"written to {FOLDER}\n")


if __name__ == "__main__":
    run_command(main)
