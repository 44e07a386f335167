"""The stages of answering with 7B shapes: times and memory by batch size, precision, attention and compilation."""

import importlib.util
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from llava.efficiency import report
from llava.efficiency.cost import Precision, Workload
from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, count_reduction, fix_kept
from llava.efficiency.stages import Runner, make_batch, measure_reductions
from llava.model.builder import DTYPES
from llava.model.token_reduction import Reduction, parse_reducer
from scripts.gpu.parts import REDUCTIONS, Figures, Scale, Skip, Steps

SDPA, FLASH = "sdpa", "flash_attention_2"
CONFIGURATIONS = (
    # towers, attention of the language model, decoding compiled
    ("float32", SDPA, False),
    ("bfloat16", SDPA, False),
    ("bfloat16", SDPA, True),
    ("bfloat16", FLASH, False),
)
PROMPT_TOKENS = 60
IMAGE_SIZE = (640, 480)


@dataclass
class Bench:
    """The model that is measured; one at a time, a 7B takes 14 GB."""

    scale: Scale
    key: tuple[str, str] | None = None
    parts: tuple[Any, Any] | None = field(default=None, repr=False)

    def load(self, tower_dtype: str, attention: str) -> tuple[Any, Any]:
        if self.key != (tower_dtype, attention):
            self.parts = self.key = None
            self.parts = self.scale.build(DTYPES[tower_dtype], attention)
            self.key = (tower_dtype, attention)
        return self.parts


def make_steps(scale: Scale, out: Path) -> Steps:
    batch_sizes, lengths = ((2,), (1, 3)) if scale.is_rehearsal else ((1, 8, 32), (1, 16))
    bench = Bench(scale)
    steps = {}
    for towers, attention, compiled in CONFIGURATIONS:
        for batch_size in batch_sizes:
            for new_tokens in lengths:
                if compiled and new_tokens == 1:
                    continue  # nothing is decoded
                name = f"towers {towers}, {attention}{', compiled' * compiled}, batch {batch_size}, {new_tokens} new"
                steps[name] = partial(measure, bench, out, name, towers, attention, compiled, batch_size, new_tokens)
    return steps


def measure(
    bench: Bench, out: Path, name: str, towers: str, attention: str, compiled: bool, batch_size: int, new_tokens: int
) -> Figures:
    """Measure one setting, with and without reduction in turns, and draw it."""
    if attention == FLASH and not is_flash_attn_2_available():
        raise Skip("flash_attn is not installed")
    scale, num_patches = bench.scale, bench.scale.source.shape.tower.num_patches
    runner = Runner(*bench.load(towers, attention), compile_decode=compiled)
    reductions = {
        spec: Reduction(fix_kept(parse_reducer(spec), num_patches, PUBLISHED_KEPT_RATIO)) for spec in REDUCTIONS
    }
    figures = measure_in_turns(scale, runner, reductions, batch_size, new_tokens, DTYPES[towers])
    if importlib.util.find_spec("matplotlib"):
        report.draw_bars(figures, out / f"{name.replace(', ', '_').replace(' ', '-')}.png")
    return figures


def measure_in_turns(
    scale: Scale,
    runner: Runner,
    reductions: dict[str, Reduction],
    batch_size: int,
    new_tokens: int,
    tower_dtype: torch.dtype,
) -> Figures:
    """Measure reductions, by label, in turns on one workload."""
    shape = scale.source.shape
    work = Workload(batch_size, PROMPT_TOKENS, shape.tower.text_context, new_tokens)
    batch = make_batch(
        batch_size, PROMPT_TOKENS, new_tokens, vocab_size=shape.language.vocabulary, image_size=IMAGE_SIZE
    )
    rounds = {"repeats": 1, "warmup": 1} if scale.is_rehearsal else {"repeats": 5, "warmup": 2}
    # A rehearsal compiles nothing: that takes minutes on the CPU.
    with torch.compiler.set_stance("force_eager" if scale.is_rehearsal else "default"):
        measured = measure_reductions(runner, batch, reductions, **rounds)
    runs = []
    for label, found in measured.items():
        counted = count_reduction(reductions[label], shape)
        left = replace(counted, num_tokens=round(found.num_tokens))
        runs.append(report.Run(label, left, "", found))
    precision = Precision(torch.bfloat16.itemsize, tower_dtype.itemsize)
    return report.describe(report.Setting(scale.source.name, shape, work, precision, {}), runs)
