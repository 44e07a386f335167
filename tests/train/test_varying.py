"""Budgets that vary in training: what is drawn, when, and what the saved checkpoint says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.token_reduction import REDUCERS, parse_reduction, read_training_reduction
from llava.train.llava_trainer import LLaVATrainer

LLAVA = "llava-v1.5-tiny84-TRIM"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs with which batches were trained, from now on, in order."""
    specs: list[str] = []
    step = LLaVATrainer.training_step

    def record(self: LLaVATrainer, model: torch.nn.Module, *arguments: object) -> torch.Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        specs.append(inner.token_reducer.spec())
        return step(self, model, *arguments)

    monkeypatch.setattr(LLaVATrainer, "training_step", record)
    return specs


# ------------------------------------------------------------------------------------------------------- the spelling
@pytest.mark.parametrize(
    ("spec", "lowest", "middle", "highest"),
    [
        ("TRIM:0.1-0.4", "TRIM:0.1", "TRIM:0.25", "TRIM:0.4"),
        ("TRIM:0.5-1", "TRIM:0.5", "TRIM:0.75", "TRIM:1.0"),
        ("TRIM:6-26", "TRIM:6", "TRIM:16", "TRIM:26"),
        ("TRIM: 6 - 26 ", "TRIM:6", "TRIM:16", "TRIM:26"),
        ("TRIM:-1,fence=1.0-2.0", "TRIM:-1,fence=1.0", "TRIM:-1", "TRIM:-1,fence=2.0"),
        ("FasterVLM:avg=6-26.5", "FasterVLM:avg=6", "FasterVLM:avg=16.25", "FasterVLM:avg=26.5"),
        ("TRIM:1e-3-0.5", "TRIM:0.001", "TRIM:0.2505", "TRIM:0.5"),
        ("TRIM:6-26|FastV:0.5,layer=2", "TRIM:6|FastV:0.5", "TRIM:16|FastV:0.5", "TRIM:26|FastV:0.5"),
    ],
)
def test_a_range_has_two_ends_and_a_middle(spec: str, lowest: str, middle: str, highest: str):
    read = read_training_reduction(spec)
    assert [each.spec() for each in (read.lowest, read.middle, read.highest)] == [lowest, middle, highest]
    assert read.varies and read_training_reduction(read.spec()) == read


@pytest.mark.parametrize("spec", ["TRIM:-1", "TRIM:1e-1", "FasterVLM:64,layer=-4", "none", None])
def test_a_spec_without_a_range_is_the_one_reduction(spec: str | None):
    read = read_training_reduction(spec)
    assert not read.varies
    assert read.draw(0, 0) == read.middle == parse_reduction(spec) and read.spec() == parse_reduction(spec).spec()


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("TRIM:0.4-0.1", "use two fractions"),
        ("TRIM:26-6", "the first number must be below the second"),
        ("TRIM:1-26", "use two fractions in (0, 1], as in 0.1-0.4, or two counts above 1"),
        ("TRIM:0.5-6", "use two fractions"),
        ("TRIM:0-0.4", "use two fractions"),
        ("TRIM:-1,fence=2-1", "the first number must be below the second"),
        ("TRIM:6-26,min_keep=2-4", "min_keep is a whole number and takes no range; the budget does"),
        ("FastV:0.3-0.6", "FastV works inside the language model, where training reads all tokens: give it one number"),
        ("TRIM:6|FastV:0.3-0.6", "FastV works inside the language model"),
        ("HiPrune:6-26,alpha=0.5-7", "alpha"),
        ("TRIMM:6-26", 'did you mean "TRIM"'),
    ],
)
def test_a_range_that_nothing_can_be_drawn_from_is_one_line(spec: str, line: str):
    with pytest.raises(InputError) as caught:
        read_training_reduction(spec)
    assert line in str(caught.value) and str(caught.value).startswith("mm_vision_token_reduce_func: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_every_method_takes_a_range_of_shares_and_of_counts(name: str):
    for budgets in ("0.1-0.4", "6-26"):
        read = read_training_reduction(f"{name}:{budgets}")
        values = [read.draw(0, step).before.budget.value for step in range(50)]
        low, high = map(float, budgets.split("-"))
        assert low <= min(values) < max(values) <= high and len(set(values)) > 10


def test_counts_are_drawn_evenly_with_both_ends():
    read = read_training_reduction("TRIM:6-8")
    counts = [read.draw(1, step).before.budget.value for step in range(3000)]
    assert {count: round(counts.count(count) / 1000, 1) for count in (6, 7, 8)} == {6: 1.0, 7: 1.0, 8: 1.0}


def test_a_draw_follows_from_seed_and_step_alone():
    read = read_training_reduction("TRIM:6-26")
    draws = [read.draw(42, step).spec() for step in range(20)]
    assert draws[:4] == ["TRIM:12", "TRIM:12", "TRIM:8", "TRIM:13"]  # on every machine, in every version
    assert [read.draw(42, step).spec() for step in reversed(range(20))] == draws[::-1]
    assert [read.draw(43, step).spec() for step in range(20)] != draws


# ------------------------------------------------------------------------------------------------------------- training
def test_each_step_draws_and_the_checkpoint_answers_at_the_middle(
    run_training: Callable, drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    trainer = run_training(
        model_name_or_path=LLAVA, mm_vision_token_reduce_func="TRIM:6-26", max_steps=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "each step draws from TRIM:6-26; the result is saved at TRIM:16" in text
    assert "positions of --model_max_length" in text and "at the largest budget that is drawn" in text
    # One draw for all of a step.
    read = read_training_reduction("TRIM:6-26")
    steps = [read.draw(trainer.args.seed, step).spec() for step in range(3)]
    assert drawn == [spec for spec in steps for _ in range(2)] and len(set(steps)) > 1
    assert trainer.model.token_reducer.spec() == "TRIM:16"
    # What is saved loads, at the middle or as it is told.
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert config["mm_vision_token_reduce_func"] == "TRIM:16" and config["token_reduction_range"] == "TRIM:6-26"
    assert load_pretrained_model(str(tmp_path / "run"), device="cpu")[1].token_reducer.spec() == "TRIM:16"
    other = load_pretrained_model(str(tmp_path / "run"), device="cpu", reduce="TRIM:6")[1]
    assert other.token_reducer.spec() == "TRIM:6"


@pytest.mark.parametrize(
    ("spec", "starts"),
    [("FasterVLM:0.1-0.4", "FasterVLM:0."), ("Pool:4-20", "Pool:"), ("TRIM:-1,fence=1.0-2.0", "TRIM:-1,fence=1.")],
)
def test_every_kind_of_range_is_trained_with(spec: str, starts: str, run_training: Callable, drawn: list[str]):
    run_training(mm_vision_token_reduce_func=spec, max_steps=3)
    assert len(set(drawn)) > 1 and all(each.startswith(starts) for each in drawn)


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(run_training: Callable, drawn: list[str], tmp_path: Path):
    flags = {"mm_vision_token_reduce_func": "TRIM:6-26", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run_training(output_dir=tmp_path / "whole", **flags)
    uninterrupted = drawn.copy()
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    drawn.clear()
    resumed = run_training(output_dir=tmp_path / "resumed", dataloader_num_workers=2, **flags)
    assert drawn == uninterrupted[3:]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_checkpoint_goes_on_with_its_range_unless_told_otherwise(
    run_training: Callable, drawn: list[str], tmp_path: Path
):
    run_training(mm_vision_token_reduce_func="TRIM:6-26", max_steps=1)
    run_training(model_name_or_path=tmp_path / "run", output_dir=tmp_path / "second", max_steps=3)
    assert len(set(drawn[1:])) > 1
    run_training(
        model_name_or_path=tmp_path / "second", output_dir=tmp_path / "third", mm_vision_token_reduce_func="TRIM:6",
        max_steps=1,
    )  # fmt: skip
    assert drawn[-1] == "TRIM:6"
    config = json.loads((tmp_path / "third/config.json").read_text(encoding="utf-8"))
    assert config["mm_vision_token_reduce_func"] == "TRIM:6" and "token_reduction_range" not in config


def test_another_range_is_another_run(run_training: Callable, tmp_path: Path):
    run_training(mm_vision_token_reduce_func="TRIM:6-26", max_steps=1)
    with pytest.raises(InputError, match=r"mm_vision_token_reduce_func TRIM:6-26 -> TRIM:6-20"):
        run_training(mm_vision_token_reduce_func="TRIM:6-20", max_steps=1)


# --------------------------------------------------------------------------------------------------------- answering
def test_a_range_answers_nothing_and_the_line_says_what_would(checkpoints: Path, golden: Path, tmp_path: Path):
    line = r'"TRIM:0.1-0.4": only training draws from a range; give one number, as in "TRIM:0.25"'
    with pytest.raises(InputError, match=line):
        load_pretrained_model(LLAVA, device="cpu", reduce="TRIM:0.1-0.4")
    folder = tmp_path / LLAVA
    shutil.copytree(golden / "checkpoints" / LLAVA, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "mm_vision_token_reduce_func": "TRIM:0.1-0.4",
        "mm_vision_tower": str((golden / "checkpoints" / config["mm_vision_tower"]).resolve()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=line):
        load_pretrained_model(str(folder), device="cpu")
    assert load_pretrained_model(str(folder), device="cpu", reduce="TRIM:0.3")[1].token_reducer.spec() == "TRIM:0.3"
