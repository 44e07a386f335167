"""What a model got wrong, question by question; against another run, what flipped; drawn with what the model looked at.

A figure shows the image, the patches that the run kept for the question, their scores, and what was answered. The
kept patches are computed anew with the model that answered, which `ANSWERS.run.json` names; a run without reduction
needs no model, since it keeps everything.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import ModelSpec
from llava.errors import InputError
from llava.eval.benchmark import ImageSource, Question, Verdict
from llava.eval.report import clean
from llava.eval.results import Result, base_key, format_line
from llava.files import read_json, write_text

if TYPE_CHECKING:
    from llava.visualize import TextLine, View

RIGHT_COLOR, WRONG_COLOR = "#1a7f37", "#c0262d"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }}
h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc; }}
figure {{ margin: 1.5em 0; border: 1px solid #ddd; border-radius: 6px; padding: 1em; }}
img {{ max-width: 100%; display: block; }}
figcaption {{ color: #666; font-size: 13px; margin-bottom: .5em; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


@dataclass(frozen=True)
class Listed:
    """One listed question.

    Attributes:
        question: what was asked; of a group of questions the first.
        verdicts: of each compared run, in their order.
    """

    question: Question
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Section:
    """Cases of one kind; `count` of them in all, of which some are listed."""

    title: str
    count: int
    cases: Sequence[Listed]


@dataclass(frozen=True)
class Listing:
    """What is listed: sections, and the lines that sum up.

    Attributes:
        names: of the compared runs; empty for a single one.
        sections: one, or a flip each way.
        summary: lines for a person.
    """

    names: Sequence[str]
    sections: Sequence[Section]
    summary: Sequence[str]


# ------------------------------------------------------------------------------------------------------------ listing
def list_wrong(result: Result, questions: Mapping[str, Question], limit: int | None = None) -> Listing:
    """List what a run got wrong, in the order of its verdicts.

    Args:
        result: its score.
        questions: of the benchmark by key.
        limit: list only the first N.
    """
    verdicts = [verdict for verdict in result.verdicts if verdict.unit != "pair"]
    wrong = [Listed(find_question(verdict, questions), (verdict,)) for verdict in verdicts if not verdict.correct]
    summary = f"{len(wrong)} of {len(verdicts)} wrong; {format_line(result)}".replace("\t", " ")
    return Listing((), [Section("wrong", len(wrong), wrong[:limit])], [summary])


def list_flips(
    results: tuple[Result, Result],
    names: tuple[str, str],
    questions: Mapping[str, Question],
    limit: int | None = None,
) -> Listing:
    """List where two runs of a benchmark differ in being right, each way.

    Args:
        results: their scores.
        names: what they are called.
        questions: of the benchmark by key.
        limit: list only the first N of each way.

    Raises:
        InputError: the runs have no question in common.
    """
    here, there = ({verdict.key: verdict for verdict in each.verdicts if verdict.unit != "pair"} for each in results)
    both = [(verdict, there[key]) for key, verdict in here.items() if key in there]
    if not both:
        raise InputError(f"{names[0]} and {names[1]} have no answered question in common")
    counts = Counter((mine.correct, other.correct) for mine, other in both)
    sections = []
    for right_here in (True, False):
        flipped = [
            Listed(find_question(mine, questions), (mine, other))
            for mine, other in both
            if mine.correct is right_here and other.correct is not right_here
        ]
        title = "right in {}, wrong in {}".format(*(names if right_here else reversed(names)))
        sections.append(Section(title, len(flipped), flipped[:limit]))
    same = counts[True, True] + counts[False, False]
    summary = [
        *(f"{name}: {format_line(each)}".replace("\t", " ") for name, each in zip(names, results, strict=True)),
        *(f"{section.title}: {section.count}" for section in sections),
        f"both right {counts[True, True]}, both wrong {counts[False, False]}; "
        f"agreement {100 * same / len(both):.1f} % of {len(both)}",
    ]
    if len(both) < max(len(here), len(there)):
        summary.append(f"compared are the {len(both)} that both answered, of {len(here)} and {len(there)}")
    return Listing(names, sections, summary)


def find_question(verdict: Verdict, questions: Mapping[str, Question]) -> Question:
    """Return the question of a verdict; of a group that names none, one without image that has the group's key."""
    return questions.get(base_key(verdict) or "") or Question(id=verdict.key, prompt=verdict.key)


def name_runs(here: Path, there: Path) -> tuple[str, str]:
    """Call two answers files by the last part of their paths that differs.

    Raises:
        InputError: they are the same file.
    """
    pairs = zip(reversed(here.resolve().parts), reversed(there.resolve().parts), strict=False)
    names = next(((mine, other) for mine, other in pairs if mine != other), None)
    if names is None:
        raise InputError(f"--against {there} is the file of --answers: name another run's")
    return names[0].removesuffix(".jsonl"), names[1].removesuffix(".jsonl")


def format_listing(listing: Listing) -> str:
    """Write a listing for the terminal: a block per question, then the summary."""
    blocks = []
    for section in listing.sections:
        shown = f", the first {len(section.cases)}" if len(section.cases) < section.count else ""
        blocks.append(f"== {section.title} ({section.count}{shown})")
        blocks += ["\n".join(map(clean, _format_listed(listed, listing.names))) for listed in section.cases]
    return "\n\n".join([*blocks, "\n".join(listing.summary)])


def _format_listed(listed: Listed, names: Sequence[str]) -> Iterator[str]:
    first = listed.verdicts[0]
    yield name_listed(listed)
    yield from (f"    {line}" for line in listed.question.prompt.splitlines())
    if first.query and first.query not in listed.question.prompt:
        yield f"  query       {' '.join(first.query.split())}"
    for name, text, _ in describe_answers(listed, names):
        yield f"  {name:<11} {text}"


def name_listed(listed: Listed) -> str:
    """Name a question by its id, category and image."""
    first = listed.verdicts[0]
    return "  ".join(filter(None, [f"question {listed.question.id}", first.category, first.image]))


def describe_answers(listed: Listed, names: Sequence[str]) -> list[tuple[str, str, bool | None]]:
    """List the reference answer and each run's prediction: a name, a text, and whether it is right."""
    reference = listed.verdicts[0].reference
    if not isinstance(reference, str):
        counts = Counter(reference).most_common()
        reference = ", ".join(text + f" ({count} times)" * (count > 1) for text, count in counts)
    lines: list[tuple[str, str, bool | None]] = [("reference", reference, None)]
    for name, verdict in zip(names or ["prediction"], listed.verdicts, strict=True):
        text = " ".join(verdict.prediction.split()) or "(empty)"
        if verdict.parsed is not None and verdict.parsed.lower() != text.lower():
            text += f"  [read as {verdict.parsed}]"
        tokens = f", {verdict.num_tokens} visual tokens" if verdict.num_tokens is not None else ""
        text += f"  ({verdict.points:.3g} points{tokens})"
        lines.append((name, text, verdict.correct))
    return lines


# ------------------------------------------------------------------------------------------------------------ drawing
def read_run(answers_file: Path) -> ModelSpec | None:
    """Return the model of a run from the `.run.json` beside its answers; None where there is none.

    Raises:
        InputError: the file is something else.
    """
    file = answers_file.with_name(f"{answers_file.name}.run.json")
    if not file.is_file():
        return None
    run = read_json(file)
    if not isinstance(run, dict) or not isinstance(run.get("path"), str):
        raise InputError(f"{file} names no model: name it by --model-path")
    device = run.get("device")
    return ModelSpec(
        path=run["path"],
        base=run.get("base"),
        reduce=run.get("reduce"),
        device=None if device in ("auto", "any") else device,
        dtype=run.get("dtype"),
        tower_dtype=run.get("tower_dtype"),
    )


def choose_run(
    answers_file: Path, model_path: str | None, model_base: str | None = None, reduce: str | None = None
) -> ModelSpec:
    """Return the model to draw with: what the run's `.run.json` says, where the options say nothing else.

    Raises:
        InputError: neither names a model.
    """
    run = read_run(answers_file)
    if model_path is not None:
        # The run's base belongs to the run's checkpoint.
        run = replace(run or ModelSpec(model_path), path=model_path, base=None)
    if run is None:
        raise InputError(f"no {answers_file}.run.json says which model answered: name one by --model-path")
    return replace(run, base=model_base or run.base, reduce=reduce or run.reduce)


def look(run: ModelSpec, name: str, cases: Sequence[Listed]) -> dict[tuple[ImageSource, str], "View"]:
    """Compute what a run keeps of the images of some questions.

    Args:
        run: its model; loaded here, unless it reduces nothing.
        name: what the run is called in the figures.
        cases: whose images are looked at, each for its question's query.

    Returns:
        What is drawn, by image and query; nothing for a run that keeps everything or blends patches, and for images
        that cannot be read.
    """
    if run.reduce == "none":
        return {}
    # Only drawing needs the model and the drawing library.
    from llava.image import load_image
    from llava.visualize import make_view, reduce_image

    _, model, image_processor = run.load()
    if model.token_reducer is None:
        return {}
    grid, aspect_ratio = model.get_vision_tower().grid, getattr(model.config, "image_aspect_ratio", None)
    views = {}
    for image, query in {(image, listed.question.query): None for listed in cases for image in listed.question.images}:
        try:
            pixels = load_image(image)
            tokens = reduce_image(model, image_processor, pixels, query)
        except (ValueError, OSError):  # the question has no answer, or the figure says why
            continue
        if tokens.kept is not None:
            views[image, query] = make_view(pixels, tokens, grid, aspect_ratio, name)
    return views


def draw_listing(listing: Listing, runs: Sequence[ModelSpec], title: str, folder: Path) -> Path:
    """Draw every listed question into a PNG of its own, and a page that shows them all.

    Args:
        listing: what is listed.
        runs: the compared runs' models; None for one whose kept patches are not drawn.
        title: of the page.
        folder: where the files go.

    Returns:
        The page, `index.html`.
    """
    from llava.visualize import draw_figure, write_image

    cases = [listed for section in listing.sections for listed in section.cases]
    names = listing.names or [""]
    looks = [look(run, name, cases) for run, name in zip(runs, names, strict=True) if run]
    body, number = [f"<p>{html.escape(line)}</p>" for line in listing.summary], 0
    for section in listing.sections:
        body.append(f"<h2>{html.escape(section.title)} ({len(section.cases)} of {section.count})</h2>")
        for listed in section.cases:
            number += 1
            file = f"{number:04d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', str(listed.question.id))[:60]}.png"
            views, lines = _lay_out(listed, listing.names, looks)
            write_image(folder / file, draw_figure(views, listed.question.query or listed.question.prompt, lines))
            caption = "  ".join(
                filter(None, [str(listed.question.id), listed.verdicts[0].category, listed.verdicts[0].image])
            )
            body.append(
                f"<figure><figcaption>{html.escape(caption)}</figcaption>"
                f'<a href="{file}"><img src="{file}" alt="{html.escape(caption)}" loading="lazy"></a></figure>'
            )
    return write_text(folder / "index.html", PAGE.format(title=html.escape(title), body="\n".join(body)))


def _lay_out(
    listed: Listed, names: Sequence[str], looks: Sequence[Mapping[tuple[ImageSource, str], "View"]]
) -> tuple[list["View"], list["TextLine"]]:
    """Return the panels and the lines of text of a question's figure."""
    from llava.image import load_image
    from llava.visualize import TextLine, View

    colors = {None: "black", True: RIGHT_COLOR, False: WRONG_COLOR}
    lines = [TextLine(name, text, colors[right]) for name, text, right in describe_answers(listed, names)]
    views: list[View] = []
    for image in listed.question.images:
        seen = [look[image, listed.question.query] for look in looks if (image, listed.question.query) in look]
        try:
            views += seen or [View(load_image(image), "image")]
        except InputError as error:
            lines.append(TextLine("image", str(error), WRONG_COLOR))
    return views, lines
