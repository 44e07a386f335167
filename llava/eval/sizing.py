"""How much is done at once: from the model's shapes and the memory there is.

Answers do not depend on any of it. The rule of `--batch-size auto`: up to 128 questions, as long as their KV cache, at
full answer length, and one layer's activations fit into half of an accelerator's free memory. On the CPU up to 64,
where more gain little, and an eighth of the machine's memory: nobody reports a shortage there before the process is
killed.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

MAX_ROWS = 128
MAX_ROWS_ON_CPU = 64
ACCELERATOR_SHARE = 0.5
CPU_SHARE = 0.125
UNIT_BYTES = 2**31
MIN_UNIT, MAX_UNIT = 64, 512
ANYRES_CROPS = 5
"""A whole view and four tiles, as LLaVA-1.6's canvases have it."""


@dataclass(frozen=True)
class BatchLimits:
    """What one call of `generate` may hold.

    Attributes:
        rows: questions.
        positions: questions times the positions of the longest, new tokens included; None: any.
    """

    rows: int
    positions: int | None = None

    def allow(self, num_rows: int, longest: int) -> bool:
        """Say whether so many questions of up to `longest` positions fit; a single one always does."""
        if num_rows == 1:
            return True
        return num_rows <= self.rows and (self.positions is None or num_rows * longest <= self.positions)


def choose_limits(model: Any, batch_size: int | None) -> BatchLimits:
    """Turn `--batch-size` into limits: a number is taken as it is, None follows the rule above."""
    if batch_size is not None:
        return BatchLimits(batch_size)
    rows = MAX_ROWS_ON_CPU if model.device.type == "cpu" else MAX_ROWS
    return BatchLimits(rows, max(1, int(usable_bytes(model.device) / position_bytes(model))))


def position_bytes(model: Any) -> int:
    """Estimate the memory that one position of one question takes: KV cache, and activations of one layer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    activations = 6 * config.hidden_size + 3 * config.intermediate_size
    return (cache + activations) * model.dtype.itemsize


def usable_bytes(device: torch.device) -> float:
    """Return how much of the memory a batch may take."""
    if device.type != "cpu":
        try:
            return ACCELERATOR_SHARE * torch.accelerator.get_memory_info(device)[0]
        except (RuntimeError, NotImplementedError):
            pass  # a backend that does not tell
    return CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_unit_size(model: Any) -> int:
    """Say how many questions are prepared together, patches and image tokens of all in memory.

    All workers of a run must find the same number: it depends on the checkpoint alone, not on memory or batch size.
    """
    config = model.config
    crops = ANYRES_CROPS if getattr(config, "image_aspect_ratio", None) == "anyres" else 1
    each = model.get_vision_tower().num_patches * crops * (4 * config.mm_hidden_size + 4 * config.hidden_size)
    return min(MAX_UNIT, max(MIN_UNIT, UNIT_BYTES // each))
