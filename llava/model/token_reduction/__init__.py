"""Token reduction: which of an image's tokens reach the projector and the language model."""

from llava.model.token_reduction.base import TEXT, Budget, Need, ReducedTokens, TokenReducer, VisualTokens
from llava.model.token_reduction.registry import CONFIG_KEY, REDUCERS, parse_reducer

__all__ = [
    "CONFIG_KEY",
    "REDUCERS",
    "TEXT",
    "Budget",
    "Need",
    "ReducedTokens",
    "TokenReducer",
    "VisualTokens",
    "parse_reducer",
]
