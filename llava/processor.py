"""What transformers calls a processor: prompts and images of any kind to what `generate` takes.

`AutoProcessor` makes it. Importing this module registers it, and the models.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig

from llava.cli import guess_template
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.generation import pad_left
from llava.mm_utils import process_images, tokenize_prompts
from llava.model.builder import read_config
from llava.model.language_model.families import FAMILIES
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.tokenizer import load_tokenizer
from llava.picture import to_pictures
from llava.prompt import find_template, place_images
from llava.protocols import ImageProcessor, Tokenizer

CONFIGS = {family.config.model_type: family.config for family in FAMILIES.values()}
"""The config classes that transformers' table holds gates for, by model type."""


class LlavaProcessor:
    """Tokenizer and image processor of a checkpoint, and its conversation template.

    Attributes:
        tokenizer: of the language model.
        image_processor: of the vision tower.
        conv_mode: name of the conversation template that `apply_chat_template` writes.
    """

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: PreTrainedConfig, conv_mode: str):
        """Take the parts; `from_pretrained` reads them.

        Raises:
            InputError: there is no such template.
        """
        find_template(conv_mode, tokenizer)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.conv_mode = conv_mode
        self._config = config

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | os.PathLike, *, conv_mode: str | None = None, **_: object
    ) -> "LlavaProcessor":
        """Read a checkpoint's tokenizer and its vision tower's image processor; no weights.

        Args:
            checkpoint: folder or hub id.
            conv_mode: conversation template; None: the one that training stored, else by the checkpoint's name.
            **_: what `AutoProcessor` passes on to every processor; of a hub id the current revision is read.

        Raises:
            InputError: one line for everything that is not as it should be.
        """
        path = str(checkpoint)
        config = read_config(path)
        tower = build_vision_tower(config, delay_load=True)
        template = conv_mode or guess_template(path, config)[0]
        return cls(load_tokenizer(path), tower.read_image_processor(), config, template)

    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Make the arguments of `generate`: `model.generate(**processor(images, prompts))`.

        Args:
            images: of all prompts, in the order of their placeholders: None, one, or a list; of every kind that
                `llava.Llava` takes.
            text: prompts with `<image>` where images go, as `apply_chat_template` writes them.
            return_tensors: "pt", the only kind.
            padding: True, the only way: prompts are padded on the left.

        Returns:
            `input_ids` int64[S, T], with IMAGE_TOKEN_INDEX at placeholders, and `attention_mask` bool[S, T]; of images
            also `images`, the pixel values, and `image_sizes`, (width, height) each.

        Raises:
            InputError: not a text, another number of images than of placeholders, or an image that cannot be read.
        """
        if return_tensors != "pt" or padding is not True:
            raise InputError(
                'prompts come as PyTorch tensors, padded: leave out return_tensors and padding, or "pt", True'
            )
        prompts = [text] if isinstance(text, str) else text
        if (
            not isinstance(prompts, (list, tuple))
            or not prompts
            or not all(isinstance(prompt, str) for prompt in prompts)
        ):
            raise InputError("text: expected a prompt or a list of prompts, such as apply_chat_template writes")
        pictures = to_pictures(images)
        count = sum(prompt.count(DEFAULT_IMAGE_TOKEN) for prompt in prompts)
        if count != len(pictures):
            raise InputError(
                f"{len(pictures)} images for {count} {DEFAULT_IMAGE_TOKEN} placeholders: give one for each"
            )
        input_ids, attention_mask = pad_left([torch.tensor(ids) for ids in tokenize_prompts(prompts, self.tokenizer)])
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures:
            opened = [picture.load() for picture in pictures]
            data["images"] = process_images(opened, self.image_processor, self._config)
            data["image_sizes"] = [image.size for image in opened]
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> str | BatchFeature:
        """Write a dialogue in the checkpoint's conversation template.

        Args:
            conversation: `{"role": "user" | "assistant", "content": ...}` by turns, the user first; the content is a
                text, or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. Images come
                before the text of their turn, as LLaVA was trained.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tokenize: return what `__call__` makes of the prompt and the images in the content; else the prompt.
            return_dict: True, the only way of `tokenize`.
            return_tensors: "pt", the only kind.

        Raises:
            InputError: another form of dialogue.
        """
        if return_dict is not True:
            raise InputError("a tokenized dialogue comes with its mask and images: leave out return_dict")
        template = find_template(self.conv_mode, self.tokenizer).copy()
        images: list[object] = []
        for number, message in enumerate(conversation):
            role = ("user", "assistant")[number % 2]
            if not isinstance(message, Mapping) or message.get("role") != role:
                raise InputError(f"message {number} of the dialogue: expected the role {role}, by turns")
            text, given = _read_content(message.get("content"), number)
            use_im_start_end = getattr(self._config, "mm_use_im_start_end", False)
            template.append_message(template.roles[number % 2], place_images(text, len(given), use_im_start_end))
            images += given
        if add_generation_prompt:
            template.append_message(template.roles[1], None)
        prompt = template.get_prompt()
        if not tokenize:
            return prompt
        if any(image is None for image in images):
            raise InputError(
                'an image of the dialogue has no "image": give it there, or call the processor with images'
            )
        return self(images, prompt, return_tensors=return_tensors)

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]], **options: object) -> list[str]:
        """Decode answers; `generate` returns them without their prompts."""
        return self.tokenizer.batch_decode(ids, **options)

    def decode(self, ids: Tensor | Sequence[int], **options: object) -> str:
        """Decode one answer."""
        return self.tokenizer.decode(ids, **options)


def _read_content(content: object, number: int) -> tuple[str, list[object]]:
    """Return a message's text and its images, None for one that is only marked."""
    if isinstance(content, str):
        return content, []
    parts = content if isinstance(content, (list, tuple)) else [None]
    known = all(isinstance(part, Mapping) and part.get("type") in ("text", "image") for part in parts)
    texts = [part.get("text") for part in parts if part["type"] == "text"] if known else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"message {number} of the dialogue: expected a text, or a list of text and image parts")
    images = [part.get("image", part.get("url")) for part in parts if part["type"] == "image"]
    return "\n".join(texts), images


for config_class in CONFIGS.values():
    AutoProcessor.register(config_class, LlavaProcessor, exist_ok=True)
