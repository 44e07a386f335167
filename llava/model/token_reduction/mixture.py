"""Budgets that are a mean over images, `avg=120.7`: some images keep one number of patches, the others the next one.

Which images keep more is drawn from a fingerprint of each image's patches, so that it depends on nothing else: not on
the batch, the question, the method or the run. The methods know nothing of it: they are called once for the images of
each count. Shape letters: `I` images (or crops), `N` patches, `D` vision width.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Record = TypeVar("Record")

FINGERPRINT_SIZE = 64  # the signs of this many features tell one image from another
SALT = 0x6D697874  # another draw than that of the patches that Random keeps
RANGE = 2**32


def fingerprint_images(patches: Tensor, seed: int) -> list[int]:
    """Draw a number for each image from the signs of some of its features: equal images get equal numbers.

    Signs, because rounding differs a little between batch sizes and devices while signs stay.

    Args:
        patches: `[I, N, D]`.
        seed: another one gives other numbers.

    Returns:
        I numbers from 0 to 2**32 - 1.
    """
    flat = patches.detach().flatten(1)
    signs = (flat[:, :: max(1, flat.shape[1] // FINGERPRINT_SIZE)][:, :FINGERPRINT_SIZE] > 0).to(torch.uint8)
    # One wait for the device, for all images.
    return [zlib.crc32(bytes(own_signs), seed & (RANGE - 1)) for own_signs in signs.cpu().tolist()]


def draw_parts(patches: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Deal images out to parts, each to a part by its own fingerprint.

    Args:
        patches: `[I, N, D]`.
        shares: the share of images that each part gets in the long run; they add up to 1.

    Returns:
        For each part the numbers of its images, `int64[...]`, rising, on the CPU.
    """
    places = torch.tensor(fingerprint_images(patches, SALT), dtype=torch.float64) / RANGE  # in [0, 1)
    limits = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1]
    part = torch.bucketize(places, limits, right=True)
    return [(part == number).nonzero().flatten() for number in range(len(shares))]


def take_rows(record: Record, rows: Tensor) -> Record:
    """Take the images of these numbers out of a record (a dataclass with tensors `[I, ...]`, or mappings to such)."""

    def take(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: take(each) for key, each in value.items()}
        return value[rows.to(value.device)] if isinstance(value, Tensor) else value

    return replace(record, **{each.name: take(getattr(record, each.name)) for each in fields(record)})


def join_rows(records: Sequence[Record], rows: Sequence[Tensor]) -> Record:
    """Put records of images together again, shorter rows zero-padded.

    Args:
        records: of the parts, at least one: each a dataclass of tensors `[I, ...]` or None. What only some have is zero
            in the others, and `order` there is the order as they lie.
        rows: for each the numbers of its images, as `draw_parts` gives them.
    """
    order = torch.cat(list(rows)).argsort()
    joined = {}
    for each in fields(records[0]):
        values = [getattr(record, each.name) for record in records]
        given = next((value for value in values if value is not None), None)
        if given is None:
            continue
        for number, value in enumerate(values):
            if value is None:
                values[number] = given.new_zeros(len(rows[number]), *given.shape[1:])
                if each.name == "order":
                    values[number] += torch.arange(given.shape[1], device=given.device)
        width = max(value.shape[1] if value.dim() > 1 else 0 for value in values)
        padded = [_pad(value, width) for value in values]
        joined[each.name] = torch.cat(padded)[order.to(given.device)]
    return replace(records[0], **joined)


def _pad(value: Tensor, width: int) -> Tensor:
    missing = width - value.shape[1] if value.dim() > 1 else 0
    return F.pad(value, (*(0, 0) * (value.dim() - 2), 0, missing)) if missing else value
