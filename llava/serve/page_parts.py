"""The page's answers, pictures and history as HTML: text from a user or a model is escaped, images are inside."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from llava.image import to_data_url
from llava.serve.page_model import NONE, Drawn, Result
from llava.what_if import is_same, show

NUM_STEPS = 6
"""Questions that the history shows."""
THUMBNAIL = 200
"""Pixels: side of the history's pictures."""
CARET = '<span class="caret">▍</span>'
"""Behind an answer that is being written."""
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
STAGES = {"encode": "vision tower", "reduce": "reduction", "generate": "language model"}
"""Stages of an answer as the page names them."""

CSS = """
.gradio-container { overflow: clip !important; max-width: 1320px !important; margin: 0 auto !important;
  --quiet: var(--neutral-500); }
.dark .gradio-container, .gradio-container.dark { --quiet: var(--neutral-400); }
.cards, .pictures { display: flex; flex-wrap: wrap; gap: 14px; }
.card { flex: 1 1 300px; min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 10px 16px 12px; background: var(--block-background-fill); }
.card h3 { margin: 0; font: 600 14px/1.4 ui-monospace, monospace; color: var(--quiet); overflow-wrap: anywhere; }
.card .text { font-size: 22px; line-height: 1.3; margin: 2px 0 8px; min-height: 1.3em; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 12em; overflow-y: auto; }
.card .verdict { font-size: 13px; font-weight: 600; margin-left: 10px; }
.card.problem { border-color: #c2410c; }
.verdict.same { color: #1a7f37; } .verdict.other { color: #c2410c; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 0; font-size: 14px; }
.card dt { color: var(--quiet); } .card dd { margin: 0; }
.card small, .pictures small, .steps small { display: block; color: var(--quiet); font-size: 13px; line-height: 1.35; }
.hint { color: var(--quiet); }
.bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); margin: 2px 0 3px; max-width: 260px; }
.bar span { display: block; height: 100%; border-radius: 3px; background: #4269d0; }
.pictures { align-items: flex-end; margin-top: 4px; }
.pictures figure { flex: 483 1 0; min-width: 260px; max-width: 470px; margin: 0; }
.pictures figure.scores { flex-grow: 595; max-width: 579px; }
.pictures img { width: 100%; display: block; border-radius: 4px; }
.pictures figcaption { font-size: 14px; line-height: 1.4; margin-bottom: 4px; }
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); gap: 8px; }
.steps figure { max-width: 170px; margin: 0; padding: 5px; border: 2px solid transparent; border-radius: 6px; }
.steps figure.now { border-color: #4269d0; }
.steps img { width: 100%; display: block; border-radius: 3px; }
.steps figcaption { font-size: 13px; line-height: 1.35; margin-top: 4px; overflow-wrap: anywhere; }
.section { font-size: 14px; font-weight: 600; margin: 2px 0; }
.caret { animation: blink 1s steps(2) infinite; } @keyframes blink { 50% { opacity: 0; } }
@media (min-width: 800px) { #found { position: sticky; top: 10px; align-self: flex-start; } }
.fixed { min-height: 0 !important; }
#samples .gallery-item, #samples .gallery-item img { width: 62px !important; height: 62px !important; }
#questions .gallery-item { font-size: 13px; }
"""


# ------------------------------------------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class Column:
    """One answer on the page.

    Attributes:
        spec: token reduction; "none" for none.
        text: as far as it is written.
        result: None until it is complete.
    """

    spec: str
    text: str = ""
    result: Result | None = None


def show_answers(columns: Sequence[Column]) -> str:
    """Show answers side by side; of two complete ones, the first is held against the second."""
    results = [column.result for column in columns]
    against = results[1] if len(results) > 1 else None
    cards = [_show_card(column, against if number == 0 else None, results) for number, column in enumerate(columns)]
    return f'<div class="cards">{"".join(cards)}</div>'


def show_problem(text: str) -> str:
    """Show in place of an answer why there is none."""
    return f'<div class="cards"><section class="card problem" role="alert">{escape(text)}</section></div>'


def _show_card(column: Column, against: Result | None, results: Sequence[Result | None]) -> str:
    title = "no reduction" if column.spec == NONE else escape(column.spec)
    result = column.result
    if result is None:
        return f'<section class="card"><h3>{title}</h3><div class="text">{escape(column.text)}{CARET}</div></section>'
    verdict = ""
    if against is not None:
        same = is_same(result.text, against.text)
        verdict = f'<span class="verdict {"same" if same else "other"}">{"same" if same else "another"} answer</span>'
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _list_figures(result, against, results))
    is_first = column.result is results[0]
    note = f"<small>{escape(result.note)}</small>" if result.note and is_first else ""
    return (
        f'<section class="card"><h3>{title}</h3><div class="text">{escape(result.text or show(""))}{verdict}</div>'
        f"<dl>{rows}</dl>{note}</section>"
    )


def _list_figures(result: Result, against: Result | None, results: Sequence[Result | None]) -> list[tuple[str, str]]:
    """List what an answer took: (name, HTML)."""
    complete = [each for each in results if each is not None]
    figures = []
    if result.num_tokens is not None:
        tokens, share = result.tokens, None
        if result.num_patches:
            share = result.num_tokens / result.num_patches
            tokens += f" of {result.num_patches}" + f" ({100 * share:.0f} %)" * (result.tokens.isdigit())
        figures.append(("image tokens", escape(tokens) + _show_bar(share)))
    slowest = max(each.seconds for each in complete)
    time = f"{1000 * result.seconds:,.0f} ms, first token after {1000 * result.first_seconds:,.0f} ms"
    stages = ", ".join(
        f"{name} {1000 * result.stages[stage]:,.0f}" for stage, name in STAGES.items() if stage in result.stages
    )
    bar = _show_bar(result.seconds / slowest if len(complete) > 1 else None)
    figures.append(("time", time + bar + (f"<small>{stages} ms</small>" if stages else "")))
    if result.flops is not None:
        most = max(each.flops or 0 for each in complete)
        share = f" ({100 * result.flops / against.flops:.0f} %)" if against and against.flops else ""
        bar = _show_bar(result.flops / most if len(complete) > 1 else None)
        figures.append(("FLOPs", f"{format_flops(result.flops)}{share}{bar}"))
    if result.new_tokens is not None:
        figures.append(("answer", f"{result.new_tokens} token{'s' * (result.new_tokens != 1)}"))
    return figures


def _show_bar(share: float | None) -> str:
    if share is None:
        return ""
    return f'<div class="bar"><span style="width: {100 * min(share, 1):.1f}%"></span></div>'


def format_flops(flops: int) -> str:
    """Write FLOPs for a person, with three digits: `326 MFLOPs`, `8.67 TFLOPs`."""
    size, unit = next((each for each in UNITS if flops >= 0.9995 * each[0]), UNITS[-1])  # 999.9 M is 1.00 G
    return f"{flops / size:#.3g}".rstrip(".") + f" {unit}FLOPs"


# ------------------------------------------------------------------------------------------------------------ pictures
def show_pictures(pictures: Sequence[Drawn]) -> str:
    """Show the pictures of an answer side by side."""
    figures = [
        f'<figure class="{"map" if drawn.is_map else "scores"}"><figcaption><b>{escape(drawn.title)}</b><br>'
        f'{escape(drawn.text)}</figcaption><img alt="{escape(f"{drawn.title}: {drawn.text}")}" '
        f'src="{to_data_url(drawn.image)}"></figure>'
        for drawn in pictures
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def show_hint(text: str) -> str:
    """Show a sentence where pictures would be."""
    return f'<p class="hint">{escape(text)}</p>'


# ------------------------------------------------------------------------------------------------------------- history
@dataclass(frozen=True, eq=False)
class Step:
    """One question of the history.

    Attributes:
        image_key: of the image's content.
        question: without the instruction behind it.
        spec: token reduction.
        text: the answer.
        tokens: image tokens that were read, for a person.
        kept: `bool[N]`.
        thumbnail: address of the picture of the kept patches.
    """

    image_key: str
    question: str
    spec: str
    text: str
    tokens: str
    kept: np.ndarray
    thumbnail: str


def extend_history(history: Sequence[Step], image: Path, question: str, result: Result) -> list[Step]:
    """Add an answer to the history of its image; another image begins a new one, the same question again replaces it.

    Args:
        history: so far.
        image: the file.
        question: without the instruction behind it.
        result: one without pictures of kept patches is left out.

    Returns:
        The last steps of this image, the newest at the end.
    """
    key = hashlib.sha256(image.read_bytes()).hexdigest()
    same = [step for step in history if step.image_key == key]
    maps = [drawn.image for drawn in result.pictures if drawn.is_map]
    if result.kept is None or not maps:
        return same
    small = maps[-1].copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    step = Step(key, question, result.spec, result.text, result.tokens, result.kept, to_data_url(small))
    if same and (same[-1].question, same[-1].spec) == (question, result.spec):
        same.pop()
    return [*same, step][-NUM_STEPS:]


def show_history(history: Sequence[Step]) -> str:
    """Show how the kept patches moved from question to question; nothing for less than two."""
    if len(history) < 2:
        return ""
    figures = []
    for number, step in enumerate(history):
        before = history[number - 1] if number else None
        moved = "" if before is None else f"<small>{describe_move(before.kept, step.kept)}</small>"
        figures.append(
            f'<figure class="{"now" * (number == len(history) - 1)}">'
            f'<img alt="{escape(f"kept patches: {step.question}")}" src="{step.thumbnail}">'
            f"<figcaption>{escape(step.question)} <b>{escape(step.text)}</b>"
            f"<small>{escape(step.spec)}, {escape(step.tokens)} tokens</small>{moved}</figcaption></figure>"
        )
    return f'<div class="section">On this image so far</div><div class="steps">{"".join(figures)}</div>'


def describe_move(before: np.ndarray, kept: np.ndarray) -> str:
    """Say how many of the kept patches, `bool[N]`, were kept for the question before as well."""
    return f"{int((before & kept).sum())} of {int(kept.sum())} patches as before"
