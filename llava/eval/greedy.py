"""Greedy decoding in which a finished answer leaves the batch, and the system sentence is read once.

In a batch of short answers a few are long. `generate` carries every row to the end of the longest; here a step costs
what the rows still at work cost, and there is one wait for the device per step. All prompts of a run begin with the
same words: their keys and values are kept from batch to batch. Each row reads what it would read alone, so the ids are
those of `generate`. Whatever is not plain greedy search is left to `generate`.

Shape letters: `S` samples, `T` prompt ids, `L` spliced length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.batching import pad_left
from llava.model.llava_arch import LlavaMetaForCausalLM

PLAIN_KEYS = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length"),
    *("max_new_tokens", "use_cache", "do_sample", "temperature", "top_p", "top_k"),
}
"""Entries of a generation config that change nothing here: limits are given with the call, nothing is drawn."""


def is_plain(model: Any) -> bool:
    """Say whether a model's greedy search is the bare one, without penalties, forced tokens and the like."""
    return isinstance(model, LlavaMetaForCausalLM) and set(model.generation_config.to_diff_dict()) <= PLAIN_KEYS


class GreedyDecoder:
    """A model with the beginning that its prompts share."""

    def __init__(self, model: LlavaMetaForCausalLM):
        """Take a model for which `is_plain` holds."""
        ends = model.generation_config.eos_token_id
        self._model = model
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._prefix = torch.empty(0, dtype=torch.long)
        self._prefix_states: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Tensor], image_tokens: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
        """Answer prompts.

        Args:
            prompts: int64[T_s] each, with image marks.
            image_tokens: one record per mark, in order.
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
            tokens = chosen.tolist()
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
        self, prompts: Sequence[Tensor], image_tokens: Sequence[Any]
    ) -> tuple[dict[str, Tensor], DynamicCache]:
        """Make the first step's arguments, and the cache with what the prompts share, if they share it."""
        states = self._share(prompts)
        start = len(self._prefix) if states else 0
        input_ids, attention_mask = pad_left([prompt[start:] for prompt in prompts])
        _, positions, mask, _, embeds, _ = self._model.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, None, None, image_tokens=image_tokens, padding_side="left"
        )
        shared = [tuple(state.expand(len(prompts), -1, -1, -1) for state in layer) for layer in states]
        step = {
            "inputs_embeds": embeds,
            "attention_mask": torch.nn.functional.pad(mask, (start, 0), value=True),
            "position_ids": positions + start,
        }
        return step, DynamicCache(shared or None, config=self._model.config)

    def _share(self, prompts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's keys and values of the beginning up to the first image, if all prompts have the same."""
        for prompt in prompts:
            marks = (prompt == IMAGE_TOKEN_INDEX).nonzero()
            if len(marks):
                self._note_prefix(prompt[: int(marks[0])])
                break
        size = len(self._prefix)
        if all(len(prompt) > size and torch.equal(prompt[:size], self._prefix) for prompt in prompts):
            return self._prefix_states
        return []

    def _note_prefix(self, prefix: Tensor) -> None:
        if torch.equal(prefix, self._prefix):
            return
        cache = DynamicCache(config=self._model.config)
        if len(prefix):
            ids = prefix[None].to(self._model.device)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._prefix = prefix
        self._prefix_states = [(layer.keys, layer.values) for layer in cache.layers] if len(prefix) else []
