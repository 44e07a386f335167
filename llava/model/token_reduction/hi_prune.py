"""HiPrune: patches that a middle layer of the vision tower attends to, their neighbours, and those of a deep layer.

HiPrune, arXiv 2508.00553. Repository Danielement321/HiPrune at 6e83a1240874, MIT; the kept patches equal those of its
code on the recorded cases (tests/golden/methods).

The attention that a patch receives is averaged over heads and over all queries, CLS included. The patches with the most
of it in the middle layer are anchors, a fifth of alpha times the budget; they stay with their neighbours left, right,
above and below. The rest of the budget goes to the most attended patches of the deep layer.

The budget counts patches: a "64-token setting" is 64 of 576: one anchor, its four neighbours and 59 others. The code
divides the budget by the number of images in the batch; here every image has all of it. It is written for 24 x 24
patches, and does not look for row ends: the right neighbour of a row's last patch is the first one of the next row;
here the grid is the tower's, and its row ends are treated alike. Where anchors and neighbours exceed the budget, which
the code cannot take, those with the most attention in the middle layer stay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import (
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    keep_patches,
    mark,
    select_top,
)

AREA = 5
"""Patches of an anchor with its neighbours."""


def mark_anchors(middle: Tensor, count: int, columns: int) -> Tensor:
    """Mark anchors and their neighbours.

    Args:
        middle: `float32[I, N]` attention received in the middle layer.
        count: anchors of each image.
        columns: of the patch grid.

    Returns:
        `bool[I, N]`.
    """
    anchors = middle.argsort(dim=1, descending=True, stable=True)[:, :count]  # [I, count]
    area = torch.cat([anchors + step for step in (0, -1, 1, -columns, columns)], dim=1)
    return mark(area.clamp(0, middle.shape[1] - 1), middle.shape[1])


@dataclass(frozen=True)
class HiPrune(TokenReducer):
    """Anchors, their neighbours and the most attended patches, in raster order.

    Attributes:
        budget: a fraction or a count of patches.
        alpha: share of the budget for anchors and their neighbours, from 0 to 1.
        object_layer: the middle layer, counted as `mm_vision_select_layer`: 9 is the ninth.
        layer: the deep layer.
    """

    alpha: float = 0.1
    object_layer: int = 9
    layer: int = -2

    spec_name: ClassVar[str] = "HiPrune"
    scores_name: ClassVar[str] = "attention received in the deep layer"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: a share outside [0, 1].
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha:g} must be between 0 and 1")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need("received", self.object_layer, "object_layer"), Need("received", self.layer, "layer")})

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Keep anchors and the most attended patches of each image."""
        middle, deep = (tokens.require(Need("received", layer)) for layer in (self.object_layer, self.layer))  # [I, N]
        num_kept = self.count_kept(deep.shape[1])
        is_anchor = mark_anchors(middle, round(num_kept * self.alpha / AREA), tokens.grid[1])
        # Anchors come first: attention is at most 1. Among them, the middle layer decides who stays if not all can.
        kept = select_top(torch.where(is_anchor, 2 + middle, deep), num_kept)
        return keep_patches(tokens.patches, kept, num_kept, deep)
