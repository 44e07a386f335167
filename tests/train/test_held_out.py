"""Held-out loss and scores: the right number, at the right steps, and the training as it would be without them."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from llava.errors import InputError
from llava.train.flags import check_flags
from llava.train.held_out import check_held_out, deal_batches, undisturbed
from llava.train.llava_trainer import LLaVATrainer
from llava.train.score_command import ScoreCommand, check_command, read_scores
from llava.train.store import Record, Records

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
# What a training draws shows in its losses: dropout from the global state, and the order of records.
DROPOUT = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.5, "max_steps": 3, **TRIM}


def list_losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def list_looks(trainer: LLaVATrainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.fixture
def held_out(conversations: list[dict], write_records: Callable) -> Path:
    """The six records with other answers."""
    changed = json.loads(json.dumps(conversations))
    for raw in changed:
        raw["conversations"][-1]["value"] += " That is all."
    return write_records(changed, "held_out.json")


@pytest.fixture
def counting(tmp_path: Path) -> str:
    """A command that scores a checkpoint by the number of its files, and draws as many random numbers as it likes."""
    script = tmp_path / "count.py"
    script.write_text(
        "import pathlib, random, sys\nfolder, results, step = sys.argv[1:]\nrandom.random()\n"
        "files = sorted(path.name for path in pathlib.Path(folder).iterdir())\nprint(*files)\n"
        "assert 'config.json' in files\n"
        "pathlib.Path(results).write_text(f'Some bench [9 answers missing]\\t{len(files)}\\nstep\\t{step}\\n')\n"
    )
    return f"{sys.executable} {script} {{checkpoint}} {{results}} {{step}}"


# ------------------------------------------------------------------------------------------------------ the training
def test_neither_held_out_loss_nor_scores_change_a_bit_of_the_training(
    run_training: Callable, held_out: Path, counting: str, tmp_path: Path
):
    alone = run_training(**DROPOUT, output_dir=tmp_path / "alone")
    looks = {"eval_data_path": held_out, "eval_steps": 1, "eval_command": counting, "eval_command_steps": 1}
    watched = run_training(**DROPOUT, **looks, output_dir=tmp_path / "watched")
    assert list_losses(watched) == list_losses(alone)
    names = ("adapter_model.safetensors", "non_lora_trainables.bin")
    weights = [[(tmp_path / run / name).read_bytes() for name in names] for run in ("alone", "watched")]
    assert weights[0][0] == weights[1][0]
    assert len(list_looks(watched)) == 4 and not list_looks(alone)


def test_random_states_and_mode_are_put_back():
    model = nn.Linear(1, 1).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with undisturbed(model):
        model.eval()
        torch.rand(5)
    assert torch.rand(1) == expected and model.training


# ------------------------------------------------------------------------------------------------------- the numbers
def test_the_held_out_loss_is_that_of_training_on_the_same_records(
    run_training: Callable, held_out: Path, tmp_path: Path
):
    whole = {"per_device_train_batch_size": 6, "learning_rate": 0.0, "max_steps": 1, **TRIM}
    trained = run_training(data_path=held_out, **whole, output_dir=tmp_path / "trained")
    (record,) = [entry for entry in trained.state.log_history if "loss" in entry]
    for size in (1, 4):
        looked = run_training(
            eval_data_path=held_out, per_device_eval_batch_size=size, **whole, output_dir=tmp_path / f"looked{size}"
        )
        before, after = [entry for entry in looked.state.log_history if "eval_loss" in entry]
        assert before["eval_loss"] == pytest.approx(record["loss"], abs=1e-5)
        assert before["eval_loss_image"] == pytest.approx(record["loss_image"], abs=1e-5)
        assert before["eval_loss_text"] == pytest.approx(record["loss_text"], abs=1e-5)
        assert before["eval_samples"] == 6 and after["eval_loss"] == before["eval_loss"]


def test_no_dropout_touches_the_held_out_loss(run_training: Callable, held_out: Path):
    trainer = run_training(**DROPOUT | {"learning_rate": 0.0}, eval_data_path=held_out, eval_steps=2)
    assert len({loss for _, loss in list_looks(trainer)}) == 1
    assert len(set(list_losses(trainer))) > 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_record_counts_once_and_ranks_meet_in_the_same_modality(num_ranks: int):
    records = [Record(f"record {n}", ("a.png",) if n % 3 else (), ("word " * (n % 7), "yes")) for n in range(23)]
    records = Records.of(records)
    ranks = [deal_batches(records, 2, rank, num_ranks) for rank in range(num_ranks)]
    counted = [place.index for batches in ranks for batch in batches for place in batch if place.counts]
    assert sorted(counted) == list(range(23))
    assert len({len(batches) for batches in ranks}) == 1
    for together in zip(*ranks, strict=True):
        assert len({bool(records[place.index].images) for batch in together for place in batch}) == 1
    whole = {tuple(batch) for batch in deal_batches(records, 2, 0, 1)}
    assert {tuple(batch) for batches in ranks for batch in batches if batch[0].counts} == whole


# --------------------------------------------------------------------------------------------------------- the steps
@pytest.mark.parametrize(("steps", "expected"), [(None, [0, 5]), (2, [0, 2, 4, 5]), (0.4, [0, 2, 4, 5])])
def test_looks_come_before_the_first_step_every_n_and_at_the_end(
    steps: float | None, expected: list[int], run_training: Callable, held_out: Path
):
    trainer = run_training(eval_data_path=held_out, eval_steps=steps, max_steps=5)
    assert [step for step, _ in list_looks(trainer)] == expected


def test_a_run_that_goes_on_has_the_looks_and_scores_of_one_that_was_not_interrupted(
    run_training: Callable, held_out: Path, counting: str, tmp_path: Path
):
    flags = {
        "eval_data_path": held_out, "eval_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "eval_command": counting, "eval_command_steps": 2, **TRIM,
    }  # fmt: skip
    whole = run_training(**flags)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    state_file = tmp_path / "run/checkpoint-2/trainer_state.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    # As a signal leaves it: the checkpoint comes first, the looks of its step have to wait.
    kept = [entry for entry in state["log_history"] if "loss" in entry or entry["step"] == 0]
    state_file.write_text(json.dumps(state | {"log_history": kept}), encoding="utf-8")
    run_file = tmp_path / "run/run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"finished": False}), encoding="utf-8")
    resumed = run_training(**flags)
    assert list_looks(resumed) == list_looks(whole)
    scores = [[entry for entry in run.state.log_history if "score_step" in entry] for run in (whole, resumed)]
    assert [entry["score_step"] for entry in scores[1]] == [entry["score_step"] for entry in scores[0]] == [2, 4]


# ------------------------------------------------------------------------------------------------------ the mistakes
def test_the_training_file_and_a_copy_of_it_are_refused(
    run_training: Callable, golden: Path, conversations: list[dict], write_records: Callable
):
    file = golden / "data/questions/train6.json"
    for path in (file, write_records(conversations, "copy.json")):
        with pytest.raises(InputError, match=r"--eval_data_path .*: these are the training records"):
            run_training(eval_data_path=path)


def test_records_that_are_in_both_sets_are_named(caplog: pytest.LogCaptureFixture):
    trained = [Record(f"record {n}", (), (f"{n}?", "yes")) for n in range(4)]
    held_out = [Record("record 0 (id 'x')", (), ("2?", "yes")), Record("record 1", (), ("9?", "yes"))]
    with caplog.at_level(logging.WARNING):
        check_held_out(Records.of(held_out), Records.of(trained), ("a.json", "b.json"))
    assert "a.json: 1 of 2 held-out records are trained on too: record 0 (id 'x')" in caplog.text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--eval_steps 5", "--eval_steps: needs --eval_data_path"),
        ("--eval_data_path x --eval_steps 0", "--eval_steps 0: expected a number above 0"),
        ("--eval_command_steps 5", "--eval_command and --eval_command_steps go together"),
        ("--eval_command true", "--eval_command and --eval_command_steps go together"),
        (
            "--eval_command true --eval_command_steps 5",
            "--eval_command 'true': expected {checkpoint} and {results} in it",
        ),
        ("--eval_command nowhere{checkpoint}{results} --eval_command_steps 5", "--eval_command: no program nowhere"),
    ],
)
def test_a_mistake_is_refused_before_anything_loads(flags: str, line: str):
    required = "--model_name_or_path m --data_path d --output_dir o"
    with pytest.raises(InputError) as caught:
        check_flags([*required.split(), *flags.split()])
    assert str(caught.value).startswith(line)


def test_a_quote_that_is_open_is_refused():
    with pytest.raises(InputError, match="No closing quotation"):
        check_command("python 'x {checkpoint} {results}")


# -------------------------------------------------------------------------------------------------------- the scores
def test_scores_are_in_the_log_of_their_step_and_the_checkpoint_is_gone(
    run_training: Callable, counting: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    trainer = run_training(max_steps=3, eval_command=counting, eval_command_steps=2, **TRIM)
    (entry,) = [entry for entry in trainer.state.log_history if "score_step" in entry]
    assert entry["step"] == entry["score_step"] == 2 and entry["score_Some_bench"] > 3
    assert "scored at step 2: Some_bench" in capsys.readouterr().out
    assert not (tmp_path / "run/scored").exists()
    assert "model.safetensors" in (tmp_path / "run/scored.log").read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert stored["figures"]["scores"] == [entry]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; print('oh no'); sys.exit(3)", "--eval_command ended with code 3 at step 7: see "),
        ("pass", "--eval_command at step 7: no such file: "),
    ],
)
def test_a_command_that_fails_is_a_warning(code: str, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    score = ScoreCommand((sys.executable, "-c", code, "{checkpoint}{results}"), tmp_path, only_projector=False)
    with score.room():
        assert score.run(7) == {}
    assert says in caplog.text and str(tmp_path / "scored.log") in caplog.text


def test_the_command_is_no_rank_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    code = "import os, sys; open(sys.argv[1], 'w').write('n\\t' + str(len(os.environ.keys() & set(sys.argv[2:]))))"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    score = ScoreCommand((sys.executable, "-c", code, "{results}", *names), tmp_path, only_projector=False)
    with score.room():
        assert score.run(1) == {"score_n": 0}


@pytest.mark.parametrize("text", ["", "POPE 85\n", "POPE\tmany\n", "POPE\tnan\n", "\t3\n"])
def test_a_results_file_that_is_none_is_explained(text: str, tmp_path: Path):
    (tmp_path / "results.txt").write_text(text)
    with pytest.raises(InputError, match="name<TAB>value"):
        read_scores(tmp_path / "results.txt")
