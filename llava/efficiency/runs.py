"""The runs of a report: what a reduction leaves, counted without a model or measured on one."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava.efficiency.cost import Precision, Workload, cache_bytes
from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, count_left, fix_kept
from llava.efficiency.report import Run
from llava.efficiency.shapes import ModelSource
from llava.errors import InputError
from llava.model.token_reduction import CONFIG_KEY, Reduction, parse_reduction

ACTIVATION_FACTOR = 3  # live activations of a prefill, in units of the MLP's inner width


def count_run(spec: str, source: ModelSource, kept_ratio: float | None) -> Any:
    """Count what a reduction leaves, without a model."""
    tower = source.shape.tower
    side = tower.image_size // tower.patch_size
    reduction = parse_reduction(spec)
    reducer, inside = reduction.before, reduction.inside
    note = ""
    if reducer is not None and reducer.budget.is_automatic:
        note = f"given, --kept {kept_ratio}"
        if kept_ratio is None:
            kept_ratio = PUBLISHED_KEPT_RATIO
            note = f"assumed, {PUBLISHED_KEPT_RATIO} of the patches (the published mean)"
        reducer = fix_kept(reducer, tower.num_patches, kept_ratio)
    left = count_left(reducer, (side, side))
    if inside is not None:
        num_layers = source.shape.language.layers
        counts = inside.counts(left.num_tokens, num_layers)
        left = replace(left, drops=tuple(zip(inside.layers(num_layers), counts, strict=True)))
    return Run(spec, left, note)


def measure_runs(
    args: argparse.Namespace, source: ModelSource, specs: list[str], work: Workload, precision: Precision
) -> tuple[list[Any], dict[str, Any]]:
    """Load or build the model and measure the runs in turns.

    Returns:
        The runs, and what a reader should know of the machine.
    """
    from llava.efficiency.stages import Runner, make_batch, measure_reductions
    from llava.image import EmbeddedImage

    runner = Runner(*load(args, source, specs, work, precision), compile_decode=args.compile)
    picture = EmbeddedImage(args.image_file, read_bytes(args.image_file)) if args.image_file else None
    own_choice = picture is not None and args.query and args.kept is None
    reductions = {spec: parse_reduction(spec) for spec in specs}
    if args.compile and any(each.inside for each in reductions.values()):
        raise InputError(
            "--compile: its cache has one length for all layers, and tokens leave between them; leave it out"
        )
    if not own_choice:
        patches = source.shape.tower.num_patches
        share = args.kept or PUBLISHED_KEPT_RATIO
        reductions = {
            spec: Reduction(fix_kept(each.before, patches, share), each.inside) for spec, each in reductions.items()
        }
    batch = make_batch(
        work.batch_size,
        work.prompt_tokens,
        work.new_tokens,
        vocab_size=source.shape.language.vocabulary,
        image_size=args.image_size,
        image=picture,
        query=args.query,
    )
    measured = measure_reductions(runner, batch, reductions, repeats=args.repeats, warmup=args.warmup)
    runs = []
    for spec in specs:
        counted, found = count_run(spec, source, args.kept), measured[spec]
        is_own = own_choice and bool(counted.kept_source)
        kept = counted.reduction.num_kept if found.num_kept is None else round(found.num_kept)
        left = replace(counted.reduction, num_kept=kept, num_tokens=round(found.num_tokens))
        note = f"measured on {args.image_file}" if is_own else counted.kept_source
        runs.append(Run(spec, left, note, found))
    device = runner.model.device
    name = torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else "cpu"
    machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    options = {"weights": "random" if args.random_weights else "loaded", "repeats": args.repeats}
    return runs, machine | options | {"attention": runner.model.config._attn_implementation, "compile": args.compile}


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
