"""What training leaves behind: folders in the published layout, that can be moved and loaded elsewhere.

Towers are not saved: they are frozen and come from `mm_vision_tower`. Where that is a relative path, it is written
relative to the checkpoint's own folder, so that checkpoint and tower can move together.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file

from llava.model.multimodal_encoder.builder import OPEN_CLIP_PREFIX
from llava.model.multimodal_encoder.loading import resolve_name

if TYPE_CHECKING:
    from llava.train.llava_trainer import LlavaTrainer

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
SENTENCEPIECE_FILE = "tokenizer.model"


def save_trained(trainer: "LlavaTrainer", only_projector: bool) -> None:
    """Save what a finished run has made, as the published training does.

    Args:
        trainer: after training.
        only_projector: stage 1: `mm_projector.bin` and config.json; else the full checkpoint, in the dtype of the run.
    """
    trainer.save_state()
    model, folder = trainer.model, Path(trainer.args.output_dir)
    if only_projector:
        save_projector(model, folder)
        return
    if trainer.args.bf16 or trainer.args.fp16:
        # Master weights are float32; the run computed in 16 bit, and so does whoever loads the checkpoint.
        model.to(torch.bfloat16 if trainer.args.bf16 else torch.float16)
    trainer.save_model(str(folder))


def save_projector(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and `mm_projector.bin`: projector weights, and token embeddings where those were trained.

    Args:
        model: a LLaVA model.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ("mm_projector", "embed_tokens") if model.config.mm_use_im_start_end else ("mm_projector",)
    weights: dict[str, Tensor] = {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if any(part in name for part in parts)
    }
    with portable_config(model, folder):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    unfinished = folder / f".{PROJECTOR_FILE}.part"
    torch.save(weights, unfinished)
    os.replace(unfinished, folder / PROJECTOR_FILE)


@contextmanager
def portable_config(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """While inside, the model's config is as it should be written into `folder`.

    Args:
        model: LLaVA, or a plain language model.
        folder: where config.json is about to be written.
    """
    config = model.config
    tower, use_cache = getattr(config, "mm_vision_tower", None), config.use_cache
    config.use_cache = True  # the trainer switches it off, which would make generation slow
    if tower:
        config.mm_vision_tower = locate_tower(tower, config._name_or_path, folder)
    try:
        yield
    finally:
        config.use_cache = use_cache
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


def copy_sentencepiece_model(tokenizer: Any, folder: Path) -> None:
    """Put the tokenizer's `tokenizer.model` beside its other files; transformers 5 does not write it any more.

    Without it the published code, whose tokenizer reads nothing else, cannot open the checkpoint. A tokenizer that
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
        unfinished = folder / f".{SENTENCEPIECE_FILE}.part"
        shutil.copyfile(found, unfinished)
        os.replace(unfinished, target)


def find_last_checkpoint(folder: str) -> str | None:
    """Return the newest `checkpoint-<step>` of an interrupted run in this output folder, or None."""
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if last is not None:
        logger.warning("going on from %s", last)
    return last
