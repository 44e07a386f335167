"""Draw the figures of README.md: the method, one image under three questions, score against tokens.

`python -m scripts.draw_figures [--results OUT]` writes docs/figures/method.svg and questions.png with the pocket
checkpoint, and tokens.svg from what `bash scripts/results.sh OUT` has measured.
"""

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from llava.errors import InputError, run_command
from llava.files import write_text
from llava.image import to_data_url

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures"
CHECKPOINT = ROOT / "playground/shapes/checkpoints/llava-shapes"
SCENE = (1, 0, 314)
"""A yellow circle and a green cross of the world of shapes: a clear case, found among the first 500 scenes."""
QUESTIONS = (
    "What shape is the yellow object?",
    "What shape is the green object?",
    "Is there a yellow circle in the image?",
)
INSIDE = ("FastV", "PyramidDrop", "SparseVLM", "DART")
"""Methods inside the language model, whose tokens are those of an average layer: another scale."""
INK, PALE, KEPT, ACCENT = "#24292f", "#d0d7de", "#ffd60a", "#1a7f37"
SIDE, TOP = 144, 58
"""Pixels: side of an image in the figure of the method, and its distance from the top."""


# ---------------------------------------------------------------------------------------------------------- the method
def draw_method(answer: Any, image: Image.Image) -> str:
    """Return an SVG of TRIM at work: a real image, its real scores and kept patches.

    Args:
        answer: a `llava.Answer` about the image.
        image: what was asked about.
    """
    (kept,), (scores,) = answer.kept, answer.scores
    rows, cols = kept.shape
    cell = SIDE / cols
    middle = TOP + SIDE / 2
    address = to_data_url(image)

    def picture(x: float, opacity: float = 1.0) -> str:
        return (
            f'<image x="{x}" y="{TOP}" width="{SIDE}" height="{SIDE}" opacity="{opacity}" '
            f'preserveAspectRatio="none" href="{address}"/>'
        )

    def square(x: float, row: int, col: int, style: str) -> str:
        place = f'x="{x + col * cell:.1f}" y="{TOP + row * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}"'
        return f"<rect {place} {style}/>"

    def grid(x: float) -> list[str]:
        return [
            square(x, row, col, f'fill="none" stroke="{PALE}" stroke-width="0.7"')
            for row in range(rows)
            for col in range(cols)
        ]

    # 1. The image in patches.
    parts = [picture(20), *grid(20), _label(20 + SIDE / 2, TOP - 12, f"image: {rows} x {cols} patches")]
    # 2. The two towers, and the product of what they say.
    parts += [
        _arrow(168, middle, 186),
        _box(188, middle - 24, 92, 48, "CLIP", "vision tower"),
        _arrow(282, middle, 312),
    ]
    parts += [_box(12, 246, 220, 34, f"“{answer.question}”"), _arrow(234, 263, 250)]
    parts += [_box(252, 246, 112, 34, "CLIP text tower"), _path(f"M 366 263 H 386 V {TOP + SIDE + 6}")]
    order = scores.argsort(axis=None).argsort().reshape(scores.shape)
    parts += [
        square(314, row, col, f'fill="{_shade(order[row, col] / (rows * cols - 1))}"')
        for row in range(rows)
        for col in range(cols)
    ]
    parts.append(_label(314 + SIDE / 2, TOP - 12, "score: patch against question"))
    # 3. What is kept, and the mean of the rest.
    parts += [_arrow(462, middle, 490), picture(494, 0.3)]
    parts.append(f'<clipPath id="kept">{"".join(square(494, r, c, "") for r, c in zip(*kept.nonzero(), strict=True))}')
    parts.append(f'</clipPath><g clip-path="url(#kept)">{picture(494)}</g>')
    parts += [
        square(494, row, col, f'fill="none" stroke="{KEPT}" stroke-width="1.6"')
        for row, col in zip(*kept.nonzero(), strict=True)
    ]
    parts.append(_label(494 + SIDE / 2, TOP - 12, f"outliers stay: {int(kept.sum())} of {kept.size}"))
    parts += [
        _path(f"M {494 + SIDE / 2} {TOP + SIDE + 4} V 243"),
        _box(482, 246, SIDE + 24, 34, "1 token: mean of the rest"),
    ]
    # 4. The unchanged rest of LLaVA.
    parts += [_arrow(642, middle, 676), _path(f"M 652 263 H 720 V {middle + 27}")]
    parts += [_box(678, middle - 24, 84, 48, "projector", "unchanged"), _arrow(764, middle, 786)]
    parts += [_box(788, middle - 24, 84, 48, "Vicuna", "unchanged"), _path(f"M 830 {middle + 26} V 243")]
    parts.append(_box(734, 246, 196, 34, f"“{answer.text}”"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 942 300" font-family="system-ui, sans-serif" '
        'role="img" aria-label="How TRIM chooses the patches of an image"><rect width="942" height="300" fill="white"/>'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{INK}"/></marker></defs>{"".join(parts)}</svg>\n'
    )


def _label(x: float, y: float, text: str, size: float = 12) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" fill="{INK}">{escape(text)}</text>'


def _arrow(x: float, y: float, to: float) -> str:
    return _path(f"M {x} {y} H {to}")


def _path(points: str) -> str:
    return f'<path d="{points}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def _box(x: float, y: float, width: float, height: float, *lines: str) -> str:
    """Return a rounded box with a line of text or two."""
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#f6f8fa" stroke="{PALE}"/>'
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    return frame + "".join(_label(x + width / 2, first + 16 * number, line) for number, line in enumerate(lines))


def _shade(share: float) -> str:
    """Return a color from pale to `ACCENT`; 0 is the lowest rank, 1 the highest."""
    low, high = (240, 243, 246), tuple(int(ACCENT[start : start + 2], 16) for start in (1, 3, 5))
    red, green, blue = (round(start + (end - start) * share**2) for start, end in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


# ------------------------------------------------------------------------------------------------------ score by tokens
def read_means(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read a comparison: of each method (mean tokens, mean % of the full model's score) at each budget.

    Raises:
        InputError: there is no comparison, or it is of another shape.
    """
    file = folder / "table.json"
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        groups: dict[tuple[str, int | None], list[dict]] = {}
        for cell in cells:
            groups.setdefault((cell["method"], cell["budget"]), []).append(cell)
        means: dict[str, list[tuple[float, float]]] = {}
        for (method, _), own in groups.items():
            point = tuple(sum(cell[key] for cell in own) / len(own) for key in ("mean_tokens", "retained"))
            means.setdefault(method, []).append(point)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no comparison of llava.eval compare ({error})") from None
    return {method: sorted(points) for method, points in means.items()}


def draw_tokens(results: Path, out: Path) -> None:
    """Plot score against tokens for the plain and the finetuned checkpoint."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "llava", "font.size": 9}):
        figure = Figure(figsize=(9.2, 3.1), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name, title in zip(
            panels, ("plain", "finetuned"), ("training-free", "finetuned with TRIM"), strict=True
        ):
            means = read_means(results / name)
            others = [method for method in means if method not in ("none", "TRIM", "TRIM:-1", "Random", "Pool")]
            others = [method for method in others if not method.startswith(INSIDE) and "position_ids" not in method]
            for number, method in enumerate(others):
                label = f"{len(others)} other methods" if number == 0 else None
                axes.plot(*zip(*means[method], strict=True), color="#b6bec8", linewidth=1, label=label)
            axes.plot(*zip(*means["Random"], strict=True), "--", color="#6e7781", label="random patches")
            axes.plot(*zip(*means["TRIM"], strict=True), "o-", color=ACCENT, linewidth=2, markersize=4, label="TRIM")
            axes.plot(*means["TRIM:-1"][0], "*", color="#bc4c00", markersize=11, label="TRIM:-1")
            axes.axhline(100, color=INK, linewidth=0.7)
            axes.set(title=title, xlabel="visual tokens per question")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylim(bottom=66)  # once both are drawn: they share the axis
        full = means["none"][0][0]
        panels[0].annotate(
            f"all {full:.0f} tokens", (0.01, 100), None, ("axes fraction", "data"), ha="left", va="bottom"
        )
        panels[0].set_ylabel("% of the full model's score,\nmean of 12 benchmarks")
        panels[1].legend(loc="lower right", frameon=False)
        figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.draw_figures", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, metavar="OUT", help="folder of scripts/results.sh: draws tokens.svg too"
    )
    results = parser.parse_args().results
    if results is not None:
        draw_tokens(results, FIGURES / "tokens.svg")

    from llava import Llava
    from llava.looks import ask_else, look_at, prepare
    from llava.visualize import draw_questions, read_reductions
    from playground.shapes.world import draw_scene

    llava = Llava.from_pretrained(CHECKPOINT, reduce="TRIM:-1")
    image, _ = draw_scene(*SCENE)
    answers = [llava.ask(image, question) for question in QUESTIONS]
    write_text(FIGURES / "method.svg", draw_method(answers[0], image))
    reductions = read_reductions(llava.model, [])
    case = prepare(llava.model, llava.image_processor, image, QUESTIONS[0], reductions)
    cases = [case, *(ask_else(llava.model, case, question) for question in QUESTIONS[1:])]
    looks = [look_at(llava.model, each, reductions[0]) for each in cases]
    draw_questions(llava.model, cases, looks, [answer.text for answer in answers]).write(FIGURES / "questions.png")
    sys.stdout.write(f"written to {FIGURES}\n")


if __name__ == "__main__":
    run_command(main)
