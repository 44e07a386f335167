"""Held-out loss: the same records at every look, whatever the number of ranks, and the training left as it was."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.train.dataset import ConversationDataset, Sample
from llava.train.store import SHOWN_FAULTS, Records

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A sample's place in a batch: its index in the held-out records, and whether it counts there."""

    index: int
    counts: bool = True


def deal_batches(records: Records, batch_size: int, rank: int, num_ranks: int) -> list[list[Place]]:
    """Choose the batches of one rank.

    A batch has one modality and similar lengths, and is the same for any number of ranks. All ranks get as many batches
    of each modality, in the same order, because under ZeRO-3 they exchange weights in every pass; what is missing is
    filled with batches that do not count.

    Args:
        records: that are held out.
        batch_size: samples in a batch, at most.
        rank: from 0.
        num_ranks: in all.
    """
    dealt: list[list[Place]] = []
    for has_image in (True, False):
        (members,) = np.nonzero((records.num_images > 0) == has_image)
        members = members[np.argsort(-records.num_words[members], kind="stable")].tolist()
        starts = range(0, len(members), batch_size)
        batches = [[Place(index) for index in members[start : start + batch_size]] for start in starts]
        batches += [[Place(members[0], counts=False)]] * (-len(batches) % num_ranks)
        dealt += batches[rank::num_ranks]
    return dealt


class PlacedSamples(Dataset):
    """The samples of `deal_batches`; one that does not count has no label."""

    def __init__(self, samples: ConversationDataset):
        self.samples = samples

    def __getitem__(self, place: Place) -> Sample:
        """Build one sample."""
        sample = self.samples[place.index]
        return sample if place.counts else replace(sample, labels=torch.full_like(sample.labels, IGNORE_INDEX))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put random states and the model's mode back as they were before what runs inside."""
    is_training = model.training
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device_state = None if accelerator is None else torch.get_device_module(accelerator).get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_state is not None:
            torch.get_device_module(accelerator).set_rng_state(device_state)
        model.train(is_training)


def check_held_out(held_out: Records, trained: Records, paths: tuple[str, str]) -> None:
    """Refuse a held-out set that is the training set, and warn of records that are in both.

    Args:
        held_out: the records of `--eval_data_path`.
        trained: the records of `--data_path`.
        paths: of both, in this order.

    Raises:
        InputError: the same file, or the same records under another name.
    """
    own, other = paths
    asked = held_out.list_digests()
    known = set(asked).intersection(trained.list_digests())
    seen = held_out.read([position for position, digest in enumerate(asked) if digest in known])
    is_same_file = Path(own).exists() and Path(other).exists() and Path(own).samefile(other)
    if is_same_file or own == other or (len(seen) == len(held_out) and len(held_out) == len(trained)):
        raise InputError(f"--eval_data_path {own}: these are the training records; give records that are held out")
    if seen:
        names = [record.name for record in seen[:SHOWN_FAULTS]]
        shown = "; ".join(names) + ("; ..." if len(seen) > SHOWN_FAULTS else "")
        logger.warning("%s: %d of %d held-out records are trained on too: %s", own, len(seen), len(held_out), shown)
