"""Training that would learn nothing is refused before weights are loaded; what is lost on the way is counted."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaTokenizer

from llava.errors import InputError
from llava.train import preflight, train
from llava.train.dataset import TextFormat
from llava.train.llava_trainer import LLaVATrainer
from llava.train.preflight import ImageTokens, find_broken_images, inspect_records, sample
from llava.train.records import Record, parse_record
from llava.train.targets import choose_template

V1 = TextFormat(choose_template("v1"))


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights are loaded."""

    def load(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(train, "load_language_model", load)


def talk(question: str, answer: str, **fields: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "conversations": turns, **fields}


def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------------- refused in one line
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"model_max_length": 5},
            r"none of 6 records has a token to learn within --model_max_length 5 \(they take \d+",
        ),
        ({"model_max_length": -1}, r"--model_max_length -1: expected a number from 2"),
        ({"model_max_length": 0}, r"--model_max_length 0: expected a number from 2"),
        ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, "together leave nothing to train"),
        ({"max_steps": None, "num_train_epochs": 0}, r"--num_train_epochs 0: expected a number above 0"),
        ({"max_steps": None, "num_train_epochs": "nan"}, r"--num_train_epochs nan: expected a number above 0"),
        ({"max_steps": 0}, r"--max_steps 0: expected a number from 1"),
        ({"max_steps": -2}, r"--max_steps -2: expected a number from 1"),
        ({"learning_rate": "nan"}, r"--learning_rate nan: expected a number from 0"),
        ({"learning_rate": "inf"}, r"--learning_rate inf: expected a number from 0"),
        ({"learning_rate": -1e-3}, r"--learning_rate -0.001: expected a number from 0"),
        ({"mm_projector_lr": "nan"}, r"--mm_projector_lr nan: expected a number from 0"),
        ({"weight_decay": "nan"}, r"--weight_decay nan: expected a number from 0"),
        ({"max_grad_norm": "nan"}, r"--max_grad_norm nan: expected a number from 0"),
        ({"adam_beta1": 1.5}, r"--adam_beta1 1.5: expected a number from 0"),
        ({"warmup_steps": -1}, r"--warmup_steps -1: expected a number from 0"),
        ({"warmup_ratio": "nan"}, r"--warmup_ratio nan: expected a share"),
        ({"per_device_train_batch_size": 0}, r"--per_device_train_batch_size 0: expected a number from 1"),
        ({"gradient_accumulation_steps": 0}, r"--gradient_accumulation_steps 0: expected a number from 1"),
        ({"save_strategy": "steps", "save_steps": 0}, r"--save_steps 0: expected a number above 0"),
        ({"logging_steps": 0}, r"--logging_steps 0: expected a number above 0"),
        ({"save_total_limit": 0}, r"--save_total_limit 0: expected a number from 1"),
        ({"seed": -1}, r"--seed -1: expected a number from 0"),
        ({"dataloader_num_workers": -1}, r"--dataloader_num_workers -1: expected a number from 0"),
        ({"lora_enable": True, "lora_r": 0}, r"--lora_r 0: expected a number from 1"),
        ({"lora_enable": True, "lora_alpha": 0}, r"--lora_alpha 0: expected a number above 0"),
        ({"lora_enable": True, "lora_dropout": 1}, r"--lora_dropout 1.0: expected a share"),
        ({"report_to": "wandb"}, r"--report_to wandb: wandb is not installed: pip install wandb"),
        ({"report_to": "wandbb"}, r"--report_to wandbb: expected none, all, "),
        ({"fsdp": "full_shard"}, r"--fsdp needs several processes"),
        ({"fsdp": "True"}, r"--fsdp needs several processes"),
        ({"resume_from_checkpoint": "run/checkpoint-3"}, r"--resume_from_checkpoint: a run resumes by itself"),
        ({"max_steps": 10**18}, r"--max_steps 1000000000000000000: expected a number from 1, at most 1e\+09"),
        ({"eval_on_start": True}, r"--eval_on_start: needs --eval_data_path, the records that are held out"),
        (
            {"load_best_model_at_end": True},
            r"--load_best_model_at_end: no checkpoint is chosen by its held-out loss; leave it out",
        ),
        (
            {"save_strategy": "best"},
            r"--save_strategy best: no checkpoint is chosen by its loss; expected no, steps or epoch",
        ),
        ({"neftune_noise_alpha": 5}, r"--neftune_noise_alpha: no noise is added to embeddings here"),
        ({"dataloader_persistent_workers": True}, r"--dataloader_persistent_workers True needs --dataloader_num_wor"),
        ({"use_liger_kernel": True}, r"--use_liger_kernel: liger_kernel is not installed: pip install liger-kernel"),
        ({"optim": "adamx"}, r"training arguments: adamx is not a valid OptimizerNames"),
        ({"optim": "lomo"}, r"--optim lomo, --optim_args None: .*install.*lomo"),
        ({"optim_args": "x"}, r"--optim adamw_torch, --optim_args x: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"--lr_scheduler_type warmup_stable_decay, .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"--lr_scheduler_type cosine_with_min_lr, .*min_lr"),
        ({"lr_scheduler_kwargs": '{"x": 1}'}, r"--lr_scheduler_type linear, --lr_scheduler_kwargs: .*'x'"),
        ({"lr_scheduler_kwargs": "{"}, r"training arguments: Expecting property name"),
        ({"gradient_checkpointing_kwargs": '{"x": 1}'}, r"--gradient_checkpointing_kwargs: .*: x"),
        ({"torch_compile_backend": "x"}, r"--torch_compile_backend, --torch_compile_mode: Invalid backend: 'x'"),
        ({"torch_compile_mode": "x"}, r"--torch_compile_backend, --torch_compile_mode: Unrecognized mode=x"),
        ({"accelerator_config": "nowhere.json"}, r"training arguments: .*nowhere\.json"),
        ({"accelerator_config": '{"x": 1}'}, r"training arguments: .*'x'"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
            r"--dataloader_drop_last True: 6 records make no batch of 64; leave it out",
        ),
        ({"label_smoothing_factor": 0.1}, r"--label_smoothing_factor: the loss of LLaVA has no smoothing"),
    ],
)
def test_what_would_learn_nothing_or_fail_later_is_one_line(
    flags: dict, line: str, run_training: Callable, nothing_loads: None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("wandb", "liger_kernel"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=line) as caught:
        run_training(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"garbage", r" can't be read: "),
        (b"", r" can't be read: "),
        ([1, 2], r" holds a list; expected named tensors"),
        ({"a": 1}, r": \"a\" is a int; expected named tensors"),
        (
            {"model.mm_projector.0.weight": torch.ones(64, 64, dtype=torch.int8)},
            r": model\.mm_projector\.0\.weight holds int8; expected floating-point numbers",
        ),
        ({"other.weight": torch.ones(2, 2)}, r": no projector weights \(mm_projector\.\*\) in it"),
        (
            {"model.mm_projector.0.weight": torch.ones(7, 2)},
            r": a projector into width 7, but lmsys/vicuna-tiny-v1\.5 has",
        ),
    ],
)
def test_a_file_that_is_no_projector_is_one_line(
    content: object, line: str, run_training: Callable, nothing_loads: None, tmp_path: Path
):
    path = tmp_path / "mm_projector.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=rf"--pretrain_mm_mlp_adapter .*mm_projector\.bin{line}"):
        run_training(pretrain_mm_mlp_adapter=path)


def test_a_projector_that_is_not_there_is_one_line(run_training: Callable, nothing_loads: None):
    with pytest.raises(InputError, match=r"--pretrain_mm_mlp_adapter nowhere\.bin: no such file; stage 1"):
        run_training(pretrain_mm_mlp_adapter="nowhere.bin")


# --------------------------------------------------------------------------------------------------- counted and named
def test_answers_beyond_the_length_are_counted_and_training_goes_on_with_the_rest(
    run_training: Callable, write_records: Callable, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    long = talk("word " * 300, "Lost.") | {"id": "long"}
    partly = talk("Count.", "one two three four " * 100) | {"id": "partly"}
    empty = talk("Say nothing.", "") | {"id": "empty"}
    data = write_records([long, talk("Hi", "Hello."), partly, empty])
    with caplog.at_level(logging.WARNING):
        trainer = run_training(
            vision_tower=None, image_folder=None, data_path=data, model_max_length=150, per_device_train_batch_size=1,
            max_steps=4, train_sampling_strategy="sequential",
        )  # fmt: skip
    text = capsys.readouterr().out
    assert "preflight: 4 records, 0 images; tokens counted in all" in text
    assert "no token to learn: 2 records: record 0 (id 'long'); record 3 (id 'empty')" in text
    assert "answers cut by --model_max_length: 1 records: record 2 (id 'partly')" in text
    assert "empty answers: 1 records: record 3 (id 'empty')" in text
    assert "learns: record 1 (id 'r'): 'Hello.</s>'" in text
    assert [loss > 0 for loss in losses(trainer)] == [False, True, True, False]
    assert "2 of 4 samples had no token to learn" in caplog.text


def test_images_take_positions_too(run_training: Callable, capsys: pytest.CaptureFixture):
    # 36 patches of each image, without a reduction.
    with pytest.raises(InputError, match=r"none of 6 records has a token to learn within --model_max_length 40"):
        run_training(model_max_length=40, mm_vision_token_reduce_func="none")


def test_preflight_only_prints_and_stops(
    run_training: Callable, nothing_loads: None, capsys: pytest.CaptureFixture, tmp_path: Path
):
    assert run_training(preflight_only=True, mm_vision_token_reduce_func="TRIM:-1") is None
    text = capsys.readouterr().out
    assert "preflight: 6 records, 5 images; tokens counted in all" in text
    assert "at least (the reduction decides by the image)" in text
    assert text.count("  learns: record") == 3
    assert text.endswith("checked, not trained: 6 records\n")
    assert not list((tmp_path / "run").iterdir())


def test_a_large_set_is_sampled_the_same_way_each_time(tokenizer: LlamaTokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "SAMPLED_RECORDS", 10)
    records = [parse_record(talk("Hi", f"Number {number}."), number) for number in range(200)]
    found = [inspect_records(records, tokenizer, V1, 2048, None, None) for _ in range(2)]
    assert found[0] == found[1] and found[0].num_sampled == 10
    assert "tokens counted in 10 of 200" in found[0].describe(2048, None)
    assert sample(range(5), 10) == [0, 1, 2, 3, 4]


def test_lengths_are_those_of_the_spliced_sequence(tokenizer: LlamaTokenizer, conversations: list[dict]):
    records = [parse_record(raw, number) for number, raw in enumerate(conversations)]
    one = inspect_records(records, tokenizer, V1, 2048, None, None)
    many = inspect_records(records, tokenizer, V1, 2048, ImageTokens(36, True), None)
    added = [after - before for before, after in zip(one.lengths, many.lengths, strict=True)]
    assert added == [35 * len(record.images) for record in records]


def test_crops_are_counted_by_the_size_of_the_image(tmp_path: Path, tokenizer: LlamaTokenizer):
    Image.new("RGB", (84, 168)).save(tmp_path / "tall.png")
    record = parse_record(talk("<image>\nWhat?", "Tall.", image="tall.png"), 0)
    tokens = ImageTokens(36, True, "[[84,168],[168,84]]", 84)
    one = inspect_records([record], tokenizer, V1, 2048, None, None)
    assert inspect_records([record], tokenizer, V1, 2048, tokens, tmp_path).lengths[0] == one.lengths[0] + 3 * 36 - 1


# ------------------------------------------------------------------------------------------------------ broken images
@pytest.fixture
def with_damage(conversations: list[dict], golden: Path, tmp_path: Path, write_records: Callable) -> dict[str, object]:
    """Flags for records of which one has no image file, one an empty, one a foreign, and two a cut image."""
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    images = [raw for raw in conversations if isinstance(raw.get("image"), str)]
    for number in range(12):
        raw = images[number % len(images)]
        content = (golden / "data/images" / raw["image"]).read_bytes()
        content = {3: b"", 5: b"no image at all", 7: content[:-40], 8: content[:-40]}.get(number, content)
        if number != 1:
            (folder / f"{number}.png").write_bytes(content)
        records.append(raw | {"id": f"r{number}", "image": f"{number}.png"})
    return {"data_path": write_records(records), "image_folder": folder, "per_device_train_batch_size": 2}


def test_images_that_are_none_are_named_before_training(with_damage: dict, run_training: Callable, nothing_loads: None):
    (with_damage["image_folder"] / "1.png").write_bytes((with_damage["image_folder"] / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"images: 2 broken records: record 3 \(id 'r3'\).*record 5 \(id 'r5'\)"):
        run_training(**with_damage)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_replaced_in_the_middle(
    workers: int, with_damage: dict, run_training: Callable, caplog: pytest.LogCaptureFixture
):
    flags = with_damage | {"skip_broken_records": True, "max_steps": 8, "dataloader_num_workers": workers}
    with caplog.at_level(logging.WARNING):
        trainer = run_training(**flags)
    assert trainer.state.global_step == 8 and len(losses(trainer)) == 8
    assert "left out 1 broken records: record 1 (id 'r1')" in caplog.text
    assert "left out 2 broken records: record 3 (id 'r3')" in caplog.text
    assert "2 broken records were replaced by the next good ones: record" in caplog.text
    assert "record 7 (id 'r7'): image" in caplog.text and "record 8 (id 'r8'): image" in caplog.text


def test_a_damaged_image_is_replaced_by_the_next_good_one_of_its_modality(
    with_damage: dict, run_training: Callable, tmp_path: Path
):
    trainer = run_training(**with_damage, skip_broken_records=True, max_steps=1)
    names = [record.name for record in trainer.train_dataset.records]
    first, good = names.index("record 7 (id 'r7')"), names.index("record 9 (id 'r9')")
    replaced, expected = trainer.train_dataset[first], trainer.train_dataset[good]
    assert torch.equal(replaced.input_ids, expected.input_ids)
    assert torch.equal(replaced.images[0], expected.images[0])
    assert len(replaced.replaced) == 2 and not expected.replaced


def test_a_run_with_replaced_records_resumes_identically(with_damage: dict, run_training: Callable, tmp_path: Path):
    flags = with_damage | {"skip_broken_records": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    run_training(**flags, output_dir=tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole/checkpoint-3").rename(tmp_path / "resumed/checkpoint-3")
    run_training(**flags, output_dir=tmp_path / "resumed")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_without_skipping_a_cut_image_still_stops_with_its_name(with_damage: dict, run_training: Callable):
    data = json.loads(with_damage["data_path"].read_text(encoding="utf-8"))
    with_damage["data_path"].write_text(json.dumps([data[7]] * 4))
    with pytest.raises(InputError, match=r"record \d \(id 'r7'\): image .*7\.png: damaged or truncated"):
        run_training(**with_damage)


def test_records_that_are_all_broken_end_in_one_line(with_damage: dict, run_training: Callable):
    data = json.loads(with_damage["data_path"].read_text(encoding="utf-8"))
    with_damage["data_path"].write_text(json.dumps([data[7], data[8]]))
    with pytest.raises(InputError, match=r"2 records in a row are broken, the first: record \d"):
        run_training(**with_damage, skip_broken_records=True)


def test_large_sets_of_images_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "SAMPLED_IMAGES", 5)
    looked_at = []
    monkeypatch.setattr(preflight, "find_header_fault", looked_at.append)
    records = [Record(f"record {number}", (f"{number}.png",), ("<image>", "x")) for number in range(50)]
    assert find_broken_images(records, tmp_path) == {}
    assert len(looked_at) == 5


# --------------------------------------------------------------------------------------------------------- nan is said
def test_a_loss_that_is_nan_ends_the_run_in_one_line_and_is_never_logged(
    run_training: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    logged, num_calls = [], itertools.count(1)
    plain_log, plain_step = LLaVATrainer.log, LLaVATrainer.training_step

    def log(self: LLaVATrainer, logs: dict, *rest: object) -> None:
        logged.append(logs)
        plain_log(self, logs, *rest)

    def poisoned_step(self: LLaVATrainer, model: torch.nn.Module, *rest: object) -> torch.Tensor:
        if next(num_calls) == 3:
            next(model.parameters()).data.fill_(torch.nan)
        return plain_step(self, model, *rest)

    monkeypatch.setattr(LLaVATrainer, "log", log)
    monkeypatch.setattr(LLaVATrainer, "training_step", poisoned_step)
    with pytest.raises(InputError, match=r"the loss or its gradient is nan at step 3: nothing of this step was saved"):
        run_training(max_steps=6, save_strategy="steps", save_steps=1)
    assert [entry["loss"] > 0 for entry in logged if "loss" in entry] == [True, True]
    assert not (tmp_path / "run/model.safetensors").exists()
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_an_infinite_gradient_of_fp16_is_left_to_the_loss_scaler(run_training: Callable):
    trainer = run_training(max_steps=1)
    trainer.args.fp16 = True
    trainer._agree_to_go_on(torch.tensor(1.0), torch.tensor(float("inf")))
    trainer.args.fp16 = False
    with pytest.raises(InputError, match="is nan"):
        trainer._agree_to_go_on(torch.tensor(1.0), torch.tensor(float("inf")))


def test_a_sample_without_labels_beside_others_changes_nothing(run_training: Callable):
    trainer = run_training(max_steps=1)
    model, before = trainer.model, trainer.tally.num_samples
    ids = torch.randint(3, 900, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4], [-100] * 4])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def loss(rows: slice) -> torch.Tensor:
        batch = {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": mask[rows], "images": None}
        return trainer.compute_loss(model, trainer._prepare_inputs(batch | {"texts": [""] * len(ids[rows])}))

    both, alone, none = loss(slice(2)), loss(slice(1)), loss(slice(1, 2))
    assert both.item() == pytest.approx(alone.item(), rel=1e-6) and none == 0
    gradient = torch.autograd.grad(none, model.lm_head.weight)[0]
    assert gradient.count_nonzero() == 0
    assert (trainer.tally.num_samples - before, trainer.tally.num_unlearnable) == (4, 2)
