"""A contact sheet: many questions about images on one HTML page, each with what every method keeps of its image.

The page is one file, images and all; texts of files and models are escaped.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError, one_line
from llava.files import read_jsonl, write_text
from llava.image import load_image, to_data_url
from llava.terminal import make_bar

if TYPE_CHECKING:
    from PIL import Image

    from llava.looks import Case, Look
    from llava.model.language_model.causal import LlavaCausalLM
    from llava.model.token_reduction import Reduction
    from llava.protocols import ImageProcessor

# Functions import torch: the command answers --help and mistaken options before that.

LIMIT = 60
"""Questions on a page unless more are asked for."""
MAX_BYTES = 40 * 10**6
"""Of a page; browsers open larger ones slowly. What does not fit is left out, and the page says so."""
SIDE, QUALITY = 460, 85
"""Pixels, and JPEG quality, of a picture."""
QUESTION_KEYS = ("question", "query", "prompt", "text")
"""Where a line may have its question; the first that is there counts."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222; }
section { border-top: 1px solid #ccc; padding: .6em 0 1em; }
h2 { font-size: 16px; margin: .3em 0; white-space: pre-line; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: .3em 0 .8em; }
dt, figcaption, .small { color: #666; font-size: 13px; }
dd { margin: 0; }
.other, .problem { color: #a40e26; }
figure { display: inline-block; vertical-align: top; margin: 0 12px 12px 0; width: 300px; }
img { width: 100%; display: block; }
"""
LEGEND = (
    "Kept patches are bright, with a yellow frame; patches that merged tokens are made around have a pink one; dropped "
    "ones are dimmed; what is padding, or not seen, is hatched. A red line on a color scale is the lowest score kept."
)


@dataclass(frozen=True)
class Asked:
    """A question of the sheet.

    Attributes:
        image: file or address.
        question: the user's text.
        answer: that a file gives; None: there is none.
    """

    image: str
    question: str
    answer: str | None = None


# ------------------------------------------------------------------------------------------------------------ questions
def read_questions(file: Path, folder: Path | None = None, answers: Path | None = None) -> list[Asked]:
    """Read questions of a JSON Lines file: `image`, and `question`, `query`, `prompt` or `text`.

    In a line that has `prompt` and `text`, as answers files have, `text` is the answer.

    Args:
        file: the questions; LLaVA's question files are of this form.
        folder: of images that are named by relative paths; None: that of the file.
        answers: an answers file, whose `text` is shown with the question of the same `question_id`.

    Raises:
        InputError: a line has no image or no question; names it.
    """
    given = {} if answers is None else {str(row.get("question_id")): row.get("text") for row in read_jsonl(answers)}
    asked = []
    for number, row in enumerate(read_jsonl(file), start=1):
        image, key = row.get("image"), next((key for key in QUESTION_KEYS if isinstance(row.get(key), str)), None)
        if not isinstance(image, str) or key is None:
            raise InputError(
                f'{file} record {number}: "image" and a question are needed, under "question", "query", "prompt" or '
                '"text"; of an answers file without images give the question file, and the answers by --answers'
            )
        question = row[key].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if not question:
            raise InputError(f"{file} record {number}: the question is empty")
        answer = row.get("text") if key == "prompt" else None
        answer = given.get(str(row.get("question_id")), answer)
        place = image if "://" in image else str((folder or file.parent) / image)
        asked.append(Asked(place, question, answer if isinstance(answer, str) else None))
    return asked


# ----------------------------------------------------------------------------------------------------------------- page
def write_sheet(
    path: Path,
    asked: Sequence[Asked],
    model: "LlavaCausalLM",
    image_processor: "ImageProcessor",
    reductions: "Sequence[Reduction]",
    conv_mode: str,
    max_new_tokens: int | None = None,
) -> None:
    """Draw questions on one page.

    An image that cannot be read, and a question that no tokenizer takes, has the reason in its place, which is also
    told on stderr.

    Args:
        path: the page.
        asked: the questions; those about the same image are best in a row, which is then encoded once.
        model: its tokenizer is attached.
        image_processor: of its vision tower.
        reductions: the methods.
        conv_mode: conversation template.
        max_new_tokens: of the answers that the full model and each method give; None: nothing is answered.

    Raises:
        FileError: the page cannot be written.
        InputError: the model cannot serve a method.
    """
    sections, num_bytes = [], 0
    with make_bar("drawing", len(asked), "q") as progress:
        for section in _draw(asked, model, image_processor, reductions, conv_mode, max_new_tokens):
            progress.update()
            num_bytes += len(section)
            if num_bytes > MAX_BYTES and sections:
                break
            sections.append(section)
    names = ", ".join(reduction.spec() or "" for reduction in reductions)
    title = f"What {names} keeps" if len(reductions) == 1 else f"What methods keep: {names}"
    count = f"{len(sections)} question" + "s" * (len(sections) != 1)
    if len(sections) < len(asked):
        count += (
            f"; {len(asked) - len(sections)} more are left out: the page would be larger than {MAX_BYTES // 10**6} MB"
        )
        sys.stderr.write(f"{path}: {count}\n")
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>\n'
        f'<h1>{escape(title)}</h1>\n<p>{escape(count)}.</p><p class="small">{escape(LEGEND)}</p>\n'
        + "\n".join(sections)
        + "\n</html>\n",
    )


def _draw(
    asked: Sequence[Asked],
    model: "LlavaCausalLM",
    image_processor: "ImageProcessor",
    reductions: "Sequence[Reduction]",
    conv_mode: str,
    max_new_tokens: int | None,
) -> Iterator[str]:
    """Write each question's part of the page; an image is encoded once for the questions in a row."""
    from llava.looks import ask_else, look_at, prepare

    last, case = None, None
    for each in asked:
        try:
            if case is None or each.image != last:
                image = load_image(each.image, upright=True)
                case = prepare(model, image_processor, image, each.question, reductions, conv_mode)
            else:
                case = ask_else(model, case, each.question, conv_mode)
            last = each.image
        except InputError as error:
            case = None
            sys.stderr.write(f"{one_line(str(error))}\n")
            yield _write_section(each, [], [f'<p class="problem">{escape(str(error))}</p>'])
            continue
        looks = [look_at(model, case, reduction) for reduction in reductions]
        answers = list_answers(model, case, looks, max_new_tokens) if max_new_tokens else []
        yield _write_section(each, answers, draw_case(model, case, looks))


def list_answers(
    model: "LlavaCausalLM", case: "Case", looks: "Sequence[Look]", max_new_tokens: int
) -> list[tuple[str, str, str]]:
    """Answer a case with the full model and with each method: name, answer, number of tokens."""
    from llava.looks import look_at
    from llava.model.token_reduction import Reduction
    from llava.sampling import Sampling
    from llava.what_if import FULL, ask, show

    rows, sampling = [], Sampling(max_new_tokens=max_new_tokens)
    for look in [look_at(model, case, Reduction()), *looks]:
        (answer,) = ask(model, case, sampling, [look.tokens], look.reduction)
        rows.append((look.reduction.spec() or FULL, show(answer), look.describe_tokens()))
    return rows


def draw_case(model: "LlavaCausalLM", case: "Case", looks: "Sequence[Look]") -> list[str]:
    """Draw the image and the panels of each method, as figures of the page."""
    from llava.drawing import draw_panel
    from llava.looks import make_view

    grid, aspect_ratio = model.get_vision_tower().grid, getattr(model.config, "image_aspect_ratio", None)
    figures = [_write_figure(case.image, "image")]
    for look in looks:
        view = make_view(case.image, look, grid, aspect_ratio)
        figures += [_write_figure(draw_panel(view, replace(each, caption="")), each.caption) for each in view.panels]
    return figures


def _write_section(asked: Asked, answers: Sequence[tuple[str, str, str]], figures: Sequence[str]) -> str:
    """Write a question, its answers and its figures."""
    from llava.what_if import is_same

    rows = [f"<dt>image</dt><dd>{escape(asked.image)}</dd>"]
    if asked.answer is not None:
        rows.append(f"<dt>answer of the file</dt><dd>{escape(asked.answer)}</dd>")
    for name, answer, count in answers:
        mark = "" if is_same(answer, answers[0][1]) else ' class="other"'
        rows.append(
            f'<dt>{escape(name)}</dt><dd{mark}>{escape(answer)} <span class="small">({escape(count)})</span></dd>'
        )
    return f"<section><h2>{escape(asked.question)}</h2><dl>{''.join(rows)}</dl>\n{''.join(figures)}</section>"


def _write_figure(image: "Image.Image", caption: str) -> str:
    """Write a picture, embedded as a JPEG, with its caption."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    address = to_data_url(small.convert("RGB"), "JPEG", quality=QUALITY)
    text = escape(caption).replace("\n", "<br>")
    alt = escape(one_line(caption))
    return f'<figure><img src="{address}" alt="{alt}"><figcaption>{text}</figcaption></figure>'


def take(asked: Sequence[Asked], limit: int | None) -> list[Asked]:
    """Take the first questions, `LIMIT` unless it says another number, and tell on stderr how many are left out."""
    chosen = list(islice(asked, limit or LIMIT))
    if len(chosen) < len(asked) and limit is None:
        sys.stderr.write(
            f"the first {len(chosen)} of {len(asked)} questions are drawn (--limit N for another number)\n"
        )
    return chosen
