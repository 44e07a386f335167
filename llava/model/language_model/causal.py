"""What LLaVA adds to any of transformers' causal language models: two mixins, before its decoder and its causal model.

The decoder has `embed_tokens`, `layers`, `norm` and `rotary_emb`, and its layers the attention of Llama.
"""

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.errors import InputError
from llava.model.checkpoint_folder import portable_config
from llava.model.hf_layout import NAMES, STORED_PREFIX
from llava.model.image_tokens import ImageTokens
from llava.model.language_model.cached_images import keep_images
from llava.model.language_model.generation_settings import (
    IN_PIECES,
    refuse_in_pieces,
    refuse_other_cache,
    settle_contradictions,
)
from llava.model.language_model.label_loss import MOST_LOGITS, pass_for_loss
from llava.model.language_model.layer_reduction import ReducedCache, read
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower
from llava.model.packing import mark_borders
from llava.model.splice import TEXT as NO_IMAGE
from llava.model.splice import PromptEmbeds, Targets, check_shape
from llava.model.token_reduction import CONFIG_KEY, TEXT, Reduction, parse_reduction

TOWER_PREFIX = "model.vision_tower."


class LlavaDecoder(LlavaMetaModel):
    """A decoder with a vision tower and a projector."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoder; with a `ReducedCache` image tokens leave between layers; positions are its own."""
        if not isinstance(past_key_values, ReducedCache):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return read(self, past_key_values, embeds, attention_mask, kwargs)


class LlavaCausalLM(LlavaMetaForCausalLM):
    """LLaVA with token reduction; the reducer is parsed here, before any weight is read.

    Attributes:
        most_logits: made at a time where a pass is asked for its loss alone; None: all at once, for ranks that gather
            the head's weights together and so have to call it equally often (ZeRO-3).
    """

    most_logits: int | None = MOST_LOGITS

    # Mean over micro-batches, as in LLaVA's training (transformers 5 would weight by tokens).
    accepts_loss_kwargs = False
    # Towers come from mm_vision_tower, whatever a checkpoint holds of them; inv_freq is computed.
    stored_names: Mapping[str, str] = NAMES  # of llava-hf folders
    _keys_to_ignore_on_load_unexpected = (r"model\.vision_tower\..*", r".*rotary_emb\.inv_freq")

    def build(self, config: PreTrainedConfig, decoder: type[LlavaDecoder]) -> None:
        """Build the parts; vision weights follow by `get_vision_tower().load_model()`.

        Raises:
            InputError: for a config that does not hold together.
        """
        reduction = parse_reduction(getattr(config, CONFIG_KEY, None))
        self.take_reduction(reduction)
        self.model = decoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaDecoder:
        """The inner model with the vision parts."""
        return self.model

    def take_reduction(self, reduction: Reduction) -> None:
        """Reduce in this way from now on.

        Raises:
            InputError: the language model has no such layer, or does not attend to all tokens before.
        """
        window = sliding_window(self.config)
        if reduction.inside is not None and window is not None:
            raise InputError(
                f"{reduction.inside.spec()} needs attention to all tokens before, and this language model attends to "
                f"{window} (sliding_window in its config.json); reduce before it, e.g. by TRIM:-1"
            )
        super().take_reduction(reduction)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        newline = getattr(module, "image_newline", None)
        if newline is not None and not getattr(newline, "_is_hf_initialized", False):
            nn.init.normal_(newline, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        texts: str | list[str] | None = None,
        logits_to_keep: int | Tensor = 0,
        packing: bool = False,
        only_loss: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One pass over prompts with images (arguments as in `embed_prompts`), or over what `generate` continues.

        `logits_to_keep` is in the signature because `generate` looks for it there: it then asks for the logits of the
        last position alone (the others are 2 % of the FLOPs of a 7B prefill, and gigabytes at large batches).

        With labels, and in training, the language model reads all image tokens, whatever would leave inside it.

        `only_loss`, with labels, asks for no logits: the output head reads the labelled positions alone, part by part,
        and what comes back is a `LossOutput`. The trainer asks so; the loss and its gradients are the same.

        `packing` lays the samples of a training batch end to end in rows (see `llava.model.packing`): the loss is the
        same, the logits are `[R, L, V]` over the rows.

        Returns:
            Loss (mean over labelled tokens, with labels) and logits `[S, L, V]` over the spliced positions, or over
            the last `logits_to_keep` of them. Where image tokens leave inside the language model, L counts those that
            reach the last layer, padded on the left.

        Raises:
            InputError: as `embed_prompts`; `only_loss` without labels, or packing without ids and labels.
        """
        if packing and (labels is None or inputs_embeds is not None or past_key_values is not None):
            raise InputError("packing is for training: give input_ids and labels, and no cache")
        if only_loss and labels is None:
            raise InputError("only_loss=True: there is no loss without labels; give labels, or leave it out")
        targets = None
        if inputs_embeds is None and past_key_values is None:
            batch = self.embed_prompts(
                input_ids,
                attention_mask=attention_mask,
                labels=labels,
                images=images,
                image_sizes=image_sizes,
                texts=texts,
                packing=packing,
            )
            input_ids, inputs_embeds, labels = None, batch.embeds, batch.labels
            attention_mask, position_ids = batch.attention_mask, batch.position_ids
            targets = batch.targets
            if batch.borders is not None:
                # With a mask, or a cache, transformers would not look for samples among the positions.
                attention_mask, use_cache = None, False
                kwargs |= mark_borders(batch.borders, inputs_embeds.device)
            if self.layer_reducer is not None and labels is None and not self.training:
                past_key_values = self.make_cache(batch)
        if only_loss:
            num_items = kwargs.pop("num_items_in_batch", None)
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds} | kwargs
            inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            targets = targets or Targets.of(labels, labels.device)
            return pass_for_loss(self, targets, inputs, self.most_logits, num_items)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        texts: str | list[str] | None = None,
        image_tokens: list[ImageTokens] | None = None,
        **kwargs,
    ) -> Tensor:
        """Answer prompts about images.

        Args:
            inputs: `int64[S, T]` with IMAGE_TOKEN_INDEX at placeholders (also as `input_ids=`), padded on either side.
            images: one per placeholder; see `encode_patches`. None for text-only prompts. A list for each prompt, as
                transformers' pipelines join what they batch, is the same.
            image_sizes: (width, height) per image; lists as for `images`.
            texts: the query of each sample for the CLIP text tower; None: recovered from the ids.
            image_tokens: instead of `images`: records from `encode_images`.
            **kwargs: transformers' generation arguments, `attention_mask` among them. `past_key_values` may hold the
                earlier turns of the same prompts, with the same image tokens: another reduction or other images are
                refused. Where the reduction reads the question, the images come as the `image_tokens` that the cache
                was made with. A method inside the language model reads all turns anew.
                `inputs_embeds` of `embed_prompts`, with their `attention_mask` and `position_ids`, stand for ids and
                images.

        Returns:
            `int64[S, new tokens]`: the answer alone, without the prompt.

        Raises:
            InputError: when images, placeholders and texts do not fit, the prompt is longer than the model's positions,
                a cache holds other image tokens, or ones that this question would choose anew, or a setting would read
                the prompt in pieces.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        refuse_in_pieces(self, kwargs, IN_PIECES)
        if kwargs.get("inputs_embeds") is not None:
            if any(given is not None for given in (input_ids, images, texts, image_tokens)):
                raise InputError("inputs_embeds hold the whole prompt: leave out ids, images, texts and image_tokens")
            return self._continue_embeds(**kwargs)
        kwargs.pop("inputs_embeds", None)
        if input_ids is None:
            raise InputError("nothing to answer: give input ids, or inputs_embeds from embed_prompts")
        if self.layer_reducer is not None:
            refuse_other_cache(self, kwargs, self.layer_reducer.spec_name)
        images, image_sizes = _join_lists(images, Tensor), _join_lists(image_sizes, (list, tuple))
        # 1. Which ids are padding.
        kwargs.pop("position_ids", None)  # counted anew behind the splice
        pad_token_id = kwargs.pop("pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        # 2. Images and text become one sequence of embeddings per sample, padded on the left: answers begin together.
        batch = self.embed_prompts(
            input_ids,
            attention_mask=kwargs.pop("attention_mask", None),
            images=images,
            image_sizes=image_sizes,
            texts=texts,
            image_tokens=image_tokens,
            padding_side="left",
            pad_token_id=pad_token_id,
        )
        self._check_length(int(batch.position_ids.max()) + 1)
        cache = kwargs.get("past_key_values")
        if self.layer_reducer is not None:
            kwargs["past_key_values"] = self.make_cache(batch)
        elif cache is not None:
            if image_tokens is None:
                self._check_cache(cache, batch)
            keep_images(cache, batch)
        # 3. Decode. With embeddings as input, what comes back is the answer alone.
        return super().generate(
            inputs_embeds=batch.embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            pad_token_id=pad_token_id,
            **settle_contradictions(kwargs),
        )

    def _continue_embeds(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Answer prompts that are embeddings already, such as those of `embed_prompts`."""
        if self.layer_reducer is not None:
            raise InputError(
                f"{self.layer_reducer.spec()} has to know which embeddings are image tokens: give input ids with "
                "images or image_tokens instead of inputs_embeds"
            )
        for name, values in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if values is not None:
                check_shape(name, values, inputs_embeds)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise InputError(
                'inputs_embeds padded on the right: make them with embed_prompts(..., padding_side="left")'
            )
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        elif self.token_reducer is not None and self.token_reducer.position_ids == "original":
            raise InputError("position_ids=original leaves gaps: give the position_ids of embed_prompts as well")
        self._check_length(inputs_embeds.shape[1] if position_ids is None else int(position_ids.max()) + 1)
        kwargs.setdefault("pad_token_id", self.config.pad_token_id if self.config.pad_token_id is not None else 0)
        kwargs = settle_contradictions(kwargs)
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def make_cache(self, batch: PromptEmbeds) -> DynamicCache:
        """Make the empty cache that these prompts are read with: here the reduction inside the language model hangs."""
        if self.layer_reducer is None:
            return DynamicCache(config=self.config)
        return ReducedCache(self.config, self.layer_reducer, batch.image_of, batch.position_ids)

    def _check_cache(self, cache: Cache, batch: PromptEmbeds) -> None:
        """Refuse a cache with tokens of images that were just reduced anew: for this question others may be kept."""
        length = int(cache.get_seq_length())
        if TEXT in self.needs and bool((batch.image_of[:, :length] != NO_IMAGE).any()):
            raise InputError(
                f"past_key_values holds image tokens that {self.token_reducer.spec()} chose for an earlier question: "
                "give the same ones as image_tokens= (from encode_images, made once per image) instead of images="
            )

    def _check_length(self, num_positions: int) -> None:
        limit = self.config.max_position_embeddings
        if num_positions >= limit:
            raise InputError(
                f"the prompt takes {num_positions} positions with its image tokens, the model has {limit}: "
                "shorten the question or give fewer images"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save in LLaVA's layout: language model and projector, and the tower where it came with the checkpoint.

        Other towers are frozen and stay where `mm_vision_tower` says, which the saved config.json names as seen from
        the folder.

        Args:
            save_directory: the folder.
            **kwargs: as in transformers.
        """
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is None:
            state_dict = self.state_dict()
        own = {key: value for key, value in state_dict.items() if not key.startswith(TOWER_PREFIX)}
        tower = self.get_vision_tower()
        if isinstance(tower, StoredVisionTower):
            own |= {f"{STORED_PREFIX}{name}": value for name, value in tower.stored_weights().items()}
        with portable_config(self, Path(save_directory)):
            super().save_pretrained(save_directory, state_dict=own, **kwargs)
        if isinstance(tower, StoredVisionTower):
            tower.save_image_processor(Path(save_directory))


def _join_lists(values: object, kind: type | tuple[type, ...]) -> object:
    """Make one list of a list of lists of `kind`, one list per prompt; others come back as they are."""
    if isinstance(values, list) and all(
        isinstance(own, list) and all(isinstance(value, kind) for value in own) for own in values
    ):
        return list(chain.from_iterable(values))
    return values


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return to how many tokens before it a token attends in some layer; None: to all in every layer."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return getattr(config, "sliding_window", None)
    return None
