"""The runs of a report: what a reduction leaves, counted without a model or measured on one."""

import argparse
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava.budgets import FoundBudget
from llava.efficiency.cost import Precision, Workload, cache_bytes
from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, count_reduction, decides_by_image, fix_kept
from llava.efficiency.report import Run
from llava.efficiency.shapes import ModelSource
from llava.efficiency.targets import at_count, describe_work
from llava.errors import InputError
from llava.model.token_reduction import CONFIG_KEY, Reduction, Target, parse_reduction

if TYPE_CHECKING:
    from llava.efficiency.stages import Batch, Runner

# Only measuring loads transformers.

TIMED_EIGHTHS = (0, 1, 2, 4, 6, 8)
"""The numbers of patches that are timed for a target in milliseconds, in eighths of all; 0 is one patch."""
ACTIVATION_FACTOR = 3  # live activations of a prefill, in units of the MLP's inner width


def count_run(spec: str, source: ModelSource, kept_ratio: float | None) -> Any:
    """Count what a reduction leaves, without a model."""
    reduction = parse_reduction(spec)
    before = reduction.before
    note = ""
    if decides_by_image(before):
        assumed = f"assumed, {PUBLISHED_KEPT_RATIO} of the patches (the published mean)"
        note = assumed if kept_ratio is None else f"given, --kept {kept_ratio}"
    elif before is not None and before.budget.is_average:
        note = "a mean over images"
    return Run(spec, count_reduction(reduction, source.shape, kept_ratio or PUBLISHED_KEPT_RATIO), note)


def prepare(
    args: argparse.Namespace, source: ModelSource, specs: list[str], work: Workload, precision: Precision
) -> "tuple[Runner, Batch]":
    """Load or build the model, with what these reductions need, and make up the questions."""
    from llava.efficiency.stages import Runner, make_batch
    from llava.image import EmbeddedImage

    if args.compile and any(parse_reduction(spec).inside for spec in specs):
        raise InputError(
            "--compile: its cache has one length for all layers, and tokens leave between them; leave it out"
        )
    runner = Runner(*load(args, source, specs, work, precision), compile_decode=args.compile)
    batch = make_batch(
        work.batch_size,
        work.prompt_tokens,
        work.new_tokens,
        vocab_size=source.shape.language.vocabulary,
        image_size=args.image_size,
        image=EmbeddedImage(args.image_file, read_bytes(args.image_file)) if args.image_file else None,
        query=args.query,
    )
    return runner, batch


def find_by_time(
    target: Target, runner: "Runner", batch: "Batch", source: ModelSource, work: Workload, args: argparse.Namespace
) -> FoundBudget:
    """Find the number of patches with which a batch takes so many milliseconds, by measuring a few numbers in turns.

    Raises:
        InputError: no number of patches takes that long, or so short a time; says what they take.
    """
    from llava.efficiency.stages import measure_reductions

    # 1. Measure, from picture files to answer ids.
    num_patches = source.shape.tower.num_patches
    counts = sorted({max(1, num_patches * eighths // 8) for eighths in TIMED_EIGHTHS})
    reductions = {str(count): at_count(target, count, num_patches) for count in counts}
    measured = measure_reductions(runner, batch, reductions, repeats=args.repeats, warmup=args.warmup)
    # 2. More patches never take less time; where a median says so, it is noise.
    times = list(accumulate((1e3 * measured[str(count)].end_to_end.median for count in counts), max))
    if not times[0] <= target.value <= times[-1]:
        raise InputError(
            f"{target}: on this machine a batch takes {times[0]:.1f} ms with {counts[0]} patch and {times[-1]:.1f} ms "
            f"with {counts[-1]} ({describe_work(work)}): give a time between them"
        )
    # 3. Between two measured numbers, time is taken for linear.
    count = max(1, int(np.interp(target.value, times, counts)))
    points = dict(zip(counts, times, strict=True))
    machine = f"{describe_device(runner.model.device)}, {torch.get_num_threads()} threads"
    told = ", ".join(f"{time:.1f} with {number}" for number, time in points.items())
    return FoundBudget(
        str(target),
        str(at_count(target, count, num_patches).spec()),
        f"on {machine}, ms of a batch by patches: {told} ({describe_work(work)})",
        {"machine": machine, "milliseconds": points, "workload": asdict(work)},
    )


def measure_runs(
    args: argparse.Namespace, source: ModelSource, specs: list[str], runner: "Runner", batch: "Batch"
) -> tuple[list[Any], dict[str, Any]]:
    """Measure the runs in turns.

    Returns:
        The runs, and what a reader should know of the machine.
    """
    from llava.efficiency.stages import measure_reductions

    own_choice = bool(args.image_file and args.query and args.kept is None)
    reductions = {spec: parse_reduction(spec) for spec in specs}
    if not own_choice:
        patches = source.shape.tower.num_patches
        share = args.kept or PUBLISHED_KEPT_RATIO
        reductions = {
            spec: Reduction(fix_kept(each.before, patches, share), each.inside) for spec, each in reductions.items()
        }
    measured = measure_reductions(runner, batch, reductions, repeats=args.repeats, warmup=args.warmup)
    runs = []
    for spec in specs:
        counted, found = count_run(spec, source, args.kept), measured[spec]
        is_own = own_choice and bool(counted.kept_source)
        kept = counted.reduction.num_kept if found.num_kept is None else round(found.num_kept)
        left = replace(counted.reduction, num_kept=kept, num_tokens=round(found.num_tokens))
        note = f"measured on {args.image_file}" if is_own else counted.kept_source
        runs.append(Run(spec, left, note, found))
    machine = {
        "device": describe_device(runner.model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options = {"weights": "random" if args.random_weights else "loaded", "repeats": args.repeats}
    return runs, machine | options | {"attention": runner.model.config._attn_implementation, "compile": args.compile}


def describe_device(device: torch.device) -> str:
    """Name the accelerator, or "cpu"."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def load(
    args: argparse.Namespace, source: ModelSource, specs: list[str], work: Workload, precision: Precision
) -> tuple[Any, Any]:
    """Return model and image processor: read from the folder, or built with random weights."""
    from llava.model.builder import choose_device, load_pretrained_model, resolve_dtype

    device = choose_device(args.device)
    if not args.random_weights:
        _, model, image_processor, _ = load_pretrained_model(
            args.model_path, device=device, dtype=args.dtype, tower_dtype=args.tower_dtype, reduce=specs[0],
            attn_implementation=args.attn_implementation,
        )  # fmt: skip
        for spec in specs:
            model.set_token_reduction(spec)
        return model, image_processor
    from llava.efficiency.random_model import build_random_model, check_memory

    needs = {need for spec in specs for need in getattr(parse_reduction(spec).before, "needs", ())}
    check_memory(source, precision, torch.device(device), work_bytes(source, work, precision))
    return build_random_model(
        {**source.config, CONFIG_KEY: None},
        source.tower_config,
        needs=needs,
        device=torch.device(device),
        dtype=resolve_dtype(args.dtype),
        tower_dtype=resolve_dtype(args.tower_dtype),
        attn_implementation=args.attn_implementation,
    )


def work_bytes(source: ModelSource, work: Workload, precision: Precision) -> int:
    """Estimate what a batch without reduction needs besides the weights: the cache and a prefill's activations."""
    language = source.shape.language
    length = work.prompt_tokens + source.shape.tower.num_patches + work.new_tokens
    activations = ACTIVATION_FACTOR * length * language.inner * precision.language
    return work.batch_size * (cache_bytes(language, length, precision.language) + activations)


def read_bytes(path: str) -> bytes:
    """Read a picture file.

    Raises:
        InputError: it can't be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"image {path}: {error.strerror}") from None
