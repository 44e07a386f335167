"""A SigLIP in Hugging Face layout as vision tower: SigLIP, and SigLIP 2 of one resolution, which has the same classes.

No CLS row: all rows are patches, and hidden state `select_layer` is taken as in transformers, before the final norm: -1
the last layer, -2 the one before, which is what LLaVA-NeXT's later models read (they drop the last layer).
"""

from types import MappingProxyType

from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava.model.multimodal_encoder.hugging_face import HuggingFaceTower
from llava.model.multimodal_encoder.siglip_pooling import PatchPooling
from llava.model.multimodal_encoder.siglip_text import SiglipTextTower, read_reader
from llava.model.multimodal_encoder.text_reader import TextReader
from llava.model.multimodal_encoder.tower import JointMap

# Stored weights that the vision half has no place for: the text half, the loss's scale and bias, a counter.
OTHER_WEIGHTS = (r"^text_model\.", r"^logit_(scale|bias)$", r"\.position_ids$")
HEAD_WEIGHTS = (
    "head.probe",
    *(f"head.attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"head.{part}.{kind}" for part in ("layernorm", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
)


class SiglipVisionTower(HuggingFaceTower):
    """SigLIP's vision half and, for text-guided reducers, its text half."""

    has_cls = False
    vision_class = SiglipVisionModel
    config_class = SiglipVisionConfig
    head_weights = HEAD_WEIGHTS
    full_model = "SigLIP"
    names = MappingProxyType({r"^vision_model\.": ""})
    ignored = OTHER_WEIGHTS
    role = "SigLIP vision tower"

    vision_tower: SiglipVisionModel
    text_tower: SiglipTextTower

    def make_processor(self) -> SiglipImageProcessorPil:
        """SigLIP scales to the square at once and crops nothing; `crop_size` is what clients of LLaVA ask for."""
        square = {"height": self.image_size, "width": self.image_size}
        return SiglipImageProcessorPil.from_pretrained(self.name, do_center_crop=False, crop_size=square)

    def read_text_half(self) -> SiglipTextTower:
        return SiglipTextTower.load(self.name, device=self.device, dtype=self.dtype)

    def read_text_reader(self) -> TextReader:
        return read_reader(self.name)

    @property
    def vision_model(self) -> nn.Module:
        return self.vision_tower

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.vision_model.embeddings(pixels)

    def joint_head(self) -> tuple[nn.LayerNorm, JointMap]:
        """See `llava.model.multimodal_encoder.siglip_pooling`."""
        head = self.vision_model.head
        attention, mlp = head.attention, head.mlp
        pooling = PatchPooling(
            value=(attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]),
            output=(attention.out_proj.weight, attention.out_proj.bias),
            norm=head.layernorm,
            inner=(mlp.fc1.weight, mlp.fc1.bias),
            activation=mlp.activation_fn,
            outer=(mlp.fc2.weight, mlp.fc2.bias),
        )
        return self.vision_model.post_layernorm, pooling
