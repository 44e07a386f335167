"""LLaVA on Llama, Mistral and Qwen2: each equals transformers' own parts, put together by hand."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration

from llava.check import CheckpointCheck
from llava.convert import convert
from llava.errors import InputError
from llava.generation import GreedyDecoder, is_plain
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.tokenizer import load_tokenizer
from llava.prompt import recover_query, wrap_prompt
from tests.families import FAMILIES, GOLDEN, TOWER, build_language_model, build_projector, write_checkpoint
from tests.test_chat_template import CHATML

QUESTION = "What shape is red?"


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, monkeypatch) -> tuple[str, Path]:
    monkeypatch.chdir(tmp_path)
    return request.param, write_checkpoint(tmp_path / "model", request.param)


def make_inputs(tokenizer: object, name: str, question: str = QUESTION) -> torch.Tensor:
    return tokenizer_image_token(wrap_prompt(question, 1, FAMILIES[name][4]), tokenizer, return_tensors="pt")[None]


def make_pixels(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(seed))


def compose(name: str, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """The plain language model, and the embeddings of a prompt with the projected patches in it."""
    language = build_language_model(name)
    vision = CLIPVisionModel.from_pretrained(GOLDEN / TOWER)
    patches = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    place = int((ids[0] == -200).nonzero())
    embed = language.get_input_embeddings()
    pieces = [embed(ids[:, :place]), build_projector()(patches), embed(ids[:, place + 1 :])]
    return language, torch.cat(pieces, dim=1)


@torch.no_grad()
def test_logits_and_answers_are_those_of_transformers_parts(family):
    name, folder = family
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    ids, pixels = make_inputs(tokenizer, name), make_pixels()
    language, embeds = compose(name, ids, pixels)
    assert (model(ids, images=pixels).logits - language(inputs_embeds=embeds).logits).abs().max() < 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    answer = language.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **settings)
    assert model.generate(ids, images=pixels, **settings).tolist() == answer.tolist()


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(family):
    name, folder = family
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    rows = [make_inputs(tokenizer, name, question)[0] for question in ("Is it?", QUESTION * 3)]
    images = [make_pixels(seed)[0] for seed in range(2)]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(row[None], images=image[None], **settings)[0].tolist()
        for row, image in zip(rows, images, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    together = model.generate(ids, attention_mask=mask, images=torch.stack(images), **settings)
    assert [row[: len(own)] for row, own in zip(together.tolist(), alone, strict=True)] == alone


@torch.no_grad()
def test_our_greedy_search_gives_the_answers_of_generate(family):
    name, folder = family
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu", reduce="Random:0.5")
    if name == "mistral-window":
        assert not is_plain(model)  # a window forgets common beginnings: transformers' generate answers
        return
    rows = [make_inputs(tokenizer, name, question)[0] for question in ("Is it?", QUESTION, QUESTION * 2)]
    (image,) = model.encode_images(make_pixels(), [""])
    answers = GreedyDecoder(model, ends=[2]).decode(rows, [[image]] * 3, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    for row, answer in zip(rows, answers, strict=True):
        expected = model.generate(row[None], image_tokens=[image], **settings)[0].tolist()
        assert answer == [token for token in expected if token != 2]


@torch.no_grad()
def test_reductions_before_and_inside_the_language_model_work(family):
    name, folder = family
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu", reduce="TRIM:0.25")
    ids, pixels = make_inputs(tokenizer, name), make_pixels()
    assert recover_query(ids[0], tokenizer) == QUESTION
    full = ids.shape[1] - 1
    assert model(ids, images=pixels).logits.shape[1] == full + 10
    if name == "mistral-window":
        with pytest.raises(InputError, match="needs attention to all tokens before, and this language model attends"):
            model.set_token_reduction("FastV:0.5,layer=1")
        return
    model.set_token_reduction("FastV:1.0,layer=1")
    plain = load_pretrained_model(str(folder), device="cpu")[1]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, images=pixels, **settings)
    assert model.generate(ids, images=pixels, **settings).tolist() == expected.tolist()
    model.set_token_reduction("FastV:0.5,layer=1")
    assert model(ids, images=pixels).logits.shape[1] == full + 18


@torch.no_grad()
def test_saved_checkpoints_load_and_give_the_same_logits(family):
    name, folder = family
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    saved = json.loads(Path("saved/config.json").read_text())
    assert saved["model_type"] == type(model.config).model_type
    tokenizer, again, _, _ = load_pretrained_model("saved", device="cpu")
    ids, pixels = make_inputs(tokenizer, name), make_pixels()
    assert torch.equal(model(ids, images=pixels).logits, again(ids, images=pixels).logits)
    assert type(AutoConfig.from_pretrained("saved")) is type(model.config)


def test_the_check_finds_nothing_wrong(family):
    findings = list(CheckpointCheck(str(family[1])).findings())
    assert not [str(finding) for finding in findings if finding.is_fault]
    assert len(findings) == 9


@torch.no_grad()
def test_conversion_there_and_back_keeps_the_logits(family):
    name, _ = family
    convert("model", "there", "llava-hf")
    convert("there", "back", "llava")
    tokenizer, model, _, _ = load_pretrained_model("model", device="cpu")
    ids, pixels = make_inputs(tokenizer, name), make_pixels()
    expected = model(ids, images=pixels).logits
    for place in ("there", "back"):
        logits = load_pretrained_model(place, device="cpu")[1](ids, images=pixels).logits
        assert torch.equal(logits[..., :1000], expected)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    prompt = wrap_prompt(QUESTION, 1, FAMILIES[name][4])
    inputs = AutoProcessor.from_pretrained("there", backend="pil")(images=[image], text=[prompt], return_tensors="pt")
    theirs = LlavaForConditionalGeneration.from_pretrained("there", dtype=torch.float32)(**inputs).logits
    ours = model(ids, images=process_images([image], model.get_vision_tower().image_processor, model.config)).logits
    assert inputs["input_ids"].shape[1] == ids.shape[1] + 35
    assert (theirs[..., :1000] - ours).abs().max() < 1e-5
    kept = json.loads(Path("back/config.json").read_text())
    assert kept.get("sliding_window") == FAMILIES[name][1].get("sliding_window")
    assert kept["model_type"] == type(model.config).model_type
    assert kept["vocab_size"] == 1000


def test_a_chat_template_goes_to_transformers_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conv_mode": "chat_template"}))
    with pytest.raises(InputError, match="has no chat template"):
        convert(str(folder), "there", "llava-hf")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert "chat template chat_template" in convert(str(folder), "there", "llava-hf")
    expected = wrap_prompt(QUESTION, 1, "chat_template", tokenizer=load_tokenizer(str(folder)))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    theirs = AutoProcessor.from_pretrained("there", backend="pil")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == expected
    ours = AutoProcessor.from_pretrained(folder)
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == expected
    messages = [{"role": "system", "content": "Be brief."}, *messages]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == rendered
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    convert("there", "back", "llava")
    assert wrap_prompt(QUESTION, 1, "chat_template", tokenizer=load_tokenizer("back")) == expected


def test_a_family_is_not_loaded_as_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_mistral", "architectures": None}))
    with pytest.raises(InputError, match=r"holds 9 weights that its config\.json has no place for"):
        load_pretrained_model(str(folder), device="cpu")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_mistral"}))
    with pytest.raises(InputError, match='model_type "llava_mistral" and architectures LlavaQwen2ForCausalLM'):
        load_pretrained_model(str(folder), device="cpu")
