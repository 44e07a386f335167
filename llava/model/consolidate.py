"""Write a checkpoint as one full folder: `python -m llava.model.consolidate --src FOLDER --dst FOLDER`.

What comes in may be sharded, in `.bin` files, quantised nowhere, or LoRA and projector weights that need `--model-base`
(`scripts/merge_lora_weights.py` is the same under LLaVA's flags). What goes out is one full checkpoint in LLaVA's
layout, in the dtype of the weights that were read.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import DTYPES, print_now
from llava.errors import InputError, run_command

if TYPE_CHECKING:
    import torch

# Every function imports what it needs of torch: the command answers --help and mistaken options before that.


def consolidate_ckpt(src_path: str, dst_path: str, base: str | None = None, dtype: str | None = None) -> None:
    """Load a checkpoint and save it as a full one.

    Weights are merged in float32 and rounded once, at the end.

    Args:
        src_path: folder or hub id.
        dst_path: the new folder; one that holds a checkpoint already is refused.
        base: base model of LoRA or projector weights.
        dtype: of the new checkpoint; None: the one in the config of the base (else of the source).

    Raises:
        InputError: something cannot be read, or the destination holds a checkpoint (perhaps the source itself).
    """
    from llava.model.builder import load_pretrained_model, resolve_dtype
    from llava.model.checkpoint_folder import save_checkpoint
    from llava.model.config_rules import CONFIG_FILE
    from llava.model.stored_weights import holds_weights

    folder = Path(dst_path)
    if Path(src_path).resolve() == folder.resolve():
        raise InputError(f"{dst_path}: the checkpoint cannot be written over itself; name another folder")
    if holds_weights(folder) or (folder / CONFIG_FILE).exists():
        raise InputError(f"{dst_path} holds a checkpoint already: name another folder, or delete that one first")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{dst_path} is a file: name a folder")
    print_now(f"reading {src_path}" + f" and {base}" * (base is not None))
    tokenizer, model, _, _ = load_pretrained_model(src_path, base, device="cpu", dtype="float32")
    chosen = resolve_dtype(dtype) if dtype else _stored_dtype(base or src_path)
    before = set(folder.glob("*"))
    print_now(f"writing {folder}")
    try:
        save_checkpoint(model.to(chosen), tokenizer, folder)
    except BaseException:
        # Half a checkpoint (a full disk, Ctrl-C) would stand in the way of the next try.
        for path in set(folder.glob("*")) - before:
            path.unlink()
        raise
    print_now(f"written to {folder}")


def extract_projector(source: str, destination: str) -> None:
    """Write the projector of a full checkpoint as `mm_projector.bin`, from which a finetuning can start.

    Args:
        source: folder or hub id.
        destination: the file, or a folder for it.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    from llava.model.checkpoint_folder import PROJECTOR_FILE, save_weights
    from llava.model.multimodal_projector.builder import PROJECTOR_PREFIX
    from llava.model.stored_weights import iterate_tensors, list_weight_files

    path = Path(destination)
    if path.suffix not in (".bin", ".pt", ".pth"):
        path /= PROJECTOR_FILE
    files = list_weight_files(source, containing=PROJECTOR_PREFIX)
    projector = {
        name: value.clone() for file in files for name, value in iterate_tensors(file, containing=PROJECTOR_PREFIX)
    }
    if not projector:
        raise InputError(f"{source} has no projector: is it a LLaVA checkpoint?")
    save_weights(projector, path)
    print_now(f"written to {path}")


def _stored_dtype(source: str) -> "torch.dtype":
    import torch

    from llava.model.config_rules import CONFIG_FILE, read_settings

    values, _ = read_settings(source, CONFIG_FILE, "checkpoint")
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return getattr(torch, name) if name in DTYPES else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a LLaVA checkpoint as one full folder.")
    parser.add_argument("--src", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--dst", required=True, help="new folder")
    parser.add_argument("--model-base", help="base model, where --src holds LoRA or projector weights")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the new weights; default: as stored")
    arguments = parser.parse_args()
    consolidate_ckpt(arguments.src, arguments.dst, arguments.model_base, arguments.dtype)


if __name__ == "__main__":
    run_command(main)
