"""SCOPE: patches that stand for as many others as possible, weighted by the CLS token's attention.

SCOPE, NeurIPS 2025. Repository kinredon/SCOPE at 6bf73069e0d6, without a licence (written here from a description);
the picks equal those of its code on the recorded cases (tests/golden/methods).

Each pick is the patch with the largest gain in coverage (how much nearer, by cosine, all patches come to a picked one)
times its saliency (the CLS row of the attention, summed over heads, to the power alpha).

The budget counts patches: a "64-token setting" is 64 of 576, without CLS. The code divides the budget by the batch
size; here every image has all of it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import (
    ClsAttentionReducer,
    ReducedTokens,
    VisualTokens,
    cosines,
    keep_patches,
    mark,
)

COMBINATIONS = ("multi", "add")


def pick_by_coverage(similarity: Tensor, saliency: Tensor, count: int, *, adds: bool = False) -> Tensor:
    """Pick the patches that cover the others.

    Args:
        similarity: `float32[I, N, N]` cosines.
        saliency: `float32[I, N]`.
        count: how many, at most N.
        adds: saliency is added to the gain in coverage instead of multiplied with it.

    Returns:
        `int64[I, count]` in the order of picking; among equal gains the earlier patch wins.
    """
    covered = torch.zeros_like(saliency)  # [I, N] cosine with the nearest pick
    is_picked = torch.zeros_like(saliency, dtype=torch.bool)
    picks = []
    for _ in range(count):
        gain = (similarity - covered[:, :, None]).clamp_(min=0).sum(dim=1)  # [I, N]
        gain = gain + saliency if adds else gain * saliency
        pick = gain.masked_fill(is_picked, float("-inf")).argmax(dim=1, keepdim=True)  # [I, 1]
        picks.append(pick)
        is_picked = is_picked.scatter(1, pick, True)
        near = similarity.gather(2, pick[:, None].expand(-1, similarity.shape[1], -1))[..., 0]  # [I, N]
        covered = torch.maximum(covered, near)
    return torch.cat(picks, dim=1)


@dataclass(frozen=True)
class SCOPE(ClsAttentionReducer):
    """Patches that cover the others, in raster order.

    Attributes:
        budget: a fraction or a count of patches.
        layer: as in `ClsAttentionReducer`.
        alpha: power of the saliency, from 0 on; 0 leaves coverage alone.
        combine: "multi" or "add".
    """

    alpha: float = 1.0
    combine: str = "multi"

    spec_name: ClassVar[str] = "SCOPE"
    scores_name: ClassVar[str] = "saliency: CLS attention to the power alpha"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: an unknown combination, or a power below 0.
        """
        super().__post_init__()
        if self.combine not in COMBINATIONS:
            raise InputError(f"combine={self.combine} is unknown: use {' or '.join(COMBINATIONS)}")
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha:g} must be 0 or more")

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pick from each image."""
        saliency = tokens.require(self.cls_attention).sum(dim=1) ** self.alpha  # [I, N]
        num_kept = self.count_kept(saliency.shape[1])
        picks = pick_by_coverage(cosines(tokens.patches), saliency, num_kept, adds=self.combine == "add")
        return keep_patches(tokens.patches, mark(picks, saliency.shape[1]), num_kept, saliency)
