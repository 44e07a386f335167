"""Weights of open_clip models: find the file, read it, and put all of it into the model or refuse what does not fit."""

import zipfile
from pathlib import Path

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.factory import load_state_dict
from torch import Tensor

from llava.errors import InputError
from llava.model.stored_weights import check_finite, first_line

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Folders from the hub hold the same weights in other layouts as well; these are open_clip's.
PREFERRED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# Entries of weight files that no feature depends on.
UNUSED = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")


def choose_weights(folder: Path, name: str) -> Path:
    """Pick the weights file of a local model.

    Args:
        folder: where `open_clip_config.json` is.
        name: of the tower, for messages.

    Returns:
        open_clip's usual file, else the only one there.

    Raises:
        InputError: when there is none, or several.
    """
    found = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    for preferred in PREFERRED:
        if preferred in found:
            return found[preferred]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise InputError(f"vision tower {name}: no weights in {folder}, expected {PREFERRED[0]}")
    raise InputError(
        f"vision tower {name}: several weights files in {folder} ({', '.join(found)}); "
        f"call the right one {PREFERRED[0]} or open_clip_pytorch_model.bin"
    )


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Read a weights file of any supported kind.

    Raises:
        InputError: when it can't be read.
    """
    try:
        if _is_torchscript(path):  # how OpenAI publishes its weights; holds no pickled objects to be wary of
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # Many kinds: OSError, safetensors, zip and pickle errors, and files that hold something else altogether.
        raise InputError(f"vision tower {name}: weights {path} can't be read: {first_line(error)}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def fill_model(model: CLIP | CustomTextCLIP, weights: dict[str, Tensor], what: str) -> None:
    """Put weights into a model, all of them and no others; position embeddings of another size are not stretched.

    Args:
        model: on the meta device; changed in place, to float32 on the CPU.
        weights: by name.
        what: subject of the messages.

    Raises:
        InputError: when they do not fit exactly.
    """
    own = {key: value for key, value in model.state_dict().items() if key not in UNUSED}
    given = {key: value for key, value in weights.items() if key not in UNUSED}
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if any(key.startswith("vision_model.") for key in unknown):
        raise InputError(f"{what} are of a Hugging Face CLIP: name its folder as mm_vision_tower, without open_clip:")
    if missing:
        raise InputError(f"{what} do not fit: {len(missing)} are missing, first {missing[0]}")
    if unknown:
        raise InputError(f"{what} do not fit: {len(unknown)} have no place in the model, first {unknown[0]}")
    for key, value in own.items():
        if given[key].shape != value.shape:
            raise InputError(f"{what} do not fit: {key} is {list(given[key].shape)}, the model has {list(value.shape)}")
    check_finite(given.items(), what)
    model.load_state_dict({key: value.float() for key, value in given.items()}, strict=False, assign=True)
    # What no weights file holds: the scale of a loss that is not computed here, and the causal mask.
    model.logit_scale = model.logit_bias = None
    if getattr(model, "attn_mask", None) is not None:  # SigLIP's text half has none
        model.attn_mask = torch.full(model.attn_mask.shape, float("-inf")).triu(1)
