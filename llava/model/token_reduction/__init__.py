"""Token reduction: which of an image's tokens reach the projector and the language model."""

from llava.model.token_reduction.base import TEXT, Budget, Need, ReducedTokens, TokenReducer, VisualTokens
from llava.model.token_reduction.layers import LayerReducer
from llava.model.token_reduction.registry import (
    CONFIG_KEY,
    LAYER_REDUCERS,
    REDUCERS,
    Reduction,
    Target,
    methods_without_cls,
    parse_reducer,
    parse_reduction,
    read_target,
)
from llava.model.token_reduction.varying import RANGE_KEY, TrainingReduction, read_training_reduction

__all__ = [
    "CONFIG_KEY",
    "LAYER_REDUCERS",
    "RANGE_KEY",
    "REDUCERS",
    "TEXT",
    "Budget",
    "LayerReducer",
    "Need",
    "ReducedTokens",
    "Reduction",
    "Target",
    "TokenReducer",
    "TrainingReduction",
    "VisualTokens",
    "methods_without_cls",
    "parse_reducer",
    "parse_reduction",
    "read_target",
    "read_training_reduction",
]
