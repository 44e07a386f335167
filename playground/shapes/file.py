"""Pictures with known contents, and how they and their questions get on disk."""

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
    """A picture in memory and what is in it."""

    picture: Image.Image
    scene: Scene

    def save(self, path: Path) -> None:
        """Write the picture: JPEG for `.jpg`, else PNG (SEED-Bench's names have no extension)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.encode("JPEG" if path.suffix == ".jpg" else "PNG"))

    def encode(self, kind: str) -> bytes:
        """Give the bytes of a picture file."""
        stream = BytesIO()
        options = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
        self.picture.save(stream, kind, **options)
        return stream.getvalue()


def draw_many(split: str, seed: int, indices: Iterable[int]) -> list[Drawing]:
    """Draw pictures of a split, in parallel."""
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        return list(pool.map(partial(draw_one, seed, split), indices, chunksize=CHUNK_SIZE))


def draw_one(seed: int, split: str, index: int) -> Drawing:
    """Draw one picture."""
    return Drawing(*draw_scene(seed, SPLITS[split], index))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def write_samples(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a JSON list, one row to a line, so that a person can look into the file."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
