"""Load a LLaVA checkpoint in LLaVA's on-disk layout: language model, projector, tokenizer, vision tower.

Full checkpoints, and with a base model LoRA and projector-only ones.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.adapter import Part, find_part, load_on_base
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.token_reduction import CONFIG_KEY, parse_reducer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNQUANTISED = ("model.mm_projector", "model.vision_tower", "lm_head")
DEFAULT_CONTEXT_LENGTH = 2048  # what LLaVA's loader reports for configs without max_sequence_length
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


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
) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, object, int]:
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

    Returns:
        (tokenizer, model in evaluation mode, image processor, context length in tokens).

    Raises:
        InputError: one line for everything that is not as it should be, before any weight is read where possible.
    """
    device = choose_device(device)
    tower_dtype = resolve_dtype(tower_dtype or torch.float32)
    config = _read_config(model_path, customized_config, reduce)
    part = _find_part(model_path, model_base)
    tokenizer = load_tokenizer(model_path if part is None or _has_tokenizer(model_path) else model_base)
    settings = _loading_settings(device, device_map, dtype or torch_dtype, load_8bit, load_4bit)
    attention = "flash_attention_2" if use_flash_attn else attn_implementation
    if attention:
        settings["attn_implementation"] = attention
    if part is None:
        model, _ = load_quietly(LlavaLlamaForCausalLM, model_path, what="checkpoint", config=config, **settings)
    else:
        model = load_on_base(part, model_base, config, settings, merge=not (load_8bit or load_4bit))
    if "device_map" not in settings:
        model.to(device)
    model.tokenizer = tokenizer
    _clean_generation_config(model)
    tower = model.get_vision_tower()
    if tower is None:
        raise InputError(f"{model_path}/config.json names no mm_vision_tower: this is a language model without vision")
    tower.load_model(device=model.get_input_embeddings().weight.device, dtype=tower_dtype)
    context_length = getattr(config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, tower.image_processor, context_length


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer with the ids of LLaVA's code.

    `AutoTokenizer` of transformers 5 loses the leading space of Llama's sentencepiece vocabulary; the Llama class
    keeps it.

    Args:
        model_path: checkpoint folder or hub id.

    Returns:
        The tokenizer.

    Raises:
        InputError: when there is none, or it can't be read.
    """
    folder = Path(model_path)
    # transformers 5 would make up an empty vocabulary here.
    if folder.is_dir() and not _has_tokenizer(model_path):
        raise InputError(f"checkpoint {model_path} has no tokenizer: expected {' or '.join(TOKENIZER_FILES)} there")
    settings_file = folder / "tokenizer_config.json"
    try:
        settings = parse_record(read_text(settings_file), str(settings_file)) if settings_file.is_file() else {}
        is_llama = settings.get("tokenizer_class", "LlamaTokenizer").startswith("Llama")
        return (LlamaTokenizer if is_llama else AutoTokenizer).from_pretrained(model_path)
    except Exception as error:
        # Many kinds: OSError, sentencepiece and protobuf errors, broken JSON.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"tokenizer of {model_path} can't be loaded (tokenizer.model there?): {reason}") from error


def _has_tokenizer(model_path: str) -> bool:
    return any((Path(model_path) / name).is_file() for name in TOKENIZER_FILES)


def _find_part(model_path: str, model_base: str | None) -> Part | None:
    """Check the weights of a folder; a partial checkpoint needs its base, a full one none."""
    part = None if _holds_weights(Path(model_path)) else find_part(model_path)
    if part is None:
        _check_weights(model_path)
        if model_base is not None:
            raise InputError(f"{model_path} is a full checkpoint: leave out the model base {model_base}")
    elif model_base is None:
        kind = "LoRA weights" if part.is_lora else "projector weights"
        known = f", e.g. {part.base}" if part.base else ""
        raise InputError(f"{model_path} holds {kind} only: give its base model (--model-base{known})")
    elif Path(model_base).is_dir() and not _holds_weights(Path(model_base)):
        raise InputError(f"model base {model_base} holds no weights: expected {' or '.join(WEIGHT_FILES)}, or shards")
    return part


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*WEIGHT_FILES, *INDEX_FILES))


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


def _read_config(model_path: str, customized_config: str | None, reduce: str | None) -> LlavaConfig:
    folder = Path(model_path).expanduser()
    if not folder.is_dir() and (
        folder.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") != 1
    ):
        raise InputError(f"checkpoint folder {model_path} is not there; give a folder with config.json, or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"checkpoint folder {model_path} holds no config.json")
    try:
        # As a dictionary: released checkpoints have "llava", a model type that transformers took for its own class.
        values, _ = LlavaConfig.get_config_dict(customized_config or model_path)
        values["dtype"] = values.pop("torch_dtype", values.get("dtype"))  # the name transformers 5 uses
        config = LlavaConfig.from_dict(values | {"model_type": LlavaConfig.model_type})
    except Exception as error:
        # OSError (not there, hub), broken JSON, and transformers' own validation of the values.
        reason = str(error).strip().splitlines()[0]
        source = customized_config or model_path
        raise InputError(f"config of {source} can't be read (no such folder, nor on the hub?): {reason}") from error
    config._name_or_path = model_path
    if reduce is not None:
        reducer = parse_reducer(reduce)
        setattr(config, CONFIG_KEY, reducer.spec() if reducer else None)
    parse_reducer(getattr(config, CONFIG_KEY, None))
    return config


def _check_weights(model_path: str) -> None:
    folder = Path(model_path)
    if not folder.is_dir():
        return  # on the hub: transformers fetches and checks
    for index_name in INDEX_FILES:
        if (folder / index_name).is_file():
            shards = sorted(set(read_weight_map(folder / index_name).values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise InputError(
                    f"checkpoint {model_path} lacks {len(absent)} of {len(shards)} weight files, first {absent[0]}: "
                    "copy or download it again"
                )
            return
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(f"checkpoint {model_path} holds no weights: expected {' or '.join(WEIGHT_FILES)}, or shards")


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Read which file holds which weight.

    Raises:
        InputError: not an index file.
    """
    weight_map = parse_record(read_text(Path(index)), str(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} is not an index of weight files: it has no weight_map")
    return weight_map


def _clean_generation_config(model: LlavaLlamaForCausalLM) -> None:
    """Drop settings of released checkpoints that contradict themselves: sampling values without sampling."""
    settings = model.generation_config
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None


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
    if load_8bit or load_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=list(UNQUANTISED),
        )
    return settings
