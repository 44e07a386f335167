"""LLaVA's architecture over any Hugging Face causal LM: vision tower, token reduction, projector, splice.

Two mixins, as published: `LlavaMetaModel` owns the vision parts beside the decoder layers, `LlavaMetaForCausalLM`
turns (ids, images, queries) into embeddings. The mathematics lives in `token_reduction`, `image_tokens`, `crops`,
`splice` and `query`; this file only puts it in order.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
)
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
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.query import recover_query
from llava.model.splice import assign_images, count_image_marks, pad_batch, splice_sample, strip_padding
from llava.model.token_reduction import CONFIG_KEY, TEXT, Need, ReducedTokens, TokenReducer, parse_reducer

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "get_anyres_image_grid_shape", "unpad_image"]


class LlavaMetaModel:
    """The vision parts of the inner model: `vision_tower` (empty until loaded), `mm_projector`, `image_newline`."""

    def __init__(self, config):
        """Build the parts the config names; the tower's weights come later, by `load_model`."""
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = self._build_tower(config)
            self.mm_projector = build_vision_projector(config)
            self._add_newline(config)

    def _build_tower(self, config) -> VisionTower:
        reducer = parse_reducer(getattr(config, CONFIG_KEY, None))
        select_feature = getattr(config, "mm_vision_select_feature", "patch")
        if reducer is not None and select_feature != "patch":
            raise InputError(
                f"{CONFIG_KEY} works on patches: set mm_vision_select_feature to patch, not {select_feature}"
            )
        return build_vision_tower(
            config.mm_vision_tower,
            folder=getattr(config, "_name_or_path", None),
            select_layer=getattr(config, "mm_vision_select_layer", -2),
            select_feature=select_feature,
            needs=reducer.needs if reducer else frozenset(),
        )

    def _add_newline(self, config) -> None:
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or "flat"):
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a model without eyes."""
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Give a language model eyes before training, or change those of a LLaVA checkpoint.

        Args:
            model_args: `vision_tower`, `mm_vision_select_layer`, `mm_vision_select_feature`, `mm_projector_type`,
                `mm_patch_merge_type`, `mm_vision_token_reduce_func`, `pretrain_mm_mlp_adapter` (path of a
                `mm_projector.bin`, or None).
            fsdp: accepted for published callers; FSDP is not used.

        Raises:
            InputError: for a tower, setting or projector file that does not fit.
        """
        config = self.config
        has_projector = getattr(self, "mm_projector", None) is not None
        config.mm_vision_tower = model_args.vision_tower
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        setattr(config, CONFIG_KEY, getattr(model_args, CONFIG_KEY, None))
        # Built anew also on a LLaVA checkpoint: the published code keeps the old tower, and its old reduction, there.
        self.vision_tower = self._build_tower(config)
        self.vision_tower.load_model()
        config.mm_hidden_size = self.vision_tower.hidden_size
        if not has_projector:
            self.mm_projector = build_vision_projector(config)
        if not hasattr(self, "image_newline"):
            self._add_newline(config)
            if hasattr(self, "image_newline"):
                nn.init.normal_(self.image_newline, std=config.hidden_size**-0.5)
        # Stage 1 freezes and unfreezes around this; a projector handed over is always trainable, as published.
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad = True
        if model_args.pretrain_mm_mlp_adapter:
            self.load_projector(model_args.pretrain_mm_mlp_adapter)

    def load_projector(self, path: str) -> None:
        """Load `mm_projector.bin`.

        Args:
            path: the file; keys end in `mm_projector.<name>`.

        Raises:
            InputError: when it can't be read or does not fit.
        """
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            prefix = "mm_projector."
            own = {key.split(prefix, 1)[1]: value for key, value in weights.items() if prefix in key}
            self.mm_projector.load_state_dict(own)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise InputError(f"projector weights {path} can't be loaded: {str(error).splitlines()[0]}") from error


class LlavaMetaForCausalLM(ABC):
    """What a causal LM needs to read pictures."""

    token_reducer: TokenReducer | None = None
    tokenizer = None  # set by the loader; lets `recover_queries` read prompts of clients that pass no text

    @abstractmethod
    def get_model(self) -> LlavaMetaModel:
        """The inner model with the vision parts."""

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, or None for a model without eyes."""
        return self.get_model().get_vision_tower()

    def set_token_reduction(self, spec: str | None) -> None:
        """Switch the token reduction at run time.

        Args:
            spec: as `mm_vision_token_reduce_func`; None or "none" for no reduction.

        Raises:
            InputError: for a spec that does not parse, or that needs what the tower does not have.
        """
        reducer = parse_reducer(spec)
        tower = self.get_vision_tower()
        if reducer is not None and tower is not None:
            if tower.select_feature != "patch":
                raise InputError(f"token reduction works on patches: set mm_vision_select_feature to patch ({spec})")
            tower.provide(reducer.needs)
        self.token_reducer = reducer
        setattr(self.config, CONFIG_KEY, reducer.spec() if reducer else None)

    @property
    def _needs(self) -> frozenset[Need]:
        return self.token_reducer.needs if self.token_reducer else frozenset()

    def encode_patches(self, images: Tensor | list[Tensor]) -> list[ImageFeatures]:
        """Run the vision tower over a batch of images; the result depends on the images alone.

        Args:
            images: `[I, 3, S, S]`, `[I, C, 3, S, S]`, or a list of `[3, S, S]` and `[C, 3, S, S]`.

        Returns:
            One record per image: patches `[C, N, D]` (C = 1 for single-crop models) in the tower's dtype, and what else
            the token reduction needs of the tower.
        """
        crops = [image[None] if image.dim() == 3 else image for image in images]
        if not crops:
            return []
        features = self.get_vision_tower().extract(torch.cat(crops), self._needs)
        return features.split([image.shape[0] for image in crops])

    def embed_queries(self, texts: list[str]) -> Tensor | None:
        """Run the CLIP text tower, for callers that meet the same query again.

        Args:
            texts: queries; equal ones are embedded once.

        Returns:
            `float32[I, P]`, one row per text; None where the token reduction reads no text.
        """
        if TEXT not in self._needs:
            return None
        return embed_distinct(self.get_vision_tower(), texts)

    def choose_tokens(
        self, images: list[ImageFeatures], texts: list[str], text_embeds: Tensor | None = None
    ) -> list[ReducedTokens]:
        """Apply the token reduction to images, each for its question; arguments as in `make_image_tokens`.

        Returns:
            One record per image, over its crops, before the projector.
        """
        if self.token_reducer is None:
            return keep_everything(images)
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        return reduce_patches(self.token_reducer, tower, projector, images, texts, text_embeds)

    def project_chosen(
        self, reduced: list[ReducedTokens], image_sizes: list[tuple[int, int]] | None = None
    ) -> list[ImageTokens]:
        """Project what `choose_tokens` left, and no more, to LLM width: one record per picture."""
        projector, grid = self.get_model().mm_projector, self.get_vision_tower().grid
        return project_tokens(reduced, projector, self._crop_merge(), grid, image_sizes)

    def make_image_tokens(
        self,
        images: list[ImageFeatures],
        texts: list[str],
        image_sizes: list[tuple[int, int]] | None = None,
        *,
        text_embeds: Tensor | None = None,
    ) -> list[ImageTokens]:
        """Choose and project the tokens of pictures, each for its question.

        Args:
            images: one record per image, from `encode_patches`.
            texts: one query per picture, read by the CLIP text tower; not looked at where the reducer needs no text.
            image_sizes: (width, height) of each picture in pixels, needed for spatial merges of crops only.
            text_embeds: `float32[I, P]` the queries as `embed_queries` gives them; None: they are embedded here.

        Returns:
            One record per picture.
        """
        if not images:
            return []
        return self.project_chosen(self.choose_tokens(images, texts, text_embeds), image_sizes)

    def encode_images(
        self, images: Tensor | list[Tensor], texts: list[str], image_sizes: list[tuple[int, int]] | None = None
    ) -> list[ImageTokens]:
        """`encode_patches` and `make_image_tokens` in one: one query per picture, one record per picture."""
        return self.make_image_tokens(self.encode_patches(images), texts, image_sizes)

    def _crop_merge(self) -> CropMerge:
        tile_grid = None
        if getattr(self.config, "image_aspect_ratio", None) == "anyres":

            def tile_grid(image_size: tuple[int, int]) -> tuple[int, int]:
                side = self.get_vision_tower().image_size
                columns, rows = get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, side)
                return rows, columns

        kind = getattr(self.config, "mm_patch_merge_type", None) or "flat"
        return CropMerge(kind, tile_grid, getattr(self.get_model(), "image_newline", None))

    def recover_queries(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Recover each sample's question from its ids (last user turn), for callers that pass no texts.

        Args:
            input_ids: `int64[S, T]` with `<image>` marks.
            attention_mask: `[S, T]`; None takes all ids.

        Returns:
            S queries.

        Raises:
            ValueError: when no tokenizer was attached (`load_pretrained_model` attaches it).
        """
        if self.tokenizer is None:
            raise ValueError("recovering the query needs model.tokenizer; set it, or pass texts=[...]")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return [recover_query(row[keep], self.tokenizer) for row, keep in zip(input_ids, real, strict=True)]

    def _sample_texts(self, texts: str | list[str] | None, input_ids: Tensor, real: Tensor) -> list[str]:
        """One query per sample: as given, one for all, or recovered from the ids."""
        num_samples = input_ids.shape[0]
        if TEXT not in self._needs:
            return [""] * num_samples
        if texts is None:
            return self.recover_queries(input_ids, real)
        texts = [texts] * num_samples if isinstance(texts, str) else list(texts)
        if len(texts) != num_samples:
            raise InputError(f"{len(texts)} texts for {num_samples} prompts: give one query per prompt, or one string")
        return texts

    def _tokens_of_images(
        self, owners: list[list[int]], input_ids: Tensor, real: Tensor, images, image_sizes, texts
    ) -> dict[int, ImageTokens]:
        """Encode the images that marks ask for, each with its sample's query; keyed by the image's index."""
        pairs = [(sample, index) for sample, indices in enumerate(owners) for index in indices]
        if not pairs:
            return {}
        queries = self._sample_texts(texts, input_ids, real)
        sizes = None if image_sizes is None else [image_sizes[index] for _, index in pairs]
        encoded = self.encode_images(
            [images[index] for _, index in pairs], [queries[sample] for sample, _ in pairs], sizes
        )
        return {index: tokens for (_, index), tokens in zip(pairs, encoded, strict=True)}

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: object,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | None,
        image_sizes: list[tuple[int, int]] | None = None,
        texts: str | list[str] | None = None,
        *,
        image_tokens: list[ImageTokens] | None = None,
        padding_side: str | None = None,
        pad_token_id: int | None = None,
    ) -> tuple:
        """Turn ids and pictures into embeddings (published name, arguments and order of results).

        Args:
            input_ids: `int64[S, T]` with `<image>` marks, padded on either side.
            position_ids: ignored; positions are counted anew after splicing.
            attention_mask: `[S, T]`, False at padding; None: see `splice.strip_padding`.
            past_key_values: passed through.
            labels: `int64[S, T]` or None.
            images: see `encode_patches`; one per mark, in order.
            image_sizes: (width, height) per picture.
            texts: one query per sample, one string for all, or None to recover them from the ids.
            image_tokens: instead of `images`: records from `encode_images`, one per mark.
            padding_side: "left" or "right"; None takes the config's `tokenizer_padding_side`, else "right".
            pad_token_id: see `splice.strip_padding`.

        Returns:
            (None, position_ids `int64[S, L]`, attention_mask `bool[S, L]`, past_key_values, inputs_embeds
            `[S, L, E]`, labels `int64[S, L]` or None).

        Raises:
            InputError: when images, marks and texts do not fit together.
        """
        real = strip_padding(input_ids, attention_mask, pad_token_id).cpu()
        # Ids are looked at one by one: on the host, once, instead of one wait for the device per look.
        input_ids = input_ids.cpu()
        given = images if image_tokens is None else image_tokens
        marks = count_image_marks(input_ids.masked_fill(~real, 0))
        owners = assign_images(marks, 0 if given is None else len(given), allow_dummies=labels is not None)
        if image_tokens is None:
            image_tokens = self._tokens_of_images(owners, input_ids, real, images, image_sizes, texts)
        tokens = [[image_tokens[index] for index in indices] for indices in owners]
        embed = self.get_input_embeddings()
        num_real = real.sum(dim=1).tolist()
        real_ids = input_ids[real]
        # Projector first, embeddings second, with and without a picture: gradients then arrive, and are exchanged, in
        # the same order on every rank.
        anchor = self._projector_anchor(tokens)
        token_embeds = embed(real_ids.clamp(min=0).to(embed.weight.device))
        limit = getattr(self.config, "tokenizer_model_max_length", None) if labels is not None else None
        real_labels = torch.full_like(real_ids, IGNORE_INDEX) if labels is None else labels.cpu()[real]
        rows = (field.split(num_real) for field in (real_ids, token_embeds, real_labels))
        embeds, targets = [], []
        for pictures, ids, embedded, label_row in zip(tokens, *rows, strict=True):
            features = [picture.features for picture in pictures]
            sample, target = splice_sample(ids, embedded, features, label_row)
            embeds.append(torch.cat([sample, anchor.to(sample)])[:limit] if anchor is not None else sample[:limit])
            targets.append(target[:limit])
        side = padding_side or getattr(self.config, "tokenizer_padding_side", None) or "right"
        inputs_embeds, mask, batch_labels, positions = pad_batch(embeds, targets, side=side)
        return None, positions, mask, past_key_values, inputs_embeds, None if labels is None else batch_labels

    def _projector_anchor(self, tokens: list[list[ImageTokens]]) -> Tensor | None:
        """Zero rows of projected features, appended to each sample of a training batch.

        They change no value but keep the projector in every sample's graph: a rank whose batch holds no picture still
        runs tower and projector and takes part in their collectives (else distributed training hangs or crashes).

        Args:
            tokens: the batch's image tokens.

        Returns:
            `[0, E]`, or None outside training.
        """
        projector = getattr(self.get_model(), "mm_projector", None)
        if not (self.training and torch.is_grad_enabled()) or projector is None:
            return None
        first = next((picture.features for sample in tokens for picture in sample), None)
        if first is None:
            side = self.get_vision_tower().image_size
            first = self.encode_images(torch.zeros(1, 3, side, side), [""])[0].features
        return first[:0]

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` ask for (LLaVA-1.5 asks for none).

        Args:
            model_args: with the two flags, also written to the config.
            tokenizer: the LLM's tokenizer, changed in place.
        """
        extra = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        if model_args.mm_use_im_start_end:
            extra += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        added = tokenizer.add_tokens(extra, special_tokens=True) if extra else 0
        if added:
            self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for weights in (self.get_input_embeddings().weight.data, self.get_output_embeddings().weight.data):
                weights[-added:] = weights[:-added].mean(dim=0, keepdim=True)
