"""LoRA training steps of 7B shapes, with and without token reduction: time, tokens per second, memory."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, fix_kept
from llava.efficiency.memory import measure_peak
from llava.efficiency.timing import Spread, ratio_by_round, time_in_turns
from llava.model.token_reduction import parse_reducer
from scripts.bench.train_speed import LEARNING_RATE, make_step, make_training_batch
from scripts.gpu.parts import REDUCTIONS, Figures, Scale, Skip, Steps

BATCH_SIZE = 4
# As in scripts/finetune_lora.sh.
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 128, 256, 0.05


def make_steps(scale: Scale, out: Path) -> Steps:
    lengths = (16,) if scale.is_rehearsal else (128, 512)
    steps = {}
    for checkpointing in (True, False):
        for length in lengths:
            name = f"{length} text tokens, gradient checkpointing {'on' if checkpointing else 'off'}"
            steps[name] = partial(train, scale, length, checkpointing)
    return steps


def train(scale: Scale, text_tokens: int, checkpointing: bool) -> Figures:
    """Measure steps, with and without reduction in turns."""
    if find_spec("peft") is None:
        raise Skip("peft is not installed")
    model = add_adapters(scale)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)
    batch = make_training_batch(model, BATCH_SIZE, text_tokens)
    num_patches = model.get_vision_tower().num_patches
    reducers = {spec: fix_kept(parse_reducer(spec), num_patches, PUBLISHED_KEPT_RATIO) for spec in REDUCTIONS}
    steps = {spec: in_bfloat16(make_step(model, optimizer, batch, one), scale) for spec, one in reducers.items()}
    rounds = {"repeats": 1, "warmup": 1} if scale.is_rehearsal else {"repeats": 7, "warmup": 2}
    seconds = time_in_turns(steps, **rounds, device=scale.device)
    with_reduction, without = (seconds[spec] for spec in REDUCTIONS)
    return {
        "batch_size": BATCH_SIZE,
        "trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "steps": {
            spec: describe(times, steps[spec], BATCH_SIZE * count_positions(model, batch, reducers[spec]), scale)
            for spec, times in seconds.items()
        },
        "ratio": vars(ratio_by_round(without, with_reduction)),
    }


def add_adapters(scale: Scale) -> Any:
    """Build the model as LoRA training has it: frozen bfloat16, float32 adapters, a projector that is trained."""
    from peft import LoraConfig, get_peft_model

    from llava.train.lora import find_all_linear_names

    model, _ = scale.build(torch.float32)
    pattern = rf"model\.layers\..*\.({'|'.join(find_all_linear_names(model))})"  # not the tower's layers
    get_peft_model(
        model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=pattern)
    )
    model.get_model().mm_projector.requires_grad_(True)
    return model.train()


def in_bfloat16(step: Callable[[], None], scale: Scale) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast(scale.device.type, torch.bfloat16):
            step()

    return run


def count_positions(model: Any, batch: dict[str, Any], reducer: Any) -> int:
    """Positions of one spliced sample."""
    model.token_reducer = reducer
    with torch.no_grad():
        embeds = model.embed_prompts(
            batch["input_ids"][:1], images=batch["images"][:1], texts=batch["texts"][:1], labels=batch["labels"][:1]
        )
    return embeds.embeds.shape[1]


def describe(times: list[float], step: Callable[[], None], num_positions: int, scale: Scale) -> Figures:
    return {
        "seconds": vars(Spread.of(times)),
        "tokens_per_second": vars(Spread.of([num_positions / value for value in times])),
        "samples_per_second": vars(Spread.of([BATCH_SIZE / value for value in times])),
        "peak_bytes_beyond_weights": measure_peak(step, scale.device),
    }
