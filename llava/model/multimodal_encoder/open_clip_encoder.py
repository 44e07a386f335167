"""A CLIP from open_clip as vision tower, with the interface and the numbers of the Hugging Face one.

Same weights in either layout give the same patches, joint space and text embedding up to float32 rounding. Token ids
of texts agree too, except that open_clip repairs broken Unicode and HTML entities first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CustomTextCLIP
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from PIL.Image import Resampling
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.errors import InputError
from llava.model.multimodal_encoder.open_clip_source import OpenClipSource, parse_source
from llava.model.multimodal_encoder.siglip_pooling import PatchPooling
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader, count_tokens, read_texts
from llava.model.multimodal_encoder.tower import JointMap, VisionTower
from llava.model.token_reduction import TEXT

INTERPOLATIONS = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR, "nearest": Resampling.NEAREST}


@dataclass(frozen=True)
class OpenClipTextReader(TextReader):
    """open_clip's tokenizer: every text is padded to the context length."""

    tokenizer: Callable[[str], Tensor]

    @property
    def context(self) -> int:
        return self.tokenizer.context_length

    def __call__(self, text: str) -> TextIds:
        return TextIds(tuple(self.tokenizer(text)[0].tolist()))

    def count(self, texts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "tokenizer"):  # open_clip's wrapper of a Hugging Face tokenizer
            return count_tokens(self.tokenizer.tokenizer, [self.tokenizer.clean_fn(text) for text in texts])
        return [len(self.tokenizer.encode(text)) + len(("start", "end")) for text in texts]


class OpenClipTextTower(nn.Module):
    """The text half of an open_clip model and its tokenizer."""

    def __init__(self, model: CLIP | CustomTextCLIP, source: OpenClipSource):
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

    @property
    def reader(self) -> OpenClipTextReader:
        return OpenClipTextReader(self.tokenizer)

    def forward(self, texts: list[str | TextIds]) -> Tensor:
        """Embed texts: S of them to `[S, P]`, in the tower's dtype, not normalised; cut at the context length."""
        ids = torch.stack(read_texts(texts, self.reader))  # [S, T]
        return self.model.encode_text(ids.to(next(self.model.parameters()).device, non_blocking=True))


class OpenClipVisionTower(VisionTower):
    """The vision half of an open_clip model and, for text-guided reducers, its text half.

    Layers that nothing reads, and the text half where nothing needs it, are dropped after loading; they are read again
    should they be asked for later.
    """

    vision_tower: VisionTransformer
    text_tower: OpenClipTextTower

    def __init__(self, source: OpenClipSource, **settings: object):
        """Store where the model is; no weights are read yet.

        Args:
            source: see `llava.model.multimodal_encoder.open_clip_source`.
            **settings: as in `VisionTower`.

        Raises:
            InputError: for settings that do not fit.
        """
        super().__init__(source.name, **settings)
        self.source = source

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
        self.vision_tower = visual.to(device=device, dtype=dtype)
        del self.layers[num_layers:]
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

    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        projection = self.vision_tower.proj
        return self.vision_tower.ln_post, lambda normed: normed @ projection.float()

    def text_features(self, texts: list[str | TextIds]) -> Tensor:
        return self.text_tower(texts)

    def read_text_reader(self) -> TextReader:
        return OpenClipTextReader(self.source.load_tokenizer(self.source.vocab_size))

    @property
    def patch_size(self) -> int:
        return self.source.vision_config.patch_size

    @property
    def hidden_size(self) -> int:
        return self.source.vision_config.width

    @property
    def image_size(self) -> int:
        return self.source.vision_config.image_size


class OpenClipSiglipTower(OpenClipVisionTower):
    """The same of an open_clip SigLIP, whose image half is timm's: see `SiglipVisionTower` for what is different."""

    has_cls = False
    vision_tower: TimmModel

    def read_image_processor(self) -> SiglipImageProcessorPil:
        return build_siglip_processor(self.source)

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_tower.trunk.blocks

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        trunk = self.vision_tower.trunk
        return trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels)))

    def queries_and_keys(self, layer: Block, hidden: Tensor, num_queries: int) -> tuple[Tensor, Tensor, int]:
        attention, normed = layer.attn, layer.norm1(hidden)
        query_weight, key_weight, _ = attention.qkv.weight.chunk(3)
        query_bias, key_bias, _ = attention.qkv.bias.chunk(3)
        queries = F.linear(normed[:, :num_queries], query_weight, query_bias)
        return queries, F.linear(normed, key_weight, key_bias), attention.num_heads

    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        """See `llava.model.multimodal_encoder.siglip_pooling`."""
        trunk = self.vision_tower.trunk
        head = trunk.attn_pool
        pooling = PatchPooling(
            value=(head.kv.weight.chunk(2)[1], head.kv.bias.chunk(2)[1]),
            output=(head.proj.weight, head.proj.bias),
            norm=head.norm,
            inner=(head.mlp.fc1.weight, head.mlp.fc1.bias),
            activation=head.mlp.act,
            outer=(head.mlp.fc2.weight, head.mlp.fc2.bias),
        )
        return trunk.norm, pooling


def build_open_clip_tower(spec: str, *, folder: str | Path | None = None, **settings: object) -> OpenClipVisionTower:
    """Build a tower of open_clip, a CLIP's or a SigLIP's, without its weights.

    Args:
        spec: what follows `open_clip:`, see `llava.model.multimodal_encoder.open_clip_source`.
        folder: the checkpoint folder, against which relative paths are tried as well.
        **settings: as in `VisionTower`.

    Raises:
        InputError: for a spec that leads to no model these towers can run, or settings that do not fit it.
    """
    source = parse_source(spec, folder)
    return (OpenClipSiglipTower if source.is_siglip else OpenClipVisionTower)(source, **settings)


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
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=find_resampling(source),
        image_mean=list(config.get("mean") or OPENAI_DATASET_MEAN),
        image_std=list(config.get("std") or OPENAI_DATASET_STD),
    )


def build_siglip_processor(source: OpenClipSource) -> SiglipImageProcessorPil:
    """Build a SigLIP's, as `build_image_processor` does: scaled to S x S, not cropped, normalised.

    Raises:
        InputError: for an interpolation that isn't one of Pillow's.
    """
    config, side = source.preprocessing, source.vision_config.image_size
    square = {"height": side, "width": side}
    return SiglipImageProcessorPil(
        size=square,
        do_center_crop=False,
        crop_size=square,
        resample=find_resampling(source),
        image_mean=list(config.get("mean") or INCEPTION_MEAN),
        image_std=list(config.get("std") or INCEPTION_STD),
    )


def find_resampling(source: OpenClipSource) -> Resampling:
    """Return Pillow's filter of the name that open_clip's config has.

    Raises:
        InputError: there is none.
    """
    interpolation = source.preprocessing.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        raise InputError(
            f"vision tower {source.name}: interpolation {interpolation} is unknown, use {', '.join(INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[interpolation]
