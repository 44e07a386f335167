"""Baselines that do not read the question: patches drawn at random, and an average over the patch grid."""

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.token_reduction.base import (
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    append_token,
    average_patches,
    gather_kept,
    select_top,
)

FINGERPRINT_SIZE = 64  # the signs of this many features tell one image from another


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
        """Random scores for each image, seeded by the signs of some of its features.

        Signs, because rounding differs a little between batch sizes and devices while signs stay.

        Args:
            patches: `[I, N, D]`.

        Returns:
            `float32[I, N]` in [0, 1), on the CPU: every device draws the same.
        """
        flat = patches.detach().flatten(1)
        signs = (flat[:, :: max(1, flat.shape[1] // FINGERPRINT_SIZE)][:, :FINGERPRINT_SIZE] > 0).to(torch.uint8)
        scores = torch.empty(patches.shape[:2])
        # One wait for the device, for all images.
        for row, own_signs in zip(scores, signs.cpu().tolist(), strict=True):
            fingerprint = zlib.crc32(bytes(own_signs), self.seed & 0xFFFFFFFF)
            row.copy_(torch.rand(row.shape, generator=torch.Generator().manual_seed(fingerprint)))
        return scores


@dataclass(frozen=True)
class Pool(TokenReducer):
    """Pool: the patch grid averaged down to the largest grid of the same proportions within the budget.

    Attributes:
        budget: a fraction or a count of tokens, at least 1 x 1; 0.25 turns 24 x 24 patches into 12 x 12.
    """

    spec_name: ClassVar[str] = "Pool"

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after pooling a grid."""
        rows, cols = grid
        side_ratio = math.sqrt(self.budget.count(rows * cols) / (rows * cols))
        # The small addend undoes float rounding only: sqrt(0.25) * 24 must give 12.
        return max(1, int(rows * side_ratio + 1e-9)), max(1, int(cols * side_ratio + 1e-9))

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Pool each image."""
        num_images, _, width = tokens.patches.shape
        grid = tokens.patches.transpose(1, 2).reshape(num_images, width, *tokens.grid)  # [I, D, rows, cols]
        pooled = F.adaptive_avg_pool2d(grid.to(torch.float32), self.output_grid(tokens.grid)).to(tokens.patches.dtype)
        features = pooled.flatten(2).transpose(1, 2).contiguous()  # [I, M, D]
        return ReducedTokens(features=features, lengths=torch.full((num_images,), features.shape[1]))
