"""The vision tower of a transformers LLaVA seen as one of ours, and the text half that belongs to it.

A llava-hf folder holds CLIP's vision half without its projection into the joint space and without its text half. Both
come from another CLIP, of which the tower must be the vision half.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llava.errors import InputError
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader
from llava.model.multimodal_encoder.tower import JointMap, VisionTower
from llava.model.token_reduction import TEXT

SAME_FEATURES = 0.1
"""Difference of two towers' patch features, as a share of what varies between patches, up to which they are one tower:
rounding to 16 bits stays below, other weights do not."""


class HostTower(CLIPVisionTower):
    """A model's own CLIP vision tower, where it is: not copied, moved, frozen or cut.

    Attributes:
        text_half: the CLIP whose joint space is scored in, without its vision layers; None where no method reads text.
    """

    text_half: VisionTower | None

    def __init__(self, vision: CLIPVisionModel, select_layer: int, name: str):
        """Take the tower of a loaded model.

        Args:
            vision: the tower.
            select_layer: the config's `vision_feature_layer`.
            name: of the model, for messages.

        Raises:
            InputError: there is no such layer.
        """
        super().__init__(name, select_layer=select_layer)
        self.vision_tower = vision
        self.is_loaded = True
        self.text_half = None
        self.number_of_selected_layer()

    @property
    def vision_model(self) -> nn.Module:
        return self.vision_tower

    def take_text_half(self, clip: str) -> None:
        """Read the text half, in float32.

        Args:
            clip: folder or hub id of a full CLIP, or `open_clip:<model>`.

        Raises:
            InputError: it can't be loaded, holds no text half, or this tower is not its vision half.
        """
        other = build_named_tower(clip, select_layer=self.select_layer, needs={TEXT})
        other.load_model(device=self.device)
        read = [(tower.image_size, tower.grid, tower.hidden_size, tower.num_layers) for tower in (self, other)]
        if read[0] != read[1]:
            sizes = ["{} pixels, {} patches, width {}, {} layers".format(*each) for each in read]
            raise InputError(f"clip={clip} is another tower ({sizes[1]}) than that of {self.name} ({sizes[0]})")
        difference = self.differs_from(other)
        if not difference <= SAME_FEATURES:
            raise InputError(
                f"clip={clip} is not the CLIP that the vision tower of {self.name} comes from: their patch features "
                f"differ by {difference:.0%} on a probe image; name that CLIP, or use a method that reads no text"
            )
        del other.layers[:]
        self.text_half = other

    def differs_from(self, other: VisionTower) -> float:
        """Compare two towers' patches of one image of noise: their difference, over what varies between patches."""
        side = self.image_size
        probe = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        own, others = (tower.extract(probe).patches.float() for tower in (self, other))  # [1, N, D]
        varying = own - own.mean(dim=1, keepdim=True)
        return float((own - others).norm() / varying.norm())

    def load_text_tower(self) -> None:
        """Have the text half at hand, on the device that the model is on by now."""
        if self.text_half is None:
            raise InputError(f"{self.name} holds no text half of a CLIP: give clip= to reduce_tokens")
        self.text_half.to(self.device)

    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        self.load_text_tower()
        return self.text_half.joint_head()

    def read_text_reader(self) -> TextReader:
        self.load_text_tower()
        return self.text_half.text_reader

    def text_features(self, texts: list[str | TextIds]) -> Tensor:
        return self.text_half.text_features(texts)
