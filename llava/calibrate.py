"""Fit TRIM to a model: which sign of the similarity fits its vision tower, and which fence keeps a mean of X patches.

1. The sign. TRIM keeps the patches whose dot product with the query is LOWEST (`similarity=negated`), because that is
where OpenAI's CLIP puts the queried object. That is a property of a trained tower, not a law: another tower may need
`similarity=direct`, and the sign can flip during training. This command asks the tower itself, on images in which the
object's place is known. Of a SigLIP it measures dot product and cosine, each with both signs.

Run: `python -m llava.calibrate --vision-tower NAME --pictures FILE.jsonl [--json OUT]`, where each line of the file is
`{"image": path, "query": text, "boxes": [[left, top, right, bottom], ...]}` in pixels of the image; relative image
paths are relative to the file.

2. The fence. How many patches `TRIM:-1` keeps depends on the images; with another fence the mean over the questions of
a benchmark is the one that is asked for.

Run: `python -m llava.calibrate --model-path CKPT --task NAME [--split S] --average 64 [--reduce TRIM:-1] [--limit N]
[--json FILE]`; then `python -m llava.eval answer ... --reduce TRIM:avg=64 --calibrated FILE`.

Shape letters: `I` images, `N` patches, `D` vision width, `P` joint width.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from PIL import Image

from llava.cli import ModelSpec, add_model_options, positive, user_path
from llava.errors import InputError, run_command
from llava.eval.benchmarks import find_benchmark
from llava.eval.run import find_data_root
from llava.files import parse_record, read_lines, write_json
from llava.image import load_image
from llava.signals import ending_on_signals
from llava.terminal import make_bar

if TYPE_CHECKING:
    from torch import Tensor

    from llava.model.multimodal_encoder.tower import VisionTower
    from llava.model.token_reduction import Target, VisualTokens

# Functions import what they need of torch: the command answers --help and mistaken options before that.

OPTIONS = ("TRIM:-1", "TRIM:-1,similarity=direct")
# Measured too where the tower has no CLS: the length of a patch's embedding may say little of what the patch shows.
COSINE_OPTIONS = ("TRIM:-1,metric=cosine", "TRIM:-1,similarity=direct,metric=cosine")
MIN_COVERED = 0.5  # a cell belongs to an object when its box covers at least this share of it
MIN_GAIN = 0.2  # an option fits when it finds at least this much more of the object than as many random patches
BATCH_SIZE = 32


@dataclass(frozen=True)
class LabelledImage:
    """An image, a query, and where the queried object is (left, top, right, bottom in pixels)."""

    image: Path
    query: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Figures:
    """How well an option finds the asked-for objects; means over images, each in [0, 1].

    Attributes:
        option: spec string of the reducer.
        kept_ratio: share of all patches kept.
        recall: share of the objects' patches kept; as many random patches would reach `kept_ratio`.
        precision: share of the kept patches that lie on the object (0 for an image with nothing kept).
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


def read_labelled_images(path: Path) -> list[LabelledImage]:
    """Read the file of images.

    Raises:
        InputError: it is missing or empty, or a line is not what the module's head describes.
    """
    rows = [parse_line(line, f"{path}, line {number}", path.parent) for number, line in read_lines(path)]
    if not rows:
        raise InputError(f"{path} has no images: expected one JSON object per line")
    return rows


def parse_line(line: str, where: str, folder: Path) -> LabelledImage:
    """Parse one line of the file.

    Raises:
        InputError: it is not an object with image, query and at least one box of positive size.
    """
    try:
        row = parse_record(line, where)
        boxes = tuple(tuple(float(value) for value in box) for box in row["boxes"])
        good = bool(boxes) and all(left < right and top < bottom for left, top, right, bottom in boxes)
        parsed = LabelledImage(folder / row["image"], str(row["query"]), boxes)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise InputError(f'{where}: expected {{"image": path, "query": text, "boxes": [[left, top, right, bottom]]}}')
    return parsed


def cover_cells(
    boxes: Iterable[Sequence[float]], image_size: tuple[int, int], grid: tuple[int, int], covered: float = 1.0
) -> "Tensor":
    """Find the patch cells that boxes cover, after the image was padded to a square and resized.

    Args:
        boxes: (left, top, right, bottom) in pixels of the original image.
        image_size: its width and height.
        grid: rows and columns of patches.
        covered: share of the square's side that they cover.

    Returns:
        bool[N], raster order. Every box owns at least the cell that it covers most.
    """
    import torch

    width, height = image_size
    side = max(width, height)
    seen = side * covered
    rows, columns = grid
    inside = torch.zeros(rows * columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        across = share_of_cells(left + (side - width) // 2, right + (side - width) // 2, seen, columns)
        down = share_of_cells(top + (side - height) // 2, bottom + (side - height) // 2, seen, rows)
        covered = torch.outer(down, across).flatten()
        inside |= covered >= MIN_COVERED
        inside[covered.argmax()] = True
    return inside


def share_of_cells(start: float, end: float, side: float, num_cells: int) -> "Tensor":
    """Return the share of each of equal stretches of [0, side] that [start, end] covers, float64[num_cells]."""
    import torch

    if start >= side:  # beyond what patches cover: the last one is nearest
        start, end = side - side / num_cells, side
    edges = torch.linspace(0, side, num_cells + 1, dtype=torch.float64)
    covered = edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)
    return covered.clamp(min=0) * num_cells / side


def measure_option(option: str, tokens: "VisualTokens", inside: "Tensor") -> Figures:
    """Measure one reducer on images with known places.

    Args:
        option: spec of a reducer that keeps patches and has scores.
        tokens: the images, with joint space and text.
        inside: bool[I, N], which patches belong to the queried object; at least one and not all per row.
    """
    from llava.model.token_reduction import parse_reducer

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


def rank_objects(scores: "Tensor", inside: "Tensor") -> float:
    """Return the probability that a patch inside scores above one outside, ties counted half.

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


def encode_images(tower: "VisionTower", rows: Sequence[LabelledImage]) -> "tuple[VisualTokens, Tensor]":
    """Run a tower over the images and queries.

    Returns:
        The images' tokens, and bool[I, N]: which patches belong to the queried objects.
    """
    import torch

    from llava.model.token_reduction import VisualTokens

    patches, joint, text, inside = [], [], [], []
    with torch.inference_mode(), make_bar("encoding", len(rows), "image") as progress:
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            images = [load_image(row.image) for row in batch]
            encoded = tower.encode(prepare(images, tower))  # [I, N, D]
            patches.append(encoded.cpu())
            joint.append(tower.project_to_joint(encoded).cpu())  # [I, N, P]
            text.append(tower.embed_text([row.query for row in batch]).cpu())  # [I, P]
            pairs = zip(batch, images, strict=True)
            inside += [cover_cells(row.boxes, each.size, tower.grid, tower.covered) for row, each in pairs]
            progress.update(len(batch))
    return VisualTokens(torch.cat(patches), tower.grid, torch.cat(joint), torch.cat(text)), torch.stack(inside)


def prepare(images: list[Image.Image], tower: "VisionTower") -> "Tensor":
    """Pad to squares and preprocess, as LLaVA-1.5 does; `[I, 3, S, S]` where the tower wants it."""
    from llava.mm_utils import process_images

    pixels = process_images(images, tower.image_processor, SimpleNamespace(image_aspect_ratio="pad"))
    return pixels.to(device=tower.device, dtype=tower.dtype)


def calibrate(tower: "VisionTower", rows: Sequence[LabelledImage]) -> list[Figures]:
    """Measure every option of `OPTIONS` for a tower, and of `COSINE_OPTIONS` for a SigLIP."""
    tokens, inside = encode_images(tower, rows)
    options = OPTIONS if tower.has_cls else (*OPTIONS, *COSINE_OPTIONS)
    return [measure_option(option, tokens, inside) for option in options]


def format_table(figures: Sequence[Figures]) -> str:
    """Lay out the figures for a terminal."""
    width = max(len(figure.option) for figure in figures)
    lines = [f"{'option':{width}}  kept_ratio  recall  precision    auc"]
    lines += [
        f"{item.option:{width}}  {item.kept_ratio:10.3f}  {item.recall:6.3f}  {item.precision:9.3f}  {item.auc:5.3f}"
        for item in figures
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ commands
SIGN_OPTIONS = ("vision_tower", "pictures")
FENCE_OPTIONS = ("model_path", "task", "average")


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sign = parser.add_argument_group("the sign")
    sign.add_argument("--vision-tower", help="folder, hub id or open_clip:<model>")
    sign.add_argument("--pictures", type=user_path, help='JSON Lines of {"image", "query", "boxes"}')
    fence = parser.add_argument_group("the fence")
    fence.add_argument("--task", metavar="NAME", help="a benchmark, or a .py file that defines one")
    fence.add_argument("--split", metavar="S", help="another split than the benchmark's own")
    fence.add_argument("--root", type=user_path, metavar="DIR", help="its folder (default: in LLAVA_EVAL_ROOT)")
    fence.add_argument("--average", type=float, metavar="X", help="patches to keep on average")
    fence.add_argument("--limit", type=positive, metavar="N", help="look at the first N questions only")
    add_model_options(fence, required=False)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write what was found to this file")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    given = [name for name in (*SIGN_OPTIONS, *FENCE_OPTIONS) if getattr(arguments, name) is not None]
    wanted = FENCE_OPTIONS if set(given) & set(FENCE_OPTIONS) else SIGN_OPTIONS
    options = [f"--{name.replace('_', '-')}" for name in wanted]
    if set(given) != set(wanted):
        both = "--vision-tower and --pictures measure the sign, --model-path, --task and --average fit the fence"
        told = f"{', '.join(options)} go together, without others" if given else "nothing to measure"
        raise InputError(f"{told}: {both}")
    if wanted == SIGN_OPTIONS:
        measure_sign(arguments)
    else:
        with ending_on_signals():
            calibrate_mean(arguments)


def measure_sign(arguments: argparse.Namespace) -> None:
    """Print which sign fits the tower."""
    rows = read_labelled_images(arguments.pictures)
    from llava.model.multimodal_encoder.builder import load_tower
    from llava.model.token_reduction import TEXT

    figures = calibrate(load_tower(arguments.vision_tower, needs={TEXT}), rows)
    best = choose_option(figures)
    fits = best.option if best else "neither"
    print(format_table(figures))  # noqa: T201
    print(f"fits: {fits} ({len(rows)} images)")  # noqa: T201
    if arguments.json:
        options = [asdict(figure) for figure in figures]
        report = {"vision_tower": arguments.vision_tower, "num_pictures": len(rows), "fits": fits, "options": options}
        write_json(arguments.json, report, indent=2)
        sys.stderr.write(f"written to {arguments.json}\n")


def calibrate_mean(arguments: argparse.Namespace) -> None:
    """Print the spec whose fence keeps the mean."""
    # 1. What is asked.
    target = read_mean(arguments.reduce or "TRIM:-1", arguments.average)
    task = find_benchmark(arguments.task)
    if arguments.split is not None:
        task = task.with_split(arguments.split)
    questions = task.load(arguments.root or task.find_root(find_data_root()))[: arguments.limit]
    spec = replace(ModelSpec.from_options(arguments), reduce=target.method.spec())
    # 2. Scores of every question, then the fence.
    from llava.budgets import Calibration
    from llava.fence import fit_fence, score_questions
    from llava.model.identity import identify_parts

    loaded = spec.load()
    scores = score_questions(loaded, questions)
    place = f"{task.name}, {arguments.split}" if arguments.split else task.name
    reducer = fit_fence(target, scores, place)
    # 3. What it reaches.
    mean = scores.mean(reducer)
    found = Calibration(
        asked=str(target),
        spec=reducer.spec(),
        target=target.value,
        mean=mean,
        interval=scores.interval(reducer),
        mean_tokens=mean + reducer.has_mean_token,
        fence=reducer.fence,
        task=task.name,
        split=arguments.split,
        num_questions=scores.num_questions,
        num_images=len(set(scores.images)),
        model=identify_parts(spec.path, spec.base),
    )
    print(found.spec)  # noqa: T201
    print(f"{found.asked}: {found}")  # noqa: T201
    if arguments.json:
        write_json(arguments.json, asdict(found), indent=2)
        sys.stderr.write(f"written to {arguments.json}\n")


def read_mean(spec: str, average: float) -> "Target":
    """Read which rule shall keep which mean.

    Raises:
        InputError: the method has no fence, or its budget is not automatic; the mean is out of range.
    """
    from llava.model.token_reduction import parse_reduction, read_target

    before = parse_reduction(spec).before
    if before is None or "|" in spec or before.takes_average or not before.budget.is_automatic:
        hint = f"; {before.spec_name}:avg={average:g} needs no calibration" if before and before.takes_average else ""
        raise InputError(f"--reduce {spec} has no fence to fit: use TRIM:-1, TextSim:-1 or TextSim+:-1{hint}")
    _, comma, options = before.spec().partition(",")
    return read_target(f"{before.spec_name}:avg={average!r}{comma}{options}")


if __name__ == "__main__":
    run_command(main)
