"""What training leaves behind: checkpoints in the published layout, and those from which it goes on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from llava.errors import InputError
from llava.model.adapter import NON_LORA_FILE
from llava.model.checkpoint_folder import PROJECTOR_FILE, portable_config, save_weights
from llava.train.engine import gathered

if TYPE_CHECKING:
    from llava.train.llava_trainer import LlavaTrainer

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"  # DeepSpeed's note of which of its folders is the newest
STATE_FILE = "trainer_state.json"  # the last that is written of a checkpoint


def save_trained(trainer: "LlavaTrainer", only_projector: bool) -> None:
    """Save what a finished run has made, as the published training does.

    Args:
        trainer: after training.
        only_projector: stage 1: `mm_projector.bin` and config.json; else the full checkpoint, in the dtype of the run,
            or with LoRA the adapter and what was trained besides.
    """
    trainer.save_state()
    model, folder = trainer.model, Path(trainer.args.output_dir)
    if only_projector:
        save_projector(model, folder, is_writer=trainer.args.should_save)
        return
    keeps_masters = trainer.args.runs_deepspeed or trainer.args.lora_enable
    if not keeps_masters:
        # Master weights are float32; a run that computed in 16 bit saves 16 bit.
        model.to(trainer.args.compute_dtype)
    trainer.save_model(str(folder))


def save_projector(model: PreTrainedModel, folder: Path, is_writer: bool = True) -> None:
    """Write config.json and `mm_projector.bin`: projector weights, and token embeddings where those were trained.

    Args:
        model: a LLaVA model.
        folder: made if it is not there.
        is_writer: whether this rank writes; all of them have to come here, each may hold a part.
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
    """Write what a LoRA adapter's own files leave out: config.json and `non_lora_trainables.bin`.

    Args:
        model: wrapped by PEFT.
        folder: where the adapter is.
        is_writer: whether this rank writes; all of them have to come here.
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
    """Read back what `save_lora_rest` wrote, when a run goes on."""
    model.load_state_dict(torch.load(folder / NON_LORA_FILE, map_location="cpu", weights_only=True), strict=False)


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json alone, as it stands in a full checkpoint."""
    with portable_config(model, folder):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def copy_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy named parameters to the CPU, whole, also where each rank holds a part; all ranks have to call it."""
    with gathered(parameters.values()):
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def find_last_checkpoint(folder: str, num_ranks: int | None) -> str | None:
    """Find where an interrupted run goes on.

    Args:
        folder: the run's output folder.
        num_ranks: how many ranks DeepSpeed has; None where it does not train.

    Returns:
        The newest complete `checkpoint-<step>`, or None.

    Raises:
        InputError: that one was left by another engine, or by another number of ranks.
    """
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{STATE_FILE}") if _is_readable(path)]
    if not complete:
        return None
    last = max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))
    _check_engine(last, num_ranks)
    logger.warning("going on from %s", last)
    return str(last)


def _is_readable(state: Path) -> bool:
    """Tell whether a checkpoint's last file was written to its end."""
    try:
        TrainerState.load_from_json(str(state))
    except ValueError:
        logger.warning("%s is not complete, left out", state.parent)
        return False
    return True


def _check_engine(checkpoint: Path, num_ranks: int | None) -> None:
    latest = checkpoint / LATEST_FILE
    advice = "start with the same settings as before, or with another --output_dir"
    if num_ranks is None:
        if latest.is_file():
            raise InputError(f"{checkpoint} was left by DeepSpeed, this run has no --deepspeed: {advice}")
        return
    if not latest.is_file():
        raise InputError(f"{checkpoint} was not left by DeepSpeed, this run has --deepspeed: {advice}")
    num_parts = len(list((checkpoint / latest.read_text().strip()).glob("*_optim_states.pt")))
    if num_parts != num_ranks:
        raise InputError(f"{checkpoint} was left by {num_parts} ranks, this run has {num_ranks}: {advice}")
