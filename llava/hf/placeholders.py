"""From the prompts of transformers' processors to ours and back: one placeholder per image, or one per image token.

The processor writes an image's placeholder id once for every token that the whole image would take. Shape letters: `S`
samples, `T` prompt ids, `L` ids of a sample, `M` tokens of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One sample of a batch, without padding.

    Attributes:
        ids: `int64[L]` with IMAGE_TOKEN_INDEX once per image.
        places: `int64[L]` the column of the batch that each id comes from.
        images: numbers of its images, in order.
    """

    ids: Tensor
    places: Tensor
    images: range


def collapse_images(input_ids: Tensor, real: Tensor, image_id: int, counts: list[int]) -> list[Prompt]:
    """Take a batch apart, and write one placeholder per image.

    Args:
        input_ids: `int64[S, T]` as the processor writes it, on the CPU.
        real: `bool[S, T]`, False at padding, on the CPU.
        image_id: the placeholder's id.
        counts: placeholders of each image of the batch, in order.

    Returns:
        One record per sample.

    Raises:
        InputError: placeholders and images do not fit together.
    """
    prompts, first = [], 0
    for row, (ids, is_real) in enumerate(zip(input_ids, real, strict=True)):
        columns = is_real.nonzero().flatten()
        is_image = ids[columns] == image_id
        own = is_image.nonzero().flatten()
        # 1. Which images these are: as many as it takes to use up the placeholders.
        after, starts, total = first, [], 0
        while total < len(own) and after < len(counts):
            starts.append(total)
            total += counts[after]
            after += 1
        if total != len(own):
            raise InputError(
                f"prompt {row + 1} has {len(own)} image placeholders, which do not fit images of "
                f"{_list_few(counts[first:])} tokens: give text and images to the model's own processor, in one call"
            )
        # 2. The first placeholder of each image stays, as ours.
        is_kept = ~is_image
        is_kept[own[starts]] = True
        collapsed = ids[columns].masked_fill(is_image, IMAGE_TOKEN_INDEX)
        prompts.append(Prompt(collapsed[is_kept], columns[is_kept], range(first, after)))
        first = after
    if first != len(counts):
        raise InputError(f"{len(counts)} images for placeholders of {first}: give one per <image>, in their order")
    return prompts


def _list_few(counts: list[int]) -> str:
    shown = [str(count) for count in counts[:4]] + ["..."] * (len(counts) > 4)
    return ", ".join(shown) or "no"


def write_ids(prompts: list[Prompt], lengths: list[int], image_id: int, pad_id: int, *, side: str) -> Tensor:
    """Put a batch together again, with one placeholder per token that is left of an image.

    Args:
        prompts: the samples.
        lengths: M of each image of the batch, at least 1.
        image_id: the placeholder's id.
        pad_id: for padding.
        side: where the padding goes.

    Returns:
        `int64[S, T]`, on the CPU.
    """
    rows = []
    for prompt in prompts:
        is_image = prompt.ids == IMAGE_TOKEN_INDEX
        repeats = torch.ones_like(prompt.ids)
        repeats[is_image] = torch.tensor([lengths[image] for image in prompt.images], dtype=torch.int64)
        rows.append(prompt.ids.masked_fill(is_image, image_id).repeat_interleave(repeats))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
