"""Measure times side by side: everything that is compared takes turns in one run, warm and with the device drained.

A ratio is taken round by round, so that what slows the machine down for a while slows both sides of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from llava.clock import StageClock


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in their unit."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one or more measurements."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        first, _, third = quantiles(values, n=4, method="inclusive")
        return cls(median(values), first, third)

    def format(self, scale: float = 1.0, digits: int = 1) -> str:
        """Write `median [q1, q3]`, multiplied by `scale`."""
        middle, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.q1, self.q3))
        return f"{middle} [{low}, {high}]"


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Time several ways to do something, in turns.

    Args:
        candidates: what to run, by name.
        repeats: measured rounds.
        warmup: rounds before that are not counted.
        device: is drained around each; None: the CPU.

    Returns:
        Seconds by name, one per round.
    """
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + repeats):
        for name, run in candidates.items():
            clock = StageClock(device)
            with clock.stage(name):
                run()
            if number >= warmup:
                seconds[name].append(clock.seconds[name])
    return seconds


def ratio_by_round(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Compare two lists of equal length round by round."""
    return Spread.of([above / below for above, below in zip(numerators, denominators, strict=True)])
