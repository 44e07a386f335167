"""A vision tower from open_clip, with the interface and the numbers of the Hugging Face one.

Same weights in either layout give the same patches, joint space and text embedding up to float32 rounding. Token ids
of texts agree too, except that open_clip repairs broken Unicode and HTML entities first.
"""

from pathlib import Path

import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from llava.errors import InputError
from llava.model.multimodal_encoder.open_clip_source import OpenClipSource, parse_source
from llava.model.multimodal_encoder.tower import VisionTower

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

    Layers behind the selected one, and the text half where nothing needs it, are dropped after loading; the text half
    is read again should it be asked for later.
    """

    vision_tower: VisionTransformer
    text_tower: OpenClipTextTower

    def __init__(self, spec: str, *, folder: str | Path | None = None, **settings: object):
        """Find the model; no weights are read yet.

        Args:
            spec: what stands behind `open_clip:`, see `llava.model.multimodal_encoder.open_clip_source`.
            folder: the checkpoint folder, against which relative paths are tried as well.
            **settings: as in `VisionTower`.

        Raises:
            InputError: for a spec that leads to no model this tower can run.
        """
        super().__init__(f"open_clip:{spec}", **settings)
        self.source = parse_source(spec, folder)

    def load_model(self, device: object = None, dtype: torch.dtype = torch.float32) -> None:
        """See `VisionTower.load_model`.

        Raises:
            InputError: when weights, tokenizer or config are missing or do not fit.
        """
        if self.is_loaded:
            return
        num_layers = self.num_layers_to_run(self.source.vision_config.layers)
        self.image_processor = build_image_processor(self.source)
        model = self.source.load()
        visual = model.visual
        text_tower = OpenClipTextTower(model, self.source) if self.needs_text else None
        del visual.transformer.resblocks[num_layers:]
        self.vision_tower = visual.to(device=device, dtype=dtype)
        self.is_loaded = True
        if text_tower is not None:
            self.text_tower = text_tower.to(device=device, dtype=dtype)
        self.freeze()

    def load_text_tower(self) -> None:
        """See `VisionTower.load_text_tower`."""
        if "text_tower" in self._modules:
            return
        self.text_tower = OpenClipTextTower(self.source.load(), self.source).to(device=self.device, dtype=self.dtype)
        self.freeze()

    def hidden_state(self, pixels: Tensor) -> Tensor:
        """See `VisionTower.hidden_state`."""
        # open_clip's public ways to a hidden state need at least one layer; layer 0 is the embeddings.
        return self.vision_tower.transformer(self.vision_tower._embeds(pixels))

    def joint_head(self) -> tuple[nn.LayerNorm, Tensor]:
        """See `VisionTower.joint_head`."""
        return self.vision_tower.ln_post, self.vision_tower.proj.T

    def text_features(self, texts: list[str]) -> Tensor:
        """See `VisionTower.text_features`."""
        return self.text_tower(texts)

    @property
    def grid(self) -> tuple[int, int]:
        """See `VisionTower.grid`."""
        side = self.image_size // self.source.vision_config.patch_size
        return side, side

    @property
    def hidden_size(self) -> int:
        """See `VisionTower.hidden_size`."""
        return self.source.vision_config.width

    @property
    def image_size(self) -> int:
        """See `VisionTower.image_size`."""
        return self.source.vision_config.image_size


def build_image_processor(source: OpenClipSource) -> CLIPImageProcessorPil:
    """Build the processor that LLaVA's `process_images` expects, with open_clip's colours and interpolation.

    How a picture becomes a square is LLaVA's business (`image_aspect_ratio`); open_clip's `resize_mode` is not used.

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
