"""A checkpoint that transformers' Auto classes load answers as one that our loader loads; embeddings may be given."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava import load_pretrained_model
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from playground.shapes.world import draw_scene

SHAPES = Path(__file__).parents[2] / "playground/shapes/checkpoints"
PLAIN, TRIM = str(SHAPES / "llava-shapes"), str(SHAPES / "llava-shapes-trim")
GREEDY = {"do_sample": False, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def loaded():
    """The pocket model with TRIM, as our loader loads it."""
    tokenizer, model, processor, _ = load_pretrained_model(TRIM, device="cpu")
    return model, tokenizer, processor


@pytest.fixture(scope="module")
def prompts(loaded):
    """Two prompts of different lengths, padded on the left, with an image each."""
    model, tokenizer, processor = loaded
    (first, one), (second, two) = (draw_scene(3, 1, number) for number in range(2))
    texts = [f"What color is the {one.objects[0].shape}?", f"Where is the {two.objects[0].name}?"]
    rows = [
        tokenizer_image_token(f"USER: <image>\n{text} ASSISTANT:", tokenizer, return_tensors="pt") for text in texts
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    return {"input_ids": ids, "images": process_images([first, second], processor, model.config)}, texts


def test_an_auto_model_reads_its_tower_and_its_tokenizer_when_they_are_first_needed(loaded, prompts):
    inputs, _ = prompts
    model = AutoModelForCausalLM.from_pretrained(TRIM, dtype=torch.float32)
    assert not model.get_vision_tower().is_loaded and model.tokenizer is None
    assert model.generate(**inputs, **GREEDY).tolist() == loaded[0].generate(**inputs, **GREEDY).tolist()
    assert model.get_vision_tower().is_loaded and model.tokenizer is not None
    assert model.get_vision_tower().dtype == torch.float32


def test_a_tower_that_was_read_under_inference_mode_can_be_trained(prompts):
    model = AutoModelForCausalLM.from_pretrained(PLAIN, dtype=torch.float32)
    with torch.inference_mode():
        model.encode_patches(prompts[0]["images"])
    assert not any(weight.is_inference() for weight in model.get_vision_tower().parameters())


def test_an_auto_model_embeds_queries_before_it_has_seen_an_image(loaded):
    model = AutoModelForCausalLM.from_pretrained(TRIM, dtype=torch.float32)
    assert torch.equal(model.embed_queries(["a red circle"]), loaded[0].embed_queries(["a red circle"]))


def test_embeddings_of_embed_prompts_are_answered_as_the_prompts_themselves(loaded, prompts):
    model, (inputs, texts) = loaded[0], prompts
    batch = model.embed_prompts(**inputs, texts=texts, padding_side="left", pad_token_id=0)
    found = model.generate(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, **GREEDY)
    assert found.tolist() == model.generate(**inputs, texts=texts, **GREEDY).tolist()
    with_temperature = {"temperature": 0, "top_p": None} | GREEDY  # as LLaVA's callers pass it
    alone = model.generate(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, **with_temperature)
    assert alone.tolist() == found.tolist()


def test_embeddings_that_generate_cannot_continue_are_refused_in_one_line(loaded, prompts):
    model, (inputs, texts) = loaded[0], prompts
    batch = model.embed_prompts(**inputs, texts=texts, padding_side="right", pad_token_id=0)
    right = {"inputs_embeds": batch.embeds, "attention_mask": batch.attention_mask}
    long = {"inputs_embeds": torch.zeros(1, 3000, model.config.hidden_size)}
    cases = [
        (right, 'embed_prompts(..., padding_side="left")'),
        (long, "the prompt takes 3000 positions"),
        (right | inputs, "inputs_embeds hold the whole prompt"),
        ({}, "nothing to answer"),
    ]
    for arguments, reason in cases:
        with pytest.raises(InputError) as caught:
            model.generate(**arguments, **GREEDY)
        assert reason in str(caught.value) and "\n" not in str(caught.value)
    model.set_token_reduction("FastV:0.5,layer=2")
    try:
        with pytest.raises(InputError, match="has to know which embeddings are image tokens"):
            model.generate(**right, **GREEDY)
    finally:
        model.set_token_reduction("TRIM:-1")
