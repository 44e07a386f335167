"""`reduce_tokens` on transformers' LLaVA-1.5 and 1.6 against our own model on the same weights."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from llava.errors import InputError
from llava.hf import reduce_tokens
from llava.hf.host_tower import HostTower
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS

NEW_TOKENS = 5
# Options that a tower of 4 layers and a language model of 3 layers need.
OPTIONS = {"HiPrune": ",object_layer=2", "FastV": ",layer=1", "DART": ",layer=1,pivot_image=2,pivot_text=2"}
ALL_METHODS = [f"{name}:0.3{OPTIONS.get(name, '')}" for name in [*REDUCERS, *LAYER_REDUCERS]]
ALL_METHODS += ["PruMerge:-1", "HoloV:avg=9.5", "TRIM:-1|FastV:0.5,layer=1"]
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def ask_ours(ours, samples) -> tuple[list, list[list[int]]]:
    """Our records of each sample's images, and greedy ids, one prompt at a time."""
    records, answers = [], []
    for sample in samples:
        images, sizes = sample.images or None, sample.sizes or None
        query = ours.recover_queries(sample.ids[None])[0]
        if images:
            records += ours.encode_images(images, [query] * len(images), sizes)
        found = ours.generate(sample.ids[None], images=images, image_sizes=sizes, **GREEDY)[0].tolist()
        answers.append(found[: found.index(2)] if 2 in found else found)
    return records, answers


def ask(held, samples, lay_out, **options) -> list[list[int]]:
    inputs = lay_out.inputs(held, samples)
    return lay_out.new_ids(held.generate(**inputs, **(GREEDY | options)), inputs)


@pytest.mark.parametrize("spec", ["TRIM:-1", "TRIM:0.25", "FasterVLM:0.25", "Random:0.25", "Pool:0.25"])
def test_kept_patches_and_greedy_ids_equal_ours_on_64_mixed_samples(pair, samples, lay_out, clip, spec):
    held, ours, tokenizer = pair
    ours.set_token_reduction(spec)
    expected, answers = ask_ours(ours, samples)
    found, records = [], []
    with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer) as reduced:
        for start in range(0, 64, 8):
            found += ask(held, samples[start : start + 8], lay_out)
            records += reduced.image_tokens
    assert found == answers
    assert len(records) == len(expected) == 64
    for own, other in zip(records, expected, strict=True):
        assert own.num_tokens == other.num_tokens and own.num_patches == other.num_patches
        assert (own.kept is None) == (other.kept is None) == spec.startswith("Pool")
        assert own.kept is None or torch.equal(own.kept, other.kept)
        torch.testing.assert_close(own.features, other.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ALL_METHODS)
def test_every_method_answers_as_ours_does(pair, samples, lay_out, clip, spec):
    held, ours, tokenizer = pair
    ours.set_token_reduction(spec)
    with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer):
        assert ask(held, samples[:8], lay_out) == ask_ours(ours, samples[:8])[1]


@pytest.mark.parametrize("spec", ["TRIM:-1", "HoloV:0.3", "TRIM:-1|FastV:0.5,layer=1"])
def test_an_answer_does_not_depend_on_its_batch(pair, samples, lay_out, clip, spec):
    held, _, tokenizer = pair
    with reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer):
        alone = [ask(held, [sample], lay_out)[0] for sample in samples[:8]]
        assert ask(held, samples[:8], lay_out) == alone
        order = [5, 2, 7, 0, 3, 6, 1, 4]
        assert ask(held, [samples[place] for place in order], lay_out) == [alone[place] for place in order]


def test_without_reduction_features_and_answers_are_those_of_transformers(pair, samples, lay_out):
    held, _, _ = pair
    answers = ask(held, samples[:8], lay_out)
    images = {key: value for key, value in lay_out.inputs(held, samples[:8]).items() if key[:2] in ("pi", "im")}
    with torch.no_grad():
        expected = held.get_image_features(**images).pooler_output
    with reduce_tokens(held, None) as reduced:
        assert ask(held, samples[:8], lay_out) == answers
        for own, other in zip(reduced.image_tokens, expected, strict=True):
            torch.testing.assert_close(own.features, other, atol=1e-5, rtol=1e-5)


def attributes_of(model) -> dict:
    """Everything that hangs on a model's modules, besides weights and modules."""
    return {
        (name, key): copy.copy(value) if key.endswith("_hooks") or "hooks_" in key else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_modules", "_buffers")
    }


@pytest.mark.parametrize("spec", ["TRIM:-1", "TRIM:-1|FastV:0.5,layer=1"])
def test_leaving_the_block_restores_the_model_bit_for_bit(pair, samples, lay_out, clip, spec):
    held, _, tokenizer = pair
    held.generation_config.eos_token_id = 2
    answers, weights = ask(held, samples[:4], lay_out), {k: v.clone() for k, v in held.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in held.parameters()]
    before = attributes_of(held)
    reduction = reduce_tokens(held, spec, clip=clip, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match="in the block"), reduction:
        assert ask(held, samples[:4], lay_out) != answers
        assert attributes_of(held).keys() != before.keys()
        raise RuntimeError("in the block")
    assert attributes_of(held) == before
    assert gradients == [parameter.requires_grad for parameter in held.parameters()]
    after = held.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[key], weights[key]) for key in weights)
    assert ask(held, samples[:4], lay_out) == answers


def test_a_forward_of_the_callers_own_is_put_back(held):
    own = held.model.language_model.forward
    held.model.language_model.forward = own
    with reduce_tokens(held, "FastV:0.5,layer=1"):
        assert held.model.language_model.forward is not own
    assert vars(held.model.language_model).pop("forward") is own


def test_two_models_in_one_process_do_not_touch_each_other(pair, samples, lay_out, clip):
    held, _, tokenizer = pair
    other = copy.deepcopy(held)
    plain = ask(held, samples[:4], lay_out)
    first = reduce_tokens(held, "TRIM:-1", clip=clip, tokenizer=tokenizer)
    second = reduce_tokens(other, "FastV:0.3,layer=1")
    with first:
        trim = ask(held, samples[:4], lay_out)
        assert ask(other, samples[:4], lay_out) == plain
        with second:
            fast = ask(other, samples[:4], lay_out)
            assert ask(held, samples[:4], lay_out) == trim
    assert len({str(plain), str(trim), str(fast)}) == 3
    assert ask(held, samples[:4], lay_out) == ask(other, samples[:4], lay_out) == plain


def test_calls_that_overlap_read_their_own_images(pair, samples, lay_out, clip):
    held, _, tokenizer = pair
    first, second = (lay_out.inputs(held, [samples[index]]) for index in (0, 1))
    with reduce_tokens(held, "TRIM:0.25", clip=clip, tokenizer=tokenizer):
        expected = [held.generate(**inputs, max_new_tokens=6, do_sample=False) for inputs in (first, second)]
        found = []

        def call_meanwhile(*_) -> None:
            handle.remove()
            found.append(held.generate(**second, max_new_tokens=6, do_sample=False))

        # As a thread may: behind the first call's images, before they are put into its prompt.
        handle = held.get_input_embeddings().register_forward_hook(call_meanwhile)
        found.insert(0, held.generate(**first, max_new_tokens=6, do_sample=False))
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", ["FasterVLM:9", "FastV:0.5,layer=1"])
def test_a_copy_made_inside_the_block_is_not_reduced_and_is_its_own(pair, samples, lay_out, spec):
    held = pair[0]
    inputs = lay_out.inputs(held, samples[:2])
    with torch.no_grad():
        whole = held(**inputs).logits
        with reduce_tokens(held, spec):
            reduced = held(**inputs).logits
            copied = copy.deepcopy(held)
            assert torch.equal(held(**inputs).logits, reduced)
            assert torch.equal(copied(**inputs).logits, whole)
            with reduce_tokens(copied, spec):
                assert torch.equal(copied(**inputs).logits, reduced)
        assert torch.equal(copied(**inputs).logits, whole)


def test_apply_and_remove_are_the_block_in_two_calls(pair, samples, lay_out, clip):
    held, _, tokenizer = pair
    plain = ask(held, samples[:4], lay_out)
    reduction = reduce_tokens(held, "TRIM:-1", clip=clip, tokenizer=tokenizer)
    with reduction:
        reduced = ask(held, samples[:4], lay_out)
    for _ in range(2):
        reduction.apply()
        assert ask(held, samples[:4], lay_out) == reduced
        reduction.remove()
        assert ask(held, samples[:4], lay_out) == plain


def test_a_second_reduction_of_the_same_model_is_refused(held):
    with reduce_tokens(held, "Random:0.5") as first:
        for again in (first, reduce_tokens(held, "Pool:0.25")):
            with pytest.raises(InputError, match="applied to this model already"):
                again.apply()
    with pytest.raises(InputError, match="not applied"):
        first.remove()


# ------------------------------------------------------------------------------------------------ the text half
def test_a_method_that_reads_text_asks_for_a_clip(held):
    with pytest.raises(InputError, match=r"TRIM compares patches with the question.*give clip="):
        reduce_tokens(held, "TRIM:-1")


def test_a_clip_of_another_shape_is_refused(held, folder):
    with pytest.raises(InputError, match=r"is another tower .336 pixels"):
        reduce_tokens(held, "TRIM:-1", clip=str(folder / "openai/clip-vit-large-patch14-336"), texts="a bus")


def disturb(clip, tmp_path, share) -> str:
    """A copy of a CLIP whose vision layers are moved by a share of their deviation."""
    shutil.copytree(clip, tmp_path / "clip")
    weights = torch.load(tmp_path / "clip/pytorch_model.bin")
    generator = torch.Generator().manual_seed(0)
    for key, value in weights.items():
        if key.startswith("vision_model.encoder") and value.dim() == 2:
            weights[key] = value + share * value.std() * torch.randn(value.shape, generator=generator)
    torch.save(weights, tmp_path / "clip/pytorch_model.bin")
    return str(tmp_path / "clip")


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_a_clip_with_other_weights_is_refused(held, clip, tmp_path, share):
    with pytest.raises(InputError, match=r"is not the CLIP that the vision tower .* comes from: .* differ by"):
        reduce_tokens(held, "TRIM:-1", clip=disturb(clip, tmp_path, share), texts="a bus")


def test_a_clip_that_the_tower_was_trained_away_from_is_taken_with_a_warning(held, clip, tmp_path, caplog):
    reduce_tokens(held, "TRIM:-1", clip=disturb(clip, tmp_path, 0.1), texts="a bus")
    assert "differs from clip=" in caplog.text and "was trained further" in caplog.text


def test_the_clip_is_not_read_where_no_text_is(held):
    with pytest.raises(InputError, match="/nowhere"):
        reduce_tokens(held, "TRIM:-1", clip="/nowhere", texts="a bus")
    assert reduce_tokens(held, "Random:0.5", clip="/nowhere").image_tokens == []


def test_of_the_clip_only_the_text_half_and_the_joint_space_stay(held, clip):
    tower = HostTower(held.model.vision_tower, -2, "model")
    tower.take_text_half(clip)
    assert len(tower.text_half.layers) == 0
    assert tower.embed_text(["a bus"]).shape == (1, 32)


def test_a_checkpoint_whose_config_pools_turns_reads_a_long_question_whole(held, clip, monkeypatch):
    queries = ["Is there a bus? " * 40, "Is there a bus? " * 40 + "And is there a red square?"]
    tower = HostTower(held.model.vision_tower, -2, "model")
    tower.take_text_half(clip)
    cut = tower.embed_text(queries)
    torch.testing.assert_close(cut[0], cut[1])
    monkeypatch.setattr(held.config, "mm_vision_token_reduce_query", "turns", raising=False)
    pooled = reduce_tokens(held, "TRIM:-1", clip=clip, texts="a bus")._reader._tower.embed_text(queries)
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-4)


def test_rounding_to_16_bits_does_not_make_another_tower(pair, clip, caplog):
    for dtype in (torch.float16, torch.bfloat16):
        reduce_tokens(copy.deepcopy(pair[0]).to(dtype), "TRIM:-1", clip=clip, texts="a bus")
    assert caplog.records == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_16_bits_answers(pair, samples, lay_out, clip, dtype):
    held, _, tokenizer = pair
    low = copy.deepcopy(held).to(dtype)
    with reduce_tokens(low, "TRIM:-1", clip=clip, tokenizer=tokenizer) as reduced:
        ask(low, samples[:8], lay_out)
    assert {image.features.dtype for image in reduced.image_tokens} == {dtype}
    assert all(image.features.isfinite().all() for image in reduced.image_tokens)


# ------------------------------------------------------------------------------------------------ what CLIP reads
def test_given_texts_count_instead_of_the_prompts(pair, samples, lay_out, clip):
    held, ours, tokenizer = pair
    ours.set_token_reduction("TRIM:0.25")
    with_images = [sample for sample in samples[:8] if sample.images]
    texts = [f"a {word} dog" for word in ("red", "blue", "big", "small", "old", "new", "good")]
    expected = [
        record
        for sample, text in zip(with_images, texts, strict=True)
        for record in ours.encode_images(sample.images, [text] * len(sample.images), sample.sizes)
    ]
    prompts = []
    for given in (texts, lambda prompt: prompts.append(prompt) or texts[len(prompts) - 1]):
        with reduce_tokens(held, "TRIM:0.25", clip=clip, texts=given, tokenizer=tokenizer) as reduced:
            ask(held, with_images, lay_out)
        for own, other in zip(reduced.image_tokens, expected, strict=True):
            assert torch.equal(own.kept, other.kept)
    assert all("USER:" in prompt and "ASSISTANT:" in prompt for prompt in prompts)


def test_roles_of_the_tokenizers_own_template_count_where_the_checkpoint_names_it(
    pair, samples, lay_out, clip, monkeypatch
):
    held, _, tokenizer = pair
    source = (
        "{% for message in messages %}{{ 'A chat. ' + message.content + ' ASSISTANT:' if message.role == 'user' "
        "else ' ' + message.content + eos_token }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", source)
    monkeypatch.setattr(held.config, "conv_mode", "chat_template", raising=False)
    asked = [sample for sample in samples[:8] if sample.images]
    scores = []
    for texts in (None, [f"USER: {sample.question}" for sample in asked], [sample.question for sample in asked]):
        with reduce_tokens(held, "TRIM:0.25", clip=clip, texts=texts, tokenizer=tokenizer) as reduced:
            ask(held, asked, lay_out)
        scores.append(torch.cat([image.scores.flatten() for image in reduced.image_tokens]))
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_a_number_of_texts_that_does_not_fit_is_refused(pair, samples, lay_out, clip):
    reduction = reduce_tokens(pair[0], "TRIM:-1", clip=clip, texts=["a bus"])
    with reduction, pytest.raises(InputError, match="1 texts for 2 prompts"):
        ask(pair[0], samples[:2], lay_out)


def test_without_tokenizer_and_texts_it_says_what_to_give(held, clip):
    with pytest.raises(InputError, match=r"give tokenizer= .* or texts="):
        reduce_tokens(held, "TRIM:-1", clip=clip)


# --------------------------------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"clip": 5}, "clip is a int: give the name of a CLIP"),
        ({"tokenizer": "a-folder"}, "tokenizer is a str: give the language model's, or its processor"),
        ({"texts": 5}, "expected a text or a list of texts, not int"),
        ({"texts": {"a": 1}}, "expected a text or a list of texts, not dict"),
        ({"texts": b"a bus"}, "expected a text or a list of texts, not bytes"),
        ({"texts": [5]}, r"texts\[0\]: expected a text, not int"),
        ({"texts": " "}, "texts is empty"),
    ],
)
def test_arguments_of_another_type_are_refused_at_once_in_one_line(pair, clip, wrong, says):
    with pytest.raises(InputError, match=says) as raised:
        reduce_tokens(pair[0], "TRIM:-1", **{"clip": clip, "tokenizer": pair[2]} | wrong)
    assert "\n" not in str(raised.value)


def test_a_function_that_gives_no_text_is_refused(pair, samples, lay_out, clip):
    reduction = reduce_tokens(pair[0], "TRIM:-1", clip=Path(clip), texts=len, tokenizer=pair[2])
    with reduction, pytest.raises(InputError, match=r"texts\[0\]: expected a text, not int"):
        ask(pair[0], samples[:1], lay_out)


def test_a_model_of_peft_is_pointed_to_the_one_inside(held):
    wrapped = get_peft_model(copy.deepcopy(held), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"not a PeftModel; give its get_base_model\(\)"):
        reduce_tokens(wrapped, "FasterVLM:9")
    reduce_tokens(wrapped.get_base_model(), "FasterVLM:9")


def test_our_own_model_is_pointed_to_its_own_switch(pair):
    with pytest.raises(InputError, match="set_token_reduction"):
        reduce_tokens(pair[1], "TRIM:-1")


def make_tiny(vision, **settings) -> LlavaForConditionalGeneration:
    text = LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, **settings))


SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"image_size": 28, "patch_size": 14}


@pytest.mark.parametrize(
    ("vision", "settings", "says"),
    [
        (SiglipVisionConfig(**SHAPE), {}, "is a SiglipVisionModel"),
        (CLIPVisionConfig(**SHAPE), {"vision_feature_layer": [-2, -1]}, "a single vision_feature_layer"),
        (CLIPVisionConfig(**SHAPE), {"vision_feature_select_strategy": "full"}, '"default", not -2 and "full"'),
        (CLIPVisionConfig(**SHAPE), {"vision_feature_layer": -9}, "does not exist"),
    ],
)
def test_towers_and_settings_that_cannot_be_reduced_are_refused(vision, settings, says):
    with pytest.raises(InputError, match=says):
        reduce_tokens(make_tiny(vision, **settings), "Random:0.5")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("FasterVLM:9,position_ids=original", "position_ids=original is not for transformers' own classes"),
        ("TRIMM:-1", "unknown token reducer"),
        ("FasterVLM:3,layer=9", "does not exist"),
        ("FastV:0.5,layer=3", "layer 3"),
    ],
)
def test_specs_that_do_not_fit_are_refused_at_once(held, spec, says):
    with pytest.raises(InputError, match=says):
        reduce_tokens(held, spec)
