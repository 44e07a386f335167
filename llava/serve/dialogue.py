"""From the messages of a request to prompt ids: the checkpoint's template, images in their places, texts as they are.

The ids are those of `llava.chat` for the same dialogue. Unlike there, what a message's text says is text: an `<image>`
in it shows no image, and `</s>` ends no turn. Pure of models and images' pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.errors import InputError
from llava.mm_utils import tokenize_texts
from llava.prompt import check_text
from llava.protocols import Tokenizer

ROLES = ("system", "user", "assistant")
MARKUP = re.compile(r"[<\[]\S+[>\]]")
"""Tokens that structure a prompt (`</s>`, `<|im_end|>`, `<im_start>`). A token for a phrase is one in a message too."""

Part = str | Image.Image


@dataclass(frozen=True)
class Message:
    """One message of a dialogue.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts and images, in the order in which the client sent them; images in a user's messages only.

    Raises:
        InputError: another role, something that is neither text nor image, or an image in another's message.
    """

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"role {self.role!r}: expected {', '.join(ROLES)}")
        for part in self.parts:
            if not isinstance(part, (str, Image.Image)):
                raise InputError(f"a part of a message is a text or a Pillow image, not {type(part).__name__}")
            if isinstance(part, str):
                check_text(part)
            elif self.role != "user":
                raise InputError(f"an image in a message of the {self.role}: only the user's messages hold images")

    @property
    def text(self) -> str:
        """The texts, a line or more each."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Dialogue:
    """A dialogue, ready to be answered.

    Attributes:
        input_ids: with IMAGE_TOKEN_INDEX at each image.
        images: in the order of the prompt.
        query: the last question, for the CLIP text tower: all images are reduced for it, as in `llava.chat`.
    """

    input_ids: tuple[int, ...]
    images: tuple[Image.Image, ...]
    query: str


def read_dialogue(
    messages: Sequence[Message], template: Conversation, tokenizer: Tokenizer, use_im_start_end: bool = False
) -> Dialogue:
    """Render messages by a template, and tokenize them.

    A system message takes the place of the template's. Each part of a user's message is on a line of its own, in the
    client's order; where no text follows an image, the images come first, as LLaVA's models were trained
    (`prompt.place_images`). Answers are stripped, as `llava.chat` keeps them.

    Args:
        messages: at most one of the system, at the start; then the user's and the assistant's in turn, the user's last.
        template: of the checkpoint.
        tokenizer: of the language model.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.

    Raises:
        InputError: messages in another order, an empty question, or a text that no tokenizer takes.
    """
    system, turns = _check_order(messages)
    query = turns[-1].text.strip()
    if not query:
        raise InputError("the question is empty: the last message needs a text that asks something")
    marks = _Marks(tokenizer, [message.text for message in messages])
    # 1. Texts with marks where an image goes, and where a text only looks like a token.
    conversation = template.copy() if system is None else template.with_system(marks.quote(system.text))
    image = marks.image if not use_im_start_end else DEFAULT_IM_START_TOKEN + marks.image + DEFAULT_IM_END_TOKEN
    for message in turns:
        is_user = message.role == "user"
        text = _join_lines(message, image, marks) if is_user else marks.quote(message.text.strip())
        conversation.append_message(conversation.roles[0 if is_user else 1], text)
    conversation.append_message(conversation.roles[1], None)
    # 2. The template's text in one piece between the marks, so that its ids are those of a prompt without any.
    images = tuple(part for message in turns for part in message.parts if isinstance(part, Image.Image))
    return Dialogue(tuple(marks.tokenize(conversation.get_prompt())), images, query)


def _check_order(messages: Sequence[Message]) -> tuple[Message | None, Sequence[Message]]:
    """Separate the system's message from the turns."""
    system = messages[0] if messages and messages[0].role == "system" else None
    turns = messages if system is None else messages[1:]
    if not any(message.role == "user" for message in turns):
        raise InputError("messages: there is none of the user; the last one has to be the user's")
    for number, message in enumerate(turns, start=len(messages) - len(turns)):
        expected = "user" if (number - (system is not None)) % 2 == 0 else "assistant"
        if message.role == "system":
            raise InputError(
                f"messages[{number}]: a message of the system stands at the start, and there is one at most"
            )
        if message.role != expected:
            raise InputError(
                f"messages[{number}]: a message of the {message.role}, where one of the {expected} is due; they take "
                "turns, the user begins"
            )
        if message.role == "user" and not any(message.parts):
            raise InputError(f"messages[{number}]: the user's message is empty")
    if turns[-1].role != "user":
        raise InputError(f"messages[{len(messages) - 1}]: the last message has to be the user's")
    return system, turns


def _join_lines(message: Message, image: str, marks: "_Marks") -> str:
    """Write a user's message, each part on a line of its own."""
    is_image = [isinstance(part, Image.Image) for part in message.parts]
    parts = message.parts
    if is_image == sorted(is_image):  # no text follows an image
        parts = sorted(parts, key=lambda part: isinstance(part, str))
    return "\n".join(image if isinstance(part, Image.Image) else marks.quote(part) for part in parts)


class _Marks:
    """Stand-ins, in the text of a prompt, for what is not tokenized with it: images, and texts that spell a token."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        """Find marks that occur in none of the texts."""
        self._tokenizer = tokenizer
        number = 0
        while any(f"\ue000{number}:" in text for text in texts):
            number += 1
        self._opening = f"\ue000{number}:"
        self.image = f"{self._opening}image\ue001"
        self._spelled = sorted(filter(MARKUP.fullmatch, tokenizer.get_added_vocab()), key=len, reverse=True)

    def quote(self, text: str) -> str:
        """Put marks for what spells a token."""
        if not any(token in text for token in self._spelled):
            return text
        spelled = re.compile("|".join(map(re.escape, self._spelled)))
        return spelled.sub(lambda found: f"{self._opening}{self._spelled.index(found[0])}\ue001", text)

    def tokenize(self, prompt: str) -> list[int]:
        """Tokenize as `mm_utils.tokenize_prompts` does, with marks in place of `<image>`."""
        first, *others = re.split(f"{self._opening}(image|[0-9]+)\ue001", prompt)
        chunks, names = [first, *others[1::2]], others[::2]
        ids = tokenize_texts(chunks, self._tokenizer)
        row = list(ids[0])
        starts = int(bool(row) and row[0] == self._tokenizer.bos_token_id)
        for name, chunk_ids in zip(names, ids[1:], strict=True):
            row += [IMAGE_TOKEN_INDEX] if name == "image" else self._spell(self._spelled[int(name)])
            row += chunk_ids[starts:]
        return row

    def _spell(self, token: str) -> list[int]:
        """Tokenize the characters of a token's name."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self._tokenizer(token, **options).input_ids
