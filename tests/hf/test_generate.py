"""What users do with `generate`, `forward` and pipelines, while a reduction is applied."""

import copy
import inspect
from dataclasses import replace
from threading import Thread

import pytest
import torch
from PIL import Image
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from llava.errors import InputError
from llava.hf import reduce_tokens

SPECS = ["TRIM:-1", "TRIM:-1|FastV:0.5,layer=1"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=SPECS)
def reduced(request, pair, clip):
    """transformers' model, reduced."""
    with reduce_tokens(pair[0], request.param, clip=clip, tokenizer=pair[2]):
        yield pair[0]


@pytest.fixture
def before(pair, clip):
    """transformers' model, reduced before its language model alone."""
    with reduce_tokens(pair[0], "TRIM:-1", clip=clip, tokenizer=pair[2]):
        yield pair[0]


# ------------------------------------------------------------------------------------------------------- generate
def test_the_output_begins_with_the_prompt_as_it_was_given(reduced, samples, lay_out):
    inputs = lay_out.inputs(reduced, samples[:4])
    output = reduced.generate(**inputs, **GREEDY)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert output.shape[1] <= inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]
    told = reduced.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, output) and told["sequences"] is told.sequences
    assert len(told.scores) == output.shape[1] - inputs["input_ids"].shape[1]


def test_the_language_model_reads_the_tokens_that_are_left_and_no_others(pair, samples, lay_out, clip):
    held, _, tokenizer = pair
    lengths = []
    hook = held.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with reduce_tokens(held, "Random:9", tokenizer=tokenizer):
        held.generate(**lay_out.inputs(held, samples[:1]), **GREEDY)
        num_crops = len(samples[0].images[0])
    hook.remove()
    # Text, 9 patches of each crop, and (LLaVA-1.6) a newline for each row that is not empty.
    text = len(samples[0].ids) - 1
    assert text + 9 * min(num_crops, 2) <= lengths[0] <= text + 9 * num_crops + 12 * (num_crops > 1)
    assert set(lengths[1:]) == {1}


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_answer_as_with_our_model(pair, samples, lay_out, clip, options):
    held, ours, tokenizer = pair
    options = GREEDY | options
    for spec in SPECS:
        ours.set_token_reduction(spec)
        expected = []
        for sample in samples[:8]:
            found = ours.generate(
                sample.ids[None], images=sample.images or None, image_sizes=sample.sizes or None, **options
            )
            expected += [row[: row.index(2)] if 2 in row else row for row in found.tolist()]
        with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer):
            inputs = lay_out.inputs(held, samples[:8])
            output = held.generate(**inputs, **options)
            prompts = inputs["input_ids"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
            assert torch.equal(output[:, : prompts.shape[1]], prompts)
            assert lay_out.new_ids(output, inputs) == expected


def test_sampling_with_a_seed_draws_what_follows_from_our_embeddings(pair, samples, lay_out, clip):
    held, ours, tokenizer = pair
    sampling = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3}
    ours.set_token_reduction("TRIM:-1")
    sample = samples[0]
    with torch.no_grad():
        batch = ours.embed_prompts(sample.ids[None], images=sample.images, image_sizes=sample.sizes)
    torch.manual_seed(3)
    expected = held.generate(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, **sampling)
    with reduce_tokens(held, "TRIM:-1", clip=clip, tokenizer=tokenizer):
        inputs = lay_out.inputs(held, [sample])
        torch.manual_seed(3)
        found = held.generate(**inputs, **sampling)
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)
    assert len(set(map(str, expected.tolist()))) > 1


def test_right_padding_without_a_mask_and_positional_ids_change_nothing(reduced, samples, lay_out):
    left, right = (lay_out.inputs(reduced, samples[:8], side) for side in ("left", "right"))
    answers = lay_out.new_ids(reduced.generate(**left, **GREEDY), left)
    assert lay_out.new_ids(reduced.generate(**right, **GREEDY), right) == answers
    del left["attention_mask"]
    assert lay_out.new_ids(reduced.generate(left.pop("input_ids"), **left, **GREEDY), right) == answers


def test_a_pad_token_that_ends_answers_is_no_padding_of_its_own(reduced, samples, lay_out):
    inputs = lay_out.inputs(reduced, samples[:8])
    options = GREEDY | {"eos_token_id": 2, "pad_token_id": 2}
    answers = lay_out.new_ids(reduced.generate(**inputs, **options), inputs)
    assert answers == lay_out.new_ids(reduced.generate(**inputs, **GREEDY), inputs)


@pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded_static"])
def test_caches_of_every_kind_give_the_same_answers(before, samples, lay_out, implementation):
    if implementation == "offloaded_static" and not torch.accelerator.is_available():
        pytest.skip("offloading needs an accelerator")
    inputs = lay_out.inputs(before, samples[:4])
    answers = before.generate(**inputs, **GREEDY)
    assert torch.equal(before.generate(**inputs, **GREEDY, cache_implementation=implementation), answers)


def test_a_cache_of_the_callers_own_is_filled(before, samples, lay_out):
    inputs = lay_out.inputs(before, samples[:2])
    answers, config = before.generate(**inputs, **GREEDY), before.config.text_config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=400)):
        assert torch.equal(before.generate(**inputs, **GREEDY, past_key_values=cache), answers)
        assert 0 < cache.get_seq_length() < inputs["input_ids"].shape[1]


def test_limits_that_count_the_prompt_mean_the_whole_prompt(reduced, samples, lay_out):
    inputs = lay_out.inputs(reduced, samples[:4])
    length = inputs["input_ids"].shape[1]
    expected = reduced.generate(**inputs, max_new_tokens=4, min_new_tokens=3, do_sample=False)
    limits = {"max_length": length + 4, "min_length": length + 3, "do_sample": False}
    assert torch.equal(reduced.generate(**inputs, **limits), expected)
    config = GenerationConfig(**limits, eos_token_id=2, pad_token_id=1001)
    assert torch.equal(reduced.generate(**inputs, generation_config=config), expected)
    with pytest.raises(InputError, match=f"max_length={length} leaves no place behind prompts of {length} ids"):
        reduced.generate(**inputs, max_length=length)


def test_a_streamer_gets_the_answer_token_by_token(reduced, samples, lay_out, processor):
    inputs = lay_out.inputs(reduced, samples[:1])
    answer = lay_out.new_ids(reduced.generate(**inputs, **GREEDY), inputs)[0]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=reduced.generate, kwargs=inputs | GREEDY | {"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.tokenizer.decode(answer, skip_special_tokens=True)


def test_text_alone_is_answered_as_without_reduction(pair, samples, lay_out, clip):
    held, _, tokenizer = pair
    inputs = lay_out.inputs(held, [samples[4], samples[12]])
    assert "pixel_values" not in inputs
    expected = held.generate(**inputs, **GREEDY)
    for spec in SPECS:
        with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer):
            assert torch.equal(held.generate(**inputs, **GREEDY), expected)


def test_arguments_that_a_reduced_prompt_cannot_take_are_refused_in_one_line(before, samples, lay_out):
    inputs = lay_out.inputs(before, samples[:2])
    embeds = before.get_input_embeddings()(inputs["input_ids"])
    filled = DynamicCache(config=before.config.text_config)
    filled.update(torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, 16), 0)
    without_sizes = {key: value for key, value in inputs.items() if key != "image_sizes"}
    cases = [
        (inputs | {"prefill_chunk_size": 8}, "leave out prefill_chunk_size"),
        (inputs | {"prompt_lookup_num_tokens": 2}, "leave out prompt_lookup_num_tokens"),
        (inputs | {"assistant_model": before}, "leave out assistant_model"),
        (inputs | {"inputs_embeds": embeds}, "hide where images are"),
        (inputs | {"vision_feature_layer": -1}, "vision_feature_layer=-1 is not what token reduction reads"),
        (inputs | {"past_key_values": filled}, "images come with an empty cache"),
        (inputs | {"attention_mask": inputs["attention_mask"][:, 1:]}, "give one number per id"),
        (inputs | {"input_ids": inputs["input_ids"][:, :-20]}, "give one number per id"),
        (
            inputs | {"pixel_values": inputs["pixel_values"][:1]},
            "placeholders, which do not fit|hold 1 images or crops",
        ),
    ]
    if "image_sizes" in inputs:
        cases.append((without_sizes, "needs image_sizes"))
    for wrong, says in cases:
        with pytest.raises(InputError, match=says) as raised:
            before.generate(**wrong, **GREEDY)
        assert "\n" not in str(raised.value)


def test_methods_inside_bring_their_own_cache(held, samples, lay_out):
    inputs = lay_out.inputs(held, samples[:1])
    with reduce_tokens(held, "FastV:0.5,layer=1"):
        with pytest.raises(InputError, match="leave out cache_implementation"):
            held.generate(**inputs, **GREEDY, cache_implementation="static")
        with pytest.raises(InputError, match="leave out past_key_values"):
            held.generate(**inputs, **GREEDY, past_key_values=DynamicCache(config=held.config.text_config))


# -------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("mask", ["whole", "none"])
def test_a_loop_of_the_callers_own_gives_the_ids_of_generate(reduced, samples, lay_out, mask):
    inputs = lay_out.inputs(reduced, samples[:8])
    expected = reduced.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
    attention_mask, found = inputs["attention_mask"], []
    with torch.no_grad():
        output = reduced(**inputs, use_cache=True)
        for _ in range(5):
            chosen = output.logits[:, -1:].argmax(dim=-1)
            found.append(chosen)
            attention_mask = torch.cat([attention_mask, torch.ones_like(chosen)], dim=1)
            step = {"attention_mask": attention_mask} if mask == "whole" else {}
            output = reduced(input_ids=chosen, past_key_values=output.past_key_values, **step)
    assert torch.equal(torch.cat(found, dim=1), expected[:, inputs["input_ids"].shape[1] :])


def test_padding_behind_the_prompt_is_not_read(before, samples, lay_out):
    inputs, new = lay_out.inputs(before, samples[:2]), torch.tensor([[0, 41], [0, 42]])
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[0, 1], [0, 1]])], dim=1)
    with torch.no_grad():
        found = before(input_ids=new, attention_mask=mask, past_key_values=before(**inputs).past_key_values)
        expected = before(input_ids=new[:, 1:], past_key_values=before(**inputs).past_key_values)
    torch.testing.assert_close(found.logits[:, -1], expected.logits[:, -1], atol=1e-5, rtol=1e-5)


def test_no_cache_is_made_where_none_is_wanted(before, samples, lay_out):
    inputs = lay_out.inputs(before, samples[:2])
    with torch.no_grad():
        assert before(**inputs, use_cache=False).past_key_values is None


def test_labels_of_a_batch_without_padding_have_none_before_them(before, samples, lay_out):
    # As long as each other as they are given, but not as they are read.
    samples = [replace(samples[0], images=samples[place].images, sizes=samples[0].sizes) for place in (0, 0)]
    samples[1] = replace(samples[1], images=[image + torch.randn_like(image) for image in samples[1].images])
    inputs = lay_out.inputs(before, samples)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 1000, -100)
    assert inputs["attention_mask"].all()
    with torch.no_grad():
        together = before(**inputs, labels=labels).loss
        alone = []
        for sample in samples:
            single = lay_out.inputs(before, [sample])
            alone.append(before(**single, labels=labels[:1]).loss)
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


def test_a_mask_of_another_length_is_refused_in_a_loop(before, samples, lay_out):
    inputs = lay_out.inputs(before, samples[:2])
    with torch.no_grad():
        output = before(**inputs)
        with pytest.raises(InputError, match="this prompt and what follows it take"):
            before(
                input_ids=torch.ones(2, 1, dtype=torch.long),
                past_key_values=output.past_key_values,
                **{"attention_mask": inputs["attention_mask"]},
            )


def test_logits_of_a_pass_are_those_of_our_model(pair, samples, lay_out, clip):
    held, ours, tokenizer = pair
    for spec in SPECS:
        ours.set_token_reduction(spec)
        with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer), torch.no_grad():
            for sample in samples[:4]:
                inputs = lay_out.inputs(held, [sample])
                found = held(**inputs).logits
                expected = ours(sample.ids[None], images=sample.images, image_sizes=sample.sizes).logits
                torch.testing.assert_close(found[:, :, :1000], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_an_answer_is_that_of_our_model(pair, samples, lay_out, clip, side):
    held, ours, tokenizer = pair
    for spec in SPECS:
        ours.set_token_reduction(spec)
        with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer), torch.no_grad():
            inputs = lay_out.inputs(held, samples[:4], side)
            # Our model pads on the right, where the first id has none before it; on the left it would be a label there.
            first = 2 if side == "left" else 1
            labels = inputs["input_ids"]
            labels = labels.masked_fill((labels >= 1000) | (labels < first), -100)
            found = held(**inputs, labels=labels).loss
            ids = torch.nn.utils.rnn.pad_sequence([sample.ids for sample in samples[:4]], batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([[len(sample.ids)] for sample in samples[:4]])
            batch = ours.embed_prompts(
                ids,
                attention_mask=mask,
                labels=ids.masked_fill(~mask | (ids < first), -100),
                images=[image for sample in samples[:4] for image in sample.images],
                image_sizes=[size for sample in samples[:4] for size in sample.sizes],
                padding_side="right",
            )
            logits = ours(inputs_embeds=batch.embeds, attention_mask=batch.attention_mask).logits
            # 64 more words, of logit 0.
            wide = torch.nn.functional.pad(logits[:, :-1], (0, 64)).flatten(0, 1)
            expected = torch.nn.functional.cross_entropy(wide, batch.labels[:, 1:].flatten())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_projector_learns_through_a_reduced_prompt(before, samples, lay_out):
    inputs = lay_out.inputs(before, samples[:2])
    before.zero_grad()
    before(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= 1000, -100)).loss.backward()
    assert before.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    before.zero_grad()


# -------------------------------------------------------------------------------------------------------- the rest
def test_generate_keeps_its_signature_for_readers_of_it(held):
    names = set(inspect.signature(held.forward).parameters)
    with reduce_tokens(held, "FastV:0.5,layer=1"):
        assert set(inspect.signature(held.forward).parameters) == names
        inner = inspect.signature(held.model.language_model.forward).parameters
        assert "inputs_embeds" in inner


def test_a_pipeline_answers_with_reduced_prompts(pair, processor, clip, golden):
    held = pair[0]
    if not isinstance(held, LlavaForConditionalGeneration):
        pytest.skip("the recorded processor is that of LLaVA-1.5")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(golden / "data/images/wide_shapes.png")},
                {"type": "text", "text": "What is the color of the bus?"},
            ],
        }
    ]
    processor.chat_template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        " ASSISTANT:"
    )
    pipe = pipeline("image-text-to-text", model=held, processor=processor, device="cpu")
    with reduce_tokens(held, "TRIM:-1", clip=clip, tokenizer=processor) as reduction:
        [found] = pipe(text=messages, max_new_tokens=6, generate_kwargs={"do_sample": False}, return_full_text=False)
        [image] = reduction.image_tokens
        assert image.num_tokens < 36
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = held.generate(**inputs, **GREEDY)
        assert (inputs["input_ids"] == 1000).sum() == 36
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer and found["generated_text"].strip() == answer.strip()


def test_a_loaded_folder_brings_its_own_tokenizer(pair, processor, clip, golden, tmp_path):
    held = pair[0]
    if not isinstance(held, LlavaForConditionalGeneration):
        pytest.skip("the recorded processor is that of LLaVA-1.5")
    held.save_pretrained(tmp_path / "model")
    processor.tokenizer.save_pretrained(tmp_path / "model")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    image = Image.open(golden / "data/images/wide_shapes.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nwhat is red? ASSISTANT:", return_tensors="pt")
    with reduce_tokens(held, "TRIM:0.25", clip=clip, texts="what is red?") as expected:
        answer = held.generate(**inputs, **GREEDY)
    with reduce_tokens(loaded, "TRIM:0.25", clip=clip) as found:
        assert torch.equal(loaded.generate(**inputs, **GREEDY), answer)
    assert torch.equal(found.image_tokens[0].kept, expected.image_tokens[0].kept)


def test_the_processor_of_llava_1_6_fits(pair, processor, lay_out, clip, golden):
    held = pair[0]
    if isinstance(held, LlavaForConditionalGeneration):
        pytest.skip("for LLaVA-1.6")
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": 84},
        crop_size={"height": 84, "width": 84},
        image_grid_pinpoints=held.config.image_grid_pinpoints,
    )
    next_processor = LlavaNextProcessor(
        pixels, processor.tokenizer, 14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    picture = Image.open(golden / "data/images/wide_shapes.png").convert("RGB")
    images = [picture.resize(size) for size in [(200, 150), (90, 301), (301, 90), (84, 84), (1000, 40)]]
    texts = [f"USER: {'<image> ' * count}what is red? ASSISTANT:" for count in (1, 2, 0, 2)]
    inputs = next_processor(images=images, text=texts, return_tensors="pt", padding=True)
    plain = held.generate(**inputs, **GREEDY)
    with reduce_tokens(held, None):
        assert torch.equal(held.generate(**inputs, **GREEDY), plain)
    with reduce_tokens(held, "TRIM:-1", clip=clip, tokenizer=next_processor) as reduced:
        together = lay_out.new_ids(held.generate(**inputs, **GREEDY), inputs)
        assert len(reduced.image_tokens) == 5
        alone, left = [], list(images)
        for text in texts:
            own = [left.pop(0) for _ in range(text.count("<image>"))] or None
            single = next_processor(images=own, text=text, return_tensors="pt")
            alone += lay_out.new_ids(held.generate(**single, **GREEDY), single)
    assert together == alone


@pytest.mark.parametrize("window", [None, 4])
def test_mistral_is_reduced_inside_where_it_has_no_sliding_window(pair, samples, lay_out, clip, window):
    held, _, tokenizer = pair
    text = {key: value for key, value in held.config.text_config.to_dict().items() if key != "model_type"}
    text = MistralConfig(**text | {"sliding_window": window, "architectures": None})
    config = copy.deepcopy(held.config)
    config.text_config = text
    mistral = type(held)(config).eval()
    mistral.load_state_dict(held.state_dict())
    mistral.generation_config = held.generation_config
    if window is not None:
        with pytest.raises(InputError, match="FastV works inside Llama, or Mistral without a sliding window"):
            reduce_tokens(mistral, "FastV:0.5,layer=1")
        return
    for spec in SPECS:
        answers = []
        for model in (held, mistral):
            with reduce_tokens(model, spec, clip=clip, tokenizer=tokenizer):
                answers.append(model.generate(**lay_out.inputs(model, samples[:8]), **GREEDY))
        assert torch.equal(*answers)
