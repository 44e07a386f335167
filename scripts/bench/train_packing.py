"""Training passes over samples of mixed lengths: grouped and packed in each way, padding and time, in one run.

A pass is the vision tower, the reduction, the projector, the language model, the loss and the gradients of every batch
of a set of samples; the optimizer's step, which is the same for all, is left out. The samples are made up: 6 % are text
alone (as in LLaVA-1.5's data), and lengths of texts are drawn from wide distributions.

    python -m scripts.bench.train_packing                  the pocket model, then the mid-size model with random weights
    python -m scripts.bench.train_packing --only pocket
    python -m scripts.bench.train_packing --only padding   no model: the padding of many samples, at 7B's shape
"""
# ruff: noqa: T201

import argparse

from scripts.bench import side_by_side

ORDERS = ("random", "modality", "reduced")
PUBLISHED = "modality"


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--only", choices=("pocket", "random", "padding"), help="measure only one of the three")
    parser.add_argument("--reduce", default="TRIM:-1")
    parser.add_argument("--kept", type=float, default=0.21, help="share of the patches to keep (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--group", type=int, default=128, help="samples of a step on all ranks (default: %(default)s)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=[PUBLISHED, "reduced"])
    parser.add_argument("--pocket-samples", type=int, default=256)
    parser.add_argument("--random-samples", type=int, default=32)
    parser.add_argument("--layers", type=int, help="decoder layers of the random model, to make it smaller")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted (default: %(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from llava.budgets import expect_tokens
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.efficiency.estimate import fix_kept
from llava.efficiency.random_model import build_random_model
from llava.efficiency.timing import time_in_turns
from llava.errors import run_command
from llava.model.builder import load_pretrained_model
from llava.model.packing import find_even_width, plan_rows
from llava.model.token_reduction import parse_reducer
from llava.train.sampler import POOLED_GROUPS, ModalityLengthSampler

SEED = 20240918
TEXT_ONLY_SHARE = 0.06
# Medians of the lengths of texts, in tokens, and the spread of their logarithms.
WITH_IMAGE, ALONE = (150, 0.7), (500, 0.9)
LIMIT = 2048
MANY = 20_000
GRID = (24, 24)
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}


@dataclass(frozen=True)
class Drawn:
    """A made-up sample: tokens of its text, and whether it has an image."""

    num_text: int
    has_image: bool


def draw_samples(count: int, scale: float) -> list[Drawn]:
    """Draw samples with a fixed seed; `scale` stretches their texts."""
    generator = random.Random(SEED)
    drawn = []
    for _ in range(count):
        has_image = generator.random() >= TEXT_ONLY_SHARE
        median, spread = WITH_IMAGE if has_image else ALONE
        length = median * scale * generator.lognormvariate(0, spread)
        drawn.append(Drawn(min(max(int(length), 8), LIMIT), has_image))
    return drawn


def count_positions(sample: Drawn, num_left: int, limit: int) -> int:
    """Count what the language model reads of a sample whose image leaves `num_left` tokens."""
    return min(limit, sample.num_text + num_left * sample.has_image)


def make_batches(order: str, drawn: Sequence[Drawn], lengths: Sequence[int], args: argparse.Namespace) -> list[list]:
    """Divide samples into batches as a trainer with these flags does: `args.group` samples are one step."""
    if order == "random":
        indices = random.Random(SEED).sample(range(len(drawn)), len(drawn))
    elif order == "modality":
        words = [sample.num_text for sample in drawn]
        indices = list(ModalityLengthSampler(words, [sample.has_image for sample in drawn], args.group))
    else:
        alike = [True] * len(drawn)
        indices = list(ModalityLengthSampler(lengths, alike, args.group, num_pooled=POOLED_GROUPS))
    return [indices[start : start + args.batch] for start in range(0, len(indices), args.batch)]


def measure_padding(batches: list[list], lengths: Sequence[int], limit: int, even_width: float | None) -> float:
    """Measure which share of all positions is padding; `even_width` is None for a row per sample."""
    positions = 0
    for batch in batches:
        own = [lengths[index] for index in batch]
        rows = [[place] for place in range(len(own))] if even_width is None else plan_rows(own, limit, even_width)
        positions += len(rows) * max(sum(own[place] for place in row) for row in rows)
    return 1 - sum(lengths) / positions


def name_ways(batches: dict[str, list]) -> dict[str, tuple[list, bool]]:
    """Name every order with a row per sample, and packed."""
    return {
        f"{order}, {'packed' if packing else 'padded'}": (own, packing)
        for order, own in batches.items()
        for packing in (False, True)
    }


def make_inputs(model: Any, samples: Sequence[Drawn], generator: torch.Generator) -> dict[str, Any]:
    """Make a synthetic batch; the later half of each text enters the loss."""
    rows, labels = [], []
    for sample in samples:
        ids = torch.randint(3, model.config.vocab_size, (sample.num_text + sample.has_image,), generator=generator)
        own = ids.clone()
        own[: len(own) // 2] = IGNORE_INDEX
        if sample.has_image:
            ids[1] = IMAGE_TOKEN_INDEX
        rows.append(ids)
        labels.append(own)
    side, num_images = model.get_vision_tower().image_size, sum(sample.has_image for sample in samples)
    device = model.get_input_embeddings().weight.device
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": stack(rows, batch_first=True),
        "labels": stack(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": stack([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True),
        "images": torch.randn(num_images, 3, side, side, generator=generator).to(device) if num_images else None,
        "texts": [f"Is there a thing with the number {row} in the image?" for row in range(len(rows))],
    }


def make_pass(model: Any, inputs: list[dict[str, Any]], packing: bool) -> Callable[[], None]:
    """Return a pass over batches."""

    def run() -> None:
        for batch in inputs:
            model(**batch, packing=packing).loss.backward()
            model.zero_grad()

    return run


def measure(name: str, model: Any, count: int, scale: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model and print its figures."""
    model.train()
    model.config.tokenizer_model_max_length = LIMIT
    tower = model.get_vision_tower()
    tower.freeze()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.token_reducer = fix_kept(parse_reducer(args.reduce), tower.num_patches, args.kept)
    num_left, _ = expect_tokens(model.token_reducer, tower.grid)
    drawn = draw_samples(count, scale)
    lengths = [count_positions(sample, num_left, LIMIT) for sample in drawn]
    ways = name_ways({order: make_batches(order, drawn, lengths, args) for order in args.orders})
    even_width = find_even_width(model.config)
    paddings, passes = {}, {}
    for way, (batches, packing) in ways.items():
        paddings[way] = measure_padding(batches, lengths, LIMIT, even_width if packing else None)
        generator = torch.Generator().manual_seed(0)
        inputs = [make_inputs(model, [drawn[index] for index in batch], generator) for batch in batches]
        passes[way] = make_pass(model, inputs, packing)
    print(
        f"\n{name}: {count} samples of {min(lengths)} to {max(lengths)} positions, {num_left} of them an image's "
        f"({args.reduce}), in batches of {args.batch} and steps of {args.group}"
    )
    device = model.get_input_embeddings().weight.device
    seconds = time_in_turns(passes, repeats=args.rounds, warmup=args.warmup, device=device)
    side_by_side.tell_times(seconds, dict.fromkeys(seconds, count))
    base = f"{args.orders[0]}, padded"
    for way, padding in paddings.items():
        print(f"{way}: {padding:.1%} of the positions are padding")
    ratios = {
        way: side_by_side.tell_ratio(f"samples per second, {way} over {base}", seconds[base], values)
        for way, values in seconds.items()
        if way != base
    }
    return {"seconds": seconds, "padding": paddings, "ratios": ratios, "num_samples": count}


def tell_padding(args: argparse.Namespace) -> dict[str, float]:
    """Print the padding of many samples for LLaVA-1.5-7B, by lengths alone."""
    num_left, _ = expect_tokens(fix_kept(parse_reducer(args.reduce), GRID[0] * GRID[1], args.kept), GRID)
    drawn = draw_samples(MANY, 1.0)
    lengths = [count_positions(sample, num_left, LIMIT) for sample in drawn]
    config = LlamaConfig(**SEVEN_B)
    config._attn_implementation = "sdpa"
    figures = {}
    print(f"\n{MANY} samples, {num_left} tokens an image, batches of {args.batch}, steps of {args.group}, 7B's shape")
    for way, (batches, packing) in name_ways({one: make_batches(one, drawn, lengths, args) for one in ORDERS}).items():
        figures[way] = measure_padding(batches, lengths, LIMIT, find_even_width(config) if packing else None)
        print(f"{way}: {figures[way]:.1%} of the positions are padding")
    return figures


def main() -> None:
    args = make_parser().parse_args()
    figures = {}
    if args.only in (None, "padding"):
        figures["padding"] = tell_padding(args)
    if args.only in (None, "pocket"):
        checkpoint = str(side_by_side.CHECKPOINT)
        model = load_pretrained_model(checkpoint, device=args.device, dtype=args.dtype, reduce=args.reduce)[1]
        figures["pocket"] = measure("pocket model", model, args.pocket_samples, 0.25, args)
    if args.only in (None, "random"):
        config, tower = side_by_side.SIZES[args.size]
        layers = {} if args.layers is None else {"num_hidden_layers": args.layers}
        dtype = getattr(torch, args.dtype)
        model, _ = build_random_model(
            config | layers, tower, device=torch.device(args.device), dtype=dtype, tower_dtype=dtype
        )
        figures[args.size] = measure(f"{args.size} model, random weights", model, args.random_samples, 1.0, args)
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
