"""The vision tower of a transformers LLaVA seen as one of ours, and the text half that belongs to it.

A llava-hf folder holds CLIP's vision half without its projection into the joint space and without its text half. Both
come from another CLIP, of which the tower must be the vision half.
"""

from torch import Tensor, nn
from transformers import CLIPVisionModel

from llava.errors import InputError
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.origin import check_origin
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader
from llava.model.multimodal_encoder.tower import JointMap, VisionTower
from llava.model.token_reduction import TEXT


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
        check_origin(self, other, f"clip={clip}")
        del other.layers[:]
        self.text_half = other

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
