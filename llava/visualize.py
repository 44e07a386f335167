"""Draw which patches a question keeps.

`python -m llava.visualize --model-path CKPT --image-file IMG --query TEXT --out OUT.png [--reduce SPEC]`

On the left the picture with the dropped patches dimmed, on the right each patch's score with a colour scale. The
vision tower sees a square (padded, cropped or squeezed); everything is drawn on the picture as it is.
"""

import argparse
import contextlib
import io
import os
import textwrap
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from llava.chat import describe_tokens
from llava.cli import add_model_options, load_model, prepare_terminal
from llava.errors import InputError, run_command
from llava.image import load_image
from llava.mm_utils import process_images
from llava.prompt import query_of

# (left, top, right, bottom) in pixels of the picture; may reach beyond its borders.
Box = tuple[float, float, float, float]

DIMMED = 0.25
MAX_SIDE = 1200
TITLE_LETTERS, TITLE_LINES = 90, 3
PANEL_INCHES = 4.5
# Drawn with when installed, so that questions in Chinese, Japanese and Korean are readable.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


def find_view_box(size: tuple[int, int], aspect_ratio: str | None) -> Box:
    """Tell which part of a picture the vision tower's square shows.

    Args:
        size: (width, height) of the picture.
        aspect_ratio: the checkpoint's `image_aspect_ratio`: "pad" shows the picture with bars around it, "anyres" the
            squeezed picture (its first crop), anything else the largest centered square.
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


def spread_over_picture(patches: np.ndarray, size: tuple[int, int], box: Box, outside: float) -> np.ndarray:
    """Give every pixel of a picture the value of the patch that shows it.

    Args:
        patches: float[rows, cols], values of the patches in raster order.
        size: (width, height) of the picture.
        box: the part of the picture that the patches cover.
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
    """Count the kept patches that lie wholly in the padding, where no pixel of the picture shows them.

    Args:
        kept: bool[rows, cols].
        size: (width, height) of the picture.
        box: the part of the picture that the patches cover.
    """
    numbers = spread_over_picture(np.arange(kept.size).reshape(kept.shape), size, box, outside=-1)
    seen = np.isin(np.arange(kept.size).reshape(kept.shape), numbers)
    return int((kept & ~seen).sum())


def dim_dropped(image: Image.Image, kept: np.ndarray, box: Box) -> Image.Image:
    """Dim the parts of a picture whose patches are dropped, or that no patch shows.

    Args:
        image: the picture, mode RGB.
        kept: bool[rows, cols].
        box: the part of the picture that the patches cover.
    """
    light = spread_over_picture(np.where(kept, 1.0, DIMMED), image.size, box, outside=DIMMED)
    return Image.fromarray((np.asarray(image) * light[..., None]).astype(np.uint8))


def draw_reduction(
    image: Image.Image, tokens: Any, grid: tuple[int, int], aspect_ratio: str | None, question: str
) -> Image.Image:
    """Draw what a question keeps of a picture.

    Args:
        image: the picture, mode RGB.
        tokens: the `ImageTokens` of this picture and question; of several crops the first, the whole view, is drawn.
        grid: rows and columns of patches.
        aspect_ratio: the checkpoint's `image_aspect_ratio`.
        question: what was asked.

    Returns:
        The drawing: the dimmed picture, and the score map where the method scores patches.

    Raises:
        InputError: the method blends patches, so that none is kept or dropped.
    """
    if tokens.kept is None:
        raise InputError("this token reduction blends patches instead of choosing some: no kept patches to draw")
    box = find_view_box(image.size, aspect_ratio)
    shown = image.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    shrink = shown.width / image.width, shown.height / image.height
    box = (box[0] * shrink[0], box[1] * shrink[1], box[2] * shrink[0], box[3] * shrink[1])
    kept = tokens.kept[0].reshape(grid).cpu().numpy()
    scores = None
    if tokens.scores is not None:
        patches = tokens.scores[0].reshape(grid).float().cpu().numpy()
        scores = spread_over_picture(patches, shown.size, box, outside=np.nan)
    num_unseen = count_unseen(kept, shown.size, box)
    caption = f"{kept.sum()} patches kept" + (f", {num_unseen} of them in the padding" if num_unseen else "")
    title = f"{_wrap(question)}\n{describe_tokens(tokens.num_tokens, tokens.num_patches)}"
    return _draw_panels(dim_dropped(shown, kept, box), caption, scores, title)


def _draw_panels(picture: Image.Image, caption: str, scores: np.ndarray | None, title: str) -> Image.Image:
    num_panels = 1 if scores is None else 2
    aspect = min(max(picture.height / picture.width, 0.3), 2.0)
    with mpl.rc_context({"font.family": _list_fonts()}), warnings.catch_warnings():
        # A letter that no installed font has becomes a box; the drawing is still right.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(PANEL_INCHES * num_panels + 1, PANEL_INCHES * aspect + 1.2), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(1, num_panels, squeeze=False)[0]
        panels[0].imshow(picture)
        panels[0].set_title(caption)
        if scores is not None:
            shown = panels[1].imshow(scores, cmap="viridis", interpolation="nearest")
            panels[1].set_title("score (probability per patch)")
            figure.colorbar(shown, ax=panels[1], fraction=0.046)
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
        figure.suptitle(title, parse_math=False)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _list_fonts() -> list[str]:
    installed = set(mpl.font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


def _wrap(question: str) -> str:
    lines = textwrap.wrap(" ".join(question.split()), TITLE_LETTERS, max_lines=TITLE_LINES, placeholder=" ...")
    return "\n".join(lines)


def save_atomically(image: Image.Image, path: str | Path) -> None:
    """Write a PNG so that the file is there whole or not at all.

    Raises:
        InputError: the place can't be written to.
    """
    path = Path(path)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(buffer.getvalue())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # clearing up must not hide what went wrong
            unfinished.unlink()
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from error


@torch.inference_mode()
def visualize(model: Any, image_processor: Any, image: Image.Image, question: str) -> Image.Image:
    """Draw what a model keeps of a picture for a question.

    Args:
        model: a `LlavaLlamaForCausalLM` with a token reduction.
        image_processor: its vision tower's image processor.
        image: the picture, mode RGB.
        question: the text that the token reduction reads.

    Raises:
        InputError: the model drops no patches.
    """
    if model.token_reducer is None:
        raise InputError('this checkpoint keeps every patch: name a token reduction, such as --reduce "TRIM:-1"')
    values = process_images([image], image_processor, model.config)
    (tokens,) = model.encode_images(values, [query_of(question)], [image.size])
    aspect_ratio = getattr(model.config, "image_aspect_ratio", None)
    return draw_reduction(image, tokens, model.get_vision_tower().grid, aspect_ratio, question)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m llava.visualize", description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--image-file", required=True, metavar="FILE", help="picture file or http(s) address")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--out", required=True, metavar="PNG", help="file that the drawing is written to")
    args = parser.parse_args()
    prepare_terminal()
    if not args.query.strip():
        raise InputError("--query is empty: write what you want to know about the picture")
    image = load_image(args.image_file, upright=True)
    _, model, image_processor = load_model(args)
    save_atomically(visualize(model, image_processor, image, args.query), args.out)


if __name__ == "__main__":
    run_command(main)
