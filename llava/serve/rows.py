"""A batch of answers whose rows join and leave while it is decoded: keys, values, padding and positions.

All rows end at the same column, so that one new token is one new column; shorter ones are padded on the left. Keys and
values have room behind them: a token writes one column, and the rest is copied only when rows join, leave or the room
is used up.

Shape letters: `S` rows, `P` columns, `H` heads of the keys, `D` head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Columns that are allocated beyond those that are used."""


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, `[S, H, P, D]`: the first columns of larger tensors."""

    _rooms: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.fill(key_states, value_states)
            return self.keys, self.values
        start, num_new = self.keys.shape[2], key_states.shape[2]
        if start + num_new > self._rooms[0].shape[2]:
            self.fill(self.keys, self.values)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start : start + num_new] = new
        self.keys, self.values = (room[:, :, : start + num_new] for room in self._rooms)
        return self.keys, self.values

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Take these in place of what there is, with room behind them."""
        self._rooms = tuple(_with_room(states) for states in (keys, values))
        self.keys, self.values = (room[:, :, : keys.shape[2]] for room in self._rooms)

    def reset(self) -> None:
        """Let go of everything."""
        self._rooms = ()
        super().reset()


def _with_room(states: Tensor) -> Tensor:
    rows, heads, columns, width = states.shape
    room = states.new_empty(rows, heads, columns + ROOM, width)
    room[:, :, :columns] = states
    return room


class Rows:
    """What has been read of each row.

    Attributes:
        cache: for the model's forward pass.
        mask: `bool[S, P]`, False at padding.
        next_position: `int64[S, 1]` of each row's next token.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        """Begin rows of these numbers of tokens, padded on the left; the forward pass fills the cache.

        The layers keep everything, also where a model's attention has a window: the mask says what is looked at.
        """
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
        columns = torch.arange(max(lengths))
        lengths = torch.tensor(lengths)[:, None]
        self.mask = (columns >= columns.numel() - lengths).to(device)
        self.next_position = lengths.to(device)

    @property
    def num_rows(self) -> int:
        """S."""
        return self.mask.shape[0]

    def open_column(self) -> Tensor:
        """Make a column for each row's next token; returns their positions, `int64[S, 1]`."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        positions, self.next_position = self.next_position, self.next_position + 1
        return positions

    def join(self, other: "Rows") -> None:
        """Append the rows of another batch, which ends with it."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for layer, others in zip(self.cache.layers, other.cache.layers, strict=True):
            keys = torch.cat([_pad(layer.keys, width), _pad(others.keys, width)])
            values = torch.cat([_pad(layer.values, width), _pad(others.values, width)])
            others.reset()
            layer.fill(keys, values)
        masks = [torch.nn.functional.pad(each.mask, (width - each.mask.shape[1], 0)) for each in (self, other)]
        self.mask = torch.cat(masks)
        self.next_position = torch.cat([self.next_position, other.next_position])

    def keep(self, places: Sequence[int]) -> None:
        """Keep these rows, and no more columns than they need."""
        chosen = torch.tensor(places, device=self.mask.device)
        mask = self.mask[chosen]
        first = int(mask.any(dim=0).nonzero()[0])
        for layer in self.cache.layers:
            on_layer = chosen.to(layer.keys.device)  # the layers may be on several devices
            layer.fill(layer.keys[on_layer, :, first:], layer.values[on_layer, :, first:])
        self.mask, self.next_position = mask[:, first:], self.next_position[chosen]


def _pad(states: Tensor, width: int) -> Tensor:
    """Pad `[S, H, P, D]` on the left to a number of columns."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
