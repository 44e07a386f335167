"""The tokenizer of a tower's text half with its settings, apart from the weights: texts to ids, and their lengths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextIds:
    """A text as a text half reads it, made ahead of it: equal texts are equal.

    Attributes:
        ids: special tokens included, cut at the context length; padded where the text half reads padding.
    """

    ids: tuple[int, ...]


class TextReader(ABC):
    """What a text half reads of a text. It may be handed to other processes.

    Attributes:
        context: the most tokens that the text half reads.
    """

    context: int

    @abstractmethod
    def __call__(self, text: str) -> TextIds:
        """Make the ids of a text, cut at the context length."""

    @abstractmethod
    def count(self, texts: list[str]) -> list[int]:
        """Count the tokens of each text, special ones included and nothing cut."""


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Count the tokens of each text, special ones included and nothing cut."""
    return [len(ids) for ids in tokenizer(texts, verbose=False).input_ids] if texts else []


def read_texts(texts: Sequence[str | TextIds], read: TextReader) -> list[Tensor]:
    """Make ids of the texts that have none yet: S times `int64[T]`."""
    return [torch.tensor((read(text) if isinstance(text, str) else text).ids) for text in texts]
