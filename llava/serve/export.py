"""A checkpoint's language model alone, as the plain folder that vLLM and others read: made once, then found again.

The folder is named by what the checkpoint holds, so that a changed one is exported anew. It lies in the user's cache
folder (`LLAVA_CACHE`, else `llava` under `XDG_CACHE_HOME` or `~/.cache`), and takes as much disk as the weights of the
language model: 13.5 GB for LLaVA-1.5-7B. It can be deleted whenever no engine runs on it.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llava.conversation import get_model_name_from_path
from llava.convert import Shards, check_weights, read_own
from llava.errors import InputError
from llava.files import atomic_folder, make_folder, write_json
from llava.generation import PLAIN_KEYS
from llava.model.builder import find_weights, load_pretrained_model, read_config
from llava.model.config_rules import CONFIG_FILE, GENERATION_FILE, check_generation_config
from llava.model.hf_layout import to_language_config
from llava.model.identity import find_cache_folder, fingerprint, identify_checkpoint
from llava.model.stored_weights import list_weight_files
from llava.model.tokenizer import SETTINGS_FILE, load_tokenizer

SPARE_KEYS = PLAIN_KEYS | {"output_attentions", "output_hidden_states"}
"""Entries of a generation config without which an answer is the same."""
FORMAT = 1
"""Raised when an export of the same checkpoint would have other contents: older ones are not found any more."""
VISION_PREFIXES = ("model.mm_projector.", "model.image_newline", "model.vision_tower.")


def export_language_model(source: str, base: str | None = None, dtype: str = "float32") -> Path:
    """Write the language model of a LLaVA checkpoint as a plain Llama, Mistral or Qwen2, unless that is there already.

    Args:
        source: folder or hub id of a checkpoint in LLaVA's layout or that of llava-hf.
        base: base model of LoRA or projector weights; they are merged as the loader merges them.
        dtype: "float16", "bfloat16" or "float32": of merged weights. Those of a full checkpoint stay as they are.

    Returns:
        The folder: config.json, weights, generation_config.json with the end tokens, tokenizer.

    Raises:
        InputError: the checkpoint cannot be read or is quantised, its generation_config.json asks for more than end
            tokens in a greedy search, or the disk is too small.
    """
    config = read_config(source)
    is_part = find_weights(source, base) is not None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{source} is quantised: export the checkpoint that it was made from")
    contents = [FORMAT, identify_checkpoint(source), base and identify_checkpoint(base), dtype if is_part else None]
    name = f"{get_model_name_from_path(source)}-{fingerprint(json.dumps(contents))}"
    parent = make_folder(find_cache_folder() / "language_models")
    folder = parent / name
    with FileLock(parent / f"{name}.lock"):  # of several servers that start, one writes
        if not folder.is_dir():
            for stale in parent.glob(f".{name}.*.partial"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with atomic_folder(folder) as partial:
                _write(_merge(source, base, dtype) if is_part else _open_full(source, config), partial)
    return folder


@dataclass(frozen=True)
class LanguageModel:
    """What is written.

    Attributes:
        config: of the LLaVA model.
        generation: how the checkpoint wants answers searched for.
        tokenizer: of the checkpoint.
        weights: names, LLaVA's, and values; those of vision among them.
        num_bytes: of the weights, at most.
    """

    config: PreTrainedConfig
    generation: GenerationConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Iterable[tuple[str, Tensor]]
    num_bytes: int


def _open_full(source: str, config: PreTrainedConfig) -> LanguageModel:
    """Open a full checkpoint, whose tensors are then read one by one."""
    check_weights(source, config)
    check_generation_config(source, config.vocab_size)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # it has no such file
        generation = GenerationConfig.from_model_config(config)
    num_bytes = sum(Path(file).stat().st_size for file in list_weight_files(source))
    return LanguageModel(config, generation, load_tokenizer(source), read_own(source), num_bytes)


def _merge(source: str, base: str, dtype: str) -> LanguageModel:
    """Load a part of a checkpoint into its base."""
    tokenizer, model, _, _ = load_pretrained_model(source, base, device="cpu", dtype=dtype)
    weights = model.state_dict()
    num_bytes = sum(value.nbytes for value in weights.values())
    return LanguageModel(model.config, model.generation_config, tokenizer, weights.items(), num_bytes)


def _write(language: LanguageModel, folder: Path) -> None:
    """Fill a folder.

    Raises:
        InputError: see `export_language_model`.
    """
    config, generation, tokenizer = language.config, language.generation, language.tokenizer
    settings = sorted(set(generation.to_diff_dict()) - SPARE_KEYS)
    if settings:
        raise InputError(
            f"{config._name_or_path}/{GENERATION_FILE} asks for {settings[0]}, which changes greedy answers and is not "
            "carried over to another engine: delete it there, or use the engine torch"
        )
    free, size = shutil.disk_usage(folder).free, f"{language.num_bytes / 1e9:.1f} GB"
    if free < language.num_bytes:
        raise InputError(
            f"the language model of {config._name_or_path} takes {size}, and {folder.parent} has {free / 1e9:.1f} GB "
            "left: set LLAVA_CACHE to a folder on a larger disk"
        )
    sys.stderr.write(f"writing the language model to {folder.parent} (once; {size} at most)\n")
    shards = Shards(folder)
    for name, value in language.weights:
        if not name.startswith(VISION_PREFIXES):
            shards.add(name, value)
    shards.close()
    write_json(folder / CONFIG_FILE, to_language_config(config.to_dict()), indent=2)
    ends = {key: getattr(generation, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / GENERATION_FILE, ends, indent=2)
    # A tokenizer of this class is read as it is written, whatever the version of transformers.
    write_json(folder / "tokenizer.json", json.loads(tokenizer.backend_tokenizer.to_str()), indent=None)
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    write_json(
        folder / SETTINGS_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: str(token) for name, token in names.items() if token is not None},
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
        indent=2,
    )


def _read_generation_config(source: str, config: PreTrainedConfig) -> GenerationConfig:
    """Read how a full checkpoint wants answers searched for, as loading it would."""
    check_generation_config(source, config.vocab_size)
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # it has no such file
        return GenerationConfig.from_model_config(config)
