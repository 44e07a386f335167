"""HoloV: every run of the image gets a share of the budget by its mean attention, and its most attended patches stay.

HoloV, NeurIPS 2025. Repository obananas/HoloV at 1d2e65e961e6, Apache-2.0; the kept patches and their order equal
those of its code on the recorded cases (tests/golden/methods).

The raster sequence is cut into runs of equal length (16 of 36 patches: one and a half rows, not squares). A run's score
is its mean CLS attention, plus the variance of the cosines inside it, rescaled to the same mean. Shares of the budget
are proportional to scores (divided by their sum; the paper has a softmax), and inside a run attention alone decides.
Because of the rescaling the variance is a common factor of nearly all runs and changes next to nothing.

The budget counts patches: a "64-token setting" is 64 of 576. Tokens are read run by run, inside a run by falling
attention. Where a run's share exceeds its length the code does not give the excess to others: zero vectors fill the
budget, behind the projector, and the language model reads them. That is what `faithful=true` (the default) does;
`faithful=false` gives the excess to the most attended patches of other runs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import (
    PROJECTED,
    ClsAttentionReducer,
    Need,
    ReducedTokens,
    VisualTokens,
    gather_kept,
    rank_scores,
    select_top,
)

EPSILON = 1e-6
ATTENTION_SCALE = 1000
VARIANCE_WEIGHT = 0.09


def lay_out_runs(num_patches: int, num_runs: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a sequence into runs, longer ones first.

    Returns:
        `int64[runs, longest]` the patches of each run, -1 behind shorter runs; `int64[N]` each patch's run, and its
        place there.
    """
    num_runs = min(num_runs, num_patches)
    length, num_longer = divmod(num_patches, num_runs)
    run = torch.arange(num_runs, device=device)[:, None]
    place = torch.arange(length + (num_longer > 0), device=device)[None, :]
    number = run * length + run.clamp(max=num_longer) + place
    runs = torch.where(place < length + (run < num_longer), number, -1)
    patch, in_longer = torch.arange(num_patches, device=device), num_longer * (length + 1)
    run_of = torch.where(patch < in_longer, patch // (length + 1), num_longer + (patch - in_longer) // length)
    return runs, run_of, patch - run_of * length - run_of.clamp(max=num_longer)


def score_runs(features: Tensor, attention: Tensor, runs: Tensor) -> Tensor:
    """Score the runs of each image.

    Args:
        features: `[I, N, E]` projected patches.
        attention: `float32[I, N]`.
        runs: `int64[runs, longest]` from `lay_out_runs`.

    Returns:
        `float32[I, runs]`.
    """
    is_there = runs >= 0  # [runs, longest]
    length = is_there.sum(dim=1)  # [runs]
    pairs = is_there[:, :, None] & is_there[:, None, :]
    # 1. Cosines inside a run, without a patch's own.
    places = runs.clamp(min=0)
    directions = (features / (features.norm(dim=-1, keepdim=True) + EPSILON))[:, places]  # [I, runs, longest, E]
    cosine = (directions @ directions.transpose(-1, -2)).masked_fill(~pairs, 0)
    cosine = cosine.masked_fill(torch.eye(runs.shape[1], dtype=torch.bool, device=runs.device), 0)
    # 2. Their variance, the zero on the diagonal counted in.
    others = (length - 1).clamp(min=1)[:, None]
    mean = cosine.sum(dim=-1) / others
    variance = ((cosine - mean[..., None]).square() * pairs).sum(dim=-1) / others  # [I, runs, longest]
    # 3. Attention plus variance, brought to the attention's mean. A run of one patch has its plain attention.
    scaled = attention[:, places] * is_there * ATTENTION_SCALE
    mean_attention = scaled.abs().sum(dim=-1, keepdim=True) / length[:, None]
    mean_variance = (variance * is_there).abs().sum(dim=-1, keepdim=True) / length[:, None]
    score = scaled + VARIANCE_WEIGHT * variance * (mean_attention / (mean_variance + EPSILON))
    means = (score * is_there).sum(dim=-1) / length
    return torch.where(length == 1, (attention[:, places] * is_there).sum(dim=-1), means)


def share_budget(scores: Tensor, budget: int) -> Tensor:
    """Share a budget among runs in proportion to their scores, `float32[I, runs]`: `int64[I, runs]`.

    Shares are rounded down; what is left goes one each to the runs with the largest scores.
    """
    weights = scores / (scores.sum(dim=1, keepdim=True) + EPSILON)
    shares = (weights * budget).floor().long()
    rank = rank_scores(weights)
    return shares + (rank < budget - shares.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class HoloV(ClsAttentionReducer):
    """The most attended patches of every run, read run by run.

    Attributes:
        budget: a fraction or a count of patches.
        layer: as in `ClsAttentionReducer`.
        crops: number of runs.
        faithful: fill up with zero vectors where a run is shorter than its share, as the authors' code does.
    """

    crops: int = 16
    faithful: bool = True

    spec_name: ClassVar[str] = "HoloV"
    made_name: ClassVar[str] = "zeros"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: no run.
        """
        super().__post_init__()
        if self.crops < 1:
            raise InputError(f"crops={self.crops} must be 1 or more")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({self.cls_attention, PROJECTED})

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Keep the top patches of each image's runs."""
        attention = self.mean_attention(tokens)  # [I, N]
        num_patches = attention.shape[1]
        budget = self.count_kept(num_patches)
        # 1. Shares.
        runs, run_of, place = lay_out_runs(num_patches, self.crops, attention.device)
        scores = score_runs(tokens.require(PROJECTED).float(), attention, runs)
        shares = share_budget(scores, budget)  # [I, runs]
        # 2. The rank of each patch in its run.
        inside = torch.where(runs >= 0, attention[:, runs.clamp(min=0)], float("-inf"))
        rank = rank_scores(inside)  # [I, runs, longest]
        rank = rank.flatten(1)[:, run_of * runs.shape[1] + place]  # [I, N]
        share = shares[:, run_of]
        kept = rank < share
        if not self.faithful or budget == num_patches:
            kept = select_top(attention + 2.0 * kept, budget)
        # 3. Reading order: run by run, by rank; a run that is kept whole in raster order.
        length = (runs >= 0).sum(dim=1)[run_of]
        key = run_of * num_patches + torch.where(share >= length, place, rank)
        features, counts = gather_kept(tokens.patches, kept)
        order = self._reading_order(kept, key, features.shape[1])
        blanks = budget - counts
        features = F.pad(features, (0, 0, 0, budget - features.shape[1]))
        order = F.pad(order, (0, budget - order.shape[1]))
        # Rows behind the kept ones are read in their places.
        row = torch.arange(budget, device=order.device).expand_as(order)
        order = torch.where(row < kept.sum(dim=1, keepdim=True), order, row)
        lengths = torch.full_like(counts, budget)
        return ReducedTokens(features, lengths, kept, attention, order=order, num_blank=blanks)

    @staticmethod
    def _reading_order(kept: Tensor, key: Tensor, longest: int) -> Tensor:
        """Rows of the gathered patches `[I, longest]` in the order of their keys `int64[I, N]`."""
        row = kept.cumsum(dim=1) - 1
        last = key.amax() + 1
        patches = torch.where(kept, key, last).argsort(dim=1, stable=True)[:, :longest]
        return row.gather(1, patches)
