"""A vision tower from open_clip, with the interface and the numbers of the Hugging Face one.

Same weights in either layout give the same patches, joint space and text embedding up to float32 rounding. Token ids
of texts agree too, except that open_clip repairs broken Unicode and HTML entities first.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from llava.errors import InputError
from llava.model.multimodal_encoder.open_clip_source import OpenClipSource, parse_source
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.token_reduction import TEXT

INTERPOLATIONS = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR, "nearest": Resampling.NEAREST}


class OpenClipTextTower(nn.Module):
    """The text half of an open_clip model and its tokenizer."""

    def __init__(self, model: CLIP, source: OpenClipSource):
        """Take over a model; its vision half leaves it.

        Args:
            model: whole model, changed in place.
            source: where it came from, and its tokenizer with it.

        Raises:
            InputError: when there is no tokenizer that fits.
        """
        super().__init__()
        self.tokenizer = source.load_tokenizer(model.vocab_size)
        model.visual = None
        self.model = model

    def forward(self, texts: list[str]) -> Tensor:
        """Embed texts: S strings to `[S, P]`, in the tower's dtype, not normalised; cut at the context length."""
        return self.model.encode_text(self.tokenizer(texts).to(self.model.positional_embedding.device))


class OpenClipVisionTower(VisionTower):
    """The vision half of an open_clip model and, for text-guided reducers, its text half.

    Layers that nothing reads, and the text half where nothing needs it, are dropped after loading; they are read again
    should they be asked for later.
    """

    vision_tower: VisionTransformer
    text_tower: OpenClipTextTower

    def __init__(self, spec: str, *, folder: str | Path | None = None, **settings: object):
        """Find the model; no weights are read yet.

        Args:
            spec: what follows `open_clip:`, see `llava.model.multimodal_encoder.open_clip_source`.
            folder: the checkpoint folder, against which relative paths are tried as well.
            **settings: as in `VisionTower`.

        Raises:
            InputError: for a spec that leads to no model this tower can run.
        """
        super().__init__(f"open_clip:{spec}", **settings)
        self.source = parse_source(spec, folder)

    def load_model(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """See `VisionTower.load_model`.

        Raises:
            InputError: when weights, tokenizer or config are missing or do not fit.
        """
        if self.is_loaded:
            return
        self._load(device, dtype, with_text=TEXT in self.needs)

    def load_vision_tower(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self._load(device, dtype, with_text=False)

    def _load(self, device: torch.device | str | None, dtype: torch.dtype, *, with_text: bool) -> None:
        # Settings that do not fit are refused before the weights are read.
        num_layers, self.image_processor = self.num_layers_to_run(self.needs), self.read_image_processor()
        model = self.source.load()
        visual = model.visual
        text_tower = OpenClipTextTower(model, self.source) if with_text else None
        del visual.transformer.resblocks[num_layers:]
        self.vision_tower = visual.to(device=device, dtype=dtype)
        self.is_loaded = True
        if text_tower is not None:
            self.text_tower = text_tower.to(device=device, dtype=dtype)
        self.freeze()

    def read_image_processor(self) -> CLIPImageProcessorPil:
        return build_image_processor(self.source)

    def load_text_tower(self) -> None:
        if "text_tower" in self._modules:
            return
        self.text_tower = OpenClipTextTower(self.source.load(), self.source).to(device=self.device, dtype=self.dtype)
        self.freeze()

    @property
    def num_layers(self) -> int:
        return self.source.vision_config.layers

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_tower.transformer.resblocks

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.vision_tower._embeds(pixels)

    def run_layer(self, layer: ResidualAttentionBlock, hidden: Tensor) -> Tensor:
        return layer(hidden)

    def queries_and_keys(
        self, layer: ResidualAttentionBlock, hidden: Tensor, num_queries: int
    ) -> tuple[Tensor, Tensor, int]:
        """See `VisionTower.queries_and_keys`.

        Raises:
            InputError: for open_clip's own attention variants (normalised queries, cosine attention, ...).
        """
        attention = layer.attn
        if not isinstance(attention, nn.MultiheadAttention):
            raise InputError(f"vision tower {self.name}: its {type(attention).__name__} is not plain attention")
        normed = layer.ln_1(hidden)
        query_weight, key_weight, _ = attention.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.chunk(3)
        queries = F.linear(normed[:, :num_queries], query_weight, query_bias)
        return queries, F.linear(normed, key_weight, key_bias), attention.num_heads

    def joint_head(self) -> tuple[nn.LayerNorm, Tensor]:
        return self.vision_tower.ln_post, self.vision_tower.proj.T

    def text_features(self, texts: list[str]) -> Tensor:
        return self.text_tower(texts)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.source.vision_config.patch_size
        return side, side

    @property
    def hidden_size(self) -> int:
        return self.source.vision_config.width

    @property
    def image_size(self) -> int:
        return self.source.vision_config.image_size


def build_image_processor(source: OpenClipSource) -> CLIPImageProcessorPil:
    """Build the processor that LLaVA's `process_images` expects, with open_clip's colours and interpolation.

    How an image becomes a square is up to LLaVA (`image_aspect_ratio`); open_clip's `resize_mode` is not used.

    Args:
        source: the model.

    Returns:
        The processor: shortest side to S, center crop S x S, normalised.

    Raises:
        InputError: for an interpolation that isn't one of Pillow's.
    """
    config, side = source.preprocessing, source.vision_config.image_size
    interpolation = config.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise InputError(
            f"vision tower {source.name}: interpolation {interpolation} is unknown, use {', '.join(INTERPOLATIONS)}"
        )
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=INTERPOLATIONS[interpolation],
        image_mean=list(config.get("mean") or OPENAI_DATASET_MEAN),
        image_std=list(config.get("std") or OPENAI_DATASET_STD),
    )
