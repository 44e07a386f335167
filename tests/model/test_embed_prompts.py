"""Prompts and images into embeddings: the record that our code uses, and LLaVA's six results over it."""

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model

CHECKPOINT = "llava-v1.5-tiny84-TRIM"
IDS = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 9], [1, IMAGE_TOKEN_INDEX, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model(golden):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32", reduce="TRIM:9")[1]


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))


def test_image_tokens_lie_between_the_embedded_text(model, images):
    first, second = model.encode_images(images, ["a bus", "a dog"])
    batch = model.embed_prompts(IDS, attention_mask=MASK, images=images, texts=["a bus", "a dog"])
    embed = model.get_input_embeddings()
    text = embed(torch.tensor([1, 5, 7, 9]))
    expected = torch.cat([text[:2], first.features, text[2:]])
    assert torch.equal(batch.embeds[0], expected)
    assert batch.attention_mask.sum(dim=1).tolist() == [4 + 10, 2 + 10]
    assert torch.equal(batch.embeds[1, 1:11], second.features)
    assert batch.labels is None
    assert batch.position_ids[1].tolist() == [*range(12), 0, 0]


def test_tokens_made_before_give_the_same_embeddings(model, images):
    tokens = model.encode_images(images, ["a bus", "a dog"])
    made = model.embed_prompts(IDS, attention_mask=MASK, image_tokens=tokens, padding_side="left")
    fresh = model.embed_prompts(IDS, attention_mask=MASK, images=images, texts=["a bus", "a dog"], padding_side="left")
    assert torch.equal(made.embeds, fresh.embeds)
    assert made.attention_mask[1].tolist() == [False, False] + [True] * 12


@pytest.mark.parametrize("labels", [None, IDS.clamp(min=IGNORE_INDEX)])
def test_llavas_six_results_are_those_of_embed_prompts(model, images, labels):
    six = model.prepare_inputs_labels_for_multimodal(IDS, None, MASK, None, labels, images, None, "a bus")
    batch = model.embed_prompts(IDS, attention_mask=MASK, labels=labels, images=images, texts="a bus")
    ids, positions, mask, cache, embeds, targets = six
    assert ids is None and cache is None
    assert torch.equal(positions, batch.position_ids) and torch.equal(mask, batch.attention_mask)
    assert torch.equal(embeds, batch.embeds)
    assert targets is batch.labels is None or torch.equal(targets, batch.labels)


def test_forward_and_generate_read_what_embed_prompts_gives(model, images):
    batch = model.embed_prompts(IDS, attention_mask=MASK, images=images, texts="a bus")
    direct = model(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    assert torch.equal(model(IDS, attention_mask=MASK, images=images, texts="a bus").logits, direct.logits)


def test_the_projector_of_a_text_only_training_batch_takes_part(model):
    model.train()
    try:
        ids = torch.tensor([[1, 5, 7]])
        model(ids, labels=ids).loss.backward()
        gradients = [weight.grad for weight in model.get_model().mm_projector.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
