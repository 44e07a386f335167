"""Pool: the baseline that blurs instead of choosing, an adaptive average over the patch grid."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from llava.errors import InputError
from llava.model.token_reduction.base import Budget, ReducedTokens, TokenReducer, VisualTokens

DEFAULT_BUDGET = Budget(0.25)


@dataclass(frozen=True)
class Pool(TokenReducer):
    """Average the patch grid down to the largest grid of the same proportions within the budget (at least 1 x 1).

    Attributes:
        budget: a fraction or a count of tokens, for example 0.25: 24 x 24 patches become 12 x 12.
    """

    budget: Budget = DEFAULT_BUDGET

    spec_name: ClassVar[str] = "Pool"

    def __post_init__(self) -> None:
        """Refuse the automatic budget.

        Raises:
            InputError: when the budget is -1.
        """
        if self.budget.is_automatic:
            raise InputError("Pool has no automatic budget: give a fraction in (0, 1] or a count, as in Pool:0.25")

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after pooling a grid."""
        rows, cols = grid
        side_ratio = math.sqrt(self.budget.count(rows * cols) / (rows * cols))
        # The small addend undoes float rounding only: sqrt(0.25) * 24 must give 12.
        return max(1, int(rows * side_ratio + 1e-9)), max(1, int(cols * side_ratio + 1e-9))

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pool each image."""
        num_images, _, width = tokens.patches.shape
        grid = tokens.patches.transpose(1, 2).reshape(num_images, width, *tokens.grid)
        pooled = F.adaptive_avg_pool2d(grid.to(torch.float32), self.output_grid(tokens.grid)).to(tokens.patches.dtype)
        features = pooled.flatten(2).transpose(1, 2).contiguous()
        lengths = torch.full((num_images,), features.shape[1])
        return ReducedTokens(features=features, lengths=lengths)
