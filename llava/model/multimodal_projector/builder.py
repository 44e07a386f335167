"""Build the projector that `mm_projector_type` names: `linear`, `mlp{depth}x_gelu` or `identity`."""

import re

import torch
from torch import nn
from transformers import PreTrainedConfig

from llava.errors import InputError


def build_vision_projector(config: PreTrainedConfig) -> nn.Module:
    """Build the projector of a model config.

    Args:
        config: with `mm_projector_type`, `mm_hidden_size` (D) and `hidden_size` (E).

    Returns:
        A module from `[..., D]` to `[..., E]`; parameter names as in LLaVA's checkpoints (`0.weight`, `2.weight`, ...).

    Raises:
        InputError: for an unknown type.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not match:
        raise InputError(f'mm_projector_type "{kind}" is unknown: use linear, mlp2x_gelu (any depth) or identity')
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def load_vision_projector(projector: nn.Module, path: str) -> None:
    """Load `mm_projector.bin`.

    Args:
        projector: filled in place.
        path: the file; keys end in `mm_projector.<name>`.

    Raises:
        InputError: when it can't be read or does not fit.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "mm_projector."
        projector.load_state_dict({key.split(prefix, 1)[1]: value for key, value in weights.items() if prefix in key})
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"projector weights {path} can't be loaded: {str(error).splitlines()[0]}") from error
