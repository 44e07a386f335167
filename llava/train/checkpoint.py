"""The files that training writes in LLaVA's layout, and the checkpoints that an interrupted run resumes at."""

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import InputError
from llava.files import FileError, read_json, read_text
from llava.model.adapter import ADAPTER_CONFIG_FILE, NON_LORA_FILE
from llava.model.checkpoint_folder import ARGUMENTS_FILE, PROJECTOR_FILE, portable_config, save_weights
from llava.model.stored_weights import first_line
from llava.train.engine import gathered
from llava.train.fsdp import whole

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"  # DeepSpeed writes the name of its newest folder into it
STATE_FILE = "trainer_state.json"  # the trainer writes it last
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
TOKEN_PARTS = ("embed_tokens", "lm_head")
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
FSDP_FILES = ("pytorch_model_fsdp.bin", "optimizer.bin")  # FSDP2's masters and optimizer states, each of all ranks
DEEPSPEED, FSDP = "DeepSpeed", "FSDP2"
ENGINE_FLAGS = {DEEPSPEED: "--deepspeed", FSDP: "--fsdp"}
TENSOR_SUFFIXES = (".pt", ".pth", ".bin")
ADVICE = "start with the same settings as before, or with another --output_dir"
NO_OPTIMIZER = "has no optimizer state (optimizer.pt, scheduler.pt)"


def save_projector(model: PreTrainedModel, folder: Path, is_writer: bool = True) -> None:
    """Write config.json and `mm_projector.bin`: projector weights, and embeddings and head where tokens were added.

    Args:
        model: a LLaVA model.
        folder: made if it is not there.
        is_writer: whether this rank writes; all ranks have to call, each may hold a part of the weights.
    """
    parts = ("mm_projector", *TOKEN_PARTS) if adds_tokens(model) else ("mm_projector",)
    weights = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), parts)
    if not is_writer:
        return
    save_weights(weights, folder / PROJECTOR_FILE)
    save_config(model, folder)


def save_lora_rest(
    model: nn.Module, folder: Path, is_writer: bool, gathered_state: Mapping[str, Tensor] | None = None
) -> None:
    """Write what PEFT does not: config.json and `non_lora_trainables.bin`, the other weights that were trained.

    Args:
        model: wrapped by PEFT.
        folder: of the adapter.
        is_writer: whether this rank writes; all ranks have to call.
        gathered_state: the model's, whole on the rank that writes, which may then call alone; None: gather it here.
    """
    added = TOKEN_PARTS if adds_tokens(model.get_base_model()) else ()
    chosen = {
        name: value
        for name, value in model.named_parameters()
        if any(part in name for part in ("mm_projector", *added)) or (value.requires_grad and "lora_" not in name)
    }
    weights = copy_weights(chosen) if gathered_state is None else gathered_state
    if is_writer:
        weights = {name: weights[name] for name in chosen}
        save_weights(weights, folder / NON_LORA_FILE)
        save_config(model.get_base_model(), folder)


def adds_tokens(model: PreTrainedModel) -> bool:
    """Whether the training added tokens to the vocabulary, whose rows the base model has not."""
    names = ("mm_use_im_start_end", "mm_use_im_patch_token")
    return any(getattr(model.config, name, False) for name in names)


def load_lora_rest(model: nn.Module, folder: Path) -> None:
    """Load what `save_lora_rest` wrote, when a run resumes."""
    model.load_state_dict(torch.load(folder / NON_LORA_FILE, map_location="cpu", weights_only=True), strict=False)


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json alone, as in a full checkpoint."""
    with portable_config(model, folder):
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 makes a class of its own
        model.config.save_pretrained(folder)


def get_mm_adapter_state_maybe_zero_3(
    named_params: Iterable[tuple[str, nn.Parameter]], keys_to_match: Sequence[str]
) -> dict[str, Tensor]:
    """Copy the parameters whose names contain one of some texts; see `copy_weights`.

    Args:
        named_params: as `model.named_parameters()` gives them.
        keys_to_match: the texts, e.g. `["mm_projector"]`.
    """
    return copy_weights({name: value for name, value in named_params if any(part in name for part in keys_to_match)})


def copy_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copy named parameters to the CPU, whole even if each rank holds a part; all ranks have to call."""
    with gathered(parameters.values()):
        return {name: whole(parameter.detach()).cpu().clone() for name, parameter in parameters.items()}


def drop_second_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave one name of each tied weight.

    transformers finds tied weights by their memory, and DeepSpeed hands it copies.

    Args:
        model: what is saved.
        weights: its state, or a part of that.
    """
    second = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: value for name, value in weights.items() if name not in second}


# ------------------------------------------------------------------------------------------------------- resuming
def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the checkpoints of a run that were begun, the newest first."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def find_last_checkpoint(
    folder: str | Path,
    num_ranks: int | None,
    is_lora: bool = False,
    resume_anyway: bool = False,
    engine: str = DEEPSPEED,
) -> str | None:
    """Find the checkpoint at which an interrupted run resumes; broken ones are named and passed over.

    Args:
        folder: the run's output folder.
        num_ranks: number of the engine's ranks; None if the trainer alone trains.
        is_lora: whether adapters are trained.
        resume_anyway: take also a checkpoint without optimizer state, if there is no other.
        engine: of this run, if it has one.

    Returns:
        The newest complete `checkpoint-<step>`, or None.

    Raises:
        InputError: another engine, another number of ranks or another kind of training wrote it; it holds code; or
            there is none with an optimizer state.
    """
    without_optimizer = []
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if fault is None or (fault == NO_OPTIMIZER and resume_anyway):
            _check_engine(checkpoint, None if num_ranks is None else engine, num_ranks)
            _check_kind(checkpoint, is_lora)
            _refuse_code(checkpoint)
            logger.warning("resuming at %s", checkpoint)
            return str(checkpoint)
        logger.warning("%s is not used: %s", checkpoint, fault)
        if fault == NO_OPTIMIZER:
            without_optimizer.append(checkpoint)
    if without_optimizer:
        raise InputError(
            f"{without_optimizer[0]} {NO_OPTIMIZER}: --resume_anyway True goes on from its weights with a fresh "
            "optimizer; or start anew with another --output_dir"
        )
    return None


def find_fault(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks; None if it is complete."""
    try:
        state = read_json(checkpoint / STATE_FILE)
    except FileError:
        return f"its {STATE_FILE}, which is written last, is missing or cut off"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"its {STATE_FILE} has no global_step"
    return _find_weights_fault(checkpoint) or _find_cut_file(checkpoint) or _find_state_fault(checkpoint)


def _find_writer(checkpoint: Path) -> str | None:
    """Return the engine that wrote a checkpoint; None: the trainer alone, or weights alone."""
    if (checkpoint / LATEST_FILE).is_file():
        return DEEPSPEED
    return FSDP if any((checkpoint / name).is_file() for name in FSDP_FILES) else None


def _find_weights_fault(checkpoint: Path) -> str | None:
    writer = _find_writer(checkpoint)
    if writer == DEEPSPEED:
        return None  # its own folder holds them
    if writer == FSDP:
        needed = list(FSDP_FILES)
    elif (checkpoint / ADAPTER_CONFIG_FILE).is_file():
        needed = [NON_LORA_FILE]
        if not any((checkpoint / name).is_file() for name in ADAPTER_FILES):
            needed += ADAPTER_FILES[:1]
    elif (checkpoint / INDEX_FILE).is_file():
        try:
            needed = sorted(set(read_json(checkpoint / INDEX_FILE)["weight_map"].values()))
        except (FileError, AttributeError, KeyError, TypeError):
            return f"its {INDEX_FILE} is damaged"
    else:
        needed = [] if (checkpoint / "pytorch_model.bin").is_file() else ["model.safetensors"]
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    return f"it has no {missing[0]}" if missing else None


def _find_cut_file(checkpoint: Path) -> str | None:
    """Name a file of tensors that was not written to its end; the ends are looked at, not the tensors."""
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors":
            whole = _is_whole_safetensors(path)
        else:
            whole = path.suffix not in TENSOR_SUFFIXES or zipfile.is_zipfile(path)
        if not whole:
            return f"its {path.relative_to(checkpoint)} is cut off or damaged"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError):
        return False
    return True


def _find_state_fault(checkpoint: Path) -> str | None:
    """Look for optimizer, schedule and random states."""
    latest = checkpoint / LATEST_FILE
    num_ranks = len(list(checkpoint.glob("rng_state*.pth")))
    if latest.is_file():
        parts = checkpoint / read_text(latest).strip()
        num_parts = len(list(parts.glob("*_optim_states.pt")))
        if not list(parts.glob("*_model_states.pt")):
            return f"its {parts.name} has no weights"
        if num_ranks and num_parts < num_ranks:
            return f"it holds the optimizer states of {num_parts} of {num_ranks} ranks"
        return None if num_ranks else "it has no random state (rng_state_0.pth)"
    if _find_writer(checkpoint) == FSDP:
        if not (checkpoint / OPTIMIZER_FILES[1]).is_file():
            return f"it has no {OPTIMIZER_FILES[1]}"
    elif not all((checkpoint / name).is_file() for name in OPTIMIZER_FILES):
        return NO_OPTIMIZER
    return None if num_ranks else "it has no random state (rng_state.pth)"


def _check_engine(checkpoint: Path, engine: str | None, num_ranks: int | None) -> None:
    """Refuse a checkpoint that another engine, or another number of ranks, wrote."""
    writer = _find_writer(checkpoint)
    if writer is not None and writer != engine:
        raise InputError(f"{checkpoint} was written by {writer}, this run has no {ENGINE_FLAGS[writer]}: {ADVICE}")
    if engine is None:
        return
    if writer is None:
        raise InputError(f"{checkpoint} was not written by {engine}, this run has {ENGINE_FLAGS[engine]}: {ADVICE}")
    parts = (
        checkpoint.glob("rng_state_*.pth")
        if engine == FSDP
        else (checkpoint / read_text(checkpoint / LATEST_FILE).strip()).glob("*_optim_states.pt")
    )
    num_parts = len(list(parts))
    if num_parts != num_ranks:
        raise InputError(f"{checkpoint} was written by {num_parts} ranks, this run has {num_ranks}: {ADVICE}")


def _check_kind(checkpoint: Path, is_lora: bool) -> None:
    """Refuse a checkpoint that another kind of training wrote."""
    was_lora = (checkpoint / ADAPTER_CONFIG_FILE).is_file()
    if was_lora != is_lora:
        before, now = ("with LoRA", "without") if was_lora else ("without LoRA", "with it")
        raise InputError(f"{checkpoint} was trained {before}, this run trains {now}: {ADVICE}")


# ------------------------------------------------------------------------------------------------ no code in files
def _refuse_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose pickles name anything but the data that training writes; nothing is loaded."""
    with torch.serialization.safe_globals(list_state_types()):
        for path in sorted(checkpoint.rglob("*")):
            if path.suffix not in TENSOR_SUFFIXES or path.name == ARGUMENTS_FILE:
                continue
            try:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except Exception as error:
                # Pickles are parsed here, and a hostile one can fail in any way.
                raise InputError(f"{path} is not a checkpoint file: {first_line(error)}") from error
            if names:
                raise InputError(
                    f"{path} holds code ({', '.join(sorted(names))}) and is not loaded: remove {checkpoint}"
                )


@contextmanager
def data_only() -> Iterator[None]:
    """Inside the block `torch.load` reads tensors and plain values alone, whoever calls it and however.

    DeepSpeed loads its checkpoints as pickles that may run code; with this, one that holds code is an `InputError`.
    """
    plain = torch.load

    def load(file: object, *arguments: object, **options: object) -> object:
        try:
            return plain(file, *arguments, **options | {"weights_only": True})
        except pickle.UnpicklingError as error:
            raise InputError(f"{file} holds more than data and is not loaded: {first_line(error)}") from error

    torch.load = load
    try:
        with torch.serialization.safe_globals(list_state_types()):
            yield
    finally:
        torch.load = plain


def list_state_types() -> list[object]:
    """List what the states of optimizers, schedules and random generators are made of besides tensors."""
    types = [
        np._core.multiarray._reconstruct,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.uint32)),
    ]
    if find_spec("deepspeed") is not None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        types += [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
    return types
