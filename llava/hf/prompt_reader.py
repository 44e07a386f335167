"""From a transformers model's arguments to the embeddings that its decoder reads, with fewer tokens per image.

Shape letters: `S` samples, `T` prompt ids, `I` images, `C` crops of one image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.hf.host_tower import HostTower
from llava.hf.placeholders import Prompt, collapse_images
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.crops import layout_tiles
from llava.model.image_tokens import (
    CropMerge,
    ImageTokens,
    keep_everything,
    project_tokens,
    reduce_patches,
    spread_texts,
)
from llava.model.splice import PromptEmbeds, pad_batch, splice_sample, strip_padding
from llava.model.token_reduction import TEXT, TokenReducer
from llava.prompt import decode_prompt, recover_query
from llava.protocols import Tokenizer

Texts = str | Sequence[str] | Callable[[str], str] | None
Model = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration

FIXED = ("vision_feature_layer", "vision_feature_select_strategy")
"""Arguments that may only say what the config says: the tower is read as the config says."""


class PromptReader:
    """Reads batches of prompts for one model: its tower, projector, embeddings and config, and our reduction.

    Attributes:
        image_tokens: of the latest batch with images, one record per image; with several threads, of any of theirs.
    """

    image_tokens: list[ImageTokens]

    def __init__(
        self, model: Model, reducer: TokenReducer | None, tower: HostTower, texts: Texts, tokenizer: Tokenizer | None
    ):
        """Take the parts, which fit together."""
        self.image_tokens = []
        self._model = model
        self._reducer = reducer
        self._tower = tower
        self._texts = texts
        self._tokenizer = tokenizer

    def read(
        self, arguments: Mapping[str, object], pad_token_id: int | None, *, side: str
    ) -> tuple[list[Prompt], list[ImageTokens], PromptEmbeds]:
        """Reduce a batch's images, and put what is left of them into its prompts.

        Args:
            arguments: of `generate` or `forward`, with images among them.
            pad_token_id: counts as padding where no mask is given; see `splice.strip_padding`.
            side: where the padding goes.

        Raises:
            InputError: arguments that do not fit together.
        """
        self._check(arguments)
        input_ids, attention_mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
        # 1. Which ids are whose, with one wait for the device.
        real = strip_padding(input_ids, attention_mask, pad_token_id).cpu()  # bool[S, T]
        sizes = self._image_sizes(arguments)
        counts = [self._count_whole(size) for size in sizes]
        prompts = collapse_images(input_ids.cpu(), real, self._model.config.image_token_id, counts)
        # 2. Each image's tokens, for its prompt's query.
        images = self._make_tokens(self._crops(arguments["pixel_values"], sizes), sizes, prompts)
        # 3. Text and images in order.
        embed = self._model.get_input_embeddings()
        ids = torch.cat([prompt.ids for prompt in prompts])
        text = embed(ids.clamp(min=0).to(embed.weight.device)).split([len(prompt.ids) for prompt in prompts])
        rows = []
        for row, (prompt, embeds) in enumerate(zip(prompts, text, strict=True)):
            targets = torch.full_like(prompt.ids, IGNORE_INDEX)
            if labels is not None:
                targets = labels[row].cpu()[prompt.places]
            features = [images[image].features for image in prompt.images]
            rows.append(splice_sample(prompt.ids, embeds, targets, features))
        batch = pad_batch(*(list(column) for column in zip(*rows, strict=True)), side=side)
        self.image_tokens = images
        return prompts, images, batch if labels is not None else replace(batch, labels=None)

    def _check(self, arguments: Mapping[str, object]) -> None:
        """Refuse what the model itself would take, but a reduced prompt cannot."""
        if arguments.get("input_ids") is None or arguments.get("inputs_embeds") is not None:
            raise InputError("token reduction reads input_ids with pixel_values; inputs_embeds hide where images are")
        cache = arguments.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise InputError("images come with an empty cache: give the whole dialogue, without past_key_values")
        for name in FIXED:
            value, own = arguments.get(name), getattr(self._model.config, name)
            if value is not None and value != own:
                raise InputError(f"{name}={value} is not what token reduction reads: set it in the config ({own})")

    def _make_tokens(
        self, crops: list[Tensor], sizes: list[tuple[int, int] | None], prompts: list[Prompt]
    ) -> list[ImageTokens]:
        """Encode, reduce and project images, I times `[C, 3, S, S]`."""
        reducer, projector = self._reducer, self._model.model.multi_modal_projector
        needs = frozenset() if reducer is None else reducer.needs
        encoded = self._tower.extract(torch.cat(crops), needs).split([len(image) for image in crops])
        if reducer is None:
            reduced = keep_everything(encoded)
        else:
            queries = self._find_queries(prompts) if TEXT in needs else [""] * len(prompts)
            texts = [query for query, prompt in zip(queries, prompts, strict=True) for _ in prompt.images]
            reduced = reduce_patches(reducer, self._tower, projector, encoded, texts)
        return project_tokens(reduced, projector, self._merge(), self._tower.grid, sizes if self._is_anyres else None)

    def _find_queries(self, prompts: list[Prompt]) -> list[str]:
        """What CLIP's text half reads, one query per prompt."""
        if self._texts is None:
            conv_mode = getattr(self._model.config, "conv_mode", None)
            return [recover_query(prompt.ids, self._tokenizer, conv_mode) for prompt in prompts]
        texts = self._texts
        if callable(texts):
            texts = [texts(decode_prompt(prompt.ids, self._tokenizer)) for prompt in prompts]
        return spread_texts(texts, len(prompts), "prompt")

    # -------------------------------------------------------------------------------------- images of several crops
    @property
    def _is_anyres(self) -> bool:
        return isinstance(self._model, LlavaNextForConditionalGeneration)

    def _merge(self) -> CropMerge:
        """How this model puts an image's crops together."""
        if not self._is_anyres:
            return CropMerge()
        model = self._model.model
        return CropMerge("spatial_unpad", self._canvases, self._tower.image_size, model.image_newline)

    @property
    def _canvases(self) -> list[tuple[int, int]]:
        """(width, height) of the canvases; transformers has (height, width)."""
        return [(width, height) for height, width in self._model.config.image_grid_pinpoints]

    def _image_sizes(self, arguments: Mapping[str, object]) -> list[tuple[int, int] | None]:
        """(width, height) of each image, or None of each where images have one crop."""
        if not self._is_anyres:
            return [None] * len(arguments["pixel_values"])
        sizes = arguments.get("image_sizes")
        if sizes is None:
            raise InputError("LLaVA-1.6 needs image_sizes, as its processor gives them")
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes  # with one wait for the device
        sizes = [(int(width), int(height)) for height, width in sizes]
        crops = arguments["pixel_values"]
        expected = len(sizes) if crops[0].dim() == 4 else sum(map(self._count_crops, sizes))
        if len(crops) != expected:
            raise InputError(f"pixel_values hold {len(crops)} images or crops, image_sizes ask for {expected}")
        return sizes

    def _tile_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of this (width, height)."""
        columns, rows = get_anyres_image_grid_shape(size, self._canvases, self._tower.image_size)
        return rows, columns

    def _count_whole(self, size: tuple[int, int] | None) -> int:
        """Count the tokens of an image without reduction, for each of which the processor writes a placeholder."""
        num_patches = self._tower.num_patches
        if size is None:
            return num_patches
        # A newline behind each row of the tiles.
        return num_patches + sum(len(row) + 1 for row in layout_tiles(self._tower.grid, self._tile_grid(size), size))

    def _count_crops(self, size: tuple[int, int]) -> int:
        """Count the crops of an image of this (width, height): the whole, and its tiles."""
        rows, columns = self._tile_grid(size)
        return 1 + rows * columns

    def _crops(self, pixel_values: Tensor, sizes: list[tuple[int, int] | None]) -> list[Tensor]:
        """Cut pixel values into images, `[C, 3, S, S]` each."""
        if not self._is_anyres:
            return list(pixel_values.split(1))
        counts = [self._count_crops(size) for size in sizes]
        if pixel_values[0].dim() == 3:
            return list(pixel_values.split(counts))
        # Images with fewer crops are padded with empty ones.
        return [image[:count] for image, count in zip(pixel_values, counts, strict=True)]
