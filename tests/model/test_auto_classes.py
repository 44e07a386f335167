"""A checkpoint that transformers' Auto classes load answers as one that our loader loads; embeddings may be given."""

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

from llava import Llava, LlavaConfig, LlavaLlamaForCausalLM, load_pretrained_model
from llava.conversation import conv_templates, to_jinja
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


@pytest.mark.parametrize("checkpoint", [PLAIN, TRIM])
def test_auto_model_says_which_class_answers(checkpoint):
    with pytest.raises(InputError, match="use AutoModelForImageTextToText or AutoModelForCausalLM"):
        AutoModel.from_pretrained(checkpoint)


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


TEXT, MORE, IMAGE = {"type": "text", "text": "look"}, {"type": "text", "text": "what?"}, {"type": "image"}
SHAPES_OF_DIALOGUES = {
    "an image between texts": [[TEXT, IMAGE, MORE]],
    "several images": [[IMAGE, TEXT, IMAGE, MORE]],
    "images placed by the text": [[IMAGE, {"type": "text", "text": "look at <image> here"}, MORE]],
    "a text": ["what?"],
    "several turns": [[TEXT, IMAGE], [TEXT, MORE], [IMAGE, MORE]],
    "white space": [[IMAGE, {"type": "text", "text": " look\n"}, MORE], " yes ", " why? "],
}


def make_dialogue(contents, system=None):
    turns = [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.mark.parametrize("name", [name for name, template in conv_templates.items() if to_jinja(template) is not None])
def test_the_processor_writes_what_its_jinja_does(name):
    processor = AutoProcessor.from_pretrained(TRIM, conv_mode=name)
    for contents in SHAPES_OF_DIALOGUES.values():
        for system in (None, "Be brief.", [TEXT, MORE]):
            dialogue = make_dialogue(contents, system)
            is_asked = len(contents) % 2 == 1
            theirs = processor.tokenizer.apply_chat_template(
                dialogue, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=is_asked
            )
            assert processor.apply_chat_template(dialogue, add_generation_prompt=is_asked) == theirs


def test_the_parts_of_a_turn_are_a_line_each_with_the_images_first(processor):
    prompt = processor.apply_chat_template(make_dialogue([[TEXT, IMAGE, MORE, IMAGE]]))
    assert prompt.endswith("USER: <image>\n<image>\nlook\nwhat? ")


def test_an_image_of_a_message_may_be_an_object_a_file_or_base64(processor, tmp_path):
    image, _ = draw_scene(3, 1, 0)
    image.save(tmp_path / "scene.png")
    encoded = base64.b64encode((tmp_path / "scene.png").read_bytes()).decode()
    parts = [
        {"type": "image", "image": image},
        {"type": "image", "path": str(tmp_path / "scene.png")},
        {"type": "image", "url": str(tmp_path / "scene.png")},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ]
    batch = processor.apply_chat_template([make_dialogue([[part, MORE]]) for part in parts], tokenize=True)
    expected = processor(image, "<image>")["images"][0]
    assert len(batch["images"]) == len(parts) and all(torch.equal(pixels, expected) for pixels in batch["images"])


@pytest.mark.parametrize("begun", ["<", "s", "/", "The circle", "</s"])
def test_an_answer_that_is_gone_on_with_ends_the_prompt_as_it_is(processor, begun):
    opened = processor.apply_chat_template(make_dialogue(["Why?"]), add_generation_prompt=True)
    gone_on = processor.apply_chat_template(make_dialogue(["Why?", begun]), continue_final_message=True)
    assert gone_on == f"{opened} {begun}"


def test_a_batch_of_dialogues_is_what_the_dialogues_are(processor):
    image = {"type": "image", "image": draw_scene(3, 1, 0)[0]}
    dialogues = [make_dialogue([[image, MORE]]), make_dialogue([[image, TEXT, image, MORE], "yes", "why?"])]
    options = {"add_generation_prompt": True}
    prompts = processor.apply_chat_template(dialogues, **options)
    assert prompts == [processor.apply_chat_template(dialogue, **options) for dialogue in dialogues]
    batch = processor.apply_chat_template(dialogues, tokenize=True, padding=True, truncation=True, **options)
    for row, mask, dialogue in zip(batch["input_ids"], batch["attention_mask"], dialogues, strict=True):
        alone = processor.apply_chat_template(dialogue, tokenize=True, processor_kwargs={"max_length": 200}, **options)
        assert row[mask].tolist() == alone["input_ids"][0].tolist()


def test_ids_of_any_kind_are_decoded_without_their_images(processor):
    row = processor.tokenizer("a circle").input_ids
    expected = processor.decode(row)
    for ids in (np.array([*row, -200]), [*np.array([*row, -200])], [*torch.tensor([*row, -200])]):
        assert processor.decode(ids) == expected


def test_prompts_are_decoded_without_their_images(processor):
    ids = processor(draw_scene(3, 1, 0)[0], "look <image> here")["input_ids"]
    text = processor.decode(ids[0], skip_special_tokens=True)
    assert text.split() == ["look", "here"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [text]
    assert processor.decode(ids, skip_special_tokens=True) == [text]


def test_pixel_values_stay_float32_whatever_dtype_a_batch_is_cast_to(processor):
    batch = processor(draw_scene(3, 1, 0)[0], "<image>")
    assert batch.to(torch.float16).to("cpu", torch.float16).to(dtype=torch.float16)["images"].dtype == torch.float32


@pytest.fixture(scope="module")
def asked():
    """Dialogues of one image, of two and of none, and what `Llava.ask` answers."""
    ask, dialogues, answers = Llava.from_pretrained(TRIM, device="cpu").ask, [], []
    for number, count in enumerate((1, 2, 0, 1, 1)):
        image, scene = draw_scene(3, 1, number)
        question = f"What color is the {scene.objects[0].shape}?"
        parts = [{"type": "image", "image": image}] * count
        dialogues.append(make_dialogue([[*parts, {"type": "text", "text": question}]]))
        answers.append(ask([image] * count, question).text)
    return dialogues, answers


def say(record):
    return (record if isinstance(record, dict) else record[0])["generated_text"].strip()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_pipeline_answers_dialogues_as_the_object_does(processor, asked, batch_size):
    model = AutoModelForImageTextToText.from_pretrained(TRIM, dtype=torch.float32)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    dialogues, answers = asked
    assert [say(pipe(text=dialogue, return_full_text=False)) for dialogue in dialogues[:2]] == answers[:2]
    records = pipe(text=dialogues, batch_size=batch_size, return_full_text=False)
    assert [say(record) for record in records] == answers
    assert model.token_reducer is not None


def test_a_pipeline_made_of_a_folder_answers_and_goes_on_with_an_answer(asked):
    pipe = pipeline("image-text-to-text", model=TRIM, dtype=torch.float32)
    dialogues, answers = asked
    assert pipe(text=dialogues[0])[0]["generated_text"][-1] == {"role": "assistant", "content": answers[0]}
    begun, rest = "The triangle", "is red."
    assert answers[0] == f"{begun} {rest}"
    opened = [*dialogues[0], {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    assert say(pipe(text=opened, return_full_text=False)) == rest
    image = dialogues[0][0]["content"][0]["image"]
    prompt = pipe.processor.apply_chat_template(dialogues[0], add_generation_prompt=True)
    records = [
        *pipe(images=[image] * 2, text=[prompt] * 2, return_full_text=False),
        *pipe(({"images": image, "text": prompt} for _ in range(2)), batch_size=2, return_full_text=False),
    ]
    assert [say(record) for record in records] == [answers[0]] * 4


@pytest.mark.parametrize("with_model", [False, True])
def test_a_saved_processor_is_read_again(loaded, tmp_path, with_model):
    if with_model:
        loaded[0].save_pretrained(tmp_path / "there")
    saved = AutoProcessor.from_pretrained(TRIM, conv_mode="llava_v1")
    assert saved.save_pretrained(tmp_path / "there") == [str(tmp_path / "there/config.json")]
    found = AutoProcessor.from_pretrained(tmp_path / "there")
    image, dialogue = draw_scene(3, 1, 0)[0], make_dialogue([[IMAGE, MORE]])
    prompt = saved.apply_chat_template(dialogue)
    assert type(found) is type(saved) and found.apply_chat_template(dialogue) == prompt
    first, second = saved(image, prompt), found(image, prompt)
    assert torch.equal(first["input_ids"], second["input_ids"]) and torch.equal(first["images"], second["images"])
    if with_model:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "there", dtype=torch.float32)
        assert model.generate(**second, **GREEDY).tolist() == loaded[0].generate(**first, **GREEDY).tolist()


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
        (lambda processor: processor.apply_chat_template(None), "expected a dialogue, a list of messages"),
        (lambda processor: processor.apply_chat_template([]), "not an empty one"),
        (lambda processor: processor.apply_chat_template([[]]), "not an empty one"),
        (lambda processor: processor.apply_chat_template(make_dialogue([""])), "message 0 of the dialogue is empty"),
        (lambda processor: processor.apply_chat_template(make_dialogue(["a"], [IMAGE])), "system's message holds no"),
        (lambda processor: processor.apply_chat_template(make_dialogue(["a"]), "{{ x }}"), "in the template v1"),
        (lambda processor: processor.apply_chat_template(make_dialogue(["a"]), tools=[{}]), "tools: this processor"),
        (
            lambda processor: processor.apply_chat_template(make_dialogue(["a"]), continue_final_message=True),
            "the last message has to be a text of the assistant",
        ),
        (
            lambda processor: processor.apply_chat_template(
                make_dialogue([[{"type": "image", "base64": "?"}]]), tokenize=True
            ),
            "not the base64 text of an image",
        ),
        (lambda processor: processor(None, "What is it?", truncation=True, max_length=2), "where 2 are allowed"),
        (lambda processor: processor(None, "word " * 600, truncation=True), "where 512 are allowed"),
        (lambda processor: processor(None, ["a", "a b c"], padding=False), "different lengths"),
        (lambda processor: processor(None, "a", padding="max_length"), "leave out return_tensors and padding"),
        (lambda processor: processor(None, "a", max_length=0), "max_length 0: expected a number of ids"),
        (
            lambda processor: processor.apply_chat_template(make_dialogue(["a"]), tokenize=True, images=[1]),
            "images: this processor has no such option",
        ),
        (lambda processor: processor(None, "a", videos=[1]), "videos: this processor has no such option"),
        (lambda processor: AutoProcessor.from_pretrained(TRIM, conv_mode="vicuna"), 'did you mean "vicuna_v1"'),
    ],
)
def test_what_the_processor_cannot_take_is_refused_in_one_line(processor, call, reason):
    with pytest.raises(InputError) as caught:
        call(processor)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
