"""VisPruner: half the budget to the patches that CLS attends to, half to what is left after removing duplicates.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025,
arXiv 2412.01818v2 and later. Repository Theia-4869/VisPruner at aefa01adc7c7, Apache-2.0; the kept patches equal those
of its code on the recorded cases (tests/golden/methods).

The most attended patches are important. The others, by falling attention, are a list: in each round every second entry
is compared with the entries between, and the eight that have the nearest neighbour there leave, until the rest of the
budget is left.

The budget counts patches: a "64-token setting" is 32 important and 32 diverse ones (`important_ratio=0.5`). The code
fails where the list has an odd length or a round has fewer than eight to compare, which happens at many small budgets;
here the first half of an odd list has one more entry, and a round removes what it can. Which patches survive hinges on
the smallest differences between similarities: other arithmetic (TF32, bfloat16) leads to other sets.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import ClsAttentionReducer, ReducedTokens, VisualTokens, keep_patches, mark

REMOVED_PER_ROUND = 8


def choose_survivors(patches: Tensor, order: Tensor, count: int) -> Tensor:
    """Remove patches that resemble others, round by round.

    Args:
        patches: `[I, N, D]`.
        order: `int64[I, R]` the list: numbers of the patches that take part.
        count: how many survive, at most R.

    Returns:
        `int64[I, count]` in the order of the last list.
    """
    directions = F.normalize(patches.float(), dim=-1)

    def look_up(places: Tensor) -> Tensor:
        return directions.gather(1, places[..., None].expand(-1, -1, directions.shape[-1]))

    while order.shape[1] > max(count, 1):
        first, second = order[:, 0::2], order[:, 1::2]
        number = min(REMOVED_PER_ROUND, order.shape[1] - count, first.shape[1])
        nearest = (look_up(first) @ look_up(second).transpose(1, 2)).amax(dim=2)  # [I, R / 2]
        rank = nearest.argsort(dim=1, descending=True, stable=True)[:, number:]
        order = torch.cat([first.gather(1, rank), second], dim=1)
    return order[:, :count]


@dataclass(frozen=True)
class VisPruner(ClsAttentionReducer):
    """Important and diverse patches, in raster order.

    Attributes:
        budget: a fraction or a count of patches.
        layer: as in `ClsAttentionReducer`.
        important_ratio: share of the budget for the important ones, from 0 to 1, rounded down.
    """

    important_ratio: float = 0.5

    spec_name: ClassVar[str] = "VisPruner"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: a share outside [0, 1].
        """
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1:
            raise InputError(f"important_ratio={self.important_ratio:g} must be between 0 and 1")

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Choose from each image."""
        attention = self.mean_attention(tokens)  # [I, N]
        num_kept = self.count_kept(attention.shape[1])
        num_important = int(num_kept * self.important_ratio)
        order = attention.argsort(dim=1, descending=True, stable=True)
        survivors = choose_survivors(tokens.patches, order[:, num_important:], num_kept - num_important)
        chosen = torch.cat([order[:, :num_important], survivors], dim=1)
        return keep_patches(tokens.patches, mark(chosen, attention.shape[1]), num_kept, attention)
