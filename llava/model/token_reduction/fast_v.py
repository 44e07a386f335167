"""FastV: from an early layer on, only the image tokens that the last prompt token attends to most.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models", ECCV 2024, arXiv 2403.06764. Repository pkunlp-icler/FastV at d1659729b5bf, without a licence of its own; the
kept tokens equal those of its code on the recorded cases (tests/golden/methods).

Before layer K (0-based, `layer=2`) the attention of layer K - 1 is averaged over its heads, for the query of the last
prompt token. The image tokens with the highest attention stay, all other tokens too, at their original positions. The
budget is what stays: the paper's "R = 50 %" is `FastV:0.5`.

A "64-token setting" is 64 tokens from layer K on (`FastV:64`); its average over 32 layers is 96. Tables of later papers
often mean 64 on average. Their code reads one sample at a time, and one image; here every image of every sample of a
batch is reduced on its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.model.token_reduction.base import Budget
from llava.model.token_reduction.layers import LayerReducer, LayerView, Left, check_layer, keep_top

PUBLISHED_BUDGET = Budget(0.5)


def keep_attended(attention: Tensor, count: int) -> Tensor:
    """Find the most attended tokens: `float32[H, M]`, one query's attention per head, to `int64[count]`, rising."""
    return keep_top(attention.mean(dim=0), count)


@dataclass(frozen=True)
class FastV(LayerReducer):
    """The image tokens that the last prompt token attends to most.

    Attributes:
        budget: a fraction, rounded as Python rounds (halves to even), or a count of the image's tokens.
        layer: the first layer, counted from 0, that reads only those.
        position_ids: as in `LayerReducer`.
    """

    budget: Budget = PUBLISHED_BUDGET
    layer: int = 2
    position_ids: str = "original"

    spec_name: ClassVar[str] = "FastV"

    def layers(self, num_layers: int) -> tuple[int, ...]:
        check_layer(self.layer, num_layers, self.spec_name)
        return (self.layer,)

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        value = self.budget.value
        return (max(1, min(num_tokens, round(num_tokens * value) if value <= 1 else int(value))),)

    def reduce(self, view: LayerView) -> Left:
        """Keep the top tokens of the image."""
        last = view.hidden.shape[0] - 1
        attention = view.past_attention([last])[:, 0, view.image]  # [H, M]
        return Left(keep_attended(attention, self.counts(view.num_original, view.num_layers)[0]))
