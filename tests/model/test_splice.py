"""Splicing image tokens into prompts, and padding batches."""

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.model.splice import assign_images, pad_batch, splice_sample, strip_padding


def embed(ids: torch.Tensor) -> torch.Tensor:
    return ids.clamp(min=0)[:, None].float().repeat(1, 2)


def test_image_tokens_take_the_place_of_their_placeholder():
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX])
    first, second = torch.full((2, 2), 70.0), torch.full((1, 2), 80.0)
    embeds, labels, image_of, positions = splice_sample(
        ids, embed(ids), torch.tensor([1, -100, 5, -100]), [first, second]
    )
    assert image_of.tolist() == [-1, 0, 0, -1, 1]
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert embeds[:, 0].tolist() == [1, 70, 70, 5, 80]
    assert labels.tolist() == [1, IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX]


def test_an_image_may_have_no_tokens():
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX, 5])
    embeds, _, image_of, _ = splice_sample(ids, embed(ids), ids, [torch.zeros(0, 2)])
    assert embeds[:, 0].tolist() == [1, 5]
    assert image_of.tolist() == [-1, -1]


def test_text_only_samples_stay_as_they_are():
    ids = torch.tensor([1, 4, 5])
    embeds, labels, _, _ = splice_sample(ids, embed(ids), ids, [])
    assert torch.equal(embeds, embed(ids))
    assert torch.equal(labels, ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_the_named_side_and_positions_stay(side):
    samples = [torch.ones(3, 2), torch.ones(1, 2)]
    batch = pad_batch(
        samples,
        [torch.tensor([7, 8, 9]), torch.tensor([7])],
        [torch.tensor([-1, 0, -1]), torch.tensor([0])],
        [torch.tensor([0, 1, 2]), torch.tensor([0])],
        side=side,
    )
    embeds, mask, labels, positions = batch.embeds, batch.attention_mask, batch.labels, batch.position_ids
    assert mask.sum(dim=1).tolist() == [3, 1]
    assert mask[1].tolist() == ([False, False, True] if side == "left" else [True, False, False])
    assert labels[1][mask[1]].tolist() == [7]
    assert batch.image_of[1].tolist() == ([-1, -1, 0] if side == "left" else [0, -1, -1])
    assert (labels[1][~mask[1]] == IGNORE_INDEX).all()
    assert not embeds[~mask].any()
    assert positions[0].tolist() == [0, 1, 2]
    assert positions[1][mask[1]].tolist() == [0]


def test_images_are_assigned_in_the_order_of_placeholders():
    assert assign_images([2, 0, 1], 3) == [[0, 1], [], [2]]


def test_the_published_dummy_image_of_text_only_samples_is_recognised_and_ignored():
    assert assign_images([2, 0, 1], 4, allow_dummies=True) == [[0, 1], [], [3]]


def test_an_image_without_a_placeholder_is_a_mistake_when_answering():
    with pytest.raises(InputError, match="more images than placeholders"):
        assign_images([0], 1)


@pytest.mark.parametrize(("num_images", "says"), [(1, "fewer images"), (4, "more images")])
def test_wrong_number_of_images_is_refused_in_one_line(num_images, says):
    with pytest.raises(InputError, match=says):
        assign_images([2, 1], num_images)


def test_padding_is_recognised_at_both_ends_without_a_mask_but_never_inside():
    ids = torch.tensor([[0, 0, 5, 0, 6], [5, 6, 7, 0, 0]])
    assert strip_padding(ids, None, 0).tolist() == [
        [False, False, True, True, True],
        [True, True, True, False, False],
    ]


def test_a_single_prompt_has_no_padding():
    assert strip_padding(torch.tensor([[0, 5, 0]]), None, 0).all()
