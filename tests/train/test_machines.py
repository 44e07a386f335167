"""Several machines: two launchers of one rank each train as one of two ranks, and neither outlives the other.

The machines are two copies of the script on localhost. A file system that is not shared is played by an output folder
for each rank.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.train import machines

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600  # for runs that hang; half a minute is usual
FIRST_SAVE = 6


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Play two ranks: this one, and another with given findings."""

    def play(found: str | None, error: str | None = None) -> None:
        monkeypatch.setattr(machines, "_has_others", lambda: True)
        monkeypatch.setattr(machines, "_describe_rank", lambda: "rank 0 on a")
        monkeypatch.setattr(machines, "_gather", lambda own: [own, ("rank 1 on b", found, error)])

    return play


def test_machines_that_find_the_same_go_on(answers: Callable):
    answers("checkpoint-5")
    assert machines.agree(lambda: "checkpoint-5") == "checkpoint-5"


def test_machines_that_find_different_checkpoints_are_refused_by_name(answers: Callable):
    answers(None)
    with pytest.raises(InputError, match="rank 0 on a finds checkpoint-5, rank 1 on b nothing; --output_dir has to be"):
        machines.agree(lambda: "checkpoint-5")


def test_what_one_machine_refuses_all_refuse(answers: Callable):
    answers(None, "run.json is damaged")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        machines.agree(lambda: "checkpoint-5")


def test_one_process_asks_nobody():
    assert machines.agree(lambda: "checkpoint-5") == "checkpoint-5"


# ---------------------------------------------------------------------------------------------------------- real runs
@pytest.fixture(scope="module")
def settings(golden: Path) -> dict[str, str]:
    """The scripts' variables, from the recorded tiny checkpoints."""
    checkpoints = golden / "checkpoints"
    return {
        "MODEL": str(checkpoints / "lmsys/vicuna-tiny-v1.5"), "PROJECTOR": "", "PRECISION": "fp32",
        "VISION_TOWER": str(checkpoints / "openai/clip-vit-tiny-patch14-84"), "LEARNING_RATE": "1e-3",
        "DATA": str(golden / "data/questions/train6.json"), "IMAGES": str(golden / "data/images"),
        "BATCH_SIZE": "1", "GLOBAL_BATCH": "2", "NUM_WORKERS": "0", "ZERO": "scripts/zero2.json",
        "SAVE_STEPS": str(FIRST_SAVE),
    }  # fmt: skip


RUNS_ON = ["--max_steps", "5000", "--lr_scheduler_type", "constant", "--disable_tqdm", "True"]


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_machine(number: int, port: int, settings: dict[str, str], output: Path) -> subprocess.Popen:
    place = {
        "NUM_GPUS": "1", "NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OUTPUT": str(output),
    }  # fmt: skip
    own = {
        "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with output.with_name(f"screen{number}.txt").open("w") as screen:
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts/finetune_8gpu_TRIM.sh"), "--", *RUNS_ON], cwd=ROOT,
            env=os.environ | own | settings | place, stdout=screen, stderr=screen, start_new_session=True,
        )  # fmt: skip


def find_launcher(output: Path, number: int) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        is_launcher = "deepspeed.launcher.launch" in words and str(output) in words
        if is_launcher and words[words.index("--node_rank") + 1] == str(number):
            return int(path.parent.name)
    raise AssertionError(f"no launcher of machine {number}")


@pytest.fixture(scope="module")
def pair(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Two machines train until their first checkpoint; then the second one's launcher is killed."""
    output = tmp_path_factory.mktemp("machines") / "run"
    port = find_port()
    scripts = [start_machine(number, port, settings, output) for number in (0, 1)]
    try:
        saved = output / f"checkpoint-{FIRST_SAVE}" / "trainer_state.json"
        ends = time.monotonic() + LIMIT_SECONDS
        while not saved.exists():
            screens = [output.with_name(f"screen{number}.txt").read_text()[-2000:] for number in (0, 1)]
            assert all(script.poll() is None for script in scripts) and time.monotonic() < ends, "\n".join(screens)
            time.sleep(0.1)
        losses = [entry["loss"] for entry in json.loads(saved.read_text())["log_history"] if "loss" in entry]
        os.kill(find_launcher(output, 1), signal.SIGKILL)
        codes = [script.wait(timeout=LIMIT_SECONDS) for script in scripts]
    finally:
        for script in scripts:
            while script.poll() is None:  # a second signal ends it at once
                script.terminate()
                time.sleep(0.2)
    yield {"output": output, "losses": losses, "codes": codes}


def run_ranks(folder: Path, scenarios: list[dict]) -> None:
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder / "scenarios.json")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def together(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one machine with two ranks; and two ranks that do not see each other's files."""
    folder = tmp_path_factory.mktemp("together")
    words = subprocess.run(
        ["bash", str(ROOT / "scripts/finetune_8gpu_TRIM.sh"), "--", *RUNS_ON],
        env=os.environ | settings | {"NUM_GPUS": "2", "DRY_RUN": "1", "PYTHON": sys.executable, "OUTPUT": "run"},
        capture_output=True, text=True, check=True, cwd=folder,
    ).stdout.split()  # fmt: skip
    words = words[words.index("llava/train/train_mem.py") + 1 :]
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    flags |= {"save_strategy": "no", "max_steps": FIRST_SAVE}
    apart = {"output_dir": f"{folder}/apart{{rank}}", "max_steps": 1}
    run_ranks(
        folder,
        [
            {"name": "one-machine", "flags": flags | {"output_dir": str(folder / "run")}},
            {"name": "apart", "flags": flags | apart | {"save_strategy": "steps"}},
            {"name": "apart-unsaved", "flags": flags | apart},
        ],
    )
    return folder


def read_result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


pair_tests = pytest.mark.timeout(3 * LIMIT_SECONDS)


@pytest.mark.slow
@pair_tests
def test_two_launchers_of_one_rank_train_as_one_launcher_of_two(pair: dict, together: Path):
    assert len(pair["losses"]) == FIRST_SAVE
    assert pair["losses"] == pytest.approx(read_result(together, "one-machine")["losses"], abs=1e-6)


@pytest.mark.slow
@pair_tests
def test_a_machine_whose_launcher_dies_takes_the_other_with_it_and_both_say_how_it_ended(pair: dict):
    output = pair["output"]
    for number, log in enumerate(("run.log", "run.machine1.log")):
        last = output.with_name(f"screen{number}.txt").read_text().strip().splitlines()[-1]
        # The ranks may have time for a checkpoint, or lose each other before.
        stopped = re.match(r"stopped at step (\d+): the same command goes on from (\S+) \(log: ", last)
        if stopped:
            assert (Path(stopped[2]) / "trainer_state.json").is_file() and pair["codes"][number] == 143
        else:
            expected = f"(log: {output.with_name(log)}); the same command resumes at the last checkpoint in {output}"
            assert last.startswith("error: training stopped with exit code ") and last.endswith(expected), last
            assert pair["codes"][number] == 2
        assert output.with_name(log).is_file()
    assert list(output.glob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
@pair_tests
def test_an_output_folder_that_is_not_shared_is_refused_before_training(together: Path):
    error = read_result(together, "apart")["error"]
    assert re.match(r"InputError: --output_dir \S+ is not one folder: rank 1 on \S+ does not see what rank 0 ", error)
    assert not list(together.glob("apart?/.seen*"))


@pytest.mark.slow
@pair_tests
def test_without_checkpoints_the_first_machine_alone_gets_the_result(together: Path):
    assert len(read_result(together, "apart-unsaved")["losses"]) == 1
    assert (together / "apart0/model.safetensors").is_file()
    assert not (together / "apart1/model.safetensors").exists()
