"""Talk with a model about pictures: one dialogue, its pictures, and what each question kept of them.

The faces (`llava.eval.run_llava`, `llava.serve`) are thin layers over this. It renders the prompt, runs the vision
tower once per picture and the token reduction once per question: with TRIM the patches kept for a turn are those
that this turn's question asks for, whatever was asked before.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.errors import InputError
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token


@dataclass(frozen=True)
class Sampling:
    """How an answer is searched for.

    Attributes:
        temperature: 0 takes the likeliest token each time; above 0 draws.
        top_p: draw among the likeliest tokens that hold this probability together; None draws among all.
        num_beams: width of the beam search; 1 for none.
        max_new_tokens: length at which an answer is cut.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        checks = (
            (self.temperature >= 0, f"temperature {self.temperature}: expected 0 or more"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p {self.top_p}: expected a number above 0, at most 1"),
            (self.num_beams >= 1, f"num_beams {self.num_beams}: expected 1 or more"),
            (self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens}: expected 1 or more"),
        )
        for holds, message in checks:
            if not holds:
                raise InputError(message)

    def as_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate`; a greedy search gets none that only sampling reads."""
        arguments: dict[str, Any] = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            return arguments | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return arguments | {"do_sample": False}


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer, without surrounding space and without the template's end mark.
        num_tokens: visual tokens the language model read for this question, over all pictures.
        num_patches: visual tokens before reduction, over all pictures.
        prompt: the whole dialogue as the language model read it.
    """

    text: str
    num_tokens: int
    num_patches: int
    prompt: str

    def describe_tokens(self) -> str:
        """Say in a few words how many visual tokens were read."""
        return describe_tokens(self.num_tokens, self.num_patches)


def describe_tokens(num_tokens: int, num_patches: int) -> str:
    """Say in a few words how many of the visual tokens are read."""
    if not num_patches:
        return "visual tokens: none (no picture)"
    return f"visual tokens: {num_tokens} of {num_patches} kept ({100 * num_tokens / num_patches:.1f} %)"


class ChatSession:
    """One dialogue with a model. The pictures stay in view over all turns."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, conv_mode: str):
        """Start without pictures.

        Args:
            model: a `LlavaLlamaForCausalLM`.
            tokenizer: its tokenizer.
            image_processor: its vision tower's image processor.
            conv_mode: name of the conversation template; see `llava.conversation.conversation_name_for`.

        Raises:
            InputError: no template of that name.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = find_template(conv_mode)
        self.show([])

    def show(self, images: list[Image.Image]) -> None:
        """Put these pictures, and no others, before the model and begin a new dialogue."""
        self.conversation = self.template.copy()
        self._image_sizes = [image.size for image in images]
        values = process_images(images, self.image_processor, self.model.config)
        self._patches = self.model.encode_patches(values) if images else []

    @torch.inference_mode()
    def ask(self, question: str, sampling: Sampling | None = None, streamer: BaseStreamer | None = None) -> Answer:
        """Ask the next question of the dialogue.

        Args:
            question: the user's words; in the first turn they may say where each picture goes by one `<image>` (or
                `<image-placeholder>`) per picture, otherwise the pictures come first.
            sampling: how the answer is searched for; greedily by default.
            streamer: is handed the tokens as they come.

        Returns:
            The answer. After an error the dialogue is as it was before.

        Raises:
            InputError: an empty question, image marks that do not fit the pictures, or a dialogue too long for the
                model.
        """
        sampling = sampling or Sampling()
        text = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        text = text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
        query = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if not query:
            raise InputError("the question is empty: write what you want to know about the picture")
        conversation = self._with_question(text)
        prompt = conversation.get_prompt()
        tokens = self.model.make_image_tokens(self._patches, [query] * len(self._patches), self._image_sizes)
        text = self._generate(prompt, tokens, end_mark(conversation), sampling, streamer)
        conversation.messages[-1][1] = text
        self.conversation = conversation
        return Answer(text, sum(t.num_tokens for t in tokens), sum(t.num_patches for t in tokens), prompt)

    def _with_question(self, text: str) -> Conversation:
        """Return the dialogue with one more question and its open answer."""
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == len(self.template.messages)
        message = place_marks(text, len(self._image_sizes) if is_first else 0)
        if getattr(self.model.config, "mm_use_im_start_end", False):
            framed = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
            message = message.replace(DEFAULT_IMAGE_TOKEN, framed)
        conversation.append_message(conversation.roles[0], message)
        conversation.append_message(conversation.roles[1], None)
        return conversation

    def _generate(self, prompt: str, tokens: list, end: str, sampling: Sampling, streamer: BaseStreamer | None) -> str:
        input_ids = tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")[None]
        output_ids = self.model.generate(
            input_ids.to(self.model.device),
            image_tokens=tokens or None,
            stopping_criteria=StoppingCriteriaList([KeywordsStoppingCriteria([end], self.tokenizer, input_ids)]),
            streamer=streamer,
            use_cache=True,
            **sampling.as_arguments(),
        )
        return self.tokenizer.decode(output_ids[0], skip_special_tokens=True).strip().removesuffix(end).strip()


def find_template(conv_mode: str) -> Conversation:
    """Look up a conversation template.

    Raises:
        InputError: no template of that name.
    """
    if conv_mode not in conv_templates:
        closest = difflib.get_close_matches(conv_mode, conv_templates, n=1)
        hint = f'; did you mean "{closest[0]}"?' if closest else ""
        raise InputError(f'conversation template "{conv_mode}" is unknown{hint} known: {", ".join(conv_templates)}')
    return conv_templates[conv_mode]


def end_mark(conversation: Conversation) -> str:
    """Return the text with which the template lets the assistant end its turn."""
    two_sided = conversation.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    return conversation.sep2 if two_sided else conversation.sep


def place_marks(text: str, num_images: int) -> str:
    """See to it that a message has one image mark per picture.

    Args:
        text: the user's words, possibly with marks of their own.
        num_images: pictures that enter the dialogue with this message.

    Returns:
        The text itself when its marks fit; with the marks put before it, each on its line, when it has none.

    Raises:
        InputError: another number of marks.
    """
    num_marks = text.count(DEFAULT_IMAGE_TOKEN)
    if num_marks == num_images:
        return text
    if num_marks == 0:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    raise InputError(
        f"the question has {num_marks} {DEFAULT_IMAGE_TOKEN} mark(s) for {num_images} new picture(s): "
        "write one per picture in the first question, or none"
    )
