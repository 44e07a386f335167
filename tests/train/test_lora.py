"""LoRA, QLoRA and projector-only training: what is trained, what is saved, and that it loads with its base model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import is_bitsandbytes_available

from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.consolidate import consolidate_ckpt, extract_projector

ROOT = Path(__file__).parents[2]
BASE = "lmsys/vicuna-tiny-v1.5"
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 32, "mm_vision_token_reduce_func": "TRIM:-1"}
PROJECTOR_NAMES = [f"model.mm_projector.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]
PROMPT = "USER: <image>\nWhat shape is red? ASSISTANT:"


def logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    pixels = torch.linspace(-1, 1, 3 * 84 * 84).view(1, 3, 84, 84)
    with torch.no_grad():
        return model.eval()(ids, images=pixels, texts=["What shape is red?"]).logits


@pytest.fixture
def captions(conversations: list[dict], write_records: Callable) -> Path:
    return write_records([raw for raw in conversations if "image" in raw and len(raw["conversations"]) == 2])


def test_lora_gives_the_same_logits_in_memory_on_its_base_and_merged(run_training: Callable, tmp_path: Path):
    trainer = run_training(max_steps=3, learning_rate=1e-2, **LORA)
    in_memory = logits(trainer.model, trainer.processing_class)
    assert any(value.abs().sum() > 0 for name, value in trainer.model.named_parameters() if "lora_B" in name)
    folder = str(tmp_path / "run")
    tokenizer, on_base, _, _ = load_pretrained_model(folder, BASE, device="cpu")
    assert on_base.token_reducer.spec() == "TRIM:-1"
    assert torch.allclose(logits(on_base, tokenizer), in_memory, atol=1e-5)
    command = ["scripts/merge_lora_weights.py", "--model-path", folder, "--model-base", str(Path(BASE).resolve())]
    merge = [sys.executable, *command, "--save-model-path", str(tmp_path / "merged"), "--dtype", "float32"]
    done = subprocess.run(merge, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer, merged, _, _ = load_pretrained_model(str(tmp_path / "merged"), device="cpu")
    assert torch.allclose(logits(merged, tokenizer), in_memory, atol=1e-5)
    assert not [name for name in load_file(tmp_path / "merged/model.safetensors") if "lora" in name or "tower" in name]


def test_lora_trains_adapters_and_projector_and_nothing_else(run_training: Callable, tmp_path: Path):
    trainer = run_training(mm_projector_lr=1e-4, max_steps=1, **LORA)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {"lora_A" in name or "lora_B" in name or "mm_projector" in name for name in trained} == {True}
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not [name for name in trained if "tower" in name]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        ("mm_projector" in names[id(parameter)], group["initial_lr"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == {(True, 1e-4), (False, 1e-3)}


def test_the_lora_folder_has_the_published_files(run_training: Callable, tmp_path: Path):
    run_training(max_steps=1, **LORA)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"} <= files
    rest = torch.load(tmp_path / "run/non_lora_trainables.bin", weights_only=True)
    assert sorted(rest) == [f"base_model.model.{name}" for name in PROJECTOR_NAMES]
    adapter = json.loads((tmp_path / "run/adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["r"], adapter["peft_type"]) == (BASE, 8, "LORA")
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["mm_vision_token_reduce_func"]) == ("llava_llama", "TRIM:-1")


def test_an_interrupted_lora_run_goes_on_as_if_it_had_not_been(run_training: Callable, tmp_path: Path):
    flags = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lora_dropout": 0.0, **LORA}
    whole = run_training(output_dir=tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = run_training(output_dir=tmp_path / "resumed", **flags)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_lora_of_a_llava_checkpoint_loads_on_it(run_training: Callable, tmp_path: Path):
    start = {"model_name_or_path": "llava-v1.5-tiny84", "vision_tower": None}
    trainer = run_training(**start, max_steps=2, learning_rate=1e-2, **LORA)
    tokenizer, loaded, _, _ = load_pretrained_model(str(tmp_path / "run"), "llava-v1.5-tiny84", device="cpu")
    # In float64, so that only the weights are compared: the adapter is added before the product here, beside it there.
    in_memory = logits(trainer.model.double(), trainer.processing_class)
    assert torch.allclose(logits(loaded.double(), tokenizer), in_memory, atol=1e-5)


def test_stage_1_loads_on_its_base_and_merges(run_training: Callable, captions: Path, tmp_path: Path):
    trainer = run_training(data_path=captions, version="plain", tune_mm_mlp_adapter=True, learning_rate=1e-2)
    in_memory = logits(trainer.model, trainer.processing_class)
    tokenizer, on_base, _, _ = load_pretrained_model(str(tmp_path / "run"), BASE, device="cpu")
    assert torch.equal(logits(on_base, tokenizer), in_memory)
    consolidate_ckpt(str(tmp_path / "run"), str(tmp_path / "merged"), BASE, "float32")
    tokenizer, merged, _, _ = load_pretrained_model(str(tmp_path / "merged"), device="cpu")
    assert torch.equal(logits(merged, tokenizer), in_memory)
    extract_projector(str(tmp_path / "merged"), str(tmp_path / "again"))
    extracted = torch.load(tmp_path / "again/mm_projector.bin", weights_only=True)
    stage_1 = torch.load(tmp_path / "run/mm_projector.bin", weights_only=True)
    assert {name: value.tolist() for name, value in extracted.items()} == {
        name: value.tolist() for name, value in stage_1.items()
    }


def first_answer_logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    prompt = PROMPT.replace("<image>", "<im_start><image><im_end>")
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = torch.linspace(-1, 1, 3 * 84 * 84).view(1, 3, 84, 84)
    with torch.no_grad():
        return model.eval()(ids, images=pixels, texts=["What shape is red?"]).logits


@pytest.mark.parametrize("tokens", [("mm_use_im_start_end",), ("mm_use_im_patch_token",), ()])
@pytest.mark.parametrize("kind", ["lora", "stage 1"])
def test_added_tokens_are_saved_load_on_the_base_and_merge(
    kind: str, tokens: tuple[str, ...], run_training: Callable, captions: Path, tmp_path: Path
):
    flags = LORA if kind == "lora" else {"data_path": captions, "version": "plain", "tune_mm_mlp_adapter": True}
    trainer = run_training(**flags, **dict.fromkeys(tokens, True), learning_rate=1e-2)
    in_memory = first_answer_logits(trainer.model, trainer.processing_class)
    folder = str(tmp_path / "run")
    tokenizer, on_base, _, _ = load_pretrained_model(folder, BASE, device="cpu")
    num_added = {(): 0, ("mm_use_im_patch_token",): 1, ("mm_use_im_start_end",): 2}[tokens]
    assert len(tokenizer) == 1000 + num_added == on_base.get_input_embeddings().weight.shape[0]
    trained = trainer.model.get_base_model() if kind == "lora" else trainer.model
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(on_base, part)().weight, getattr(trained, part)().weight)
    assert torch.allclose(first_answer_logits(on_base, tokenizer), in_memory, atol=1e-4)
    consolidate_ckpt(folder, str(tmp_path / "merged"), BASE, "float32")
    tokenizer, merged, _, _ = load_pretrained_model(str(tmp_path / "merged"), device="cpu")
    assert torch.allclose(first_answer_logits(merged, tokenizer), in_memory, atol=1e-4)


def test_a_lora_run_with_added_tokens_resumes_identically(run_training: Callable, tmp_path: Path):
    flags = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "mm_use_im_start_end": True, **LORA}
    whole = run_training(output_dir=tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = run_training(output_dir=tmp_path / "resumed", **flags)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is an extra")
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_on_a_quantised_model_and_loads_on_the_whole_one(
    bits: int, run_training: Callable, tmp_path: Path
):
    trainer = run_training(bits=bits, max_steps=3, learning_rate=1e-2, **LORA)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    entries = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1] < entries[0]
    load_pretrained_model(str(tmp_path / "run"), BASE, device="cpu")
    on_quantised = {"load_4bit": bits == 4, "load_8bit": bits == 8}
    tokenizer, quantised, _, _ = load_pretrained_model(str(tmp_path / "run"), BASE, device="cpu", **on_quantised)
    assert any("lora" in name for name, _ in quantised.named_modules())  # beside the weights, which cannot take it
    assert torch.isfinite(logits(quantised, tokenizer)).all()


def test_extracting_from_shards_gives_the_checkpoints_projector(checkpoints: Path, tmp_path: Path):
    extract_projector("llava-v1.5-tiny84", str(tmp_path / "out.bin"))
    model = load_pretrained_model("llava-v1.5-tiny84", device="cpu")[1]
    extracted = torch.load(tmp_path / "out.bin", weights_only=True)
    assert sorted(extracted) == PROJECTOR_NAMES
    for name, value in extracted.items():
        assert torch.equal(value.float(), model.state_dict()[name])


# --------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"bits": 4}, "--bits 4: quantised weights cannot be trained; add --lora_enable True"),
        ({"bits": 3, "lora_enable": True}, "--bits 3: expected one of 4, 8, 16"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "would freeze the adapters"),
        ({"lora_enable": True, "lora_bias": "some"}, "--lora_bias some: expected one of none, all, lora_only"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags: dict, says: str, run_training: Callable):
    with pytest.raises(InputError, match=says):
        run_training(**flags)


def test_parts_without_their_base_name_what_is_missing(run_training: Callable, tmp_path: Path):
    run_training(max_steps=1, **LORA)
    folder = tmp_path / "run"
    with pytest.raises(
        InputError, match=rf"holds LoRA weights only: give its base model \(--model-base, e.g. {BASE}\)"
    ):
        load_pretrained_model(str(folder))
    with pytest.raises(InputError, match=r"model base .*nowhere"):
        load_pretrained_model(str(folder), str(tmp_path / "nowhere"))
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(InputError, match=r"has adapter_config.json, but no non_lora_trainables.bin"):
        load_pretrained_model(str(folder), BASE)


def test_a_base_of_another_size_is_one_line(checkpoints: Path, tmp_path: Path):
    folder = tmp_path / "part"
    shutil.copytree("liuhaotian/llava-v1.5-mlp2x-tiny-pretrain", folder)
    weights = torch.load(folder / "mm_projector.bin", weights_only=True)
    torch.save({name: value[..., :8] for name, value in weights.items()}, folder / "mm_projector.bin")
    with pytest.raises(InputError, match=r"mm_projector.bin: model.mm_projector.* has shape .*: another base\?"):
        load_pretrained_model(str(folder), BASE)


def test_a_full_checkpoint_takes_no_base(checkpoints: Path):
    with pytest.raises(InputError, match=r"llava-v1.5-tiny84 is a full checkpoint: leave out the model base"):
        load_pretrained_model("llava-v1.5-tiny84", BASE)
