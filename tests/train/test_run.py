"""What a run is: it goes on with the same settings only, and ends once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainingArguments

from llava.errors import InputError
from llava.train.flags import DataArguments, LlavaTrainingFlags, ModelArguments, list_trainer_flags
from llava.train.run import FILE_FLAGS, NEUTRAL

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
SAVED = {"save_strategy": "steps", "save_steps": 1, **TRIM}


@pytest.fixture
def interrupted(run_training: Callable, tmp_path: Path) -> Path:
    """A run of two steps that ended after the first."""
    run_training(**SAVED)
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoint-2")
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(settings | {"finished": False}))
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------- the same settings only
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"mm_vision_token_reduce_func": "none"}, "mm_vision_token_reduce_func TRIM:-1 -> None"),
        ({"mm_vision_token_reduce_func": "TRIM:0.5"}, "mm_vision_token_reduce_func TRIM:-1 -> TRIM:0.5"),
        ({"learning_rate": 1e-4}, "learning_rate 0.001 -> 0.0001"),
        ({"seed": 7}, "seed 42 -> 7"),
        ({"weight_decay": 0.1}, "weight_decay 0.0 -> 0.1"),
        ({"max_steps": 3}, "max_steps 2 -> 3"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size 2 -> 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type linear -> constant"),
        ({"version": "llava_llama_2"}, "version v1 -> llava_llama_2"),
        ({"lora_enable": True}, "lora_enable False -> True"),
        ({"freeze_mm_mlp_adapter": True}, "freeze_mm_mlp_adapter False -> True"),
        ({"model_max_length": 512}, "model_max_length 2048 -> 512"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio pad -> square"),
        ({"bf16": True}, "bf16 False -> True"),
        ({"group_by_modality_length": True}, "group_by_modality_length False -> True"),
        ({"mm_projector_lr": 1e-5}, "mm_projector_lr None -> 1e-05"),
        ({"model_name_or_path": "llava-v1.5-tiny84"}, "model_name_or_path lmsys/vicuna-tiny-v1.5 -> llava-v1.5-tiny84"),
    ],
)
def test_other_settings_are_refused_in_one_line(flags: dict, line: str, interrupted: Path, run_training: Callable):
    before = weights(interrupted)
    with pytest.raises(InputError) as caught:
        run_training(**SAVED | flags)
    text = str(caught.value)
    assert f"{interrupted} holds a run with other settings: " in text and line in text and "\n" not in text
    assert "--resume_anyway True" in text
    assert weights(interrupted) == before


def test_several_differences_are_all_named(interrupted: Path, run_training: Callable):
    with pytest.raises(InputError, match=r"learning_rate 0\.001 -> 0\.01.*seed 42 -> 1"):
        run_training(**SAVED, learning_rate=0.01, seed=1)


def test_other_records_are_refused_and_another_spelling_of_the_same_is_not(
    interrupted: Path, run_training: Callable, write_records: Callable, conversations: list, golden: Path
):
    other = write_records(conversations[:-1])
    with pytest.raises(InputError, match=r"data_path .*train6\.json -> .*data\.json"):
        run_training(**SAVED, data_path=other)
    trainer = run_training(
        **SAVED, data_path=write_records(conversations),
        model_name_or_path=golden / "checkpoints/lmsys/../lmsys/vicuna-tiny-v1.5",
    )  # fmt: skip
    assert trainer.state.global_step == 2


def test_changed_content_under_the_same_name_is_refused(
    run_training: Callable, write_records: Callable, conversations: list, tmp_path: Path
):
    run_training(**SAVED, data_path=write_records(conversations))
    write_records([*conversations[1:], conversations[0]])
    with pytest.raises(InputError, match=r"data_path .*data\.json, whose content has changed"):
        run_training(**SAVED, data_path=tmp_path / "data.json")


def test_what_does_not_decide_the_result_may_change(interrupted: Path, run_training: Callable, tmp_path: Path):
    whole = run_training(**SAVED, output_dir=tmp_path / "whole")
    resumed = run_training(
        **SAVED | {"save_steps": 2}, dataloader_num_workers=1, logging_steps=2, report_to="none",
        gradient_checkpointing=True, save_total_limit=3,
    )  # fmt: skip
    assert resumed.state.global_step == whole.state.global_step == 2
    assert weights(interrupted) == weights(tmp_path / "whole")


def test_other_settings_go_on_when_told_to(interrupted: Path, run_training: Callable, caplog: pytest.LogCaptureFixture):
    trainer = run_training(**SAVED, seed=7, resume_anyway=True)
    assert "seed 42 -> 7; goes on all the same" in caplog.text
    assert trainer.state.global_step == 2
    stored = json.loads((interrupted / "run.json").read_text(encoding="utf-8"))
    assert stored["settings"]["seed"] == 7 and stored["finished"]


def test_settings_of_a_run_that_saved_nothing_bind_nobody(run_training: Callable, tmp_path: Path):
    with pytest.raises(InputError, match="vision tower"):
        run_training(vision_tower="./nowhere")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/run.json").write_text('{"finished": false, "settings": {"seed": 1}, "contents": {}}')
    assert run_training().state.global_step == 2


@pytest.mark.parametrize("content", ["[]", "{}", "nonsense", '{"finished": true, "settings": 3, "contents": {}}'])
def test_a_foreign_run_file_is_one_line(content: str, run_training: Callable, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is not"):
        run_training()


def test_every_flag_counts_or_is_named_as_neutral():
    own = {name for group in (ModelArguments, DataArguments, LlavaTrainingFlags) for name in group.__dataclass_fields__}
    later = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the lowest transformers
    assert own | set(list_trainer_flags()) >= (NEUTRAL | set(FILE_FLAGS)) - later
    deciding = set(TrainingArguments.__dataclass_fields__) - NEUTRAL
    assert {"seed", "data_seed", "learning_rate", "weight_decay", "adam_beta1", "max_grad_norm", "optim"} <= deciding


# ---------------------------------------------------------------------------------------------------- the end is one
def test_a_finished_run_has_nothing_to_do(run_training: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = {**SAVED, "lr_scheduler_type": "constant"}
    run_training(**flags)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert run_training(**flags) is None
    assert capsys.readouterr().out.endswith(f"finished already, nothing to do: {tmp_path / 'run'}\n")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_killed_before_its_result_was_written_writes_it_and_takes_no_step(run_training: Callable, tmp_path: Path):
    flags = {**SAVED, "lr_scheduler_type": "constant"}
    run_training(**flags)
    folder = tmp_path / "run"
    before = weights(folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    assert run_training(**flags).state.global_step == 2
    assert weights(folder) == before


def test_more_steps_go_on_from_the_end_when_told_to(run_training: Callable):
    run_training(**SAVED)
    with pytest.raises(InputError, match="max_steps 2 -> 4"):
        run_training(**SAVED, max_steps=4)
    assert run_training(**SAVED, max_steps=4, resume_anyway=True).state.global_step == 4


@pytest.mark.parametrize("anyway", [False, True])
def test_an_output_of_lora_takes_no_full_finetuning(anyway: bool, run_training: Callable, tmp_path: Path):
    run_training(**SAVED, lora_enable=True, lora_r=4)
    line = "was trained with LoRA, this run trains without" if anyway else "lora_enable True -> False"
    with pytest.raises(InputError, match=line):
        run_training(**SAVED, resume_anyway=anyway)


def test_the_model_it_starts_from_is_not_overwritten(run_training: Callable, golden: Path, tmp_path: Path):
    shutil.copytree(golden / "checkpoints/lmsys/vicuna-tiny-v1.5", tmp_path / "run")
    with pytest.raises(InputError, match="is the model that the training starts from"):
        run_training(model_name_or_path=tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ contents
@pytest.fixture
def start(run_training: Callable, golden: Path, tmp_path: Path) -> Path:
    """A language model that a finished run of two steps started from."""
    shutil.copytree(golden / "checkpoints/lmsys/vicuna-tiny-v1.5", tmp_path / "start", copy_function=shutil.copyfile)
    run_training(**SAVED, model_name_or_path=tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize("share", [0.3, 0.37, 0.61, 0.9])
def test_a_byte_changed_anywhere_in_the_weights_counts(
    share: float, start: Path, run_training: Callable, tmp_path: Path
):
    weights_file = start / "pytorch_model.bin"
    content = bytearray(weights_file.read_bytes())
    content[int(share * len(content))] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(InputError, match=r"model_name_or_path .* whose content has changed"):
        run_training(**SAVED, model_name_or_path=start)


def test_files_beside_the_weights_and_times_do_not_count(start: Path, run_training: Callable):
    for name in ("README.md", "notes.txt", "eval_results.json"):
        (start / name).write_text("{}")
    (start / "pytorch_model.bin").touch()
    assert run_training(**SAVED, model_name_or_path=start) is None  # the same run, finished already


def test_a_copy_of_the_model_under_another_name_is_the_same_model(start: Path, run_training: Callable, tmp_path: Path):
    shutil.copytree(start, tmp_path / "copy")
    assert run_training(**SAVED, model_name_or_path=tmp_path / "copy") is None
