"""Packed rows train as a row for each sample does; records are counted as the language model reads them."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.errors import InputError
from llava.model import llava_arch
from llava.model.packing import pack_batch
from llava.model.splice import PromptEmbeds
from llava.train.dataset import TextFormat
from llava.train.lengths import count_lengths, expect_image_tokens
from llava.train.llava_trainer import LLaVATrainer
from llava.train.preflight import ImageTokens
from llava.train.records import parse_record
from llava.train.targets import choose_template

STEADY = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "cosine", "max_steps": 3, "model_max_length": 200,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "mm_vision_token_reduce_func": "TRIM:-1",
}  # fmt: skip
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0}


def talk(question: str, answer: str, **fields: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **fields}


# ---------------------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True, **LORA}], ids=["full", "lora"])
def test_a_packed_run_takes_the_steps_of_a_plain_one(
    run_training: Callable, tmp_path: Path, flags: dict, monkeypatch: pytest.MonkeyPatch
):
    num_rows = []

    def note(*arguments: object) -> PromptEmbeds:
        batch = pack_batch(*arguments)
        num_rows.append(len(batch.embeds))
        return batch

    monkeypatch.setattr(llava_arch, "pack_batch", note)
    packed, plain = (
        run_training(output_dir=tmp_path / f"packing-{packing}", packing=packing, **STEADY, **flags)
        for packing in (True, False)
    )
    # A step is an epoch of 6 records, in a batch of 4 and one of 2.
    assert num_rows and max(num_rows) < STEADY["per_device_train_batch_size"]
    *steps, _ = zip(packed.state.log_history, plain.state.log_history, strict=True)
    assert len(steps) == STEADY["max_steps"]
    for one, other in steps:
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert (one["learning_rate"], one["epoch"]) == (other["learning_rate"], other["epoch"])
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(packed.model.state_dict()[name], value, atol=1e-5), name


def test_samples_without_a_token_to_learn_are_counted_in_packed_rows(
    run_training: Callable, write_records: Callable, caplog: pytest.LogCaptureFixture
):
    data = write_records([talk("word " * 300, "Lost."), talk("Hi", "Hello."), talk("Who?", "I."), talk("Empty", "")])
    flags = {"max_steps": 1, "model_max_length": 150, "train_sampling_strategy": "sequential"}
    with caplog.at_level(logging.WARNING):
        run_training(data_path=data, packing=True, per_device_train_batch_size=4, **flags)
    assert "2 of 4 samples had no token to learn" in caplog.text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"attn_implementation": "flex_attention"},
            "packing keeps attention within a sample with .*, not with flex_at",
        ),
        (
            {"mm_vision_token_reduce_func": "TRIM:-1,position_ids=original"},
            "packing takes the gaps that TRIM:-1,position_ids=original leaves",
        ),
        ({"vision_tower": None}, r"--packing: lmsys/vicuna-tiny-v1\.5 has no vision tower; leave it out"),
    ],
)
def test_what_cannot_be_packed_is_one_line_before_anything_loads(run_training: Callable, flags: dict, line: str):
    with pytest.raises(InputError, match=line):
        run_training(packing=True, **flags)


# ---------------------------------------------------------------------------------------------------------- lengths
def test_records_are_counted_as_the_language_model_reads_them(run_training: Callable):
    trainer = run_training(max_steps=1, model_max_length=90)
    dataset, model = trainer.train_dataset, trainer.model
    batch = trainer.data_collator([dataset[index] for index in range(len(dataset))])
    # The last one decides by the image: the published share of its 36 patches, and the mean token.
    for reduce, num_left in {"none": 36, "TRIM:9": 10, "Pool:4": 4, "TRIM:-1": 9}.items():
        model.set_token_reduction(reduce)
        tokens = expect_image_tokens(model, dataset.image_format)
        assert tokens == ImageTokens(num_left, reduce != "TRIM:-1", None, 84)
        counted = count_lengths(dataset.records, trainer.processing_class, dataset.text_format, 90, tokens, None)
        if tokens.is_exact:
            assert counted.tolist() == model.embed_prompts(**batch).attention_mask.sum(dim=1).tolist()
        assert counted[0] == min(90, len(dataset[0].input_ids) - 1 + num_left)


def test_an_image_of_several_crops_counts_each(tokenizer: object, tmp_path: Path):
    Image.new("RGB", (336, 168)).save(tmp_path / "wide.png")
    records = [parse_record(talk("<image>\nWhat?", "This.", image=name), 0) for name in ("wide.png", "wide.png")]
    text_format = TextFormat(choose_template("v1"))
    one = count_lengths(records[:1], tokenizer, text_format, 999, ImageTokens(5, True), tmp_path)
    canvases = [[168, 168], [336, 168]]
    several = count_lengths(records[:1], tokenizer, text_format, 999, ImageTokens(5, True, canvases, 168), tmp_path)
    assert several[0] - one[0] == 2 * 5


def test_steps_hold_samples_of_similar_reduced_lengths(run_training: Callable, write_records: Callable):
    data = write_records([talk("Say it.", "word " * (7 * number % 32)) for number in range(32)])
    seen = []

    def note(trainer: LLaVATrainer, model: object, inputs: dict, *rest: object) -> torch.Tensor:
        seen.append(inputs["attention_mask"].sum(dim=1))
        return torch.tensor(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLaVATrainer, "training_step", note)
        run_training(data_path=data, group_by_reduced_length=True, max_steps=8, per_device_train_batch_size=4)
    whole = torch.cat(seen).sort(descending=True).values.split(4)
    assert {tuple(own.tolist()) for own in whole} == {tuple(own.tolist()) for own in seen}
    assert [own.tolist() for own in whole] != [own.tolist() for own in seen]  # not the longest first


def test_two_orders_of_the_data_at_once_are_one_line(run_training: Callable):
    with pytest.raises(InputError, match="--group_by_modality_length and --group_by_reduced_length: choose one order"):
        run_training(group_by_modality_length=True, group_by_reduced_length=True)
