"""Greedy decoding in which a finished answer leaves the batch, and the system sentence is read once.

In a batch of short answers a few are long. `generate` carries every row to the end of the longest; here a step costs
what the rows still at work cost, and there is one wait for the device per step. All prompts of a run begin with the
same words: their keys and values are kept from batch to batch. Where the reduction reads no question, all questions
about a picture begin with the same picture too: it is read once per batch. Each row reads what it would read alone, so
the ids are those of `generate`. Whatever is not plain greedy search is left to `generate`.

Shape letters: `S` samples, `T` prompt ids, `L` spliced length, `P` positions of a beginning, `H` heads, `D` head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_arch import LlavaMetaForCausalLM

PLAIN_KEYS = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length"),
    *("max_new_tokens", "use_cache", "do_sample", "temperature", "top_p", "top_k"),
}
"""Entries of a generation config that change nothing here: limits are given with the call, nothing is drawn."""


def is_plain(model: Any) -> bool:
    """Say whether a model's greedy search is the bare one, without penalties, forced tokens and the like."""
    return isinstance(model, LlavaMetaForCausalLM) and set(model.generation_config.to_diff_dict()) <= PLAIN_KEYS


States = list[tuple[Tensor, Tensor]]
"""Each layer's keys and values, `[1, H, P, D]` or `[S, H, P, D]`."""

MIN_SHARERS = 2
"""Questions per picture, on average over a batch, from which pictures are read by themselves: one more pass."""


def share_pictures(image_tokens: Sequence[tuple[Any, ...]]) -> bool:
    """Say whether some prompts have their first pictures in common often enough to read these by themselves.

    Args:
        image_tokens: records of each prompt's images; a picture in common is the same record.
    """
    return MIN_SHARERS * len({id(own[0]) for own in image_tokens if own}) <= len(image_tokens) and all(image_tokens)


@dataclass(frozen=True)
class Beginning:
    """What prompts begin with, read already.

    Attributes:
        num_ids: prompt ids that it takes the place of.
        num_images: image marks among them.
        states: what attention keeps of it.
    """

    num_ids: int = 0
    num_images: int = 0
    states: States = field(default_factory=list)

    @property
    def length(self) -> int:
        """P: positions it takes."""
        return self.states[0][0].shape[2] if self.states else 0


class GreedyDecoder:
    """A model with the beginning that its prompts share."""

    def __init__(self, model: LlavaMetaForCausalLM):
        """Take a model for which `is_plain` holds."""
        ends = model.generation_config.eos_token_id
        self._model = model
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._prefix = torch.empty(0, dtype=torch.long)
        self._prefix_states: States = []

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Tensor], image_tokens: Sequence[tuple[Any, ...]], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer prompts.

        Args:
            prompts: int64[T_s] each, with image marks.
            image_tokens: for each prompt one record per mark, in order.
            max_new_tokens: length limit of an answer.

        Returns:
            S answers, without the token that ends them.
        """
        step, cache = self._prefill(prompts, image_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for length in range(1, max_new_tokens + 1):
            logits = self._model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            chosen = logits[:, -1].argmax(dim=-1)
            tokens = chosen.cpu().tolist()  # the one wait for the device in a step
            places = [place for place, token in enumerate(tokens) if token not in self._ends]
            rows = [rows[place] for place in places]
            for row, place in zip(rows, places, strict=True):
                answers[row].append(tokens[place])
            if not rows or length == max_new_tokens:
                break
            mask, positions = step["attention_mask"], step["position_ids"]
            if len(places) < len(tokens):
                kept = torch.tensor(places)  # on the host: the layers may be on several devices
                cache.batch_select_indices(kept)
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
            step = {
                "input_ids": chosen[:, None],
                "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=True),
                "position_ids": positions[:, -1:] + 1,
            }
        return answers

    def _prefill(
        self, prompts: Sequence[Tensor], image_tokens: Sequence[tuple[Any, ...]]
    ) -> tuple[dict[str, Tensor], DynamicCache]:
        """Make the first step's arguments, and the cache with what the prompts share, if they share it."""
        start = self._read_pictures(prompts, image_tokens) or self._share(prompts)
        rests = [prompt[start.num_ids :] for prompt in prompts]
        images = [image for own in image_tokens for image in own[start.num_images :]]
        positions, mask, embeds = self._splice(rests, images)
        shared = [tuple(state.expand(len(prompts), -1, -1, -1) for state in layer) for layer in start.states]
        step = {
            "inputs_embeds": embeds,
            "attention_mask": torch.nn.functional.pad(mask, (start.length, 0), value=True),
            "position_ids": positions + start.length,
        }
        return step, DynamicCache(shared or None, config=self._model.config)

    def _splice(self, prompts: Sequence[Tensor], images: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Give position ids int64[S, L], attention mask bool[S, L] and embeddings [S, L, E], padded on the left."""
        input_ids, attention_mask = pad_left(prompts)
        batch = self._model.embed_prompts(
            input_ids, attention_mask=attention_mask, image_tokens=images, padding_side="left"
        )
        return batch.position_ids, batch.attention_mask, batch.embeds

    def _read_pictures(self, prompts: Sequence[Tensor], image_tokens: Sequence[tuple[Any, ...]]) -> Beginning | None:
        """Read the beginnings up to the first picture, that included, each once; None where that does not pay.

        They must be of one length: then nothing is padded between a picture and its question.
        """
        if not share_pictures(image_tokens):
            return None
        pictures = {id(own[0]): own[0] for own in image_tokens}
        num_ids = int((prompts[0] == IMAGE_TOKEN_INDEX).nonzero()[0]) + 1
        beginning = prompts[0][:num_ids]
        if len({picture.num_tokens for picture in pictures.values()}) > 1 or not all(
            len(prompt) > num_ids and torch.equal(prompt[:num_ids], beginning) for prompt in prompts
        ):
            return None
        positions, _, embeds = self._splice([beginning] * len(pictures), list(pictures.values()))
        read = self._read(inputs_embeds=embeds, position_ids=positions)
        order = list(pictures)
        rows = torch.tensor([order.index(id(own[0])) for own in image_tokens])  # on the host, as in `decode`
        return Beginning(num_ids, 1, [tuple(state[rows] for state in layer) for layer in read])

    def _share(self, prompts: Sequence[Tensor]) -> Beginning:
        """Give the beginning up to the first image, nothing if not all prompts have the same."""
        for prompt in prompts:
            marks = (prompt == IMAGE_TOKEN_INDEX).nonzero()
            if len(marks):
                self._note_prefix(prompt[: int(marks[0])])
                break
        size = len(self._prefix)
        if size and all(len(prompt) > size and torch.equal(prompt[:size], self._prefix) for prompt in prompts):
            return Beginning(size, 0, self._prefix_states)
        return Beginning()

    def _note_prefix(self, prefix: Tensor) -> None:
        if torch.equal(prefix, self._prefix):
            return
        self._prefix = prefix
        self._prefix_states = self._read(input_ids=prefix[None].to(self._model.device)) if len(prefix) else []

    def _read(self, **inputs: Tensor) -> States:
        """Send a beginning through the model and keep what attention will ask for."""
        cache = DynamicCache(config=self._model.config)
        self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack prompts of different lengths, padded on the left.

    Args:
        rows: int64[T_s] each.

    Returns:
        int64[S, T] ids (0 at padding) and bool[S, T], False at padding.
    """
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = row
        attention_mask[index, width - len(row) :] = True
    return input_ids, attention_mask
