"""What the language model reads and what it is taught: token ids and labels of one conversation.

The prompt is rendered by the conversation template, once up to each answer and once with it; the characters in between
are what the model has to say itself, and the tokenizer's own offsets carry them to tokens. So the loss covers exactly
what generation would produce after the same prompt, for any template and tokenizer.

Parity: the published code recomputes positions from the lengths of separately tokenized pieces and masks a whole sample
without an error when its arithmetic does not add up (several turns with most tokenizers, a separator inside a text,
every MPT conversation read by a Llama tokenizer). Where it adds up, ids and labels here are equal to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

TRAINABLE_STYLES = (SeparatorStyle.TWO, SeparatorStyle.PLAIN, SeparatorStyle.LLAMA_2, SeparatorStyle.MPT)
QUERY_SOURCES = ("questions", "conversation")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as one string.

    Attributes:
        prompt: what the language model reads, image marks included.
        answers: character ranges in `prompt` that the model has to say, end marks included.
    """

    prompt: str
    answers: tuple[Span, ...]


@dataclass(frozen=True)
class Targets:
    """Token ids with IMAGE_TOKEN_INDEX at the image marks, and labels with IGNORE_INDEX where nothing is taught."""

    input_ids: list[int]
    labels: list[int]


def choose_template(version: str) -> Conversation:
    """Return the conversation template that `--version` names.

    Raises:
        InputError: an unknown template, or one that training has no masks for.
    """
    trainable = sorted(name for name, conv in conv_templates.items() if conv.sep_style in TRAINABLE_STYLES)
    if version not in trainable:
        raise InputError(f"--version {version}: no such training template; known: {', '.join(trainable)}")
    return conv_templates[version]


def choose_mark(template: Conversation, use_start_end: bool) -> str:
    """Return what stands in the prompt for an image: the bare mark, or the mark inside the template's tags."""
    mark = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>" if "mmtag" in template.version else DEFAULT_IMAGE_TOKEN
    if use_start_end:
        mark = mark.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
    return mark


def render(turns: Sequence[str], template: Conversation, mark: str = DEFAULT_IMAGE_TOKEN) -> Rendered:
    """Render a conversation and find its answers.

    Args:
        turns: texts of user and assistant in turn, user first, with `<image>` marks.
        template: a template of `choose_template`.
        mark: what to write for an image (see `choose_mark`).
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return _render_caption(turns, template)
    conversation = template.copy()
    conversation.messages = []
    answers = []
    for position, turn in enumerate(turns):
        text = turn.replace(DEFAULT_IMAGE_TOKEN, mark)
        if position % 2 == 0:
            conversation.append_message(conversation.roles[0], text)
            continue
        conversation.append_message(conversation.roles[1], None)
        start = len(conversation.get_prompt())
        conversation.messages[-1][1] = text
        answers.append((start, len(conversation.get_prompt())))
    return Rendered(conversation.get_prompt(), tuple(answers))


def _render_caption(turns: Sequence[str], template: Conversation) -> Rendered:
    """Images, then the caption: the projector learns to say what is there, not to follow an instruction."""
    num_images = turns[0].count(DEFAULT_IMAGE_TOKEN)
    if len(turns) != len(("instruction", "caption")) or not num_images:
        raise InputError("--version plain needs records of two turns with the image mark in the first")
    marks = DEFAULT_IMAGE_TOKEN * num_images
    prompt = marks + turns[1] + template.sep
    return Rendered(prompt, ((len(marks), len(prompt)),))


def choose_query(turns: Sequence[str], rendered: Rendered, source: str) -> str:
    """Return the text by which token reduction chooses the patches of a training sample.

    Args:
        turns: the conversation's texts, user first.
        rendered: the same conversation as a prompt.
        source: `questions`: the user's turns, as at inference, where no answer is known. `conversation`: the whole
            prompt with system sentence, roles and answers, as in the published training.
    """
    if source == "conversation":
        return rendered.prompt.replace(DEFAULT_IMAGE_TOKEN, " ")
    return "\n".join(turn.replace(DEFAULT_IMAGE_TOKEN, "").strip() for turn in turns[::2])


def build_targets(rendered: Rendered, tokenizer: Any) -> Targets:
    """Tokenize a conversation and label its answers.

    Args:
        rendered: the conversation.
        tokenizer: the language model's tokenizer.

    Returns:
        The ids of `tokenizer_image_token` and their labels, not truncated.
    """
    if tokenizer.is_fast:
        ids, spans = _tokenize_with_spans(rendered.prompt, tokenizer)
        taught = [_is_inside(span, rendered.answers) for span in spans]
    else:
        ids = tokenizer_image_token(rendered.prompt, tokenizer)
        taught = _find_taught_by_prefix(ids, rendered, tokenizer)
    return Targets(ids, [token if teach else IGNORE_INDEX for token, teach in zip(ids, taught, strict=True)])


def _is_inside(span: Span, answers: Sequence[Span]) -> bool:
    """Tell whether a token ends inside an answer; one that reaches into it from the prompt does."""
    return span[0] < span[1] and any(start < span[1] <= end for start, end in answers)


def _tokenize_with_spans(prompt: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Tokenize as `tokenizer_image_token` does and tell which characters each token stands for.

    Returns:
        Ids, and character ranges in `prompt`; those of image sentinels and of the sequence start are empty.
    """
    ids: list[int] = []
    spans: list[Span] = []
    position = 0
    for number, chunk in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        chunk_ids, chunk_spans = _tokenize_chunk(chunk, tokenizer)
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((position, position))
            position += len(DEFAULT_IMAGE_TOKEN)
        skipped = int(number > 0 and chunk_ids[:1] == [tokenizer.bos_token_id])
        ids += chunk_ids[skipped:]
        spans += [(position + start, position + end) for start, end in chunk_spans[skipped:]]
        position += len(chunk)
    return ids, spans


def _tokenize_chunk(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Tokenize text between image marks; the ids are those of `tokenize_texts`, which may put a space in front.

    A token of that space alone counts as one of the first character.
    """
    (ids,) = tokenize_texts([text], tokenizer)
    for added in (0, 1):
        encoding = tokenizer(" " * added + text, return_offsets_mapping=True)
        if encoding.input_ids == ids:
            spans = encoding.offset_mapping
            return ids, [(max(start - added, 0), max(end - added, min(end, 1))) for start, end in spans]
    raise RuntimeError(f"{type(tokenizer).__name__} does not reproduce its own ids for {text!r}")


def _find_taught_by_prefix(ids: list[int], rendered: Rendered, tokenizer: Any) -> list[bool]:
    """Find the answers' tokens with a tokenizer that gives no offsets.

    A token belongs to what precedes a boundary when the text up to the boundary, tokenized alone, starts with the same
    tokens.
    """
    taught = [False] * len(ids)
    for answer in rendered.answers:
        first, last = (_count_common(ids, tokenizer_image_token(rendered.prompt[:end], tokenizer)) for end in answer)
        taught[first:last] = [True] * (last - first)
    return taught


def _count_common(ids: list[int], prefix: list[int]) -> int:
    pairs = zip(ids, prefix, strict=False)
    return next((number for number, (left, right) in enumerate(pairs) if left != right), min(len(ids), len(prefix)))
