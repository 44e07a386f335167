"""The question a prompt asks, recovered from its ids: what TRIM reads where clients pass no query.

Third-party clients call `generate(input_ids, images=...)` without any text. The query is then the last user turn of
the prompt, without roles, system prompt and image placeholders.
"""

import re

from torch import Tensor

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.protocols import Tokenizer

# (what opens a user turn, what closes it) in the known conversation templates, most specific first.
USER_TURNS = (
    ("<|im_start|>user", "<|im_end|>"),
    ("[INST]", "[/INST]"),
    ("USER:", "ASSISTANT:"),
    ("### Human:", "### Assistant:"),
    ("###Human:", "###Assistant:"),
    ("Human:", "Assistant:"),
)
SYSTEM_BLOCK = re.compile(r"<<SYS>>.*?<</SYS>>", re.DOTALL)


def find_question(prompt: str) -> str:
    """Cut the last user turn out of a decoded prompt.

    Args:
        prompt: the whole prompt, image placeholders removed already or still as `<image>`.

    Returns:
        The turn's text, stripped; the whole prompt where it has no known role.
    """
    for opening, closing in USER_TURNS:
        start = prompt.rfind(opening)
        if start >= 0:
            prompt = prompt[start + len(opening) :].split(closing)[0]
            break
    prompt = SYSTEM_BLOCK.sub("", prompt)
    for token in (DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, DEFAULT_IM_END_TOKEN):
        prompt = prompt.replace(token, "")
    return prompt.strip()


def recover_query(input_ids: Tensor, tokenizer: Tokenizer) -> str:
    """Recover the question from one sample's ids.

    Args:
        input_ids: `int64[T]` without padding, with IMAGE_TOKEN_INDEX at placeholders.
        tokenizer: the language model's tokenizer.

    Returns:
        The last user turn; "" for an empty one.
    """
    ids = [token for token in input_ids.tolist() if token != IMAGE_TOKEN_INDEX]
    return find_question(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
