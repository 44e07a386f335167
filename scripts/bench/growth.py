"""How time grows with images per prompt, questions per image, and patches, with a token reduction and without.

python -m scripts.bench.growth
"""
# ruff: noqa: T201

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--reduce", default="TRIM:-1")
    parser.add_argument("--kept", type=float, default=0.21)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 24], help="patches per side of an image")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.estimate import fix_kept
from llava.efficiency.timing import Spread, time_in_turns
from llava.errors import run_command
from llava.model.token_reduction import parse_reducer

PROMPT_TOKENS = 64
PATCH_SIZE = 14


class Case:
    """A model that answers with one token, with the reduction and without."""

    def __init__(self, model: Any, kept_ratio: float, spec: str):
        """Fix the share of patches that the reduction keeps."""
        grid = model.get_vision_tower().grid
        self.model = model
        self.reducers = {spec: fix_kept(parse_reducer(spec), grid[0] * grid[1], kept_ratio), "none": None}

    def ask(self, label: str, num_images: int, num_questions: int) -> None:
        """Encode the images once, then ask `num_questions` questions about all of them, one after another."""
        self.model.token_reducer = self.reducers[label]
        side = self.model.get_vision_tower().image_size
        patches = self.model.encode_patches(torch.rand(num_images, 3, side, side))
        for number in range(num_questions):
            texts = [f"Is there a thing with the number {number} in the image?"] * num_images
            self.model.generate(
                make_ids(num_images),
                image_tokens=self.model.make_image_tokens(patches, texts),
                do_sample=False,
                max_new_tokens=1,
            )


def make_ids(num_images: int) -> Tensor:
    """Make a synthetic prompt: `int64[1, num_images + PROMPT_TOKENS]`."""
    return torch.tensor([[IMAGE_TOKEN_INDEX] * num_images + list(range(3, 3 + PROMPT_TOKENS))])


def main() -> None:
    args = make_parser().parse_args()
    figures: dict[str, Any] = {}

    def sweep(title: str, cases: dict[int, tuple[Case, Callable[[Case, str], None]]]) -> None:
        print(f"\n{title}: ms per round, median [quartiles]")
        figures[title] = {}
        for value, (case, run) in cases.items():
            candidates = {label: partial(run, case, label) for label in case.reducers}
            with torch.inference_mode():
                seconds = time_in_turns(candidates, repeats=args.rounds, device=case.model.device)
            cells = "".join(f"{label:>12} {Spread.of(each).format(1e3):<28}" for label, each in seconds.items())
            print(f"{value:>6}{cells}", end="")
            side_by_side.tell_ratio(f"none over {args.reduce}", seconds["none"], seconds[args.reduce])
            figures[title][value] = seconds

    whole = Case(side_by_side.build_model(args)[0], args.kept, args.reduce)
    sweep("pictures per prompt", {n: (whole, lambda case, label, n=n: case.ask(label, n, 1)) for n in args.images})
    sweep("questions per picture", {n: (whole, lambda case, label, n=n: case.ask(label, 1, n)) for n in args.questions})
    sides = {
        n * n: (
            Case(side_by_side.build_model(args, image_size=n * PATCH_SIZE)[0], args.kept, args.reduce),
            lambda case, label: case.ask(label, 1, 1),
        )
        for n in args.sides
    }
    sweep("patches", sides)
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
