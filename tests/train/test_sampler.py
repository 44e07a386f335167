"""The order of samples when batches are grouped by modality and length."""

import random
from itertools import pairwise
from types import SimpleNamespace

import torch

from llava.train.sampler import ModalityLengthSampler, SetEpoch

rng = random.Random(0)
LENGTHS = [rng.randint(1, 500) for _ in range(101)]
HAS_IMAGE = [rng.random() < 0.7 for _ in LENGTHS]
GROUP = 8


def make_sampler(seed: int = 0) -> ModalityLengthSampler:
    return ModalityLengthSampler(LENGTHS, HAS_IMAGE, GROUP, seed)


def groups(order: list[int]) -> list[list[int]]:
    return [order[start : start + GROUP] for start in range(0, len(order), GROUP)]


def test_the_order_is_the_published_one():
    random_state = random.Random(3)
    lengths = [random_state.randint(1, 4) for _ in range(23)]  # many are equal: those stay in their order
    has_image = [random_state.random() < 0.6 for _ in lengths]
    order = [10, 11, 1, 20, 16, 3, 0, 17, 7, 15, 9, 5, 6, 2, 8, 4, 12, 21, 14, 18, 13, 19, 22]
    assert list(ModalityLengthSampler(lengths, has_image, 4, seed=7)) == order


def test_every_sample_comes_exactly_once():
    assert sorted(make_sampler()) == list(range(len(LENGTHS)))
    assert len(make_sampler()) == len(LENGTHS)


def test_every_full_group_has_one_modality():
    num_full = sum(HAS_IMAGE) // GROUP + (len(HAS_IMAGE) - sum(HAS_IMAGE)) // GROUP
    for group in groups(list(make_sampler()))[:num_full]:
        assert len({HAS_IMAGE[index] for index in group}) == 1


def test_lengths_fall_inside_a_group():
    for group in groups(list(make_sampler()))[:-2]:
        lengths = [LENGTHS[index] for index in group]
        assert lengths == sorted(lengths, reverse=True)


def test_pooled_groups_hold_samples_of_neighbouring_lengths():
    order = list(ModalityLengthSampler(LENGTHS, [True] * len(LENGTHS), GROUP, num_pooled=100))
    assert sorted(order) == list(range(len(LENGTHS)))
    *whole, _ = groups(order)
    spans = sorted((LENGTHS[group[-1]], LENGTHS[group[0]]) for group in whole)
    assert all(below[1] <= above[0] for below, above in pairwise(spans))
    assert spans != [(LENGTHS[group[-1]], LENGTHS[group[0]]) for group in whole]  # groups come in random order


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(make_sampler())
    torch.manual_seed(999)
    assert list(make_sampler()) == first
    assert list(make_sampler(seed=5)) != first
    sampler = make_sampler()
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_drawing_an_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(make_sampler())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_epoch_reaches_the_sampler_despite_rounding():
    sampler = make_sampler()
    SetEpoch(sampler).on_epoch_begin(None, SimpleNamespace(epoch=1.9999999), None)
    assert sampler.epoch == 2
