"""Measure which sign of the text-patch similarity fits a vision tower, on pictures whose object places are known.

TRIM as published keeps the patches whose dot product with the query is LOWEST (`similarity=negated`), because that is
where OpenAI's CLIP puts the asked-for object. That is a property of a trained tower, not a law: another tower may need
`similarity=direct`, and the sign can flip during training. This command asks the tower itself.

Run: `python -m llava.calibrate --vision-tower NAME --pictures FILE.jsonl [--json OUT]`, where each line of the file is
`{"image": path, "query": text, "boxes": [[left, top, right, bottom], ...]}` in pixels of the picture; relative image
paths are relative to the file. Shape letters: `I` pictures, `N` patches, `D` vision width, `P` joint width.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor

from llava.errors import InputError, run_command
from llava.image import load_image
from llava.mm_utils import process_images
from llava.model.multimodal_encoder.builder import load_tower
from llava.model.token_reduction import TEXT, VisualTokens, parse_reducer

OPTIONS = ("TRIM:-1", "TRIM:-1,similarity=direct")
MIN_COVERED = 0.5  # a cell belongs to an object when its box covers at least this share of it
MIN_GAIN = 0.2  # an option fits when it finds at least this much more of the object than as many random patches
BATCH_SIZE = 32


@dataclass(frozen=True)
class PictureRow:
    """One picture, the query put to it, and where the asked-for object is (left, top, right, bottom in pixels)."""

    image: Path
    query: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Figures:
    """How well an option finds the asked-for objects; means over pictures, each in [0, 1].

    Attributes:
        option: spec string of the reducer.
        kept_ratio: share of all patches kept.
        recall: share of the objects' patches kept; as many random patches would reach `kept_ratio`.
        precision: share of the kept patches that lie on the object (0 for a picture with nothing kept).
        auc: probability that a patch of the object scores above one outside it.
    """

    option: str
    kept_ratio: float
    recall: float
    precision: float
    auc: float

    @property
    def gain(self) -> float:
        """How much more of the object is kept than by random choice of as many patches."""
        return self.recall - self.kept_ratio


def read_rows(path: Path) -> list[PictureRow]:
    """Read the pictures file.

    Raises:
        InputError: when it is missing or empty, or a line is not what the module's head describes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; expected a JSON-lines file of pictures") from None
    rows = [parse_row(line, f"{path}, line {number}", path.parent) for number, line in enumerate(lines, 1) if line]
    if not rows:
        raise InputError(f"{path} has no pictures: expected one JSON object per line")
    return rows


def parse_row(line: str, place: str, folder: Path) -> PictureRow:
    """Parse one line of the pictures file.

    Raises:
        InputError: when it is not an object with image, query and at least one box of positive size.
    """
    try:
        row = json.loads(line)
        boxes = tuple(tuple(float(value) for value in box) for box in row["boxes"])
        good = bool(boxes) and all(left < right and top < bottom for left, top, right, bottom in boxes)
        parsed = PictureRow(folder / row["image"], str(row["query"]), boxes)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise InputError(f'{place}: expected {{"image": path, "query": text, "boxes": [[left, top, right, bottom]]}}')
    return parsed


def cover_cells(boxes: Iterable[Sequence[float]], picture_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Find the patch cells that boxes cover, after the picture was padded to a square and resized.

    Args:
        boxes: (left, top, right, bottom) in pixels of the original picture.
        picture_size: its width and height.
        grid: rows and columns of patches.

    Returns:
        bool[N], raster order. Every box owns at least the cell that it covers most.
    """
    width, height = picture_size
    side = max(width, height)
    rows, columns = grid
    inside = torch.zeros(rows * columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        across = share_of_cells(left + (side - width) // 2, right + (side - width) // 2, side, columns)
        down = share_of_cells(top + (side - height) // 2, bottom + (side - height) // 2, side, rows)
        covered = torch.outer(down, across).flatten()
        inside |= covered >= MIN_COVERED
        inside[covered.argmax()] = True
    return inside


def share_of_cells(start: float, end: float, side: int, num_cells: int) -> Tensor:
    """Give the share of each of equal stretches of [0, side] that [start, end] covers, float64[num_cells]."""
    edges = torch.linspace(0, side, num_cells + 1, dtype=torch.float64)
    covered = edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)
    return covered.clamp(min=0) * num_cells / side


def measure_option(option: str, tokens: VisualTokens, inside: Tensor) -> Figures:
    """Measure one reducer on pictures with known places.

    Args:
        option: spec of a reducer that keeps patches and tells its scores.
        tokens: the pictures, with joint space and text.
        inside: bool[I, N], which patches belong to the asked-for object; at least one and not all per row.
    """
    reduced = parse_reducer(option)(tokens)
    kept, scores = reduced.kept, reduced.scores
    hits = (kept & inside).sum(1)
    return Figures(
        option=option,
        kept_ratio=kept.float().mean().item(),
        recall=(hits / inside.sum(1)).mean().item(),
        precision=(hits / kept.sum(1).clamp(min=1)).mean().item(),
        auc=sum(map(rank_objects, scores, inside)) / len(inside),
    )


def rank_objects(scores: Tensor, inside: Tensor) -> float:
    """Give the probability that a patch inside scores above one outside, ties counted half.

    Args:
        scores: float32[N].
        inside: bool[N], neither all false nor all true.
    """
    difference = scores[inside][:, None] - scores[~inside][None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def choose_option(figures: Sequence[Figures]) -> Figures | None:
    """Choose the option that gains most over random patches, or None when none gains `MIN_GAIN`."""
    best = max(figures, key=lambda figure: figure.gain)
    return best if best.gain >= MIN_GAIN else None


@torch.inference_mode()
def encode_rows(tower: object, rows: Sequence[PictureRow]) -> tuple[VisualTokens, Tensor]:
    """Run a tower over the pictures and queries.

    Returns:
        The pictures' tokens, and bool[I, N] telling the patches of the asked-for objects.
    """
    patches, joint, text, inside = [], [], [], []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        pictures = [load_image(row.image) for row in batch]
        encoded = tower.encode(prepare(pictures, tower))
        patches.append(encoded.cpu())
        joint.append(tower.project_to_joint(encoded).cpu())
        text.append(tower.embed_text([row.query for row in batch]).cpu())
        inside += [
            cover_cells(row.boxes, picture.size, tower.grid) for row, picture in zip(batch, pictures, strict=True)
        ]
    return VisualTokens(torch.cat(patches), tower.grid, torch.cat(joint), torch.cat(text)), torch.stack(inside)


def prepare(pictures: list[Image.Image], tower: object) -> Tensor:
    """Pad to squares and preprocess, as LLaVA-1.5 does; `[I, 3, S, S]` where the tower wants it."""
    pixels = process_images(pictures, tower.image_processor, SimpleNamespace(image_aspect_ratio="pad"))
    return pixels.to(device=tower.device, dtype=tower.dtype)


def calibrate(tower: object, rows: Sequence[PictureRow]) -> list[Figures]:
    """Measure every option of `OPTIONS` for a tower."""
    tokens, inside = encode_rows(tower, rows)
    return [measure_option(option, tokens, inside) for option in OPTIONS]


def format_table(figures: Sequence[Figures]) -> str:
    """Lay out the figures for a terminal."""
    width = max(len(figure.option) for figure in figures)
    lines = [f"{'option':{width}}  kept_ratio  recall  precision    auc"]
    lines += [
        f"{item.option:{width}}  {item.kept_ratio:10.3f}  {item.recall:6.3f}  {item.precision:9.3f}  {item.auc:5.3f}"
        for item in figures
    ]
    return "\n".join(lines)


def write_report(path: Path, report: dict[str, object]) -> None:
    """Write the report as JSON, at once or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Measure a tower and say which option fits."""
    parser = argparse.ArgumentParser(description="Measure which sign of TRIM's similarity fits a vision tower.")
    parser.add_argument("--vision-tower", required=True, help="folder, hub id or open_clip:<model>")
    parser.add_argument("--pictures", type=Path, required=True, help='JSON lines of {"image", "query", "boxes"}')
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.pictures)
    figures = calibrate(load_tower(arguments.vision_tower, needs={TEXT}), rows)
    best = choose_option(figures)
    fits = best.option if best else "neither"
    print(format_table(figures))  # noqa: T201
    print(f"fits: {fits} ({len(rows)} pictures)")  # noqa: T201
    if arguments.json:
        options = [asdict(figure) for figure in figures]
        report = {"vision_tower": arguments.vision_tower, "num_pictures": len(rows), "fits": fits, "options": options}
        write_report(arguments.json, report)


if __name__ == "__main__":
    run_command(main)
