"""What a tokenizer says about dialogues: its chat template as a conversation template, end token and sequence start.

Instruction-tuned language models bring a chat template, a Jinja program of the tokenizer, and were trained to stop with
its end token. Here it is run on a dialogue of probes: what stands around them opens and closes every turn. So all that
works with LLaVA's templates works with it: prompts, masks, recovered questions.
"""

import dataclasses

from llava.conversation import Conversation, SeparatorStyle, conv_templates, take_parts, to_jinja
from llava.errors import InputError
from llava.protocols import Tokenizer

CHAT_TEMPLATE = "chat_template"
"""As the name of a conversation template: the tokenizer's own."""

PROBES = ("Probe 1 asks", "Probe 1 answers", "Probe 2 asks", "Probe 2 answers", "Probe 3 asks")
"""Texts without markup, and without white space at the ends, which some templates strip."""
SYSTEM_PROBE = "Probe 0 rules"

_ADVICE = "name a conversation template, such as vicuna_v1"


def read_chat_template(tokenizer: Tokenizer) -> Conversation:
    """Make a conversation template of a tokenizer's chat template.

    The template's own system message stays. Texts are put in as they are, also where the chat template strips them. The
    sequence start is left out if the tokenizer puts it before every text anyway.

    Raises:
        InputError: there is none, it cannot be run, it does not put every turn between the same two texts, or it ends
            an answer by anything but one special token.
    """
    where = f"tokenizer of {tokenizer.name_or_path}"
    if not has_chat_template(tokenizer):
        raise InputError(f"{where} has no chat template: {_ADVICE}")
    # 1. Dialogues of one to five texts; before each answer also the beginning of its turn.
    try:
        whole = [_render(tokenizer, count, is_open=False) for count in range(1, len(PROBES) + 1)]
        opened = [_render(tokenizer, count, is_open=True) for count in range(1, len(PROBES) + 1, 2)]
    except Exception as error:  # a program of the tokenizer's authors, which may fail in any way
        raise InputError(f"{where}: its chat template takes no dialogue of texts ({error}): {_ADVICE}") from error
    # 2. Read the first turns; the others have to follow from them.
    template = _read_turns(whole, opened)
    if template is None or not _is_faithful(template, whole, opened):
        raise InputError(f"{where}: its chat template does not put every turn between the same two texts: {_ADVICE}")
    # 3. An answer ends with a token at which generation stops.
    if find_end_token(template.sep2.strip(), tokenizer) is None:
        raise InputError(
            f"{where}: its chat template ends an answer with {template.sep2!r}, not with one special token: {_ADVICE}"
        )
    return dataclasses.replace(template, around_system=_read_system(tokenizer, template))


def write_jinja(conv_mode: str, tokenizer: Tokenizer) -> str | None:
    """Write a conversation template, by its name, as Jinja that takes messages of parts.

    Returns:
        The source, see `to_jinja`; None for a template that is no dialogue.
    """
    if conv_mode == CHAT_TEMPLATE:
        return take_parts(tokenizer.chat_template)
    return to_jinja(conv_templates[conv_mode])


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _render(tokenizer: Tokenizer, count: int, *, is_open: bool) -> str:
    """Run the chat template on the first probes; `is_open`: with the beginning of the answer's turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(PROBES[:count])]
    return _run(tokenizer, messages, is_open=is_open)


def _run(tokenizer: Tokenizer, messages: list[dict[str, str]], *, is_open: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    return text.removeprefix(tokenizer.bos_token) if adds_start(tokenizer) else text


def _read_system(tokenizer: Tokenizer, template: Conversation) -> tuple[str, str] | None:
    """Read what stands around a system message; None where the chat template refuses it, or puts it into a turn."""
    try:
        text = _run(tokenizer, [{"role": "system", "content": SYSTEM_PROBE}, {"role": "user", "content": PROBES[0]}])
    except Exception:  # a program of the tokenizer's authors: most that take no such message raise one of Jinja's
        return None
    opening, found, rest = text.partition(SYSTEM_PROBE)
    turn = template.roles[0] + PROBES[0] + template.sep
    return (opening, rest.removesuffix(turn)) if found and rest.endswith(turn) else None


def _read_turns(whole: list[str], opened: list[str]) -> Conversation | None:
    """Read what opens and closes a turn from dialogues of one to five texts; None where it is not to be found."""
    question, answer, second = PROBES[:3]
    head, found, close = whole[0].partition(question)
    if not (found and whole[1].startswith(whole[0]) and whole[2].startswith(whole[1])):
        return None
    opening, found, end = whole[1].removeprefix(whole[0]).partition(answer)
    user, found_too, _ = whole[2].removeprefix(whole[1]).partition(second)
    if not (found and found_too and head.endswith(user)):
        return None
    roles = (user, opening)
    return Conversation(
        head.removesuffix(user), roles, [], sep_style=SeparatorStyle.CHAT, sep=close, sep2=end, version=CHAT_TEMPLATE
    )


def _is_faithful(template: Conversation, whole: list[str], opened: list[str]) -> bool:
    """Whether a template writes dialogues of one to five texts as the chat template does."""

    def write(texts: tuple[str | None, ...]) -> str:
        conversation = template.copy()
        for number, text in enumerate(texts):
            conversation.append_message(conversation.roles[number % 2], text)
        return conversation.get_prompt()

    counts = range(1, len(PROBES) + 1)
    return whole == [write(PROBES[:count]) for count in counts] and [text.rstrip(" ") for text in opened] == [
        write((*PROBES[:count], None)) for count in counts[::2]
    ]


def find_end_token(end: str, tokenizer: Tokenizer) -> int | None:
    """Return the id of the special token that a text is; None if it is none, or several."""
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tokenizer.convert_tokens_to_ids(end) if end in special else None


def adds_start(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer puts its sequence start before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
