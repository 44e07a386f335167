"""A vision tower in Hugging Face's layout: what CLIP's and SigLIP's towers share."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.errors import InputError
from llava.model.config_rules import PREPROCESSOR_FILE, check_preprocessor, read_settings, read_tower_config
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.multimodal_encoder.text_reader import TextIds
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.stored_weights import first_line
from llava.model.token_reduction import TEXT
from llava.protocols import ImageProcessor


class HuggingFaceTower(VisionTower):
    """A model's vision half and, for text-guided reducers, its text half; one copy of each weight.

    Layers that nothing reads are dropped after loading.

    Attributes:
        vision_class, config_class: of the vision half, in transformers.
        head_weights: those of the map into the joint space, which may be missing where no text is read.
        full_model: what a checkpoint has to be for text to be read, for messages.
        names, ignored: how the files name the vision half, and what is beside it; as in `load_quietly`.
        role: for messages.
    """

    vision_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    head_weights: ClassVar[tuple[str, ...]]
    full_model: ClassVar[str]
    names: Mapping[str, str] = MappingProxyType({})
    ignored: tuple[str, ...]
    role = "vision tower"

    vision_tower: PreTrainedModel
    text_tower: nn.Module
    has_joint_head = False

    # What each model provides.
    @property
    @abstractmethod
    def vision_model(self) -> nn.Module:
        """The encoder: embeddings, layers and final norm."""

    @abstractmethod
    def read_text_half(self) -> nn.Module:
        """Load the text half: a module that embeds S strings as `[S, P]`."""

    @abstractmethod
    def make_processor(self) -> ImageProcessor:
        """Read the image processor, whose settings have been checked."""

    # What they share.
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
            self.vision_class,
            self.name,
            dtype=dtype,
            what=self.role,
            optional=self.head_weights,
            ignored=self.ignored,
            config=self.config,
            names=self.names,
        )
        has_head = {name for name, _ in vision.named_parameters()}.issuperset(self.head_weights)
        self.take_parts(vision, image_processor, has_joint_head=has_head and not missing)
        self.vision_tower.to(device)

    def read_image_processor(self) -> ImageProcessor:
        """The PIL backend, which gives the pixels of LLaVA's preprocessing bit for bit; the default one does not."""
        values, file = read_settings(self.name, PREPROCESSOR_FILE, "vision tower")
        check_preprocessor(values, file, self.image_size, is_siglip=not self.has_cls)
        try:
            return self.make_processor()
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"{file} can't be used: {first_line(error)}") from error

    def take_parts(
        self,
        vision: PreTrainedModel,
        image_processor: ImageProcessor,
        text_tower: nn.Module | None = None,
        *,
        has_joint_head: bool = True,
    ) -> None:
        """Become loaded with parts that are there already; the vision half loses the layers that nothing reads.

        Args:
            vision: the vision half, changed in place.
            image_processor: for its images.
            text_tower: the text half, or None.
            has_joint_head: whether the vision half's map into the joint space is real.
        """
        self.vision_tower = vision
        self.image_processor = image_processor
        self.has_joint_head = has_joint_head
        if text_tower is not None:
            self.text_tower = text_tower
        self.is_loaded = True
        del self.layers[self.num_layers_to_run(self.needs) :]
        self.freeze()

    def load_text_tower(self) -> None:
        if "text_tower" in self._modules:
            return
        if not self.has_joint_head:
            raise InputError(
                f"vision tower {self.name} has no fitting {self.head_weights[0]}: "
                f"text-guided token reduction needs a full {self.full_model}"
            )
        self.text_tower = self.read_text_half()
        self.freeze()

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def run_layer(self, layer: GradientCheckpointingLayer, hidden: Tensor) -> Tensor:
        return layer(hidden, None)

    def queries_and_keys(
        self, layer: GradientCheckpointingLayer, hidden: Tensor, num_queries: int
    ) -> tuple[Tensor, Tensor, int]:
        normed, attention = layer.layer_norm1(hidden), layer.self_attn
        return attention.q_proj(normed[:, :num_queries]), attention.k_proj(normed), attention.num_heads

    def text_features(self, texts: list[str | TextIds]) -> Tensor:
        return self.text_tower(texts)

    @property
    def config(self) -> PreTrainedConfig:
        """The vision config, read from disk while the tower is not loaded."""
        return self.vision_tower.config if self.is_loaded else self._stored_config

    @cached_property
    def _stored_config(self) -> PreTrainedConfig:
        read_tower_config(self.name, is_siglip=not self.has_cls)
        try:
            return self.config_class.from_pretrained(self.name)
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"vision tower {self.name}: config.json can't be used: {first_line(error)}") from error

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size
