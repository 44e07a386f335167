"""PyramidDrop: the language model reads fewer image tokens from stage to stage.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
2025, arXiv 2410.17247. Repository Cooperx521/PyramidDrop at 6444f304aee4, MIT; scores and kept tokens equal those of
its code on the recorded cases (tests/golden/methods).

Before layers 8, 16 and 24 (of 32) the query of the last prompt token is compared with the image tokens, by the query
and key projections of the layer that comes next, on its own input. The best of them stay: of an image's original number
the shares 0.5, 0.25 and 0.125, rounded down. Positions are counted anew after each drop.

The budget as a fraction is the paper's lambda, the share that each stage leaves of the one before: `PyramidDrop:0.5` is
the paper's setting, 270 tokens on average over the layers for 576. A count is that average: lambda is solved for. The
published comparisons at 192, 128 and 64 tokens use lists of layers that are not in the repository; with the layers
above, the first eight alone make an average of 144 of 576, so less needs earlier ones: `stages=2/6/15`.

While tokens are generated their code goes on with the positions of the unpruned sequence where the caller counts them;
here a new token follows the last position of each layer. In models of another depth the layers lie at the same
relative depth. Training reads all tokens, where the authors prune during training too.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import Budget
from llava.model.token_reduction.layers import LayerReducer, LayerView, Left, check_layer, keep_top, same_depth

STAGES = (8, 16, 24)
BISECTIONS = 40

PUBLISHED_BUDGET = Budget(0.5)


def rank_by_last_query(attention: Tensor) -> Tensor:
    """Score tokens: `float32[H, M]` the last prompt token's attention per head, to its mean `float32[M]`."""
    return attention.mean(dim=0)


@dataclass(frozen=True)
class PyramidDrop(LayerReducer):
    """Stages of layers, each with the image tokens that the last prompt token ranks highest.

    Attributes:
        budget: a fraction: what each stage leaves of the stage before; a count: the average over the layers.
        stages: the first layer of each stage, counted from 0, as in "8/16/24"; "": the paper's.
        position_ids: as in `LayerReducer`.
    """

    budget: Budget = PUBLISHED_BUDGET
    stages: str = ""
    position_ids: str = "packed"

    spec_name: ClassVar[str] = "PyramidDrop"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: stages that are not rising layer numbers with slashes between.
        """
        super().__post_init__()
        numbers = self.stages.split("/") if self.stages else []
        if not all(number.isdecimal() for number in numbers) or (found := [*map(int, numbers)]) != sorted(set(found)):
            raise InputError(f"stages={self.stages} must be rising layer numbers with slashes between, as in 8/16/24")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        if not self.stages:
            return same_depth(STAGES, num_layers)
        layers = tuple(map(int, self.stages.split("/")))
        for layer in layers:
            check_layer(layer, num_layers, self.spec_name)
        return layers

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        layers = self.layers(num_layers)
        if self.budget.value <= 1:
            return self._left(self.budget.value, num_tokens, len(layers))
        # The largest lambda whose average is within the budget.
        firsts = (0, *layers, num_layers)

        def mean(share: float) -> float:
            counts = (num_tokens, *self._left(share, num_tokens, len(layers)))
            spans = zip(pairwise(firsts), counts, strict=True)
            return sum((after - first) * count for (first, after), count in spans) / num_layers

        if mean(0) > self.budget.value:
            raise InputError(
                f"{self.spec()}: with layers {'/'.join(map(str, layers))} of {num_layers}, {num_tokens} tokens are at "
                f"least {mean(0):.0f} on average: use earlier layers, as in stages=2/6/15, or a larger budget"
            )
        low, high = 0.0, 1.0
        if mean(high) <= self.budget.value:
            return self._left(high, num_tokens, len(layers))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) <= self.budget.value else (low, middle)
        return self._left(low, num_tokens, len(layers))

    @staticmethod
    def _left(share: float, num_tokens: int, num_stages: int) -> tuple[int, ...]:
        return tuple(max(1, int(num_tokens * share**stage + 1e-9)) for stage in range(1, num_stages + 1))

    def reduce(self, view: LayerView) -> Left:
        """Keep the stage's share of the image."""
        last = view.hidden.shape[0] - 1
        scores = rank_by_last_query(view.next_attention([last])[:, 0, view.image])  # [M]
        stage = self.layers(view.num_layers).index(view.layer)
        return Left(keep_top(scores, self.counts(view.num_original, view.num_layers)[stage]))
