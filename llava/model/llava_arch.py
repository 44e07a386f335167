"""LLaVA's architecture over any Hugging Face causal LM: vision tower, token reduction, projector, splice.

Two mixins under LLaVA's names: `LlavaMetaModel` owns the vision parts beside the decoder layers, `LlavaMetaForCausalLM`
turns (ids, images, queries) into embeddings. The mathematics is in `token_reduction`, `image_tokens`, `crops`, `splice`
and `query`; this file only puts it in order. Shape letters: see docs/architecture.md.
"""

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, IGNORE_INDEX
from llava.errors import InputError
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.crops import unpad_image
from llava.model.image_tokens import (
    CropMerge,
    ImageTokens,
    embed_distinct,
    keep_everything,
    project_tokens,
    reduce_patches,
)
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import ImageFeatures, VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector, load_vision_projector
from llava.model.packing import check_packing, find_even_width, pack_batch
from llava.model.splice import (
    PromptEmbeds,
    assign_images,
    count_placeholders,
    pad_batch,
    splice_sample,
    strip_padding,
    upload,
)
from llava.model.token_reduction import (
    CONFIG_KEY,
    TEXT,
    LayerReducer,
    Need,
    ReducedTokens,
    Reduction,
    TokenReducer,
    parse_reduction,
)
from llava.model.tokenizer import load_tokenizer
from llava.prompt import POOLED_TURNS, QUERY_KEY, list_texts, recover_query
from llava.protocols import Tokenizer, VisionArguments

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "get_anyres_image_grid_shape", "unpad_image"]

logger = logging.getLogger(__name__)


class LlavaMetaModel:
    """The vision parts of the inner model: `vision_tower` (empty until loaded), `mm_projector`, `image_newline`."""

    def __init__(self, config: PreTrainedConfig):
        """Build the parts the config names; the tower's weights come later, by `load_model`."""
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = self._build_tower(config)
            self.mm_projector = build_vision_projector(config)
            self._add_newline(config)

    def _build_tower(self, config: PreTrainedConfig) -> VisionTower:
        reducer = parse_reduction(getattr(config, CONFIG_KEY, None)).before
        select_feature = getattr(config, "mm_vision_select_feature", "patch")
        if reducer is not None and select_feature != "patch":
            raise InputError(
                f"{CONFIG_KEY} works on patches: set mm_vision_select_feature to patch, not {select_feature}"
            )
        tower = build_vision_tower(config, delay_load=True, needs=reducer.needs if reducer else frozenset())
        tower.pools_queries = getattr(config, QUERY_KEY, None) == POOLED_TURNS
        return tower

    def _add_newline(self, config: PreTrainedConfig) -> None:
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or "flat"):
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a plain language model."""
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args: VisionArguments, fsdp: object = None) -> None:
        """Give a language model its vision parts before training, or change those of a LLaVA checkpoint.

        `fsdp` is accepted because LLaVA's callers pass it, and changes nothing.

        Raises:
            InputError: for a tower, setting or projector file that does not fit.
        """
        config = self.config
        has_projector = getattr(self, "mm_projector", None) is not None
        # 1. The settings, into the config.
        config.mm_vision_tower = model_args.vision_tower
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        setattr(config, CONFIG_KEY, getattr(model_args, CONFIG_KEY, None))
        # 2. The tower; new on a LLaVA checkpoint as well, where LLaVA's code keeps the old one and its old reduction.
        self.vision_tower = self._build_tower(config)
        self.vision_tower.load_model()
        config.mm_hidden_size = self.vision_tower.hidden_size
        # 3. The trained parts, where they are not there yet.
        if not has_projector:
            self.mm_projector = build_vision_projector(config)
        if not hasattr(self, "image_newline"):
            self._add_newline(config)
            if hasattr(self, "image_newline"):
                nn.init.normal_(self.image_newline, std=config.hidden_size**-0.5)
        # Stage 1 freezes and unfreezes around this; a projector that is handed over is always trainable.
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad = True
        if model_args.pretrain_mm_mlp_adapter:
            self.load_projector(model_args.pretrain_mm_mlp_adapter)

    def load_projector(self, path: str) -> None:
        """Load `mm_projector.bin`; see `load_vision_projector`."""
        load_vision_projector(self.mm_projector, path)


class LlavaMetaForCausalLM:
    """What a causal LM needs to read images. It has no base of its own: FSDP2 could not wrap the class otherwise."""

    token_reducer: TokenReducer | None = None
    layer_reducer: LayerReducer | None = None
    _blank: tuple[object, ImageFeatures] | None = None
    tokenizer: Tokenizer | None = None
    """For `recover_queries`, in prompts of clients without texts: set by the loader, else read from the checkpoint."""

    def get_model(self) -> LlavaMetaModel:
        """The inner model with the vision parts; each causal LM has its own."""
        raise NotImplementedError

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a plain language model."""
        return self.get_model().get_vision_tower()

    def set_token_reduction(self, spec: str | None) -> None:
        """Switch the token reduction at run time: a spec as `mm_vision_token_reduce_func`, None or "none" for none.

        Raises:
            InputError: for a spec that does not parse, or that needs what the tower does not have.
        """
        reduction = self.read_reduction(spec)
        self.take_reduction(reduction)
        setattr(self.config, CONFIG_KEY, reduction.spec())
        self.note_budget()

    def read_reduction(self, spec: str | None) -> Reduction:
        """Read a spec and get the tower ready for it; the model's own reduction stays.

        What comes back is an argument of `embed_queries` and `make_image_tokens`, so that one model reduces in several
        ways at a time.

        Raises:
            InputError: as `set_token_reduction`.
        """
        reduction = parse_reduction(spec)
        tower = self.get_vision_tower()
        if reduction.before is not None and tower is not None:
            if tower.select_feature != "patch":
                raise InputError(f"token reduction works on patches: set mm_vision_select_feature to patch ({spec})")
            tower.provide(reduction.before.needs)
        return reduction

    def take_reduction(self, reduction: Reduction) -> None:
        """Reduce in this way from now on.

        Raises:
            InputError: the language model has no such layer, or its attention would take gaps in positions for the
                borders of packed sequences.
        """
        if reduction.inside is not None:
            reduction.inside.layers(self.config.num_hidden_layers)
        if reduction.before is not None and reduction.before.position_ids == "original":
            attention = self.config._attn_implementation or ""
            if "flash" in attention:
                raise InputError(
                    f"position_ids=original leaves gaps, which {attention} takes for the borders of packed sequences: "
                    "use --attn-implementation sdpa"
                )
        self.token_reducer, self.layer_reducer = reduction.before, reduction.inside

    def note_budget(self) -> None:
        """Warn of a budget that this tower's images cannot meet as it is written."""
        reducer, tower = self.token_reducer, self.get_vision_tower()
        if reducer is None or tower is None or reducer.budget.is_automatic:
            return
        budget, num_patches = reducer.budget, tower.num_patches
        if budget.value > num_patches:
            logger.warning("%s: an image has %d patches; all of them are kept", reducer.spec(), num_patches)
        elif budget.count(num_patches) == 0:
            least = "%s: less than one of an image's %d patches; the least that %s allows is kept"
            logger.warning(least, reducer.spec(), num_patches, reducer.spec_name)

    @property
    def needs(self) -> frozenset[Need]:
        """What the token reduction before the language model looks at besides the patches."""
        return self.token_reducer.needs if self.token_reducer else frozenset()

    def _reducer(self, reduction: Reduction | None) -> TokenReducer | None:
        """The method before the language model: of this reduction, None for the model's own."""
        return self.token_reducer if reduction is None else reduction.before

    def ready_tower(self) -> VisionTower:
        """Return the tower, with its weights read now if nobody has: `AutoModelForCausalLM` leaves them out.

        Raises:
            InputError: they can't be loaded.
        """
        tower = self.get_vision_tower()
        if not tower.is_loaded:
            with torch.inference_mode(False):  # weights may be trained later
                tower.load_model(device=self.get_input_embeddings().weight.device)
        return tower

    def encode_patches(
        self, images: Tensor | list[Tensor] | list[ImageFeatures], needs: Collection[Need] | None = None
    ) -> list[ImageFeatures]:
        """Run the vision tower over a batch of images; the result depends on the images alone.

        Args:
            images: `[I, 3, S, S]`, `[I, C, 3, S, S]`, or a list of `[3, S, S]` and `[C, 3, S, S]`; or records of an
                earlier call, which come back as they are.
            needs: what to take of the tower besides the patches; None: what the token reduction needs.

        Returns:
            One record per image: patches `[C, N, D]` (C = 1 for single-crop models) in the tower's dtype, and what else
            the token reduction needs of the tower.
        """
        if isinstance(images, list) and all(isinstance(image, ImageFeatures) for image in images):
            return images
        crops = [image[None] if image.dim() == 3 else image for image in images]
        if not crops:
            return []
        features = self.ready_tower().extract(torch.cat(crops), self.needs if needs is None else needs)
        return features.split([image.shape[0] for image in crops])

    def embed_queries(self, texts: list[str], reduction: Reduction | None = None) -> Tensor | None:
        """Run the CLIP text tower, for callers that meet the same query again; equal texts are embedded once.

        Args:
            texts: I queries.
            reduction: see `make_image_tokens`.

        Returns:
            `float32[I, P]`, one row per text; None where the token reduction reads no text.
        """
        reducer = self._reducer(reduction)
        return embed_distinct(self.ready_tower(), texts) if reducer is not None and TEXT in reducer.needs else None

    def choose_tokens(
        self,
        images: list[ImageFeatures],
        texts: list[str],
        text_embeds: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> list[ReducedTokens]:
        """Apply the token reduction to images, each for its question; arguments as in `make_image_tokens`.

        Returns:
            One record per image, over its crops, before the projector.
        """
        reducer = self._reducer(reduction)
        if reducer is None:
            return keep_everything(images)
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        return reduce_patches(reducer, tower, projector, images, texts, text_embeds)

    def project_chosen(
        self,
        reduced: list[ReducedTokens],
        image_sizes: list[tuple[int, int]] | None = None,
        reduction: Reduction | None = None,
    ) -> list[ImageTokens]:
        """Project what `choose_tokens` left, and no more, to LLM width: one record per image."""
        model, tower = self.get_model(), self.get_vision_tower()
        merge = CropMerge.of_config(self.config, tower.image_size, getattr(model, "image_newline", None))
        reducer = self._reducer(reduction)
        keep_positions = reducer is not None and reducer.position_ids == "original"
        return project_tokens(
            reduced, model.mm_projector, merge, tower.grid, image_sizes, keep_positions=keep_positions
        )

    def make_image_tokens(
        self,
        images: list[ImageFeatures],
        texts: list[str],
        image_sizes: list[tuple[int, int]] | None = None,
        *,
        text_embeds: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> list[ImageTokens]:
        """Choose and project the tokens of images, each for its question.

        Args:
            images: one record per image, from `encode_patches`.
            texts: one query per image, for the CLIP text tower; not looked at where the reducer needs no text.
            image_sizes: (width, height) of each image in pixels, needed for spatial merges of crops only.
            text_embeds: `float32[I, P]` the queries as `embed_queries` gives them; None: they are embedded here.
            reduction: from `read_reduction`, its method before the language model; the images are encoded with what it
                needs. None: the model's own.
        """
        if not images:
            return []
        return self.project_chosen(self.choose_tokens(images, texts, text_embeds, reduction), image_sizes, reduction)

    @overload
    def encode_images(
        self, images: Tensor | list[Tensor], texts: list[str], image_sizes: list[tuple[int, int]] | None = None
    ) -> list[ImageTokens]: ...

    @overload
    def encode_images(
        self, images: Tensor | list[Tensor], texts: None = None, image_sizes: list[tuple[int, int]] | None = None
    ) -> Tensor | list[Tensor]: ...

    def encode_images(
        self,
        images: Tensor | list[Tensor],
        texts: list[str] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> list[ImageTokens] | Tensor | list[Tensor]:
        """`encode_patches` and `make_image_tokens` in one.

        Args:
            images: see `encode_patches`.
            texts: one query per image; None, as in LLaVA's clients: for a token reduction that reads none.
            image_sizes: see `make_image_tokens`.

        Returns:
            One record per image; without texts the features alone, as in LLaVA: `[I, M, E]`, or a list of I times
            `[M, E]` where the images have different numbers of tokens.

        Raises:
            InputError: no texts, and the token reduction reads them.
        """
        if texts is not None:
            return self.make_image_tokens(self.encode_patches(images), texts, image_sizes)
        if TEXT in self.needs:
            raise InputError(f"{self.token_reducer.spec()} reads the question: give texts=, one for each image")
        tokens = self.encode_images(images, [""] * len(images), image_sizes)
        features = [image.features for image in tokens]
        is_even = len({image.num_tokens for image in tokens}) == 1
        return torch.stack(features) if is_even else features

    def recover_queries(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Recover the question of each sample of `int64[S, T]` from its ids, the last user turn.

        Raises:
            InputError: when no tokenizer was attached (`load_pretrained_model` does) and the checkpoint has none.
        """
        if self.tokenizer is None:
            checkpoint = getattr(self.config, "_name_or_path", None)
            if not checkpoint:
                raise InputError("recovering the query needs model.tokenizer; set it, or pass texts=[...]")
            self.tokenizer = load_tokenizer(checkpoint)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        conv_mode = getattr(self.config, "conv_mode", None)
        return [recover_query(row[keep], self.tokenizer, conv_mode) for row, keep in zip(input_ids, real, strict=True)]

    def _sample_texts(self, texts: str | list[str] | None, input_ids: Tensor, real: Tensor) -> list[str]:
        """One query per sample: as given, one for all, or recovered from the ids."""
        num_samples = input_ids.shape[0]
        if TEXT not in self.needs:
            return [""] * num_samples
        if texts is None:
            return self.recover_queries(input_ids, real)
        return list_texts(texts, num_samples)

    def embed_prompts(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        texts: str | list[str] | None = None,
        image_tokens: list[ImageTokens] | None = None,
        padding_side: str | None = None,
        pad_token_id: int | None = None,
        packing: bool = False,
    ) -> PromptEmbeds:
        """Turn prompt ids and images into the embeddings that the decoder reads.

        What comes back can be looked at, changed, and handed to `forward` or, padded on the left, to `generate`.

        Args:
            input_ids: `int64[S, T]` with IMAGE_TOKEN_INDEX at placeholders, padded on either side.
            attention_mask: `[S, T]`, False at padding; None: see `splice.strip_padding`.
            labels: `int64[S, T]` or None.
            images: see `encode_patches`; one per placeholder, in order.
            image_sizes: (width, height) per image.
            texts: one query per sample (as it is, or as the tower's `text_reader` made it), one string for all, or None
                to recover them from the ids.
            image_tokens: instead of `images`: records from `encode_images`, one per placeholder.
            padding_side: "left" or "right"; None takes the config's `tokenizer_padding_side`, else "right".
            pad_token_id: see `splice.strip_padding`.
            packing: lay samples end to end in rows of at most the model's length, for training; see
                `llava.model.packing`.

        Raises:
            InputError: when images, placeholders and texts do not fit together, or packing does not fit the model.
        """
        if packing:
            check_packing(self.config._attn_implementation, self.token_reducer)
        # 1. Leave out padding. Ids are looked at one by one: on the host, with one wait for the device, not many.
        real = strip_padding(input_ids, attention_mask, pad_token_id).cpu()  # bool[S, T]
        input_ids = input_ids.cpu()
        # 2. Find each placeholder's image, and make its tokens, for its sample's query.
        given = images if image_tokens is None else image_tokens
        num_placeholders = count_placeholders(input_ids.masked_fill(~real, 0))
        owners = assign_images(num_placeholders, 0 if given is None else len(given), allow_dummies=labels is not None)
        if image_tokens is None and any(owners):
            queries = self._sample_texts(texts, input_ids, real)
            pairs = [(query, index) for query, indices in zip(queries, owners, strict=True) for index in indices]
            sizes = None if image_sizes is None else [image_sizes[index] for _, index in pairs]
            encoded = self.encode_images([images[index] for _, index in pairs], [query for query, _ in pairs], sizes)
            image_tokens = {index: tokens for (_, index), tokens in zip(pairs, encoded, strict=True)}
        features = [[image_tokens[index].features for index in indices] for indices in owners]  # per sample [M, E] each
        positions = [[image_tokens[index].positions for index in indices] for indices in owners]
        # 3. Embed the text. Projector first, embeddings second, with and without an image: gradients then arrive, and
        #    are exchanged, in the same order on every rank.
        anchor = self._projector_anchor(features)
        embed = self.get_input_embeddings()
        real_ids = input_ids[real]  # all samples in one row
        text_embeds = embed(upload(real_ids.clamp(min=0), embed.weight.device))  # [real ids, E]
        if anchor is not None:
            text_embeds = torch.cat([text_embeds, anchor.to(text_embeds)])
        real_labels = torch.full_like(real_ids, IGNORE_INDEX) if labels is None else labels.cpu()[real]
        # 4. Splice sample by sample, and pad to one length or pack. Training cuts at the model's length.
        num_real = real.sum(dim=1).tolist()
        limit = getattr(self.config, "tokenizer_model_max_length", None) if labels is not None else None
        rows = (field.split(num_real) for field in (real_ids, text_embeds, real_labels))
        spliced = [splice_sample(*row) for row in zip(*rows, features, positions, strict=True)]
        columns = [[row[:limit] for row in column] for column in zip(*spliced, strict=True)]
        if packing:
            *columns, _ = columns  # positions are counted anew
            batch = pack_batch(*columns, limit, find_even_width(self.config))
        else:
            side = padding_side or getattr(self.config, "tokenizer_padding_side", None) or "right"
            batch = pad_batch(*columns, side=side)
        return batch if labels is not None else replace(batch, labels=None, targets=None)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | None,
        image_sizes: list[tuple[int, int]] | None = None,
        texts: str | list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor, Cache | None, Tensor, Tensor | None]:
        """`embed_prompts` under LLaVA's name, with its order of arguments and results, for code written for LLaVA.

        `position_ids` are counted anew after splicing, `past_key_values` passed through.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).
        """
        batch = self.embed_prompts(
            input_ids, attention_mask=attention_mask, labels=labels, images=images, image_sizes=image_sizes, texts=texts
        )
        return None, batch.position_ids, batch.attention_mask, past_key_values, batch.embeds, batch.labels

    def _projector_anchor(self, features: list[list[Tensor]]) -> Tensor | None:
        """Zero rows of projected features `[0, E]`, for the embeddings of a training batch; None outside training.

        They change no value but keep projector and newline in the batch's graph: a rank whose batch holds no image, or
        no row of tiles, still runs tower and projector and takes part in their collectives (else distributed training
        hangs or crashes).
        """
        projector = getattr(self.get_model(), "mm_projector", None)
        if not (self.training and torch.is_grad_enabled()) or projector is None:
            return None
        first = next((image for own in features for image in own), None)
        if first is None:
            first = self.make_image_tokens([self._encode_blank()], [""])[0].features
        newline = getattr(self.get_model(), "image_newline", None)
        return first[:0] if newline is None else torch.cat([first, newline[None].to(first)])[:0]

    def _encode_blank(self) -> ImageFeatures:
        """Encode an image of zeros, once while the token reduction needs the same of it."""
        tower = self.get_vision_tower()
        made_for = (self.needs, tower.device, tower.dtype)
        if self._blank is None or self._blank[0] != made_for:
            side = tower.image_size
            self._blank = made_for, self.encode_patches(torch.zeros(1, 3, side, side))[0]
        return self._blank[1]

    def initialize_vision_tokenizer(self, model_args: VisionArguments, tokenizer: Tokenizer) -> None:
        """Add the tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` ask for (LLaVA-1.5: none), in place."""
        extra = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        if model_args.mm_use_im_start_end:
            extra += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        added = tokenizer.add_tokens(extra, special_tokens=True) if extra else 0
        if added:
            self.add_token_rows(len(tokenizer))

    def add_token_rows(self, num_tokens: int) -> None:
        """Add rows of embeddings and output head up to a number of tokens; each new one is the mean of the old ones."""
        num_known = self.get_input_embeddings().weight.shape[0]
        self.resize_token_embeddings(num_tokens, mean_resizing=False)
        for weights in (self.get_input_embeddings().weight.data, self.get_output_embeddings().weight.data):
            weights[num_known:] = weights[:num_known].mean(dim=0, keepdim=True)
