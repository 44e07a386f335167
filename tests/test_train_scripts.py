"""The training scripts: what they print, what they refuse, and (slow) real runs on two CPU ranks."""

import base64
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "playground" / "shapes" / "checkpoints"
NAMES = (
    "finetune_8gpu_TRIM", "pretrain", "finetune", "finetune_lora", "finetune_qlora", "v1_5/pretrain", "v1_5/finetune",
    "v1_5/finetune_lora", "v1_5/finetune_task", "v1_5/finetune_task_lora",
)  # fmt: skip
# Limits are for runs that hang; a slow or busy machine takes several times the usual minute or two.
ENDS_WITHIN_SECONDS = 300
RUN_SECONDS = 1200


def settings(**variables: str) -> dict[str, str]:
    """The environment of a script: this Python, no GPUs, and nothing that the caller's shell has set for training."""
    own = {key: value for key, value in os.environ.items() if key not in ("NUM_GPUS", "MODEL", "DATA", "OUTPUT")}
    return own | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | variables


def run(name: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=settings(**variables), capture_output=True, text=True, check=False, timeout=RUN_SECONDS
    )


def dry_run(name: str, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """The command of a script, and its flags with their last values."""
    done = run(name, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    return command, {word[2:]: value for word, value in itertools.pairwise(command) if word.startswith("--")}


@pytest.mark.parametrize("name", NAMES)
def test_every_script_prints_one_command_for_eight_gpus(name: str):
    command, flags = dry_run(name)
    assert "llava/train/train_mem.py" in command
    assert flags["num_gpus"] == "8"
    batch = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"]) * 8
    assert batch == (256 if "pretrain" in name else 128)
    assert (ROOT / flags["deepspeed"]).is_file()
    assert flags["model_max_length"] == "2048" and flags["num_train_epochs"] == "1"
    assert (flags["lr_scheduler_type"], flags["warmup_ratio"], flags["report_to"]) == ("cosine", "0.03", "none")


def test_the_trim_script_trains_as_published():
    _, flags = dry_run("finetune_8gpu_TRIM")
    expected = {
        "mm_vision_token_reduce_func": "TRIM:-1", "learning_rate": "2e-5", "deepspeed": "scripts/zero3.json",
        "per_device_train_batch_size": "4", "gradient_accumulation_steps": "4", "version": "v1",
        "model_name_or_path": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336",
        "bf16": "True", "tf32": "True", "image_aspect_ratio": "pad", "gradient_checkpointing": "True",
        "group_by_modality_length": "True",
    }  # fmt: skip
    assert {key: flags[key] for key in expected} == expected


def test_every_variable_can_be_set_from_outside():
    variables = {
        "MODEL": "some/model", "DATA": "some/data", "IMAGES": "/images", "VISION_TOWER": "some/clip",
        "PROJECTOR": "/p/mm_projector.bin", "OUTPUT": "/out/run", "ZERO": "/z.json", "BATCH_SIZE": "2",
        "GRADIENT_ACCUMULATION": "3", "LEARNING_RATE": "7e-6", "EPOCHS": "2", "MAX_LENGTH": "512", "SAVE_STEPS": "9",
        "NUM_WORKERS": "1", "SEED": "5", "REPORT_TO": "tensorboard", "ASPECT_RATIO": "square", "VERSION": "v1_mmtag",
        "LOGGING_STEPS": "10", "GRADIENT_CHECKPOINTING": "False", "NUM_GPUS": "2", "PRECISION": "fp16",
        "reduce_func": "TextSim", "reduce_func_param": "0.25", "MASTER_PORT": "12345",
    }  # fmt: skip
    command, flags = dry_run("finetune_8gpu_TRIM", **variables)
    shown = set(flags.values())
    parts = ("reduce_func", "reduce_func_param", "PRECISION")
    assert {value for key, value in variables.items() if key not in parts} <= shown
    assert flags["mm_vision_token_reduce_func"] == "TextSim:0.25"
    assert flags["fp16"] == "True" and "bf16" not in flags
    assert "DS_ACCELERATOR=cpu" in command


@pytest.mark.parametrize("name", ["pretrain", "finetune", "finetune_lora", "finetune_8gpu_TRIM"])
def test_the_other_engine_changes_nothing_else(name: str):
    (_, usual), (command, flags) = dry_run(name), dry_run(name, ENGINE="fsdp2")
    assert (flags.pop("fsdp"), flags.pop("fsdp_config")) == ("True", "scripts/fsdp2.json")
    assert usual.pop("deepspeed") and flags == usual
    assert (ROOT / "scripts/fsdp2.json").is_file() and "deepspeed.launcher.runner" in command


def test_flags_after_two_dashes_win():
    _, flags = dry_run("finetune", "--", "--learning_rate", "1e-9", "--max_steps", "3")
    assert (flags["learning_rate"], flags["max_steps"]) == ("1e-9", "3")


def test_accumulation_keeps_the_global_batch_on_fewer_gpus():
    _, flags = dry_run("finetune_8gpu_TRIM", NUM_GPUS="4", CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert flags["gradient_accumulation_steps"] == "8"
    assert flags["include"] == "localhost:0,1,2,3"


def test_the_visible_gpus_are_used_and_no_others():
    _, flags = dry_run("finetune", CUDA_VISIBLE_DEVICES="4,6,7", NUM_GPUS="2")
    assert flags["include"] == "localhost:4,6"


def test_a_language_model_alone_gets_no_vision_flag():
    command, _ = dry_run("finetune", VISION_TOWER="", IMAGES="")
    assert not [word for word in command if "vision" in word or "image" in word or "projector" in word]


def test_no_reduction_and_the_checkpoints_own_differ():
    assert dry_run("finetune")[1]["mm_vision_token_reduce_func"] == "none"
    assert "mm_vision_token_reduce_func" not in dry_run("v1_5/finetune_task")[1]


def test_paths_are_relative_to_the_users_folder(tmp_path: Path):
    (tmp_path / "clip").mkdir()
    done = run("finetune", cwd=tmp_path, DRY_RUN="1", VISION_TOWER="clip", OUTPUT="runs/new", DATA="liuhaotian/some")
    flags = shlex.split(done.stdout)
    shown = {flag: flags[flags.index(f"--{flag}") + 1] for flag in ("vision_tower", "output_dir", "data_path")}
    assert (ROOT / shown["vision_tower"]).resolve() == tmp_path / "clip"
    assert (ROOT / shown["output_dir"]).resolve() == tmp_path / "runs/new"
    assert not Path(shown["vision_tower"]).is_absolute()  # config.json then names the tower relative to the checkpoint
    assert shown["data_path"] == "liuhaotian/some"


def test_several_machines_start_by_ssh_from_the_first(tmp_path: Path):
    nodes = {"NUM_NODES": "2", "HOSTFILE": str(tmp_path / "hosts"), "NUM_GPUS": "8", "BATCH_SIZE": "8"}
    _, by_ssh = dry_run("finetune", **nodes)
    assert (by_ssh["num_nodes"], by_ssh["hostfile"]) == ("2", str(tmp_path / "hosts"))
    assert by_ssh["per_device_train_batch_size"] == "8" and by_ssh["gradient_accumulation_steps"] == "1"


def machines_of(flags: dict[str, str]) -> dict[str, list[int]]:
    """The list of machines and GPUs that the launcher gets."""
    return json.loads(base64.urlsafe_b64decode(flags["world_info"]))


SLURM = {
    "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu-a[03-07,12],login1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "rank", "address", "port"),
    [
        ({"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "1", "10.0.0.1", "29500"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}, "0", "a", "1234"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "7"}, "1", "a", "7"),
        (SLURM, "1", "gpu-a03", "23456"),
        (SLURM | {"SLURM_JOB_NODELIST": "r[1-2]n[08-09],x", "MASTER_PORT": "9"}, "1", "r1n08", "9"),
        (SLURM | {"SLURM_JOB_NODELIST": "one,two[1-2]", "NODE_RANK": "0"}, "0", "one", "23456"),
    ],
)
def test_the_same_command_on_each_machine_finds_its_place(variables: dict, rank: str, address: str, port: str):
    _, flags = dry_run("finetune", **variables, CUDA_VISIBLE_DEVICES="2,3,5,7")
    assert (flags["node_rank"], flags["master_addr"], flags["master_port"]) == (rank, address, port)
    assert machines_of(flags) == {"0": [2, 3, 5, 7], "1": [2, 3, 5, 7]}
    assert flags["gradient_accumulation_steps"] == "1"  # 128 = 2 x 4 x 16


def test_ranks_on_the_cpu_of_several_machines_and_one_machine_of_a_job():
    command, flags = dry_run("finetune", **SLURM, NPROC_PER_NODE="2", BATCH_SIZE="8")
    assert "DS_ACCELERATOR=cpu" in command and machines_of(flags) == {"0": [0, 1], "1": [0, 1]}
    _, alone = dry_run("finetune", **SLURM, NUM_NODES="1", CUDA_VISIBLE_DEVICES="2,3")
    assert alone["include"] == "localhost:2,3" and "node_rank" not in alone
    _, shell = dry_run("finetune", SLURM_NNODES="2", SLURM_JOB_NODELIST="a,b", CUDA_VISIBLE_DEVICES="0,1")
    assert shell["include"] == "localhost:0,1"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NUM_NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "the 2 machines (NUM_NODES) are 0 to 1"),
        ({"NUM_NODES": "2", "NODE_RANK": "1"}, "NODE_RANK=1 needs MASTER_ADDR, the address of the first machine"),
        ({"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "-x"}, "MASTER_ADDR: '-x' is no address"),
        ({"NNODES": "1:4"}, "NUM_NODES must be a whole number from 1 on, not '1:4'"),
        (SLURM | {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, "start it once on each (--ntasks-per-node=1)"),
        (SLURM | {"SLURM_JOB_NODELIST": ""}, "NODE_RANK=1 needs MASTER_ADDR"),
    ],
)
def test_machines_that_do_not_fit_are_refused_in_one_line(variables: dict, says: str):
    done = run("finetune", DRY_RUN="1", NUM_GPUS="4", **variables)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "no GPU is visible; NUM_GPUS=2 trains on two CPU ranks"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS must be a whole number"),
        ({"NUM_GPUS": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, "only 2 GPUs are visible"),
        ({"NUM_GPUS": "2"}, "DATA: nothing at playground/data/llava_v1_5_mix665k.json"),
        ({"NUM_GPUS": "2", "DATA": ""}, "DATA is empty"),
        ({"NUM_GPUS": "2", "DATA": "{file}", "IMAGES": "/no/folder"}, "IMAGES: no folder /no/folder"),
        ({"NUM_GPUS": "2", "DATA": "{file}", "IMAGES": "{folder}"}, "PROJECTOR: no file checkpoints/"),
        ({"NUM_GPUS": "2", "MODEL": "./nowhere"}, "MODEL: nothing at ./nowhere"),
        ({"NUM_GPUS": "2", "ZERO": "none.json"}, "ZERO: no DeepSpeed settings at none.json"),
        ({"NUM_GPUS": "2", "ZERO": ""}, "ZERO is empty"),
        ({"NUM_GPUS": "2", "ENGINE": "fsdp"}, "ENGINE=fsdp: expected deepspeed or fsdp2"),
        ({"NUM_GPUS": "3", "DRY_RUN": "1"}, "GLOBAL_BATCH=128 is not a multiple of 48"),
        ({"NUM_GPUS": "2", "DRY_RUN": "1", "PRECISION": "fp8"}, "PRECISION=fp8: expected bf16, fp16 or fp32"),
        ({"NUM_NODES": "2", "NUM_GPUS": "8", "BATCH_SIZE": "8", "DRY_RUN": "1"}, "NUM_NODES=2 needs HOSTFILE"),
        ({"NUM_NODES": "two"}, "NUM_NODES must be a whole number from 1 on, not 'two'"),
        (
            {"NUM_NODES": "2", "NUM_GPUS": "2", "NODE_RANK": "-1"},
            "NODE_RANK must be a whole number from 0 on, not '-1'",
        ),
        ({"NUM_GPUS": "2", "OUTPUT": "{file}"}, "data.json is not a folder"),
        ({"NUM_GPUS": "2", "OUTPUT": "out", "LOG": "{folder}"}, "is not a regular file"),
        ({"NUM_GPUS": "2", "OUTPUT": "-rf"}, "OUTPUT: a path starts with no dash and has no control characters"),
        ({"NUM_GPUS": "2", "OUTPUT": "a\nb"}, "OUTPUT: a path starts with no dash and has no control characters"),
        ({"NUM_GPUS": "2", "MODEL": "--seed"}, "MODEL: a path starts with no dash and has no control characters"),
    ],
)
def test_what_is_missing_is_named_before_anything_loads(variables: dict, says: str, tmp_path: Path):
    (tmp_path / "data.json").write_text("[]")
    places = {"{file}": str(tmp_path / "data.json"), "{folder}": str(tmp_path)}
    done = run("finetune", **{key: places.get(value, value) for key, value in variables.items()})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


NUMBERS = (
    "NUM_GPUS", "NUM_NODES", "BATCH_SIZE", "GLOBAL_BATCH", "GRADIENT_ACCUMULATION", "MASTER_PORT", "NODE_RANK",
    "STOP_SECONDS",
)  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["BASH_VERSINFO[$(touch {0})]", "a[$(touch {0})]", "$(touch {0})", "1+1", "0x10", "010", "1\n2", "9" * 20]
)
def test_a_number_that_is_none_is_refused_and_runs_nothing(name: str, value: str, tmp_path: Path):
    trap = tmp_path / "ran"
    done = run("finetune", DRY_RUN="1", **{"NUM_GPUS": "2", name: value.format(trap)})
    assert not trap.exists()
    assert done.returncode == 2 and f"{name} must be a whole number from" in done.stderr
    assert "unbound" not in done.stderr


def test_the_library_needs_no_newer_bash_than_macos_has():
    text = (ROOT / "scripts/lib/train.sh").read_text(encoding="utf-8")
    for newer in ("mapfile", "readarray", "declare -A", "declare -n", "@Q}", "exec {", "${!1^^}", "|&", "wait -n"):
        assert newer not in text, newer


def test_an_option_in_the_wrong_place_is_refused():
    assert "options such as --max_steps go after --" in run("finetune", "--max_steps", "3").stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start finetune.sh with a launcher of a few lines of Python in DeepSpeed's place."""
    begun = []

    def begin(code: str, **variables: str) -> subprocess.Popen:
        (tmp_path / "launcher.py").write_text(code)
        launcher = tmp_path / "python"
        launcher.write_text(
            f"""#!/bin/sh\n[ "$1" != -c ] || exec {sys.executable} "$@"\n"""
            f"exec {sys.executable} -u {tmp_path}/launcher.py\n"
        )
        launcher.chmod(0o755)
        (tmp_path / "data.json").write_text("[]")
        places = {
            "PYTHON": str(launcher), "MODEL": str(tmp_path), "VISION_TOWER": str(tmp_path), "PROJECTOR": "",
            "DATA": str(tmp_path / "data.json"), "IMAGES": str(tmp_path), "OUTPUT": str(tmp_path / "run"),
            "NUM_GPUS": "2",
        }  # fmt: skip
        script = subprocess.Popen(
            ["bash", str(ROOT / "scripts/finetune.sh")], cwd=ROOT, env=settings(**places | variables),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(script)
        return script

    yield begin
    for script in begun:
        while script.poll() is None:  # a second signal ends it at once
            script.terminate()
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (2, "error: --fp16 True: refused (log: {log})"),
        (
            1,
            "error: training stopped with exit code 1 (log: {log}); the same command resumes at the last checkpoint in",
        ),
    ],
)
def test_the_last_line_says_why_the_training_ended(code: int, says: str, start: Callable, tmp_path: Path):
    # As DeepSpeed's launcher fails: the trainer's own line is among others, once per rank.
    lines = "noise\\nerror: --fp16 True: refused\\nerror: --fp16 True: refused\\nmore noise"
    script = start(f"import sys; print('{lines}', file=sys.stderr); sys.exit({code})")
    _, error = script.communicate(timeout=ENDS_WITHIN_SECONDS)
    assert script.returncode == 2
    assert error.splitlines()[-1].startswith(says.format(log=tmp_path / "run.log"))
    assert code == 2 or error.splitlines()[-1].endswith("(there is none yet)")


def test_the_last_line_is_of_this_run_not_of_an_earlier_one_in_the_log(start: Callable, tmp_path: Path):
    (tmp_path / "run.log").write_text("error: an old mistake\nstopped at step 3\ntrained: elsewhere\n")
    script = start("import sys; sys.exit(2)")
    _, error = script.communicate(timeout=ENDS_WITHIN_SECONDS)
    assert error.splitlines()[-1].startswith("error: the trainer refused to start (log:")


# Two ranks as DeepSpeed's launcher has them: in the script's job, each with a handler of its own.
RANK = """
import signal, sys, time
def stop(number, frame):
    sys.stderr.write("stopped at step 3: the same command goes on from run/checkpoint-3\\n")
    sys.exit(143)
signal.signal(signal.SIGUSR1, {answer})
sys.stderr.write("ready\\n")
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", {rank!r}]) for _ in range(2)]
print("pids", *[process.pid for process in ranks], flush=True)
sys.exit(max(process.wait() for process in ranks))
"""


def ranks_that(answer: str) -> str:
    return LAUNCHER.format(rank=RANK.replace("{answer}", answer))


def read_until_ready(script: subprocess.Popen) -> list[int]:
    pids, num_ready = [], 0
    while num_ready < 2:
        line = script.stdout.readline()
        assert line, script.stderr.read()
        num_ready += line.startswith("ready")
        pids = [int(word) for word in line.split()[1:]] if line.startswith("pids") else pids
    return pids


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], seconds: float = ENDS_WITHIN_SECONDS) -> None:
    ends = time.monotonic() + seconds
    while [pid for pid in pids if is_running(pid)] and time.monotonic() < ends:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_script_ends_every_rank_and_the_last_line_is_theirs(
    number: int, code: int, start: Callable, tmp_path: Path
):
    script = start(ranks_that("stop"))
    pids = read_until_ready(script)
    script.send_signal(number)
    _, error = script.communicate(timeout=ENDS_WITHIN_SECONDS)
    assert script.returncode == code
    line = "stopped at step 3: the same command goes on from run/checkpoint-3"
    assert error.splitlines()[-1] == f"{line} (log: {tmp_path / 'run.log'})"
    assert not [pid for pid in pids if is_running(pid)]


def test_a_rank_that_does_not_end_is_killed_in_bounded_time(start: Callable):
    script = start(ranks_that("signal.SIG_IGN"), STOP_SECONDS="1")
    pids = read_until_ready(script)
    began = time.monotonic()
    script.terminate()
    _, error = script.communicate(timeout=ENDS_WITHIN_SECONDS)
    assert script.returncode == 143 and time.monotonic() - began < 60
    assert error.splitlines()[-1].startswith("stopped before a checkpoint was written (log:")
    assert not [pid for pid in pids if is_running(pid)]


def test_a_second_signal_ends_it_at_once(start: Callable):
    script = start(ranks_that("signal.SIG_IGN"), STOP_SECONDS="500")
    pids = read_until_ready(script)
    script.terminate()
    time.sleep(1.5)
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode == 143
    assert not [pid for pid in pids if is_running(pid)]


# ------------------------------------------------------------------------------------------------ real runs
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sizes = ["--train-images", "30", "--samples-per-image", "2", "--eval-images", "8", "--seed", "11"]
    subprocess.run(
        [sys.executable, "-m", "playground.shapes.generate", "--out", str(folder), "--benchmarks", "pope", *sizes],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder


def shapes_settings(world: Path, output: str) -> dict[str, str]:
    return {
        "NUM_GPUS": "2", "MODEL": str(CHECKPOINTS / "llava-shapes"), "VISION_TOWER": str(CHECKPOINTS / "shapes-clip"),
        "PROJECTOR": "", "DATA": str(world / "train/finetune.json"), "IMAGES": str(world / "train/images"),
        "OUTPUT": str(world / output), "BATCH_SIZE": "4", "GLOBAL_BATCH": "8", "NUM_WORKERS": "0", "MAX_LENGTH": "512",
        "LEARNING_RATE": "1e-4",
    }  # fmt: skip


def pope_accuracy(world: Path, checkpoint: Path) -> float:
    done = run("v1_5/eval/pope", checkpoint.name, str(checkpoint), LLAVA_EVAL_ROOT=str(world / "eval"))
    assert done.returncode == 0, done.stderr[-2000:]
    scores = world / "eval/pope/answers" / checkpoint.name / "merge.scores.json"
    return json.loads(scores.read_text(encoding="utf-8"))["scores"]["average_accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_SECONDS)
def test_the_trim_script_trains_on_two_cpu_ranks_as_one_process_does(world: Path):
    few = ["--max_steps", "4", "--save_strategy", "no", "--disable_tqdm", "True"]
    for zero in ("zero2", "zero3"):
        done = run("finetune_8gpu_TRIM", "--", *few, ZERO=f"scripts/{zero}.json", **shapes_settings(world, zero))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "mean loss" in (world / f"{zero}.log").read_text(encoding="utf-8")
    command, _ = dry_run("finetune_8gpu_TRIM", "--", *few, **shapes_settings(world, "alone"))
    alone = command[command.index("llava/train/train_mem.py") :]
    place = alone.index("--deepspeed")
    del alone[place : place + 2]
    subprocess.run([sys.executable, *alone], cwd=ROOT, env=settings(), check=True, capture_output=True)
    expected = pope_accuracy(world, world / "alone")
    for zero in ("zero2", "zero3"):
        model = load_pretrained_model(str(world / zero), device="cpu")[1]
        assert model.token_reducer.spec() == "TRIM:-1"
        assert pope_accuracy(world, world / zero) >= expected - 1


@pytest.mark.slow
@pytest.mark.timeout(3 * RUN_SECONDS)
def test_a_killed_rank_ends_the_run_and_the_last_checkpoint_loads(world: Path):
    variables = shapes_settings(world, "killed") | {"SAVE_STEPS": "2"}
    command = ["bash", str(ROOT / "scripts/finetune.sh"), "--", "--max_steps", "5000", "--save_only_model", "True"]
    with (world / "screen.txt").open("w") as screen:
        script = subprocess.Popen(command, cwd=ROOT, env=settings(**variables), stdout=screen, stderr=screen)
    try:
        deadline = time.monotonic() + RUN_SECONDS
        while not list((world / "killed").glob("checkpoint-*/trainer_state.json")):
            assert script.poll() is None and time.monotonic() < deadline, (world / "screen.txt").read_text(
                encoding="utf-8"
            )[-3000:]
            time.sleep(0.5)
        ranks = [
            int(number)
            for number in re.findall(r"process (\d+) spawned", (world / "killed.log").read_text(encoding="utf-8"))
        ]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert script.wait(timeout=ENDS_WITHIN_SECONDS) != 0
    finally:
        script.terminate()
    assert "error: training stopped with exit code" in (world / "screen.txt").read_text(encoding="utf-8")
    ends = time.monotonic() + ENDS_WITHIN_SECONDS
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    complete = sorted((world / "killed").glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    load_pretrained_model(str(complete[-1].parent), device="cpu")
