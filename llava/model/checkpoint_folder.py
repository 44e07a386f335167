"""Write a checkpoint's folder in LLaVA's layout: movable, shareable, readable by LLaVA's code.

Towers are not saved, but for those that came with a checkpoint: they are frozen and come from `mm_vision_tower`. Where
that is a relative path, it is written relative to the checkpoint's own folder, so that checkpoint and tower can move
together.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from llava.files import atomic_write, make_folder, remove_leftovers
from llava.model.multimodal_encoder.builder import OPEN_CLIP_PREFIX
from llava.model.multimodal_encoder.loading import resolve_name
from llava.protocols import Tokenizer

PROJECTOR_FILE = "mm_projector.bin"
SENTENCEPIECE_FILE = "tokenizer.model"
ARGUMENTS_FILE = "training_args.bin"
READABLE = 0o644  # safetensors writes files that their owner alone may read


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a full checkpoint: config, weights, tokenizer.

    Args:
        model: a LLaVA model, in the dtype to be saved.
        tokenizer: the language model's.
        folder: made if it is not there.
    """
    make_folder(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_sentencepiece_model(tokenizer, folder)
    tidy_checkpoint(folder)


@contextmanager
def portable_config(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Inside the block, the model's config is as it should be written into `folder`.

    Args:
        model: LLaVA, or a plain language model.
        folder: where config.json is about to be written.
    """
    config = model.config
    tower, use_cache = getattr(config, "mm_vision_tower", None), config.use_cache
    config.use_cache = True  # the trainer switches it off, which would make generation slow
    # How the frozen base was held in memory (QLoRA), which no saved weight is.
    quantised = vars(config).pop("quantization_config", None)
    if tower:
        config.mm_vision_tower = locate_tower(tower, config._name_or_path, folder)
    try:
        yield
    finally:
        config.use_cache = use_cache
        if quantised is not None:
            config.quantization_config = quantised
        if tower:
            config.mm_vision_tower = tower


def locate_tower(name: str, source: str, folder: Path) -> str:
    """Return what to write as `mm_vision_tower`.

    Args:
        name: as the user or the starting checkpoint gave it.
        source: folder of the starting checkpoint, against which relative names were tried as well.
        folder: of the new checkpoint.

    Returns:
        Hub ids, open_clip names and absolute paths as they are; a relative path as seen from `folder`.
    """
    if name.startswith((OPEN_CLIP_PREFIX, "~")) or Path(name).is_absolute():
        return name
    found = Path(resolve_name(name, source))
    return os.path.relpath(found, folder) if found.exists() else name


def copy_sentencepiece_model(tokenizer: Tokenizer, folder: Path) -> None:
    """Put the tokenizer's `tokenizer.model` next to its other files; transformers 5 does not write it.

    Without it LLaVA's code, whose tokenizer reads nothing else, cannot open the checkpoint. A tokenizer that
    never had one is left alone.
    """
    found = cached_file(
        tokenizer.name_or_path,
        SENTENCEPIECE_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    target = folder / SENTENCEPIECE_FILE
    if found is not None and Path(found).resolve() != target.resolve():
        with atomic_write(target) as partial:
            shutil.copyfile(found, partial)


def tidy_checkpoint(folder: Path) -> None:
    """Make a checkpoint fit to be moved and shared: readable weights, and no pickle of this machine's flags."""
    (folder / ARGUMENTS_FILE).unlink(missing_ok=True)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(READABLE)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors as a `.bin` file, atomically; what a killed process left of one is deleted."""
    remove_leftovers(path)
    with atomic_write(path) as partial:
        torch.save(dict(weights), partial)
