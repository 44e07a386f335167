"""Every method at 7B shapes: stages, end to end and memory at the budgets of the field's tables."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.efficiency.estimate import count_reduction
from llava.efficiency.stages import Runner
from llava.errors import InputError
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, Reduction, parse_reduction
from scripts.gpu.parts import Figures, Scale, Steps
from scripts.gpu.stages import measure_in_turns

BUDGETS, NEW_TOKENS, TOWER_DTYPE = (192, 128, 64, 32), 16, torch.bfloat16
NAMES = [name for name in (*REDUCERS, *LAYER_REDUCERS) if not name.startswith("TextSim")]
# Layers that the tiny model of a rehearsal has.
REHEARSED = {"HiPrune": ",object_layer=1", "FastV": ",layer=1", "DART": ",layer=1,pivot_image=2,pivot_text=2"}


@dataclass
class Bench:
    """The model, ready for every method; built with the first step."""

    scale: Scale
    reductions: dict[str, Reduction]
    parts: tuple[Any, Any] | None = field(default=None, repr=False)

    def load(self) -> tuple[Any, Any]:
        if self.parts is None:
            needs = {need for each in self.reductions.values() if each.before for need in each.before.needs}
            self.parts = self.scale.build(TOWER_DTYPE, needs=needs)
        return self.parts


def make_steps(scale: Scale, out: Path) -> Steps:
    batch_sizes, budgets = ((2,), (9,)) if scale.is_rehearsal else ((1, 8, 32), BUDGETS)
    options = REHEARSED if scale.is_rehearsal else {}
    bench = Bench(scale, {name: parse_reduction(name + options.get(name, "")) for name in NAMES})
    return {
        f"{budget} tokens, batch {batch_size}": partial(measure, bench, budget, batch_size)
        for batch_size in batch_sizes
        for budget in budgets
    }


def measure(bench: Bench, budget: int, batch_size: int) -> Figures:
    """Measure the full model and all methods at one budget, in turns; those that cannot serve it are named."""
    reductions, left_out = {"none": Reduction()}, {}
    for reduction in (each.at_budget(budget) for each in bench.reductions.values()):
        spec = str(reduction.spec())
        try:
            count_reduction(reduction, bench.scale.source.shape)
            reductions[spec] = reduction
        except InputError as error:
            left_out[spec] = str(error)
    new_tokens = 3 if bench.scale.is_rehearsal else NEW_TOKENS
    runner = Runner(*bench.load())
    figures = measure_in_turns(bench.scale, runner, reductions, batch_size, new_tokens, TOWER_DTYPE)
    return figures | {"left_out": left_out}
