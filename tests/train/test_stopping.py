"""Stopping real runs: a signal becomes a checkpoint, nothing is lost, nothing goes on behind the user's back.

STOP_REPEATS=20 repeats each case at another moment; one repeat is enough for every day.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPEATS = int(os.environ.get("STOP_REPEATS", "1"))
ENDS_WITHIN_SECONDS = 180  # a stopped run; five seconds are usual
STARTS_WITHIN_SECONDS = 600
NUM_STEPS = 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MOMENTS = random.Random(11)


class Training:
    """A training process, its output in a file, and all processes of its group."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = log
        with log.open("w") as screen:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=screen, stderr=screen, start_new_session=True,
                env=os.environ | {
                    "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                    "PYTHON": sys.executable,
                } | environment,
            )  # fmt: skip

    def wait_for(self, text: str) -> None:
        ends = time.monotonic() + STARTS_WITHIN_SECONDS
        while text not in self.read():
            assert self.process.poll() is None and time.monotonic() < ends, self.read()[-3000:]
            time.sleep(0.1)

    def read(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        return self.read().strip().splitlines()[-1]

    def end(self) -> int:
        return self.process.wait(timeout=ENDS_WITHIN_SECONDS)


def list_processes(mark: str) -> list[int]:
    """The processes whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def assert_gone(mark: str) -> None:
    ends = time.monotonic() + ENDS_WITHIN_SECONDS
    while list_processes(mark) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not list_processes(mark)


@pytest.fixture
def begun() -> Iterator[list[Training]]:
    runs: list[Training] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def flags(golden: Path) -> dict[str, object]:
    checkpoints = golden / "checkpoints"
    return {
        "model_name_or_path": checkpoints / "lmsys/vicuna-tiny-v1.5",
        "vision_tower": checkpoints / "openai/clip-vit-tiny-patch14-84",
        "data_path": golden / "data/questions/train6.json", "image_folder": golden / "data/images",
        "image_aspect_ratio": "pad", "max_steps": NUM_STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1000, "disable_tqdm": True,
        "mm_vision_token_reduce_func": "TRIM:-1", "dataloader_num_workers": 1,
    }  # fmt: skip


def command_of(flags: dict[str, object], output: Path) -> list[str]:
    words = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in flags.items())
    return [sys.executable, "-u", "-m", "llava.train.train", *words, "--output_dir", str(output)]


@pytest.fixture(scope="module")
def whole(flags: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Training(command_of(flags, folder / "run"), folder / "log.txt")
    run.wait_for("loss")
    assert run.process.wait(timeout=STARTS_WITHIN_SECONDS) == 0, run.read()[-3000:]
    return (folder / "run/model.safetensors").read_bytes()


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_to_one_process_leaves_a_checkpoint_from_which_it_goes_on_as_if_nothing_had_been(
    number: int, code: int, whole_group: bool, repeat: int, flags: dict, whole: bytes, begun: list, tmp_path: Path
):
    output = tmp_path / "run"
    run = Training(command_of(flags, output), tmp_path / "log.txt")
    begun.append(run)
    run.wait_for("loss")
    time.sleep(MOMENTS.random())
    (os.killpg if whole_group else os.kill)(run.process.pid, number)
    assert run.end() == code, run.read()[-3000:]
    stopped = re.fullmatch(r"stopped at step (\d+): the same command goes on from (.*)", run.last_line())
    assert stopped, run.read()[-3000:]
    assert Path(stopped[2]) == output / f"checkpoint-{stopped[1]}"
    assert json.loads((Path(stopped[2]) / "trainer_state.json").read_text())["global_step"] == int(stopped[1])
    assert not (output / "model.safetensors").exists()
    assert_gone(str(output))
    again = Training(command_of(flags, output), tmp_path / "again.txt")
    begun.append(again)
    again.wait_for("resuming at")
    assert again.process.wait(timeout=STARTS_WITHIN_SECONDS) == 0, again.read()[-3000:]
    assert again.last_line() == f"trained: {output}"
    assert (output / "model.safetensors").read_bytes() == whole


def test_a_signal_before_the_training_begins_ends_it_at_once(flags: dict, begun: list, tmp_path: Path):
    run = Training(command_of(flags, tmp_path / "run"), tmp_path / "log.txt")
    begun.append(run)
    time.sleep(1.5)
    run.process.terminate()
    assert run.process.wait(timeout=20) in (143, -signal.SIGTERM)
    assert not list(tmp_path.glob("run/checkpoint-*"))


def start_script(flags: dict, ranks: int, output: Path, log: Path) -> Training:
    rest = {name: value for name, value in flags.items() if name in ("max_steps", "disable_tqdm")}
    words = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in rest.items())
    variables = {
        "NUM_GPUS": str(ranks), "MODEL": str(flags["model_name_or_path"]), "VISION_TOWER": str(flags["vision_tower"]),
        "PROJECTOR": "", "DATA": str(flags["data_path"]), "IMAGES": str(flags["image_folder"]), "OUTPUT": str(output),
        "BATCH_SIZE": "1", "GLOBAL_BATCH": "2", "NUM_WORKERS": "1", "LEARNING_RATE": "1e-3", "PRECISION": "fp32",
        "ZERO": "scripts/zero2.json", "SAVE_STEPS": "1000",
    }  # fmt: skip
    return Training(["bash", str(ROOT / "scripts/finetune_8gpu_TRIM.sh"), "--", *words], log, **variables)


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_stops_all_ranks_with_a_checkpoint(
    number: int, code: int, ranks: int, repeat: int, flags: dict, begun: list, tmp_path: Path
):
    output = tmp_path / "run"
    run = start_script(flags | {"max_steps": 5000}, ranks, output, tmp_path / "log.txt")
    begun.append(run)
    run.wait_for("loss")
    time.sleep(MOMENTS.random())
    run.process.send_signal(number)
    assert run.end() == code, run.read()[-3000:]
    stopped = re.match(r"stopped at step (\d+): the same command goes on from (\S+) \(log: ", run.last_line())
    assert stopped, run.read()[-3000:]
    assert_gone(str(output))
    states = list((output / f"checkpoint-{stopped[1]}").glob("*/*_optim_states.pt"))
    assert len(states) == ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_when_the_script_is_killed_and_a_run_of_two_goes_on(
    ranks: int, flags: dict, begun: list, tmp_path: Path
):
    output = tmp_path / "run"
    run = start_script(flags | {"max_steps": 5000}, ranks, output, tmp_path / "log.txt")
    begun.append(run)
    run.wait_for("loss")
    run.process.kill()
    run.end()
    assert_gone(str(output))
    (checkpoint,) = output.glob("checkpoint-*/trainer_state.json")
    step = json.loads(checkpoint.read_text())["global_step"]
    again = start_script(flags | {"max_steps": 5000}, ranks, output, tmp_path / "again.txt")
    begun.append(again)
    again.wait_for(f"resuming at {checkpoint.parent}")
    again.wait_for("loss")
    again.process.terminate()
    assert again.end() == 143
    assert int(re.search(r"stopped at step (\d+)", again.last_line())[1]) > step
    assert_gone(str(output))
