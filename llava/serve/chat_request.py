"""OpenAI's JSON of a chat completion, read strictly: what changes the answer is served or refused, never passed over.

https://platform.openai.com/docs/api-reference/chat/create names the fields. Two are this server's own: `reduce`, the
token reduction of this request, and `query`, what the CLIP text tower reads.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import InputError
from llava.sampling import MAX_NEW_TOKENS, Sampling
from llava.serve.engine import Search
from llava.serve.limits import Limits
from llava.serve.refusal import Refusal

MAX_CHOICES = 16
MAX_STOPS = 4
"""As at OpenAI."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""A role of a request, and what it is here."""

_SERVED = (
    *("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "reduce", "query"),
)
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
"""Fields that change nothing about an answer without tools: they are not read."""
_ONLY = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields of which only these values are served: they ask for nothing."""
_OF_A_MESSAGE = ("role", "content", "name")


@dataclass(frozen=True)
class ImageAddress:
    """An image of a message.

    Attributes:
        url: data URL, web address or file URL.
        name: where it is in the request, such as `messages[0].content[1]`.
    """

    url: str
    name: str


@dataclass(frozen=True)
class Turn:
    """A message of a request, before its images are read."""

    role: str
    parts: tuple[str | ImageAddress, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A request, checked as far as its text tells.

    Attributes:
        turns: the dialogue.
        searches: one for each answer that is wanted (`n`).
        reduce: token reduction; None: the server's own.
        query: what the CLIP text tower reads; None: the text of the last message.
        is_streamed: whether pieces are sent as they come.
        is_usage_streamed: whether the last event of a stream says what was used.
    """

    turns: tuple[Turn, ...]
    searches: tuple[Search, ...]
    reduce: str | None
    query: str | None
    is_streamed: bool
    is_usage_streamed: bool


def read_request(data: object, model: str, limits: Limits, max_new_tokens: int) -> ChatRequest:
    """Read the body of a request.

    Args:
        data: the parsed JSON.
        model: the name of the only model there is.
        limits: of the server.
        max_new_tokens: length limit of an answer where the request has none.

    Raises:
        Refusal: 404 for another model, 400 for all else.
    """
    if not isinstance(data, dict):
        raise Refusal(f"the body: expected a JSON object, not {_kind(data)}")
    fields = {name: value for name, value in data.items() if value is not None}
    _check_names(fields)
    _check_model(fields.get("model"), model)
    turns = tuple(_read_turn(message, f"messages[{i}]") for i, message in enumerate(_list(fields, "messages")))
    num_images = sum(isinstance(part, ImageAddress) for turn in turns for part in turn.parts)
    if num_images > limits.images:
        raise Refusal(f"{num_images} images; a request has {limits.images} at most", "messages", code="too_many_images")
    is_streamed = _get(fields, "stream", bool, False)
    options = _get(fields, "stream_options", dict, {})
    if options and not is_streamed:
        raise Refusal("stream_options: only with stream", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise Refusal(f"stream_options: unknown: {', '.join(sorted(unknown))}", "stream_options")
    return ChatRequest(
        turns=turns,
        searches=_read_searches(fields, max_new_tokens),
        reduce=_get(fields, "reduce", str, None),
        query=_get(fields, "query", str, None),
        is_streamed=is_streamed,
        is_usage_streamed=_get(options, "include_usage", bool, False),
    )


def _check_names(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _ONLY and value not in _ONLY[name]:
            served = f" but {' or '.join(map(repr, _ONLY[name]))}" if _ONLY[name] else ""
            raise Refusal(f"{name}: no value{served} is served here", name, code="unsupported_value")
        if name not in (*_SERVED, *_WITHOUT_EFFECT, *_ONLY):
            closest = difflib.get_close_matches(name, _SERVED, n=1)
            hint = f"; did you mean {closest[0]}?" if closest else ""
            raise Refusal(f"unknown parameter: {name[:64]!r}{hint}", name[:64], code="unknown_parameter")


def _check_model(asked: object, model: str) -> None:
    if not isinstance(asked, str):
        raise Refusal(f"model: expected {model!r}", "model")
    if asked != model:
        raise Refusal(
            f"the model {asked[:200]!r} is not served here: expected {model!r}",
            "model", status=404, code="model_not_found",
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- messages
def _read_turn(message: object, name: str) -> Turn:
    if not isinstance(message, dict):
        raise Refusal(f"{name}: expected an object, not {_kind(message)}", name)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{name}.role {_show(role)}: expected {', '.join(ROLES)}", f"{name}.role")
    for key, value in message.items():
        # An answer comes back as the client's library holds it, with everything that it could have been.
        if key not in _OF_A_MESSAGE and value not in (None, []):
            raise Refusal(f"{name}.{key[:64]}: not served here", f"{name}.{key[:64]}", code="unsupported_value")
    content, where = message.get("content"), f"{name}.content"
    if isinstance(content, str):
        return Turn(ROLES[role], (content,))
    if not isinstance(content, list) or not content:
        raise Refusal(f"{where}: expected a text, or a list of parts that is not empty, not {_kind(content)}", where)
    parts = tuple(_read_part(part, f"{where}[{i}]", role) for i, part in enumerate(content))
    return Turn(ROLES[role], parts)


def _read_part(part: object, name: str, role: str) -> str | ImageAddress:
    if not isinstance(part, dict):
        raise Refusal(f"{name}: expected an object with a type, not {_kind(part)}", name)
    kind = part.get("type")
    if kind == "text":
        return _get(part, "text", str, parent=name)
    if kind != "image_url":
        raise Refusal(f"{name}.type {_show(kind)}: expected text or image_url", f"{name}.type")
    if role != "user":
        raise Refusal(f"{name}: an image is in a message of the user, not of the {role}", name)
    image = _get(part, "image_url", dict, parent=name)
    if unknown := set(image) - {"url", "detail"}:  # an image is prepared in one way here, whatever its `detail`
        raise Refusal(f"{name}.image_url: unknown: {_show(min(unknown))}", f"{name}.image_url")
    return ImageAddress(_get(image, "url", str, parent=f"{name}.image_url"), name)


# ------------------------------------------------------------------------------------------------------------- search
def _read_searches(fields: Mapping[str, Any], max_new_tokens: int) -> tuple[Search, ...]:
    """Read how answers are searched for; with a seed, each further answer has the next one."""
    count = _get(fields, "n", int, 1)
    if not 1 <= count <= MAX_CHOICES:
        raise Refusal(f"n {_show(count)}: expected 1 to {MAX_CHOICES}", "n")
    top_p = _get(fields, "top_p", float, 1.0)
    settings = {
        "temperature": _get(fields, "temperature", float, 1.0),
        "top_p": None if top_p == 1 else top_p,
        "max_new_tokens": _read_length(fields, max_new_tokens),
    }
    stop, num_logprobs, seed = _read_stop(fields), _read_logprobs(fields), _get(fields, "seed", int, None)
    seeds = [seed] + [None if seed is None else (seed + i) % 2**64 for i in range(1, count)]
    try:
        return tuple(Search(Sampling(**settings, seed=each), stop, num_logprobs) for each in seeds)
    except InputError as error:
        name = str(error).partition(" ")[0].rstrip(":")  # the line begins with the setting
        raise Refusal(str(error), name) from None


def _read_length(fields: Mapping[str, Any], default: int) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(names) == 2:
        raise Refusal("max_tokens and max_completion_tokens: give one of them", "max_tokens")
    if not names:
        return default
    length = _get(fields, names[0], int)
    if not 1 <= length <= MAX_NEW_TOKENS:
        raise Refusal(f"{names[0]} {_show(length)}: expected 1 to {MAX_NEW_TOKENS}", names[0])
    return length


def _read_stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(each, str) for each in stops):
        raise Refusal(f"stop: expected a text, or a list of at most {MAX_STOPS} texts", "stop")
    return tuple(stops)


def _read_logprobs(fields: Mapping[str, Any]) -> int | None:
    is_wanted, count = _get(fields, "logprobs", bool, False), _get(fields, "top_logprobs", int, None)
    if count is not None and not is_wanted:
        raise Refusal("top_logprobs: only with logprobs", "top_logprobs")
    return (count or 0) if is_wanted else None


# ------------------------------------------------------------------------------------------------------ types of values
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}
_REQUIRED = object()


def _get(fields: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED, *, parent: str = "") -> Any:
    """Return a field of one type.

    Args:
        fields: an object of the request.
        name: of the field.
        kind: str, bool, int, float (which whole numbers are as well), dict or list.
        default: where the field is missing; without one it is required.
        parent: path of the object in the request.

    Raises:
        Refusal: missing, or of another type.
    """
    value, path = fields.get(name), f"{parent}.{name}" if parent else name
    if value is None and default is not _REQUIRED:
        return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise Refusal(f"{path}: expected {_WORDS[kind]}, not {_kind(value)}", path)
    return value


def _list(fields: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = _get(fields, name, list)
    if not found:
        raise Refusal(f"{name}: the list is empty", name)
    return found


def _kind(value: object) -> str:
    """Name the type of a JSON value."""
    if value is None:
        return "nothing"
    return "a number" if type(value) in (int, float) else _WORDS[type(value)]


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
