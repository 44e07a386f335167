"""Queries that a tower's text half cannot read in one piece: cut at turns and words, embedded by pieces, and pooled.

A checkpoint whose config.json says `"mm_vision_token_reduce_query": "turns"` reads its queries in this way, in training
and after it; all others are cut at the context length, as in the released code.

Shape letters: `S` queries, `Q` pieces of all of them, `P` joint width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.multimodal_encoder.text_reader import TextReader
from llava.prompt import TURN_BREAK


def split_query(query: str, reader: TextReader) -> list[str]:
    """Cut a query at its turns, and turns that are too long at the middle word until every piece fits.

    Returns:
        At least one piece; turns without a word are left out.
    """
    turns = [turn for turn in query.split(TURN_BREAK) if turn.strip()] or [""]
    return [piece for turn in turns for piece in _halve(turn, reader)]


def _halve(text: str, reader: TextReader) -> list[str]:
    if len(text) <= 1 or reader.count([text])[0] <= reader.context:
        return [text]
    words = text.split()
    if len(words) > 1:
        middle = len(words) // 2
        halves = (" ".join(words[:middle]), " ".join(words[middle:]))
    else:
        halves = (text[: len(text) // 2], text[len(text) // 2 :])
    return [piece for half in halves for piece in _halve(half, reader)]


def pool_embeddings(embedded: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pool the pieces of each query: the direction is the mean of their directions, the length their mean length.

    The length matters, because the softmax over patches of a dot product is as sharp as the query is long.

    Args:
        embedded: `float32[Q, P]` the pieces of all queries, one query after the other.
        sizes: S numbers of pieces, from 1 on.

    Returns:
        `float32[S, P]`; a query of one piece is that piece, bit for bit.
    """
    rows = []
    for pieces in embedded.split(list(sizes)):
        direction = F.normalize(F.normalize(pieces, dim=-1).mean(dim=0), dim=-1)
        rows.append(pieces[0] if len(pieces) == 1 else direction * pieces.norm(dim=-1).mean())
    return torch.stack(rows)
