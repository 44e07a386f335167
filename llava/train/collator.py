"""A batch from samples: texts padded on the right, all images in one list, in order of their placeholders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.multimodal_encoder.text_reader import TextIds
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.train.dataset import Sample


class Batch(TypedDict, total=False):
    """The model's arguments for S samples, I images and T positions; images, sizes and texts only with vision.

    Attributes:
        input_ids: int64[S, T].
        labels: int64[S, T].
        attention_mask: bool[S, T].
        images: float32[I, 3, H, W] if all shapes agree, else a list of I tensors; with a feature cache a list of what
            the samples have; None without any image.
        image_sizes: (width, height) of each image before any resizing; None without any image.
        image_keys: with a feature cache, the name of each image in it; the trainer takes it out.
        texts: one query per sample, or its ids.
        replaced: faults of records that others stand in for; the trainer takes it out.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    images: Tensor | list[Tensor] | list[Tensor | ImageFeatures] | None
    image_sizes: list[tuple[int, int]] | None
    image_keys: list[str]
    texts: list[str | TextIds]
    replaced: list[str]


@dataclass(frozen=True)
class Collator:
    """Builds the model's arguments for one batch.

    Attributes:
        pad_token_id: fills `input_ids`.
        max_length: ids beyond it are cut off, and with them the images of their placeholders.
        has_vision: also pass images and queries; False for a plain language model, which takes neither.
    """

    pad_token_id: int
    max_length: int
    has_vision: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Cut, pad and join samples."""
        # 1. Cut before padding. The placeholder counts as one position here; the model cuts the spliced sequence.
        ids = [sample.input_ids[: self.max_length] for sample in samples]  # S x int64[<= max_length]
        labels = [sample.labels[: self.max_length] for sample in samples]

        # 2. Pad on the right. The mask follows lengths, not ids: the padding token may also occur as a real token.
        real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        batch = Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),  # [S, T]
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),  # [S, T]
            attention_mask=pad_sequence(real, batch_first=True, padding_value=False),  # [S, T]
        )
        if replaced := [fault for sample in samples for fault in sample.replaced]:
            batch["replaced"] = replaced
        if not self.has_vision:
            return batch

        # 3. Images of all samples in one list. The model hands them to the placeholders in this order, so an image
        #    whose placeholder was cut off must go.
        images: list[Tensor | ImageFeatures] = []
        sizes: list[tuple[int, int]] = []
        keys: list[str] = []
        for sample, row in zip(samples, ids, strict=True):
            num_images = int((row == IMAGE_TOKEN_INDEX).sum())
            images += sample.images[:num_images]
            sizes += sample.image_sizes[:num_images]
            keys += sample.image_keys[:num_images]
        if keys:
            batch["images"], batch["image_keys"] = images, keys
        else:
            batch["images"] = _stack_alike(images)  # [I, 3, H, W]
        batch["image_sizes"] = sizes or None
        batch["texts"] = [sample.query for sample in samples]
        return batch


def _stack_alike(images: list[Tensor]) -> Tensor | list[Tensor] | None:
    """Stack images of one shape; crops of several images may differ in number and stay a list."""
    if not images:
        return None
    return torch.stack(images) if all(image.shape == images[0].shape for image in images) else images
