"""`--engine vllm`: a run on a server of its own. The torch engine stands in; tests/engines has the real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval import engine
from tests.eval.test_commands import answer, run

pytest.importorskip("fastapi")
pytest.importorskip("openai")
STARTING = "starting the engine vllm"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "list_engine_options", lambda spec: ["--engine=torch"])


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("stand_in")
def test_the_answers_file_is_that_of_the_plain_run_and_a_run_goes_on_where_it_stopped(
    make_pope, tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there: it is not for this machine
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder, plain, other = make_pope(), tmp_path / "plain.jsonl", tmp_path / "other.jsonl"
    options = ("--device", "cpu", "--reduce", "TRIM:0.5")
    assert answer(folder, plain, tiny_checkpoint, *options).returncode == 0
    for limit in (("--limit", 5), ()):
        done = answer(folder, other, tiny_checkpoint, *options, *limit, "--engine", "vllm")
        assert done.returncode == 0 and STARTING in done.stderr, done.stderr
    assert "5 of 18 questions are answered already" in done.stderr
    assert read_rows(other) == read_rows(plain)
    assert len({row["text"] for row in read_rows(plain)}) > 1
    assert json.loads((tmp_path / "other.jsonl.run.json").read_text())["engine"] == "vllm"

    assert STARTING not in answer(folder, other, tiny_checkpoint, *options, "--engine", "vllm").stderr
    done = answer(folder, other, tiny_checkpoint, *options)
    assert "held answers of a run with other settings" in done.stderr and "engine" in done.stderr
    assert read_rows(tmp_path / "other.jsonl.old-1") == read_rows(other) == read_rows(plain)


def test_a_server_that_does_not_start_is_told_in_one_line_and_leaves_old_answers_in_place(
    make_pope, tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "list_engine_options", lambda spec: ["--allow-files=no_such"])
    folder, answers = make_pope(), tmp_path / "answers.jsonl"
    assert answer(folder, answers, tiny_checkpoint, "--device", "cpu").returncode == 0
    done = answer(folder, answers, tiny_checkpoint, "--device", "cpu", "--engine", "vllm")
    reason = "--engine vllm: its server ended with code 2: --allow-files no_such: there is no such folder"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"error: {reason} ({answers}.engine_0.log)",
    )
    assert len(read_rows(answers)) == 18 and not (tmp_path / "answers.jsonl.old-1").exists()


def test_where_questions_fail_because_the_server_is_gone_the_line_says_why_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; sys.stderr.write('error: no memory\\nlast words\\n'); sys.exit(3)"
    with log.open("wb") as file, subprocess.Popen([sys.executable, "-c", code], stderr=file) as process:
        server = engine.Server(process, "http://127.0.0.1:9/v1", "vllm", log)
        with pytest.raises(InputError) as caught, server.explaining_its_end():
            process.wait()
            raise InputError("no connection")
    kept = "answers so far are kept: the same command goes on from there"
    assert str(caught.value) == f"--engine vllm: its server ended with code 3: no memory ({log}); {kept}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--engine", "vllm", "--endpoint", "http://127.0.0.1:9/v1"), "--engine: with --endpoint the server has one"),
        (("--tensor-parallel", "2"), "--tensor-parallel: only with --engine vllm"),
        (("--vllm-options", "{}"), "--vllm-options: only with --engine vllm"),
        (("--engine", "vllm", "--vllm-options", "3"), "--vllm-options: a JSON object is needed, not int"),
    ],
)
def test_options_out_of_place_are_refused(make_pope, tmp_path: Path, options: tuple, reason: str) -> None:
    done = answer(make_pope(), tmp_path / "answers.jsonl", Path("no-model"), *options)
    assert done.returncode == 2 and reason in done.stderr


def test_workers_of_run_have_as_many_gpus_as_a_model_takes(
    make_pope, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_EVAL_ROOT", str(make_pope().parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    monkeypatch.setenv("DRY_RUN", "1")
    options = ("--", "--engine", "vllm", "--tensor-parallel")
    done = run("run", "pope", "a-run", tiny_checkpoint, *options, "2")
    assert done.returncode == 0, done.stderr
    workers = [line for line in done.stdout.splitlines() if " answer " in line]
    assert [line.partition(" ")[0] for line in workers] == ["CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES=2,3"]
    assert all("--engine vllm --tensor-parallel 2" in line for line in workers)
    done = run("run", "pope", "a-run", tiny_checkpoint, *options, "8")
    assert done.returncode == 2 and "--tensor-parallel 8: there are 5 GPUs" in done.stderr
