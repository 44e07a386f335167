"""Load a LLaVA checkpoint in the published on-disk layout: language model, projector, tokenizer, vision tower."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaTokenizer, PreTrainedTokenizerBase

from llava.errors import InputError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.token_reduction import CONFIG_KEY, parse_reducer

DEFAULT_CONTEXT_LENGTH = 2048  # what the published loader reports for configs without max_sequence_length
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
    customized_config: str | None = None,
    multimodal: bool = True,
) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, object, int]:
    """Load tokenizer, model and image processor (published name, argument order and results).

    Args:
        model_path: checkpoint folder or hub id.
        model_base: base model of a LoRA or projector-only checkpoint; full checkpoints need none.
        model_name: accepted for published callers; what the folder holds decides, not its name.
        load_8bit: quantise the language model to 8 bit (needs bitsandbytes).
        load_4bit: quantise to 4 bit NF4 (needs bitsandbytes).
        device_map: "auto" spreads over all accelerators; used unless `device` names one device.
        device: "cpu", "cuda", "cuda:1", ...; None: the accelerator if there is one, else the CPU.
        use_flash_attn: shorthand for `attn_implementation="flash_attention_2"`.
        reduce: token reduction instead of config.json's; "none" switches it off; None obeys config.json.
        dtype: of the language model and projector; None: float16 on an accelerator, float32 on the CPU.
            The vision and text towers run in float32, as in the published evaluation.
        torch_dtype: old name of `dtype`.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...
        customized_config: path of a config.json to use instead of the checkpoint's.
        multimodal: accepted for lmms-eval; every model here reads pictures.

    Returns:
        (tokenizer, model in evaluation mode, image processor, context length in tokens).

    Raises:
        InputError: one line for everything that is not as it should be, before any weight is read where possible.
    """
    if model_base is not None:
        raise InputError(
            f"{model_path} with model base {model_base}: this version loads full checkpoints only; "
            "merge LoRA or projector weights into a full checkpoint first"
        )
    device = _choose_device(device)
    config = _read_config(model_path, customized_config, reduce)
    _check_weights(model_path)
    tokenizer = load_tokenizer(model_path)
    settings = _loading_settings(device, device_map, dtype or torch_dtype, load_8bit, load_4bit)
    attention = "flash_attention_2" if use_flash_attn else attn_implementation
    if attention:
        settings["attn_implementation"] = attention
    model, _ = load_quietly(LlavaLlamaForCausalLM, model_path, what="checkpoint", config=config, **settings)
    model.tokenizer = tokenizer
    _clean_generation_config(model)
    tower = model.get_vision_tower()
    if tower is None:
        raise InputError(f"{model_path}/config.json names no mm_vision_tower: this is a language model without eyes")
    tower.load_model(device=model.get_input_embeddings().weight.device)
    context_length = getattr(config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, tower.image_processor, context_length


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer with the ids of the published code.

    `AutoTokenizer` of transformers 5 loses the leading word mark of Llama's sentencepiece vocabulary; the Llama class
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
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"checkpoint {model_path} has no tokenizer: expected {' or '.join(TOKENIZER_FILES)} there")
    settings_file = folder / "tokenizer_config.json"
    try:
        settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        is_llama = settings.get("tokenizer_class", "LlamaTokenizer").startswith("Llama")
        return (LlamaTokenizer if is_llama else AutoTokenizer).from_pretrained(model_path)
    except Exception as error:
        # Many kinds: OSError, sentencepiece and protobuf errors, broken JSON.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"tokenizer of {model_path} can't be loaded (tokenizer.model there?): {reason}") from error


def _choose_device(device: str | None) -> str:
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
        # As a dictionary: published checkpoints say "llava", a model type that transformers took for its own class.
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
            try:
                shards = sorted(set(json.loads((folder / index_name).read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise InputError(f"{folder / index_name} is no index of weight files: {error!r}") from None
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise InputError(
                    f"checkpoint {model_path} lacks {len(absent)} of {len(shards)} weight files, first {absent[0]}: "
                    "copy or download it again"
                )
            return
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        if (folder / "mm_projector.bin").is_file() or (folder / "adapter_config.json").is_file():
            raise InputError(f"{model_path} holds projector or LoRA weights only: it needs its base model merged in")
        raise InputError(f"checkpoint {model_path} holds no weights: expected {' or '.join(WEIGHT_FILES)}, or shards")


def _clean_generation_config(model: LlavaLlamaForCausalLM) -> None:
    """Drop published settings that contradict themselves: sampling values without sampling."""
    settings = model.generation_config
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = None


def _loading_settings(
    device: str, device_map: str | dict | None, dtype: torch.dtype | str | None, load_8bit: bool, load_4bit: bool
) -> dict:
    on_cpu = torch.device(device).type == "cpu"
    if dtype is None:
        dtype = torch.float32 if on_cpu else torch.float16
    if isinstance(dtype, str):
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in names:
            raise InputError(f'dtype "{dtype}" is unknown: use {", ".join(names)}')
        dtype = names[dtype]
    # One device given by the user, or a machine without accelerator: everything there, without dispatch hooks.
    spread = device_map is not None and not on_cpu and ":" not in device
    settings: dict = {"dtype": dtype, "device_map": device_map if spread else {"": device}}
    if load_8bit or load_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
        )
    return settings
