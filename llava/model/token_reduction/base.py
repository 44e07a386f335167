"""The reducer interface: what a reducer may look at, what it returns, and how many patches it may keep.

A reducer is a frozen dataclass that is also a function: `reducer(VisualTokens) -> ReducedTokens`. It holds options
only: no weights, device, tokenizer or model config. Shape letters: `I` images (or crops), `N` patches, `K` kept
patches, `M` tokens per image after reduction, `D` vision width, `P` joint text-image width, `H` attention heads, `d`
width of a head, `E` language model width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import InputError
from llava.model.token_reduction.mixture import draw_parts, join_rows, take_rows

AUTOMATIC = -1
POSITION_IDS = ("original", "packed")
BUDGET_RULE = "-1 (automatic), a fraction in (0, 1], a whole number above 1, or avg= with a mean number of 1 or more"


@dataclass(frozen=True)
class Need:
    """One thing that a reducer looks at besides the patches, and where in the vision tower it comes from.

    The kinds, per image (or crop):

    - `text`: the query and the patches in the joint text-image space, `VisualTokens.joint` and `.text`.
    - `projected`: `[N, E]` patches behind the projector.
    - `cls_attention[layer]`: `float32[H, N]` attention of the CLS row to the patches: the softmax runs over all N + 1
      keys, then the CLS column is cut off, so rows sum to less than 1.
    - `cls_query[layer]`: `[H, d]` the CLS row's query, unscaled, in the tower's dtype.
    - `keys[layer]`: `[H, N + 1, d]` keys, CLS first, unscaled, in the tower's dtype.
    - `attention[layer]`: `float32[H, N + 1, N + 1]` the whole attention map, CLS first.
    - `received[layer]`: `float32[N]` the attention that each patch receives: the mean over heads and over all N + 1
      queries (N in a tower without CLS), what is left of a whole map where only its columns count.
    - `cls[layer]`: `[D]` the CLS row of hidden state `layer`, in the tower's dtype.

    Attributes:
        kind: one of them.
        layer: which layer, counted as `mm_vision_select_layer` counts hidden states: the layer whose output is hidden
            state `layer`. -2 is number 22 of 0 to 23 in CLIP ViT-L; 0 (the embeddings) is the output of no layer.
        option: of the reducer, which names the layer, for messages; "" where none does.
    """

    kind: str
    layer: int | None = None
    option: str = field(default="", compare=False, repr=False)

    KINDS_OF_A_LAYER: ClassVar[tuple[str, ...]] = ("cls_attention", "cls_query", "keys", "attention", "received", "cls")

    def __post_init__(self) -> None:
        """Check that the kind exists, and that it has a layer where it needs one.

        Raises:
            ValueError: it does not (a programming error).
            InputError: layer 0.
        """
        if self.kind not in (("text", "projected") if self.layer is None else self.KINDS_OF_A_LAYER):
            kinds = ", ".join(self.KINDS_OF_A_LAYER)
            raise ValueError(f"{self}: a need is text, projected, or one of {kinds} with a layer")
        if self.layer == 0:
            raise InputError(f"{self}: hidden state 0 is the embeddings; use a layer from 1, or from -1 backwards")

    def __str__(self) -> str:
        """For example `cls_attention[-2]`."""
        return self.kind if self.layer is None else f"{self.kind}[{self.layer}]"

    @property
    def reads_cls(self) -> bool:
        """Whether it holds something of the CLS row, which a tower such as SigLIP does not have."""
        return self.kind in self.KINDS_OF_A_LAYER and self.kind != "received"

    def num_queries(self, num_patches: int) -> int:
        """Rows of a layer whose queries it takes: all for a map, none for its output, else the CLS row at most."""
        return {"attention": num_patches + 1, "received": num_patches + 1, "cls": 0}.get(self.kind, 1)

    def shape(self, num_patches: int, *, heads: int = 1, width: int = 1) -> tuple[int, ...]:
        """The shape per image of anything but text.

        Args:
            num_patches: N.
            heads: H.
            width: d of keys and queries, E of projected patches, D of the CLS row.
        """
        return {
            "projected": (num_patches, width),
            "cls_attention": (heads, num_patches),
            "cls_query": (heads, width),
            "keys": (heads, num_patches + 1, width),
            "attention": (heads, num_patches + 1, num_patches + 1),
            "received": (num_patches,),
            "cls": (width,),
        }[self.kind]


TEXT = Need("text")
PROJECTED = Need("projected")


@dataclass(frozen=True)
class VisualTokens:
    """What a reducer may look at; beyond patches and grid only what it names in `needs`.

    Attributes:
        patches: `[I, N, D]` patch features that would reach the projector, in raster order.
        grid: rows and columns of the patch grid, `rows * cols == N`.
        joint: `float32[I, N, P]` the patches in the joint text-image space (need `text`).
        text: `float32[I, P]` each image's query in the same space, not normalised (need `text`).
        intermediates: everything else by need, with a leading axis of `I`; see `Need` for the shapes.
    """

    patches: Tensor
    grid: tuple[int, int]
    joint: Tensor | None = None
    text: Tensor | None = None
    intermediates: Mapping[Need, Tensor] = field(default_factory=dict)

    def require_text(self) -> tuple[Tensor, Tensor]:
        """Return the joint-space patches `float32[I, N, P]` and queries `float32[I, P]`.

        Raises:
            ValueError: they are not there (a programming error: the reducer names `TEXT` in `needs`).
        """
        if self.joint is None or self.text is None:
            raise ValueError("a reducer that reads text needs VisualTokens.joint and VisualTokens.text")
        return self.joint.to(torch.float32), self.text.to(torch.float32)

    def require(self, need: Need) -> Tensor:
        """Return an intermediate, `[I, ...]` as `Need` says.

        Raises:
            InputError: the images were encoded without it.
        """
        if need not in self.intermediates:
            raise InputError(
                f"these image features hold no {need}: they were encoded for another token reduction; "
                "encode the images again after set_token_reduction (in a chat: chat.show(images))"
            )
        return self.intermediates[need]


def make_example(needs: Collection[Need], grid: tuple[int, int]) -> VisualTokens:
    """Make up one image with all that a reducer needs, to find out what it leaves of any image.

    Args:
        needs: of the reducer.
        grid: rows and columns of patches.

    Returns:
        Random numbers in [0, 1), always the same, of widths and heads of 1.
    """
    num_patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(1, *shape, generator=generator)

    has_text = TEXT in needs
    return VisualTokens(
        patches=draw(num_patches, 1),
        grid=grid,
        joint=draw(num_patches, 1) if has_text else None,
        text=draw(1) if has_text else None,
        intermediates={need: draw(*need.shape(num_patches)) for need in needs if need != TEXT},
    )


@dataclass(frozen=True)
class ReducedTokens:
    """What a reducer returns. Every image keeps at least one token.

    Attributes:
        features: `[I, M, D]`, dtype of the patches, zero-padded on the right where lengths differ.
        lengths: `int64[I]` tokens of each image, between 1 and M, on the CPU: the caller cuts by them.
        kept: `bool[I, N]` patches copied verbatim, in raster order, at the start of each row of `features`;
            None where all tokens are synthesised.
        scores: `float32[I, N]` what the choice was made on, as probabilities or weights, or None.
        centres: `bool[I, N]` patches that synthesised tokens are made around (cluster centres, merge targets), or None.
        order: `int64[I, M]` the row of `features` that the language model reads at each place; None: as they lie.
            Crops that are merged by place (`llava.model.crops`) stay in raster order.
        places: `int64[I, M]` the patch that each row of `features` stands for where positions are original; None: kept
            patches for themselves, every other row for the last patch.
        num_blank: `int64[I]` how many of the last rows read are zero behind the projector too, on the CPU; None: none.
    """

    features: Tensor
    lengths: Tensor
    kept: Tensor | None = None
    scores: Tensor | None = None
    centres: Tensor | None = None
    order: Tensor | None = None
    places: Tensor | None = None
    num_blank: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """How many patches to keep: -1 automatic, a fraction in (0, 1], a whole number of patches above 1, or a mean.

    Attributes:
        value: the number.
        is_average: it is a mean over images, 1 or more, whole or not.
    """

    value: float
    is_average: bool = False

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            InputError: for 0, other negative numbers, nan, inf, numbers above 1 that are not whole, means below 1.
        """
        value = self.value
        is_count = value > 1 and math.isfinite(value) and value == int(value)
        is_mean = self.is_average and 1 <= value < math.inf
        if not is_mean and (self.is_average or (value != AUTOMATIC and not 0 < value <= 1 and not is_count)):
            raise InputError(f"token budget {'avg=' * self.is_average}{value:g} is out of range: use {BUDGET_RULE}")

    @classmethod
    def of_count(cls, count: int, num_patches: int) -> Self:
        """The budget of 1 to N patches; 1 is a fraction of N, because the number 1 stands for all."""
        return cls(count if count > 1 else 1 / num_patches)

    @property
    def is_automatic(self) -> bool:
        """Whether the reducer's own rule decides."""
        return self.value == AUTOMATIC

    def count(self, num_patches: int) -> int:
        """Turn a fraction or a count into a number of patches.

        Args:
            num_patches: N.

        Returns:
            Between 0 and N. Fractions are rounded down as in TRIM's released code (`int(N * ratio)`), but a product
            that is whole up to float rounding does not lose a patch (0.29 * 100 is 29, not 28). Of a mean it is the
            smaller one of the two numbers that are mixed.

        Raises:
            InputError: an automatic budget; the number depends on the image, and only the reducer's rule knows it.
        """
        if self.is_automatic:
            raise InputError(f"an automatic budget ({self}) is not a number of patches: give a fraction or a count")
        if self.value <= 1 and not self.is_average:
            return min(num_patches, int(num_patches * self.value + 1e-9))
        return min(num_patches, int(self.value))

    def __str__(self) -> str:
        """The spelling that parses back to the same budget."""
        if self.is_average:
            return f"avg={float(self.value)!r}".removesuffix(".0")
        return repr(self.value) if 0 < self.value < 1 else ("1.0" if self.value == 1 else str(int(self.value)))


DEFAULT_BUDGET = Budget(0.25)
OPTION_TYPES = (int, float, bool, str)  # what a spec string can write, and read back as the same value


@dataclass(frozen=True)
class Method(ABC):
    """What a spec string names: a frozen dataclass whose fields are its options.

    An option is an int, a float, a bool or a str.

    Attributes:
        budget: how many patches or tokens to keep.
        position_ids: "original": a token has the position in the prompt that it would have if nothing had left;
            "packed": positions are counted without gaps.
        spec_name: the method's name in spec strings.
        has_automatic_budget: whether the method has a rule of its own for how many patches an image keeps.
        takes_average: whether a mean budget mixes two fixed ones; a method that has another way to it refuses it here.
    """

    budget: Budget = DEFAULT_BUDGET
    position_ids: str = field(default="packed", kw_only=True)

    spec_name: ClassVar[str]
    has_automatic_budget: ClassVar[bool] = False
    takes_average: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options; subclasses with options to check extend this.

        Raises:
            InputError: an automatic budget for a method that has no rule for one, a mean for one that takes none,
                unknown positions.
            TypeError: an option that a spec string cannot write (a programming error).
        """
        for option in fields(self):
            if option.name != "budget" and option.type not in OPTION_TYPES:
                raise TypeError(f"{type(self).__name__}.{option.name}: an option is an int, a float, a bool or a str")
        if self.budget.is_automatic and not self.has_automatic_budget:
            name = self.spec_name
            raise InputError(f"{name} has no automatic budget: give a fraction in (0, 1] or a count, as in {name}:0.2")
        if self.budget.is_average and not self.takes_average:
            raise InputError(self.refuse_average())
        if self.position_ids not in POSITION_IDS:
            raise InputError(f"position_ids={self.position_ids} is unknown: use {' or '.join(POSITION_IDS)}")

    def refuse_average(self) -> str:
        """Say in one line what to write in place of a mean budget that this method does not take."""
        return f"{self.spec_name} takes no mean number of patches ({self.budget}): give a fraction or a count"

    def at_budget(self, num_tokens: int) -> Self:
        """The same method at what its paper calls a setting of so many tokens: here, a budget of so many.

        Methods that compose a setting of several parts redefine this.
        """
        return replace(self, budget=Budget(num_tokens))

    def spec(self) -> str:
        """The spec string of this method: parsing it gives an equal one; options at their default are left out."""
        text = f"{self.spec_name}:{self.budget}"
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name != "budget" and value != option.default:
                text += f",{option.name}={str(value).lower() if isinstance(value, bool) else value}"
        return text


@dataclass(frozen=True)
class TokenReducer(Method):
    """Base of all reducers before the language model.

    A fixed budget of n keeps n patches, with at most one synthesised token on top. Methods that merge patches keep
    fewer; where they leave more tokens than n and one, `most_tokens` says how many.

    Attributes:
        needs: what the method looks at besides the patches; a property where that depends on its options.
        scores_name: what `ReducedTokens.scores` are, in a few words for a person; empty where the method gives none.
        made_name: what the tokens are that are no patches, likewise; empty where all are patches.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    takes_average: ClassVar[bool] = True
    scores_name: ClassVar[str] = ""
    made_name: ClassVar[str] = ""

    def __init_subclass__(cls, **options: object) -> None:
        """Let a method be called for one fixed count at a time, so that it needs no code for mean budgets."""
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = mix_counts(cls.__call__)

    def __post_init__(self) -> None:
        """Check the options; subclasses with options to check extend this.

        Raises:
            InputError: as `Method`, and for a layer that cannot be looked at.
            TypeError: as `Method`, and for needs that are not a frozenset (a programming error).
        """
        if not isinstance(self.needs, frozenset):
            raise TypeError(f"{type(self).__name__}.needs is not a frozenset")
        super().__post_init__()

    @abstractmethod
    def __call__(self, tokens: VisualTokens) -> ReducedTokens:
        """Reduce each image's tokens on its own: no row may influence another."""

    def count_kept(self, num_patches: int) -> int:
        """Return how many of N patches a fixed budget keeps: at least one, so that no image is left without a token."""
        return max(1, self.budget.count(num_patches))

    def most_tokens(self, num_patches: int) -> int:
        """Return how many tokens a fixed budget leaves of N patches at most: here, those kept and one for the rest."""
        return min(self.count_kept(num_patches) + 1, num_patches)

    def count_left(self, count: int, grid: tuple[int, int]) -> int:
        """Return what counts of a fixed budget of so many patches in a mean: here, all of them."""
        return count

    def parts(self, grid: tuple[int, int]) -> dict[Self, float]:
        """Return the reducers that this one mixes, each with its share of the images: itself, unless for a mean.

        Args:
            grid: rows and columns of patches.

        Returns:
            One or two reducers. What two leave brackets the mean as closely as this method can, and their shares give
            it exactly; more than all N patches are N.
        """
        if not self.budget.is_average:
            return {self: 1.0}
        num_patches = math.prod(grid)
        mean = min(self.budget.value, num_patches)
        fewer = int(mean)
        counts = [fewer, *range(fewer + 1, num_patches + 1)]
        more = next((count for count in counts if self.count_left(count, grid) > mean), num_patches)
        least, most = (self.count_left(count, grid) for count in (fewer, more))
        share = (mean - least) / (most - least) if most > least else 0.0
        shares = {fewer: 1 - share, more: share} if share else {fewer: 1.0}
        return {replace(self, budget=Budget.of_count(count, num_patches)): each for count, each in shares.items()}


def mix_counts(call: Callable[[TokenReducer, VisualTokens], ReducedTokens]) -> Callable[..., ReducedTokens]:
    """Make a method's call take mean budgets: it is called for the images of each count, and rows are joined again."""

    @wraps(call)
    def mix(reducer: TokenReducer, tokens: VisualTokens) -> ReducedTokens:
        parts = reducer.parts(tokens.grid)
        if len(parts) == 1:
            return call(*parts, tokens)
        drawn = zip(parts, draw_parts(tokens.patches, list(parts.values())), strict=True)
        drawn = [(part, rows) for part, rows in drawn if len(rows)]
        if len(drawn) == 1:
            return call(drawn[0][0], tokens)
        reduced = [call(part, take_rows(tokens, rows)) for part, rows in drawn]
        return join_rows(reduced, [rows for _, rows in drawn])

    return mix


@dataclass(frozen=True)
class ClsAttentionReducer(TokenReducer):
    """Base of the methods that look at the CLS row of one layer's attention.

    Attributes:
        layer: counted as `mm_vision_select_layer`; -2 as in the released code of the methods here.
    """

    layer: int = -2

    scores_name: ClassVar[str] = "CLS attention"

    @property
    def cls_attention(self) -> Need:
        return Need("cls_attention", self.layer, "layer")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({self.cls_attention})

    def mean_attention(self, tokens: VisualTokens) -> Tensor:
        """Average the heads: `float32[I, N]`."""
        return tokens.require(self.cls_attention).mean(dim=1)


def keep_patches(patches: Tensor, kept: Tensor, num_kept: int, scores: Tensor | None = None) -> ReducedTokens:
    """Keep the same number of each image's patches, in raster order, and nothing else.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.
        num_kept: of each image.
        scores: `float32[I, N]` what the choice was made on.
    """
    features, lengths = gather_kept(patches, kept, num_kept)
    return ReducedTokens(features=features, lengths=lengths, kept=kept, scores=scores)


def mark(chosen: Tensor, num_patches: int) -> Tensor:
    """Turn the chosen patches' numbers `int64[I, K]` into `bool[I, N]`."""
    marks = torch.zeros(chosen.shape[0], num_patches, dtype=torch.bool, device=chosen.device)
    return marks.scatter(1, chosen, True)


def cosines(vectors: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosine of each vector with each other: `[I, N, D]` and `[I, M, D]` (default: the same) to `float32[I, N, M]`."""
    directions = F.normalize(vectors.float(), dim=-1)
    return directions @ (directions if others is None else F.normalize(others.float(), dim=-1)).transpose(-1, -2)


def rank_scores(scores: Tensor) -> Tensor:
    """Rank the entries of the last axis: 0 is the highest; among equal scores the earlier entry comes first.

    Args:
        scores: `float[..., N]`.

    Returns:
        `int64[..., N]`, a permutation of 0 to N - 1 in each row.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # entry at each rank
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)  # rank of each entry


def select_top(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Select each image's patches with the highest scores.

    Args:
        scores: `float32[I, N]`.
        counts: how many, between 0 and N: `int64[I]`, or one number for all images.

    Returns:
        `bool[I, N]` with `counts[i]` True in row i; among equal scores the earlier patch wins.
    """
    return rank_scores(scores) < (counts.reshape(-1, 1) if isinstance(counts, Tensor) else counts)


def gather_kept(patches: Tensor, kept: Tensor, num_kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Move each image's kept patches to the front, in raster order, bit for bit.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.
        num_kept: how many are kept of every image, where the budget is fixed: the host then knows without waiting.

    Returns:
        `[I, K, D]` with K the largest count, zeros behind shorter rows, and `int64[I]` the counts, on the CPU.
    """
    num_images, _, width = patches.shape
    if num_kept is None:
        counts = kept.sum(dim=1)
        # The only point of a reduction at which the host waits for the device: everything downstream cuts by these
        # numbers.
        lengths = counts.cpu()
    else:
        lengths = torch.full((num_images,), num_kept)
    longest = int(lengths.max()) if kept.numel() else 0
    # A stable sort of "dropped" (False before True) lists the kept positions first and keeps their order.
    front = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # [I, K]
    gathered = patches.gather(1, front[:, :, None].expand(-1, -1, width))  # [I, K, D]
    if num_kept is not None:
        return gathered, lengths
    is_filled = torch.arange(longest, device=patches.device)[None, :] < counts[:, None]
    return gathered.masked_fill(~is_filled[:, :, None], 0), lengths


def average_patches(patches: Tensor, chosen: Tensor) -> Tensor:
    """Average the chosen patches of each image, in float32.

    Args:
        patches: `[I, N, D]`.
        chosen: `bool[I, N]`.

    Returns:
        `[I, D]`, dtype of the patches; zeros where none is chosen.
    """
    weights = chosen.to(torch.float32)
    total = torch.einsum("in,ind->id", weights, patches.to(torch.float32))
    return (total / weights.sum(dim=1, keepdim=True).clamp(min=1)).to(patches.dtype)


def append_token(patches: Tensor, kept: Tensor, token: Tensor, num_kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Gather each image's kept patches as `gather_kept` does, then one token for all those that are dropped.

    Args:
        patches: `[I, N, D]`.
        kept: `bool[I, N]`.
        token: `[I, D]`, dtype of the patches.
        num_kept: see `gather_kept`.

    Returns:
        `[I, M, D]` zero-padded on the right, and `int64[I]` lengths on the CPU: the number kept plus one, or N where
        everything is kept (nothing is dropped, so there is no token for it).
    """
    num_patches = patches.shape[1]
    features, counts = gather_kept(patches, kept, num_kept)  # [I, K, D], [I]
    # The token goes behind each row's last patch. Where everything is kept, that column is cut off again.
    place = kept.sum(dim=1)[:, None, None].expand(-1, 1, patches.shape[2])
    features = F.pad(features, (0, 0, 0, 1)).scatter(1, place, token[:, None])
    return features[:, :num_patches], (counts + 1).clamp(max=num_patches)
