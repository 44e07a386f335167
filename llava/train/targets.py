"""What the language model reads and what it learns: token ids and labels of one conversation.

The template renders the prompt up to each answer and with it; the characters in between are what the model has to
generate, and the tokenizer's offsets carry them to tokens. So the loss covers exactly what generation would produce
after the same prompt, for any template and tokenizer.

Parity: the released code recomputes positions from the lengths of separately tokenized pieces, and masks a whole sample
without an error when its arithmetic does not add up (several turns with most tokenizers, a separator inside a text,
every MPT conversation with a Llama tokenizer). Where it adds up, ids and labels here are equal to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llava.chat_template import CHAT_TEMPLATE, adds_start, find_end_token, has_chat_template
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.errors import InputError
from llava.mm_utils import tokenize_texts, tokenizer_image_token
from llava.prompt import end_of_turn, find_template, join_turns, query_of
from llava.protocols import Tokenizer

AUTO = "auto"
"""As `--version`: the template follows the tokenizer."""

TRAINABLE_STYLES = (SeparatorStyle.TWO, SeparatorStyle.PLAIN, SeparatorStyle.LLAMA_2, SeparatorStyle.MPT)

NO_CAPTION = "--version plain needs records of two turns with the image placeholder in the first"

SHOWN_CHARACTERS = 80  # of a text in a message

Span = tuple[int, int]  # (start, end) in characters of the prompt


@dataclass(frozen=True)
class Rendered:
    """A conversation as one string.

    Attributes:
        prompt: what the language model reads, image placeholders included.
        answers: character ranges in `prompt` that the model has to generate, end tokens included, and nothing after.
    """

    prompt: str
    answers: tuple[Span, ...]


@dataclass(frozen=True)
class Targets:
    """Token ids with IMAGE_TOKEN_INDEX at the images, and labels with IGNORE_INDEX where there is no loss."""

    input_ids: list[int]
    labels: list[int]


def check_version(version: str) -> None:
    """Check the name that `--version` gives, before there is a tokenizer.

    Raises:
        InputError: an unknown template, or one of a style that training has no masks for.
    """
    known = (AUTO, CHAT_TEMPLATE, *sorted(list_trainable()))
    if version not in known:
        raise InputError(f"--version {version}: no such training template; known: {', '.join(known)}")


def list_trainable() -> list[str]:
    """List the conversation templates that training has masks for, besides a tokenizer's own."""
    return [name for name, conv in conv_templates.items() if conv.sep_style in TRAINABLE_STYLES]


def settle_version(version: str, tokenizer: Tokenizer) -> str:
    """Return the name of the template to train with.

    Args:
        version: of `--version`. `auto` is the tokenizer's own chat template, v1 where it has none.
        tokenizer: the language model's.

    Raises:
        InputError: the tokenizer does not fit: an answer would end with pieces of text, at which generation does not
            stop, instead of one special token; names a template that fits.
    """
    if version == AUTO:
        version = CHAT_TEMPLATE if has_chat_template(tokenizer) else "v1"
    try:
        template = choose_template(version, tokenizer)
    except InputError as error:
        raise InputError(f"--version {version}: {error}") from None
    if template.sep_style is SeparatorStyle.PLAIN or find_end_token(end_of_turn(template), tokenizer) is not None:
        return version
    fitting = list_fitting(tokenizer)
    advice = (
        f"--version {fitting[0]} fits it"
        if fitting
        else "no template that is known here fits it: give it a chat template (chat_template.jinja in its folder)"
    )
    raise InputError(
        f"--version {version} ends an answer with {end_of_turn(template)}, which is not one special token of the "
        f"tokenizer of {tokenizer.name_or_path}: {advice}"
    )


def list_fitting(tokenizer: Tokenizer) -> list[str]:
    """List the templates whose end of turn is one special token of a tokenizer, its own first."""
    own = [CHAT_TEMPLATE] if has_chat_template(tokenizer) else []
    named = ["v1", "qwen_2", *list_trainable()]
    return own + [name for name in named if find_end_token(end_of_turn(conv_templates[name]), tokenizer) is not None]


def choose_template(version: str, tokenizer: Tokenizer | None = None) -> Conversation:
    """Return the conversation template that `--version` names, by a name of `settle_version`.

    Raises:
        InputError: as for `check_version` and `llava.prompt.find_template`.
    """
    check_version(version)
    return find_template(version, tokenizer)


def choose_placeholder(template: Conversation, use_start_end: bool) -> str:
    """Return the text for an image in the prompt: `<image>`, or `<image>` within the template's tags."""
    placeholder = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>" if "mmtag" in template.version else DEFAULT_IMAGE_TOKEN
    if use_start_end:
        placeholder = placeholder.replace(
            DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        )
    return placeholder


def render(turns: Sequence[str], template: Conversation, placeholder: str = DEFAULT_IMAGE_TOKEN) -> Rendered:
    """Render a conversation and find its answers.

    Args:
        turns: texts that alternate between user and assistant, user first, with `<image>` placeholders.
        template: a template of `choose_template`.
        placeholder: the text for an image (see `choose_placeholder`).

    Raises:
        InputError: the plain template, and the conversation is not an image and its caption.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return _render_caption(turns, template)
    conversation = template.copy()
    conversation.messages = []  # without the example turns that a template may have
    answers = []
    closing = template.sep if template.sep2 is None else template.sep2
    behind = len(closing) - len(closing.rstrip())
    for position, turn in enumerate(turns):
        text = turn.replace(DEFAULT_IMAGE_TOKEN, placeholder)
        # A user's turn is read, not learned.
        if position % 2 == 0:
            conversation.append_message(conversation.roles[0], text)
            continue
        # The prompt with the answer still open is what generation starts from: the answer begins where it ends ...
        conversation.append_message(conversation.roles[1], None)
        start = len(conversation.get_prompt())
        # ... and closes with the separator that the template puts after it, which the model learns to stop with. White
        # space behind that is never generated.
        conversation.messages[-1][1] = text
        answers.append((start, len(conversation.get_prompt()) - behind))
    return Rendered(conversation.get_prompt(), tuple(answers))


def is_caption(turns: Sequence[str]) -> bool:
    """Whether a conversation is an instruction with images and a caption, which is what the plain template renders."""
    return len(turns) == len(("instruction", "caption")) and DEFAULT_IMAGE_TOKEN in turns[0]


def _render_caption(turns: Sequence[str], template: Conversation) -> Rendered:
    """Render images, then the caption; the instruction is left out, as the projector learns to describe only."""
    if not is_caption(turns):
        raise InputError(NO_CAPTION)
    images = DEFAULT_IMAGE_TOKEN * turns[0].count(DEFAULT_IMAGE_TOKEN)
    prompt = images + turns[1] + template.sep
    return Rendered(prompt, ((len(images), len(prompt)),))


def choose_query(turns: Sequence[str], rendered: Rendered, source: str) -> str:
    """Return the text by which token reduction chooses the patches of a training sample.

    Args:
        turns: the conversation's texts, user first.
        rendered: the same conversation as a prompt.
        source: `questions`: the user's turns, as at inference, when no answer is known. `turns`: the same, to be
            embedded one by one. `conversation`: the whole prompt with system message, roles and answers, as in the
            released training code.
    """
    if source == "conversation":
        return query_of(rendered.prompt)
    return join_turns(turns[::2], source)


def build_targets(rendered: Rendered, tokenizer: Tokenizer) -> Targets:
    """Tokenize a conversation and label its answers.

    Args:
        rendered: the conversation.
        tokenizer: the language model's tokenizer.

    Returns:
        The ids of `tokenizer_image_token` and their labels, not truncated.
    """
    # 1. Ids as at inference, and for each token whether it belongs to an answer.
    if tokenizer.is_fast:
        # By the characters that the tokenizer says each token covers.
        ids, spans = _tokenize_with_spans(rendered.prompt, tokenizer)
        is_answer = [_ends_inside(span, rendered.answers) for span in spans]
    else:
        # Without offsets: by tokenizing the prompt up to each boundary.
        ids = tokenizer_image_token(rendered.prompt, tokenizer)
        is_answer = _find_answers_by_prefix(ids, rendered, tokenizer)
    # 2. Labels: the answers' own ids. The model shifts them by one position when it computes the loss.
    labels = [token if learned else IGNORE_INDEX for token, learned in zip(ids, is_answer, strict=True)]
    return Targets(ids, labels)


def _ends_inside(span: Span, answers: Sequence[Span]) -> bool:
    """Whether a token ends inside an answer; a token that begins in the prompt and ends in the answer does."""
    return span[0] < span[1] and any(start < span[1] <= end for start, end in answers)


def _tokenize_with_spans(prompt: str, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Tokenize as `tokenizer_image_token` does, and find the characters that each token covers.

    Returns:
        Ids, and character ranges in `prompt`; those of images and of the sequence start are empty.
    """
    ids: list[int] = []
    spans: list[Span] = []
    position, has_start = 0, adds_start(tokenizer)
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        chunk_ids, chunk_spans = _tokenize_chunk(chunk, tokenizer)
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((position, position))
            position += len(DEFAULT_IMAGE_TOKEN)
        skipped = int(number > 0 and has_start)
        ids += chunk_ids[skipped:]
        spans += [(position + start, position + end) for start, end in chunk_spans[skipped:]]
        position += len(chunk)
    return ids, spans


def _tokenize_chunk(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Tokenize text between images; the ids are those of `tokenize_texts`, which may put a space in front.

    A token of that space alone counts as one of the first character.
    """
    (ids,) = tokenize_texts([text], tokenizer)
    for added in (0, 1):
        encoding = tokenizer(" " * added + text, return_offsets_mapping=True)
        if encoding.input_ids == ids:
            spans = encoding.offset_mapping
            return ids, [(max(start - added, 0), max(end - added, min(end, 1))) for start, end in spans]
    raise InputError(f"{type(tokenizer).__name__} does not reproduce its own ids for {text[:SHOWN_CHARACTERS]!r}")


def _find_answers_by_prefix(ids: list[int], rendered: Rendered, tokenizer: Tokenizer) -> list[bool]:
    """Find the answers' tokens with a tokenizer that gives no offsets.

    A token lies before a boundary if the text up to the boundary, tokenized alone, starts with the same tokens.
    """
    is_answer = [False] * len(ids)
    for answer in rendered.answers:
        first, last = (_count_common(ids, tokenizer_image_token(rendered.prompt[:end], tokenizer)) for end in answer)
        is_answer[first:last] = [True] * (last - first)
    return is_answer


def _count_common(ids: list[int], prefix: list[int]) -> int:
    pairs = zip(ids, prefix, strict=False)
    return next((number for number, (left, right) in enumerate(pairs) if left != right), min(len(ids), len(prefix)))
