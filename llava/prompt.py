"""The texts around a question: conversation template, image placeholders, and what the CLIP text tower reads.

Answers depend on every character here; the tests compare with prompts recorded from the released scripts, and
docs/parity.md lists what each entry point sends.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llava.chat_template import CHAT_TEMPLATE, read_chat_template
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.errors import InputError
from llava.protocols import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CONV_MODE = "vicuna_v1"

QUERY_KEY = "mm_vision_token_reduce_query"
"""The flag of training, and the key of config.json, that say which text token reduction reads."""
JOINED_TURNS, POOLED_TURNS = "questions", "turns"
"""Two of its values: the user's turns as one text, cut at the text half's context length; or each turn by itself."""
TURN_BREAK = "\x1e"
"""Between the turns of a query that are embedded one by one: a separator that no question holds."""

MAX_TEXT = 2**20
"""Characters of a text: hundreds of times what the language models read, and tokenized in seconds."""

# (what opens a user turn, what closes it) in the known conversation templates, most specific first.
USER_TURNS = (
    ("<|im_start|>user", "<|im_end|>"),
    ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
    ("[INST]", "[/INST]"),
    ("USER:", "ASSISTANT:"),
    ("### Human:", "### Assistant:"),
    ("###Human:", "###Assistant:"),
    ("Human:", "Assistant:"),
)
SYSTEM_BLOCK = re.compile(r"<<SYS>>.*?<</SYS>>", re.DOTALL)
MARK = re.compile(r"<\S+>|\[\S+\]")
"""A special token that is no text. A tokenizer may keep sentences as special tokens, too, so that they stay whole."""


def recover_text(text: str) -> str:
    """Undo Python's escapes of bytes that are not UTF-8 (PEP 383), as command lines and pipes bring them.

    What is UTF-8 after all is read, every other byte becomes U+FFFD.
    """
    return re.sub(
        "[\udc80-\udcff]+", lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), text
    )


def list_texts(texts: object, num_prompts: int) -> list:
    """List what the CLIP text tower reads for each prompt, where a caller says it.

    Args:
        texts: one text for all prompts, or one for each: strings, or what a tower's `text_reader` made of them.
        num_prompts: of the batch.

    Raises:
        InputError: anything else.
    """
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"texts is a {type(texts).__name__}: give one text per prompt in a list, or one string")
    texts = [texts] * num_prompts if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str) and not hasattr(text, "ids"):
            raise InputError(f"texts hold a {type(text).__name__}: give a string for each prompt")
    if len(texts) != num_prompts:
        raise InputError(f"{len(texts)} texts for {num_prompts} prompts: give one query per prompt, or one string")
    return texts


def check_text(text: str) -> None:
    """Refuse a text that no tokenizer takes.

    Raises:
        InputError: it holds half of a surrogate pair, as JSON may, or is longer than any model reads.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"a text of {len(text):,} characters; {MAX_TEXT:,} are allowed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1} of the text, {text[error.start]!a}, is half of a surrogate pair"
        ) from None


def query_of(text: str) -> str:
    """Return what the CLIP text tower reads for a user's text: all of it, each image placeholder replaced by a space.

    The one rule of every entry point (as in the released scripts). White space at the ends does not matter to CLIP's
    tokenizer. Which text it is differs: a benchmark's question with or without its answering instruction, a user's
    turn, all turns of a training sample; see docs/parity.md.
    """
    return text.replace(DEFAULT_IMAGE_TOKEN, " ")


def join_turns(turns: Sequence[str], source: str = JOINED_TURNS) -> str:
    """Return the query of several user turns.

    Args:
        turns: their texts.
        source: `JOINED_TURNS`: one text, a turn a line. `POOLED_TURNS`: a query that is embedded turn by turn.
    """
    return (TURN_BREAK if source == POOLED_TURNS else "\n").join(query_of(turn).strip() for turn in turns)


def find_question(prompt: str, template: Conversation | None = None) -> str:
    """Cut the last user turn out of a decoded prompt.

    Args:
        prompt: the whole prompt, image placeholders removed already or still as `<image>`.
        template: of a tokenizer's chat template, if the prompt was written with it.

    Returns:
        The turn's text, stripped; the whole prompt where it has no known role.
    """
    own = () if template is None else ((template.roles[0].strip(), (template.sep + template.roles[1]).strip()),)
    for opening, closing in own or USER_TURNS:
        start = prompt.rfind(opening)
        if start >= 0:
            prompt = prompt[start + len(opening) :].split(closing)[0]
            break
    prompt = SYSTEM_BLOCK.sub("", prompt)
    for token in (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN):
        prompt = prompt.replace(token, "")
    return query_of(prompt).strip()


def recover_query(input_ids: "Tensor", tokenizer: Tokenizer, conv_mode: str | None = None) -> str:
    """Recover the question from one sample's ids.

    Args:
        input_ids: `int64[T]` without padding, with IMAGE_TOKEN_INDEX at placeholders.
        tokenizer: the language model's tokenizer.
        conv_mode: `chat_template` where the prompt has the roles of the tokenizer's chat template; else those of the
            known templates are looked for.

    Returns:
        The last user turn; "" for an empty one; the whole prompt where it has no known role.
    """
    # Some templates mark their roles with special tokens, so these are cut out behind the search, not before it.
    template = read_chat_template(tokenizer) if conv_mode == CHAT_TEMPLATE else None
    question = find_question(decode_prompt(input_ids, tokenizer), template)
    for token in tokenizer.all_special_tokens:
        if MARK.fullmatch(token):
            question = question.replace(token, "")
    return question.strip()


def decode_prompt(input_ids: "Tensor", tokenizer: Tokenizer) -> str:
    """Turn a sample's ids `int64[T]` into text, special tokens included and images left out."""
    ids = [token for token in input_ids.tolist() if token != IMAGE_TOKEN_INDEX]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_conv_mode(conv_mode: str) -> None:
    """Check the name of a conversation template, before there is a tokenizer.

    Raises:
        InputError: there is no template of that name; lists those there are, and the closest.
    """
    names = (*conv_templates, CHAT_TEMPLATE)
    if conv_mode not in names:
        closest = difflib.get_close_matches(conv_mode, names, n=1)
        hint = f'; did you mean "{closest[0]}"?' if closest else ""
        raise InputError(f'no conversation template "{conv_mode}"; known: {", ".join(sorted(names))}{hint}')


def find_template(conv_mode: str, tokenizer: Tokenizer | None = None) -> Conversation:
    """Look up a conversation template.

    Args:
        conv_mode: a name of `conv_templates`, or `chat_template`: the tokenizer's own.
        tokenizer: the language model's; only `chat_template` asks for it.

    Raises:
        InputError: there is no template of that name, or the tokenizer has no chat template that can be used.
    """
    check_conv_mode(conv_mode)
    if conv_mode != CHAT_TEMPLATE:
        return conv_templates[conv_mode]
    if tokenizer is None:
        raise InputError(f"the conversation template {CHAT_TEMPLATE} is a tokenizer's own: give the tokenizer")
    return read_chat_template(tokenizer)


def choose_conv_mode(conv_mode: str, model_name: str) -> str:
    """Check the conversation template; models trained on plain captions alone get its `_mmtag` variant (LLaVA's rule).

    Where a template has no such variant, it is used as it is (the released code crashes).

    Raises:
        InputError: there is no such template.
    """
    check_conv_mode(conv_mode)
    is_plain = "plain" in model_name and "finetune" not in model_name.lower()
    variant = f"{conv_mode}_mmtag"
    return variant if is_plain and variant in conv_templates else conv_mode


def place_images(text: str, num_images: int, use_im_start_end: bool = False) -> str:
    """Make sure that a user's turn has one placeholder per image.

    Args:
        text: the turn. If it has exactly one `<image>` per image, they stay where they are; without any, a line with a
            placeholder goes before it for each image.
        num_images: images that enter the dialogue with this turn.
        use_im_start_end: put `<im_start>` and `<im_end>` around each (`mm_use_im_start_end` of the checkpoint).

    Raises:
        InputError: the text has another number of placeholders, or is one that no tokenizer takes.
    """
    check_text(text)
    count = text.count(DEFAULT_IMAGE_TOKEN)
    if count not in (0, num_images):
        raise InputError(
            f"the question has {count} {DEFAULT_IMAGE_TOKEN} placeholders for {num_images} new images: "
            "write one per image, or none"
        )
    turn = text if count else f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    return enclose_images(turn) if use_im_start_end else turn


def enclose_images(text: str) -> str:
    """Put `<im_start>` and `<im_end>` around each image placeholder."""
    return text.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)


def wrap_prompt(
    text: str, num_images: int, conv_mode: str, use_im_start_end: bool = False, tokenizer: Tokenizer | None = None
) -> str:
    """Make the prompt of a dialogue of one turn; arguments and errors as for `place_images` and `find_template`."""
    conversation = find_template(conv_mode, tokenizer).copy()
    conversation.append_message(conversation.roles[0], place_images(text, num_images, use_im_start_end))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def end_of_turn(conversation: Conversation) -> str:
    """Return the text with which the template ends the assistant's turn, without white space around it."""
    two_sided = conversation.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2, SeparatorStyle.CHAT)
    end = conversation.sep2 if two_sided else conversation.sep
    return end.strip() or end
