"""The vision tower of a checkpoint that holds one: LLaVA-1.6, which trains it, and every llava-hf folder."""

from functools import cached_property
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig

from llava.errors import InputError
from llava.files import write_json
from llava.model.config_rules import PREPROCESSOR_FILE, PREPROCESSOR_RULES, check_preprocessor
from llava.model.hf_layout import NAMES, read_preprocessor, rename
from llava.model.multimodal_encoder.clip_encoder import JOINT_WEIGHT, CLIPVisionTower
from llava.model.multimodal_encoder.clip_text import read_reader
from llava.model.multimodal_encoder.loading import resolve_name
from llava.model.multimodal_encoder.origin import check_origin
from llava.model.multimodal_encoder.text_reader import TextReader
from llava.model.stored_weights import first_line, list_weight_files, read_shapes, refuse_shape

# From the names of either layout to those of a CLIP's vision half; one after the other.
VISION_NAMES = NAMES | {
    r"^model\.vision_tower\.vision_tower\.(?=visual_projection\.)": "",
    r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_model.",
}
MARKER = "vision_tower."  # in all of its stored names
OTHER_WEIGHTS = (r"^(?!vision_model\.|visual_projection\.)", r"\.position_ids$")


class StoredVisionTower(CLIPVisionTower):
    """The vision half out of a checkpoint's own weights; the text half is that of the CLIP which it comes from.

    The CLIP is not looked for before something is needed of it: its text half, with the projection into the joint
    space, and for checkpoints without `vision_config` the settings.

    Attributes:
        clip: folder or hub id of the CLIP, as in `mm_vision_tower`.
        vision_config: the vision half's settings, or None where the CLIP has them.
    """

    marker = MARKER
    names = VISION_NAMES
    ignored = OTHER_WEIGHTS
    role = "vision tower of checkpoint"

    def __init__(self, place: str, clip: str, vision_config: dict | None = None, **settings):
        """Store where the halves are; the other settings are those of `VisionTower`."""
        super().__init__(place, **settings)
        self.clip = clip
        self.vision_config = vision_config

    def load_vision_tower(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        projection = self.vision_tower.visual_projection if self.has_joint_head else None  # of the CLIP, read before
        super().load_vision_tower(device, dtype)
        if projection is not None and not self.has_joint_head:
            self.vision_tower.visual_projection = projection.to(device)
            self.has_joint_head = True

    def load_text_tower(self) -> None:
        if "text_tower" in self._modules:
            return
        try:
            clip = CLIPVisionTower(
                resolve_name(self.clip, self.name), select_layer=self.select_layer, select_feature=self.select_feature
            )
            clip.load_model(device=self.device, dtype=self.dtype)
            clip.load_text_tower()
        except InputError as error:
            raise InputError(
                f"text-guided token reduction reads the text half of a CLIP, which {self.name} does not hold: set "
                f"mm_vision_tower in its config.json to the CLIP that its vision tower comes from ({error})"
            ) from error
        check_origin(self, clip, f"mm_vision_tower {self.clip}")
        self._take_projection(clip)
        self.text_tower = clip.text_tower
        self.freeze()

    def read_text_reader(self) -> TextReader:
        return read_reader(resolve_name(self.clip, self.name))

    def _take_projection(self, clip: CLIPVisionTower) -> None:
        own, other = (tower.vision_tower.visual_projection for tower in (self, clip))
        if not self.has_joint_head:
            self.vision_tower.visual_projection, self.has_joint_head = other, True
        elif own.weight.shape != other.weight.shape:
            refuse_shape(JOINT_WEIGHT, own.weight.shape, other.weight.shape, f"checkpoint {self.name}", "its CLIP")

    def read_image_processor(self) -> CLIPImageProcessorPil:
        if self.vision_config is None:
            return CLIPVisionTower(resolve_name(self.clip, self.name)).read_image_processor()
        values, file = read_preprocessor(self.name)
        check_preprocessor(values, file, self.image_size)
        try:
            return CLIPImageProcessorPil(**_choose_settings(values))
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"{file} can't be used: {first_line(error)}") from error

    def save_image_processor(self, folder: Path) -> None:
        """Write the preprocessor_config.json of a checkpoint in LLaVA's layout that has `vision_config`."""
        if self.vision_config is not None:
            settings = _choose_settings(read_preprocessor(self.name)[0])
            write_json(folder / PREPROCESSOR_FILE, {"image_processor_type": "CLIPImageProcessor", **settings}, indent=2)

    @cached_property
    def _stored_config(self) -> CLIPVisionConfig:
        if self.vision_config is None:
            return CLIPVisionTower(resolve_name(self.clip, self.name)).config
        try:
            return CLIPVisionConfig.from_dict(self.vision_config)
        except Exception as error:  # transformers' own checks, of many kinds
            raise InputError(f"{self.name}/config.json: vision_config can't be used: {first_line(error)}") from error


def _choose_settings(values: dict) -> dict:
    """Leave out of an image processor's settings what is not CLIP's: padding, crops, class names."""
    return {key: values[key] for key in PREPROCESSOR_RULES if key in values}


def holds_tower(place: str) -> bool:
    """Return whether a checkpoint's weight files hold the vision half of a tower."""
    try:
        files = list_weight_files(place, containing=MARKER)
    except InputError:  # a part of a checkpoint, or nothing: who reads its weights says so
        return False
    return any(rename(name, VISION_NAMES).startswith("vision_model.") for file in files for name in read_shapes(file))
