"""What the code asks of the objects it is handed: tokenizers, image processors, vision-language models.

Any object with these methods serves.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
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
    all_special_tokens: list[str]
    eos_token_id: int | None

    def __call__(self, text: str | list[str], **options: object) -> Encoding:
        """Encode one text or several, special tokens included."""

    def decode(self, token_ids: "Sequence[int] | Tensor", **options: object) -> str:
        """Decode one sequence."""

    def batch_decode(self, sequences: "Sequence[Sequence[int]] | Tensor", **options: object) -> list[str]:
        """Decode several sequences."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the tokens that stand apart from the vocabulary, special ones among them, with their ids."""

    def save_pretrained(self, save_directory: str, **options: object) -> object:
        """Write the tokenizer's files into a folder."""


class ImageProcessor(Protocol):
    """A CLIP image processor, as in transformers' `CLIPImageProcessorPil`."""

    image_mean: Sequence[float]
    size: Mapping[str, int]
    crop_size: Mapping[str, int]
    resample: int

    def preprocess(self, images: "Image.Image", **options: object) -> Mapping[str, list]:
        """Resize, crop and normalise one image: `pixel_values`, a list of one float32[3, S, S]."""


class ImageSettings(Protocol):
    """What decides how an image becomes a square: a model's config, or the settings of a training set."""

    image_aspect_ratio: str


class ImageTokens(Protocol):
    """What one image becomes for one question, as in `llava.model.image_tokens.ImageTokens`."""

    num_patches: int

    @property
    def num_tokens(self) -> int:
        """What the language model reads for this image."""

    @property
    def num_positions(self) -> int:
        """The positions that it takes in the prompt."""


class PatchedTower(Protocol):
    """A vision tower, as far as the evaluation looks at it."""

    num_patches: int


class ModelConfig(ImageSettings, Protocol):
    """The entries of a LLaVA checkpoint's config.json that decide on prompts and batch sizes."""

    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    mm_hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int


class VisionLanguageModel(Protocol):
    """A model that answers questions about images, as in `llava.model.llava_arch.LlavaMetaForCausalLM`.

    What `encode_patches` returns is handed back to `make_image_tokens` and not looked at in between.
    """

    config: ModelConfig
    device: "torch.device"
    dtype: "torch.dtype"

    def get_vision_tower(self) -> PatchedTower:
        """Return the vision tower."""

    def encode_patches(
        self, images: "Tensor | list[Tensor]", needs: "Collection[object] | None" = None
    ) -> list[object]:
        """Run the vision tower: one record per image, which depends on the image alone.

        `needs` is what to take of the tower besides the patches; None: what the token reduction needs.
        """

    def embed_queries(self, texts: list[str]) -> "Tensor | None":
        """Run the text tower: float32[I, P], or None where the token reduction reads no text."""

    def make_image_tokens(
        self,
        images: list[object],
        texts: list[str],
        image_sizes: list[tuple[int, int]] | None = None,
        *,
        text_embeds: "Tensor | None" = None,
    ) -> list[ImageTokens]:
        """Choose and project the tokens of images, each for its query."""

    def generate(self, inputs: "Tensor", **options: object) -> "Tensor":
        """Answer prompts: int64[S, new tokens]."""


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
