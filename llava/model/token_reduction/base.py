"""The reducer interface: what a reducer may look at, what it gives back, and how many patches it may keep.

A reducer is a frozen dataclass that is also a function: `reducer(VisualTokens) -> ReducedTokens`. It holds options
only: no weights, device, tokenizer or model config. Shape letters: `I` images (or crops), `N` patches, `M` tokens per
image after reduction, `D` vision width, `P` joint text-image width.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from llava.errors import InputError

AUTOMATIC = -1
NEEDS_TEXT = "text"
BUDGET_RULE = "-1 (automatic), a fraction in (0, 1], or a whole number above 1"


@dataclass(frozen=True)
class VisualTokens:
    """What a reducer may look at; the optional fields are filled only for reducers that name them in `needs`.

    Attributes:
        patches: `[I, N, D]` patch features that will reach the projector, in raster order.
        grid: rows and columns of the patch grid, `rows * cols == N`.
        joint: `float32[I, N, P]` the patches in the joint text-image space (need "text").
        text: `float32[I, P]` each image's query in the same space, not normalised (need "text").
    """

    patches: Tensor
    grid: tuple[int, int]
    joint: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class ReducedTokens:
    """What a reducer gives back.

    Attributes:
        features: `[I, M, D]`, dtype of the patches, zero-padded on the right where lengths differ.
        lengths: `int64[I]` tokens of each image, between 0 and M, on the CPU: the host cuts by them.
        kept: `bool[I, N]` patches copied verbatim, in raster order, at the start of each row of `features`;
            None where all tokens are synthesised.
        scores: `float32[I, N]` the probabilities that the choice was made on (rows sum to 1), or None.
    """

    features: Tensor
    lengths: Tensor
    kept: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """How many patches to keep: -1 automatic, a fraction in (0, 1], or a whole number of patches above 1."""

    value: float

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            InputError: for 0, other negative numbers, nan, inf, and numbers above 1 that are not whole.
        """
        value = self.value
        is_count = value > 1 and math.isfinite(value) and value == int(value)
        if value != AUTOMATIC and not 0 < value <= 1 and not is_count:
            raise InputError(f"token budget {value:g} is out of range: use {BUDGET_RULE}")

    @property
    def is_automatic(self) -> bool:
        """Whether the reducer's own rule decides."""
        return self.value == AUTOMATIC

    def count(self, num_patches: int) -> int:
        """Turn a fraction or a count into a number of patches.

        Args:
            num_patches: N.

        Returns:
            Between 0 and N. Fractions are rounded down as in the published code (`int(N * ratio)`), but a product
            that is whole up to float rounding is not robbed of one patch (0.29 * 100 gives 29, not 28).
        """
        if self.value <= 1:
            return min(num_patches, int(num_patches * self.value + 1e-9))
        return min(num_patches, int(self.value))

    def __str__(self) -> str:
        """The spelling that parses back to the same budget."""
        return repr(self.value) if 0 < self.value < 1 else ("1.0" if self.value == 1 else str(int(self.value)))


@dataclass(frozen=True)
class TokenReducer(ABC):
    """Base of all reducers. Subclasses are frozen dataclasses; their fields are the options of the spec string."""

    spec_name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Reduce each image's tokens on its own: no row may influence another."""

    def spec(self) -> str:
        """The spec string of this reducer: `parse_reducer(r.spec()) == r`; options at their default are left out."""
        words = []
        budget = ""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "budget":
                budget = f":{value}"
            elif value != option.default:
                words.append(f",{option.name}={str(value).lower() if isinstance(value, bool) else value}")
        return self.spec_name + budget + "".join(words)


def require_joint(tokens: VisualTokens, name: str) -> tuple[Tensor, Tensor]:
    """The joint-space patches and text of a record, or a clear error where the caller left them out.

    Args:
        tokens: the record.
        name: the reducer that asks, for the message.

    Returns:
        `float32[I, N, P]` and `float32[I, P]`.

    Raises:
        ValueError: when either is missing (a programming error: the reducer names "text" in `needs`).
    """
    if tokens.joint is None or tokens.text is None:
        raise ValueError(f"{name} needs VisualTokens.joint and VisualTokens.text")
    return tokens.joint.to(torch.float32), tokens.text.to(torch.float32)
