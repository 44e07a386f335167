"""What training reduces by: one reduction, or another one for each step, drawn from ranges in the spec string.

`TRIM:6-26` draws a number of patches for each step, `TRIM:0.1-0.4` a share, `TRIM:-1,fence=1.0-2.0` a fence. The draw
of a step depends on the seed and the step's number alone: not on ranks, workers, or where a run was interrupted.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from llava.errors import InputError
from llava.model.token_reduction.ranges import Range, cut_ranges
from llava.model.token_reduction.registry import Reduction, name_spec, parse_reduction

RANGE_KEY = "token_reduction_range"
"""Where config.json keeps a spec string with ranges; `mm_vision_token_reduce_func` is their middle, which answers."""


@dataclass(frozen=True)
class TrainingReduction:
    """A reduction whose numbers may be ranges.

    Attributes:
        pieces: the spec string, cut at its ranges; none where nothing varies.
        lowest, middle, highest: the reduction with all ranges at their low end, half way, at their high end; the same
            one where nothing varies.
    """

    pieces: tuple[str | Range, ...]
    lowest: Reduction
    middle: Reduction
    highest: Reduction

    @property
    def varies(self) -> bool:
        return len(self.pieces) > 1

    def spec(self) -> str | None:
        """The spec string that reads back to the same; None for no reduction."""
        return "".join(map(str, self.pieces)) if self.varies else self.middle.spec()

    def draw(self, seed: int, step: int) -> Reduction:
        """Draw the reduction of a step.

        Args:
            seed: of the run.
            step: optimizer steps taken before it.
        """
        if not self.varies:
            return self.middle
        # Seeded by text, which Python hashes in the same way on every machine.
        generator = random.Random(f"token reduction, seed {seed}, step {step}")
        return parse_reduction(_fill(self.pieces, lambda each: each.at(generator.random())))


def read_training_reduction(spec: str | None) -> TrainingReduction:
    """Read a spec string in which a budget, or an option that is not a whole number, may be a range.

    Args:
        spec: as `parse_reduction`; `TRIM:0.1-0.4`, `FasterVLM:6-26`, `TRIM:-1,fence=1.0-2.0`.

    Raises:
        InputError: as `parse_reduction`; a range that is none, or one where nothing can be drawn.
    """
    try:
        pieces = cut_ranges(spec) if isinstance(spec, str) else []
        if len(pieces) <= 1:
            reduction = parse_reduction(spec)
            return TrainingReduction((), reduction, reduction, reduction)
        lowest = parse_reduction(_fill(pieces, lambda each: each.lowest))
        highest = parse_reduction(_fill(pieces, lambda each: each.highest))
        _check_drawn(lowest, highest)
        middle = parse_reduction(_fill(pieces, lambda each: each.middle))
    except InputError as error:
        raise InputError(name_spec(error, spec)) from None
    return TrainingReduction(tuple(pieces), lowest, middle, highest)


def _fill(pieces: Sequence[str | Range], choose: Callable[[Range], str]) -> str:
    return "".join(choose(piece) if isinstance(piece, Range) else piece for piece in pieces)


def _check_drawn(lowest: Reduction, highest: Reduction) -> None:
    """Refuse ranges that training does not draw from."""
    if lowest.inside != highest.inside:
        raise InputError(
            f"{lowest.inside.spec_name} works inside the language model, where training reads all tokens: give it one "
            "number"
        )
    for option in fields(lowest.before):
        if option.type is int and getattr(lowest.before, option.name) != getattr(highest.before, option.name):
            raise InputError(f"{option.name} is a whole number and takes no range; the budget does")
