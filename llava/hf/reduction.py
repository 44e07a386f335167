"""`reduce_tokens`: token reduction on a LLaVA that transformers built, while it is applied and no longer.

Nothing is subclassed and nothing global is replaced. On the one model that is given, `generate` is replaced, a hook
runs before `forward`, and, for methods inside the language model, its decoder's `forward` is replaced; `remove` takes
all of it away. Prompts are put together by the functions that our own model uses, from the user's weights.

Shape letters: `S` samples, `T` prompt ids, `L` spliced length.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    CLIPVisionModel,
    DynamicCache,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from llava.errors import InputError
from llava.hf.cached_prompt import CachedPrompt, Switch, find_prompt, take_prompt
from llava.hf.host_tower import HostTower
from llava.hf.placeholders import Prompt, write_ids
from llava.hf.prompt_reader import FIXED, Model, PromptReader, Texts
from llava.model.image_tokens import ImageTokens, spread_texts
from llava.model.language_model.generation_settings import IN_PIECES, find_setting, refuse_in_pieces, refuse_other_cache
from llava.model.language_model.layer_reduction import ReducedCache, read
from llava.model.splice import PromptEmbeds
from llava.model.token_reduction import REDUCERS, TEXT, Reduction, parse_reduction
from llava.model.tokenizer import load_tokenizer
from llava.prompt import POOLED_TURNS, QUERY_KEY
from llava.protocols import Tokenizer

PROMPT = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes", "labels")
"""Arguments that are made anew."""
COLUMNS = ("token_type_ids", "mm_token_type_ids")
"""What a processor adds per prompt id, and these models do not read."""


def reduce_tokens(
    model: Model,
    spec: str | None,
    clip: str | Path | None = None,
    *,
    texts: Texts = None,
    tokenizer: Tokenizer | None = None,
) -> "ReducedModel":
    """Reduce the image tokens of a transformers LLaVA: in a `with` block, or between `apply()` and `remove()`.

    Args:
        model: a `LlavaForConditionalGeneration` (LLaVA-1.5) or `LlavaNextForConditionalGeneration` (1.6) with a CLIP
            vision tower, loaded by the caller.
        spec: as `mm_vision_token_reduce_func` in a config.json: "TRIM:-1", "FasterVLM:144", "FastV:0.5", None.
        clip: the CLIP that the model's tower is the vision half of: folder, hub id or `open_clip:<model>`. Read where
            the method needs text, and only there.
        texts: what CLIP's text half reads: one query per prompt, one for all, or a function from a decoded prompt to
            its query; None: the last user turn of the prompt.
        tokenizer: of the language model, or the processor that holds it; None: the one in `model.name_or_path`, read
            where prompts are to be decoded.

    Returns:
        The reduction, not applied yet. The model is not touched.

    Raises:
        InputError: for a model, method or CLIP that do not fit together.
    """
    reduction = parse_reduction(spec)
    _check_model(model, reduction)
    name = model.name_or_path or type(model).__name__
    tower = HostTower(model.model.vision_tower, model.config.vision_feature_layer, name)
    tower.pools_queries = getattr(model.config, QUERY_KEY, None) == POOLED_TURNS
    if reduction.inside is not None:
        reduction.inside.layers(model.config.text_config.num_hidden_layers)
    if reduction.before is not None:
        tower.num_layers_to_run(reduction.before.needs)
    reads_text = reduction.before is not None and TEXT in reduction.before.needs
    if reads_text:
        if clip is None:
            raise InputError(
                f"{reduction.before.spec_name} compares patches with the question, and {name} holds no text half of a "
                'CLIP: give clip=, for LLaVA-1.5 "openai/clip-vit-large-patch14-336"'
            )
        if not isinstance(clip, str | Path):
            raise InputError(f"clip is a {type(clip).__name__}: give the name of a CLIP, a folder or a hub id")
        tokenizer = _check_texts(texts, tokenizer, model)
        tower.take_text_half(str(clip))
    return ReducedModel(model, reduction, PromptReader(model, reduction.before, tower, texts, tokenizer))


def _check_model(model: Model, reduction: Reduction) -> None:
    if not isinstance(model, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration):
        other = "models of load_pretrained_model have set_token_reduction"
        if hasattr(model, "get_base_model"):  # of PEFT
            other = "give its get_base_model()"
        raise InputError(
            f"reduce_tokens takes a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, not a "
            f"{type(model).__name__}; {other}"
        )
    config = model.config
    if not isinstance(model.model.vision_tower, CLIPVisionModel):
        kind = type(model.model.vision_tower).__name__
        raise InputError(f"the vision tower is a {kind}: token reduction works on CLIP's (CLIPVisionModel)")
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
        raise InputError(
            "token reduction works on the patches of one layer: the config needs a single vision_feature_layer and "
            f'vision_feature_select_strategy "default", not {config.vision_feature_layer} and '
            f'"{config.vision_feature_select_strategy}"'
        )
    if reduction.before is not None and reduction.before.position_ids == "original":
        raise InputError(
            f"{reduction.before.spec_name}: position_ids=original is not for transformers' own classes, which count "
            "positions by the mask: leave it out, or load the checkpoint with load_pretrained_model"
        )
    decoder = model.model.language_model
    is_plain = isinstance(decoder, LlamaModel) or (
        isinstance(decoder, MistralModel) and decoder.config.sliding_window is None
    )
    if reduction.inside is not None and not is_plain:
        raise InputError(
            f"{reduction.inside.spec_name} works inside Llama, or Mistral without a sliding window, not inside this "
            f"{type(decoder).__name__}; before any language model: {', '.join(REDUCERS)}"
        )


def _check_texts(texts: Texts, tokenizer: object, model: Model) -> Tokenizer | None:
    """Check where queries come from; return the tokenizer that decodes prompts, if they come from these."""
    if texts is not None and not callable(texts):
        if isinstance(texts, str) and not texts.strip():
            raise InputError("texts is empty: give what the patches are compared with, or leave it out")
        spread_texts(texts, len(texts) if isinstance(texts, list | tuple) else 1, "prompt")
        return None
    if tokenizer is None:
        if not model.name_or_path:
            raise InputError("the question is in the prompt's ids: give tokenizer= (or the processor), or texts=")
        return load_tokenizer(model.name_or_path)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "decode") or isinstance(tokenizer, bytes):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}: give the language model's, or its processor")
    return tokenizer


class ReducedModel:
    """A model with a token reduction that can be applied and removed; `reduce_tokens` makes it."""

    def __init__(self, model: Model, reduction: Reduction, reader: PromptReader):
        """Take the parts, which fit together."""
        self._model = model
        self._reduction = reduction
        self._reader = reader
        self._undo: list[Callable[[], None]] = []
        self._switch = Switch()

    @property
    def image_tokens(self) -> list[ImageTokens]:
        """Of the latest call that read images, one record per image: kept patches, scores, features.

        Where several threads call, it is the latest of any of them.
        """
        return self._reader.image_tokens

    # ------------------------------------------------------------------------------------------------------ on and off
    def apply(self) -> Self:
        """Reduce from now on.

        Raises:
            InputError: a reduction is applied to this model already.
        """
        if isinstance(getattr(vars(self._model).get("generate"), "__self__", None), ReducedModel):
            raise InputError(
                "a token reduction is applied to this model already: remove() it, or leave its block, first"
            )
        self._forward_signature = inspect.signature(self._model.forward)
        self._generate_unreduced = self._model.generate
        self._replace(self._model, "generate", self._generate)
        self._replace(self._model, "__deepcopy__", self._copy_model)
        self._undo.append(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        if self._reduction.inside is not None:
            decoder = self._model.model.language_model
            self._replace(decoder, "forward", _read_in_stretches(decoder))
        self._switch.is_on = True
        return self

    def remove(self) -> None:
        """Leave the model as it was before `apply`.

        Raises:
            InputError: the reduction is not applied.
        """
        if not self._undo:
            raise InputError("this token reduction is not applied: apply() comes before remove()")
        self._switch.is_on = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self.apply()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _replace(self, owner: nn.Module, name: str, method: Callable) -> None:
        """Put a method on one object, which may have one of its own there already, as under accelerate's hooks."""
        own = vars(owner)
        before = own.get(name)
        self._undo.append(lambda: own.pop(name) if before is None else own.update({name: before}))
        own[name] = method

    def _copy_model(self, memo: dict) -> Model:
        """Copy the model without the reduction, which nobody could remove from the copy."""
        self.remove()
        try:
            return copy.deepcopy(self._model, memo)
        finally:
            self.apply()

    # ------------------------------------------------------------------------------------------ what is called instead
    @torch.no_grad()
    def _generate(self, *args, **kwargs) -> Tensor | ModelOutput:
        """transformers' `generate`; what it returns begins with the whole prompts, as they were given."""
        arguments = _name_arguments(inspect.signature(self._generate_unreduced), args, kwargs)
        has_images, cache = _has_images(arguments), arguments.get("past_key_values")
        prompt = find_prompt(cache, self._switch)
        if not has_images and prompt is None:
            return self._generate_unreduced(**arguments)
        inputs = arguments.pop("inputs", None)
        arguments.setdefault("input_ids", inputs)
        refuse_in_pieces(self._model, arguments, (*IN_PIECES, "prompt_lookup_num_tokens"))
        return self._answer(arguments) if has_images else self._go_on(arguments, cache, prompt)

    def _answer(self, arguments: dict) -> Tensor | ModelOutput:
        """Generate from prompts with images."""
        # 1. The prompts without the tokens that leave, as embeddings and as ids.
        pad_id, whole_ids = find_setting(self._model, arguments, "pad_token_id"), arguments.get("input_ids")
        prompts, images, batch = self._reader.read(arguments, pad_id, side="left")
        ids = self._write_ids(prompts, images, pad_id or 0, side="left").to(batch.embeds.device)
        # 2. Where tokens leave between layers, the cache sees to it.
        held = cache = arguments.get("past_key_values")
        if self._reduction.inside is not None:
            refuse_other_cache(self._model, arguments, self._reduction.inside.spec_name)
            cache = self._make_cache(batch, arguments)
        # 3. Decode. Whoever holds the cache then may go on from it, also if the answer was interrupted.
        short = {"input_ids": ids, "inputs_embeds": batch.embeds, "attention_mask": batch.attention_mask.long()}
        try:
            output = self._decode(whole_ids, short, arguments | {"past_key_values": cache})
            held = getattr(output, "past_key_values", held)
            return output
        finally:
            if held is not None:
                CachedPrompt(whole_ids, ids, batch.attention_mask, self._switch).keep_on(held)

    def _go_on(self, arguments: dict, cache: Cache, prompt: CachedPrompt) -> Tensor | ModelOutput:
        """Generate from a dialogue whose first prompts, with their images, are in the cache."""
        ids, mask = prompt.shorten_dialogue(arguments, cache)
        take_prompt(cache)  # the passes of transformers' `generate` are over the shorter dialogue already
        try:
            return self._decode(arguments["input_ids"], {"input_ids": ids, "attention_mask": mask.long()}, arguments)
        finally:
            prompt.keep_on(cache)

    def _decode(
        self, whole_ids: Tensor, short: Mapping[str, Tensor], arguments: Mapping[str, object]
    ) -> Tensor | ModelOutput:
        """Run transformers' `generate` on shorter prompts, and put the whole ones back.

        Args:
            whole_ids: `int64[S, T]` the prompts as they were given.
            short: how they are read; `input_ids` among it.
            arguments: of the caller.
        """
        rest, length = _without_prompt(arguments), short["input_ids"].shape[1]
        # 1. Limits that count the prompt count the shorter one.
        limit = arguments.get("max_length")
        if limit is not None and arguments.get("max_new_tokens") is None and limit <= whole_ids.shape[1]:
            raise InputError(f"max_length={limit} leaves no place behind prompts of {whole_ids.shape[1]} ids")
        for limit in ("max_length", "min_length"):
            value = find_setting(self._model, arguments, limit)
            if value is not None:
                rest[limit] = max(0, value - whole_ids.shape[1] + length)
        # 2. Decode.
        output = self._generate_unreduced(**short, **rest)
        # 3. The whole prompts, and what was generated.
        found = output if isinstance(output, Tensor) else output.sequences
        whole = whole_ids.repeat_interleave(len(found) // len(whole_ids), dim=0).to(found)
        found = torch.cat([whole, found[:, length:]], dim=1)
        if isinstance(output, Tensor):
            return found
        output.sequences = found
        return output

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Change the arguments of a pass that reads images, or of one that goes on from its cache."""
        arguments = _name_arguments(self._forward_signature, args, kwargs)
        if _has_images(arguments):
            return (), self._shorten(arguments)
        cache = arguments.get("past_key_values")
        prompt = find_prompt(cache, self._switch)
        return None if prompt is None else ((), prompt.shorten_pass(arguments, cache))

    def _shorten(self, arguments: dict) -> dict:
        """Make the arguments of a pass over prompts with images."""
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise InputError("logits_to_keep names places of the whole prompt: give a number, counted from the end")
        labels, mask = arguments.get("labels"), arguments.get("attention_mask")
        # As the caller pads, where the caller does. Else without padding before a label, or where new tokens go.
        is_padded = mask is not None and not bool(mask.all())
        pads_right = not bool(mask[:, -1].all()) if is_padded else labels is not None
        side = "right" if pads_right else "left"
        prompts, images, batch = self._reader.read(arguments, None, side=side)
        new = _without_prompt(arguments) | {
            "inputs_embeds": batch.embeds,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
        }
        if labels is not None or self._model.training:
            return new
        # What the next passes go on from.
        config, cache = self._model.config.text_config, new.get("past_key_values")
        use_cache = config.use_cache if new.get("use_cache") is None else new["use_cache"]
        if self._reduction.inside is not None:
            cache = self._make_cache(batch, new)
        elif cache is None and use_cache:
            cache = DynamicCache(config=config)
        if cache is not None:
            ids = self._write_ids(prompts, images, 0, side=side)
            CachedPrompt(arguments["input_ids"], ids, batch.attention_mask, self._switch).keep_on(cache)
        return new | {"past_key_values": cache}

    def _write_ids(self, prompts: list[Prompt], images: list[ImageTokens], pad_id: int, *, side: str) -> Tensor:
        lengths = [image.num_tokens for image in images]
        return write_ids(prompts, lengths, self._model.config.image_token_id, pad_id, side=side)

    def _make_cache(self, batch: PromptEmbeds, arguments: Mapping[str, object]) -> ReducedCache:
        if arguments.get("past_key_values") is not None:
            raise InputError(f"{self._reduction.inside.spec_name} has its own cache: leave out past_key_values")
        return ReducedCache(self._model.config.text_config, self._reduction.inside, batch.image_of, batch.position_ids)


def _has_images(arguments: Mapping[str, object]) -> bool:
    """Whether a call reads images.

    Raises:
        InputError: they are encoded already.
    """
    if (arguments.get("mm_encoder_outputs") or {}).get("image") is not None:
        raise InputError("mm_encoder_outputs hold image tokens already: give pixel_values, which can be reduced")
    images = arguments.get("pixel_values")
    return images is not None and len(images) > 0


def _name_arguments(signature: inspect.Signature, args: tuple, kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a call by name."""
    named = dict(signature.bind(*args, **kwargs).arguments)
    return named | named.pop("kwargs", {})


def _without_prompt(arguments: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name not in (*PROMPT, *COLUMNS, *FIXED)}


def _read_in_stretches(decoder: LlamaModel | MistralModel) -> Callable[..., BaseModelOutputWithPast]:
    """Make a decoder's `forward` in which image tokens leave between layers, where the cache says so."""
    unreduced = decoder.forward

    @wraps(unreduced)
    def forward(*args, **kwargs) -> BaseModelOutputWithPast:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ReducedCache):
            return unreduced(*args, **kwargs)
        return read(decoder, cache, kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs)

    return forward
