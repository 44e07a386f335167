"""Reduction inside the language model: what a method may look at between two layers, and what it leaves.

Such a method drops image tokens on the way through the decoder: the first layers read all of them, later ones fewer. It
is a frozen dataclass of options, like `base.TokenReducer`, and written in the same config line; alone or behind a
reducer that works before the language model: `TRIM:-1|FastV:0.5`. Training reads all tokens.

Shape letters: `L` tokens of one sample at this layer, padding left out; `M` tokens that are left of one image there;
`E` language model width; `H` attention heads, `h` heads of the keys, `d` width of a head; `R` rows of an attention map.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.base import Method

PUBLISHED_LAYERS = 32
"""Layers of Vicuna-7B, for which the papers name the layers at which tokens leave."""


class LayerView(Protocol):
    """What a method may look at of one sample, between layer `layer - 1` and layer `layer`, counted from 0.

    What needs computing is computed when it is asked for, for the rows asked for; the layers themselves stay on their
    fast attention.

    Attributes:
        layer: the first layer that will not read the dropped tokens.
        num_layers: of the language model.
        image: the places of the image's tokens among the L.
        text: the places of the text tokens behind the image; where there are none, of all text.
        num_original: how many the image had at the first layer.
        hidden: `[L, E]` what layer `layer` would read.
        positions: `int64[L]` position ids of these tokens in layer `layer - 1`.
        inputs: `[L0, E]` what the first layer read.
        input_image, input_text: the image's and the text's places among these L0.
        frequencies: `float32[d / 2]` of the rotary embedding.
    """

    layer: int
    num_layers: int
    image: slice
    text: list[int]
    num_original: int
    hidden: Tensor
    positions: Tensor
    inputs: Tensor
    input_image: slice
    input_text: list[int]
    frequencies: Tensor

    def past_attention(self, rows: Sequence[int]) -> Tensor:
        """`float32[H, R, L]` causal attention of layer `layer - 1`, which has run, for the queries at these places."""

    def next_attention(self, rows: Sequence[int]) -> Tensor:
        """`float32[H, R, L]` attention that layer `layer` would pay if nothing were dropped."""

    def past_keys(self) -> Tensor:
        """`[h, L, d]` keys of layer `layer - 1`, with their positions."""

    def normed(self) -> Tensor:
        """`[L, E]` the hidden states behind the model's final norm."""


@dataclass(frozen=True)
class Left:
    """What a method leaves of one image.

    Attributes:
        kept: `int64[K]` places among the M of the tokens that go on as they are, rising.
        merged: `[m, E]` tokens that are added behind them, or None.
    """

    kept: Tensor
    merged: Tensor | None = None


@dataclass(frozen=True)
class LayerReducer(Method):
    """Base of the methods inside the language model."""

    position_ids: str = field(default="original", kw_only=True)

    @abstractmethod
    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers, counted from 0 and rising, before which tokens leave.

        Args:
            num_layers: of the language model.

        Raises:
            InputError: the model has no such layer.
        """

    @abstractmethod
    def reduce(self, view: LayerView) -> Left:
        """Decide what is left of one image of one sample; other samples of the batch have no influence."""

    @abstractmethod
    def counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return how many tokens of an image with `num_tokens` are left from each of `layers` on, merged ones included.

        Raises:
            InputError: the budget cannot be met.
        """

    def mean_tokens(self, num_tokens: int, num_layers: int) -> float:
        """Average an image's tokens over all layers."""
        firsts = (0, *self.layers(num_layers), num_layers)
        counts = (num_tokens, *self.counts(num_tokens, num_layers))
        spans = zip(pairwise(firsts), counts, strict=True)
        return sum((after - first) * count for (first, after), count in spans) / num_layers


def check_layer(layer: int, num_layers: int, name: str) -> None:
    """Check a layer before which tokens leave.

    Raises:
        InputError: no layer has run before it, or there is none.
    """
    if not 1 <= layer < num_layers:
        raise InputError(f"{name}: tokens cannot leave before layer {layer}: use 1 to {num_layers - 1}")


def same_depth(published: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Move layers that a paper names for 32 to the same depth of another model: distinct, rising, from 1 on."""
    layers = [max(1, round(layer * num_layers / PUBLISHED_LAYERS)) for layer in published]
    return tuple(sorted({min(layer, num_layers - 1) for layer in layers}))


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Find the highest scores: `float32[M]` to `int64[count]`, rising places; among equal ones the earlier wins."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def find_marked(marks: Tensor, count: int) -> Tensor:
    """List the marked tokens, `bool[M]` to `int64[count]`, where the host knows how many: it does not wait."""
    return marks.to(torch.uint8).argsort(descending=True, stable=True)[:count]
