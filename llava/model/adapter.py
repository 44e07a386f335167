"""Checkpoints that hold a part of the weights and need their base model: LoRA adapters, and projectors alone.

A LoRA folder holds `adapter_config.json`, the adapter and `non_lora_trainables.bin` (the projector); a stage-1 folder
`mm_projector.bin`. Both hold the config.json of the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.checkpoint_folder import PROJECTOR_FILE
from llava.model.config_rules import (
    ADAPTER_RULES,
    CONFIG_FILE,
    check_config,
    check_values,
    family_of,
    read_settings,
    require,
)
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.families import classes_of
from llava.model.language_model.generation_settings import add_end_tokens
from llava.model.multimodal_encoder.loading import build_empty, load_quietly, resolve_name
from llava.model.multimodal_projector.builder import PROJECTOR_PREFIX
from llava.model.stored_weights import (
    Shapes,
    check_dtypes,
    check_finite,
    find_file,
    first_line,
    iterate_tensors,
    list_dtypes,
    read_dtypes,
    read_shapes,
    refuse_missing,
    refuse_shape,
    refuse_unknown,
)

ADAPTER_CONFIG_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
EMBEDDING_KEY = "model.embed_tokens.weight"  # in a part whose training added tokens (`mm_use_im_start_end`)
WRAPPER_PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


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
        settings = parse_record(read_text(Path(adapter)), adapter)
        require(settings, ("peft_type", "r"), adapter)
        check_values(settings, ADAPTER_RULES, adapter)
        return Part(path, weights, settings.get("base_model_name_or_path"), is_lora=True)
    projector = find_file(path, PROJECTOR_FILE)
    return None if projector is None else Part(path, projector)


def load_on_base(part: Part, base: str, config: PreTrainedConfig, settings: dict, merge: bool) -> LlavaCausalLM:
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
    values, file = read_settings(base, CONFIG_FILE, "model base")
    check_config(values, file, "model base")
    if family_of(values.get("model_type")) != family_of(config.model_type):
        raise InputError(
            f'model base {base} has model_type "{values.get("model_type")}", and {part.path} was trained on another '
            f"language model (model_type {config.model_type})"
        )
    kind = classes_of(config).model
    weights = read_weights(part.weights_file)
    tower = getattr(config, "mm_vision_tower", None)
    if tower:
        config.mm_vision_tower = resolve_name(tower, part.path)  # relative names start at the part, not at its base
    config._name_or_path = base  # whose weights may hold the tower
    empty, base_has_projector = build_empty(kind, config), bool(values.get("mm_vision_tower"))
    check_rest(empty, weights, part.weights_file, base_has_projector)
    num_tokens, num_known = config.vocab_size, values.get("vocab_size", config.vocab_size)
    adds_tokens = EMBEDDING_KEY in weights and num_tokens > num_known
    if adds_tokens:
        config.vocab_size = num_known
    model, _ = load_quietly(kind, base, what="model base", optional=tuple(weights), config=config, **settings)
    if adds_tokens:
        model.add_token_rows(num_tokens)
    model.config.mm_vision_tower, model.config._name_or_path = tower, part.path
    model.load_state_dict(weights, strict=False)
    add_end_tokens(model, config.eos_token_id)  # training may have taught another end than the base's
    return _attach(model, part, base, merge) if part.is_lora else model


def read_weights(file: str) -> dict[str, Tensor]:
    """Read `non_lora_trainables.bin` or `mm_projector.bin` under the model's own names.

    Raises:
        InputError: not a file of tensors.
    """
    weights = {}
    for name, value in iterate_tensors(file):
        own = name.removeprefix(WRAPPER_PREFIX)
        if PROJECTOR_PREFIX in own:
            own = f"model.{PROJECTOR_PREFIX}{own.split(PROJECTOR_PREFIX, 1)[1]}"
        weights[own] = value
    check_dtypes(list_dtypes(weights), weights, file)
    check_finite(weights.items(), file)
    return weights


def check_rest(model: LlavaCausalLM, weights: Mapping[str, Tensor], file: str, base_has_projector: bool) -> None:
    """Refuse weights that do not fit the model, or leave it without a projector.

    Args:
        model: the base; its values are not looked at.
        weights: to be put into it.
        file: for the message.
        base_has_projector: whether the base is a LLaVA itself.

    Raises:
        InputError: the first that does not fit, with both shapes, or is missing.
    """
    own = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, value in weights.items():
        if name not in own:
            raise InputError(f"{file}: the model has no {name}")
        if own[name] != tuple(value.shape):
            shapes = f"shape {list(value.shape)}, the base model's is {list(own[name])}"
            raise InputError(f"{file}: {name} has {shapes}: another base?")
    if not base_has_projector:
        refuse_missing({name for name in own if PROJECTOR_PREFIX in name} - set(weights), file)


def _attach(model: LlavaCausalLM, part: Part, base: str, merge: bool) -> LlavaCausalLM:
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds, and few checkpoints need it

    file = find_adapter_weights(part)
    stored = check_adapter(model, file, base)
    try:
        wrapped = PeftModel.from_pretrained(model, part.path, autocast_adapter_dtype=False)
        expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(wrapped).items()}
    except Exception as error:
        # Many kinds, from peft's own checks of the settings.
        raise InputError(f"LoRA adapter {part.path} does not fit the base model {base}: {first_line(error)}") from error
    refuse_missing(set(expected) - set(stored), f"LoRA adapter {file}")
    refuse_unknown(set(stored) - set(expected), f"LoRA adapter {file}")
    check_finite(((name, value) for name, value in wrapped.named_parameters() if "lora_" in name), file)
    return wrapped.merge_and_unload() if merge else wrapped.base_model.model


def find_adapter_weights(part: Part) -> str:
    """Find the file of a LoRA adapter's weights.

    Raises:
        InputError: there is none.
    """
    file = next((found for name in ADAPTER_WEIGHTS if (found := find_file(part.path, name))), None)
    if file is None:
        raise InputError(f"{part.path} has {ADAPTER_CONFIG_FILE}, but no {ADAPTER_WEIGHTS[0]}: copy the folder again")
    return file


def check_adapter(model: LlavaCausalLM, file: str, base: str) -> Shapes:
    """Refuse an adapter of another base: each pair must fit a linear layer of the model, `[r, in]` and `[out, r]`.

    Args:
        model: the base; its values are not looked at.
        file: the adapter's weights.
        base: for the message.

    Returns:
        Names and shapes of the adapter's tensors.

    Raises:
        InputError: the first tensor that does not fit, with both shapes.
    """
    stored, modules = read_shapes(file), dict(model.named_modules())
    what = f"LoRA adapter {file} on {base}"
    for name, shape in stored.items():
        path, _, kind = name.removeprefix(WRAPPER_PREFIX).partition(".lora_")
        layer = modules.get(path)
        if kind and layer is None:
            raise InputError(f"{what}: {name} belongs to a layer that the base model has not: another base?")
        if not kind or not isinstance(layer, nn.Linear):
            continue  # peft's own check names it
        expected = (shape[0], layer.in_features) if kind.startswith("A") else (layer.out_features, shape[-1])
        if tuple(shape) != expected:
            refuse_shape(name, shape, expected, what, "the base model")
    check_dtypes(read_dtypes(file), stored, what)
    return stored
