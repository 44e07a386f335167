"""Put image tokens where the prompt says `<image>`, and pad a batch: two pure functions of tensors.

Shape letters: `S` samples, `T` prompt ids, `M` tokens of one image, `L` spliced length, `E` LLM width.
"""

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError


def count_image_marks(input_ids: Tensor) -> list[int]:
    """Count the `<image>` marks of each sample.

    Args:
        input_ids: `int64[S, T]`.

    Returns:
        S numbers.
    """
    return (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()


def assign_images(num_marks: list[int], num_images: int, *, allow_dummies: bool = False) -> list[list[int]]:
    """Say which image belongs to which mark; images come in the order of the marks.

    Args:
        num_marks: `<image>` marks of each sample.
        num_images: images given with the batch.
        allow_dummies: also accept one image, to be ignored, for each text-only sample, as the published training
            code passes it. Not for answering: there an image without a mark is a mistake.

    Returns:
        For each sample the indices of its images.

    Raises:
        InputError: when neither reading fits.
    """
    total = sum(num_marks)
    with_dummies = sum(max(1, marks) for marks in num_marks) if allow_dummies else total
    if num_images not in (total, with_dummies):
        relation = "more images than marks" if num_images > total else "fewer images than marks"
        raise InputError(
            f"{num_images} image(s) for {total} <image> mark(s) in {len(num_marks)} prompt(s): {relation}; "
            "give exactly one image per mark, in their order"
        )
    step = 1 if num_images != total else 0
    assigned, start = [], 0
    for marks in num_marks:
        assigned.append(list(range(start, start + marks)))
        start += max(marks, step)
    return assigned


def splice_sample(
    input_ids: Tensor, token_embeds: Tensor, image_features: list[Tensor], labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace each `<image>` mark by its image's tokens.

    Args:
        input_ids: `int64[T]` without padding, with IMAGE_TOKEN_INDEX marks; on the CPU nothing waits for the device.
        token_embeds: `[T, E]` embeddings of the ids; the rows at marks are not used.
        image_features: one `[M, E]` per mark, in order; M may differ and may be 0.
        labels: `int64[T]` where the ids are, or None for no labels.

    Returns:
        `[L, E]` embeddings and `int64[L]` labels, IGNORE_INDEX at image tokens (everywhere without labels).
    """
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
    embeds, targets, start = [], [], 0
    marks = (input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    for mark, features in zip(marks, image_features, strict=True):
        features = features.to(token_embeds)
        embeds += [token_embeds[start:mark], features]
        targets += [labels[start:mark], labels.new_full((features.shape[0],), IGNORE_INDEX)]
        start = mark + 1
    return torch.cat([*embeds, token_embeds[start:]]), torch.cat([*targets, labels[start:]])


def pad_batch(
    embeds: list[Tensor], labels: list[Tensor], *, side: str = "right"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stack spliced samples of different lengths.

    Args:
        embeds: S times `[L_i, E]`.
        labels: S times `int64[L_i]`, on any device.
        side: where the padding goes, "right" (training) or "left" (generation).

    Returns:
        `[S, L, E]` embeddings (zeros at padding), `bool[S, L]` attention mask, `int64[S, L]` labels (IGNORE_INDEX at
        padding) and `int64[S, L]` position ids, counted from each sample's first token (packed, as published); all on
        the embeddings' device.
    """
    device = embeds[0].device
    lengths = torch.tensor([sample.shape[0] for sample in embeds])
    longest = int(lengths.max())
    column = torch.arange(longest)[None, :]
    first = (longest - lengths)[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]
    mask = (column >= first) & (column < first + lengths[:, None])
    position_ids = (column - first).clamp(min=0) * mask

    def stack(rows: list[Tensor], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

    batch_labels = stack(labels, IGNORE_INDEX).to(device)
    return stack(embeds, 0), mask.to(device), batch_labels, position_ids.to(device)


def strip_padding(input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Say which ids of a batch are real.

    Args:
        input_ids: `int64[S, T]`.
        attention_mask: `bool or int[S, T]`, or None when the caller passed none.
        pad_token_id: then ids of this value at either end of a row count as padding; only in batches, since a single
            prompt needs none.

    Returns:
        `bool[S, T]`.
    """
    if attention_mask is not None:
        return attention_mask.to(device=input_ids.device, dtype=torch.bool)
    if pad_token_id is None or input_ids.shape[0] == 1:
        return torch.ones_like(input_ids, dtype=torch.bool)
    real = (input_ids != pad_token_id).to(torch.int64)
    after_start = real.cumsum(dim=1) > 0
    before_end = real.flip(1).cumsum(dim=1).flip(1) > 0
    return after_start & before_end
