"""Signals: every command and script ends within seconds, with the shell's exit code, and leaves no process behind.

`LLAVA_KILL_ROUNDS=5` repeats the slow table of kills and resumes that often (default: once).
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.eval.test_scripts import ENVIRONMENT, NO_GPU, write_python

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
LIMIT_SECONDS = 5.0
ROUNDS = int(os.environ.get("LLAVA_KILL_ROUNDS", "1"))

WAIT = """
import ctypes, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from llava.errors import run_command
from llava.signals import ending_on_signals

def in_library():
    ctypes.CDLL(None).sleep(60)

def in_python():
    time.sleep(60)

def in_thread():
    with ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 60).result()

def behind_the_command():
    threading.Thread(target=time.sleep, args=(60,)).start()
    time.sleep(60)

def main():
    with ending_on_signals():
        print("ready", flush=True)
        globals()[sys.argv[1]]()

run_command(main)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a checkpoint `models/llava` in it."""
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "models" / "llava" / "config.json").write_text("{}")
    return tmp_path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and whom nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def end_soon(pids: Sequence[int]) -> None:
    """Make sure that processes end within the limit."""
    wait_until(lambda: not any(map(is_alive, pids)), LIMIT_SECONDS)


def stop(process: subprocess.Popen, name: str) -> tuple[int, float, str]:
    """Send a signal; return the exit code, how long the end took, and what was written on stderr."""
    start = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - start, error


def describe(name: str) -> str:
    return "interrupted" if name == "SIGINT" else f"stopped by {name}"


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("where", ["in_library", "in_python", "in_thread", "behind_the_command"])
def test_a_signal_ends_a_process_whatever_it_waits_for(repository: Path, where: str, name: str) -> None:
    command = [sys.executable, "-c", WAIT, where]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(repository)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    code, seconds, error = stop(process, name)
    assert code == 128 + getattr(signal, name)
    assert seconds < LIMIT_SECONDS
    assert error.strip() == describe(name)


def test_a_signal_that_is_ignored_stays_ignored(repository: Path) -> None:
    code = WAIT.replace("time.sleep(60)", "time.sleep(1)")
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", code, "in_python"],
        env={**ENVIRONMENT, "PYTHONPATH": str(repository)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0


# -------------------------------------------------------------------------------------------------------------- scripts
@dataclass
class Script:
    """A script under way with workers that were played by something else; their pids are in a file."""

    process: subprocess.Popen
    pids: Path

    def list_pids(self) -> list[int]:
        return [int(pid) for pid in self.pids.read_text().split()] if self.pids.exists() else []


def start_script(repository: Path, here: Path, body: str, *command: str, **environment: str) -> Script:
    pids = here / "pids"
    options = write_python(here, f'[[ $3 == report ]] && exit 0\necho $$ >>"{pids}"\n{body}')
    process = subprocess.Popen(
        ["bash", str(repository / command[0]), *command[1:]],
        cwd=here,
        env={**ENVIRONMENT, **NO_GPU, **options, "LLAVA_EVAL_WORKERS": "3", "BENCHMARKS": "pope", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    script = Script(process, pids)
    wait_until(lambda: len(script.list_pids()) == 3)
    return script


POPE = ("scripts/v1_5/eval/pope.sh", "run-1", "models/llava")
ALL = ("eval_all_benchmarks.sh", "plain=models/llava", "trim=models/llava")
LAST_LINES = {
    POPE: "pope: stopped; run the same command again to go on where it stopped",
    ALL: "error: stopped by {name}; the same command goes on where it stopped",
}
STUBBORN = "trap '' TERM INT HUP; while true; do sleep 0.2; done"


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("command", [POPE, ALL], ids=["pope", "all"])
@pytest.mark.parametrize("body", ["exec sleep 60", STUBBORN], ids=["meek", "stubborn"])
def test_a_signal_to_a_script_ends_its_workers_and_its_last_line_is_true(
    repository: Path, here: Path, command: tuple[str, ...], body: str, name: str
) -> None:
    script = start_script(repository, here, body, *command)
    code, seconds, error = stop(script.process, name)
    assert code == 128 + getattr(signal, name)
    assert seconds < LIMIT_SECONDS
    assert not list(filter(is_alive, script.list_pids())), f"after {seconds:.1f} s: {error}"
    stopped = [line for line in error.splitlines() if line not in ("interrupted", describe(name))]
    assert stopped[-1] == LAST_LINES[command].format(name=name)


def test_the_workers_of_a_run_that_was_killed_end_themselves(repository: Path, here: Path) -> None:
    waiting = here / "wait.py"
    waiting.write_text(WAIT)
    environment = {"PYTHONPATH": str(repository)}
    script = start_script(repository, here, f"exec {sys.executable} {waiting} in_thread", *POPE, **environment)
    time.sleep(0.5)
    script.process.send_signal(signal.SIGKILL)
    script.process.wait()
    end_soon(script.list_pids())


def test_the_benchmark_under_way_ends_when_the_script_of_all_is_killed(repository: Path, here: Path) -> None:
    waiting = here / "wait.py"
    waiting.write_text(WAIT)
    body = f"exec {sys.executable} {waiting} in_thread"
    script = start_script(repository, here, body, *ALL, PYTHONPATH=str(repository))
    others = list_children(script.process.pid)
    time.sleep(0.5)
    script.process.send_signal(signal.SIGKILL)
    script.process.wait()
    end_soon([*others, *script.list_pids()])


def test_ctrl_c_while_a_command_is_imported_is_one_line(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "filelock.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "llava.eval", "list"],
        cwd=repository,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    code, seconds, error = stop(process, "SIGINT")
    assert code == -signal.SIGINT  # 130 for a shell
    assert seconds < LIMIT_SECONDS
    assert error == "interrupted\n"


# ------------------------------------------------------------------------------------------------------- real commands
def start_answer(repository: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llava.eval", *map(str, arguments)],
        cwd=repository,
        env={**ENVIRONMENT, **NO_GPU, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def silent_server() -> Iterator[ThreadingHTTPServer]:
    """A server that takes every request and never answers it."""
    asked = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.set()
            time.sleep(60)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked = True, asked
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("name", SIGNALS)
def test_scoring_ends_while_the_judge_is_silent(
    repository: Path, golden: Path, tmp_path: Path, silent_server: ThreadingHTTPServer, name: str
) -> None:
    pytest.importorskip("openai")
    folder = golden / "oracle" / "mm_vet"
    address = {"OPENAI_BASE_URL": f"http://127.0.0.1:{silent_server.server_port}/v1", "NO_PROXY": "127.0.0.1"}
    cache = ["--judge-cache", tmp_path / "replies.jsonl"]
    options = ["--answers", folder / "answers.jsonl", "--root", folder, *cache]
    process = start_answer(repository, "score", "mmvet", *options, **address)
    assert silent_server.asked.wait(60)
    code, seconds, error = stop(process, name)
    assert code == 128 + getattr(signal, name)
    assert seconds < LIMIT_SECONDS
    assert error.splitlines()[-1] == describe(name)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_reading_an_image_from_a_silent_address_ends(
    repository: Path, silent_server: ThreadingHTTPServer, name: str
) -> None:
    code = f"""
from llava.cli import load_images
from llava.errors import run_command
run_command(lambda: load_images(["http://127.0.0.1:{silent_server.server_port}/a.jpg"]))
"""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(repository), "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert silent_server.asked.wait(60)
    number, took, error = stop(process, name)
    assert number == 128 + getattr(signal, name)
    assert took < LIMIT_SECONDS
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.0])
def test_answering_ends_while_libraries_and_model_are_loaded(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path], tiny_checkpoint: Path, seconds: float, name: str
) -> None:
    options = ["--root", make_pope(40), "--answers", tmp_path / "answers.jsonl", "--model-path", tiny_checkpoint]
    process = start_answer(repository, "answer", "pope", *options)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    time.sleep(seconds)
    code, took, error = stop(process, name)
    assert code == 128 + getattr(signal, name)
    assert took < LIMIT_SECONDS
    assert error.splitlines()[-1] == describe(name)
    assert "Traceback" not in error


# --------------------------------------------------------------------------------------------------- the table of kills
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workers", [1, 2])
def test_answers_survive_kills_and_stops(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path], tiny_checkpoint: Path, workers: int, name: str
) -> None:
    folder, dice = make_pope(40), random.Random(name)
    environment = {"LLAVA_EVAL_ROOT": str(folder.parent), "LLAVA_EVAL_WORKERS": str(workers), "PYTHON": sys.executable}

    def start(run: str) -> tuple[subprocess.Popen, Path]:
        file = folder / "answers" / run / "merge.jsonl"
        options = ["--batch-size", "2", "--max-new-tokens", "6"]
        if workers == 1:
            fixed = ["answer", "pope", "--root", folder, "--answers", file, "--model-path", tiny_checkpoint]
            return start_answer(repository, *fixed, *options), file
        return start_answer(repository, "run", "pope", run, tiny_checkpoint, "--", *options, **environment), file

    process, undisturbed = start("undisturbed")
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    for number in range(ROUNDS):
        process, file = start(f"round {number}")
        parts = file.with_name(f"{file.name}.parts")
        # Enough answers that something could be lost, few enough that something is left to do.
        target = dice.randrange(1, 100)
        while sum(part.read_bytes().count(b"\n") for part in parts.glob("*.jsonl")) < target:
            assert process.poll() is None
            time.sleep(0.01)
        children = list_children(process.pid)
        assert len(children) == (workers if workers > 1 else 0)
        code, seconds, error = stop(process, name)
        end_soon(children)
        assert seconds < LIMIT_SECONDS
        assert not file.exists()
        assert code == (-signal.SIGKILL if name == "SIGKILL" else 128 + getattr(signal, name))
        if name != "SIGKILL":
            lines = (
                [line for line in error.splitlines() if line != describe(name)] if workers > 1 else error.splitlines()
            )
            assert lines[-1] == (describe(name) if workers == 1 else LAST_LINES[POPE])
        assert not list(file.parent.glob(".*.partial"))
        process, _ = start(f"round {number}")
        _, error = process.communicate(timeout=500)
        assert process.returncode == 0, error
        assert file.read_bytes() == undisturbed.read_bytes()


def list_children(pid: int) -> list[int]:
    """List the processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_judgements_survive_kills_and_stops(
    repository: Path, golden: Path, tmp_path: Path, endpoint: object, name: str
) -> None:
    folder, dice = golden / "oracle" / "mm_vet", random.Random(name)

    def reply(body: dict) -> str:
        time.sleep(0.05)
        return f"{sum(map(ord, body['messages'][-1]['content'])) % 11 / 10}"

    endpoint.respond = reply
    address = {"OPENAI_BASE_URL": endpoint.address, "OPENAI_API_KEY": "sk-made-up", "NO_PROXY": "127.0.0.1"}

    def start(run: str) -> tuple[subprocess.Popen, Path, Path]:
        cache, results = tmp_path / f"{run}.replies.jsonl", tmp_path / f"{run}.txt"
        options = ["--answers", folder / "answers.jsonl", "--root", folder, "--judge-cache", cache]
        return start_answer(repository, "score", "mmvet", *options, "--results", results, **address), cache, results

    process, cache, undisturbed = start("undisturbed")
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    count = len(cache.read_text().splitlines())
    for number in range(ROUNDS):
        process, cache, results = start(str(number))
        target = dice.randrange(1, count // 2)
        while not cache.exists() or cache.read_bytes().count(b"\n") < target:
            assert process.poll() is None
            time.sleep(0.01)
        code, seconds, error = stop(process, name)
        assert code == (-signal.SIGKILL if name == "SIGKILL" else 128 + getattr(signal, name))
        assert seconds < LIMIT_SECONDS
        assert not results.exists()
        before = cache.read_bytes()
        process, _, _ = start(str(number))
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        assert results.read_bytes() == undisturbed.read_bytes()
        assert cache.read_bytes().startswith(before)
        keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == count
