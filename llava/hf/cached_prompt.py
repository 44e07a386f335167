"""What a cache holds of a reduced prompt, kept on the cache itself, for calls that go on from it.

A caller goes on as transformers has it, with ids and masks of the whole prompts; the cache holds fewer tokens. The
record goes with the cache into copies of it, and the cache is refused where nobody reads the record: once the reduction
is removed, or under another one.

Shape letters: `S` samples, `T` prompt ids, `L` ids of the shorter prompts, `N` ids behind the prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache

from llava.errors import InputError


class Switch:
    """Whether a reduction is applied; copies of what holds it are the same switch, one from a file is off."""

    def __init__(self):
        """Start off."""
        self.is_on = False

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce__(self) -> tuple:
        return Switch, ()


@dataclass(frozen=True)
class CachedPrompt:
    """The prompts with images that a cache was filled with.

    Attributes:
        whole_ids: `int64[S, T]` as they were given.
        ids: `int64[S, L]` as they were read: a placeholder per token that is left.
        mask: `bool[S, L]` False at padding.
        switch: of the reduction.
    """

    whole_ids: Tensor
    ids: Tensor
    mask: Tensor
    switch: Switch

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def keep_on(self, cache: Cache) -> None:
        """Keep this record on a cache, which then takes new keys and values only while the reduction is applied."""
        cache.reduced_prompt = self
        cache.update = GuardedUpdate(cache)

    def expand(self, num_rows: int) -> Self:
        """Repeat a single prompt, or each of several, as `generate` does for several sequences of one prompt."""
        repeats = num_rows // len(self.ids)
        if repeats == 1:
            return self
        tensors = (each.repeat_interleave(repeats, dim=0) for each in (self.whole_ids, self.ids, self.mask))
        return CachedPrompt(*tensors, self.switch)

    # ------------------------------------------------------------------------------------------------- going on from it
    def shorten_pass(self, arguments: Mapping[str, object], cache: Cache) -> dict[str, object]:
        """Make the arguments of a forward pass over what follows the prompts.

        Raises:
            InputError: the mask is not one of the whole prompts and what follows.
        """
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        new = arguments.get("inputs_embeds") if ids is None else ids
        num_behind = self._count_behind(cache) + new.shape[1]
        if mask is None:
            mask = torch.ones(len(new), self.whole_ids.shape[1] + num_behind, dtype=torch.bool, device=new.device)
        mask = self._shorten_mask(mask, num_behind, len(new))
        positions = (mask.cumsum(dim=1) - 1)[:, -new.shape[1] :]
        return {**arguments, "attention_mask": mask, "position_ids": positions}

    def shorten_dialogue(self, arguments: Mapping[str, object], cache: Cache) -> tuple[Tensor, Tensor]:
        """Make ids `int64[S, L + N]` and mask `bool[S, L + N]` of a dialogue that begins with the prompts.

        Args:
            arguments: of `generate`: `input_ids` `int64[S, T + N]`, perhaps their mask.
            cache: holds the prompts and perhaps some of what follows.

        Raises:
            InputError: the dialogue does not begin with them, or has nothing new.
        """
        ids = arguments.get("input_ids")
        num_whole = self.whole_ids.shape[1]
        if ids is None:
            raise InputError("the cache holds a reduced prompt: go on with input_ids of the whole dialogue")
        is_same = len(ids) % len(self.ids) == 0 and torch.equal(
            ids[:, :num_whole], self.expand(len(ids)).whole_ids.to(ids.device)
        )
        if not is_same:
            raise InputError(
                "input_ids do not begin with the prompts that the cache holds: give the whole dialogue, as it was "
                "given and answered, or an empty cache"
            )
        num_behind, num_cached = ids.shape[1] - num_whole, self._count_behind(cache)
        if num_behind <= num_cached:
            raise InputError(
                f"the cache holds all {num_whole + num_cached} ids of the dialogue: give what follows them as well"
            )
        mask = arguments.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        short = torch.cat([self.expand(len(ids)).ids.to(ids.device), ids[:, num_whole:]], dim=1)
        return short, self._shorten_mask(mask, num_behind, len(ids))

    def _count_behind(self, cache: Cache) -> int:
        """Count what the cache holds behind the prompts."""
        num_behind = int(cache.get_seq_length()) - self.mask.shape[1]
        if num_behind < 0:
            raise InputError("the cache was cut within a reduced prompt: start from an empty cache")
        return num_behind

    def _shorten_mask(self, mask: Tensor, num_behind: int, num_rows: int) -> Tensor:
        expected = (num_rows, self.whole_ids.shape[1] + num_behind)
        if tuple(mask.shape) != expected or num_rows % len(self.ids):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}: this prompt and what follows it take {expected}"
            )
        behind = mask[:, self.whole_ids.shape[1] :].bool()
        return torch.cat([self.expand(num_rows).mask.to(behind.device), behind], dim=1)


def find_prompt(cache: Cache | None, switch: Switch) -> CachedPrompt | None:
    """Return a reduction's record on a cache that holds its prompts."""
    prompt = getattr(cache, "reduced_prompt", None)
    if prompt is not None and cache.get_seq_length() == 0:
        take_prompt(cache)  # it was reset
        return None
    return prompt if prompt is not None and prompt.switch is switch else None


def take_prompt(cache: Cache) -> None:
    """Take the record from a cache, which is then like any other."""
    del cache.reduced_prompt, cache.update


class GuardedUpdate:
    """A cache's `update` while its record is kept. It does not keep the cache, which goes with its last user."""

    def __init__(self, cache: Cache):
        """Guard one cache."""
        self._cache = ref(cache)

    def __call__(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take keys and values in.

        Raises:
            InputError: the reduction that shortened the prompts is not applied.
        """
        cache = self._cache()
        if not cache.reduced_prompt.switch.is_on:
            if cache.get_seq_length() > 0:
                raise InputError(
                    "this cache holds a prompt that reduce_tokens shortened: go on inside the block that filled it, or "
                    "start from an empty cache"
                )
            take_prompt(cache)  # it was reset
        return type(cache).update(cache, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "GuardedUpdate":
        return GuardedUpdate(memo[id(self._cache())])  # of the copy, which is being made

    def __reduce__(self) -> tuple:
        return GuardedUpdate, (self._cache(),)
