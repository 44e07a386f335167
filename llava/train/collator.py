"""A batch from samples: texts padded on the right, pictures in one row in order of their marks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.dataset import Sample


@dataclass(frozen=True)
class Collator:
    """Builds the model's arguments for one batch.

    Attributes:
        pad_token_id: what fills `input_ids`.
        max_length: ids beyond it are cut off, and the pictures whose marks they held.
        has_vision: also pass pictures and queries; False for a plain language model, which knows neither.
    """

    pad_token_id: int
    max_length: int
    has_vision: bool = True

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Pad and join samples.

        Returns:
            `input_ids`, `labels` int64[S, T] and `attention_mask` bool[S, T]; with vision also `images`
            (float32[I, 3, S, S] where shapes agree, else a list, None without any picture), `image_sizes` and `texts`,
            one query per sample.
        """
        ids = [sample.input_ids[: self.max_length] for sample in samples]
        labels = [sample.labels[: self.max_length] for sample in samples]
        real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence(real, batch_first=True, padding_value=False),
        }
        if self.has_vision:
            batch |= _collect_images(samples, ids)
            batch["texts"] = [sample.query for sample in samples]
        return batch


def _collect_images(samples: Sequence[Sample], ids: Sequence[Tensor]) -> dict[str, Any]:
    """Line up the pictures whose marks survived the cut."""
    images: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for sample, row in zip(samples, ids, strict=True):
        num_marks = int((row == IMAGE_TOKEN_INDEX).sum())
        images += sample.images[:num_marks]
        sizes += sample.image_sizes[:num_marks]
    if not images:
        return {"images": None, "image_sizes": None}
    alike = all(image.shape == images[0].shape for image in images)
    return {"images": torch.stack(images) if alike else images, "image_sizes": sizes}
