"""From prompts with image tokens to answers: `Generator.answer` is the one place that decodes.

Greedy answers come from a decoder of our own, in which finished rows leave the batch and what prompts have in common is
read once; sampling, beams, streaming and whatever a checkpoint's generation config adds are left to `model.generate`.

Shape letters: `S` samples, `T` prompt ids, `L` spliced length, `P` positions of a prefix, `H` heads, `D` head width,
`E` width of the language model.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava.chat_template import find_end_token
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model.language_model.causal import sliding_window
from llava.model.language_model.generation_settings import list_tokens
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.splice import PromptEmbeds
from llava.protocols import ImageTokens, Tokenizer, VisionLanguageModel
from llava.sampling import Sampling

PLAIN_KEYS = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "max_length"),
    *("max_new_tokens", "use_cache", "do_sample", "temperature", "top_p", "top_k"),
}
"""Entries of a generation config that change nothing in a greedy search whose length limit is given with the call."""

MIN_SHARERS = 2
"""Questions per image, on average over a batch, from which images are read by themselves: one more pass."""

States = list[tuple[Tensor, Tensor]]
"""Each layer's keys and values, `[1, H, P, D]` or `[S, H, P, D]`."""


class Generator:
    """Answers prompts with one model; keeps what prompts have in common from call to call."""

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer):
        self._model = model
        self._tokenizer = tokenizer
        self._decoder = GreedyDecoder(model) if is_plain(model) else None

    def shares_images(self, image_tokens: Sequence[Sequence[ImageTokens]], sampling: Sampling) -> bool:
        """Whether prompts about the same image cost less in one batch (see `share_images`)."""
        reads_ahead = self._decoder is not None and self._model.layer_reducer is None
        return reads_ahead and sampling.is_greedy and share_images(image_tokens)

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Tensor],
        image_tokens: Sequence[Sequence[ImageTokens]],
        sampling: Sampling,
        *,
        end: str | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """Answer a batch of prompts.

        Args:
            prompts: int64[T_s] each, with a sentinel id per image.
            image_tokens: for each prompt one record per sentinel, in order.
            sampling: how to search.
            end: text that ends an answer besides the tokens that the checkpoint names; it is not part of the answer.
            streamer: is handed the tokens as they come (one prompt only).

        Returns:
            S answers, without special tokens and surrounding white space.

        Raises:
            InputError: a prompt is longer than the model's positions.
        """
        if end is not None and is_end_token(end, self._model, self._tokenizer):
            end = None
        is_ours = self._decoder is not None and sampling.is_greedy and end is None and streamer is None
        # A prompt beyond the model's positions is for `generate` to refuse.
        if is_ours and longest(prompts, image_tokens) < self._model.config.max_position_embeddings:
            output_ids = self._decoder.decode(prompts, image_tokens, sampling.max_new_tokens)
        else:
            output_ids = self._generate(prompts, image_tokens, sampling, end, streamer)
        texts = (text.strip() for text in self._tokenizer.batch_decode(output_ids, skip_special_tokens=True))
        return [text.removesuffix(end).strip() if end else text for text in texts]

    def _generate(
        self,
        prompts: Sequence[Tensor],
        image_tokens: Sequence[Sequence[ImageTokens]],
        sampling: Sampling,
        end: str | None,
        streamer: BaseStreamer | None,
    ) -> Tensor:
        """Decode as transformers does: int64[S, new tokens]."""
        input_ids, attention_mask = pad_left(prompts)
        options: dict[str, object] = {}
        if end is not None:
            criterion = KeywordsStoppingCriteria([end], self._tokenizer, input_ids)
            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        if streamer is not None:
            options["streamer"] = streamer
        with seeded(sampling.seed, self._model.device):
            return self._model.generate(
                input_ids.to(self._model.device),
                attention_mask=attention_mask.to(self._model.device),
                image_tokens=[image for own in image_tokens for image in own],
                use_cache=True,
                **sampling.as_arguments(),
                **options,
            )


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed; afterwards the caller's own draws, on every device, go on as if nothing was drawn.

    Args:
        seed: None: nothing is changed, and what is drawn moves the caller's draws on.
        device: of the model.
    """
    if seed is None:
        yield
        return
    accelerators = () if device.type == "cpu" else range(torch.accelerator.device_count())
    with torch.random.fork_rng(accelerators, device_type=device.type):
        torch.manual_seed(seed)
        yield


def is_end_token(end: str, model: VisionLanguageModel, tokenizer: Tokenizer) -> bool:
    """Whether a text is the name of a token that ends every answer of a model: nothing has to watch for the text."""
    known = list_tokens(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return find_end_token(end, tokenizer) in known


def _first_step(batch: PromptEmbeds, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """The arguments of the pass that reads the prompts."""
    return {"inputs_embeds": batch.embeds, "attention_mask": attention_mask, "position_ids": position_ids}


def longest(prompts: Sequence[Tensor], image_tokens: Sequence[Sequence[ImageTokens]]) -> int:
    """Return the positions that the longest prompt takes once its image tokens are in place."""
    pairs = zip(prompts, image_tokens, strict=True)
    return max(len(prompt) - len(own) + sum(image.num_positions for image in own) for prompt, own in pairs)


def is_plain(model: VisionLanguageModel) -> bool:
    """Whether a model's greedy search is the bare one, without penalties, forced tokens and the like.

    A sliding window forgets what a common prefix would have to keep.
    """
    is_bare = isinstance(model, LlavaMetaForCausalLM) and set(model.generation_config.to_diff_dict()) <= PLAIN_KEYS
    return is_bare and sliding_window(model.config) is None


def share_images(image_tokens: Sequence[Sequence[ImageTokens]]) -> bool:
    """Whether prompts have their first images in common often enough to read these by themselves.

    Args:
        image_tokens: records of each prompt's images; an image in common is the same record.
    """
    return MIN_SHARERS * len({id(own[0]) for own in image_tokens if own}) <= len(image_tokens) and all(image_tokens)


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


# ----------------------------------------------------------------------------------------------------- greedy decoding
@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, already read by the model.

    Attributes:
        num_ids: prompt ids that it replaces.
        num_images: images among them.
        next_position: `int64[S, 1]` of the token behind it, or one number for all samples.
        states: keys and values of its positions.
    """

    num_ids: int = 0
    num_images: int = 0
    next_position: Tensor | int = 0
    states: States = field(default_factory=list)

    @property
    def length(self) -> int:
        """P: positions it takes."""
        return self.states[0][0].shape[2] if self.states else 0


class GreedyDecoder:
    """Greedy search in which finished answers leave the batch, and common prefixes are read once.

    In a batch of short answers a few are long: `generate` carries every row to the end of the longest, here a step
    costs what the open rows cost, with one wait for the device. The system sentence is the same in all prompts of a
    run: its keys and values stay from call to call. Where the token reduction reads no question, the prompts about an
    image begin with the same image: it is read once per batch. Every row reads what it would read alone, so the ids are
    those of `generate`.
    """

    def __init__(self, model: LlavaMetaForCausalLM, ends: Collection[int] | None = None):
        """Take a model for which `is_plain` holds.

        Args:
            model: answers.
            ends: tokens that end an answer; None: those that the model's generation config names.
        """
        self._model = model
        self._ends = set(list_tokens(model.generation_config.eos_token_id if ends is None else ends))
        self._opening = torch.empty(0, dtype=torch.long)  # ids before the first image
        self._opening_states: States = []

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Tensor], image_tokens: Sequence[Sequence[ImageTokens]], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer prompts (arguments as for `Generator.answer`): S lists of ids, without the token that ends them."""
        # 1. Everything that is known before the first new token: embeddings, and the states of a common prefix.
        step, cache = self._prefill(prompts, image_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the answers that are still open, in the order of the batch
        for length in range(1, max_new_tokens + 1):
            # 2. One pass; the likeliest token of each row.
            logits = self._model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [S, 1, V]
            chosen = logits[:, -1].argmax(dim=-1)  # [S]
            tokens = chosen.cpu().tolist()  # the one wait for the device
            # 3. Rows that end leave; the others keep their token.
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
            # 4. The chosen tokens are the next pass.
            step = {
                "input_ids": chosen[:, None],
                "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=True),
                "position_ids": positions[:, -1:] + 1,
            }
        return answers

    def _prefill(
        self, prompts: Sequence[Tensor], image_tokens: Sequence[Sequence[ImageTokens]]
    ) -> tuple[dict[str, Tensor], DynamicCache]:
        """Make the first pass's arguments, and the cache with what the prompts share."""
        if self._model.layer_reducer is not None:
            # Which tokens leave depends on the whole prompt: nothing can be read ahead.
            batch = self._embed(prompts, [image for own in image_tokens for image in own])
            return _first_step(batch, batch.attention_mask, batch.position_ids), self._model.make_cache(batch)
        prefix = self._read_images(prompts, image_tokens) or self._read_opening(prompts)
        rests = [prompt[prefix.num_ids :] for prompt in prompts]
        images = [image for own in image_tokens for image in own[prefix.num_images :]]
        batch = self._embed(rests, images)
        shared = [tuple(state.expand(len(prompts), -1, -1, -1) for state in layer) for layer in prefix.states]
        mask = torch.nn.functional.pad(batch.attention_mask, (prefix.length, 0), value=True)
        step = _first_step(batch, mask, batch.position_ids + prefix.next_position)
        return step, DynamicCache(shared or None, config=self._model.config)

    def _embed(self, prompts: Sequence[Tensor], images: list[ImageTokens]) -> PromptEmbeds:
        """Embed prompts, padded on the left."""
        input_ids, attention_mask = pad_left(prompts)
        return self._model.embed_prompts(
            input_ids, attention_mask=attention_mask, image_tokens=images, padding_side="left"
        )

    def _read_images(self, prompts: Sequence[Tensor], image_tokens: Sequence[Sequence[ImageTokens]]) -> Prefix | None:
        """Read prompts up to their first image, each image once; None where that does not pay.

        All prefixes must have one length: then nothing is padded between an image and its question.
        """
        if not share_images(image_tokens):
            return None
        images = {id(own[0]): own[0] for own in image_tokens}
        num_ids = int((prompts[0] == IMAGE_TOKEN_INDEX).nonzero()[0]) + 1
        beginning = prompts[0][:num_ids]
        if len({image.num_tokens for image in images.values()}) > 1 or not all(
            len(prompt) > num_ids and torch.equal(prompt[:num_ids], beginning) for prompt in prompts
        ):
            return None
        batch = self._embed([beginning] * len(images), list(images.values()))
        states = self._read(inputs_embeds=batch.embeds, position_ids=batch.position_ids)
        order = list(images)
        rows = torch.tensor([order.index(id(own[0])) for own in image_tokens])  # on the host, as in `decode`
        nexts = torch.tensor([[num_ids - 1 + own[0].num_positions] for own in image_tokens])
        return Prefix(
            num_ids, 1, nexts.to(batch.position_ids.device), [tuple(state[rows] for state in layer) for layer in states]
        )

    def _read_opening(self, prompts: Sequence[Tensor]) -> Prefix:
        """Return the ids before the first image, empty if not all prompts begin with the same."""
        for prompt in prompts:
            sentinels = (prompt == IMAGE_TOKEN_INDEX).nonzero()
            if len(sentinels):
                opening = prompt[: int(sentinels[0])]
                if not torch.equal(opening, self._opening):
                    self._opening = opening
                    ids = opening[None].to(self._model.device)
                    self._opening_states = self._read(input_ids=ids) if len(opening) else []
                break
        size = len(self._opening)
        if size and all(len(prompt) > size and torch.equal(prompt[:size], self._opening) for prompt in prompts):
            return Prefix(size, 0, size, self._opening_states)
        return Prefix()

    def _read(self, **inputs: Tensor) -> States:
        """Send a prefix through the model and keep what attention will ask for."""
        cache = DynamicCache(config=self._model.config)
        self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]
