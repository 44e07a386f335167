"""CDPruner: diverse patches, weighted by how much they have to do with the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS
2025, arXiv 2506.10967. Repository Theia-4869/CDPruner at 9541616c40fc, Apache-2.0; the picks equal those of its code on
the recorded cases (tests/golden/methods).

1. Relevance: minus the cosine of a patch and the question in CLIP's joint space (the patches least similar to the text
   show what it asks about, as in TRIM), scaled to [0, 1] over the image.
2. Kernel: relevance of both times the cosine of the projected patches.
3. Greedy search for the subset with the largest determinant (MAP of a determinantal point process).

The budget counts patches: a "64-token setting" is 64 of 576, without CLS. The code scales relevance over a whole batch;
here every image is on its own. It reads the question whole, in rows of 77 CLIP tokens, and averages over the rows; here
CLIP reads the first 77, as for TRIM. Its evaluation leaves the answer instruction out of the question for this; here
the query is that of all methods (docs/parity.md). The kernel's rank is at most the width of projected patches; where it
is used up the code's picks repeat, and here the most relevant patches follow.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.model.token_reduction.base import (
    PROJECTED,
    TEXT,
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    cosines,
    keep_patches,
    mark,
)

SMALLEST_RELEVANCE = 1e-6
NOISE = 1e-6
"""Share of a patch's first variance below which what is left of it is rounding."""


def find_relevance(joint: Tensor, text: Tensor) -> Tensor:
    """Measure how much patches have to do with a question.

    Args:
        joint: `float32[I, N, P]`.
        text: `float32[I, P]`, or `float32[I, R, P]` of several rows, which are averaged over.

    Returns:
        `float32[I, N]` minus the cosine.
    """
    return -cosines(joint, text if text.dim() == 3 else text[:, None]).mean(dim=-1)


def scale_relevance(relevance: Tensor) -> Tensor:
    """Scale `float32[I, N]` to [0, 1] over each image; the least relevant patch keeps a trace, equal ones get 1."""
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    scaled = (relevance - low + SMALLEST_RELEVANCE) / (high - low)
    return torch.where(high > low, scaled, torch.ones_like(scaled))


def pick_by_determinant(similarity: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Pick the patches whose kernel has a large determinant, greedily.

    Args:
        similarity: `float32[I, N, N]` cosines.
        relevance: `float32[I, N]`, scaled.
        count: how many, at most N.

    Returns:
        `int64[I, count]` in the order of picking; among equal gains the earlier patch wins.
    """
    kernel = relevance[:, :, None] * similarity * relevance[:, None, :]
    variance = kernel.diagonal(dim1=1, dim2=2).clone()  # [I, N] what is left of each patch
    floor = NOISE * variance
    is_picked = torch.zeros_like(variance, dtype=torch.bool)
    rows = kernel.new_zeros(len(kernel), count, kernel.shape[1])  # of the Cholesky factor
    picks = []
    for step in range(count):
        # 1. The largest variance that is more than rounding; else the most relevant patch.
        gain = torch.where(variance > floor, variance, relevance - 2 * relevance.amax(dim=1, keepdim=True) - 1)
        pick = gain.masked_fill(is_picked, float("-inf")).argmax(dim=1, keepdim=True)  # [I, 1]
        picks.append(pick)
        is_picked = is_picked.scatter(1, pick, True)
        # 2. What the pick explains of the others.
        own = variance.gather(1, pick)
        across = pick[..., None]
        known = rows[:, :step].gather(2, across.expand(-1, step, 1))  # [I, step, 1]
        row = kernel.gather(1, across.expand(-1, 1, kernel.shape[1]))[:, 0] - (known * rows[:, :step]).sum(dim=1)
        row = torch.where(own > floor.gather(1, pick), row / own.clamp(min=torch.finfo(own.dtype).tiny).sqrt(), 0)
        rows[:, step] = row
        variance = variance - row.square()
    return torch.cat(picks, dim=1)


@dataclass(frozen=True)
class CDPruner(TokenReducer):
    """Diverse patches that have to do with the question, in raster order."""

    spec_name: ClassVar[str] = "CDPruner"
    scores_name: ClassVar[str] = "relevance to the question"
    needs: ClassVar[frozenset[Need]] = frozenset({TEXT, PROJECTED})

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pick from each image for its question."""
        relevance = scale_relevance(find_relevance(*tokens.require_text()))  # [I, N]
        num_kept = self.count_kept(relevance.shape[1])
        picks = pick_by_determinant(cosines(tokens.require(PROJECTED)), relevance, num_kept)
        return keep_patches(tokens.patches, mark(picks, relevance.shape[1]), num_kept, relevance)
