"""Draw which patches a question keeps.

`python -m llava.visualize --model-path CKPT --image-file IMG --query TEXT --out OUT.png [--reduce SPEC]`

From left to right: the image; the kept patches, outlined, with the dropped ones dimmed; each patch's score with a color
scale. The vision tower sees a square: padded, cropped or squeezed. What is padding, or cut off, is hatched.
"""

import argparse
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava.cli import ModelSpec, add_model_options
from llava.errors import InputError, run_command
from llava.files import write_bytes
from llava.image import load_image
from llava.prompt import check_text, query_of, recover_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llava.model.image_tokens import ImageTokens
    from llava.model.language_model.causal import LlavaCausalLM
    from llava.protocols import ImageProcessor

# Functions import torch and matplotlib: the command answers --help and mistaken options before that.

# (left, top, right, bottom) in pixels of the image; may reach beyond its borders.
Box = tuple[float, float, float, float]

DIMMED = 0.55
MAX_SIDE = 1200
PANEL, GAP, MARGIN, LINE, BAR = 3.1, 0.2, 0.2, 0.21, 0.75
"""Inches: side of a panel, between panels, around them, height of a text line, width of the color scale."""
MIN_WIDTH, LETTER = 6.9, 0.088
"""Inches: of the figure, and of a letter of text on average."""
HEADING_LINES, TEXT_LINES, DPI = 9, 3, 150
CAPTION = 48
"""Letters that fit above a panel; a longer caption is set smaller."""
LINEAR_RANGE, LOG_RANGE, NARROW_RANGE = 20, 1e30, 100
"""Ratios of scores: largest to median from which the scale is logarithmic; its largest range; the range below which 2
and 5 are labelled between the powers of ten.
"""
# Drawn with when installed, so that questions in Chinese, Japanese and Korean are readable.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


# ----------------------------------------------------------------------------------------------------------- geometry
def find_view_box(size: tuple[int, int], aspect_ratio: str | None) -> Box:
    """Return the part of an image that the vision tower's square shows.

    Args:
        size: (width, height) of the image.
        aspect_ratio: the checkpoint's `image_aspect_ratio`: "pad" shows the image with bars around it, "anyres" the
            squeezed image (its first crop), anything else the largest centered square.
    """
    width, height = size
    if aspect_ratio == "anyres":
        return 0, 0, width, height
    if aspect_ratio == "pad":
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)  # whole pixels, rounded as the padding rounds
    else:
        side = min(size)
        left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def spread_over_image(patches: np.ndarray, size: tuple[int, int], box: Box, outside: float) -> np.ndarray:
    """Give every pixel of an image the value of the patch that shows it.

    Args:
        patches: float[rows, cols], values of the patches in raster order.
        size: (width, height) of the image.
        box: the part of the image that the patches cover.
        outside: value of pixels that no patch shows.

    Returns:
        float[height, width].
    """
    rows, cols = patches.shape
    left, top, right, bottom = box
    row = np.floor((np.arange(size[1]) + 0.5 - top) / (bottom - top) * rows).astype(int)
    col = np.floor((np.arange(size[0]) + 0.5 - left) / (right - left) * cols).astype(int)
    spread = patches[np.clip(row, 0, rows - 1)[:, None], np.clip(col, 0, cols - 1)[None, :]].astype(float)
    spread[(row < 0) | (row >= rows)] = outside
    spread[:, (col < 0) | (col >= cols)] = outside
    return spread


def count_unseen(kept: np.ndarray, size: tuple[int, int], box: Box) -> int:
    """Count the kept patches that lie wholly in the padding.

    Args:
        kept: bool[rows, cols].
        size: (width, height) of the image.
        box: the part of the image that the patches cover.
    """
    numbers = spread_over_image(np.arange(kept.size).reshape(kept.shape), size, box, outside=-1)
    seen = np.isin(np.arange(kept.size).reshape(kept.shape), numbers)
    return int((kept & ~seen).sum())


def dim_dropped(image: Image.Image, kept: np.ndarray, box: Box) -> Image.Image:
    """Dim the parts of an image whose patches are dropped, or that no patch shows.

    Args:
        image: the image, mode RGB.
        kept: bool[rows, cols].
        box: the part of the image that the patches cover.
    """
    light = spread_over_image(np.where(kept, 1.0, DIMMED), image.size, box, outside=DIMMED)
    return Image.fromarray((np.asarray(image) * light[..., None]).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------- figure
@dataclass(frozen=True)
class View:
    """One row of a figure: an image and what one model keeps of it.

    Attributes:
        image: mode RGB.
        name: of the model or run, before the panels' captions; may be empty.
        kept: bool[rows, cols] patches that are kept; None: the image is drawn alone.
        scores: float[rows, cols] the method's score of each patch, or None.
        box: the part of the image that the patches cover, in its pixels.
        has_mean: whether the LLM reads one token more than the kept patches, the mean of the dropped ones.
    """

    image: Image.Image
    name: str = ""
    kept: np.ndarray | None = None
    scores: np.ndarray | None = None
    box: Box = (0, 0, 1, 1)
    has_mean: bool = False

    @property
    def extent(self) -> Box:
        """The part that the panels show: the image and, where the vision tower saw padding, that."""
        left, top, right, bottom = self.box
        width, height = self.image.size
        if self.kept is None:
            return 0, 0, width, height
        return min(left, 0), min(top, 0), max(right, width), max(bottom, height)

    @property
    def aspect(self) -> float:
        """Height of the panels as a fraction of their width."""
        left, top, right, bottom = self.extent
        return min(max((bottom - top) / (right - left), 0.3), 2.0)


@dataclass(frozen=True)
class TextLine:
    """A line above the panels: a name and its text, which may be colored."""

    name: str
    text: str
    color: str = "black"


def make_view(
    image: Image.Image, tokens: "ImageTokens", grid: tuple[int, int], aspect_ratio: str | None, name: str = ""
) -> View:
    """Put together what is drawn of an image.

    Args:
        image: mode RGB.
        tokens: of this image and a question; of several crops the first, the whole view, is drawn.
        grid: rows and columns of patches.
        aspect_ratio: the checkpoint's `image_aspect_ratio`.
        name: of the model or run.

    Raises:
        InputError: the method blends patches, so that none is kept or dropped.
    """
    if tokens.kept is None:
        raise InputError("this token reduction blends patches instead of choosing some: no kept patches to draw")
    kept = tokens.kept[0].reshape(grid).cpu().numpy()
    scores = None if tokens.scores is None else tokens.scores[0].reshape(grid).float().cpu().numpy()
    box = find_view_box(image.size, aspect_ratio)
    shown = image.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    across, down = shown.width / image.width, shown.height / image.height
    shown_box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    has_mean = len(tokens.kept) == 1 and tokens.num_tokens == int(kept.sum()) + 1
    return View(shown, name, kept, scores, shown_box, has_mean)


def draw_figure(views: Sequence[View], heading: str, lines: Sequence[TextLine] = ()) -> Image.Image:
    """Draw a question, lines of text, and a row of panels for each view.

    Args:
        views: rows of panels; may be none.
        heading: the question.
        lines: what else is known of it.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = max([1 + (view.kept is not None) + (view.scores is not None) for view in views], default=0)
    width = max(num_columns * (PANEL + GAP) - GAP + BAR * (num_columns == 3) + 2 * MARGIN, MIN_WIDTH)
    text = _wrap_text(heading, lines, width)
    row_heights = [PANEL * view.aspect + 1.5 * LINE for view in views]
    height = 2 * MARGIN + len(text) * LINE + sum(row_heights)
    with mpl.rc_context({"font.family": _list_fonts(), "text.parse_math": False}), warnings.catch_warnings():
        # A letter that no installed font has becomes a box; the drawing is still right.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        place = height - MARGIN
        for pieces in text:
            for left, piece, style in pieces:
                figure.text((MARGIN + left) / width, place / height, piece, va="top", **style)
            place -= LINE
        for view, row_height in zip(views, row_heights, strict=True):
            place -= row_height
            frames = [
                ((MARGIN + column * (PANEL + GAP)) / width, place / height, PANEL / width, PANEL * view.aspect / height)
                for column in range(num_columns)
            ]
            _draw_row(figure, frames, view)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _wrap_text(heading: str, lines: Sequence[TextLine], width: float) -> list[list[tuple[float, str, dict]]]:
    """Break the text into lines; each has pieces of (inches from the left, text, style)."""
    room = width - 2 * MARGIN
    bold = {"fontsize": 10.5, "weight": "bold"}
    wrapped = [[(0.0, line, bold)] for line in _wrap(heading, room / (1.17 * LETTER), HEADING_LINES)]
    indent = max([len(line.name) for line in lines], default=0) * LETTER + 0.15
    for line in lines:
        parts = _wrap(line.text, (room - indent) / LETTER, TEXT_LINES) or [""]
        pieces = [[(indent, part, {"fontsize": 9.5, "color": line.color})] for part in parts]
        pieces[0].insert(0, (0.0, line.name, {"fontsize": 9.5, "color": "#707070"}))
        wrapped += pieces
    return wrapped


def _wrap(text: str, letters: float, max_lines: int) -> list[str]:
    """Break a text into lines, at its own line ends and where it is too wide."""
    broken = [part for line in text.splitlines() for part in textwrap.wrap(line, max(int(letters), 20))]
    return broken if len(broken) <= max_lines else [*broken[: max_lines - 1], f"{broken[max_lines - 1]} ..."]


def _draw_row(figure: "Figure", frames: Sequence[tuple[float, float, float, float]], view: View) -> None:
    """Draw the image, the kept patches and the scores of a view into frames (left, bottom, width, height)."""
    panel = _add_panel(figure, frames[0], (0, 0, *view.image.size), view.name if view.kept is None else "image")
    panel.imshow(view.image, extent=(0, view.image.width, view.image.height, 0))
    if view.kept is None:
        return
    prefix = f"{textwrap.shorten(view.name, 18, placeholder='...')}: " if view.name else ""
    num_unseen = count_unseen(view.kept, view.image.size, view.box)
    caption = f"{prefix}{view.kept.sum()} of {view.kept.size} patches kept" + " + mean token" * view.has_mean
    panel = _add_panel(figure, frames[1], view.extent, caption + (f", {num_unseen} in the padding" * bool(num_unseen)))
    _draw_kept(panel, view)
    if view.scores is not None:
        _draw_scores(figure, frames[2], view, f"{prefix}score per patch")


def _draw_scores(figure: "Figure", frame: tuple[float, float, float, float], view: View, caption: str) -> None:
    """Draw the score of each patch, and beside it the color scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter

    # Most of a softmax is close to 0: what it ranks among the kept patches shows on a logarithmic scale.
    steep = view.scores.min() >= 0 and np.median(view.scores) < view.scores.max() / LINEAR_RANGE
    highest = float(view.scores.max())
    least = float(view.scores[view.kept].min(initial=highest))
    norm = LogNorm(max(least / 3, highest / LOG_RANGE), highest, clip=True) if steep else None
    panel = _add_panel(figure, frame, view.extent, caption + ", log scale" * bool(norm))
    left, top, right, bottom = view.box
    shown = panel.imshow(
        view.scores, cmap="viridis", norm=norm, interpolation="nearest", extent=(left, right, bottom, top)
    )
    _outline(panel, view, "white")
    scale = figure.colorbar(shown, cax=panel.inset_axes((1.04, 0, 0.05, 1)), format="%.0e" if steep else None)
    if norm:
        # Within a narrow range there may be no power of ten to label. Minor labels would be LaTeX, drawn as it is.
        if norm.vmax < NARROW_RANGE * norm.vmin:
            scale.locator = LogLocator(subs=(1, 2, 5))
            scale.update_ticks()
        scale.ax.yaxis.set_minor_formatter(NullFormatter())
    scale.ax.tick_params(labelsize=7.5)


def _add_panel(figure: "Figure", frame: tuple[float, float, float, float], extent: Box, caption: str) -> "Axes":
    left, top, right, bottom = extent
    panel = figure.add_axes(frame, xticks=[], yticks=[])
    place = {"x": frame[0] + frame[2] / 2, "y": frame[1] + frame[3] + 0.06 / figure.get_figheight()}
    figure.text(**place, s=caption, fontsize=8.5 * min(1, CAPTION / max(len(caption), 1)), ha="center", va="bottom")
    panel.set_autoscale_on(False)
    panel.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    panel.spines[:].set_color("#b0b0b0")
    return panel


def _draw_kept(panel: "Axes", view: View) -> None:
    """Draw the image with the dropped patches dimmed, the kept ones outlined, and what is not image hatched."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = view.extent
    ground = {"facecolor": "#ececec", "edgecolor": "#bdbdbd", "hatch": "////", "linewidth": 0, "zorder": -1}
    panel.add_patch(Rectangle((left, top), right - left, bottom - top, **ground))
    image = dim_dropped(view.image, view.kept, view.box)
    # Where no patch shows the image, the hatching shines through.
    seen = spread_over_image(np.ones_like(view.kept, dtype=float), image.size, view.box, outside=0.5)
    image.putalpha(Image.fromarray((255 * seen).astype(np.uint8)))
    panel.imshow(image, extent=(0, image.width, image.height, 0))
    _outline(panel, view, "#ffd60a")


def _outline(panel: "Axes", view: View, color: str) -> None:
    """Draw the border between kept and dropped patches."""
    from matplotlib.collections import LineCollection

    segments = find_borders(view.kept, view.box)
    thin = min(1.0, 12 / max(view.kept.shape))
    for shade, width in (("black", 3.0 * thin), (color, 1.5 * thin)):
        style = {"colors": shade, "linewidths": width, "capstyle": "projecting", "clip_on": False}
        panel.add_collection(LineCollection(segments, **style))


def find_borders(kept: np.ndarray, box: Box) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """List the sides that kept patches do not share with one another.

    Args:
        kept: bool[rows, cols].
        box: the part of the image that the patches cover.

    Returns:
        Two points (x, y) each.
    """
    rows, cols = kept.shape
    x = np.linspace(box[0], box[2], cols + 1).tolist()
    y = np.linspace(box[1], box[3], rows + 1).tolist()
    padded = np.pad(kept, 1)
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]  # [rows, cols + 1]
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [rows + 1, cols]
    return [((x[col], y[row]), (x[col], y[row + 1])) for row, col in np.argwhere(upright)] + [
        ((x[col], y[row]), (x[col + 1], y[row])) for row, col in np.argwhere(level)
    ]


def _list_fonts() -> list[str]:
    import matplotlib as mpl

    installed = set(mpl.font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a PNG.

    Raises:
        FileError: the file cannot be written.
    """
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(Path(path), buffer.getvalue())


# -------------------------------------------------------------------------------------------------------------- model
def reduce_image(
    model: "LlavaCausalLM", image_processor: "ImageProcessor", image: Image.Image, query: str
) -> "ImageTokens":
    """Return what a model keeps of an image (mode RGB) for a query, the text that the token reduction reads."""
    import torch

    from llava.mm_utils import process_images

    with torch.inference_mode():
        values = process_images([image], image_processor, model.config)
        (tokens,) = model.encode_images(values, [query], [image.size])
    return tokens


def draw_reduction(
    image: Image.Image, tokens: "ImageTokens", grid: tuple[int, int], aspect_ratio: str | None, question: str
) -> Image.Image:
    """Draw what a question keeps of an image; see `make_view` for the arguments."""
    from llava.chat import describe_tokens

    view = make_view(image, tokens, grid, aspect_ratio)
    name, _, text = describe_tokens(tokens.num_tokens, tokens.num_patches).partition(": ")
    return draw_figure([view], question, [TextLine(name, text)])


def visualize(
    model: "LlavaCausalLM", image_processor: "ImageProcessor", image: Image.Image, question: str
) -> Image.Image:
    """Draw what a model with a token reduction keeps of an image (mode RGB) for a question.

    Raises:
        InputError: the model drops no patches, or the question is one that no tokenizer takes.
    """
    if model.token_reducer is None:
        raise InputError('this checkpoint keeps every patch: name a token reduction, such as --reduce "TRIM:-1"')
    question = recover_text(question)
    check_text(question)
    tokens = reduce_image(model, image_processor, image, query_of(question))
    aspect_ratio = getattr(model.config, "image_aspect_ratio", None)
    return draw_reduction(image, tokens, model.get_vision_tower().grid, aspect_ratio, question)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.visualize", description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--image-file", required=True, metavar="FILE", help="image file or http(s) address")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--out", required=True, metavar="PNG", help="file that the drawing is written to")
    args = parser.parse_args()
    spec = ModelSpec.from_options(args)
    if not args.query.strip():
        raise InputError("--query is empty: write what you want to know about the image")
    image = load_image(args.image_file, upright=True)
    _, model, image_processor = spec.load(quiet=True)
    write_image(args.out, visualize(model, image_processor, image, args.query))


if __name__ == "__main__":
    run_command(main)
