"""SparseVLM: the question's words that look like the image rate its tokens, layer after layer; dropped ones are merged.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417. Repository Gumpest/SparseVLMs at 26a5f48813c4, Apache-2.0; raters, scores, kept and merged tokens equal
those of its code on the recorded cases (tests/golden/methods).

1. Raters, once, from the input embeddings: text tokens behind the image whose softmax similarity to the image tokens,
   averaged over these, is above its mean.
2. After layers 2, 6 and 15 (of 32, 0-based): the raters' attention to the image, averaged over heads and raters; the
   best tokens stay, in raster order.
3. Of the dropped ones, the best 30 % are clustered by density peaks, and each cluster's mean goes on behind the kept
   tokens. Positions are counted anew.

`SparseVLM+` is the code's version 2.0: the attention is divided by the rotary weights of its distance, the
14 heads that look at the image most count, nothing is merged, positions stay.

A "64-token setting" leaves 576 tokens in layers 0 to 2, then 82, 32 and 18: 82 on average over 32 layers (64.8 if
layer 2 is counted with what is left behind it, as the name has it). The code has four settings, 192, 128, 96 and 64, as
lists of targets for 576 tokens; here other budgets lie on the line between them, and other numbers of tokens are
scaled. Their code reads one sample at a time. The random term that breaks ties between equal densities is left out:
answers do not change from run to run.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import Budget
from llava.model.token_reduction.layers import LayerReducer, LayerView, Left, find_marked, keep_top, same_depth

STAGES = (3, 7, 16)
PUBLISHED_TOKENS = 576
# Setting, and the targets of the three stages, for 576 tokens. The ends let other budgets be read off the same lines.
TARGETS = ((0, (0, 0, 0)), (64, (66, 30, 17)), (96, (238, 48, 26)), (128, (303, 110, 36)), (192, (300, 200, 110)))
PLUS_TARGETS = ((0, (0, 0, 0)), (64, (66, 34, 20)), (96, (246, 54, 28)), (128, (238, 108, 60)), (192, (300, 200, 118)))
EVERYTHING = (576, (576, 576, 576))
RECYCLED_SHARE = 0.3
PLUS_HEADS = 14
DENSITY_NOISE = 1e-6

PUBLISHED_BUDGET = Budget(64)


def find_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Choose the text tokens that rate the image.

    Args:
        visual: `[M, E]` image tokens at the input of the language model.
        text: `[T, E]` text tokens behind them.

    Returns:
        `bool[T]`: those whose mean softmax similarity is above its mean; all, where none is.
    """
    similarity = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)  # [T]
    raters = similarity > similarity.mean()
    return raters | ~raters.any()


def rate(attention: Tensor) -> Tensor:
    """Average raters' attention `float32[H, R, M]` over heads, then raters: `float32[M]`."""
    return attention.mean(dim=0).mean(dim=0)


def rotary_weights(rows: Tensor, columns: Tensor, frequencies: Tensor) -> Tensor:
    """What rotary embedding alone makes of the product of two vectors of ones.

    Args:
        rows: `int64[R]` positions of the queries.
        columns: `int64[M]` positions of the keys.
        frequencies: `float32[d / 2]`.

    Returns:
        `float32[R, M]`: `2 / sqrt(d)` times the sum of `cos((i - j) * frequency)`.
    """
    distance = (rows[:, None] - columns[None, :]).float()  # [R, M]
    width = 2 * len(frequencies)
    return (distance[..., None] * frequencies).cos().sum(dim=-1) * (2 / width**0.5)


def rate_plus(attention: Tensor, weights: Tensor) -> Tensor:
    """Score image tokens as SparseVLM+ does.

    Args:
        attention: `float32[H, R, M]` of the raters.
        weights: `float32[R, M]` from `rotary_weights`.

    Returns:
        `float32[M]`: the mean over the heads that look at the image most, and over raters.
    """
    attention = attention / weights
    heads = attention.sum(dim=(1, 2)).argsort(descending=True, stable=True)[:PLUS_HEADS]
    return rate(attention[heads])


def recycle(hidden: Tensor, scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """Merge the best of the dropped tokens by density peaks.

    Args:
        hidden: `[n, E]` dropped tokens, n at least 1.
        scores: `float32[n]`.
        noise: `float32[m]` in [0, 1), breaks ties between the densities of the m tokens that are merged; None: none.

    Returns:
        `[c, E]` cluster means, in the order of the centres' rank.
    """
    num_merged, num_clusters = count_recycled(len(hidden))
    chosen = hidden[scores.argsort(descending=True, stable=True)[:num_merged]].float()  # [m, E]
    # 1. Density: how near the nearest are; a token is its own nearest.
    distance = torch.cdist(chosen, chosen, compute_mode="donot_use_mm_for_euclid_dist") / hidden.shape[1] ** 0.5
    nearest = distance.topk(num_clusters, largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    if noise is not None:
        density = density + DENSITY_NOISE * noise
    # 2. Distance to the nearest denser token; the densest takes the greatest distance of all.
    is_denser = density[None, :] > density[:, None]
    delta = distance.masked_fill(~is_denser, float("inf")).amin(dim=1)
    delta = torch.where(delta.isinf(), distance.max(), delta)
    # 3. Centres, dense and far from denser ones; every token joins the nearest, centres themselves.
    centres = (density * delta).argsort(descending=True, stable=True)[:num_clusters]
    cluster = distance[:, centres].argmin(dim=1)  # [m]
    cluster[centres] = torch.arange(num_clusters, device=cluster.device)
    # 4. Means.
    members = torch.nn.functional.one_hot(cluster, num_clusters).T.to(chosen.dtype)  # [c, m]
    return ((members @ chosen) / (members.sum(dim=1, keepdim=True) + 1e-6)).to(hidden.dtype)


def count_recycled(num_dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are merged, and into how many."""
    num_merged = min(num_dropped, int(RECYCLED_SHARE * num_dropped) + 1)
    return num_merged, min(num_merged, int(num_merged / 10) + 1)


@dataclass(frozen=True)
class SparseVLM(LayerReducer):
    """Image tokens rated by the question's words, in three stages.

    Attributes:
        budget: a fraction or a count of the image's tokens, on average over the layers.
        position_ids: as in `LayerReducer`. Merged tokens have none of their own: only "packed" where there are any.
    """

    budget: Budget = PUBLISHED_BUDGET
    position_ids: str = "packed"

    spec_name: ClassVar[str] = "SparseVLM"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: original positions with merged tokens.
        """
        super().__post_init__()
        if self.merges and self.position_ids == "original":
            raise InputError("position_ids=original: merged tokens have no position of their own; use packed")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return same_depth(STAGES, num_layers)

    def targets(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens to keep at each stage."""
        budget = self.budget.value
        setting = budget * PUBLISHED_TOKENS if budget <= 1 else budget * PUBLISHED_TOKENS / num_tokens
        table = (*(TARGETS if self.merges else PLUS_TARGETS), EVERYTHING)
        for (low, lower), (high, upper) in pairwise(table):
            if setting <= high:
                share = (setting - low) / (high - low)
                line = (a + (b - a) * share for a, b in zip(lower, upper, strict=True))
                return tuple(max(1, round(target * num_tokens / PUBLISHED_TOKENS)) for target in line)
        return (num_tokens,) * len(STAGES)

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        counts = []
        for target in self.targets(num_tokens)[-len(self.layers(num_layers)) :]:
            kept = self._num_kept(target, num_tokens)
            merged = count_recycled(num_tokens - kept)[1] if self.merges and kept < num_tokens else 0
            num_tokens = kept + merged
            counts.append(num_tokens)
        return tuple(counts)

    def _num_kept(self, target: int, num_tokens: int) -> int:
        # The authors always drop one; a budget of everything keeps everything.
        return num_tokens if self.budget.value == 1 else max(1, min(target, num_tokens - 1))

    def reduce(self, view: LayerView) -> Left:
        """Keep what the raters look at most, and merge some of the others."""
        # 1. Who rates.
        raters = find_raters(view.inputs[view.input_image], view.inputs[view.input_text])
        rows = [view.text[number] for number in raters.cpu().nonzero().flatten().tolist()]  # waits for the device
        # 2. Scores.
        attention = view.past_attention(rows)[:, :, view.image]  # [H, R, M]
        scores = self._score(attention, view.positions[rows], view.positions[view.image], view.frequencies)
        # 3. Selection.
        layers = self.layers(view.num_layers)
        target = self.targets(view.num_original)[-len(layers) :][layers.index(view.layer)]
        kept = keep_top(scores, self._num_kept(target, len(scores)))
        num_dropped = len(scores) - len(kept)
        if not self.merges or not num_dropped:
            return Left(kept)
        is_dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, kept, False)
        dropped = find_marked(is_dropped, num_dropped)
        return Left(kept, recycle(view.hidden[view.image][dropped], scores[dropped]))

    def _score(self, attention: Tensor, rows: Tensor, columns: Tensor, frequencies: Tensor) -> Tensor:
        """Rate image tokens `float32[M]` by the raters' attention `float32[H, R, M]`, given both sides' positions."""
        return rate(attention)


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM+: other scores and targets, and nothing is merged."""

    position_ids: str = "original"

    spec_name: ClassVar[str] = "SparseVLM+"
    merges: ClassVar[bool] = False

    def _score(self, attention: Tensor, rows: Tensor, columns: Tensor, frequencies: Tensor) -> Tensor:
        return rate_plus(attention, rotary_weights(rows, columns, frequencies))
