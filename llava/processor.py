"""What transformers calls a processor: prompts and images of any kind to what `generate` takes.

`AutoProcessor` makes it. Importing this module registers it, and the models.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin

from llava.chat_template import write_jinja
from llava.cli import guess_template
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.files import make_folder, write_json
from llava.generation import pad_left
from llava.mm_utils import load_image_from_base64, process_images, tokenize_prompts
from llava.model.builder import read_config
from llava.model.checkpoint_folder import copy_sentencepiece_model, locate_tower
from llava.model.config_rules import CONFIG_FILE, is_hf_layout, read_settings
from llava.model.language_model.families import FAMILIES
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower
from llava.model.tokenizer import SETTINGS_FILE, load_tokenizer
from llava.picture import to_pictures
from llava.prompt import find_template, place_images
from llava.protocols import ImageProcessor, Tokenizer

CONFIGS = {family.config.model_type: family.config for family in FAMILIES.values()}
"""The config classes that transformers' table holds gates for, by model type."""

CALL_OPTIONS = ("padding", "truncation", "max_length", "return_tensors")
OPEN_END = "\x1e"
"""In place of a text that an answer goes on from: no template has it."""
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
"""Where a part of a message may have its image: one of transformers' names, or OpenAI's."""


class PromptBatch(BatchFeature):
    """Prompts with their images, as `generate` takes them."""

    def to(self, *args: object, **kwargs: object) -> "PromptBatch":
        """Move to a device. A dtype is not obeyed: pixel values stay float32, and the tower reads them in its own."""
        args = tuple(arg for arg in args if not isinstance(arg, torch.dtype))
        kwargs.pop("dtype", None)
        return super().to(*args, **kwargs) if args or kwargs else self


class LlavaProcessor(ProcessorMixin):
    """Tokenizer and image processor of a checkpoint, and its conversation template.

    Attributes:
        tokenizer: of the language model.
        image_processor: of the vision tower.
        conv_mode: name of the conversation template that `apply_chat_template` writes.
        chat_template: the same as Jinja, as a converted checkpoint has it; None for a template that is no dialogue.
    """

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: PreTrainedConfig, conv_mode: str):
        """Take the parts; `from_pretrained` reads them.

        Raises:
            InputError: there is no such template.
        """
        find_template(conv_mode, tokenizer)
        # What transformers' pipelines pad batches by.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._jinja = write_jinja(conv_mode, tokenizer)
        super().__init__(tokenizer=tokenizer, image_processor=image_processor, chat_template=self._jinja)
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

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **_: object) -> list[str]:
        """Write what `from_pretrained` reads: the tokenizer's files, and config.json with the template.

        In a model's folder config.json stays as it is but for the template. The image processor is the vision tower's,
        which config.json names; of a tower in the checkpoint it is written too.

        Returns:
            The path of config.json.

        Raises:
            InputError: the folder cannot be written, or `push_to_hub`.
        """
        if push_to_hub:
            raise InputError("push_to_hub: save the processor into a folder, and upload that with `hf upload`")
        folder = Path(save_directory)
        make_folder(folder)
        if (folder / CONFIG_FILE).is_file():
            values, file = read_settings(str(folder), CONFIG_FILE, "checkpoint")
            if is_hf_layout(values):
                raise InputError(
                    f"{file} is in the layout of llava-hf, which has its own processor: save into another folder"
                )
        else:
            values = json.loads(self._config.to_json_string())
            values["mm_vision_tower"] = locate_tower(values["mm_vision_tower"], self._config._name_or_path, folder)
        self.tokenizer.save_pretrained(folder)
        settings, _ = read_settings(str(folder), SETTINGS_FILE, "tokenizer")
        if settings.pop("processor_class", None):  # a llava-hf folder's; AutoProcessor would go by it
            write_json(folder / SETTINGS_FILE, settings, indent=2)
        copy_sentencepiece_model(self.tokenizer, folder)
        tower = build_vision_tower(self._config, delay_load=True)
        if isinstance(tower, StoredVisionTower):
            tower.save_image_processor(folder)
        write_json(folder / CONFIG_FILE, values | {"conv_mode": self.conv_mode}, indent=2)
        return [str(folder / CONFIG_FILE)]

    @property
    def model_input_names(self) -> list[str]:
        """What `generate` takes of a batch."""
        return ["input_ids", "attention_mask", "images", "image_sizes"]

    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
        padding: bool | str = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        **others: object,
    ) -> PromptBatch:
        """Make the arguments of `generate`: `model.generate(**processor(images, prompts))`.

        Args:
            images: of all prompts, in the order of their placeholders: None, one, or a list; of every kind that
                `llava.Llava` takes.
            text: prompts with `<image>` where images go, as `apply_chat_template` writes them.
            return_tensors: "pt", the only kind.
            padding: True or "longest": prompts are padded on the left. False, for prompts of one length, is the same.
            truncation, max_length: no prompt is cut: one of more ids than `max_length` is refused. With `truncation`
                alone the limit is the tokenizer's `model_max_length`.
            **others: of transformers' further options only those that ask for nothing (None, False).

        Returns:
            `input_ids` int64[S, T], with IMAGE_TOKEN_INDEX at placeholders, and `attention_mask` bool[S, T]; of images
            also `images`, the pixel values, and `image_sizes`, (width, height) each.

        Raises:
            InputError: not a text, another number of images than of placeholders, an image that cannot be read, a
                prompt that is too long, or an option that is not known here.
        """
        _check_options(return_tensors, padding, others)
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
        rows = tokenize_prompts(prompts, self.tokenizer)
        limit = self.tokenizer.model_max_length if truncation and max_length is None else max_length
        _check_lengths(rows, limit, padding)
        input_ids, attention_mask = pad_left([torch.tensor(ids) for ids in rows])
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pictures:
            opened = [picture.load() for picture in pictures]
            data["images"] = process_images(opened, self.image_processor, self._config)
            data["image_sizes"] = [image.size for image in opened]
        return PromptBatch(data)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, object] | None = None,
        **options: object,
    ) -> str | list[str] | PromptBatch:
        """Write a dialogue, or each of a list of dialogues, in the checkpoint's conversation template.

        Args:
            conversation: `{"role": "user" | "assistant", "content": ...}` by turns, the user first, before whom a
                message of the role "system" may stand, in the place of the template's; the content is a text, or a list
                of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or "url", "path", "base64", or
                OpenAI's "image_url"). Each part is on a line of its own. Images come before the text of their turn, as
                LLaVA was trained, unless the text has `<image>` where they go.
            chat_template: None, or what `self.chat_template` is.
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: leave the last message, the assistant's, open.
            tokenize: return what `__call__` makes of the prompt and the images in the content; else the prompt.
                `images` and `image_sizes` are then lists, of an entry for each image, or none.
            return_dict: True, the only way of `tokenize`.
            return_tensors: "pt", the only kind.
            processor_kwargs, **options: of `__call__`.

        Raises:
            InputError: another form of dialogue, or an option that is not known here.
        """
        if return_dict is not True:
            raise InputError("a tokenized dialogue comes with its mask and images: leave out return_dict")
        if any(source not in (None, self._jinja) for source in (chat_template, self.chat_template)):
            raise InputError(
                f"chat_template: dialogues are written in the template {self.conv_mode}; choose another by its name, "
                "AutoProcessor.from_pretrained(CKPT, conv_mode=NAME)"
            )
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "add_generation_prompt begins an answer, continue_final_message goes on with one: give one"
            )
        is_batch = isinstance(conversation, (list, tuple)) and bool(conversation)
        is_batch = is_batch and isinstance(conversation[0], (list, tuple))
        written = [
            self._write_dialogue(dialogue, add_generation_prompt, continue_final_message)
            for dialogue in (conversation if is_batch else [conversation])
        ]
        prompts = [prompt for prompt, _ in written]
        options = {**(processor_kwargs or {}), **options}
        _check_options("pt", True, {name: value for name, value in options.items() if name not in CALL_OPTIONS})
        if not tokenize:
            return prompts if is_batch else prompts[0]
        images = [image for _, given in written for image in given]
        if any(image is None for image in images):
            raise InputError(
                'an image of the dialogue has no "image": give it there, or call the processor with images'
            )
        options.setdefault("return_tensors", "pt" if return_tensors == "auto" else return_tensors)
        batch = self(images, prompts, **options)
        # Lists, and of texts alone empty ones: the items of a pipeline are joined by their types and keys.
        batch["images"], batch["image_sizes"] = list(batch.get("images", [])), batch.get("image_sizes", [])
        return batch

    def _write_dialogue(self, dialogue: object, is_open: bool, is_continued: bool) -> tuple[str, list[object]]:
        """Return the prompt of a dialogue and its images, None for one that is only marked."""
        template = find_template(self.conv_mode, self.tokenizer)
        system, turns = _split_system(dialogue)
        template = template.copy() if system is None else template.with_system(system)
        use_im_start_end = getattr(self._config, "mm_use_im_start_end", False)
        start, images, text = len(dialogue) - len(turns), [], ""
        for number, message in enumerate(turns):
            role = ("user", "assistant")[number % 2]
            if not isinstance(message, Mapping) or message.get("role") != role:
                raise InputError(f"message {start + number} of the dialogue: expected the role {role}, by turns")
            text, given = _read_content(message.get("content"), start + number)
            if not (text or given):
                raise InputError(f"message {start + number} of the dialogue is empty: expected a text, or an image")
            text = place_images(text, len(given), use_im_start_end)
            template.append_message(template.roles[number % 2], text)
            images += given
        if is_open:
            template.append_message(template.roles[1], None)
        if not is_continued:
            return template.get_prompt(), images
        if len(turns) % 2 or not text:
            raise InputError("continue_final_message: the last message has to be a text of the assistant")
        template.messages[-1][1] = OPEN_END  # what stands before the text, whatever the text is
        return template.get_prompt().partition(OPEN_END)[0] + text, images

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]], **options: object) -> list[str]:
        """Decode answers, which `generate` returns without their prompts; or prompts, whose images are left out."""
        return self.tokenizer.batch_decode(_drop_placeholders(ids), **options)

    def decode(self, ids: Tensor | Sequence[int], **options: object) -> str:
        """Decode one answer, or one prompt."""
        return self.tokenizer.decode(_drop_placeholders(ids), **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Tensor, skip_special_tokens: bool = True, **options: object
    ) -> list[str]:
        """Decode what a pipeline shows."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)


def _check_options(return_tensors: object, padding: object, others: Mapping[str, object]) -> None:
    if return_tensors != "pt" or padding not in (True, False, "longest", "do_not_pad"):
        raise InputError('prompts come as PyTorch tensors, padded: leave out return_tensors and padding, or "pt", True')
    asked = sorted(name for name, value in others.items() if value is not None and value is not False)
    if asked:
        raise InputError(f"{asked[0]}: this processor has no such option; it has {', '.join(CALL_OPTIONS)}")


def _check_lengths(rows: list[list[int]], limit: int | None, padding: bool | str) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"max_length {limit!r}: expected a number of ids, or None")
    longest = max(map(len, rows))
    if limit is not None and longest > limit:
        raise InputError(
            f"prompt {[len(row) for row in rows].index(longest)} has {longest} ids, where {limit} are allowed: prompts "
            "are not cut, shorten it or raise max_length"
        )
    if padding in (False, "do_not_pad") and any(len(row) != longest for row in rows):
        raise InputError("padding=False: the prompts have different lengths; leave it out, or call with each alone")


def _split_system(dialogue: object) -> tuple[str | None, Sequence[object]]:
    """Separate the text of a system message, None without one, from the turns."""
    if not isinstance(dialogue, Sequence) or not dialogue:
        raise InputError(
            'expected a dialogue, a list of messages {"role": "user", "content": ...}, or a list of dialogues; not '
            + ("an empty one" if isinstance(dialogue, Sequence) else type(dialogue).__name__)
        )
    first = dialogue[0]
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return None, dialogue
    text, images = _read_content(first.get("content"), 0)
    if images or len(dialogue) == 1:
        raise InputError(
            "message 0 of the dialogue: "
            + ("the system's message holds no images" if images else "behind the system's, expected the role user")
        )
    return place_images(text, 0), dialogue[1:]


def _read_content(content: object, number: int) -> tuple[str, list[object]]:
    """Return a message's text and its images, None for one that is only marked."""
    if isinstance(content, str):
        return content, []
    parts = content if isinstance(content, (list, tuple)) else [None]
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
    texts = [part.get("text") for part, kind in zip(parts, kinds, strict=True) if kind == "text"]
    if not all(kind in ("text", "image", "image_url") for kind in kinds) or not all(
        isinstance(text, str) for text in texts
    ):
        raise InputError(f"message {number} of the dialogue: expected a text, or a list of text and image parts")
    return "\n".join(texts), [_find_image(part) for part, kind in zip(parts, kinds, strict=True) if kind != "text"]


def _find_image(part: Mapping[str, Any]) -> object:
    """Return the image of a part as `Picture` takes it; None for one that is only marked."""
    key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
    image = None if key is None else part[key]
    if key == "image_url" and isinstance(image, Mapping):
        image = image.get("url")
    is_embedded = key == "base64" or str(image).startswith("data:image/")
    return load_image_from_base64(str(image).rpartition(",")[2]) if is_embedded else image


def _drop_placeholders(ids: object) -> object:
    """Leave image placeholders out of ids: one, a row of them, or rows."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return ids
    return [item for item in map(_drop_placeholders, ids) if item != IMAGE_TOKEN_INDEX]


class NoBareModel:
    """What `AutoModel` finds for our configs: a line that says what to call instead."""

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> None:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            "AutoModel is for models without an output head, by which LLaVA answers: use AutoModelForImageTextToText "
            "or AutoModelForCausalLM"
        )

    _from_config = from_pretrained


for config_class in CONFIGS.values():
    AutoProcessor.register(config_class, LlavaProcessor, exist_ok=True)
    AutoModel.register(config_class, NoBareModel, exist_ok=True)
