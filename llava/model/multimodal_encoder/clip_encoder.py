"""The vision tower of LLaVA-1.5: a CLIP in Hugging Face layout."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.errors import InputError
from llava.gone import look_up
from llava.model.config_rules import PREPROCESSOR_FILE, check_preprocessor, read_settings, read_tower_config
from llava.model.hf_layout import rename
from llava.model.multimodal_encoder.clip_text import CLIPTextTower
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.stored_weights import first_line, iterate_tensors, list_weight_files
from llava.model.token_reduction import TEXT

__getattr__ = look_up(__name__)

# Stored weights that the vision half has no place for: the text half, the loss's scale, and counters of old versions.
OTHER_WEIGHTS = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$")
JOINT_WEIGHT = "visual_projection.weight"  # absent from vision-only checkpoints, and then not needed


class CLIPVisionTower(VisionTower):
    """CLIP's vision half and, for text-guided reducers, its text half; one copy of each weight.

    Layers that nothing reads are dropped after loading.
    """

    vision_tower: CLIPVisionModelWithProjection
    text_tower: CLIPTextTower
    has_joint_head = False
    # How the files name the vision half: what all of its names hold, what they become, and what is beside it.
    marker = vision_prefix = "vision_model."
    names: Mapping[str, str] = MappingProxyType({})
    ignored: tuple[str, ...] = OTHER_WEIGHTS
    role = "vision tower"

    def load_model(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """See `VisionTower.load_model`.

        Raises:
            InputError: when the tower isn't there or is incomplete.
        """
        if self.is_loaded:
            return
        self.load_vision_tower(device, dtype)
        if TEXT in self.needs:
            self.load_text_tower()

    def load_vision_tower(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self.num_layers_to_run(self.needs)  # settings that do not fit are refused before the weights are read
        image_processor = self.read_image_processor()
        vision, missing = load_quietly(
            CLIPVisionModelWithProjection,
            self.name,
            dtype=dtype,
            what=self.role,
            optional=(JOINT_WEIGHT,),
            ignored=self.ignored,
            config=self.config,
            names=self.names,
        )
        self.take_parts(vision, image_processor, has_joint_head=not missing)
        self.vision_tower.to(device)

    def read_image_processor(self) -> CLIPImageProcessorPil:
        """The PIL backend, which gives the pixels of LLaVA's preprocessing bit for bit; the default one does not."""
        values, file = read_settings(self.name, PREPROCESSOR_FILE, "vision tower")
        check_preprocessor(values, file, self.image_size)
        try:
            return CLIPImageProcessorPil.from_pretrained(self.name)
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"{file} can't be used: {first_line(error)}") from error

    def take_parts(
        self,
        vision: CLIPVisionModelWithProjection,
        image_processor: CLIPImageProcessorPil,
        text_tower: CLIPTextTower | None = None,
        *,
        has_joint_head: bool = True,
    ) -> None:
        """Become loaded with parts that are there already; the vision half loses the layers that nothing reads.

        Args:
            vision: the vision half, changed in place.
            image_processor: for its images.
            text_tower: the text half, or None.
            has_joint_head: whether the vision half's projection is real.
        """
        self.vision_tower = vision
        self.image_processor = image_processor
        self.has_joint_head = has_joint_head
        if text_tower is not None:
            self.text_tower = text_tower
        self.is_loaded = True
        del self.layers[self.num_layers_to_run(self.needs) :]
        self.freeze()

    def stored_weights(self) -> dict[str, Tensor]:
        """Read the vision half as its files hold it, all layers, under CLIP's names, on the CPU."""
        return {
            own: value
            for file in list_weight_files(self.name, containing=self.marker)
            for name, value in iterate_tensors(file, containing=self.marker)
            if (own := rename(name, self.names)).startswith(self.vision_prefix)
            and not own.endswith(".position_ids")  # a counter of old versions
        }

    def load_text_tower(self) -> None:
        if "text_tower" in self._modules:
            return
        if not self.has_joint_head:
            raise InputError(
                f"vision tower {self.name} has no {JOINT_WEIGHT}: text-guided token reduction needs a full CLIP"
            )
        self.text_tower = CLIPTextTower.load(self.name, device=self.device, dtype=self.dtype)
        self.freeze()

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def vision_model(self) -> nn.Module:
        """The encoder: embeddings, layers and final norm."""
        return self.vision_tower.vision_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))

    def run_layer(self, layer: CLIPEncoderLayer, hidden: Tensor) -> Tensor:
        return layer(hidden, None)

    def queries_and_keys(self, layer: CLIPEncoderLayer, hidden: Tensor, num_queries: int) -> tuple[Tensor, Tensor, int]:
        normed, attention = layer.layer_norm1(hidden), layer.self_attn
        return attention.q_proj(normed[:, :num_queries]), attention.k_proj(normed), attention.num_heads

    def joint_head(self) -> tuple[nn.LayerNorm, Tensor]:
        return self.vision_model.post_layernorm, self.vision_tower.visual_projection.weight

    def text_features(self, texts: list[str]) -> Tensor:
        return self.text_tower(texts)

    @property
    def config(self) -> CLIPVisionConfig:
        """The vision config, read from disk while the tower is not loaded."""
        return self.vision_tower.config if self.is_loaded else self._stored_config

    @cached_property
    def _stored_config(self) -> CLIPVisionConfig:
        read_tower_config(self.name)
        try:
            return CLIPVisionConfig.from_pretrained(self.name)
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"vision tower {self.name}: config.json can't be used: {first_line(error)}") from error

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size
