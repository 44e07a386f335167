"""Checkpoints that hold a part of the weights and need their base model: LoRA adapters, and projectors alone.

A LoRA folder holds `adapter_config.json`, the adapter and `non_lora_trainables.bin` (the projector); a stage-1 folder
`mm_projector.bin`. Both hold the config.json of the whole model.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import cached_file

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.checkpoint_folder import PROJECTOR_FILE
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.loading import load_quietly, resolve_name

ADAPTER_CONFIG_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
WRAPPER_PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps
PROJECTOR_PREFIX = "mm_projector."


@dataclass(frozen=True)
class Part:
    """What a folder holds besides config and tokenizer.

    Attributes:
        path: the folder or hub id.
        weights_file: the weights that replace the base's.
        base: the base model that a LoRA adapter was trained on, or None.
        is_lora: whether there is an adapter.
    """

    path: str
    weights_file: str
    base: str | None = None
    is_lora: bool = False


def find_part(path: str) -> Part | None:
    """Find out what kind of partial checkpoint a folder or hub id is; None for a full one.

    Raises:
        InputError: a LoRA adapter without the other weights that were trained with it, or an unreadable one.
    """
    adapter, weights = find_file(path, ADAPTER_CONFIG_FILE), find_file(path, NON_LORA_FILE)
    if adapter is not None:
        if weights is None:
            raise InputError(f"{path} has {ADAPTER_CONFIG_FILE}, but no {NON_LORA_FILE}: copy the folder again")
        base = parse_record(read_text(Path(adapter)), adapter).get("base_model_name_or_path")
        return Part(path, weights, base, is_lora=True)
    projector = find_file(path, PROJECTOR_FILE)
    return None if projector is None else Part(path, projector)


def find_file(path: str, name: str) -> str | None:
    """Return the path of a file in a folder or hub repository, or None where it has none of that name."""
    try:
        return cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return None


def load_on_base(part: Part, base: str, config: LlavaConfig, settings: dict, merge: bool) -> LlavaLlamaForCausalLM:
    """Load a base model and put a part's weights into it.

    Args:
        part: what `find_part` found.
        base: folder or hub id of a language model or LLaVA checkpoint.
        config: of the part's folder.
        settings: for `from_pretrained`: dtype, device map, quantisation.
        merge: add a LoRA adapter to the weights; else it stays apart (quantised weights cannot take it).

    Returns:
        The model; its towers are not loaded.

    Raises:
        InputError: weights that cannot be read, or do not fit the base.
    """
    weights = read_weights(part.weights_file)
    tower = getattr(config, "mm_vision_tower", None)
    if tower:
        config.mm_vision_tower = resolve_name(tower, part.path)  # relative names start at the part, not at its base
    model, _ = load_quietly(
        LlavaLlamaForCausalLM, base, what="model base", optional=tuple(weights), config=config, **settings
    )
    model.config.mm_vision_tower, model.config._name_or_path = tower, part.path
    _take(model, weights, part.weights_file)
    return _attach(model, part, base, merge) if part.is_lora else model


def read_weights(file: str) -> dict[str, Tensor]:
    """Read `non_lora_trainables.bin` or `mm_projector.bin` under the model's own names.

    Raises:
        InputError: not a file of tensors.
    """
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Many kinds: pickle, zip and end-of-file errors, OSError.
        raise InputError(f"{file} can't be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    weights = {}
    for name, value in stored.items():
        own = name.removeprefix(WRAPPER_PREFIX)
        if PROJECTOR_PREFIX in own:
            own = f"model.{PROJECTOR_PREFIX}{own.split(PROJECTOR_PREFIX, 1)[1]}"
        weights[own] = value
    return weights


def _take(model: LlavaLlamaForCausalLM, weights: dict[str, Tensor], file: str) -> None:
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own:
            raise InputError(f"{file}: the model has no {name}")
        if own[name].shape != value.shape:
            shapes = f"shape {list(value.shape)}, the base model's is {list(own[name].shape)}"
            raise InputError(f"{file}: {name} has {shapes}: another base?")
    model.load_state_dict(weights, strict=False)


def _attach(model: LlavaLlamaForCausalLM, part: Part, base: str, merge: bool) -> LlavaLlamaForCausalLM:
    from peft import PeftModel  # takes seconds, and few checkpoints need it

    try:
        wrapped = PeftModel.from_pretrained(model, part.path, autocast_adapter_dtype=False)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LoRA adapter {part.path} does not fit the base model {base}: {reason}") from error
    return wrapped.merge_and_unload() if merge else wrapped.base_model.model
