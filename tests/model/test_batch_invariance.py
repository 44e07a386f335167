"""A sample never feels its batch: 64 mixed samples, alone and in batches of 2, 8 and 16, in shuffled orders."""

import os
import random

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

DEVICE = os.environ.get("LLAVA_TEST_DEVICE", "cpu")
SENTENCE = "what is the color of the big red circle near the sign and how many dogs are there"
WORDS = SENTENCE.split()
NUM_SAMPLES, NEW_TOKENS = 64, 8


@pytest.fixture(scope="module")
def model_and_tokenizer(golden):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        tokenizer, model, _, _ = load_pretrained_model("llava-v1.5-tiny84-TRIM", device=DEVICE, dtype="float32")
    return model, tokenizer


@pytest.fixture(scope="module")
def samples(model_and_tokenizer):
    """(ids, images, query) with one, two, three or no images and prompts of different lengths."""
    _, tokenizer = model_and_tokenizer
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    made = []
    for index in range(NUM_SAMPLES):
        num_images = (1, 1, 2, 0, 3)[index % 5]
        question = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 30))) + "?"
        prompt = "A chat. USER: " + "<image>\n" * num_images + question + " ASSISTANT:"
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        # Smooth pictures: patches differ enough for the IQR rule to find outliers.
        images = torch.randn(num_images, 3, 6, 6, generator=generator)
        made.append((ids, torch.nn.functional.interpolate(images, size=84, mode="bilinear"), question))
    return made


def answer(model, batch, *, side: str = "right", with_texts: bool = True):
    longest = max(len(ids) for ids, _, _ in batch)
    rows, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (ids, _, _) in enumerate(batch):
        span = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        rows[row, span], mask[row, span] = ids, True
    images = [image for _, pictures, _ in batch for image in pictures]
    owners = [text for _, pictures, text in batch for _ in pictures]
    tokens = model.encode_images(images, owners)
    kept = [picture.kept for picture in tokens]
    texts = [text for _, _, text in batch] if with_texts else None
    ids = model.generate(
        rows, attention_mask=mask, images=images or None, texts=texts, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    answers = []
    for row in ids.tolist():
        answers.append(row[: row.index(2)] if 2 in row else row)
    return answers, kept


@pytest.fixture(scope="module")
def alone(model_and_tokenizer, samples):
    model, _ = model_and_tokenizer
    return [answer(model, [sample]) for sample in samples]


def check_equal(model, samples, alone, order: list[int], batch_size: int, **settings) -> None:
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        answers, kept = answer(model, [samples[index] for index in chosen], **settings)
        assert answers == [alone[index][0][0] for index in chosen]
        expected = [mask for index in chosen for mask in alone[index][1]]
        assert len(kept) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, expected, strict=True))


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_batches_give_the_answers_and_patches_of_single_samples(model_and_tokenizer, samples, alone, batch_size):
    check_equal(model_and_tokenizer[0], samples, alone, list(range(NUM_SAMPLES)), batch_size)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_shuffled_order_changes_nothing(model_and_tokenizer, samples, alone, seed, batch_size):
    order = list(range(NUM_SAMPLES))
    random.Random(seed).shuffle(order)
    check_equal(model_and_tokenizer[0], samples, alone, order, batch_size)


def test_left_padded_prompts_give_the_same_answers(model_and_tokenizer, samples, alone):
    check_equal(model_and_tokenizer[0], samples, alone, list(range(NUM_SAMPLES)), 8, side="left")


def test_queries_recovered_from_ids_give_the_same_answers(model_and_tokenizer, samples, alone):
    check_equal(model_and_tokenizer[0], samples, alone, list(range(NUM_SAMPLES)), 8, with_texts=False)


def test_the_samples_exercise_the_selection(alone):
    counts = {int(mask.sum()) for _, masks in alone for mask in masks}
    assert len(counts) >= 3
    assert len({tuple(answers[0]) for answers, _ in alone}) >= 5
