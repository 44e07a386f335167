"""What the code asks of the objects that other libraries bring: tokenizers and image processors.

Any object with these methods serves. `llava.model.llava_arch.LlavaMetaForCausalLM` says the same of models.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class Encoding(Protocol):
    """What a tokenizer returns: `input_ids`, one list per text, or one list for a single text."""

    input_ids: list
    offset_mapping: list[tuple[int, int]]


class Tokenizer(Protocol):
    """A language model's tokenizer, as in transformers' `PreTrainedTokenizerBase`."""

    name_or_path: str
    is_fast: bool
    bos_token_id: int | None

    def __call__(self, text: str | list[str], **options: object) -> Encoding:
        """Encode one text or several, special tokens included."""

    def decode(self, token_ids: "Sequence[int] | Tensor", **options: object) -> str:
        """Decode one sequence."""

    def batch_decode(self, sequences: "Sequence[Sequence[int]] | Tensor", **options: object) -> list[str]:
        """Decode several sequences."""

    def save_pretrained(self, save_directory: str, **options: object) -> object:
        """Write the tokenizer's files into a folder."""


class ImageProcessor(Protocol):
    """A CLIP image processor, as in transformers' `CLIPImageProcessorPil`."""

    image_mean: Sequence[float]
    size: Mapping[str, int]
    crop_size: Mapping[str, int]

    def preprocess(self, images: "Image.Image", **options: object) -> Mapping[str, list]:
        """Resize, crop and normalise one image: `pixel_values`, a list of one float32[3, S, S]."""


class ImageSettings(Protocol):
    """What decides how an image becomes a square: a model's config, or the settings of a training set."""

    image_aspect_ratio: str


class VisionArguments(Protocol):
    """The training flags that decide the vision parts of a model."""

    vision_tower: str
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    mm_projector_type: str
    mm_patch_merge_type: str
    mm_vision_token_reduce_func: str | None
    pretrain_mm_mlp_adapter: str | None
    mm_use_im_patch_token: bool
    mm_use_im_start_end: bool
