"""The files that training writes in LLaVA's layout, and the checkpoints that an interrupted run resumes at."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import InputError
from llava.files import FileError, read_json, read_text
from llava.model.adapter import NON_LORA_FILE
from llava.model.checkpoint_folder import PROJECTOR_FILE, portable_config, save_weights
from llava.train.engine import gathered

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"  # DeepSpeed writes the name of its newest folder into it
STATE_FILE = "trainer_state.json"  # the trainer writes it last
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def save_projector(model: PreTrainedModel, folder: Path, is_writer: bool = True) -> None:
    """Write config.json and `mm_projector.bin`: projector weights, and token embeddings where those were trained.

    Args:
        model: a LLaVA model.
        folder: made if it is not there.
        is_writer: whether this rank writes; all ranks have to call, each may hold a part of the weights.
    """
    parts = ("mm_projector", "embed_tokens") if model.config.mm_use_im_start_end else ("mm_projector",)
    weights = copy_weights(
        {name: value for name, value in model.named_parameters() if any(part in name for part in parts)}
    )
    if not is_writer:
        return
    save_weights(weights, folder / PROJECTOR_FILE)
    save_config(model, folder)


def save_lora_rest(model: nn.Module, folder: Path, is_writer: bool) -> None:
    """Write what PEFT does not: config.json and `non_lora_trainables.bin`, the other weights that were trained.

    Args:
        model: wrapped by PEFT.
        folder: of the adapter.
        is_writer: whether this rank writes; all ranks have to call.
    """
    weights = copy_weights(
        {
            name: value
            for name, value in model.named_parameters()
            if "mm_projector" in name or (value.requires_grad and "lora_" not in name)
        }
    )
    if is_writer:
        save_weights(weights, folder / NON_LORA_FILE)
        save_config(model.get_base_model(), folder)


def load_lora_rest(model: nn.Module, folder: Path) -> None:
    """Load what `save_lora_rest` wrote, when a run resumes."""
    model.load_state_dict(torch.load(folder / NON_LORA_FILE, map_location="cpu", weights_only=True), strict=False)


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json alone, as in a full checkpoint."""
    with portable_config(model, folder):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def copy_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy named parameters to the CPU, whole even if each rank holds a part; all ranks have to call."""
    with gathered(parameters.values()):
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def find_last_checkpoint(folder: str, num_ranks: int | None) -> str | None:
    """Find the checkpoint at which an interrupted run resumes.

    Args:
        folder: the run's output folder.
        num_ranks: number of DeepSpeed's ranks; None if it does not train.

    Returns:
        The newest complete `checkpoint-<step>`, or None.

    Raises:
        InputError: another engine, or another number of ranks, wrote it.
    """
    complete = {
        int(match[1]): path.parent
        for path in Path(folder).glob(f"*/{STATE_FILE}")
        if (match := CHECKPOINT_NAME.fullmatch(path.parent.name)) and _is_complete(path)
    }
    if not complete:
        return None
    last = complete[max(complete)]
    _check_engine(last, num_ranks)
    logger.warning("resuming at %s", last)
    return str(last)


def _is_complete(state: Path) -> bool:
    """Whether the last file of a checkpoint was written to its end."""
    try:
        read_json(state)
    except FileError:
        logger.warning("%s is incomplete and is not used", state.parent)
        return False
    return True


def _check_engine(checkpoint: Path, num_ranks: int | None) -> None:
    latest = checkpoint / LATEST_FILE
    advice = "start with the same settings as before, or with another --output_dir"
    if num_ranks is None:
        if latest.is_file():
            raise InputError(f"{checkpoint} was written by DeepSpeed, this run has no --deepspeed: {advice}")
        return
    if not latest.is_file():
        raise InputError(f"{checkpoint} was not written by DeepSpeed, this run has --deepspeed: {advice}")
    num_parts = len(list((checkpoint / read_text(latest).strip()).glob("*_optim_states.pt")))
    if num_parts != num_ranks:
        raise InputError(f"{checkpoint} was written by {num_parts} ranks, this run has {num_ranks}: {advice}")
