"""Figures of an image's patches: which are kept, what they scored, what is merged, which blocks matter; no model.

A figure is a heading, lines of text, and panels in rows of at most four. The vision tower sees a square: padded,
cropped or squeezed. What is padding, or cut off, is hatched.
"""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from llava.errors import InputError
from llava.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Functions import matplotlib: commands answer --help and mistaken options before that.

# (left, top, right, bottom) in pixels of the image; may reach beyond its borders.
Box = tuple[float, float, float, float]

DIMMED = 0.55
MAX_SIDE = 1200
MAX_COLUMNS = 4
"""Panels in a row."""
PANEL, GAP, MARGIN, LINE, BAR = 3.1, 0.2, 0.2, 0.21, 0.75
"""Inches: side of a panel, between panels, around them, height of a text line, width of the color scale."""
CAPTION_LINE, EDGE = 0.16, 0.06
"""Inches: height of a line above a panel; around a panel that is drawn alone."""
MIN_WIDTH, LETTER = 6.9, 0.088
"""Inches: of the figure, and of a letter of text on average."""
HEADING_LINES, TEXT_LINES, DPI = 9, 3, 150
CAPTION = 48
"""Letters that fit above a panel; a longer line is set smaller, and one of more than twice as many is cut."""
SMALLEST = 5
"""Points: size of the letters in a block, where it is narrow."""
FORMATS = (".png", ".pdf", ".svg")
KEPT_COLOR, CENTRE_COLOR, THRESHOLD_COLOR = "#ffd60a", "#ff3fd1", "#ff2d2d"
LINEAR_RANGE, LOG_RANGE, NARROW_RANGE = 20, 1e30, 100
"""Ratios of scores: largest to median from which the scale is logarithmic; its largest range; the range below which 2
and 5 are labelled between the powers of ten.
"""
# Drawn with when installed, so that questions in Chinese, Japanese and Korean are readable.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


# ----------------------------------------------------------------------------------------------------------- geometry
class Sight(NamedTuple):
    """What a vision tower sees of an image.

    Attributes:
        squeezes: whether an image that is not padded is squeezed to the square (SigLIP), not cropped (CLIP).
        covered: share of the square's side that whole patches cover; a rest at the right and the bottom is not seen.
    """

    squeezes: bool = False
    covered: float = 1.0


CROPPED = Sight()
"""CLIP's: cropped, and covered by patches."""


def find_view_box(size: tuple[int, int], aspect_ratio: str | None, sight: Sight = CROPPED) -> Box:
    """Return the part of an image that the vision tower's patches show.

    Args:
        size: (width, height) of the image.
        aspect_ratio: the checkpoint's `image_aspect_ratio`: "pad" shows the image with bars around it, "anyres" the
            squeezed image (its first crop), anything else the largest centered square, or the squeezed image.
        sight: of the tower.
    """
    width, height = size
    if aspect_ratio == "anyres" or (aspect_ratio != "pad" and sight.squeezes):
        return 0, 0, width * sight.covered, height * sight.covered
    if aspect_ratio == "pad":
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)  # whole pixels, rounded as the padding rounds
    else:
        side = min(size)
        left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side * sight.covered, top + side * sight.covered


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
class Block:
    """A rectangle of patches, drawn over the image.

    Attributes:
        rows, cols: (first, after) of the patch grid.
        text: written into it; may be empty.
        color: of its tint; None: the image shows as it is.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    text: str = ""
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """One look at an image's patches.

    Attributes:
        caption: one or two lines above it.
        kept: bool[rows, cols] patches that are read as they are: bright and outlined, the others dimmed.
        centres: bool[rows, cols] patches that merged tokens are made around, outlined in another color; None: none.
        cells: rows and columns of the grid that the patches are averaged to; None: they are not.
        scores: float[rows, cols]; drawn in place of the image, with a color scale. None: the image is drawn.
        blocks: drawn over the image.
    """

    caption: str
    kept: np.ndarray
    centres: np.ndarray | None = None
    cells: tuple[int, int] | None = None
    scores: np.ndarray | None = None
    blocks: Sequence[Block] = ()

    @property
    def bright(self) -> np.ndarray:
        """bool[rows, cols] patches that are not dimmed."""
        return self.kept if self.centres is None else self.kept | self.centres


@dataclass(frozen=True)
class View:
    """An image and what one method leaves of it.

    Attributes:
        image: mode RGB; of several views in a row with the same image it is drawn once.
        box: the part of the image that the patches cover, in its pixels.
        panels: beside the image; without any the image is drawn alone.
        caption: of the image.
    """

    image: Image.Image
    box: Box = (0, 0, 1, 1)
    panels: Sequence[Panel] = ()
    caption: str = "image"

    @property
    def extent(self) -> Box:
        """The part that the panels show: the image and, where the vision tower saw padding, that."""
        left, top, right, bottom = self.box
        width, height = self.image.size
        if not self.panels:
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


def shrink(
    image: Image.Image,
    aspect_ratio: str | None,
    sight: Sight = CROPPED,
) -> tuple[Image.Image, Box]:
    """Make an image small enough to draw; returns it with the part of it that the vision tower sees.

    Args:
        image: mode RGB.
        aspect_ratio: the checkpoint's `image_aspect_ratio`.
        sight: of the tower.
    """
    box = find_view_box(image.size, aspect_ratio, sight)
    shown = image.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    across, down = shown.width / image.width, shown.height / image.height
    return shown, (box[0] * across, box[1] * down, box[2] * across, box[3] * down)


def lay_out(views: Sequence[View]) -> list[list[tuple[View, Panel | None]]]:
    """Put panels into rows.

    An image comes before the panels of its views, once for all views in a row that show the same image. The panels of a
    view stay in one row where they fit into one.

    Returns:
        Rows of at most `MAX_COLUMNS` of (view, panel); None is the image. A row shows one image only.
    """
    rows: list[list[tuple[View, Panel | None]]] = []
    for number, view in enumerate(views):
        panels: list[Panel | None] = list(view.panels)
        if number == 0 or views[number - 1].image != view.image:
            panels.insert(0, None)
            rows.append([])
        elif len(rows[-1]) + len(panels) > MAX_COLUMNS:
            rows.append([])
        for panel in panels:
            if len(rows[-1]) == MAX_COLUMNS:
                rows.append([])
            rows[-1].append((view, panel))
    return [row for row in rows if row]


@dataclass(frozen=True)
class Drawing:
    """A question, lines of text, and the panels of all views.

    Attributes:
        views: what is drawn; may be none.
        heading: the question, or what all panels have in common.
        lines: what else is known of it.
    """

    views: Sequence[View]
    heading: str
    lines: Sequence[TextLine] = ()

    def image(self) -> Image.Image:
        """Draw at `DPI` dots per inch: mode RGB."""
        with plot_style():
            return _to_image(self._compose())

    def write(self, path: str | Path) -> None:
        """Write a PNG, or a PDF or SVG whose text and outlines are vectors, as the file's ending says.

        Raises:
            FileError: the file cannot be written.
            InputError: another ending.
        """
        if find_format(path) == "png":
            write_image(path, self.image())
            return
        with plot_style():
            write_figure(path, self._compose())

    def _compose(self) -> "Figure":
        # 1. Sizes, in inches.
        rows = lay_out(self.views)
        columns = measure_columns(rows)
        width = max(sum(columns) + GAP * (len(columns) - 1) + 2 * MARGIN, MIN_WIDTH)
        text = _wrap_text(self.heading, self.lines, width)
        heights = [PANEL * max(view.aspect for view, _ in row) for row in rows]
        headrooms = [LINE + CAPTION_LINE * max(_caption(*each).count("\n") + 1 for each in row) for row in rows]
        height = 2 * MARGIN + len(text) * LINE + sum(heights) + sum(headrooms)
        figure = _new_figure(width, height)
        place = height - MARGIN
        # 2. Text.
        for pieces in text:
            for left, piece, style in pieces:
                figure.text((MARGIN + left) / width, place / height, piece, va="top", **style)
            place -= LINE
        # 3. Panels.
        for row, row_height, headroom in zip(rows, heights, headrooms, strict=True):
            place -= row_height + headroom
            for column, (view, panel) in enumerate(row):
                left = MARGIN + sum(columns[:column]) + GAP * column
                frame = (left / width, place / height, PANEL / width, row_height / height)
                _draw_panel(figure, frame, view, panel)
        return figure


def find_format(path: str | Path) -> str:
    """Return what a drawing is written as by the ending of its file: png, pdf or svg.

    Raises:
        InputError: another ending.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"{path}: a drawing is written as {', '.join(FORMATS)}, not {ending or 'without an ending'}")
    return ending.removeprefix(".")


def draw_panel(view: View, panel: Panel) -> Image.Image:
    """Draw one panel alone: where text stands beside it, its caption is best left empty.

    Args:
        view: the image that the panel looks at.
        panel: one of its panels, or another of the same image.
    """
    headroom = CAPTION_LINE * (panel.caption.count("\n") + 1) if panel.caption else 0
    width, height = PANEL + BAR * (panel.scores is not None) + 2 * EDGE, PANEL * view.aspect + headroom + 2 * EDGE
    with plot_style():
        figure = _new_figure(width, height)
        frame = (EDGE / width, EDGE / height, PANEL / width, PANEL * view.aspect / height)
        _draw_panel(figure, frame, view, panel)
        return _to_image(figure)


def _new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _to_image(figure: "Figure") -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in this block as all figures are drawn: texts as they are, letters as letters, the same file each time."""
    import matplotlib as mpl

    settings = {"font.family": _list_fonts(), "text.parse_math": False, "svg.hashsalt": "llava", "pdf.fonttype": 42}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A letter that no installed font has becomes a box; the drawing is still right.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def measure_columns(rows: Sequence[Sequence[tuple[View, Panel | None]]]) -> list[float]:
    """Return the width of each column in inches: one that has scores in any row is as wide as their color scale."""
    widths = []
    for column in range(max(map(len, rows), default=0)):
        panels = [row[column][1] for row in rows if column < len(row)]
        has_scale = any(panel is not None and panel.scores is not None for panel in panels)
        widths.append(PANEL + BAR * has_scale)
    return widths


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


def _caption(view: View, panel: Panel | None) -> str:
    return view.caption if panel is None else panel.caption


def _draw_panel(figure: "Figure", frame: tuple[float, float, float, float], view: View, panel: Panel | None) -> None:
    """Draw the image, a look at its patches or their scores into a frame (left, bottom, width, height)."""
    if panel is None:
        axes = _add_axes(figure, frame, (0, 0, *view.image.size), view.caption)
        axes.imshow(view.image, extent=(0, view.image.width, view.image.height, 0))
    elif panel.scores is not None:
        _draw_scores(figure, frame, view, panel)
    else:
        axes = _add_axes(figure, frame, view.extent, panel.caption)
        _draw_kept(axes, view, panel)
        for block in panel.blocks:
            _draw_block(axes, view.box, panel.kept.shape, block)


def _draw_scores(figure: "Figure", frame: tuple[float, float, float, float], view: View, drawn: Panel) -> None:
    """Draw the score of each patch, and beside it the color scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter

    # Most of a softmax is close to 0: what it ranks among the kept patches shows on a logarithmic scale.
    scores = drawn.scores
    steep = scores.min() >= 0 and np.median(scores) < scores.max() / LINEAR_RANGE
    highest = float(scores.max())
    least = float(scores[drawn.bright].min(initial=highest))
    norm = LogNorm(max(least / 3, highest / LOG_RANGE), highest, clip=True) if steep else None
    caption = drawn.caption + ", log scale" * bool(norm and drawn.caption)
    axes = _add_axes(figure, frame, view.extent, caption)
    left, top, right, bottom = view.box
    shown = axes.imshow(scores, cmap="viridis", norm=norm, interpolation="nearest", extent=(left, right, bottom, top))
    _outline(axes, drawn.kept, view.box, "white")
    if drawn.centres is not None:
        _outline(axes, drawn.centres, view.box, CENTRE_COLOR)
    scale = figure.colorbar(shown, cax=axes.inset_axes((1.04, 0, 0.05, 1)), format="%.0e" if steep else None)
    if norm:
        # Within a narrow range there may be no power of ten to label. Minor labels would be LaTeX, drawn as it is.
        if norm.vmax < NARROW_RANGE * norm.vmin:
            scale.locator = LogLocator(subs=(1, 2, 5))
            scale.update_ticks()
        scale.ax.yaxis.set_minor_formatter(NullFormatter())
    scale.ax.tick_params(labelsize=7.5)
    threshold = find_threshold(scores, drawn.kept)
    if threshold is not None:
        scale.ax.axhline(threshold, color=THRESHOLD_COLOR, linewidth=2)
        if drawn.caption:  # else what the line means stands beside the panel
            style = {"color": THRESHOLD_COLOR, "fontsize": 6.5, "ha": "center", "va": "top"}
            scale.ax.text(0.5, -0.015, "lowest kept", transform=scale.ax.transAxes, **style)


def find_threshold(scores: np.ndarray, kept: np.ndarray) -> float | None:
    """Return the lowest score of a kept patch; None where scores alone do not tell kept patches from dropped ones.

    Args:
        scores: float[rows, cols].
        kept: bool[rows, cols].
    """
    if not kept.any() or kept.all():
        return None
    least = float(scores[kept].min())
    return least if float(scores[~kept].max()) <= least else None


def _add_axes(figure: "Figure", frame: tuple[float, float, float, float], extent: Box, caption: str) -> "Axes":
    left, top, right, bottom = extent
    axes = figure.add_axes(frame, xticks=[], yticks=[])
    line, place = CAPTION_LINE / figure.get_figheight(), frame[1] + frame[3] + 0.06 / figure.get_figheight()
    for number, text in enumerate(reversed(caption.split("\n"))):
        text = textwrap.shorten(text, 2 * CAPTION, placeholder=" ...")
        size = 8.5 * min(1, CAPTION / max(len(text), 1))
        figure.text(frame[0] + frame[2] / 2, place + number * line, text, fontsize=size, ha="center", va="bottom")
    axes.set_autoscale_on(False)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.spines[:].set_color("#b0b0b0")
    return axes


def _draw_kept(axes: "Axes", view: View, panel: Panel) -> None:
    """Draw the image with the dropped patches dimmed, the kept ones outlined, and what is not image hatched."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = view.extent
    ground = {"facecolor": "#ececec", "edgecolor": "#bdbdbd", "hatch": "////", "linewidth": 0, "zorder": -1}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **ground))
    image = dim_dropped(view.image, panel.bright, view.box)
    # Where no patch shows the image, the hatching shines through.
    seen = spread_over_image(np.ones_like(panel.kept, dtype=float), image.size, view.box, outside=0.5)
    image.putalpha(Image.fromarray((255 * seen).astype(np.uint8)))
    axes.imshow(image, extent=(0, image.width, image.height, 0))
    if panel.cells is not None:
        _outline(axes, number_cells(panel.kept.shape, panel.cells), view.box, KEPT_COLOR)
    _outline(axes, panel.kept, view.box, KEPT_COLOR)
    if panel.centres is not None:
        _outline(axes, panel.centres, view.box, CENTRE_COLOR)


def _draw_block(axes: "Axes", box: Box, grid: tuple[int, ...], block: Block) -> None:
    """Tint a block of patches, and write its text as large as it fits."""
    from matplotlib.patches import Rectangle

    across, down = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    left, top = box[0] + block.cols[0] * across, box[1] + block.rows[0] * down
    width, height = (block.cols[1] - block.cols[0]) * across, (block.rows[1] - block.rows[0]) * down
    if block.color is not None:
        axes.add_patch(Rectangle((left, top), width, height, facecolor=block.color, alpha=0.45, linewidth=0))
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=0.8))
    # Points that the block is wide, and letters in a line of the smallest size.
    room = 72 * PANEL * width / (axes.get_xlim()[1] - axes.get_xlim()[0])
    letters = max(3, int(room / (0.65 * SMALLEST)))
    text = textwrap.fill(block.text, letters, max_lines=3, placeholder=" ...")
    longest = max(map(len, text.splitlines()), default=1)
    axes.text(
        left + width / 2,
        top + height / 2,
        text,
        color="white",
        fontsize=min(8.5, room / (0.65 * longest)),
        ha="center",
        va="center",
        clip_on=True,
        bbox={"facecolor": "black", "alpha": 0.55, "linewidth": 0, "pad": 1.0},
    )


def number_cells(grid: tuple[int, ...], cells: tuple[int, int]) -> np.ndarray:
    """Return the cell of each patch, int[rows, cols], where a grid of patches is averaged to a grid of cells."""
    row, col = (np.arange(side) * number // side for side, number in zip(grid, cells, strict=True))
    return 1 + row[:, None] * cells[1] + col[None, :]


def _outline(axes: "Axes", areas: np.ndarray, box: Box, color: str) -> None:
    """Draw the borders between areas; see `find_borders`."""
    from matplotlib.collections import LineCollection

    segments = find_borders(areas, box)
    thin = min(1.0, 12 / max(areas.shape))
    for shade, width in (("black", 3.0 * thin), (color, 1.5 * thin)):
        style = {"colors": shade, "linewidths": width, "capstyle": "projecting", "clip_on": False}
        axes.add_collection(LineCollection(segments, **style))


def find_borders(areas: np.ndarray, box: Box) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """List the sides of patches at which one area ends.

    Args:
        areas: bool[rows, cols], True in the area, or int[rows, cols], the area of each patch, 0 for none.
        box: the part of the image that the patches cover.

    Returns:
        Two points (x, y) each.
    """
    rows, cols = areas.shape
    x = np.linspace(box[0], box[2], cols + 1).tolist()
    y = np.linspace(box[1], box[3], rows + 1).tolist()
    padded = np.pad(areas, 1)
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]  # [rows, cols + 1]
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [rows + 1, cols]
    return [((x[col], y[row]), (x[col], y[row + 1])) for row, col in np.argwhere(upright)] + [
        ((x[col], y[row]), (x[col + 1], y[row])) for row, col in np.argwhere(level)
    ]


def _list_fonts() -> list[str]:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


def write_figure(path: str | Path, figure: "Figure") -> None:
    """Write a figure as a PNG, PDF or SVG, as the file's ending says; inside `plot_style`.

    Raises:
        FileError: the file cannot be written.
        InputError: another ending.
    """
    kind, buffer = find_format(path), BytesIO()
    # Without a date, the same figure is the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}[kind]
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=undated)
    write_bytes(Path(path), buffer.getvalue())


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a PNG.

    Raises:
        FileError: the file cannot be written.
    """
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(Path(path), buffer.getvalue())
