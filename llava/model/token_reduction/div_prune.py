"""DivPrune: the subset of patches whose nearest two are as far apart as possible; nothing else is read.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175.
Repository vbdi/divprune at 799e2d950aa0, CC BY-NC 4.0 (written here from a description); the picks equal those of its
code on the recorded cases (tests/golden/methods).

The max-min diversity problem, solved greedily on cosine distances of projected patches: the first pick is the patch
whose nearest other patch is farthest away, each later one the patch that is farthest from its nearest pick.

The budget counts patches: a "64-token setting" is 64 of 576. A fraction is the code's subset ratio, rounded as Python
rounds (halves to even); the paper's 0.098 is 56. The code takes one image; here every image is on its own. It does not
mask picks, which lie at distance zero; here a patch is never picked twice, however many copies it has.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.model.token_reduction.base import (
    PROJECTED,
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    cosines,
    keep_patches,
    mark,
)


def pick_diverse(features: Tensor, count: int) -> Tensor:
    """Pick patches far from each other.

    Args:
        features: `[I, N, E]`.
        count: how many, at most N.

    Returns:
        `int64[I, count]` in the order of picking; among equal distances the earlier patch wins.
    """
    distance = 1 - cosines(features)  # [I, N, N]
    # 1. The first pick. A patch's own distance is the smallest of its row.
    to_nearest = distance.topk(min(2, distance.shape[-1]), largest=False).values[..., -1]  # [I, N]
    picks = [to_nearest.argmax(dim=1)]
    # 2. Each later one; picks are out.
    to_picks = torch.full_like(to_nearest, float("inf"))
    for _ in range(count - 1):
        last = picks[-1][:, None]  # [I, 1]
        row = distance.gather(1, last[..., None].expand(-1, -1, distance.shape[-1]))[:, 0]  # [I, N]
        to_picks = torch.minimum(to_picks, row).scatter(1, last, float("-inf"))
        picks.append(to_picks.argmax(dim=1))
    return torch.stack(picks, dim=1)


@dataclass(frozen=True)
class DivPrune(TokenReducer):
    """Patches far from each other, in raster order."""

    spec_name: ClassVar[str] = "DivPrune"
    needs: ClassVar[frozenset[Need]] = frozenset({PROJECTED})

    def count_kept(self, num_patches: int) -> int:
        """Round a fraction as Python rounds; at least one patch stays."""
        value = self.budget.value
        return max(1, round(value * num_patches) if value <= 1 else min(num_patches, int(value)))

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pick from each image's projected patches."""
        num_patches = tokens.patches.shape[1]
        num_kept = self.count_kept(num_patches)
        picks = pick_diverse(tokens.require(PROJECTED), num_kept)
        return keep_patches(tokens.patches, mark(picks, num_patches), num_kept)
