"""Lay the samples of a training batch end to end in rows, so that little of it is padding.

A token attends to the tokens of its own sample alone: positions begin anew with each sample, by which transformers
builds its masks, and flash attention is told where samples begin. Shape letters: `S` samples, `R` rows, `L` length of a
row, `E` LLM width.
"""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.model.splice import PromptEmbeds, pad_batch, upload
from llava.model.token_reduction import TokenReducer

FLASH = "flash_attention_2"
ATTENTIONS = ("sdpa", "eager", FLASH)


def check_packing(attention: str, reducer: TokenReducer | None) -> None:
    """Check that attention can be kept within samples.

    Args:
        attention: transformers' name of the attention implementation.
        reducer: the token reduction before the language model, or None.

    Raises:
        InputError: an attention that is not known to do it, or positions with gaps, which look like borders.
    """
    if attention not in ATTENTIONS:
        raise InputError(
            f"packing keeps attention within a sample with {', '.join(ATTENTIONS)}, not with {attention}: "
            "choose one of them by --attn_implementation, or leave packing out"
        )
    if reducer is not None and reducer.position_ids == "original":
        raise InputError(
            f"packing takes the gaps that {reducer.spec()} leaves in positions for borders of samples: "
            "leave position_ids=original or packing out"
        )


def plan_rows(lengths: Sequence[int], limit: int | None, even_width: float) -> list[list[int]]:
    """Spread samples over rows so that these cost least: long rows hold little padding, but attention in them is dear.

    Args:
        lengths: of S samples, none above the limit.
        limit: longest row; None: none is too long.
        even_width: see `find_even_width`.

    Returns:
        The samples of each row, in order. Rows that hold one sample each are always among the choices.
    """
    longest_first = sorted(range(len(lengths)), key=lambda sample: lengths[sample], reverse=True)
    choices = []
    for num_rows in range(1, len(lengths) + 1):
        # Each sample, longest first, goes into the row that is shortest so far.
        loads = [(0, row) for row in range(num_rows)]
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        for sample in longest_first:
            load, row = loads[0]
            rows[row].append(sample)
            heapq.heapreplace(loads, (load + lengths[sample], row))
        width = max(load for load, _ in loads)
        if limit is None or width <= limit:
            cost = num_rows * width * (1 + width / even_width)
            choices.append((cost, width, rows))
    _, _, rows = min(choices, key=lambda choice: choice[:2])
    return sorted(sorted(row) for row in rows)


def find_even_width(config: PreTrainedConfig) -> float:
    """Find the length of a row at which attention takes as many FLOPs as the rest of a layer.

    Flash attention skips the other samples of a row: there no length is too long, which is infinity.
    """
    if config._attn_implementation == FLASH:
        return math.inf
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head, config.num_key_value_heads * head
    # Products per token: the matrices of attention and MLP, and two products with each token of the row.
    return width * (2 * queries + 2 * keys + 3 * config.intermediate_size) / (2 * queries)


def pack_batch(
    embeds: Sequence[Tensor],
    labels: Sequence[Tensor],
    image_of: Sequence[Tensor],
    limit: int | None,
    even_width: float,
) -> PromptEmbeds:
    """Join spliced samples of different lengths to rows.

    Args:
        embeds: S times `[L_i, E]`, L_i from 1 to the limit.
        labels: S times `int64[L_i]`, on any device.
        image_of: S times `int64[L_i]`, on the CPU.
        limit: see `plan_rows`.
        even_width: see `plan_rows`.

    Returns:
        The rows, with `borders`. Padding is at the end of a row, where no token of a sample sees it; it counts as more
        of the row's last sample, so that it is no sequence of its own.
    """
    lengths = [sample.shape[0] for sample in embeds]
    rows = plan_rows(lengths, limit, even_width)
    width = max(sum(lengths[sample] for sample in row) for row in rows)
    # The first token of a sample is predicted by nothing, least of all by the sample before it.
    labels = [torch.cat([torch.full_like(own[:1], IGNORE_INDEX), own[1:]]) for own in labels]
    extents = []
    for row in rows:
        own = [lengths[sample] for sample in row]
        extents += [*own[:-1], own[-1] + width - sum(own)]
    positions = torch.cat([torch.arange(extent) for extent in extents]).split(width)
    columns = ([torch.cat([column[sample] for sample in row]) for row in rows] for column in (embeds, labels, image_of))
    borders = torch.tensor([0, *extents]).cumsum(dim=0, dtype=torch.int32)
    return pad_batch(*columns, positions, borders=borders)


def mark_borders(borders: Tensor, device: torch.device) -> dict[str, Tensor | int]:
    """Make the arguments that tell flash attention where samples begin; other kinds look at positions.

    Args:
        borders: `int32[S + 1]`, see `splice.PromptEmbeds`.
        device: where attention runs.
    """
    longest, places = int(borders.diff().max()), upload(borders, device)
    return {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": longest, "max_length_k": longest}
