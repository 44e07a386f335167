"""Baselines that do not read the question: patches drawn at random, and an average over the patch grid."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.token_reduction.base import (
    Budget,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    append_token,
    average_patches,
    gather_kept,
    select_top,
)
from llava.model.token_reduction.mixture import fingerprint_images


@dataclass(frozen=True)
class RandomChoice(TokenReducer):
    """Random: patches drawn without looking at the question, the baseline that every selection has to beat.

    The draw depends on the seed and the image alone, never on its batch.

    Attributes:
        budget: a fraction or a count of patches, at least one.
        seed: another seed gives another draw.
        mean: also append the mean of the dropped patches.
    """

    seed: int = 0
    mean: bool = False

    spec_name: ClassVar[str] = "Random"
    made_name: ClassVar[str] = "mean of the rest"

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Draw for each image."""
        patches = tokens.patches  # [I, N, D]
        num_kept = self.count_kept(patches.shape[1])
        kept = select_top(self.draw(patches), num_kept).to(patches.device)  # bool[I, N]
        if self.mean:
            features, lengths = append_token(patches, kept, average_patches(patches, ~kept), num_kept)
        else:
            features, lengths = gather_kept(patches, kept, num_kept)
        return ReducedTokens(features=features, lengths=lengths, kept=kept)

    def draw(self, patches: Tensor) -> Tensor:
        """Random scores for each image, seeded by its fingerprint.

        Args:
            patches: `[I, N, D]`.

        Returns:
            `float32[I, N]` in [0, 1), on the CPU: every device draws the same.
        """
        scores = torch.empty(patches.shape[:2])
        for row, fingerprint in zip(scores, fingerprint_images(patches, self.seed), strict=True):
            row.copy_(torch.rand(row.shape, generator=torch.Generator().manual_seed(fingerprint)))
        return scores


@dataclass(frozen=True)
class Pool(TokenReducer):
    """Pool: the patch grid averaged down to the largest grid of the same proportions within the budget.

    Attributes:
        budget: a fraction or a count of tokens, at least 1 x 1; 0.25 turns 24 x 24 patches into 12 x 12.
    """

    spec_name: ClassVar[str] = "Pool"
    made_name: ClassVar[str] = "means of cells"

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after pooling a grid."""
        rows, cols = grid
        side_ratio = math.sqrt(self.budget.count(rows * cols) / (rows * cols))
        # The small addend undoes float rounding only: sqrt(0.25) * 24 must give 12.
        return max(1, int(rows * side_ratio + 1e-9)), max(1, int(cols * side_ratio + 1e-9))

    def count_left(self, count: int, grid: tuple[int, int]) -> int:
        return math.prod(replace(self, budget=Budget.of_count(count, math.prod(grid))).output_grid(grid))

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pool each image."""
        num_images, _, width = tokens.patches.shape
        grid = tokens.patches.transpose(1, 2).reshape(num_images, width, *tokens.grid)  # [I, D, rows, cols]
        cells = self.output_grid(tokens.grid)
        pooled = F.adaptive_avg_pool2d(grid.to(torch.float32), cells).to(tokens.patches.dtype)
        features = pooled.flatten(2).transpose(1, 2).contiguous()  # [I, M, D]
        lengths = torch.full((num_images,), features.shape[1])
        return ReducedTokens(features, lengths, places=self._find_middles(tokens.grid, cells).expand(num_images, -1))

    @staticmethod
    def _find_middles(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
        """The patch in the middle of each cell, `int64[M]`."""
        row, col = (
            (torch.arange(num_cells) + 0.5) * num_patches // num_cells
            for num_patches, num_cells in zip(grid, cells, strict=True)
        )
        return (row[:, None] * grid[1] + col[None, :]).long().flatten()
