"""Images with known contents, and the files that they and their questions are written to."""

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from playground.shapes.world import SPLITS, Scene, draw_scene

NUM_PROCESSES = 2
CHUNK_SIZE = 16
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Drawing:
    """An image in memory and its contents."""

    image: Image.Image
    scene: Scene

    def save(self, path: Path) -> None:
        """Write the image: JPEG for `.jpg`, else PNG (SEED-Bench's file names have no extension)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.encode("JPEG" if path.suffix == ".jpg" else "PNG"))

    def encode(self, kind: str) -> bytes:
        """Encode the image as JPEG or PNG."""
        stream = BytesIO()
        options = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
        self.image.save(stream, kind, **options)
        return stream.getvalue()


def draw_many(split: str, seed: int, indices: Iterable[int]) -> list[Drawing]:
    """Draw images of a split, in parallel."""
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        return list(pool.map(partial(draw_one, seed, split), indices, chunksize=CHUNK_SIZE))


def draw_one(seed: int, split: str, index: int) -> Drawing:
    return Drawing(*draw_scene(seed, SPLITS[split], index))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def write_samples(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a JSON list, one row per line, so that a person can read the file."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
