"""A checkpoint that transformers' Auto classes load answers as one that our loader loads; embeddings may be given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from llava import Llava, LlavaConfig, LlavaLlamaForCausalLM, load_pretrained_model
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from playground.shapes.world import draw_scene

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "playground/shapes/checkpoints"
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


def test_embeddings_with_original_positions_need_their_position_ids(loaded, prompts):
    model, (inputs, texts) = loaded[0], prompts
    model.set_token_reduction("TRIM:0.25,position_ids=original")
    try:
        batch = model.embed_prompts(**inputs, texts=texts, padding_side="left", pad_token_id=0)
        embeds = {"inputs_embeds": batch.embeds, "attention_mask": batch.attention_mask}
        found = model.generate(**embeds, position_ids=batch.position_ids, **GREEDY)
        assert found.tolist() == model.generate(**inputs, texts=texts, **GREEDY).tolist()
        with pytest.raises(InputError, match="give the position_ids of embed_prompts as well"):
            model.generate(**embeds, **GREEDY)
    finally:
        model.set_token_reduction("TRIM:-1")


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


# ------------------------------------------------------------------------------------------------------- registration
FIRST_LINES = {
    "llava first": "import llava\nassert not {'torch', 'transformers'} & set(sys.modules)\nimport transformers",
    "transformers first": "import transformers\ntransformers.AutoConfig\nimport llava",
    "a part of llava first": "import llava.mm_utils\nimport transformers",
    "the model first": "from llava.model.language_model.llava_llama import LlavaConfig\nimport transformers",
}


@pytest.mark.parametrize("lines", FIRST_LINES.values(), ids=FIRST_LINES)
@pytest.mark.parametrize("name", ["AutoConfig", "AutoProcessor"])
def test_auto_classes_know_a_checkpoint_after_import_llava_in_any_order(lines, name):
    code = f"import sys\n{lines}\nprint(type(transformers.{name}.from_pretrained({TRIM!r})).__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("llava."), done.stderr


def test_auto_classes_give_our_classes_and_leave_those_of_transformers_alone():
    config = AutoConfig.from_pretrained(TRIM)
    assert type(config) is LlavaConfig and type(AutoConfig.for_model("llava_llama")) is LlavaConfig
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(TRIM)) is LlavaLlamaForCausalLM
    assert AutoConfig.for_model("llava").__class__.__module__.startswith("transformers.")


# ---------------------------------------------------------------------------------------------------------- processor
@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TRIM)


def test_processor_and_model_answer_as_the_object_does(loaded, processor):
    ask = Llava.from_pretrained(TRIM, device="cpu").ask
    for number in range(3):
        image, scene = draw_scene(3, 1, number)
        question = f"What color is the {scene.objects[0].shape}?"
        content = [{"type": "image", "image": np.asarray(image)}, {"type": "text", "text": question}]
        dialogue = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=True)
        (text,) = processor.batch_decode(loaded[0].generate(**inputs, **GREEDY), skip_special_tokens=True)
        assert text.strip() == ask(image, question).text


def test_prompts_of_several_lengths_and_images_are_answered_as_each_alone(loaded, processor):
    model, images = loaded[0], [draw_scene(3, 1, number)[0] for number in range(3)]
    prompts = [
        "USER: <image>\nDescribe the image. ASSISTANT:",
        "USER: <image>\n<image>\nAre they the same in all of their colors? ASSISTANT:",
        "USER: Repeat. ASSISTANT:",
    ]
    together = processor(images, prompts)
    assert together["input_ids"].shape[0] == 3 and together["image_sizes"] == [(112, 112)] * 3
    answers = processor.batch_decode(model.generate(**together, **GREEDY), skip_special_tokens=True)
    own = [images[:1], images[1:], None]
    for prompt, given, answer in zip(prompts, own, answers, strict=True):
        (alone,) = processor.batch_decode(
            model.generate(**processor(given, prompt), **GREEDY), skip_special_tokens=True
        )
        assert alone == answer


def test_a_dialogue_is_written_in_the_checkpoints_template(processor):
    image = {"type": "image"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One?"}, image]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nOne? ASSISTANT: Yes.</s>USER: Two? ASSISTANT:")
    assert processor.apply_chat_template(turns[:2]).endswith("ASSISTANT: Yes.</s>")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda processor: processor(None, "USER: <image>\nWhat? ASSISTANT:"), "0 images for 1 <image> placeholders"),
        (lambda processor: processor("missing.png", "<image>"), "image missing.png: no such file"),
        (lambda processor: processor(None, 3), "text: expected a prompt"),
        (lambda processor: processor(None, []), "text: expected a prompt"),
        (lambda processor: processor(None, "What?", return_tensors="np"), "PyTorch tensors"),
        (
            lambda processor: processor.apply_chat_template([{"role": "system", "content": "a"}]),
            "expected the role user",
        ),
        (lambda processor: processor.apply_chat_template("What?"), "message 0 of the dialogue"),
        (
            lambda processor: processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]),
            "message 0",
        ),
        (
            lambda processor: processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}]}], tokenize=True
            ),
            'an image of the dialogue has no "image"',
        ),
        (lambda processor: AutoProcessor.from_pretrained(TRIM, conv_mode="vicuna"), 'did you mean "vicuna_v1"'),
    ],
)
def test_what_the_processor_cannot_take_is_refused_in_one_line(processor, call, reason):
    with pytest.raises(InputError) as caught:
        call(processor)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
