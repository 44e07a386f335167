"""The sample images of the page, which the repository has: drawn ones beside its pocket checkpoint, and photographs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.files import read_json

PLAYGROUND = Path(__file__).resolve().parents[2] / "playground"
"""In the repository; an installed package has no such folder."""
SHAPES, PHOTOS = PLAYGROUND / "shapes", PLAYGROUND / "photos"


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
    """List the sample images, the drawn ones first; none in an installed package."""
    drawn = read_samples(SHAPES / "sample_images", "`python -m playground.shapes.samples` writes it")
    return drawn + read_samples(PHOTOS, "it is in the repository")


def read_samples(folder: Path, hint: str) -> list[Sample]:
    """Read a folder's list of samples; none where there is no such folder.

    Args:
        folder: of `samples.json` and its images.
        hint: where the list comes from, for a message that it is missing.
    """
    if not folder.is_dir():
        return []
    return [Sample(folder / row["image"], row["questions"]) for row in read_json(folder / "samples.json", hint)]
