"""Two CPU ranks under the shipped DeepSpeed files equal one process: losses, weights, resuming, uneven work."""

import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.train.checkpoint import data_only
from tests.train.scenarios import LIMIT_SECONDS, LLM, LORA, ROOT, furthest, losses, read_result, stage_1, weights

pytest.importorskip("deepspeed")

SCRIPTS = ROOT / "scripts"
NUM_STEPS = 20
# A fixed draw, so that a failure can be repeated.
INTERRUPTED_AT = random.Random(20240916).randrange(3, NUM_STEPS - 2)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_SECONDS)]


@pytest.fixture(scope="module")
def runs(run_ranks: Callable, data: dict[str, Path]) -> Path:
    """All scenarios that need nothing of each other's results."""
    whole = {
        "data_path": data["mixed"], "max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": INTERRUPTED_AT,
        "group_by_modality_length": True,
    }  # fmt: skip
    uneven = {
        "data_path": data["in_turn"], "train_sampling_strategy": "sequential", "max_steps": 3,
        "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "eval_data_path": data["held_out"], "per_device_eval_batch_size": 2,
    }  # fmt: skip
    code = "import os, sys; open(sys.argv[1], 'w').write('files' + chr(9) + str(len(os.listdir(sys.argv[2]))))"
    command = f"{sys.executable} -c {shlex.quote(code)} {{results}} {{checkpoint}}"
    scored = {"eval_command": command, "eval_command_steps": 3}
    few = {"data_path": data["mixed"], "max_steps": 3}
    engines = {"zero2": {"deepspeed": SCRIPTS / "zero2.json"}, "zero3": {"deepspeed": SCRIPTS / "zero3.json"}}
    # The loss is a mean over micro-batches, so two ranks with a sample each are one process that accumulates two.
    one = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    scenarios = [
        {"name": "one", "ranks": 1, "flags": whole | one},
        {"name": "uneven-one", "ranks": 1, "flags": uneven | one},
        {"name": "stage1-one", "ranks": 1, "flags": stage_1(data) | one},
    ]
    for name, engine in engines.items():
        scenarios += [
            {"name": name, "flags": whole | engine},
            {"name": f"uneven-{name}", "flags": uneven | engine | scored},
            {"name": f"stage1-{name}", "flags": stage_1(data) | engine | {"gradient_checkpointing": True}},
            {"name": f"lora-{name}", "flags": few | LORA | engine | {"gradient_checkpointing": True}},
            {"name": f"qlora-{name}", "flags": few | LORA | engine | {"bits": 4, "bf16": True}},
        ]
    packed = uneven | {"data_path": data["mixed"], "per_device_train_batch_size": 4, "max_steps": 2} | engines["zero2"]
    scenarios += [{"name": f"packing-{packing}", "flags": packed | {"packing": packing}} for packing in (True, False)]
    llava = {"model_name_or_path": "llava-v1.5-tiny84", "learning_rate": 0.0}
    scenarios += [
        {"name": "bf16", "flags": few | engines["zero3"] | {"bf16": True}},
        {"name": "fp16", "flags": few | engines["zero2"] | {"fp16": True}},
        {"name": "from-llava", "flags": few | engines["zero3"] | llava},
    ]
    return run_ranks(scenarios)


class Payload:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def load_states(path: Path) -> dict:
    with data_only():
        return torch.load(path)


@pytest.fixture(scope="module")
def resumed(runs: Path, run_ranks: Callable, data: dict[str, Path]) -> Path:
    """Both runs once more, from the checkpoint at which they are taken to have been interrupted."""
    scenarios = []
    for name in ("zero2", "zero3"):
        folder = runs / f"{name}-resumed"
        shutil.copytree(runs / name / f"checkpoint-{INTERRUPTED_AT}", folder / f"checkpoint-{INTERRUPTED_AT}")
        flags = {
            "data_path": data["mixed"], "max_steps": NUM_STEPS, "group_by_modality_length": True,
            "deepspeed": SCRIPTS / f"{name}.json",
        }  # fmt: skip
        scenarios.append({"name": folder.name, "flags": flags})
    planted = runs / "planted"
    shutil.copytree(runs / "zero2" / f"checkpoint-{INTERRUPTED_AT}", planted / f"checkpoint-{INTERRUPTED_AT}")
    (states,) = planted.glob("*/*/mp_rank_00_model_states.pt")
    torch.save(load_states(states) | {"more": Payload(planted / "ran")}, states)
    scenarios.append({"name": "planted", "flags": scenarios[0]["flags"] | {"output_dir": planted}})
    scenarios.append({"name": "alone", "ranks": 1, "flags": scenarios[0]["flags"] | {"output_dir": runs / "zero2"}})
    shutil.copytree(runs / "zero2" / f"checkpoint-{INTERRUPTED_AT}", runs / f"unknown/checkpoint-{INTERRUPTED_AT}")
    flags = scenarios[0]["flags"] | {"output_dir": runs / "unknown"}  # without run.json
    scenarios.append({"name": "alone-unknown", "ranks": 1, "flags": flags})
    return run_ranks(scenarios)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_ranks_train_as_one_process(name: str, runs: Path):
    assert losses(runs, name) == pytest.approx(losses(runs, "one"), abs=1e-4)
    assert len(losses(runs, name)) == NUM_STEPS
    assert furthest(weights(runs, name), weights(runs, "one")) < 1e-4


def test_zero2_and_zero3_leave_the_same_weights(runs: Path):
    # They add up in another order; losses near 10 have float32 steps of 1e-6.
    assert losses(runs, "zero2") == pytest.approx(losses(runs, "zero3"), abs=1e-5)
    assert furthest(weights(runs, "zero2"), weights(runs, "zero3")) < 1e-5


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(name: str, resumed: Path):
    assert losses(resumed, f"{name}-resumed") == pytest.approx(losses(resumed, name), abs=1e-6)
    assert furthest(weights(resumed, f"{name}-resumed"), weights(resumed, name)) < 1e-6


@pytest.mark.parametrize("name", ["alone", "alone-unknown"])
def test_another_number_of_ranks_is_refused_before_training(name: str, resumed: Path):
    error = json.loads((resumed / f"{name}.json").read_text(encoding="utf-8"))["error"]
    assert "was written by 2 ranks, this run has 1" in error


def test_a_payload_in_a_deepspeed_checkpoint_does_not_run(resumed: Path):
    error = json.loads((resumed / "planted.json").read_text(encoding="utf-8"))["error"]
    assert "mp_rank_00_model_states.pt holds code (posix.mkdir) and is not loaded" in error
    assert not (resumed / "planted/ran").exists()


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_rank_of_texts_beside_a_rank_of_images_gives_the_right_gradients(name: str, runs: Path):
    # Plain gradient descent: the weights' way is the sum of the gradients.
    assert losses(runs, f"uneven-{name}") == pytest.approx(losses(runs, "uneven-one"), abs=1e-4)
    alone, together = weights(runs, "uneven-one"), weights(runs, f"uneven-{name}")
    assert furthest(together, alone) < 1e-5
    start = torch.load(
        ROOT / "tests/golden/checkpoints/liuhaotian/llava-v1.5-mlp2x-tiny-pretrain/mm_projector.bin", weights_only=True
    )
    moved = max((together[key] - value).abs().max().item() for key, value in start.items())
    assert moved > 1e-4


def test_two_ranks_train_the_same_on_packed_rows(runs: Path):
    assert losses(runs, "packing-True") == pytest.approx(losses(runs, "packing-False"), abs=1e-5)
    assert furthest(weights(runs, "packing-True"), weights(runs, "packing-False")) < 1e-5


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_held_out_loss_of_two_ranks_is_that_of_one(name: str, runs: Path):
    looks = [
        [entry for entry in read_result(runs, f"uneven-{run}")["log"] if "eval_loss" in entry] for run in (name, "one")
    ]
    assert [entry["step"] for entry in looks[0]] == [0, 3]
    for key in ("eval_loss", "eval_loss_image", "eval_loss_text"):
        assert looks[0][0][key] == pytest.approx(looks[1][0][key], abs=1e-6)
        assert looks[0][1][key] == pytest.approx(looks[1][1][key], abs=1e-4)
        assert looks[0][1][key] < looks[0][0][key]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_figures_are_those_of_all_ranks_and_a_command_may_score_in_between(name: str, runs: Path):
    logs = [read_result(runs, f"uneven-{run}")["log"] for run in (name, "one")]
    steps = [[entry for entry in log if "loss" in entry] for log in logs]
    for together, alone in zip(*steps, strict=True):
        for key in ("loss_image", "loss_text"):
            assert together[key] == pytest.approx(alone[key], abs=1e-4)
        for key in ("kept_tokens_mean", "kept_tokens_std", "padding_share"):
            assert together[key] == pytest.approx(alone[key], abs=1e-9)
        assert together["seconds_optimizer"] > 0
    assert [entry["step"] for entry in logs[0] if "score_files" in entry] == [3]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_stage_1_saves_the_projector_of_one_process(name: str, runs: Path):
    projectors = [torch.load(runs / f"stage1-{run}" / "mm_projector.bin", weights_only=True) for run in (name, "one")]
    assert furthest(*projectors) < 1e-5
    assert not (runs / f"stage1-{name}" / "model.safetensors").exists()


def test_lora_is_the_same_under_both_and_loads_on_its_base(runs: Path, checkpoints: Path):
    adapters = [load_file(runs / f"lora-{name}" / "adapter_model.safetensors") for name in ("zero2", "zero3")]
    assert furthest(*adapters) < 1e-5
    rest = [torch.load(runs / f"lora-{name}/non_lora_trainables.bin", weights_only=True) for name in ("zero2", "zero3")]
    assert furthest(*rest) < 1e-5 and len(rest[0]) == 4
    assert any(value.abs().max() > 0 for key, value in adapters[0].items() if "lora_B" in key)
    load_pretrained_model(str(runs / "lora-zero3"), LLM, device="cpu")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_qlora_trains_on_two_ranks(name: str, runs: Path, checkpoints: Path):
    assert len(losses(runs, f"qlora-{name}")) == 3
    adapter = load_file(runs / f"qlora-{name}" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    load_pretrained_model(str(runs / f"qlora-{name}"), LLM, device="cpu")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_16_bit_run_saves_a_whole_16_bit_checkpoint_or_is_refused_where_the_processor_cannot(
    name: str, dtype: torch.dtype, runs: Path, checkpoints: Path
):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if dtype is torch.float16 and not CPU_Accelerator().is_fp16_supported():
        error = json.loads((runs / "fp16.json").read_text(encoding="utf-8"))["error"]
        assert error.startswith("InputError: --fp16 True: DeepSpeed does not compute in fp16 on this cpu device; use ")
        assert "Loading weights" not in (runs / "fp16.0.log").read_text(encoding="utf-8")
        return
    assert len(losses(runs, name)) == 3
    assert {value.dtype for value in weights(runs, name).values()} == {dtype}
    assert load_pretrained_model(str(runs / name), device="cpu")[1].token_reducer.spec() == "TRIM:-1"


def test_a_given_projector_replaces_the_checkpoints_own_under_zero3(runs: Path, checkpoints: Path):
    given = torch.load("liuhaotian/llava-v1.5-mlp2x-tiny-pretrain/mm_projector.bin", weights_only=True)
    saved = weights(runs, "from-llava")
    assert all(torch.equal(saved[key], value.float()) for key, value in given.items())
