"""Training steps with a token reduction and without: time, ratio and peak memory, in one run.

A step is one of finetuning: vision tower, reduction, projector, language model, loss, gradients, AdamW. The batch is
synthetic, with its images already decoded.

    python -m scripts.bench.train_speed                  the pocket model, then the mid-size model with random weights
    python -m scripts.bench.train_speed --only pocket
"""
# ruff: noqa: T201

import argparse
from collections.abc import Callable
from typing import Any

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--only", choices=("pocket", "random"), help="measure only one of the two models")
    parser.add_argument("--reduce", default="TRIM:-1")
    parser.add_argument("--kept", type=float, default=0.21, help="share of the patches to keep (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--pocket-batch", type=int, default=32)
    parser.add_argument("--random-batch", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.efficiency.estimate import fix_kept
from llava.efficiency.memory import measure_peak
from llava.efficiency.timing import time_in_turns
from llava.errors import run_command
from llava.model.builder import load_pretrained_model
from llava.model.token_reduction import parse_reducer

NONE = "none"
ANSWER_SHARE = 0.5  # the share of the text that enters the loss
LEARNING_RATE = 1e-6  # small, so that all steps are alike


def make_training_batch(model: Any, batch_size: int, text_tokens: int) -> dict[str, Any]:
    """Make a synthetic batch: one image and `text_tokens` ids per sample; the later ids enter the loss."""
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(3, model.config.vocab_size, (batch_size, text_tokens + 1), generator=generator)
    ids[:, 1] = IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, : int((1 - ANSWER_SHARE) * text_tokens) + 1] = IGNORE_INDEX
    side = model.get_vision_tower().image_size
    return {
        # On the host, as the trainer leaves them.
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": torch.randn(batch_size, 3, side, side, generator=generator).to(device),
        "texts": [f"Is there a thing with the number {row} in the image?" for row in range(batch_size)],
    }


def make_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict, reducer: Any) -> Callable[[], None]:
    """Return a training step with a reducer, or without reduction if it is None."""

    def step() -> None:
        model.token_reducer = reducer
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, model: Any, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model and print its figures."""
    model.train()
    model.get_vision_tower().freeze()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)
    batch = make_training_batch(model, batch_size, args.text_tokens)
    num_patches = model.get_vision_tower().num_patches
    reducers = {args.reduce: fix_kept(parse_reducer(args.reduce), num_patches, args.kept), NONE: None}
    steps = {label: make_step(model, optimizer, batch, reducer) for label, reducer in reducers.items()}
    seconds = time_in_turns(steps, repeats=args.rounds, device=batch["images"].device)
    peaks = {label: measure_peak(step, batch["images"].device) for label, step in steps.items()}
    kept = round(args.kept * num_patches)
    print(f"\n{name}: batch {batch_size}, {num_patches} patches, {kept} of them kept, {args.text_tokens} text tokens")
    side_by_side.tell_times(seconds, dict.fromkeys(seconds, 1))
    ratio = side_by_side.tell_ratio("steps per second, with over without", seconds[NONE], seconds[args.reduce])
    for label, peak in peaks.items():
        print(f"peak of a step, {label}: {'unknown' if peak is None else f'{peak / 2**20:.0f} MiB over the weights'}")
    return {"seconds": seconds, "ratio": ratio, "peak_bytes": peaks, "batch_size": batch_size}


def main() -> None:
    args = make_parser().parse_args()
    figures = {}
    if args.only != "random":
        checkpoint = str(side_by_side.CHECKPOINT)
        model = load_pretrained_model(checkpoint, device=args.device, dtype=args.dtype, reduce=args.reduce)[1]
        figures["pocket"] = measure("pocket model", model, args.pocket_batch, args)
    if args.only != "pocket":
        model, _ = side_by_side.build_model(args)
        figures[args.size] = measure(f"{args.size} model, random weights", model, args.random_batch, args)
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
