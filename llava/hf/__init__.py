"""Token reduction inside transformers' own LLaVA classes; see docs/transformers.md."""

from llava.hf.reduction import ReducedModel, reduce_tokens

__all__ = ["ReducedModel", "reduce_tokens"]
