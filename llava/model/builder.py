"""Load a LLaVA checkpoint in LLaVA's on-disk layout: language model, projector, tokenizer, vision tower.

Full checkpoints, and with a base model LoRA and projector-only ones.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available, is_bitsandbytes_available

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.adapter import Part, find_part, load_on_base
from llava.model.config_rules import (
    CONFIG_FILE,
    check_config,
    check_pinpoints,
    family_of,
    is_hf_layout,
    read_settings,
    refuse,
)
from llava.model.hf_layout import to_llava_config
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.families import FAMILIES, classes_of
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.stored_weights import NO_WEIGHTS, first_line, holds_weights, list_weight_files
from llava.model.token_reduction import CONFIG_KEY, parse_reduction
from llava.model.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer
from llava.packages import tell_install

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PACKED_ROWS = 32  # per block of a weight that bitsandbytes packs for CPUs with AVX512-BF16
UNQUANTISED = ("model.mm_projector", "model.vision_tower", "lm_head")
DECODER_LAYERS = r"^model\.layers\."
DEFAULT_CONTEXT_LENGTH = 2048  # what LLaVA's loader reports for configs without max_sequence_length


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str | None = None,
    use_flash_attn: bool = False,
    *,
    reduce: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    tower_dtype: torch.dtype | str | None = None,
    customized_config: str | None = None,
    multimodal: bool = True,
    without_layers: bool = False,
) -> tuple[PreTrainedTokenizerBase, LlavaCausalLM, object, int]:
    """Load tokenizer, model and image processor; name, argument order and results are LLaVA's.

    Args:
        model_path: checkpoint folder or hub id.
        model_base: base model of a LoRA or projector-only checkpoint; full checkpoints need none. An adapter is merged
            into the weights, unless these are quantised.
        model_name: accepted because LLaVA's callers pass it; what the folder holds decides, not its name.
        load_8bit: quantise the language model to 8 bit (needs bitsandbytes).
        load_4bit: quantise to 4 bit NF4 (needs bitsandbytes).
        device_map: "auto" spreads over all accelerators; used unless `device` names one device.
        device: "cpu", "cuda", "cuda:1", ...; None: the accelerator if there is one, else the CPU.
        use_flash_attn: shorthand for `attn_implementation="flash_attention_2"`.
        reduce: token reduction instead of config.json's; "none" switches it off; None obeys config.json.
        dtype: of the language model and projector; None: float16 on an accelerator, float32 on the CPU.
            The vision and text towers run in float32, as in the released evaluation, unless `tower_dtype` says
            otherwise.
        torch_dtype: old name of `dtype`.
        attn_implementation: of the language model: "sdpa", "eager", "flash_attention_2", ...
        tower_dtype: of the vision and text towers. Half precision makes them several times faster on an accelerator
            and can move the number of kept patches by a few; the scores themselves stay float32.
        customized_config: path of a config.json to use instead of the checkpoint's.
        multimodal: accepted for lmms-eval; every model here reads images.
        without_layers: leave the decoder's layers out: the model makes image tokens and embeds prompts, and another
            engine, which holds the layers, answers. Of a full checkpoint they are not even read.

    Returns:
        (tokenizer, model in evaluation mode, image processor, context length in tokens).

    Raises:
        InputError: one line for everything that is not as it should be, before any weight is read where possible.
    """
    # 1. All that can be refused before weights are read: settings, files, tokenizer.
    device = choose_device(device)
    tower_dtype = resolve_dtype(tower_dtype or torch.float32)
    settings = _loading_settings(device, device_map, dtype or torch_dtype, load_8bit, load_4bit)
    attention = "flash_attention_2" if use_flash_attn else attn_implementation
    if attention:
        if not isinstance(attention, (str, dict)):
            raise InputError(f'attn_implementation {attention!r}: expected a name such as "sdpa" or "eager"')
        settings["attn_implementation"] = attention
    config = read_config(model_path, customized_config, reduce)
    part = find_weights(model_path, model_base)
    if without_layers:
        _check_layers_are_spare(config, load_8bit or load_4bit)
    tokenizer = load_tokenizer(model_path if part is None or has_tokenizer(model_path) else model_base)
    check_vocabulary(tokenizer, config.vocab_size, model_path)
    # 2. Language model and projector.
    if without_layers:
        model = _load_without_layers(model_path, model_base, part, config, settings).to(device)
    elif part is None:
        kind = classes_of(config).model
        model, _ = load_quietly(kind, model_path, what="checkpoint", config=config, **settings)
    else:
        model = load_on_base(part, model_base, config, settings, merge=not (load_8bit or load_4bit))
    if "device_map" not in settings:
        model.to(device)
    if load_4bit:
        _choose_packing(model)
    model.tokenizer = tokenizer
    # 3. The towers.
    tower = model.get_vision_tower()
    check_tower_fits(config, tower, model_path)
    model.note_budget()
    tower.load_model(device=model.get_input_embeddings().weight.device, dtype=tower_dtype)
    context_length = getattr(config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, tower.image_processor, context_length


def find_weights(model_path: str, model_base: str | None) -> Part | None:
    """Find out whether a checkpoint is full (None) or a part, which needs its base while a full one needs none.

    Raises:
        InputError: a base too many or too few, or weight files that are missing.
    """
    part = None if holds_weights(Path(model_path)) else find_part(model_path)
    if part is None:
        if Path(model_path).is_dir():  # on the hub, transformers fetches and checks
            list_weight_files(model_path)
        if model_base is not None:
            raise InputError(f"{model_path} is a full checkpoint: leave out the model base {model_base}")
    elif model_base is None:
        kind = "LoRA weights" if part.is_lora else "projector weights"
        known = f", e.g. {part.base}" if part.base else ""
        raise InputError(f"{model_path} holds {kind} only: give its base model (--model-base{known})")
    elif Path(model_base).is_dir() and not holds_weights(Path(model_base)):
        raise InputError(f"model base {model_base} {NO_WEIGHTS}")
    return part


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Turn a dtype's name into the dtype.

    Raises:
        InputError: for another name than those of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f'dtype "{dtype}" is unknown: use {", ".join(DTYPES)}')
    return DTYPES[dtype]


def choose_device(device: str | None) -> str:
    """Check the device that a user named, or choose one.

    Args:
        device: "cpu", "cuda:1", ...; None: the accelerator if there is one, else the CPU.

    Raises:
        InputError: for a device that is unknown or not there.
    """
    has_accelerator = torch.accelerator.is_available()
    if device is None:
        return torch.accelerator.current_accelerator().type if has_accelerator else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f'device "{device}" is unknown: use cpu, or an accelerator such as cuda or cuda:0') from None
    if kind != "cpu" and not (has_accelerator and torch.accelerator.current_accelerator().type == kind):
        raise InputError(f'device "{device}" is not available on this machine: use --device cpu')
    return device


def read_config(model_path: str, customized_config: str | None = None, reduce: str | None = None) -> PreTrainedConfig:
    """Read and check the config of a checkpoint, full or part.

    Args:
        model_path: checkpoint folder or hub id.
        customized_config: path of a config.json to use instead.
        reduce: token reduction instead of the config's; "none" switches it off.

    Raises:
        InputError: no config, another kind of model, a wrong value (file, key and value are named).
    """
    folder = Path(model_path).expanduser()
    if not folder.is_dir() and (
        folder.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") != 1
    ):
        raise InputError(f"checkpoint folder {model_path} is not there; give a folder with config.json, or a hub id")
    if customized_config is not None and Path(customized_config).is_file():
        values, file = parse_record(read_text(Path(customized_config)), customized_config), customized_config
    else:
        values, file = read_settings(customized_config or model_path, CONFIG_FILE, "checkpoint")
    if is_hf_layout(values):
        values = to_llava_config(values, file, model_path)
    check_config(values, file)
    config = make_config(values, file)
    if not getattr(config, "mm_vision_tower", None):
        raise InputError(f"{file} names no mm_vision_tower: this is a language model without vision")
    config._name_or_path = model_path
    if reduce is not None:
        setattr(config, CONFIG_KEY, parse_reduction(reduce).spec())
    parse_reduction(getattr(config, CONFIG_KEY, None))
    return config


def make_config(values: dict, file: str) -> PreTrainedConfig:
    """Turn a checked config.json into a config.

    Raises:
        InputError: transformers refuses it.
    """
    kind = FAMILIES[family_of(values.get("model_type"))].config
    # Released checkpoints have "llava", a model type that transformers took for its own class.
    values = values | {"model_type": kind.model_type}
    values["dtype"] = values.pop("torch_dtype", values.get("dtype"))  # the name transformers 5 uses
    methods = sorted(key for key in values if callable(getattr(kind, key, None)))
    if methods:
        raise InputError(f"{file}: {methods[0]} cannot be a setting (transformers has a function of that name)")
    try:
        return kind.from_dict(values)
    except Exception as error:  # transformers' own checks, of many kinds
        raise InputError(f"{file} can't be used: {' '.join(str(error).split())[:200] or first_line(error)}") from error


def check_tower_fits(config: PreTrainedConfig, tower: VisionTower, model_path: str) -> None:
    """Compare a config with the config of its vision tower.

    Raises:
        InputError: another width than the projector's, a layer that does not exist, or crops that do not fit.
    """
    file = f"{model_path}/{CONFIG_FILE}"
    tower.number_of_selected_layer()
    if tower.hidden_size != config.mm_hidden_size:
        refuse(file, "mm_hidden_size", config.mm_hidden_size, f"{tower.hidden_size}, the width of {tower.name}")
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        check_pinpoints(config.image_grid_pinpoints, file, tower.image_size)


def _loading_settings(
    device: str, device_map: str | dict | None, dtype: torch.dtype | str | None, load_8bit: bool, load_4bit: bool
) -> dict:
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None:
        dtype = torch.float32 if on_cpu else torch.float16
    dtype = resolve_dtype(dtype)
    # One device given by the user, or a machine without accelerator: everything there, without dispatch hooks.
    spread = device_map is not None and not on_cpu and ":" not in device
    settings: dict = {"dtype": dtype}
    if is_accelerate_available():  # device maps are its work
        settings["device_map"] = device_map if spread else {"": device}
    for name, value in (("load_8bit", load_8bit), ("load_4bit", load_4bit)):
        if value not in (None, True, False):
            raise InputError(f"{name} {value!r}: expected True or False")
    if load_8bit and load_4bit:
        raise InputError("a model is quantised to 8 or to 4 bit, not to both: give one of load_8bit and load_4bit")
    if load_8bit or load_4bit:
        if not is_bitsandbytes_available():
            raise InputError(f"quantising to 8 or 4 bit needs bitsandbytes: {tell_install('bitsandbytes')}")
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=list(UNQUANTISED),
        )
    return settings


def _check_layers_are_spare(config: PreTrainedConfig, quantises: bool) -> None:
    """Refuse what works on the decoder's layers, where they are left out."""
    inside = parse_reduction(getattr(config, CONFIG_KEY, None)).inside
    if inside is not None:
        raise InputError(
            f"{inside.spec()} drops image tokens between layers of the language model, which another engine runs: "
            "choose a method before the language model, e.g. --reduce TRIM:-1"
        )
    if quantises:
        raise InputError("8 and 4 bit are for the language model's layers, which another engine runs: leave them out")


def _load_without_layers(
    model_path: str, model_base: str | None, part: Part | None, config: PreTrainedConfig, settings: dict
) -> LlavaCausalLM:
    """Load all of a language model but its layers, on the CPU; what an adapter changes is merged first."""
    settings = {key: value for key, value in settings.items() if key != "device_map"}
    if part is not None:
        model = load_on_base(part, model_base, config, settings, merge=True)
        model.get_model().layers = nn.ModuleList()
        return model
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    kind = classes_of(config).model
    model, _ = load_quietly(kind, model_path, what="checkpoint", config=config, ignored=(DECODER_LAYERS,), **settings)
    model.config.num_hidden_layers = num_layers
    return model


def _choose_packing(model: nn.Module) -> None:
    """Let 4-bit layers whose shape bitsandbytes cannot pack for this CPU compute as they do on other CPUs.

    It packs every layer at the first question, and fails where rows do not fill blocks or a block of values spans rows.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = not (
                layer.out_features % PACKED_ROWS or layer.in_features % layer.weight.blocksize
            )
