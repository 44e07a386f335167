"""From a share of FLOPs to the number of patches to keep, by counting at a model's shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llava.efficiency.cost import Precision, Workload, stage_costs, total_flops
from llava.efficiency.estimate import count_reduction
from llava.efficiency.shapes import ModelShape
from llava.errors import InputError
from llava.model.token_reduction import Budget, Reduction, Target, TokenReducer


@dataclass(frozen=True)
class FoundCount:
    """The budget that meets a target.

    Attributes:
        spec: to use.
        share: of the FLOPs without reduction that this takes.
    """

    spec: str
    share: float


def at_count(target: Target, count: int, num_patches: int) -> Reduction:
    """The target's method with a fixed budget of 1 to N patches (inside the language model: of as many tokens)."""
    method = replace(target.method, budget=Budget.of_count(count, num_patches))
    return Reduction(before=method) if isinstance(method, TokenReducer) else Reduction(inside=method)


def find_count(target: Target, shape: ModelShape, work: Workload) -> FoundCount:
    """Find the largest number of patches whose FLOPs are within a share of those without reduction.

    Args:
        target: of kind "flops".
        shape: the model.
        work: what is asked; all stages count, from the vision tower to the last token of the answer.

    Raises:
        InputError: the share is out of reach of the method; says what it reaches.
    """
    num_patches = shape.tower.num_patches

    def count_flops(reduction: Reduction) -> int:
        return total_flops(stage_costs(shape, count_reduction(reduction, shape), work, Precision()), work)

    full = count_flops(Reduction())

    def find_share(count: int) -> float | None:
        """None where the method cannot keep so few."""
        try:
            return count_flops(at_count(target, count, num_patches)) / full
        except InputError:
            return None

    count = find_largest(lambda count: (find_share(count) or 0.0) <= target.value, num_patches)
    share = find_share(count) if count else None
    if share is None:
        shares = (find_share(each) for each in range(max(1, count), num_patches + 1))
        least, most = next((each for each in shares if each is not None), 0.0), find_share(num_patches) or 0.0
        raise InputError(
            f"{target}: with this model the method takes {least:.3f} to {most:.3f} of the FLOPs without reduction "
            f"({describe_work(work)}): give a share between them"
        )
    return FoundCount(at_count(target, count, num_patches).spec(), share)


def find_largest(fits: Callable[[int], bool], most: int) -> int:
    """Find the largest number from 1 to `most` that fits, by bisection (all smaller ones do); 0 where none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe_work(work: Workload) -> str:
    """Say what is asked, for a person."""
    return f"batch {work.batch_size}, {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens"
