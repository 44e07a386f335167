"""DART: image tokens that repeat the least of a few pivots, chosen before an early layer of the language model.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025,
arXiv 2502.11494. Repository ZichenWen1/DART (README at 0c888673, Apache-2.0); its code was not at hand: the kept tokens
equal those of a third party's copy of the selection on the recorded cases (tests/golden/methods).

Before layer 2 the tokens with the largest keys (L1 norm, layer 1) become pivots: four of the image, four of the text
behind it. Each pivot takes the same number of image tokens, the least similar to it (cosine of the hidden states behind
the final norm) of those not yet taken. Image pivots and all that is taken stay, at their original positions.

The budget is what the pivots take in all, rounded down to a multiple of their number: `DART:128` keeps 4 + 8 x 16 = 132
tokens from layer 2 on, `DART:64` keeps 68; a fraction is one minus the paper's reduction ratio. Pivots take turns in
the order in which Python lists a set of their places, as in that code; the order matters. Their code reads one sample
at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import Budget
from llava.model.token_reduction.layers import LayerReducer, LayerView, Left, check_layer, find_marked

PUBLISHED_BUDGET = Budget(128)


def find_pivots(
    keys: Tensor, image: slice, text: Sequence[int], num_image: int, num_text: int
) -> tuple[list[int], list[int]]:
    """Choose the tokens with the largest keys.

    Args:
        keys: `[h, L, d]`.
        image: the image's places.
        text: the text's places.
        num_image, num_text: how many, at most.

    Returns:
        Their places among the L, by falling norm: of the image and of the text.
    """
    norms = keys.float().abs().sum(dim=(0, 2))  # [L]
    order = norms.argsort(descending=True, stable=True).tolist()  # waits for the device
    of_image = [place for place in order if image.start <= place < image.stop]
    is_text = set(text)
    return of_image[:num_image], [place for place in order if place in is_text][:num_text]


def take_least_similar(states: Tensor, image: slice, image_pivots: list[int], visits: list[int], quota: int) -> Tensor:
    """Let pivots take turns.

    Args:
        states: `[L, E]`.
        image: the image's places.
        image_pivots: places that are taken from the start.
        visits: places of all pivots, in the order of their turns.
        quota: how many each takes.

    Returns:
        `int64[K]` image tokens that are taken, pivots included, rising.
    """
    directions = F.normalize(states.float(), dim=-1)
    similarity = directions[visits] @ directions[image].T  # [pivots, M]
    taken = torch.zeros(image.stop - image.start, dtype=torch.bool, device=states.device)
    for place in image_pivots:
        taken[place - image.start] = True
    left = len(taken) - len(image_pivots)
    for row in similarity:
        number = min(quota, left)
        order = row.masked_fill(taken, float("inf")).argsort(stable=True)
        taken = taken.index_fill(0, order[:number], True)
        left -= number
    return find_marked(taken, len(taken) - left)


@dataclass(frozen=True)
class DART(LayerReducer):
    """The image tokens that are least like a few pivots.

    Attributes:
        budget: a fraction or a count of the image's tokens that the pivots take.
        layer: the first layer, counted from 0, that reads only what is kept.
        pivot_image, pivot_text: number of pivots.
        position_ids: as in `LayerReducer`.
    """

    budget: Budget = PUBLISHED_BUDGET
    layer: int = 2
    pivot_image: int = 4
    pivot_text: int = 4
    position_ids: str = "original"

    spec_name: ClassVar[str] = "DART"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: no image pivot, or a negative number of text pivots.
        """
        super().__post_init__()
        if self.pivot_image < 1 or self.pivot_text < 0:
            raise InputError(f"pivot_image={self.pivot_image} and pivot_text={self.pivot_text}: use >= 1 and >= 0")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        check_layer(self.layer, num_layers, self.spec_name)
        return (self.layer,)

    def quota(self, num_tokens: int) -> int:
        """How many tokens each pivot takes."""
        return self.budget.count(num_tokens) // (self.pivot_image + self.pivot_text)

    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        taken = self.pivot_image + self.quota(num_tokens) * (self.pivot_image + self.pivot_text)
        return (num_tokens if self.budget.value == 1 else min(num_tokens, taken),)

    def reduce(self, view: LayerView) -> Left:
        """Keep the pivots of the image and what all pivots take."""
        pivots, text_pivots = find_pivots(view.past_keys(), view.image, view.text, self.pivot_image, self.pivot_text)
        visits = list(set(pivots).union(text_pivots))
        num_tokens = view.image.stop - view.image.start
        quota = num_tokens if self.budget.value == 1 else self.quota(view.num_original)
        return Left(take_least_similar(view.normed(), view.image, pivots, visits, quota))
