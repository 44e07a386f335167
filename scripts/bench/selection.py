"""The cost of choosing tokens: selection and text tower, compared with the vision tower.

Selection is everything between patches and projector: joint projection, dot products, quartiles, sorting, gathering,
the mean, and the wait for the counts. For methods that look at projected patches it includes projecting all of them.

    python -m scripts.bench.selection --batch-size 16
    python -m scripts.bench.selection --size large --reduce every --batch-size 1 16

`--reduce every` takes all registered methods, at a setting of 64 tokens where a method has no budget of its own.
`--size large` is the vision tower of LLaVA-1.5 (CLIP ViT-L/14 at 336 pixels) with its projector, and hardly a language
model.
"""
# ruff: noqa: T201

import argparse
from collections.abc import Callable
from typing import Any

from scripts.bench import side_by_side

EVERY = "every"


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16])
    parser.add_argument("--reduce", nargs="+", default=["TRIM:-1"], help=f'specs, or "{EVERY}" (default: TRIM:-1)')
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch

from llava.efficiency.timing import time_in_turns
from llava.errors import InputError, run_command
from llava.model.token_reduction import REDUCERS, TokenReducer, parse_reducer

NUM_TOKENS = 64


def choose_reducers(specs: list[str]) -> list[TokenReducer]:
    """Parse specs; `every` stands for all methods of the registry."""
    if specs == [EVERY]:
        return [
            method() if method.has_automatic_budget else method().at_budget(NUM_TOKENS) for method in REDUCERS.values()
        ]
    return [parse_reducer(spec) for spec in specs]


def measure(
    model: Any, reducers: list[TokenReducer], batch_size: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Time the towers and each reduction in turns, on random images: seconds by name."""
    tower, device = model.get_vision_tower(), model.device
    pixels = torch.randn(batch_size, 3, tower.image_size, tower.image_size, device=device)
    queries = [f"Is there a thing with the number {row} in the image?" for row in range(batch_size)]
    with torch.inference_mode():
        # The tower runs once for all reductions, with all that they look at.
        needs = frozenset().union(*(reducer.needs for reducer in reducers))
        patches = tower.extract(pixels, needs).split([1] * batch_size)
        text = tower.embed_text(queries)

        def select(reducer: TokenReducer) -> Callable[[], object]:
            def run() -> object:
                model.token_reducer = reducer
                return model.choose_tokens(patches, queries, text)

            return run

        candidates: dict[str, Callable[[], object]] = {
            "vision tower": lambda: tower.extract(pixels),
            "text tower, all queries": lambda: tower.embed_text(queries),
            "text tower, one query": lambda: tower.embed_text(queries[:1]),
        }
        selections = {f"selection {reducer.spec()}": select(reducer) for reducer in reducers}
        return time_in_turns(candidates | selections, repeats=args.rounds, device=device)


def main() -> None:
    args = make_parser().parse_args()
    reducers = choose_reducers(args.reduce)
    num_layers = side_by_side.SIZES[args.size][1]["vision_config"]["num_hidden_layers"]
    for reducer in list(reducers):
        deep = [need for need in reducer.needs if need.layer is not None and abs(need.layer) > num_layers]
        if deep and args.reduce != [EVERY]:
            raise InputError(f"{reducer.spec()}: {deep[0]}: this tower has {num_layers} layers")
        if deep:
            reducers.remove(reducer)
            print(f"left out: {reducer.spec()}: {deep[0]}: this tower has {num_layers} layers")
    model, _ = side_by_side.build_model(args, needs=frozenset().union(*(reducer.needs for reducer in reducers)))
    figures = {}
    for batch_size in args.batch_size:
        seconds = measure(model, reducers, batch_size, args)
        print(f"{model.get_vision_tower().num_patches} patches, batch {batch_size}, {args.dtype}")
        side_by_side.tell_times(seconds)
        ratios = {
            name: side_by_side.tell_ratio(f"{name} over vision tower", values, seconds["vision tower"])
            for name, values in seconds.items()
            if name.startswith("selection")
        }
        figures[str(batch_size)] = {"seconds": seconds, "ratios": ratios}
    side_by_side.write_figures({"options": {k: str(v) for k, v in vars(args).items()}, "batches": figures}, args.json)


if __name__ == "__main__":
    run_command(main)
