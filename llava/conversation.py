"""How a dialogue becomes the string that a language model reads: templates, and the class that holds the turns.

LLaVA checkpoints were trained with exactly these texts; one changed character changes answers. The class has LLaVA's
interface, because evaluation harnesses copy the templates, append messages and read the fields. It needs no model and
no tokenizer.
"""

import base64
import dataclasses
import html
import json
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from io import BytesIO

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.gone import look_up

__getattr__ = look_up(__name__)

# A message is None (the answer is still to come), a text, or (text, image, how to show the image).
Message = None | str | tuple[str, Image.Image, str]

CHATML_SYSTEM = "<|im_start|>system\n"

SHOWN_LONGEST_SIDE = 1344
SHOWN_SHORTEST_SIDE = 672
SHOWN_SQUARE_SIDE = 336
SHOWN_PAD_COLOR = (122, 116, 104)


class SeparatorStyle(Enum):
    """How the turns are joined into a prompt."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHAT = auto()


@dataclasses.dataclass
class Conversation:
    """The turns of one dialogue and the template that renders them.

    Attributes:
        system: system message, before the first turn.
        roles: names of the user and the assistant.
        messages: `[role, message]` pairs, user first.
        offset: number of messages at the start that belong to the template, not to the dialogue.
        sep_style: how turns are joined.
        sep: separator after a turn (after a user's turn if there is `sep2`).
        sep2: separator after an assistant's turn; None if it is `sep`.
        version: family of the template; training and image placement depend on it.
        skip_next: unused here; LLaVA's clients set it.
        around_system: what a tokenizer's chat template puts before and behind a system message, up to the first turn;
            None: it takes none, or this is no such template.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Message]]
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False
    around_system: tuple[str, str] | None = None

    def copy(self) -> "Conversation":
        """Return a conversation with its own list of turns; images are shared, not copied."""
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    def with_system(self, text: str) -> "Conversation":
        """Return a copy with another system message; the markup around it stays.

        Raises:
            InputError: a tokenizer's chat template that takes none.
        """
        if self.sep_style is not SeparatorStyle.CHAT:
            return dataclasses.replace(self.copy(), system=self._opens_system() + text)
        if self.around_system is None:
            raise InputError("the tokenizer's chat template takes no system message: put its text before the question")
        opening, close = self.around_system
        return dataclasses.replace(self.copy(), system=opening + text + close)

    def _opens_system(self) -> str:
        return CHATML_SYSTEM if self.system.startswith(CHATML_SYSTEM) else ""

    def append_message(self, role: str, message: Message) -> None:
        """Add a turn; None as the message leaves the turn open for the model."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Render all turns into the string that the language model reads."""
        return _RENDERERS[self.sep_style](self, self._list_turns())

    def get_images(self, return_pil: bool = False) -> list[Image.Image] | list[str]:
        """Collect the images of the user's turns, prepared for display (not for the vision tower).

        Args:
            return_pil: return images; otherwise base64 text of PNG files.
        """
        shown = [
            _fit_for_display(message[1], message[2])
            for _, message in self.messages[self.offset :]
            if isinstance(message, tuple)
        ]
        return shown if return_pil else [_encode_png(image) for image in shown]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """List the dialogue as `[user, assistant]` pairs; images become inline HTML before the user's text."""
        pairs: list[list[str | None]] = []
        for number, (_, message) in enumerate(self.messages[self.offset :]):
            if number % 2 == 0:
                pairs.append([_to_html(message), None])
            else:
                pairs[-1][1] = message
        return pairs

    def dict(self) -> dict[str, object]:
        """Return the fields as plain data, without the images."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text_of(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def _list_turns(self) -> list[tuple[str, str | None]]:
        """List (role, text); if the first message has an image, its placeholder goes where the template has it."""
        turns = [(role, _text_of(message)) for role, message in self.messages]
        if self.messages and isinstance(self.messages[0][1], tuple):
            role, text = turns[0]
            question = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if "mmtag" in self.version:
                shown = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
                turns[:1] = [shown, (self.roles[1], "Received."), (role, question)]
            else:
                turns[0] = (role, f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        return turns


def _text_of(message: Message) -> str | None:
    return message[0] if isinstance(message, tuple) else message


Turns = list[tuple[str, str | None]]


def _render_alternating(conv: Conversation, turns: Turns) -> str:
    """System message, then `ROLE: text` turns, each followed by the separator of its role."""
    ends = (conv.sep, conv.sep if conv.sep2 is None else conv.sep2)
    rendered = [
        f"{role}: {text}{ends[number % 2]}" if text else f"{role}:" for number, (role, text) in enumerate(turns)
    ]
    return conv.system + conv.sep + "".join(rendered)


def _render_chatml(conv: Conversation, turns: Turns) -> str:
    """Turns whose role strings hold the opening tokens themselves (ChatML)."""
    rendered = [f"{role}{text}{conv.sep}" if text else role for role, text in turns]
    return conv.system + conv.sep + "".join(rendered)


def _render_bare(conv: Conversation, turns: Turns) -> str:
    """Texts alone, each followed by its separator, as in the pretraining of the projector."""
    ends = (conv.sep, conv.sep if conv.sep2 is None else conv.sep2)
    return conv.system + "".join(text + ends[number % 2] for number, (_, text) in enumerate(turns) if text)


def _render_llama_2(conv: Conversation, turns: Turns) -> str:
    """`[INST] ... [/INST]` around the user's texts, the system text inside the first of them."""
    if not turns or turns[0][0] != conv.roles[0] or not turns[0][1]:
        raise ValueError(f"a llama-2 conversation starts with a text of {conv.roles[0]}")
    system = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n" if conv.system else ""
    rendered = ""
    for number, (_, text) in enumerate(turns):
        if not text:
            continue
        if number % 2:
            rendered += f" {text} {conv.sep2}"
        else:
            rendered += f"{conv.sep}[INST] {system if number == 0 else ''}{text} [/INST]"
    # The tokenizer adds the first sequence start itself.
    return rendered.removeprefix(conv.sep)


def _render_chat(conv: Conversation, turns: Turns) -> str:
    """A tokenizer's own markup: roles are what opens a turn, separators what closes it, `system` all that goes before.

    Spaces at the end of an opening belong to the answer, as in LLaVA's templates: an open turn has none.
    """
    ends = (conv.sep, conv.sep2)
    rendered = [
        f"{role}{text}{ends[number % 2]}" if text else role.rstrip(" ") for number, (role, text) in enumerate(turns)
    ]
    return conv.system + "".join(rendered)


_RENDERERS: dict[SeparatorStyle, Callable[[Conversation, Turns], str]] = {
    SeparatorStyle.SINGLE: _render_alternating,
    SeparatorStyle.TWO: _render_alternating,
    SeparatorStyle.MPT: _render_chatml,
    SeparatorStyle.PLAIN: _render_bare,
    SeparatorStyle.LLAMA_2: _render_llama_2,
    SeparatorStyle.CHAT: _render_chat,
}


# ------------------------------------------------------------------------------------------------- as a Jinja template
_JINJA_SHOW = """\
{%- macro show(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- set text = content | selectattr("type", "equalto", "text") | map(attribute="text") | join("\\n") -%}
{%- if MARK not in text -%}
{%- for part in content if part.type == "image" -%}{{ MARK + "\\n" }}{%- endfor -%}
{%- endif -%}
{{- text -}}
{%- endif -%}
{%- endmacro -%}
"""
_JINJA_SYSTEM = """\
{%- set system = SYSTEM -%}
{%- if messages[0].role == "system" -%}
{%- set system = OPENING + show(messages[0].content) -%}{%- set messages = messages[1:] -%}
{%- endif -%}
"""
_JINJA_TAKE_PARTS = """\
{%- set taken = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set taken.messages = taken.messages + [{"role": message.role, "content": show(message.content)}] -%}
{%- endfor -%}
{%- set messages = taken.messages %}"""
_JINJA_TURNS = """\
{{- system + SEP -}}
{%- for message in messages -%}
{%- if message.role == "user" -%}{{ USER + show(message.content) + SEP }}{%- endif -%}
{%- if message.role == "assistant" -%}{{ ASSISTANT + show(message.content) + END }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ OPEN }}{%- endif -%}
"""
_JINJA_LLAMA_2 = """\
{%- if system -%}{%- set system = "<<SYS>>\\n" + system + "\\n<</SYS>>\\n\\n" -%}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{ ("[INST] " + system if loop.first else SEP + "[INST] ") + show(message.content) + " [/INST]" }}
{%- endif -%}
{%- if message.role == "assistant" -%}{{ " " + show(message.content) + " " + END }}{%- endif -%}
{%- endfor -%}
"""


def to_jinja(conv: Conversation) -> str | None:
    """Write a template as Jinja, in which transformers' processors render a list of messages.

    A message is a text, or a list of parts, each on a line of its own: first the images, unless the texts have
    `<image>` where images go, then the texts. A system message at the start takes the place of the template's.

    Returns:
        The Jinja source, without the start token, which the tokenizer adds; None for a template without roles, and for
        a tokenizer's own, which is Jinja already (`take_parts`).
    """
    if conv.sep_style in (SeparatorStyle.PLAIN, SeparatorStyle.CHAT) or conv.offset or "mmtag" in conv.version:
        return None
    user, assistant = conv.roles
    colon = "" if conv.sep_style is SeparatorStyle.MPT else ": "
    values = {
        "MARK": DEFAULT_IMAGE_TOKEN,
        "SYSTEM": conv.system,
        "OPENING": conv._opens_system(),
        "SEP": conv.sep,
        "END": conv.sep if conv.sep2 is None else conv.sep2,
        "USER": f"{user}{colon}",
        "ASSISTANT": f"{assistant}{colon}",
        "OPEN": f"{assistant}{colon.strip()}",
    }
    body = _JINJA_LLAMA_2 if conv.sep_style is SeparatorStyle.LLAMA_2 else _JINJA_TURNS
    return _fill_in(_JINJA_SHOW + _JINJA_SYSTEM + body, values)


def take_parts(source: str) -> str:
    """Let a language model's chat template take messages of parts as well, as `to_jinja` has them.

    Args:
        source: the Jinja of a template that takes texts.
    """
    return _fill_in(_JINJA_SHOW + _JINJA_TAKE_PARTS, {"MARK": DEFAULT_IMAGE_TOKEN}) + source


def _fill_in(source: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\b[A-Z]{3,}\b", lambda word: json.dumps(values[word[0]]) if word[0] in values else word[0], source)


def _fit_for_display(image: Image.Image, process_mode: str) -> Image.Image:
    """Resize an image for a web page; "Pad" and "Resize" show the model's input."""
    if process_mode == "Pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), SHOWN_PAD_COLOR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif process_mode == "Resize":
        image = image.resize((SHOWN_SQUARE_SIDE, SHOWN_SQUARE_SIDE))
    elif process_mode not in ("Default", "Crop"):
        raise ValueError(f"image mode {process_mode!r}: expected Default, Crop, Pad or Resize")
    longest, shortest = max(image.size), min(image.size)
    if longest <= SHOWN_LONGEST_SIDE:
        return image
    scale = min(SHOWN_LONGEST_SIDE / longest, SHOWN_SHORTEST_SIDE / shortest)
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _encode_png(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _to_html(message: Message) -> str | None:
    if not isinstance(message, tuple):
        return message
    text = html.escape(message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip(), quote=False)
    png = _encode_png(_fit_for_display(message[1], message[2]))
    return f'<img src="data:image/png;base64,{png}" alt="image of the user"/>{text}'


_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TAGGED_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_DIRECT_SYSTEM = "<|im_start|>system\nAnswer the questions."

_V0_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_V0_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, "
    "are finite and will eventually be depleted, such as coal, oil, and natural gas. "
    "Here are some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, "
    "while non-renewable energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, "
    "but they typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted "
    "to different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
    "while non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)


def _single(system: str, version: str = "Unknown") -> Conversation:
    return Conversation(system, ("Human", "Assistant"), [], sep="###", version=version)


def _two(system: str, version: str = "v1") -> Conversation:
    roles = ("USER", "ASSISTANT")
    return Conversation(system, roles, [], sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version)


def _chatml(system: str, sep: str = "<|im_end|>") -> Conversation:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Conversation(system, roles, [], sep_style=SeparatorStyle.MPT, sep=sep, version="mpt")


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    style = SeparatorStyle.LLAMA_2
    return Conversation(system, ("USER", "ASSISTANT"), [], sep_style=style, sep=sep, sep2="</s>", version="llama_v2")


_V0 = dataclasses.replace(
    _single(_HUMAN_SYSTEM),
    messages=[["Human", _V0_EXAMPLE_QUESTION], ["Assistant", _V0_EXAMPLE_ANSWER]],
    offset=2,
)
_VICUNA_V1 = _two(_USER_SYSTEM)
_PLAIN = Conversation("", ("", ""), [], sep_style=SeparatorStyle.PLAIN, sep="\n")

conv_templates: dict[str, Conversation] = {
    "default": _V0,
    "v0": _V0,
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llama_2": _llama_2(_LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _chatml(_DIRECT_SYSTEM),
    "mistral_direct": _chatml(_DIRECT_SYSTEM),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _single(_HUMAN_SYSTEM),
    "v0_mmtag": _single(_TAGGED_SYSTEM, version="v0_mmtag"),
    "llava_v1": _two(_HUMAN_SYSTEM),
    "v1_mmtag": _two(_TAGGED_SYSTEM, version="v1_mmtag"),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2_SYSTEM),
    "mpt": _chatml(_MPT_SYSTEM),
    # ChatML as Qwen has it, with a line break after each turn.
    "qwen_1_5": _chatml("<|im_start|>system\nYou are a helpful assistant.", sep="<|im_end|>\n"),
    "qwen_2": _chatml("<|im_start|>system\nYou are a helpful assistant.", sep="<|im_end|>\n"),
}
default_conversation = _VICUNA_V1

# Words of a checkpoint's name; the first match decides, as in LLaVA's commands for LLaVA's checkpoints.
_NAME_HINTS = (
    (("llama", "2"), "llava_llama_2"),
    (("mistral",), "mistral_instruct"),
    (("qwen",), "qwen_1_5"),
    (("qwen1.5",), "qwen_1_5"),
    (("qwen2",), "qwen_2"),
    (("v1.6", "34b"), "chatml_direct"),
    (("v1",), "llava_v1"),
    (("mpt",), "mpt"),
    (("v0",), "llava_v0"),
)


def conversation_name_for(model_name: str) -> str:
    """Choose the template for a checkpoint from the words of its name.

    A word ends at anything but a letter, a digit or a point: `attempt3` is not `mpt`. A version matches its later
    ones (`v1` matches `v1.5`); `v0` is LLaVA's first model, not any version below 1 (`v0.2`). A name without any hint
    gets `vicuna_v1`, the template of this repository's recipes (parity: LLaVA's commands fall back to the older
    `llava_v0`).
    """
    words = re.findall(r"[a-z0-9.]+", model_name.lower())
    return next((template for hint, template in _NAME_HINTS if _follow_each_other(hint, words)), "vicuna_v1")


def _follow_each_other(hint: tuple[str, ...], words: list[str]) -> bool:
    runs = (words[start : start + len(hint)] for start in range(len(words)))
    return any(len(run) == len(hint) and all(map(_matches, hint, run)) for run in runs)


def _matches(hint: str, word: str) -> bool:
    is_later_version = hint == "v1" and re.fullmatch(r"v1(\.\d+)*", word) is not None
    return word == hint or is_later_version


def get_model_name_from_path(model_path: str) -> str:
    """Name a checkpoint after its folder; `run/checkpoint-500` becomes `run_checkpoint-500`."""
    parts = model_path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]
