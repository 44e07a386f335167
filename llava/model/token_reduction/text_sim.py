"""TextSim, TextSim+ and TRIM: keep the patches that the question is about (one family, three published forms).

`TextSim` selects only; `TextSim+` also appends the mean of the patches that were dropped; `TRIM` is `TextSim+` with
the automatic budget. Source: TRIM, arXiv 2409.10994, and its released code (dot product, negated, softmax, IQR).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction import ops
from llava.model.token_reduction.base import (
    AUTOMATIC,
    NEEDS_TEXT,
    Budget,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    require_joint,
)

SIMILARITIES = ("negated", "direct")
METRICS = ("dot", "cosine")
AUTOMATIC_BUDGET = Budget(AUTOMATIC)


@dataclass(frozen=True)
class TextSimilarityReducer(TokenReducer):
    """Choose patches by their similarity to the query.

    Attributes:
        budget: automatic (IQR rule), a fraction or a count of patches; the mean token comes on top.
        similarity: "negated" (published; right for OpenAI's CLIP) or "direct".
        metric: "dot" (published) or "cosine".
        fence: the factor of the IQR rule, used by the automatic budget only.
        min_keep: keep at least so many patches (never more than there are).
        max_keep: keep at most so many patches; 0 sets no limit.
    """

    budget: Budget = AUTOMATIC_BUDGET
    similarity: str = "negated"
    metric: str = "dot"
    fence: float = ops.TUKEY_FENCE
    min_keep: int = 0
    max_keep: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({NEEDS_TEXT})

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: naming the option, its value and what is allowed.
        """
        for option, allowed in (("similarity", SIMILARITIES), ("metric", METRICS)):
            value = getattr(self, option)
            if value not in allowed:
                raise InputError(f"{self.spec_name}: {option}={value} is unknown: use {' or '.join(allowed)}")
        if not 0 <= self.fence < float("inf"):
            raise InputError(f"{self.spec_name}: fence={self.fence} must be a finite number >= 0")
        if self.min_keep < 0 or self.max_keep < 0 or (self.max_keep and self.min_keep > self.max_keep):
            raise InputError(
                f"{self.spec_name}: min_keep={self.min_keep}, max_keep={self.max_keep} must be >= 0 "
                "and min_keep <= max_keep (max_keep=0: no limit)"
            )

    def score(self, tokens: VisualTokens) -> Tensor:
        """Score all patches; see `ops.score_patches`. Returns `float32[I, N]`."""
        joint, text = require_joint(tokens, self.spec_name)
        return ops.score_patches(joint, text, negated=self.similarity == "negated", cosine=self.metric == "cosine")

    def count(self, probabilities: Tensor) -> Tensor:
        """Decide how many patches each image keeps.

        Args:
            probabilities: `float32[I, N]`, rows sum to 1.

        Returns:
            `int64[I]`, between 0 and N.
        """
        num_images, num_patches = probabilities.shape
        if self.budget.is_automatic:
            counts = ops.count_upper_outliers(probabilities, self.fence)
        else:
            counts = torch.full((num_images,), self.budget.count(num_patches), device=probabilities.device)
        most = min(self.max_keep or num_patches, num_patches)
        return counts.clamp(min=min(self.min_keep, most), max=most)

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Keep the patches the query is about; see the class."""
        scores = self.score(tokens)
        probabilities = scores.softmax(dim=1)
        # Ranked by the scores themselves: softmax keeps their order, but can round two of them to the same value.
        kept = ops.select_top(scores, self.count(probabilities))
        features, lengths = self.apply(tokens.patches, kept)
        return ReducedTokens(features=features, lengths=lengths, kept=kept, scores=probabilities)

    def apply(self, patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Build the tokens of a decision: kept patches in raster order, then the mean of the others.

        Args:
            patches: `[I, N, D]`.
            kept: `bool[I, N]`.

        Returns:
            `[I, M, D]` and `int64[I]`, see `ops.append_mean_token`.
        """
        return ops.append_mean_token(patches, kept)


@dataclass(frozen=True)
class TextSim(TextSimilarityReducer):
    """Selection only. Keeps one patch where the rule would keep none, so that an image is never empty."""

    min_keep: int = 1

    spec_name: ClassVar[str] = "TextSim"

    def apply(self, patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The kept patches alone: `[I, K, D]` zero-padded on the right, and `int64[I]`."""
        return ops.gather_kept(patches, kept)


@dataclass(frozen=True)
class TextSimPlus(TextSimilarityReducer):
    """Selection and the mean of the dropped patches."""

    spec_name: ClassVar[str] = "TextSim+"
