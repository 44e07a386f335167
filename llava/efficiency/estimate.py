"""What a token reduction leaves of a picture, told by the method itself, without a model."""

from dataclasses import fields, replace
from typing import Any

from llava.efficiency.cost import Look, Reduction
from llava.efficiency.shapes import ModelShape
from llava.model import token_reduction
from llava.model.token_reduction.base import PROJECTED, TEXT, Budget, make_example

PUBLISHED_KEPT_RATIO = 0.21
"""Share of patches that TRIM:-1 keeps on average: its abstract says that 79 % of the tokens are dropped."""


def count_reduction(
    reduction: token_reduction.Reduction, shape: ModelShape, kept_ratio: float = PUBLISHED_KEPT_RATIO
) -> Reduction:
    """Count what a reduction leaves at every layer of a model.

    Args:
        reduction: as a spec string names it.
        shape: the model.
        kept_ratio: share of the patches that an automatic budget keeps, in (0, 1].

    Raises:
        InputError: the language model has no such layer, or a budget cannot be met in it.
    """
    side, num_layers, inside = shape.tower.side, shape.language.layers, reduction.inside
    left = count_left(fix_kept(reduction.before, shape.tower.num_patches, kept_ratio), (side, side))
    if inside is None:
        return left
    counts = inside.counts(left.num_tokens, num_layers)
    return replace(left, drops=tuple(zip(inside.layers(num_layers), counts, strict=True)))


def count_left(reducer: Any, grid: tuple[int, int]) -> Reduction:
    """Count the tokens that a reducer leaves, by letting it reduce a made-up image.

    Args:
        reducer: a token reducer whose budget does not depend on the image's content, or None. Of a mean budget both
            counts are tried, and their mean is rounded.
        grid: rows and columns of patches.
    """
    num_patches = grid[0] * grid[1]
    if reducer is None:
        return Reduction(num_patches, num_patches, reads_text=False)
    example = make_example(reducer.needs, grid)
    num_tokens = num_kept = 0.0
    for part, share in reducer.parts(grid).items():
        reduced = part(example)
        num_tokens += share * int(reduced.lengths[0])
        num_kept += share * int(reduced.lengths[0] if reduced.kept is None else reduced.kept.sum())
    looks = [Look(need.layer, need.num_queries(num_patches)) for need in reducer.needs if need.layer is not None]
    return Reduction(
        round(num_kept),
        round(num_tokens),
        reads_text=TEXT in reducer.needs,
        looks=tuple(looks),
        reads_projected=PROJECTED in reducer.needs,
    )


def fix_kept(reducer: Any, num_patches: int, kept_ratio: float) -> Any:
    """Make an automatic budget keep a given share of every picture, if possible while all of its work is still done.

    Args:
        reducer: a token reducer or None; one with a budget of its own is left as it is.
        num_patches: N.
        kept_ratio: share of the patches, in (0, 1].

    Returns:
        The rule with limits, where it takes limits, else its fixed form. Limits that it has hold.
    """
    if not decides_by_image(reducer):
        return reducer
    num_kept = max(1, round(num_patches * kept_ratio))
    if not has_limits(reducer):
        return replace(reducer, budget=Budget.of_count(num_kept, num_patches))
    num_kept = min(max(num_kept, reducer.min_keep), reducer.max_keep or num_patches)
    return replace(reducer, min_keep=num_kept, max_keep=num_kept)


def decides_by_image(reducer: Any) -> bool:
    """Whether the rule of a token reducer (or None) finds out how many patches an image keeps."""
    is_automatic = reducer is not None and reducer.budget.is_automatic
    return is_automatic and not (has_limits(reducer) and 0 < reducer.min_keep == reducer.max_keep)


def has_limits(reducer: Any) -> bool:
    """Whether a token reducer has options for the least and the most patches."""
    return "min_keep" in {option.name for option in fields(reducer)}
