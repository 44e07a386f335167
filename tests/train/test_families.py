"""Training LLaVA on Mistral and Qwen2: what was trained is what loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import Llava
from llava.convert import convert
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.prompt import wrap_prompt
from tests.families import FAMILIES, write_checkpoint
from tests.test_chat_template import CHATML

TRAINED = ("mistral", "mistral-window", "qwen2", "qwen")
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 32}


def logits(model: torch.nn.Module, tokenizer: object, name: str) -> torch.Tensor:
    prompt = wrap_prompt("What shape is red?", 1, FAMILIES[name][4])
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = torch.linspace(-1, 1, 3 * 84 * 84).view(1, 3, 84, 84)
    with torch.no_grad():
        return model.eval()(ids, images=pixels, texts=["What shape is red?"]).logits


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("flags", [{}, LORA], ids=["full", "lora"])
def test_five_steps_change_the_model_and_the_saved_one_has_its_logits(
    run_training: Callable, tmp_path: Path, name: str, flags: dict
):
    start = write_checkpoint(tmp_path / "language_model", name, is_llava=False)
    settings = {
        "mm_vision_token_reduce_func": "TRIM:-1",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
    }
    trainer = run_training(
        model_name_or_path=start, version=FAMILIES[name][4], max_steps=5, learning_rate=1e-2, **settings, **flags
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    expected = logits(trainer.model, trainer.processing_class, name)
    folder = tmp_path / "run"
    tokenizer, model, _, _ = load_pretrained_model(str(folder), str(start) if flags else None, device="cpu")
    assert torch.allclose(logits(model, tokenizer, name), expected, atol=1e-4 if flags else 1e-6)
    assert model.token_reducer.spec() == "TRIM:-1"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == ("llava_mistral" if "mistral" in name else "llava_qwen2")


@pytest.mark.parametrize("flags", [{}, LORA], ids=["full", "lora"])
def test_a_chat_template_is_followed_and_generation_stops_at_its_end_token(
    run_training: Callable, tmp_path: Path, flags: dict
):
    start = write_checkpoint(tmp_path / "language_model", "qwen", is_llava=False)
    (start / "chat_template.jinja").write_text(CHATML)
    trainer = run_training(model_name_or_path=start, version="auto", max_steps=2, **flags)
    end = trainer.processing_class.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((start / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2 != end
    labels = trainer.train_dataset[0].labels
    assert labels[-1] == -100 and labels[labels != -100][-1] == end  # the line break behind it is not learned
    base = start if flags else None
    llava = Llava.from_pretrained(tmp_path / "run", base=base, device="cpu")
    assert llava.conv_mode == "chat_template"
    assert {2, end} <= set(llava.model.generation_config.eos_token_id)
    assert wrap_prompt("Who?", 0, llava.conv_mode, tokenizer=llava.tokenizer).endswith("<|im_start|>assistant\n")
    (answer,) = llava.ask_many([([], "Who?")], max_new_tokens=4, progress=False)
    assert answer.text == llava.ask([], "Who?", max_new_tokens=4).text


@pytest.mark.parametrize("flags", [{}, LORA], ids=["full", "lora"])
def test_tied_embeddings_are_saved_once_and_load_tied(run_training: Callable, tmp_path: Path, flags: dict):
    start = write_checkpoint(tmp_path / "language_model", "qwen", is_llava=False)
    trainer = run_training(model_name_or_path=start, version="qwen_2", max_steps=2, learning_rate=1e-2, **flags)
    assert trainer.model.get_input_embeddings().weight is trainer.model.get_output_embeddings().weight
    if not flags:
        saved = load_file(tmp_path / "run/model.safetensors")
        assert [name for name in saved if "embed_tokens" in name or "lm_head" in name] == ["model.embed_tokens.weight"]
    _, model, _, _ = load_pretrained_model(str(tmp_path / "run"), str(start) if flags else None, device="cpu")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_a_llava_is_finetuned_further(run_training: Callable, tmp_path: Path, name: str):
    start = write_checkpoint(tmp_path / "start", name)
    trainer = run_training(model_name_or_path=start, vision_tower=None, version=FAMILIES[name][4], max_steps=2)
    expected = logits(trainer.model, trainer.processing_class, name)
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "run"), device="cpu")
    assert torch.allclose(logits(model, tokenizer, name), expected, atol=1e-6)


def test_an_adapter_is_refused_on_a_base_of_another_family(run_training: Callable, tmp_path: Path):
    start = write_checkpoint(tmp_path / "qwen", "qwen2", is_llava=False)
    run_training(model_name_or_path=start, version="qwen_1_5", max_steps=1, **LORA)
    other = write_checkpoint(tmp_path / "mistral", "mistral", is_llava=False)
    with pytest.raises(
        InputError, match=r'mistral has model_type "mistral", and .* was trained on another language model'
    ):
        load_pretrained_model(str(tmp_path / "run"), str(other), device="cpu")


def test_a_checkpoint_with_its_own_tower_is_finetuned_resumed_and_saved_with_it(
    run_training: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    convert("llava-v1.5-tiny84", str(tmp_path / "there"), "llava-hf")
    file = tmp_path / "there/model.safetensors"
    weights = load_file(file)
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    weights[name] = weights[name] + 0.1
    save_file(weights, file, metadata={"format": "pt"})
    convert(str(tmp_path / "there"), str(tmp_path / "start"), "llava")
    flags = {"model_name_or_path": tmp_path / "start", "save_strategy": "steps", "save_steps": 1}
    run_training(**flags, max_steps=2)
    assert "start holds its vision tower, which stays; --vision_tower openai/" in caplog.text
    for left in (tmp_path / "run").glob("checkpoint-2"):
        shutil.rmtree(left)
    (tmp_path / "run/run.json").unlink()
    trainer = run_training(**flags, max_steps=2, resume_anyway=True)
    expected = logits(trainer.model, trainer.processing_class, "llama")
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "run"), device="cpu")
    assert torch.allclose(logits(model, tokenizer, "llama"), expected, atol=1e-6)
    saved = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(saved[f"model.vision_tower.{name}"], weights[name])
