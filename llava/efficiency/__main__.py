"""Count and measure what a model costs with a token reduction, stage by stage.

    python -m llava.efficiency --model-path llava-v1.5-7b --reduce TRIM:-1 --against none

counts from the shapes alone, within seconds and without weights. A folder with weights is measured as well, and
`--random-weights` measures any shape without a download. FLOPs: a multiply-add is two; logits at every position, as in
papers, are listed beside what `generate` really does.
"""
# ruff: noqa: T201

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli import ModelSpec, add_model_options, positive
from llava.drawing import find_format
from llava.efficiency.cost import Precision, Workload
from llava.efficiency.shapes import ModelSource, read_source
from llava.errors import InputError, run_command
from llava.files import parse_natural, write_json

if TYPE_CHECKING:
    from llava.budgets import FoundBudget
    from llava.model.token_reduction import Target

CONFIG_KEY = "mm_vision_token_reduce_func"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def make_parser() -> argparse.ArgumentParser:
    """Build the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(
        parser, "folder (a config.json is enough to count), or a name such as llava-v1.5-7b, llava-v1.5-13b", base=False
    )
    add(
        "--against",
        metavar="SPEC",
        nargs="+",
        default=[],
        help='further token reductions, measured in turns with the first, such as "none"',
    )
    add("--kept", type=float, metavar="SHARE", help="share of patches that an automatic budget keeps; default: what it "
        "keeps of --image-file for --query where there are weights, else 0.21, the mean of the paper")  # fmt: skip
    add("--image-file", metavar="FILE", help="image to measure with; default: a drawn one")
    add("--query", metavar="TEXT", help="question that the CLIP text tower reads")
    add("--image-size", default="640x480", metavar="WxH", help="size of the drawn image (default: %(default)s)")
    add("--batch-size", type=positive, default=1, help="questions at once (default: %(default)s)")
    add("--prompt-tokens", type=positive, default=64, help="tokens of the prompt besides the image's (default: 64)")
    add("--new-tokens", type=positive, default=16, help="tokens of the answer (default: %(default)s)")
    add("--random-weights", action="store_true", help="build the shapes with random weights and measure them")
    add("--count-only", action="store_true", help="do not measure, even where there are weights")
    add("--compile", action="store_true", help="decode with a static cache and torch.compile")
    add("--repeats", type=positive, default=7, help="measured rounds (default: %(default)s)")
    add("--warmup", type=positive, default=2, help="rounds before them (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="draw the stages as stacked bars: a .png, .pdf or .svg")
    return parser


def main() -> None:
    """Run the command."""
    args = make_parser().parse_args()
    check_options(args)
    source = read_source(args.model_path)
    measures = (source.has_weights or args.random_weights) and not args.count_only
    args.dtype = args.dtype or choose_dtype(args, source, measures)
    from llava.efficiency import report
    from llava.efficiency.runs import count_run, find_by_time, measure_runs, prepare

    # 1. What is asked for, counted; a target in milliseconds with all patches, as long as it has no budget.
    precision = Precision(BYTES[args.dtype], BYTES[args.tower_dtype])
    work = Workload(args.batch_size, args.prompt_tokens, source.shape.tower.text_context, args.new_tokens)
    wanted, found = choose_specs(args, source, work)
    timed = read_timed(wanted, measures)
    specs = [keep_all(timed[spec], source) if spec in timed else spec for spec in wanted]
    runs = [count_run(spec, source, args.kept) for spec in specs]
    check_context(source, work, runs)
    description: dict[str, Any] = {"dtype": args.dtype, "tower_dtype": args.tower_dtype}
    # 2. Measured.
    if measures:
        runner, batch = prepare(args, source, specs, work, precision)
        by_time = {spec: find_by_time(target, runner, batch, source, work, args) for spec, target in timed.items()}
        found += by_time.values()
        specs = [by_time[spec].spec if spec in by_time else spec for spec in wanted]
        runs, machine = measure_runs(args, source, specs, runner, batch)
        description |= machine
    # 3. Told.
    if found:
        description["targets"] = [each.to_json() for each in found]
        print(*found, sep="\n")
    setting = report.Setting(source.name, source.shape, work, precision, description)
    figures = report.describe(setting, runs)
    print(report.format_table(figures))
    if args.json:
        write_json(args.json, figures, indent=2)
        print(f"written to {args.json}")
    if args.plot:
        report.draw_bars(figures, args.plot)
        print(f"written to {args.plot}")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that make no sense before anything is loaded.

    Raises:
        InputError: naming the option.
    """
    if args.kept is not None and not 0 < args.kept <= 1:
        raise InputError(f"--kept {args.kept:g} is no share: use a number above 0 and up to 1")
    if args.random_weights and args.image_file:
        raise InputError("--image-file says nothing with --random-weights: random weights choose at random")
    if args.random_weights and args.count_only:
        raise InputError("--random-weights measures, --count-only does not: leave one of them out")
    if args.plot:
        find_format(args.plot)
    ModelSpec.from_options(args)  # refuses an unknown dtype
    args.tower_dtype = args.tower_dtype or "float32"
    args.image_size = read_size(args.image_size)


def read_size(text: str) -> tuple[int, int]:
    """Read `WxH`, or one number for a square.

    Raises:
        InputError: for something else.
    """
    sides = [parse_natural(word) for word in text.lower().split("x")]
    if len(sides) > 2 or not all(sides):
        raise InputError(f"--image-size {text}: expected WIDTHxHEIGHT in pixels, such as 640x480")
    return sides[0], sides[-1]


def choose_dtype(args: argparse.Namespace, source: ModelSource, measures: bool) -> str:
    """Return the dtype where none was given: that of the loader; half precision where nothing is loaded."""
    if not measures:
        return "float16"
    from llava.model.builder import choose_device

    return "float32" if choose_device(args.device).startswith("cpu") else "float16"


def choose_specs(
    args: argparse.Namespace, source: ModelSource, work: Workload
) -> "tuple[list[str], list[FoundBudget]]":
    """Return the spec strings of the runs, all different, and what was found for targets among them.

    A target in milliseconds stays as it is: its budget has to be measured.

    Raises:
        InputError: for a spec that does not parse, a target out of reach, or the same spec twice.
    """
    from llava.budgets import assume_mean, find_budget, find_by_flops
    from llava.model.token_reduction import parse_reduction, read_target

    given = [args.reduce if args.reduce is not None else source.config.get(CONFIG_KEY), *args.against]
    specs, found = [], []
    for spec in given:
        target = read_target(spec)
        if target is None:
            specs.append(parse_reduction(spec).spec() or "none")
            continue
        if target.kind == "ms":
            specs.append(str(target))
            continue
        if target.kind == "flops":
            found.append(find_by_flops(target, source, work))
        elif args.calibrated is not None:
            found.append(find_budget(spec, args.model_path, None, args.calibrated))
        else:
            found.append(assume_mean(target))
        specs.append(found[-1].spec)
    twice = next((spec for number, spec in enumerate(specs) if spec in specs[:number]), None)
    if twice is not None:
        raise InputError(f"--reduce and --against name {twice} twice: there is nothing to compare")
    return specs, found


def read_timed(specs: list[str], measures: bool) -> "dict[str, Target]":
    """Return those of the specs that are targets in milliseconds.

    Raises:
        InputError: there is one, and nothing is measured.
    """
    from llava.model.token_reduction import read_target

    timed = {spec: target for spec in specs if (target := read_target(spec)) is not None}
    if timed and not measures:
        raise InputError(
            f"{next(iter(timed))}: milliseconds have to be measured: give a folder with weights, or --random-weights, "
            "and leave out --count-only"
        )
    return timed


def keep_all(target: "Target", source: ModelSource) -> str:
    """Spell a target's method with a budget of all patches."""
    from llava.efficiency.targets import at_count

    num_patches = source.shape.tower.num_patches
    return str(at_count(target, num_patches, num_patches).spec())


def check_context(source: ModelSource, work: Workload, runs: list[Any]) -> None:
    """Refuse prompts that the model has no positions for.

    Raises:
        InputError: with the numbers.
    """
    limit = int(source.config.get("max_position_embeddings") or 0)
    longest = work.prompt_tokens + work.new_tokens + max(run.reduction.num_tokens for run in runs)
    if limit and longest > limit:
        raise InputError(
            f"{longest} positions (prompt, image tokens and answer) are more than the {limit} of {source.name}: "
            "take fewer --prompt-tokens or --new-tokens"
        )


if __name__ == "__main__":
    run_command(main)
