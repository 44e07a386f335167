"""How many positions each record takes in the language model: text, and what the token reduction leaves of images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava.budgets import expect_tokens
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.mm_utils import tokenize_prompts
from llava.model.language_model.causal import LlavaCausalLM
from llava.train.dataset import TextFormat
from llava.train.flags import DataArguments
from llava.train.preflight import ImageTokens, count_positions, list_canvases
from llava.train.store import Record, Records
from llava.train.targets import render

RECORDS_AT_A_TIME = 1_000


def expect_image_tokens(model: LlavaCausalLM, data_args: DataArguments) -> ImageTokens:
    """Find out how many tokens an image leaves; see `llava.budgets.expect_tokens`.

    Args:
        model: with its tower and its token reduction.
        data_args: say whether images have several crops; newline tokens between rows of crops are not counted.
    """
    tower = model.get_vision_tower()
    per_view, is_exact = expect_tokens(model.token_reducer, tower.grid)
    return ImageTokens(per_view, is_exact, list_canvases(data_args), tower.image_size)


def count_lengths(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
    limit: int,
    tokens: ImageTokens | None,
    folder: str | Path | None,
) -> np.ndarray:
    """Count the positions of each record, int32[S], tokenizing its text.

    Args:
        records: the training set.
        tokenizer: the language model's.
        text_format: template and placeholder.
        limit: `--model_max_length`, at which sequences are cut.
        tokens: of an image; None: there are none.
        folder: the image folder, to read the sizes of images of several crops.
    """
    lengths = []
    for start in range(0, len(records), RECORDS_AT_A_TIME):
        some = records[start : start + RECORDS_AT_A_TIME]
        for record, num_text in zip(some, _count_text(some, tokenizer, text_format), strict=True):
            total = num_text + sum(count_positions(image, tokens, folder) for image in record.images)
            lengths.append(min(total, limit))
    return np.array(lengths, np.int32)


def _count_text(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, text_format: TextFormat
) -> Iterator[int]:
    prompts = [render(record.turns, text_format.template, text_format.placeholder).prompt for record in records]
    try:
        rows = tokenize_prompts(prompts, tokenizer)
    except InputError:
        # A text that no tokenizer takes is named, or replaced, when its sample is built.
        return (record.num_words for record in records)
    return (sum(token != IMAGE_TOKEN_INDEX for token in row) for row in rows)
