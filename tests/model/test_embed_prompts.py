"""Prompts and images into embeddings: the record that our code uses, and LLaVA's six results over it."""

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
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


@pytest.mark.parametrize("call", ["encode_images", "make_image_tokens", "embed_queries"])
def test_one_text_is_the_query_of_every_image_not_a_list_of_letters(model, images, call):
    if call == "embed_queries":
        assert torch.equal(model.embed_queries("hi"), model.embed_queries(["hi"]))
        return
    given = images if call == "encode_images" else model.encode_patches(images)
    one, both, letters = (getattr(model, call)(given, texts) for texts in ("hi", ["hi", "hi"], ["h", "i"]))
    assert all(map(torch.equal, (each.scores for each in one), (each.scores for each in both)))
    assert not torch.equal(one[0].scores, letters[0].scores)


WRONG_TEXTS = [
    (["a"], "1 texts for 2 {}s: give one query per {}, or one string"),
    (["a"] * 3, "3 texts for 2 {}s"),
    (["a", 5], "texts[1]: expected a text, not int"),
    (5, "texts: expected a text or a list of texts, not int"),
    (b"hi", "texts: expected a text or a list of texts, not bytes"),
]


@pytest.mark.parametrize(("texts", "reason"), WRONG_TEXTS)
def test_texts_that_are_no_queries_are_refused_in_words(model, images, texts, reason):
    with pytest.raises(InputError) as caught:
        model.encode_images(images, texts)
    assert reason.format("image", "image") in str(caught.value)
    with pytest.raises(InputError) as caught:
        model.generate(IDS, attention_mask=MASK, images=images, texts=texts)
    assert reason.format("prompt", "prompt") in str(caught.value)


@pytest.mark.parametrize("images", ["ab", None, [[1.0]], torch.zeros(3, 84, 84), [torch.zeros(84, 84)]])
def test_what_are_no_pixel_values_is_refused_in_words(model, images):
    with pytest.raises(InputError, match=r"images.*: expected pixel values, as process_images makes them"):
        model.encode_images(images, "a bus")


WRONG_ARGUMENTS = [
    ({"inputs": IDS[0]}, "input_ids of shape (5,): expected [prompts, ids]; input_ids[None] makes a batch"),
    ({"inputs": IDS.tolist()}, "input_ids: expected a tensor [prompts, ids], not list"),
    ({"inputs": IDS.float()}, "input_ids of float32: expected int64"),
    ({"attention_mask": MASK[:, :3]}, "attention_mask has shape (2, 3) for input_ids of shape (2, 5)"),
    ({"attention_mask": MASK.tolist()}, "attention_mask: expected a tensor [prompts, ids], not list"),
    ({"image_sizes": [(84, 84)]}, "1 image_sizes for 2 images"),
    ({"prefill_chunk_size": 8}, "read in one piece, and alone: leave out prefill_chunk_size"),
    ({"assistant_model": "self"}, "read in one piece, and alone: leave out assistant_model"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG_ARGUMENTS, ids=[reason for _, reason in WRONG_ARGUMENTS])
def test_arguments_of_generate_that_do_not_fit_are_refused_in_words(model, images, changes, reason):
    arguments = {"inputs": IDS, "attention_mask": MASK, "images": images, "texts": "a bus", "max_new_tokens": 2}
    assert len(model.generate(**arguments)) == 2
    with pytest.raises(InputError) as caught:
        model.generate(**arguments | changes)
    assert reason in str(caught.value)


def test_arguments_of_embed_prompts_and_forward_that_do_not_fit_are_refused_in_words(model, images):
    arguments = {"input_ids": IDS, "attention_mask": MASK, "images": images, "texts": "a bus"}
    with pytest.raises(InputError, match=r"padding_side 'up': expected \"left\" or \"right\""):
        model.embed_prompts(**arguments, padding_side="up")
    with pytest.raises(InputError, match=r"labels has shape \(2, 3\) for input_ids of shape \(2, 5\)"):
        model(**arguments, labels=IDS[:, :3])
    batch = model.embed_prompts(**arguments, padding_side="left")
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 5\) for inputs_embeds of shape \(2, "):
        model.generate(inputs_embeds=batch.embeds, attention_mask=MASK)


def test_a_method_inside_the_language_model_refuses_a_cache_of_another_kind(model, images):
    spec = model.token_reducer.spec()
    model.set_token_reduction("FastV:0.5,layer=1")
    try:
        with pytest.raises(InputError, match="FastV has its own cache: leave out cache_implementation"):
            model.generate(IDS, attention_mask=MASK, images=images, cache_implementation="static")
    finally:
        model.set_token_reduction(spec)
