"""Build the projector that `mm_projector_type` names: `linear`, `mlp{depth}x_gelu` or `identity`."""

import re

from torch import nn
from transformers import PreTrainedConfig

from llava.errors import InputError
from llava.gone import look_up
from llava.model.stored_weights import check_dtypes, check_finite, check_shapes, iterate_tensors, list_dtypes

__getattr__ = look_up(__name__)

PROJECTOR_PREFIX = "mm_projector."
MAX_DEPTH = 16  # LLaVA's have two layers; a number far above is a typing error, and would take minutes to build


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
    depth = parse_projector_type(kind)
    if depth == 0:
        return nn.Identity()
    first = nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "linear":
        return first
    layers: list[nn.Module] = [first]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def parse_projector_type(kind: str) -> int:
    """Return the number of linear layers that `mm_projector_type` names; 0 for identity.

    Raises:
        InputError: for an unknown type, or more than `MAX_DEPTH` layers.
    """
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind)
    if not match:
        raise InputError(f'mm_projector_type "{kind}" is unknown: use linear, mlp2x_gelu (any depth) or identity')
    if len(match[1]) > len(str(MAX_DEPTH)) or int(match[1]) > MAX_DEPTH:
        shown = kind if len(kind) <= 40 else f"{kind[:40]}..."
        raise InputError(
            f'mm_projector_type "{shown}" is too deep: use at most mlp{MAX_DEPTH}x_gelu (LLaVA: mlp2x_gelu)'
        )
    return int(match[1])


def load_vision_projector(projector: nn.Module, path: str) -> None:
    """Load `mm_projector.bin`.

    Args:
        projector: filled in place.
        path: the file; keys end in `mm_projector.<name>`.

    Raises:
        InputError: when it can't be read, does not fit (the tensor and both shapes are named), or holds inf or NaN.
    """
    what = f"projector weights {path}"
    weights = {name.split(PROJECTOR_PREFIX, 1)[1]: value for name, value in iterate_tensors(path, PROJECTOR_PREFIX)}
    own = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    check_shapes({name: tuple(value.shape) for name, value in weights.items()}, own, what)
    check_dtypes(list_dtypes(weights), own, what)
    check_finite(weights.items(), what)
    projector.load_state_dict(weights)
