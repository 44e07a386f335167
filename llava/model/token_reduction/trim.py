"""TRIM, Token Reduction using CLIP Metric: keep the patches that the question asks about, average the others.

Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
arXiv 2409.10994, section 3. Numbers equal the released code's (FreedomIntelligence/TRIM at f5a232d, docs/parity.md).

For one image with patches v_1 ... v_N and the question t, both in CLIP's joint space:

    1. score        s_i = -<v_i, t>,  p = softmax(s)
    2. fence        k = number of p_i above Q3 + 1.5 (Q3 - Q1), the upper Tukey fence
    3. select       the k patches with the highest score, in raster order
    4. mean token   the average of all other patches, appended

TRIM and TextSim+ are names of this rule; TextSim is the rule without step 4. A fixed budget replaces step 2.
Shape letters: `I` images (or crops), `N` patches, `M` tokens after reduction, `D` vision width, `P` joint width.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import (
    AUTOMATIC,
    TEXT,
    Budget,
    Need,
    ReducedTokens,
    TokenReducer,
    VisualTokens,
    append_token,
    average_patches,
    gather_kept,
    select_top,
)

AUTOMATIC_BUDGET = Budget(AUTOMATIC)
TUKEY_FENCE = 1.5  # Tukey, Exploratory Data Analysis (1977): outliers lie 1.5 IQR beyond the quartiles.
CHOICES = {"similarity": ("negated", "direct"), "metric": ("dot", "cosine")}


# The four steps.
def score_patches(joint: Tensor, text: Tensor, *, negated: bool = True, cosine: bool = False) -> Tensor:
    """Step 1: score each patch against its image's question.

    The score is the negated dot product: in OpenAI's CLIP the penultimate layer's patches of the object that the text
    names have the *lowest* product with it. Which sign is right depends on the tower; `python -m llava.calibrate`
    measures it.

    Args:
        joint: `float32[I, N, P]` patches.
        text: `float32[I, P]` questions.
        negated: False takes the product unchanged.
        cosine: normalise both sides first (the paper does not).

    Returns:
        `float32[I, N]`, unbounded.
    """
    if cosine:
        joint, text = F.normalize(joint, dim=-1), F.normalize(text, dim=-1)
    similarity = torch.einsum("inp,ip->in", joint, text)
    return -similarity if negated else similarity


def count_upper_outliers(probabilities: Tensor, fence: float = TUKEY_FENCE) -> Tensor:
    """Step 2: count each image's probabilities above the upper Tukey fence, Q3 + fence * (Q3 - Q1).

    Args:
        probabilities: `float32[I, N]`, each row sums to 1.
        fence: the factor on the interquartile range.

    Returns:
        `int64[I]`, between 0 and ceil((N - 1) / 4) for a fence >= 0. Each image has its own quartiles (the released
        code pools them over the batch; at batch size one both agree).
    """
    first, third = find_quartiles(probabilities)
    return count_above_fence(probabilities, first, third, fence)


def find_quartiles(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper quartile of each image's probabilities: `float32[I, N]` to `float32[I]` each."""
    # Made on the device: exactly 0.25 and 0.75, without a copy from the host.
    levels = torch.linspace(0.25, 0.75, 2, dtype=probabilities.dtype, device=probabilities.device)
    return torch.quantile(probabilities, levels, dim=1, interpolation="linear").unbind()


def count_above_fence(probabilities: Tensor, first: Tensor, third: Tensor, fence: float) -> Tensor:
    """Count each image's probabilities `float32[I, ...]` above the fence over its quartiles, `float32[I]` each."""
    upper_fence = third + fence * (third - first)
    return (probabilities > upper_fence[:, None]).sum(dim=1)


# Step 3, `select_top`, is shared with other methods: see base.py.


def append_mean_token(patches: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Step 4: kept patches in raster order, then one token, the float32 mean of all others.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.

    Returns:
        `[I, M, D]` zero-padded on the right, and `int64[I]` lengths on the CPU: the number kept plus one, or N where
        everything is kept (nothing is left to average, so there is no mean token).
    """
    mean = average_patches(patches, ~kept)  # [I, D]
    return append_token(patches, kept, mean)


# The rule.
@dataclass(frozen=True)
class Trim(TokenReducer):
    """TRIM: the outliers among the patches, then the mean of the others.

    Without outliers an image is its mean token alone; with everything kept (`TRIM:1.0`) there is no mean token, and
    the result is plain LLaVA.

    Attributes:
        budget: automatic (the fence decides), a fraction or a count of patches; the mean token comes on top.
        similarity: "negated" (right for OpenAI's CLIP) or "direct".
        metric: "dot" (as in the paper) or "cosine".
        fence: the factor of the Tukey fence; only the automatic budget uses it.
        min_keep: keep at least this many patches (never more than there are).
        max_keep: keep at most this many patches; 0 sets no limit.
    """

    budget: Budget = AUTOMATIC_BUDGET
    similarity: str = "negated"
    metric: str = "dot"
    fence: float = TUKEY_FENCE
    min_keep: int = 0
    max_keep: int = 0

    spec_name: ClassVar[str] = "TRIM"
    made_name: ClassVar[str] = "mean of the rest"
    needs: ClassVar[frozenset[Need]] = frozenset({TEXT})
    has_automatic_budget: ClassVar[bool] = True
    takes_average: ClassVar[bool] = False
    has_mean_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: naming the option, its value and what is allowed.
        """
        super().__post_init__()
        for option, allowed in CHOICES.items():
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

    @property
    def scores_name(self) -> str:
        return f"softmax of {'minus ' * (self.similarity == 'negated')}the similarity to the question"

    def refuse_average(self) -> str:
        """Name the command that finds the fence of a mean."""
        method, mean = replace(self, budget=AUTOMATIC_BUDGET).spec(), str(self.budget).removeprefix("avg=")
        return (
            f"which fence keeps {mean} patches on average depends on the images: "
            f"`python -m llava.calibrate --model-path CKPT --task NAME --reduce {method} --average {mean} --json FILE` "
            "finds it, and --calibrated FILE uses it"
        )

    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Keep the patches that the question asks about; see the head of this file."""
        joint, text = tokens.require_text()  # [I, N, P], [I, P]
        # 1. Score.
        scores = score_patches(joint, text, negated=self.similarity == "negated", cosine=self.metric == "cosine")
        probabilities = scores.softmax(dim=1)  # [I, N]
        # 2. Fence: how many patches each image keeps.
        counts = self.count(probabilities)  # [I]
        # 3. Select on the raw scores: softmax keeps their order, but can round two of them to one value.
        kept = select_top(scores, counts)  # bool[I, N]
        # 4. Mean token.
        build = append_mean_token if self.has_mean_token else gather_kept
        features, lengths = build(tokens.patches, kept)  # [I, M, D], [I]
        return ReducedTokens(features=features, lengths=lengths, kept=kept, scores=probabilities)

    def count(self, probabilities: Tensor) -> Tensor:
        """Decide how many patches each image keeps.

        Args:
            probabilities: `float32[I, N]`, rows sum to 1.

        Returns:
            `int64[I]`, between 0 and N; at least 1 without a mean token.
        """
        num_images, num_patches = probabilities.shape
        if self.budget.is_automatic:
            counts = count_upper_outliers(probabilities, self.fence)
        else:
            counts = torch.full((num_images,), self.budget.count(num_patches), device=probabilities.device)
        return self.limit(counts, num_patches)

    def limit(self, counts: Tensor, num_patches: int) -> Tensor:
        """Bring counts `int64[I]` of N patches within `min_keep` and `max_keep`; at least 1 without a mean token."""
        least = self.min_keep if self.has_mean_token else max(1, self.min_keep)
        most = min(self.max_keep or num_patches, num_patches)
        return counts.clamp(min=min(least, most), max=most)


@dataclass(frozen=True)
class TextSimPlus(Trim):
    """TextSim+, the paper's name of the rule in its ablations: the same numbers as TRIM."""

    spec_name: ClassVar[str] = "TextSim+"


@dataclass(frozen=True)
class TextSim(Trim):
    """TextSim: selection alone, without the mean token; keeps one patch where the rule would keep none."""

    spec_name: ClassVar[str] = "TextSim"
    has_mean_token: ClassVar[bool] = False
