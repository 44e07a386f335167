"""The vision tower of LLaVA-1.5: a CLIP in Hugging Face layout."""

from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from llava.gone import look_up
from llava.model.hf_layout import rename
from llava.model.multimodal_encoder.clip_text import CLIPTextTower, read_reader
from llava.model.multimodal_encoder.hugging_face import HuggingFaceTower
from llava.model.multimodal_encoder.text_reader import TextReader
from llava.model.multimodal_encoder.tower import JointMap
from llava.model.stored_weights import iterate_tensors, list_weight_files

__getattr__ = look_up(__name__)

# Stored weights that the vision half has no place for: the text half, the loss's scale, and counters of old versions.
OTHER_WEIGHTS = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$")
JOINT_WEIGHT = "visual_projection.weight"  # absent from vision-only checkpoints, and then not needed


class CLIPVisionTower(HuggingFaceTower):
    """CLIP's vision half and, for text-guided reducers, its text half."""

    vision_class = CLIPVisionModelWithProjection
    config_class = CLIPVisionConfig
    head_weights = (JOINT_WEIGHT,)
    full_model = "CLIP"
    ignored: tuple[str, ...] = OTHER_WEIGHTS
    # What all stored names of the vision half hold, and how they begin in the model.
    marker = vision_prefix = "vision_model."

    vision_tower: CLIPVisionModelWithProjection
    text_tower: CLIPTextTower

    def make_processor(self) -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil.from_pretrained(self.name)

    def stored_weights(self) -> dict[str, Tensor]:
        """Read the vision half as its files hold it, all layers, under CLIP's names, on the CPU."""
        return {
            own: value
            for file in list_weight_files(self.name, containing=self.marker)
            for name, value in iterate_tensors(file, containing=self.marker)
            if (own := rename(name, self.names)).startswith(self.vision_prefix)
            and not own.endswith(".position_ids")  # a counter of old versions
        }

    def read_text_half(self) -> CLIPTextTower:
        return CLIPTextTower.load(self.name, device=self.device, dtype=self.dtype)

    def read_text_reader(self) -> TextReader:
        return read_reader(self.name)

    @property
    def vision_model(self) -> nn.Module:
        return self.vision_tower.vision_model

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))

    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        weight = self.vision_tower.visual_projection.weight
        return self.vision_model.post_layernorm, lambda normed: normed @ weight.float().T
