"""The order of training samples for batches of one modality, or of similar lengths.

Batches of text alone then hold no image tokens, and little of a batch is padding.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

POOLED_GROUPS = 50
"""Steps whose samples are sorted together where all that counts is the length; enough that a step has no long tail."""


class ModalityLengthSampler(Sampler[int]):
    """Shuffles, then groups by modality and length.

    Every group of `group_size` (one optimizer step over all ranks) holds samples of one modality, longest first.
    Groups come in random order, the leftovers of both modalities last. The order depends on the seed and the epoch
    alone, never on the global random state.

    Args:
        lengths: int[S], numbers that grow with the samples' lengths.
        has_image: bool[S], whether each sample has an image; all alike: modalities are not told apart.
        group_size: samples per optimizer step: batch size x accumulation steps x ranks.
        seed: of the shuffling.
        num_pooled: groups whose samples are sorted together before they are divided: with 1 every step sees short and
            long samples, with more its samples are of similar lengths.
    """

    def __init__(self, lengths: np.ndarray, has_image: np.ndarray, group_size: int, seed: int = 0, num_pooled: int = 1):
        self.lengths = np.asarray(lengths)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.group_size = group_size
        self.num_pooled = num_pooled
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        groups, leftovers = [], []
        for modality in (True, False):
            members = order[self.has_image[order] == modality]
            num_grouped = len(members) // self.group_size * self.group_size
            for pool in _divide(members[:num_grouped], self.group_size * self.num_pooled):
                groups += _divide(self._sort(pool), self.group_size)
            leftovers.append(members[num_grouped:])
        for number in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[number].tolist()
        yield from self._sort(np.concatenate(leftovers)).tolist()

    def _sort(self, group: np.ndarray) -> np.ndarray:
        """Sort longest first; samples of one length stay in their order."""
        return group[np.argsort(-self.lengths[group], kind="stable")]


def _divide(members: np.ndarray, size: int) -> list[np.ndarray]:
    return [members[start : start + size] for start in range(0, len(members), size)]


class SetEpoch(TrainerCallback):
    """Sets the epoch of a sampler; on a resumed run the trainer's own loaders do not."""

    def __init__(self, sampler: ModalityLengthSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        # The tolerance absorbs the rounding of a resumed fractional epoch.
        self.sampler.set_epoch(int(state.epoch + 1e-6))
