"""Real training runs on the tiny checkpoints: numbers, what is trained, what is saved, what loads."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_folder import locate_tower
from llava.train.llava_trainer import LLaVATrainer
from llava.train.records import parse_record
from llava.train.targets import choose_template, render

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
STAGE_1 = {"version": "plain", "tune_mm_mlp_adapter": True}
LLAVA = {"model_name_or_path": "llava-v1.5-tiny84", "vision_tower": None}
PROMPT = "USER: <image>\nWhat shape is red? ASSISTANT:"


@pytest.fixture
def captions(conversations: list[dict], write_records: Callable) -> Path:
    """The records that the plain template can hold."""
    return write_records([raw for raw in conversations if "image" in raw and len(raw["conversations"]) == 2])


@pytest.fixture
def texts(conversations: list[dict], write_records: Callable) -> Path:
    """The record without an image, several times."""
    return write_records([raw for raw in conversations if "image" not in raw] * 4, "texts.json")


def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainable(trainer: LLaVATrainer) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def optimized(trainer: LLaVATrainer) -> set[str]:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {names[id(parameter)] for group in trainer.optimizer.param_groups for parameter in group["params"]}


def first_logits(model: torch.nn.Module, tokenizer: object, pixels: torch.Tensor) -> torch.Tensor:
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        return model.eval()(ids, images=pixels, texts=["What shape is red?"]).logits


# ------------------------------------------------------------------------------- numbers of the published code
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("none_bs2", {"per_device_train_batch_size": 2}),
        (
            "trim_auto_bs1",
            {
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "mm_vision_token_reduce_query": "conversation",
                **TRIM,
            },
        ),
    ],
)
def test_every_step_equals_the_published_training(
    name: str, flags: dict, golden: Path, conversations: list, write_records: Callable, run_training: Callable,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    recorded = json.loads((golden / "train" / name / "trace.json").read_text(encoding="utf-8"))["steps"]
    prompts = {
        render(parse_record(raw, 0).turns, choose_template("v1")).prompt.replace("<image>", " "): raw
        for raw in conversations
    }
    seen = []
    plain_step = LLaVATrainer.training_step

    def record_step(self, model, inputs, *rest):
        loss = plain_step(self, model, inputs, *rest).item()
        norms = {key: value.grad.norm().item() for key, value in model.named_parameters() if value.grad is not None}
        seen.append((inputs, loss, norms))
        return torch.tensor(loss)

    monkeypatch.setattr(LLaVATrainer, "training_step", record_step)
    run_training(
        data_path=write_records([prompts[text] for step in recorded for text in step["texts"]]),
        train_sampling_strategy="sequential",  # transformers 5 shuffles otherwise than 4 did
        pretrain_mm_mlp_adapter="liuhaotian/llava-v1.5-mlp2x-tiny-pretrain/mm_projector.bin",
        max_steps=3,
        warmup_ratio=0.03,
        lr_scheduler_type="cosine",
        **flags,
    )
    for (inputs, loss, norms), step in zip(seen, recorded, strict=True):
        assert inputs["input_ids"].tolist() == step["input_ids"]
        assert inputs["labels"].tolist() == step["labels"]
        assert loss == pytest.approx(step["loss"], abs=1e-5)
        published = {key: norm for key, norm in step["grad_norms"].items() if norm is not None}
        assert norms == pytest.approx(published, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------------ what is trained
def test_stage_1_trains_the_projector_alone(run_training: Callable, captions: Path):
    trainer = run_training(data_path=captions, **STAGE_1, **TRIM)
    assert trainable(trainer) == optimized(trainer)
    assert {name.rsplit(".", 2)[0] for name in trainable(trainer)} == {"model.mm_projector"}


def test_stage_2_trains_everything_but_the_towers(run_training: Callable):
    trainer = run_training(**TRIM)
    everything = {name for name, _ in trainer.model.named_parameters()}
    towers = {name for name in everything if "vision_tower" in name}
    assert any("text_tower" in name for name in towers)
    assert trainable(trainer) == optimized(trainer) == everything - towers


def test_a_frozen_backbone_leaves_head_and_projector(run_training: Callable):
    trainer = run_training(freeze_backbone=True)
    assert {name.rsplit(".", 1)[0].split(".0")[0].split(".2")[0] for name in trainable(trainer)} == {
        "lm_head",
        "model.mm_projector",
    }


def test_clip_is_bit_identical_after_training(run_training: Callable, golden: Path):
    trainer = run_training(max_steps=4, **TRIM)
    original = torch.load(golden / "checkpoints/openai/clip-vit-tiny-patch14-84/pytorch_model.bin", weights_only=True)
    checked = 0
    for name, value in trainer.model.get_vision_tower().state_dict().items():
        key = name.removeprefix("vision_tower.").removeprefix("text_tower.model.")
        assert torch.equal(value, original[key].to(value.dtype)), name
        checked += 1
    assert checked > 50


def test_the_projector_gets_its_own_learning_rate(run_training: Callable):
    trainer = run_training(mm_projector_lr=1e-4, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["initial_lr"] == (1e-4 if "mm_projector" in name else 1e-3), name
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    assert optimized(trainer) == trainable(trainer)


@pytest.mark.parametrize("reduction", ["TRIM:-1", "none"])
def test_loss_falls_when_few_records_are_overfitted(reduction: str, run_training: Callable):
    trainer = run_training(
        mm_vision_token_reduce_func=reduction, max_steps=16, per_device_train_batch_size=6, learning_rate=5e-3
    )
    assert losses(trainer)[-1] < 0.3 * losses(trainer)[0]


def test_a_batch_of_text_alone_trains_the_language_model_of_a_llava(run_training: Callable, texts: Path):
    trainer = run_training(data_path=texts, max_steps=4)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_mixed_options_train_together(run_training: Callable):
    trainer = run_training(
        group_by_modality_length=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        dataloader_num_workers=1,
        per_device_train_batch_size=1,
        bf16=True,
        max_steps=3,
        **TRIM,
    )
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


# ------------------------------------------------------------------------------------ starting points, flags
def test_reduction_takes_effect_on_an_existing_llava_checkpoint(run_training: Callable, tmp_path: Path):
    reduced = run_training(**LLAVA, **TRIM, output_dir=tmp_path / "reduced")
    plain = run_training(**LLAVA, output_dir=tmp_path / "plain")
    assert reduced.model.token_reducer is not None and plain.model.token_reducer is None
    assert losses(reduced)[0] != losses(plain)[0]


def test_a_checkpoint_keeps_its_reduction_unless_flags_say_otherwise(run_training: Callable, tmp_path: Path):
    start = {"model_name_or_path": "llava-v1.5-tiny84-TRIM", "vision_tower": None, "max_steps": 1}
    kept = run_training(**start, output_dir=tmp_path / "kept")
    off = run_training(**start, mm_vision_token_reduce_func="none", output_dir=tmp_path / "off")
    assert kept.model.config.mm_vision_token_reduce_func == "TRIM:-1"
    assert off.model.config.mm_vision_token_reduce_func is None


def test_flags_that_need_a_vision_tower_are_refused_without_one(run_training: Callable, texts: Path):
    with pytest.raises(InputError, match=r"--mm_vision_token_reduce_func: .* has no vision tower"):
        run_training(vision_tower=None, data_path=texts, **TRIM)


def test_another_projector_type_than_the_checkpoints_is_refused(run_training: Callable):
    with pytest.raises(InputError, match=r"--mm_projector_type linear: llava-v1\.5-tiny84 already has a mlp2x_gelu"):
        run_training(**LLAVA, mm_projector_type="linear")


def test_an_absent_model_is_one_line(run_training: Callable):
    with pytest.raises(InputError, match=r"--model_name_or_path \./nowhere: .* no config.json to be found"):
        run_training(model_name_or_path="./nowhere")


def test_an_output_that_is_no_folder_is_refused_before_anything_loads(run_training: Callable, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file: File exists"):
        run_training(output_dir=tmp_path / "file")


def test_another_architecture_is_refused(run_training: Callable):
    with pytest.raises(InputError, match="a CLIP vision tower; the model to train must be a Llama"):
        run_training(model_name_or_path="openai/clip-vit-tiny-patch14-84")


# ----------------------------------------------------------------------------------------------- what is saved
def test_a_saved_checkpoint_gives_the_logits_in_memory(run_training: Callable, golden: Path, tmp_path: Path):
    trainer = run_training(max_steps=4, **TRIM)
    pixels = trainer.train_dataset[0].images[0][None]
    in_memory = first_logits(trainer.model, trainer.processing_class, pixels)
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "run"), device="cpu")
    assert model.token_reducer.spec() == "TRIM:-1"
    assert torch.equal(first_logits(model, tokenizer, pixels), in_memory)


def test_the_saved_folder_has_the_published_layout(run_training: Callable, golden: Path, tmp_path: Path):
    run_training(**TRIM)
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    published = json.loads(
        (golden / "checkpoints/llava-v1.5-tiny84-TRIM-trained/config.json").read_text(encoding="utf-8")
    )
    ours = {key: value for key, value in config.items() if "mm_" in key or "tokenizer" in key}
    expected = {key: value for key, value in published.items() if "mm_" in key or "tokenizer" in key}
    expected["mm_vision_tower"] = config["mm_vision_tower"]
    assert ours == expected
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert config["use_cache"] is True and config["image_aspect_ratio"] == "pad"
    weights = load_file(tmp_path / "run/model.safetensors")
    assert not [name for name in weights if "vision_tower" in name]
    assert {"model.mm_projector.0.weight", "model.embed_tokens.weight", "lm_head.weight"} <= set(weights)
    assert (tmp_path / "run/tokenizer.model").read_bytes() == (
        golden / "checkpoints/lmsys/vicuna-tiny-v1.5/tokenizer.model"
    ).read_bytes()
    assert (tmp_path / "run/generation_config.json").is_file() and (tmp_path / "run/trainer_state.json").is_file()
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "v1_mmtag"])
def test_the_conversation_template_is_stored(version: str, run_training: Callable, tmp_path: Path):
    run_training(version=version, max_steps=1, save_strategy="steps", save_steps=1)
    for folder in ("run", "run/checkpoint-1"):
        assert json.loads((tmp_path / folder / "config.json").read_text(encoding="utf-8"))["conv_mode"] == version
    assert load_pretrained_model(str(tmp_path / "run"), device="cpu")[1].config.conv_mode == version


def test_captions_are_no_template_to_talk_in(run_training: Callable, captions: Path, tmp_path: Path):
    run_training(data_path=captions, **STAGE_1)
    assert "conv_mode" not in json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))


def test_checkpoint_and_tower_can_move_together(
    run_training: Callable, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world = tmp_path / "world"
    shutil.copytree(golden / "checkpoints/openai/clip-vit-tiny-patch14-84", world / "clip")
    shutil.copytree(golden / "checkpoints/lmsys/vicuna-tiny-v1.5", world / "llm")
    monkeypatch.chdir(world)
    run_training(model_name_or_path="llm", vision_tower="clip", output_dir="llava", save_strategy="steps", save_steps=2)
    assert json.loads(Path("llava/config.json").read_text(encoding="utf-8"))["mm_vision_tower"] == "../clip"
    assert (
        json.loads(Path("llava/checkpoint-2/config.json").read_text(encoding="utf-8"))["mm_vision_tower"]
        == "../../clip"
    )
    # Once more from that checkpoint, whose tower is named relative to its own folder.
    run_training(model_name_or_path="llava", vision_tower=None, output_dir="deeper/again", max_steps=1)
    assert json.loads(Path("deeper/again/config.json").read_text(encoding="utf-8"))["mm_vision_tower"] == "../../clip"
    moved = tmp_path / "moved"
    world.rename(moved)
    monkeypatch.chdir(tmp_path)
    for name in ("llava", "llava/checkpoint-2", "deeper/again"):
        _, model, _, _ = load_pretrained_model(str(moved / name), device="cpu")
        assert model.get_vision_tower().is_loaded


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "/absolute/clip", "openai/clip-vit-large-patch14-336"])
def test_names_that_are_no_relative_path_are_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert locate_tower(name, str(tmp_path), tmp_path / "run") == name


def test_stage_1_leaves_a_projector_that_stage_2_starts_from(run_training: Callable, captions: Path, tmp_path: Path):
    first = run_training(data_path=captions, output_dir=tmp_path / "stage1", **STAGE_1)
    assert sorted(path.name for path in (tmp_path / "stage1").iterdir()) == [
        "config.json",
        "mm_projector.bin",
        "run.json",
        "trainer_state.json",
    ]
    saved = torch.load(tmp_path / "stage1/mm_projector.bin", weights_only=True)
    assert sorted(saved) == [f"model.mm_projector.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")]
    trained = first.model.get_model().mm_projector.state_dict()
    second = run_training(
        pretrain_mm_mlp_adapter=tmp_path / "stage1/mm_projector.bin", learning_rate=0.0, output_dir=tmp_path / "stage2"
    )
    for name, value in second.model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, trained[name])


def test_image_start_and_end_are_learned_with_the_projector(run_training: Callable, captions: Path, tmp_path: Path):
    tokens = {"mm_use_im_start_end": True}
    first = run_training(data_path=captions, output_dir=tmp_path / "stage1", **STAGE_1, **tokens)
    table = first.model.get_input_embeddings().weight.detach()
    second = run_training(
        pretrain_mm_mlp_adapter=tmp_path / "stage1/mm_projector.bin", learning_rate=0.0, **tokens,
        output_dir=tmp_path / "stage2",
    )  # fmt: skip
    assert table.shape[0] == 1002
    assert torch.equal(second.model.get_input_embeddings().weight[-2:], table[-2:])


def test_a_language_model_trains_and_saves_as_itself(run_training: Callable, texts: Path, tmp_path: Path):
    trainer = run_training(vision_tower=None, image_folder=None, data_path=texts, max_steps=4)
    assert type(trainer.model) is LlamaForCausalLM
    assert losses(trainer)[-1] < losses(trainer)[0]
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    again = run_training(model_name_or_path=tmp_path / "run", output_dir=tmp_path / "llava")
    assert again.model.get_vision_tower().is_loaded


def test_a_16_bit_run_saves_16_bit_weights_that_load(run_training: Callable, tmp_path: Path):
    run_training(bf16=True, **TRIM)
    weights = load_file(tmp_path / "run/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    load_pretrained_model(str(tmp_path / "run"), device="cpu")


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run_training: Callable, tmp_path: Path):
    flags = {"save_strategy": "steps", "save_steps": 4, "group_by_modality_length": True, "max_steps": 6, **TRIM}
    whole = run_training(output_dir=tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    resumed = run_training(output_dir=tmp_path / "resumed", **flags)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------ entry points
@pytest.mark.parametrize("entry", [["llava/train/train_mem.py"], ["-m", "llava.train.train"]])
def test_a_mistake_on_the_command_line_is_one_line(entry: list[str]):
    root = Path(__file__).parents[2]
    flags = ["--model_name_or_path", "m", "--data_path", "nowhere.json", "--output_dir", "out", "--version", "v9"]
    done = subprocess.run([sys.executable, *entry, *flags], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --version v9: no such training template")


def test_the_published_entry_point_trains_when_run_by_path(checkpoints: Path, golden: Path, tmp_path: Path):
    script = Path(__file__).parents[2] / "llava/train/train_mem.py"
    flags = {
        "model_name_or_path": "lmsys/vicuna-tiny-v1.5",
        "vision_tower": "openai/clip-vit-tiny-patch14-84",
        "data_path": golden / "data/questions/train6.json",
        "image_folder": golden / "data/images",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        **TRIM,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, str(script), *words], cwd=checkpoints, check=True, capture_output=True)
    assert (tmp_path / "run/model.safetensors").is_file()


def test_the_flags_tower_serves_where_the_checkpoints_own_is_gone(run_training: Callable, golden: Path, tmp_path: Path):
    moved = tmp_path / "llava-moved"
    shutil.copytree(golden / "checkpoints" / "llava-v1.5-tiny84", moved)
    config = json.loads((moved / "config.json").read_text(encoding="utf-8")) | {"mm_vision_tower": "../gone/clip"}
    (moved / "config.json").write_text(json.dumps(config))
    trainer = run_training(model_name_or_path=moved, max_steps=1)
    assert trainer.model.get_vision_tower().is_loaded
