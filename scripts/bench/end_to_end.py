"""Time from image file to answer with a token reduction and without, compared with what the FLOP count predicts.

The model has random weights and is bound by arithmetic. The answer is one token, so the prefill dominates.

    python -m scripts.bench.end_to_end --kept 0.21
"""
# ruff: noqa: T201

import argparse

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--reduce", default="TRIM:-1")
    parser.add_argument("--kept", type=float, default=0.21, help="share of the patches to keep (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=1)
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

from llava.efficiency import report
from llava.efficiency.cost import Precision, Workload
from llava.efficiency.estimate import count_left, fix_kept
from llava.efficiency.shapes import read_shape
from llava.efficiency.stages import Runner, make_batch, measure_reductions
from llava.errors import run_command
from llava.model.token_reduction import Reduction, parse_reducer

NONE = "none"


def main() -> None:
    args = make_parser().parse_args()
    model, image_processor = side_by_side.build_model(args)
    shape = read_shape(*side_by_side.SIZES[args.size], origin=args.size)
    grid = model.get_vision_tower().grid
    reducers = {args.reduce: fix_kept(parse_reducer(args.reduce), grid[0] * grid[1], args.kept), NONE: None}
    work = Workload(args.batch_size, args.prompt_tokens, shape.tower.text_context, args.new_tokens)
    batch = make_batch(
        work.batch_size, work.prompt_tokens, work.new_tokens,
        vocab_size=shape.language.vocabulary, image_size=(640, 480),
    )  # fmt: skip
    reductions = {label: Reduction(reducer) for label, reducer in reducers.items()}
    measured = measure_reductions(Runner(model, image_processor), batch, reductions, repeats=args.rounds, warmup=1)
    runs = [
        report.Run(label, count_left(reducer, grid), f"--kept {args.kept}" if reducer else "", measured[label])
        for label, reducer in reducers.items()
    ]
    size = {"float32": 4}.get(args.dtype, 2)
    setting = report.Setting(f"{args.size} model, random weights", shape, work, Precision(size, size), {})
    figures = report.describe(setting, runs)
    print(report.format_table(figures))
    predicted, found = figures["ratios"][0]["total_flops"], figures["ratios"][0]["end_to_end_seconds"]["median"]
    print(
        f"{NONE} over {args.reduce}: predicted by FLOPs {predicted:.2f}, measured {found:.2f} ({found / predicted:.2f})"
    )
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
