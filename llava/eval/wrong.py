"""What a model got wrong, question by question; against another run, what flipped; drawn with what the model looked at.

A figure shows the image, the patches that the run kept for the question, their scores, and what was answered. The
kept patches are computed anew with the model that answered, which `ANSWERS.run.json` names; a run without reduction
needs no model, since it keeps everything.
"""

import argparse
import html
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import LoadedModel, ModelSpec, user_path
from llava.errors import InputError
from llava.eval.benchmark import ImageSource, Question, Verdict
from llava.eval.metrics.flips import count_flips
from llava.eval.predictions import find_run_file
from llava.eval.protocol import require_one_protocol
from llava.eval.report import clean
from llava.eval.results import Result, base_key, format_line
from llava.files import FileError, explain_errors, make_folder, read_json, read_text, write_text
from llava.prompt import DEFAULT_CONV_MODE

if TYPE_CHECKING:
    from llava.drawing import TextLine, View

RIGHT_COLOR, WRONG_COLOR = "#1a7f37", "#c0262d"
Asked = tuple[tuple[ImageSource, ...], str, str]
"""A question's images, query and prompt."""
GENERATOR = '<meta name="generator" content="llava.eval wrong">'
"""Marks a page as ours: the PNGs that it shows may be removed when the folder is drawn into again."""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">{generator}<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }}
h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc; }}
figure {{ margin: 1.5em 0; border: 1px solid #ddd; border-radius: 6px; padding: 1em; }}
img {{ max-width: 100%; display: block; }}
figcaption {{ color: #666; font-size: 13px; margin-bottom: .5em; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em; }}
dt {{ color: #666; }}
dd {{ margin: 0; white-space: pre-line; }}
.right {{ color: {right}; }}
.wrong {{ color: {wrong}; }}
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
        InputError: the runs have no question in common, or were measured by different protocols.
    """
    require_one_protocol(results[0].label, [(name, each.protocol) for name, each in zip(names, results, strict=True)])
    here, there = ({verdict.key: verdict for verdict in each.verdicts if verdict.unit != "pair"} for each in results)
    both = [(verdict, there[key]) for key, verdict in here.items() if key in there]
    if not both:
        raise InputError(f"{names[0]} and {names[1]} have no answered question in common")
    flips = count_flips((mine.correct, other.correct) for mine, other in both)
    sections = []
    for right_here in (True, False):
        flipped = [
            Listed(find_question(mine, questions), (mine, other))
            for mine, other in both
            if mine.correct is right_here and other.correct is not right_here
        ]
        title = "right in {}, wrong in {}".format(*(names if right_here else reversed(names)))
        sections.append(Section(title, len(flipped), flipped[:limit]))
    summary = [
        *(f"{name}: {format_line(each)}".replace("\t", " ") for name, each in zip(names, results, strict=True)),
        *(f"{section.title}: {section.count}" for section in sections),
        f"both right {flips.both_right}, both wrong {flips.both_wrong}; "
        f"agreement {flips.agreement:.1f} % of {flips.count}",
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
        tokens = f", {_count(str(verdict.num_tokens), 'visual token')}" if verdict.num_tokens is not None else ""
        text += f"  ({_count(f'{verdict.points:.3g}', 'point')}{tokens})"
        lines.append((name, text, verdict.correct))
    return lines


def _count(number: str, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != "1")


# ------------------------------------------------------------------------------------------------------------ drawing
@dataclass(frozen=True)
class DrawnRun:
    """The model that a run's kept patches are computed with.

    Attributes:
        spec: the model.
        file: the `.run.json` that names it; None: an option does.
        note: how its token reduction differs from the run's; empty where it does not.
        conv_mode: the run's conversation template, which matters to methods inside the language model.
    """

    spec: ModelSpec
    file: Path | None = None
    note: str = ""
    conv_mode: str = DEFAULT_CONV_MODE


def drawing_folder(text: str) -> Path:
    """Parse the folder of the drawings."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a folder is needed, not an empty name")
    return user_path(text)


def check_options(folder: Path | None, **options: str | None) -> None:
    """Check the options of drawing.

    Args:
        folder: where the drawings go; None: nothing is drawn.
        options: those that need it, by their names.

    Raises:
        InputError: an option has no effect, or the place is not a folder.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if folder is None and given:
        raise InputError(f"{given[0]} has no effect without --draw DIR, which draws with it: add that or leave it out")
    if folder is None:
        return
    with explain_errors("write", folder):
        if folder.exists() and not folder.is_dir():
            raise FileError(f"--draw {folder} is not a folder: name a folder, or a place for a new one")
        if folder.exists() and not os.access(folder, os.W_OK):
            raise FileError(f"--draw {folder}: no permission to write there; name another folder")


def read_run(answers_file: Path) -> DrawnRun | None:
    """Return the model of a run from the `.run.json` beside its answers; None where there is none.

    Raises:
        InputError: the file is something else.
    """
    file = find_run_file(answers_file)
    if not file.is_file():
        return None
    run = read_json(file)
    if not isinstance(run, dict) or not isinstance(run.get("path"), str):
        raise InputError(f"{file} names no model: name it by --model-path")
    device = run.get("device")
    spec = ModelSpec(
        path=run["path"],
        base=run.get("base"),
        reduce=run.get("reduce"),
        device=None if device in ("auto", "any") else device,
        dtype=run.get("dtype"),
        tower_dtype=run.get("tower_dtype"),
    )
    return DrawnRun(spec, file, conv_mode=run.get("conv_mode") or DEFAULT_CONV_MODE)


def choose_run(
    answers_file: Path, model_path: str | None, model_base: str | None = None, reduce: str | None = None
) -> DrawnRun:
    """Return the model to draw with: what the run's `.run.json` says, where the options say nothing else.

    Raises:
        InputError: neither names a model, or there is no such token reduction.
    """
    run = read_run(answers_file)
    file, spec = (run.file, run.spec) if run else (None, None)
    conv_mode = run.conv_mode if run else DEFAULT_CONV_MODE
    if model_path is not None:
        # The run's base belongs to the run's checkpoint.
        file, spec = None, replace(spec or ModelSpec(model_path), path=model_path, base=None)
    if spec is None:
        raise InputError(f"no {answers_file}.run.json says which model answered: name one by --model-path")
    spec = replace(spec, base=model_base or spec.base)
    note = compare_reduction(reduce, run.spec if run else None) if reduce else ""
    return DrawnRun(replace(spec, reduce=reduce or spec.reduce), file, note, conv_mode)


def compare_reduction(drawn: str, run: ModelSpec | None) -> str:
    """Describe how the token reduction that is drawn differs from the run's; empty where it does not.

    Args:
        drawn: its setting.
        run: the model that answered; None: it is not known.

    Raises:
        InputError: there is no such token reduction.
    """
    # Only drawing needs what imports torch.
    from llava.model.builder import read_config
    from llava.model.token_reduction import CONFIG_KEY, parse_reduction

    reduction = parse_reduction(drawn)
    if run is None:
        return f"drawn with {drawn}; the run's setting is not known"
    setting = run.reduce
    if setting is None and Path(run.path).is_dir():
        with suppress(InputError):  # loading it says what is wrong, where it is needed
            setting = getattr(read_config(run.path), CONFIG_KEY, None) or "none"
    if setting is None:
        return f"drawn with {drawn}; the run's setting is that of its checkpoint's config.json"
    return "" if parse_reduction(setting) == reduction else f"drawn with {drawn}; the run's setting is {setting}"


def load_run(run: DrawnRun, can_choose: bool) -> LoadedModel:
    """Load a run's model.

    Args:
        run: its model.
        can_choose: whether `--model-path` can name another.

    Raises:
        InputError: it cannot be loaded; where the `.run.json` names a folder that is not there, the message says so.
    """
    try:
        return run.spec.load()
    except InputError as error:
        if run.file is None or Path(run.spec.path).expanduser().is_dir():
            raise
        hint = "name the checkpoint by --model-path, or " * can_choose
        raise InputError(
            f"{run.file} names the model {run.spec.path}, which is not here: {error}; "
            f"{hint}start in the folder that the run was started in"
        ) from error


def asked(question: Question) -> Asked:
    """What a model's choice depends on."""
    return question.images, question.query, question.prompt


def look(run: DrawnRun, can_choose: bool, name: str, cases: Sequence[Listed]) -> dict[Asked, list["View"]]:
    """Compute what a run keeps of the images of some questions.

    Args:
        run: its model; loaded here, unless it reduces nothing.
        can_choose: see `load_run`.
        name: what the run is called in the figures.
        cases: whose images are looked at.

    Returns:
        What is drawn of each image; nothing for a run that keeps everything, and for questions with an image that
        cannot be read.
    """
    if run.spec.reduce == "none":
        return {}
    # Only drawing needs the model and the drawing library.
    from llava.image import load_image
    from llava.looks import look_at_images, make_ids, make_view
    from llava.mm_utils import process_images

    _, model, image_processor = load_run(run, can_choose)
    if model.token_reducer is None and model.layer_reducer is None:
        return {}
    grid, aspect_ratio = model.get_vision_tower().grid, getattr(model.config, "image_aspect_ratio", None)
    views = {}
    for images, query, prompt in dict.fromkeys(asked(listed.question) for listed in cases if listed.question.images):
        try:
            pixels = [load_image(image) for image in images]
            features = model.encode_patches(list(process_images(pixels, image_processor, model.config)))
            ids = make_ids(model, prompt, len(images), run.conv_mode)
            looks = look_at_images(model, features, [image.size for image in pixels], query, ids)
        except (ValueError, OSError):  # the question has no answer, or the figure says why
            continue
        views[images, query, prompt] = [
            make_view(image, own, grid, aspect_ratio, name) for image, own in zip(pixels, looks, strict=True)
        ]
    return views


def draw_listing(listing: Listing, runs: Sequence[DrawnRun | None], title: str, folder: Path) -> Path:
    """Draw every listed question into a PNG of its own, and a page that shows them all.

    The PNGs of the page that was there before are removed, if it is one of ours.

    Args:
        listing: what is listed.
        runs: the compared runs' models; None for one whose kept patches are not drawn.
        title: of the page.
        folder: where the files go.

    Returns:
        The page, `index.html`.
    """
    from llava.drawing import Drawing

    page = make_folder(folder) / "index.html"
    earlier, files = list_drawn(page), []
    # 1. What each run keeps of the images.
    cases = [listed for section in listing.sections for listed in section.cases]
    names = listing.names or [""]
    looks = [
        look(run, index == 0, name, cases) for index, (run, name) in enumerate(zip(runs, names, strict=True)) if run
    ]
    note = "; ".join(
        f"{name}: {run.note}" if name else run.note for run, name in zip(runs, names, strict=True) if run and run.note
    )
    # 2. A figure for each question.
    body = [f"<p>{html.escape(line)}</p>" for line in filter(None, [*listing.summary, note])]
    for section in listing.sections:
        body.append(f"<h2>{html.escape(section.title)} ({len(section.cases)} of {section.count})</h2>")
        for listed in section.cases:
            views, lines = _lay_out(listed, listing.names, looks)
            heading = f"question {listed.question.id}" + f" ({note})" * bool(note)
            heading += f"\n{listed.question.query or listed.question.prompt}"
            name = re.sub(r"[^A-Za-z0-9._-]+", "_", str(listed.question.id))[:60]
            files.append(f"{len(files) + 1:04d}_{name}.png")
            Drawing(views, heading, lines).write(folder / files[-1])
            body.append(_show_listed(listed, listing.names, files[-1]))
    # 3. The page; then what only the page before showed goes.
    colors = {"right": RIGHT_COLOR, "wrong": WRONG_COLOR}
    text = PAGE.format(title=html.escape(title), generator=GENERATOR, body="\n".join(body), **colors)
    write_text(page, text)
    for name in sorted(earlier - set(files)):
        with explain_errors("remove", folder / name):
            (folder / name).unlink(missing_ok=True)
    return page


def list_drawn(page: Path) -> set[str]:
    """List the PNGs that a page of ours shows; none where there is no page, or somebody else's."""
    if not page.is_file():
        return set()
    try:
        text = read_text(page)
    except FileError:
        return set()
    return set(re.findall(r'<img src="([0-9]{4,}_[A-Za-z0-9._-]*\.png)"', text)) if GENERATOR in text else set()


def _show_listed(listed: Listed, names: Sequence[str], file: str) -> str:
    """Write a question's part of the page: its image, and as text what was asked and answered."""
    caption = html.escape(name_listed(listed).removeprefix("question "))
    rows = [("question", listed.question.prompt, None), *describe_answers(listed, names)]
    classes = {None: "", True: ' class="right"', False: ' class="wrong"'}
    texts = "".join(
        f"<dt>{html.escape(name)}</dt><dd{classes[right]}>{html.escape(text)}</dd>" for name, text, right in rows
    )
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<a href="{file}"><img src="{file}" alt="{caption}" loading="lazy"></a><dl>{texts}</dl></figure>'
    )


def _lay_out(
    listed: Listed, names: Sequence[str], looks: Sequence[Mapping[Asked, Sequence["View"]]]
) -> tuple[list["View"], list["TextLine"]]:
    """Return the panels and the lines of text of a question's figure."""
    from llava.drawing import TextLine, View
    from llava.image import load_image

    colors = {None: "black", True: RIGHT_COLOR, False: WRONG_COLOR}
    lines = [TextLine(name, text, colors[right]) for name, text, right in describe_answers(listed, names)]
    views: list[View] = []
    for number, image in enumerate(listed.question.images):
        seen = [look[key][number] for look in looks if (key := asked(listed.question)) in look]
        try:
            views += seen or [View(load_image(image))]
        except InputError as error:
            lines.append(TextLine("image", str(error), WRONG_COLOR))
    return views, lines
