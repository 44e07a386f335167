"""The sample images of the page, which the repository has beside its pocket checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.files import read_json

SHAPES = Path(__file__).resolve().parents[2] / "playground" / "shapes"
"""In the repository; an installed package has no such folder."""


@dataclass(frozen=True)
class Sample:
    """An image and questions about it that the pocket model answers."""

    image: Path
    questions: Sequence[str]


def find_pocket_checkpoint() -> Path:
    """Return the folder of the pocket checkpoint.

    Raises:
        InputError: this is an installed package without the repository.
    """
    checkpoint = SHAPES / "checkpoints" / "llava-shapes"
    if not checkpoint.is_dir():
        raise InputError("the pocket checkpoint is in the repository only: name a checkpoint by --model-path CKPT")
    return checkpoint


def list_samples() -> list[Sample]:
    """List the sample images; none in an installed package."""
    folder = SHAPES / "sample_images"
    if not folder.is_dir():
        return []
    rows = read_json(folder / "samples.json", "`python -m playground.shapes.samples` writes it")
    return [Sample(folder / row["image"], row["questions"]) for row in rows]
