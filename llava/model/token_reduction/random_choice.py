"""Random: the baseline every selection has to beat, patches drawn without looking at the question."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction import ops
from llava.model.token_reduction.base import Budget, ReducedTokens, TokenReducer, VisualTokens

FINGERPRINT_SIZE = 64  # signs of so many features tell one image from another

DEFAULT_BUDGET = Budget(0.25)


@dataclass(frozen=True)
class RandomChoice(TokenReducer):
    """Keep randomly drawn patches; the draw depends on the seed and the image alone, never on its batch.

    Attributes:
        budget: a fraction or a count of patches (there is no automatic choice without a query).
        seed: another seed, another draw.
        mean: also append the mean of the dropped patches, as TRIM does.
    """

    budget: Budget = DEFAULT_BUDGET
    seed: int = 0
    mean: bool = False

    spec_name: ClassVar[str] = "Random"

    def __post_init__(self) -> None:
        """Refuse the automatic budget.

        Raises:
            InputError: when the budget is -1.
        """
        if self.budget.is_automatic:
            raise InputError("Random has no automatic budget: give a fraction in (0, 1] or a count, as in Random:0.2")

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Draw for each image."""
        patches = tokens.patches
        count = self.budget.count(patches.shape[1])
        scores = torch.stack([self.draw(image) for image in patches]).to(patches.device)
        kept = ops.select_top(scores, torch.full((patches.shape[0],), count, device=patches.device))
        features, lengths = (ops.append_mean_token if self.mean else ops.gather_kept)(patches, kept)
        return ReducedTokens(features=features, lengths=lengths, kept=kept)

    def draw(self, image: Tensor) -> Tensor:
        """Random scores for one image, seeded by the signs of some of its features.

        Signs, because rounding differs a little between batch sizes and devices while signs stay.

        Args:
            image: `[N, D]`.

        Returns:
            `float32[N]` in [0, 1), on the CPU.
        """
        flat = image.detach().flatten()
        signs = (flat[:: max(1, flat.numel() // FINGERPRINT_SIZE)][:FINGERPRINT_SIZE] > 0).to(torch.uint8).cpu()
        fingerprint = zlib.crc32(bytes(signs.tolist()), self.seed & 0xFFFFFFFF)
        generator = torch.Generator().manual_seed(fingerprint)
        return torch.rand(image.shape[0], generator=generator)
