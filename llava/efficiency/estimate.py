"""What a token reduction leaves of a picture, told by the reducer itself, without a model."""

from dataclasses import fields, replace
from typing import Any

from llava.efficiency.cost import Look, Reduction
from llava.errors import InputError
from llava.model.token_reduction.base import TEXT, make_example

PUBLISHED_KEPT_RATIO = 0.21
"""Share of patches that TRIM:-1 keeps on average: its abstract says that 79 % of the tokens are dropped."""


def count_left(reducer: Any, grid: tuple[int, int]) -> Reduction:
    """Count the tokens that a reducer leaves, by letting it reduce a made-up image.

    Args:
        reducer: a token reducer whose budget does not depend on the image, or None.
        grid: rows and columns of patches.
    """
    num_patches = grid[0] * grid[1]
    if reducer is None:
        return Reduction(num_patches, num_patches, reads_text=False)
    reduced = reducer(make_example(reducer.needs, grid))
    num_tokens = int(reduced.lengths[0])
    num_kept = num_tokens if reduced.kept is None else int(reduced.kept.sum())
    looks = [Look(need.layer, need.num_queries(num_patches)) for need in reducer.needs if need.layer is not None]
    return Reduction(num_kept, num_tokens, reads_text=TEXT in reducer.needs, looks=tuple(looks))


def fix_kept(reducer: Any, num_patches: int, kept_ratio: float) -> Any:
    """Make an automatic budget keep a given share of every picture, while all of its work is still done.

    Args:
        reducer: a token reducer or None; one with a budget of its own is left as it is.
        num_patches: N.
        kept_ratio: share of the patches, in (0, 1].

    Raises:
        InputError: for an automatic reducer that takes no limits.
    """
    if reducer is None or not reducer.budget.is_automatic:
        return reducer
    if "min_keep" not in {option.name for option in fields(reducer)}:
        raise InputError(
            f"how many patches {reducer.spec()} keeps depends on the picture: give it a budget to count with"
        )
    num_kept = max(1, round(num_patches * kept_ratio))
    return replace(reducer, min_keep=num_kept, max_keep=num_kept)
