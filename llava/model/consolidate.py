"""Write a checkpoint as one full folder: `python -m llava.model.consolidate --src FOLDER --dst FOLDER`.

What comes in may be sharded, in `.bin` files, quantised nowhere, or LoRA and projector weights that need `--model-base`
(`scripts/merge_lora_weights.py` is the same under LLaVA's flags). What goes out is one full checkpoint in LLaVA's
layout, in the dtype of the weights that were read.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import DTYPES
from llava.errors import InputError, run_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Every function imports what it needs of torch: the command answers --help and mistaken options before that.


def consolidate(source: str, destination: str, base: str | None = None, dtype: str | None = None) -> None:
    """Load a checkpoint and save it as a full one.

    Weights are merged in float32 and rounded once, at the end.

    Args:
        source: folder or hub id.
        destination: the new folder.
        base: base model of LoRA or projector weights.
        dtype: of the new checkpoint; None: the one in the config of the base (else of the source).

    Raises:
        InputError: something cannot be read, or source and destination are one folder.
    """
    from llava.model.builder import load_pretrained_model, resolve_dtype
    from llava.model.checkpoint_folder import save_checkpoint

    folder = Path(destination)
    if Path(source).resolve() == folder.resolve():
        raise InputError(f"{destination}: the checkpoint cannot be written over itself; name another folder")
    tokenizer, model, _, _ = load_pretrained_model(source, base, device="cpu", dtype="float32")
    chosen = resolve_dtype(dtype) if dtype else _stored_dtype(base or source)
    save_checkpoint(model.to(chosen), tokenizer, folder)


def extract_projector(source: str, destination: str) -> None:
    """Write the projector of a full checkpoint as `mm_projector.bin`, from which a finetuning can start.

    Args:
        source: folder or hub id.
        destination: the file, or a folder for it.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    from llava.model.checkpoint_folder import PROJECTOR_FILE, save_weights

    path = Path(destination)
    if path.suffix not in (".bin", ".pt", ".pth"):
        path /= PROJECTOR_FILE
    projector = {}
    for file in _list_weight_files(source):
        projector |= _read_projector(file)
    if not projector:
        raise InputError(f"{source} has no projector: is it a LLaVA checkpoint?")
    save_weights(projector, path)


def _list_weight_files(source: str) -> list[str]:
    """List the weight files of a folder or hub id that hold parts of the projector."""
    from llava.model.adapter import PROJECTOR_PREFIX, find_file
    from llava.model.builder import INDEX_FILES, WEIGHT_FILES, read_weight_map

    for name in (*INDEX_FILES, *WEIGHT_FILES):
        found = find_file(source, name)
        if found is None:
            continue
        if name not in INDEX_FILES:
            return [found]
        shards = {shard for key, shard in read_weight_map(found).items() if PROJECTOR_PREFIX in key}
        files = {shard: find_file(source, shard) for shard in sorted(shards)}
        absent = [shard for shard, file in files.items() if file is None]
        if absent:
            raise InputError(f"{source} lacks {absent[0]}, which holds the projector: copy or download it again")
        return list(files.values())
    raise InputError(f"{source} holds no weights: expected {' or '.join(WEIGHT_FILES)}, or shards")


def _read_projector(file: str) -> "dict[str, Tensor]":
    import torch
    from safetensors import safe_open

    from llava.model.adapter import PROJECTOR_PREFIX

    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as weights:
                return {key: weights.get_tensor(key) for key in weights.keys() if PROJECTOR_PREFIX in key}  # noqa: SIM118
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: value.clone() for key, value in weights.items() if PROJECTOR_PREFIX in key}
    except Exception as error:
        # Many kinds: safetensors, pickle and zip errors, OSError.
        raise InputError(f"{file} can't be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _stored_dtype(source: str) -> "torch.dtype":
    import torch
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(source)
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return getattr(torch, name) if name in DTYPES else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a LLaVA checkpoint as one full folder.")
    parser.add_argument("--src", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--dst", required=True, help="new folder")
    parser.add_argument("--model-base", help="base model, where --src holds LoRA or projector weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the new weights; default: as stored")
    arguments = parser.parse_args()
    consolidate(arguments.src, arguments.dst, arguments.model_base, arguments.dtype)


if __name__ == "__main__":
    run_command(main)
