"""The decoder in stretches of layers, with image tokens leaving in between; keys and values of different lengths.

Which tokens leave is decided by a `LayerReducer`, sample by sample and image by image, while the prompt is read. What a
later token needs of each stretch (its keys and values, which of them are padding, the next position) is kept in the
cache, so that transformers' `generate`, the greedy decoder and plain forward passes go on from it in the same way.

Shape letters: `S` samples, `L` tokens of a batch or of one sample, `Q` new tokens, `E` width, `H` attention heads, `h`
heads of the keys, `d` width of a head, `R` rows of an attention map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.errors import InputError
from llava.model.token_reduction.layers import LayerReducer, Left

MERGED = -1
"""In `trace_image`: a token that is no token of the first layer."""


@dataclass
class Stretch:
    """Layers that read the same tokens.

    Attributes:
        first, after: the first layer, and the first one behind them.
        mask: `bool[S, L]` False at padding.
        next_position: `int64[S, 1]` position of the token that comes next.
    """

    first: int
    after: int
    mask: Tensor
    next_position: Tensor

    def select(self, rows: Tensor) -> None:
        """Take these samples."""
        self.mask, self.next_position = (each[rows.to(each.device)] for each in (self.mask, self.next_position))


@dataclass(frozen=True)
class Departure:
    """What was left of one image when tokens left.

    Attributes:
        kept: `int64[K]` places of those that stay among the tokens that the image had.
        num_merged: tokens that were added behind them.
    """

    kept: Tensor
    num_merged: int


class ReducedCache(DynamicCache):
    """Keys and values of prompts whose image tokens leave between layers. Give it, empty, with the prompts."""

    def __init__(self, config: LlamaConfig, reducer: LayerReducer, image_of: Tensor, position_ids: Tensor):
        """Start empty.

        Args:
            config: of the language model.
            reducer: decides what leaves.
            image_of: `int64[S, L]` of the prompts, as in `splice.PromptEmbeds`.
            position_ids: `int64[S, L]` likewise.
        """
        super().__init__(config=config)
        self.reducer = reducer
        self.image_of = image_of
        self.position_ids = position_ids
        self.stretches: list[Stretch] = []
        # Behind each stretch but the last, by sample and image of the prompts as they were read.
        self.departures: list[list[list[Departure]]] = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples."""
        super().batch_select_indices(indices)
        for stretch in self.stretches:
            stretch.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        for stretch in self.stretches:
            stretch.select(torch.arange(stretch.mask.shape[0]).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the samples that beam search goes on with."""
        super().reorder_cache(beam_idx)
        for stretch in self.stretches:
            stretch.select(beam_idx)


@dataclass
class Tokens:
    """A batch on its way through the layers.

    Attributes:
        hidden: `[S, L, E]`.
        mask: `bool[S, L]`, False at padding.
        positions: `int64[S, L]`.
        places: each sample's tokens among the L, without padding, on the CPU.
        images: each sample's images, as slices of `places`.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    places: list[Tensor]
    images: list[list[slice]]


def read(
    model: LlamaModel, cache: ReducedCache, embeds: Tensor, mask: Tensor | None, options: Mapping[str, object]
) -> BaseModelOutputWithPast:
    """Read prompts, or what follows them where the cache is filled, in place of the decoder's own forward pass.

    Args:
        model: the decoder.
        cache: of these prompts.
        embeds: `[S, L, E]`.
        mask: as in `read_prompts`; not looked at behind the prompts.
        options: what else the forward pass was asked for.

    Raises:
        InputError: attention maps or hidden states were asked for.
    """
    if options.get("output_attentions") or options.get("output_hidden_states"):
        raise InputError("attention maps and hidden states have no common shape where tokens leave between layers")
    hidden = read_on(model, cache, embeds) if cache.stretches else read_prompts(model, cache, embeds, mask)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)


def read_prompts(model: LlamaModel, cache: ReducedCache, embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Send prompts through the layers and fill the cache.

    Args:
        model: the decoder.
        cache: empty; its reducer decides what leaves.
        embeds: `[S, L, E]`.
        mask: `[S, L]`, 0 or False at padding on either side; None: there is none.

    Returns:
        `[S, L', E]` hidden states behind the last layer, padded on the left where tokens have left.
    """
    tokens = _start(cache, embeds, mask)
    inputs = [(tokens.hidden[row, places], images) for row, (places, images) in _samples(tokens)]
    num_layers = len(model.layers)
    behind = tokens.hidden
    for first, after in pairwise((0, *cache.reducer.layers(num_layers), num_layers)):
        if first > 0:
            tokens = _drop(model, cache, tokens, behind, first, inputs)
        stretch = Stretch(first, after, tokens.mask, tokens.positions.amax(dim=1, keepdim=True) + 1)
        cache.stretches.append(stretch)
        tokens.hidden, behind = _run(model, cache, stretch, tokens.hidden, tokens.positions)
    return tokens.hidden


def read_on(model: LlamaModel, cache: ReducedCache, embeds: Tensor) -> Tensor:
    """Send what follows the prompts, `[S, Q, E]`, through the layers; returns the hidden states behind the last one."""
    hidden, num_new = embeds, embeds.shape[1]
    for stretch in cache.stretches:
        positions = stretch.next_position + torch.arange(num_new, device=stretch.next_position.device)
        stretch.mask = torch.nn.functional.pad(stretch.mask, (0, num_new), value=True)
        stretch.next_position = stretch.next_position + num_new
        hidden, _ = _run(model, cache, stretch, hidden, positions)
    return hidden


def _start(cache: ReducedCache, embeds: Tensor, mask: Tensor | None) -> Tokens:
    """Find out where each sample's tokens and images are, with one wait for the device."""
    num_samples, length = embeds.shape[:2]
    on_host = torch.ones(num_samples, length, dtype=torch.bool) if mask is None else mask.bool().cpu()
    # Beam search has repeated the prompts since the cache was made.
    repeats = num_samples // cache.image_of.shape[0]
    image_of, positions = (each.repeat_interleave(repeats, dim=0) for each in (cache.image_of, cache.position_ids))
    places = [row.nonzero().flatten() for row in on_host]
    images = [find_images(row[own]) for row, own in zip(image_of, places, strict=True)]
    return Tokens(embeds, on_host.to(embeds.device), positions.to(embeds.device), places, images)


def trace_image(cache: ReducedCache, row: int, image: int, num_tokens: int) -> list[Tensor]:
    """Follow an image's tokens through the layers.

    Args:
        cache: prompts have been read with it.
        row: which of the prompts.
        image: which of its images.
        num_tokens: of this image at the first layer.

    Returns:
        For each of `cache.stretches` the tokens that its layers read, `int64` places among those at the first layer; -1
        for a merged one. On the CPU.
    """
    tokens = [torch.arange(num_tokens)]
    for departures in cache.departures:
        departure = departures[row][image]
        merged = torch.full((departure.num_merged,), MERGED)
        tokens.append(torch.cat([tokens[-1][departure.kept.cpu()], merged]))
    return tokens


def find_images(image_of: Tensor) -> list[slice]:
    """Find the images of one sample: `int64[L]`, -1 at text, to the places of each, in order."""
    numbers, counts = image_of.unique_consecutive(return_counts=True)
    starts = counts.cumsum(dim=0) - counts
    runs = zip(numbers.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return [slice(start, start + count) for number, start, count in runs if number >= 0]


def find_text(length: int, images: Sequence[slice], image: slice) -> list[int]:
    """Find the text behind an image of a sample; where there is none, all text, or else the last token."""
    is_text = [True] * length
    for each in images:
        is_text[each] = [False] * (each.stop - each.start)
    text = [place for place, own in enumerate(is_text) if own]
    return [place for place in text if place >= image.stop] or text or [length - 1]


def _samples(tokens: Tokens) -> "enumerate[tuple[Tensor, list[slice]]]":
    device = tokens.hidden.device
    places = [own.to(device) for own in tokens.places]
    return enumerate(zip(places, tokens.images, strict=True))


def _run(
    model: LlamaModel, cache: ReducedCache, stretch: Stretch, hidden: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the layers of a stretch over new tokens; returns their output and the input of the last of them."""
    # The mask is as long as this stretch's keys: it is made for its first layer.
    own = DynamicCache()
    own.layers = cache.layers[stretch.first : stretch.first + 1]
    causal_mask = create_causal_mask(
        config=model.config, inputs_embeds=hidden, attention_mask=stretch.mask, past_key_values=own
    )
    rotary = model.rotary_emb(hidden, position_ids=positions)
    behind = hidden
    for layer in model.layers[stretch.first : stretch.after]:
        behind = hidden
        # Without position ids: with gaps in them, flash attention would take a row for several packed sequences.
        hidden = layer(
            hidden, attention_mask=causal_mask, position_embeddings=rotary, past_key_values=cache, use_cache=True
        )
    return hidden, behind


def _drop(
    model: LlamaModel,
    cache: ReducedCache,
    tokens: Tokens,
    behind: Tensor,
    layer: int,
    inputs: Sequence[tuple[Tensor, list[slice]]],
) -> Tokens:
    """Let image tokens leave before a layer, sample by sample, and pad what is left on the left."""
    is_packed = cache.reducer.position_ids == "packed"
    rows, positions, images, departures = [], [], [], []
    for row, (places, own_images) in _samples(tokens):
        hidden, old_positions = tokens.hidden[row, places], tokens.positions[row, places]
        # 1. Every image on its own, all of them seen before any token leaves.
        embeds, first_images = inputs[row]
        lefts = []
        for image, first in zip(own_images, first_images, strict=True):
            text, first_text = find_text(len(hidden), own_images, image), find_text(len(embeds), first_images, first)
            lefts.append(
                cache.reducer.reduce(
                    SampleView(
                        *(model, cache, row, layer, behind[row, places], hidden, old_positions, places),
                        *(image, text, embeds, first, first_text),
                    )
                )
            )
        departures.append([Departure(left.kept, 0 if left.merged is None else len(left.merged)) for left in lefts])
        # 2. Text and what is left of the images, in order.
        pieces, kept_positions, spans = _join(hidden, old_positions, own_images, lefts)
        rows.append(pieces)
        positions.append(torch.arange(len(pieces), device=pieces.device) if is_packed else kept_positions)
        images.append(spans)
    cache.departures.append(departures)
    # 3. A batch again.
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    mask = torch.arange(longest) >= (longest - lengths)[:, None]  # bool[S, L]

    def stack(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side="left")

    places = [torch.arange(longest - length, longest) for length in lengths.tolist()]
    return Tokens(stack(rows), mask.to(tokens.mask.device), stack(positions), places, images)


def _join(
    hidden: Tensor, positions: Tensor, images: list[slice], lefts: list[Left]
) -> tuple[Tensor, Tensor, list[slice]]:
    """Put one sample together again: `[L', E]`, `int64[L']` and the images' places; merged tokens have position 0."""
    pieces, kept_positions, spans, start, length = [], [], [], 0, 0
    for image, left in zip(images, lefts, strict=True):
        text = slice(start, image.start)
        kept = [hidden[image][left.kept], *([] if left.merged is None else [left.merged])]
        num_left = sum(map(len, kept))
        pieces += [hidden[text], *kept]
        kept_positions += [positions[text], positions[image][left.kept]]
        if left.merged is not None:
            kept_positions.append(positions.new_zeros(len(left.merged)))
        length += image.start - start
        spans.append(slice(length, length + num_left))
        length, start = length + num_left, image.stop
    return torch.cat([*pieces, hidden[start:]]), torch.cat([*kept_positions, positions[start:]]), spans


@dataclass(frozen=True)
class SampleView:
    """`token_reduction.layers.LayerView` of one image of one sample."""

    model: LlamaModel
    cache: ReducedCache
    row: int
    layer: int
    behind: Tensor
    """`[L, E]` what layer `layer - 1` read."""
    hidden: Tensor
    positions: Tensor
    places: Tensor
    """`int64[L]` where the cache has these tokens."""
    image: slice
    text: list[int]
    inputs: Tensor
    input_image: slice
    input_text: list[int]

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    @property
    def num_original(self) -> int:
        return self.input_image.stop - self.input_image.start

    @property
    def frequencies(self) -> Tensor:
        return self.model.rotary_emb.inv_freq

    def past_attention(self, rows: Sequence[int]) -> Tensor:
        queries, _ = self._project(self.layer - 1, self.behind, rows, with_keys=False)
        return attend(queries, self.past_keys(), rows)

    def next_attention(self, rows: Sequence[int]) -> Tensor:
        return attend(*self._project(self.layer, self.hidden, rows), rows)

    def past_keys(self) -> Tensor:
        return self.cache.layers[self.layer - 1].keys[self.row][:, self.places]

    def normed(self) -> Tensor:
        return self.model.norm(self.hidden)

    def _project(
        self, number: int, hidden: Tensor, rows: Sequence[int], *, with_keys: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Queries `[H, R, d]` and keys `[h, L, d]` of a layer, from its input `[L, E]`, with their positions."""
        layer = self.model.layers[number]
        normed = layer.input_layernorm(hidden)
        cos, sin = self.model.rotary_emb(hidden[None], position_ids=self.positions[None])  # [1, L, d]

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)[None]  # [1, heads, ., d]

        rows = list(rows)
        queries = heads(layer.self_attn.q_proj(normed[rows]))
        queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, rows], sin[:, rows])
        if not with_keys:
            return queries[0], None
        keys = heads(layer.self_attn.k_proj(normed))
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        return queries[0], keys[0]


def attend(queries: Tensor, keys: Tensor, rows: Sequence[int]) -> Tensor:
    """Compute rows of a causal attention map.

    Args:
        queries: `[H, R, d]`.
        keys: `[h, L, d]`; H is a multiple of h.
        rows: the queries' places among the L.

    Returns:
        `float32[H, R, L]`.
    """
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    products = queries.float() @ keys.float().transpose(-1, -2) * keys.shape[-1] ** -0.5
    is_later = torch.arange(keys.shape[1])[None, :] > torch.tensor(list(rows))[:, None]  # [R, L]
    return products.masked_fill(is_later.to(products.device), float("-inf")).softmax(dim=-1)
