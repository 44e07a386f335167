"""Draw which patches a question keeps, for one method or several, and which dropped ones the answer needs.

`python -m llava.visualize --model-path CKPT --image-file IMG --query TEXT --out OUT.png [--reduce SPEC ...]`

The figure shows the image once, then for each method the kept patches, outlined, with the dropped ones dimmed, and
each patch's score with a color scale. A method inside the language model has a panel for each stretch of layers. For
several questions it shows the image once, then the patches that one method keeps for each. `--html` draws many
questions, of a file, on one page.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.cli import ModelSpec, add_model_options, choose_template, positive, user_path
from llava.contact_sheet import LIMIT, Asked, list_answers, read_questions, take, write_sheet
from llava.drawing import Drawing, Panel, TextLine, find_format
from llava.errors import InputError, one_line, run_command
from llava.image import load_image
from llava.prompt import DEFAULT_CONV_MODE, check_conv_mode
from llava.terminal import find_width, lay_out

if TYPE_CHECKING:
    from PIL import Image

    from llava.looks import Case, Look
    from llava.model.language_model.causal import LlavaCausalLM
    from llava.model.token_reduction import Reduction
    from llava.protocols import ImageProcessor
    from llava.what_if import WhatIf

# Functions import torch: the command answers --help and mistaken options before that.

MAX_NEW_TOKENS = 32
OTHER = "#c0262d"
"""Color of an answer that is not the full model's."""
KEEPS_ALL = 'this checkpoint keeps every patch: name a token reduction, such as --reduce "TRIM:-1"'


def visualize(
    model: "LlavaCausalLM",
    image_processor: "ImageProcessor",
    image: "Image.Image",
    question: str,
    specs: Sequence[str] = (),
    conv_mode: str = DEFAULT_CONV_MODE,
) -> "Image.Image":
    """Draw what token reductions keep of an image for a question.

    Args:
        model: its tokenizer is attached.
        image_processor: of its vision tower.
        image: mode RGB.
        question: the user's text.
        specs: the methods; none: the model's own.
        conv_mode: conversation template, where a method works inside the language model.

    Raises:
        InputError: a spec keeps every patch or cannot be served, or the question is one that no tokenizer takes.
    """
    from llava.looks import look_at, prepare

    reductions = read_reductions(model, specs)
    case = prepare(model, image_processor, image, question, reductions, conv_mode)
    return draw_looks(model, case, [look_at(model, case, reduction) for reduction in reductions]).image()


def read_reductions(model: "LlavaCausalLM", specs: Sequence[str]) -> "list[Reduction]":
    """Read the spec strings of methods; without any, the one that the model has.

    Raises:
        InputError: one of them does not parse, keeps every patch, or is there twice.
    """
    from llava.model.token_reduction import Reduction, parse_reduction

    reductions = [parse_reduction(spec) for spec in specs] or [Reduction(model.token_reducer, model.layer_reducer)]
    if Reduction() in reductions:
        raise InputError("--reduce none keeps every patch: leave it out" if len(reductions) > 1 else KEEPS_ALL)
    twice = next((each for number, each in enumerate(reductions) if each in reductions[:number]), None)
    if twice is not None:
        raise InputError(f"--reduce names {twice.spec()} twice: leave one out")
    return reductions


def draw_looks(
    model: "LlavaCausalLM",
    case: "Case",
    looks: "Sequence[Look]",
    lines: Sequence[TextLine] = (),
    extra: Sequence[Panel] = (),
) -> Drawing:
    """Draw what methods leave of a case.

    Args:
        model: that was looked at.
        case: the image and the question.
        looks: one for each method.
        lines: above the panels; none: how many tokens are read.
        extra: panels behind those of the last look.
    """
    from llava.chat import describe_tokens
    from llava.looks import make_view

    grid, aspect_ratio = model.get_vision_tower().grid, getattr(model.config, "image_aspect_ratio", None)
    views = [make_view(case.image, look, grid, aspect_ratio) for look in looks]
    if extra:
        views[-1] = replace(views[-1], panels=[*views[-1].panels, *extra])
    if not lines and len(looks) == 1:
        (look,) = looks
        name, _, text = describe_tokens(look.tokens.num_tokens, look.tokens.num_patches).partition(": ")
        lines = [TextLine(name, text if look.reduction.inside is None else look.describe_tokens())]
    return Drawing(views, case.question, lines)


def draw_questions(
    model: "LlavaCausalLM", cases: "Sequence[Case]", looks: "Sequence[Look]", answers: Sequence[str]
) -> Drawing:
    """Draw what one method leaves of an image for several questions.

    Args:
        model: that was looked at.
        cases: the same image with each question.
        looks: one for each.
        answers: to each question; none: they are not shown.
    """
    from llava.looks import make_view

    grid, aspect_ratio = model.get_vision_tower().grid, getattr(model.config, "image_aspect_ratio", None)
    views = []
    for number, (case, look) in enumerate(zip(cases, looks, strict=True)):
        caption = one_line(f"{case.question} {answers[number]}" if answers else case.question)
        view = make_view(case.image, look, grid, aspect_ratio, caption)
        views.append(replace(view, panels=[panel for panel in view.panels if panel.scores is None]))
    return Drawing(views, looks[0].reduction.spec())


def answer_questions(
    model: "LlavaCausalLM", cases: "Sequence[Case]", looks: "Sequence[Look]", max_new_tokens: int
) -> list[str]:
    """Answer each question with what is left of the image, and print the answers."""
    from llava.sampling import Sampling
    from llava.what_if import ask, show

    sampling, answers = Sampling(max_new_tokens=max_new_tokens), []
    for case, look in zip(cases, looks, strict=True):
        answers += map(show, ask(model, case, sampling, [look.tokens], look.reduction))
    rows = zip(cases, answers, looks, strict=True)
    print_table([(one_line(case.question), answer, look.describe_tokens()) for case, answer, look in rows])
    return answers


def show_answers(model: "LlavaCausalLM", case: "Case", looks: "Sequence[Look]", max_new_tokens: int) -> Drawing:
    """Print the answers of the full model and of each method, and draw them with what was kept."""
    from llava.what_if import is_same

    answers = list_answers(model, case, looks, max_new_tokens)
    print_table(answers)
    lines = [
        TextLine(name, f"{answer}  ({count})", "black" if is_same(answer, answers[0][1]) else OTHER)
        for name, answer, count in answers
    ]
    return draw_looks(model, case, looks, lines)


def show_what_if(
    model: "LlavaCausalLM", case: "Case", reduction: "Reduction", max_new_tokens: int, side: int | None
) -> Drawing:
    """Print the answer with each block of dropped patches, and draw which blocks bring the full model's back."""
    from llava.sampling import Sampling
    from llava.what_if import FULL, show, try_blocks

    what_if = try_blocks(model, case, reduction, Sampling(max_new_tokens=max_new_tokens), side)
    print_table(list_trials(what_if))
    sys.stdout.write(f"{what_if.summary()}\n")
    own, color = f"{show(what_if.own)}  ({what_if.summary()})", OTHER if what_if.is_lost else "black"
    lines = [TextLine(FULL, show(what_if.full)), TextLine(reduction.spec(), own, color)]
    meaning = "orange: another answer"
    if what_if.is_lost:
        meaning = f"green: the full model's answer; {meaning}"
    trial = what_if.trials[0]
    side = max(trial.rows[1] - trial.rows[0], trial.cols[1] - trial.cols[0])
    kept = what_if.look.stages[-1].kept.reshape(model.get_vision_tower().grid).numpy()
    panel = Panel(f"each block of {side} x {side} patches given back alone\n{meaning}", kept, blocks=what_if.blocks())
    return draw_looks(model, case, [what_if.look], lines, [panel])


def list_trials(what_if: "WhatIf") -> list[tuple[str, ...]]:
    """List blocks and answers: rows of (block, patches given back, answer, what it means)."""
    from llava.what_if import show

    rows: list[tuple[str, ...]] = [
        ("given back", "patches", "answer", ""),
        ("everything", "", show(what_if.full), "the full model"),
        ("nothing", "0", show(what_if.own), what_if.look.reduction.spec()),
    ]
    for trial in what_if.trials:
        block = f"rows {trial.rows[0]}-{trial.rows[1] - 1}, columns {trial.cols[0]}-{trial.cols[1] - 1}"
        note = "nothing was dropped here" if not trial.num_patches else "brings it back" * what_if.brings_back(trial)
        rows.append((block, str(trial.num_patches), show(trial.answer), note))
    return rows


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts in columns."""
    sys.stdout.write(lay_out(None, rows, width=find_width()) + "\n")


def main() -> None:
    args = make_parser().parse_args()
    # 1. What needs no library.
    specs = args.reduce or []
    check_options(args, specs)
    asked = read_asked(args)
    image = None if args.html else load_image(args.image_file, upright=True)
    # 2. The model, and budgets that have to be found.
    spec = ModelSpec.from_options(args, reduce=None)
    specs = [replace(spec, reduce=each).resolve().reduce for each in specs]
    _, model, image_processor = replace(spec, reduce=specs[0] if specs else None, calibrated=None).load(quiet=True)
    # 3. The prompt matters where something is answered, or a method works inside the language model.
    from llava.looks import ask_else, look_at, prepare

    reductions = read_reductions(model, specs)
    answers = args.answer or args.what_if
    reads_prompt = answers or any(reduction.inside is not None for reduction in reductions)
    conv_mode = choose_template(args, model.config) if reads_prompt else DEFAULT_CONV_MODE
    limit = args.max_new_tokens or MAX_NEW_TOKENS
    if args.html:
        write_sheet(args.html, asked, model, image_processor, reductions, conv_mode, limit if args.answer else None)
        sys.stdout.write(f"written to {args.html}\n")
        return
    first, *further = args.query
    case = prepare(model, image_processor, image, first, reductions, conv_mode)
    # 4. Look and draw.
    if further:
        cases = [case, *(ask_else(model, case, question, conv_mode) for question in further)]
        looks = [look_at(model, each, reductions[0]) for each in cases]
        answered = answer_questions(model, cases, looks, limit) if args.answer else []
        drawing = draw_questions(model, cases, looks, answered)
    elif args.what_if:
        drawing = show_what_if(model, case, reductions[0], limit, args.block)
    else:
        looks = [look_at(model, case, reduction) for reduction in reductions]
        drawing = show_answers(model, case, looks, limit) if args.answer else draw_looks(model, case, looks)
    drawing.write(args.out)
    sys.stdout.write(f"written to {args.out}\n")


def check_options(args: argparse.Namespace, specs: Sequence[str]) -> None:
    """Check what can be said before anything is loaded.

    Raises:
        InputError: an empty question, an unknown template, or options that do not go together.
    """
    _check_place(args)
    if not all(question.strip() for question in args.query or []):
        raise InputError("--query is empty: write what you want to know about the image")
    if args.html is None and len(args.query) > 1:
        _check_several(args, specs)
    if args.conv_mode is not None:
        check_conv_mode(args.conv_mode)
    if args.what_if and len(specs) > 1:
        raise InputError(f"--what-if tries one method, and --reduce names {len(specs)}: choose one")
    if args.what_if and args.answer:
        raise InputError("--what-if prints the answers already: leave out --answer")
    if args.block is not None and not args.what_if:
        raise InputError("--block has no effect without --what-if: add that or leave it out")
    if args.max_new_tokens is not None and not (args.answer or args.what_if):
        raise InputError("--max-new-tokens has no effect without --answer or --what-if: add one or leave it out")


def _check_place(args: argparse.Namespace) -> None:
    """Check what is drawn, and where: one image to `--out` or `--html`, the questions of a file to `--html`."""
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if (args.out is None) is (args.html is None):
        raise InputError("name one place: --out FILE for a drawing, or --html FILE for a page of many questions")
    if args.questions is not None and given & {"image_file", "query", "out"}:
        raise InputError("--questions has images and questions: leave out --image-file, --query and --out, use --html")
    if args.questions is None and not {"image_file", "query"} <= given:
        raise InputError("--image-file and --query are needed: an image and what you want to know about it")
    if args.questions is None and (own := given & {"image_folder", "answers", "limit"}):
        raise InputError(f"--{min(own).replace('_', '-')} has no effect without --questions: add that or leave it out")
    if args.html is None:
        find_format(args.out)
    elif args.html.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html {args.html}: a page is a .html file")
    elif args.what_if:
        raise InputError("--what-if is a drawing of its own: use --out, not --html")


def read_asked(args: argparse.Namespace) -> list[Asked]:
    """List the questions of a page: a file's, or those of the options."""
    if args.questions is None:
        return [Asked(args.image_file, question) for question in args.query]
    return take(read_questions(args.questions, args.image_folder, args.answers), args.limit)


def _check_several(args: argparse.Namespace, specs: Sequence[str]) -> None:
    """Check the options of several questions."""
    if args.what_if:
        raise InputError(f"--what-if is about one question, and there are {len(args.query)} --query: choose one")
    if len(specs) > 1:
        raise InputError(
            f"there are {len(args.query)} --query, and --reduce names {len(specs)} methods: several of one and one of "
            "the other can be drawn"
        )


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.visualize", description=__doc__.split("\n")[0])
    add_model_options(parser, several=True)
    parser.add_argument("--image-file", metavar="FILE", help="image file or http(s) address")
    parser.add_argument(
        "--query",
        action="append",
        metavar="TEXT",
        help="the question; repeat it to draw several side by side",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the drawing: a .png, or a .pdf or .svg whose outlines are vectors"
    )
    parser.add_argument(
        "--html",
        type=user_path,
        metavar="FILE",
        help="in place of it a page of many questions and methods, one file",
    )
    parser.add_argument(
        "--questions",
        type=user_path,
        metavar="FILE",
        help="with --html: JSON Lines of images and questions, such as LLaVA's question files",
    )
    parser.add_argument(
        "--image-folder", type=user_path, metavar="DIR", help="of the images in --questions (its own folder)"
    )
    parser.add_argument("--answers", type=user_path, metavar="FILE", help="answers file to show with --questions")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help=f"draw the first N of --questions (the first {LIMIT})"
    )
    parser.add_argument(
        "--answer", action="store_true", help="answer, too: print the full model's answer and each method's"
    )
    parser.add_argument(
        "--what-if",
        action="store_true",
        help="give the dropped patches back block by block: print the answers, draw which blocks bring the full "
        "model's answer back",
    )
    parser.add_argument(
        "--block", type=positive, metavar="N", help="patches on a block's side (4; on small grids fewer)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help=f"length limit of an answer ({MAX_NEW_TOKENS})"
    )
    parser.add_argument(
        "--conv-mode", metavar="NAME", help="conversation template (default: from the checkpoint's name)"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
