"""Settings of transformers' `generate`: where they are found, which ones image tokens cannot take, where it ends."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from llava.errors import InputError

SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k")
IN_PIECES = ("prefill_chunk_size", "assistant_model")
"""Settings of `generate` under which transformers reads a prompt in pieces, or by its ids alone."""


def find_setting(model: PreTrainedModel, arguments: Mapping[str, object], name: str) -> object:
    """A setting of `generate`, where transformers looks for it: the call, its config, the model's config."""
    places = [arguments.get(name)]
    places += [getattr(arguments.get("generation_config"), name, None)]
    places += [getattr(model.generation_config, name, None)]
    return next((value for value in places if value is not None), None)


def refuse_in_pieces(model: PreTrainedModel, arguments: Mapping[str, object], names: Sequence[str]) -> None:
    """Refuse those settings of `generate` under which a prompt with image tokens would not be read in one piece."""
    for name in names:
        if find_setting(model, arguments, name) is not None:
            raise InputError(f"a reduced prompt is read in one piece, and alone: leave out {name}")


def refuse_other_cache(model: PreTrainedModel, arguments: Mapping[str, object], method: str) -> None:
    """Refuse a kind of cache beside the one that a method inside the language model brings."""
    if find_setting(model, arguments, "cache_implementation") is not None:
        raise InputError(f"{method} has its own cache: leave out cache_implementation")


def settle_contradictions(settings: dict[str, object]) -> dict[str, object]:
    """Leave out generation arguments that contradict others, of which transformers would warn."""
    if not settings.get("do_sample"):
        # LLaVA's callers pass temperature=0 with greedy decoding.
        settings = {key: value for key, value in settings.items() if key not in SAMPLING_ARGUMENTS}
    if settings.get("max_new_tokens") is not None:
        # Released generation configs set max_length too; the call's own limit counts.
        settings = {"max_length": None} | settings
    return settings


def add_end_tokens(model: PreTrainedModel, tokens: int | Sequence[int] | None) -> None:
    """Let generation stop at some tokens too, besides those at which it stops already; saved checkpoints say so.

    Args:
        model: a causal language model; its config and generation config are changed where a token is new.
        tokens: one id, several or none.
    """
    known, new = list_tokens(model.generation_config.eos_token_id), list_tokens(tokens)
    if not set(new) <= set(known):
        model.generation_config.eos_token_id = model.config.eos_token_id = list(dict.fromkeys(known + new))


def list_tokens(tokens: int | Sequence[int] | None) -> list[int]:
    """Return the ids of an entry of a generation config, which is one id, several or none, as a list."""
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
