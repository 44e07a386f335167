"""The benchmark scripts: what they would run (dry), and what they do (slow)."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.predictions import read_answers

ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "DRY_RUN")}
# Real runs use the interpreter that runs the tests, wherever the PATH points.
ENVIRONMENT["PYTHON"] = sys.executable
# `python` is that interpreter, too.
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run_script(
    repository: Path, name: str, *arguments: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(repository / "scripts" / "v1_5" / "eval" / name), *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **NO_GPU, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def dry_run(repository: Path, cwd: Path, *arguments: object, script: str = "pope.sh", **environment: str) -> list[str]:
    done = run_script(repository, script, *arguments, cwd=cwd, **{"DRY_RUN": "1", "PYTHON": "python", **environment})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(str(repository), "REPO").replace(str(cwd), "HERE").splitlines()
    return [line.removeprefix("python -m llava.eval ") for line in lines]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a checkpoint `models/llava` in it."""
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "models" / "llava" / "config.json").write_text("{}")
    return tmp_path


POPE = "REPO/playground/data/eval/pope"
MERGED = f"{POPE}/answers/run-1/merge"


def test_without_gpu_one_worker_answers_and_its_answers_are_scored(repository: Path, here: Path) -> None:
    assert dry_run(repository, here, "run-1", "models/llava") == [
        f"answer pope --root {POPE} --answers {MERGED}.jsonl --model-path HERE/models/llava",
        f"score pope --answers {MERGED}.jsonl --root {POPE} --json {MERGED}.scores.json",
    ]


def test_every_visible_gpu_gets_a_worker(repository: Path, here: Path) -> None:
    lines = dry_run(repository, here, "run-1", "liuhaotian/llava-v1.5-7b", CUDA_VISIBLE_DEVICES="2,5")
    command = f"python -m llava.eval answer pope --root {POPE} --answers {MERGED}.jsonl"
    assert lines[:2] == [
        f"CUDA_VISIBLE_DEVICES={gpu} {command} --model-path liuhaotian/llava-v1.5-7b --workers 2 --worker {number}"
        for number, gpu in enumerate((2, 5))
    ]
    assert len(lines) == 3


def test_results_base_model_and_options_reach_their_commands(repository: Path, here: Path) -> None:
    options = ["--", "--batch-size", "16", "--reduce", "none", "--allow-partial"]
    answer, score = dry_run(repository, here, "run-1", "models/llava", "my results.tsv", "lmsys/vicuna", *options)
    assert answer.endswith("--model-path HERE/models/llava --model-base lmsys/vicuna --batch-size 16 --reduce none")
    assert score.endswith(rf"--root {POPE} --allow-partial --json {MERGED}.scores.json --results HERE/my\ results.tsv")


def test_options_go_to_the_commands_they_belong_to(repository: Path, here: Path) -> None:
    (here / "parquet").mkdir()
    options = ["--judge=exact", "--judge-model", "some-model", "--judge-cache", "replies.jsonl", "--limit", "3"]
    options += ["--source", "hub", "--hub-dataset", "parquet"]
    answer, score = dry_run(repository, here, "run-1", "models/llava", "--", *options)
    data = "--source hub --hub-dataset HERE/parquet"
    assert answer.endswith(f"--model-path HERE/models/llava {data} --limit 3")
    judge = "--judge exact --judge-model some-model --judge-cache HERE/replies.jsonl"
    assert score.endswith(f"{data} --json {MERGED}.scores.json {judge}")


def test_another_split_has_answers_of_its_own(repository: Path, here: Path) -> None:
    options = ["--", "--split", "a/b"]
    answer, _, score = dry_run(repository, here, "run-1", "models/llava", *options, script="mmbench.sh")
    merged = "REPO/playground/data/eval/mmbench/answers/mmbench_dev_20230712/run-1/merge"
    assert f"--answers {merged}.a_b.jsonl " in answer
    assert answer.endswith("--split a/b")
    assert f"--split a/b --json {merged}.a_b.scores.json" in score


def test_the_scores_file_may_be_named(repository: Path, here: Path) -> None:
    assert dry_run(repository, here, "run-1", "models/llava", LLAVA_EVAL_JSON="x.json")[1].endswith(
        "--json HERE/x.json"
    )


@pytest.mark.parametrize(
    ("word", "script", "folder"),
    [
        ("vqav2", "vqav2", "vqav2"),
        ("gqa", "gqa", "gqa"),
        ("vizwiz", "vizwiz", "vizwiz"),
        ("sqa", "sqa", "scienceqa"),
        ("textvqa", "textvqa", "textvqa"),
        ("textvqa", "testvqa", "textvqa"),
        ("pope", "pope", "pope"),
        ("mme", "mme", "MME"),
        ("mmbench", "mmbench", "mmbench"),
        ("mmbench_cn", "mmbench_cn", "mmbench"),
        ("seed", "seed", "seed_bench"),
        ("llavabench", "llavabench", "llava-bench-in-the-wild"),
        ("mmvet", "mmvet", "mm-vet"),
    ],
)
def test_every_benchmark_has_its_script(repository: Path, here: Path, word: str, script: str, folder: str) -> None:
    root = here / "data" / folder
    root.mkdir(parents=True)
    environment = {"DRY_RUN": "1", "PYTHON": "python", "LLAVA_EVAL_ROOT": "data"}
    done = run_script(repository, f"{script}.sh", "run-1", "models/llava", "r.txt", cwd=here, **environment)
    assert done.returncode == 0, done.stderr
    answer, *_, score = done.stdout.splitlines()
    assert answer.startswith(f"python -m llava.eval answer {word} --root {root} --answers {root}/")
    assert "run-1" in answer
    assert score.startswith(f"python -m llava.eval score {word} --answers {root}/")
    assert score.endswith(f"--results {here}/r.txt")


def test_an_empty_base_model_is_no_base_model(repository: Path, here: Path) -> None:
    answer, score = dry_run(repository, here, "run-1", "models/llava", "", "")
    assert "--model-base" not in answer
    assert "--results" not in score


def test_a_folder_of_checkpoints_is_searched_for_the_name(repository: Path, here: Path) -> None:
    answer, _ = dry_run(repository, here, "llava", "models")
    assert answer.endswith("--model-path HERE/models/llava")


def test_another_data_root_and_python_are_taken_from_the_environment(repository: Path, here: Path) -> None:
    (here / "env" / "bin").mkdir(parents=True)
    (here / "env" / "bin" / "python").symlink_to(write_python(here, "").get("PYTHON"))
    lines = dry_run(repository, here, "run-1", "models/llava", LLAVA_EVAL_ROOT="data", PYTHON="env/bin/python")
    assert lines[0].startswith(
        "HERE/env/bin/python -m llava.eval answer pope --root HERE/data/pope --answers HERE/data/"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "error: two to four arguments are needed, not 0"),
        (["a"], "error: two to four arguments are needed, not 1"),
        (["a", "b", "c", "d", "e"], "error: two to four arguments are needed, not 5"),
        (["a", "models/llava", "--limit", "3"], "error: options such as --limit go after --"),
        (["a", "models/absent"], "error: no model at models/absent: give a checkpoint folder or a hub id"),
        (["a", "models/llava", "--", "--split"], "error: --split needs a value"),
        (["a", "models/none/here"], "error: no model at models/none/here: give a checkpoint folder or a hub id"),
        (["a", "models/llava", "r.tsv", "./nowhere"], "error: no model at ./nowhere"),
        (["a", "models/llava"], "error: no folder {here}/data/pope: `python -m llava.eval download pope`"),
        (["a", "models/llava", "--", "--split", "x"], "error: pope has one split only: leave out --split x"),
        (["../../a", "models/llava"], "error: CKPT '../../a' names the run's files: give a plain name"),
        (["/a", "models/llava"], "error: CKPT '/a' names the run's files: give a plain name"),
        (
            ["a", "models/llava", "--", "--answers", "x"],
            "error: --answers does not go after --: `run` sets it, from CKPT",
        ),
        (
            ["a", "models/llava", "--", "--json=x"],
            "error: --json does not go after --: `run` sets it, from LLAVA_EVAL_",
        ),
        (["a", "models/llava", "--", "--worker", "1"], "error: --worker does not go after --: `run` sets it, from "),
    ],
)
def test_mistakes_end_in_one_line(repository: Path, here: Path, arguments: list[str], words: str) -> None:
    done = run_script(repository, "pope.sh", *arguments, cwd=here, LLAVA_EVAL_ROOT="data")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(words.format(here=here))


@pytest.mark.parametrize(
    ("results", "numbers", "words"),
    [
        ("models", "", "error: cannot write {here}/models: it is a folder; name a regular file"),
        ("/dev/null", "", "error: cannot write /dev/null: it is a device; name a regular file"),
        ("python/r.tsv", "", "error: cannot write {here}/python/r.tsv: {here}/python is not a folder"),
        ("", "models", "error: cannot write {here}/models: it is a folder; name a regular file"),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_a_question_is_answered(
    repository: Path, here: Path, results: str, numbers: str, words: str
) -> None:
    environment = write_python(here, "echo started")
    arguments = ["run-1", "models/llava", results]
    done = run_script(repository, "pope.sh", *arguments, cwd=here, LLAVA_EVAL_JSON=numbers, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{words.format(here=here)}\n")


def test_a_python_that_is_not_there_is_refused_in_one_line(repository: Path, here: Path) -> None:
    environment = {**ENVIRONMENT, **NO_GPU, **write_python(here, ""), "PYTHON": "/nowhere/python"}
    done = subprocess.run(
        [sys.executable, "-m", "llava.eval", "run", "pope", "run-1", "models/llava"],
        cwd=here,
        env={**environment, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=/nowhere/python is no program: unset it, or name a Python\n"


def test_a_wrong_number_of_workers_ends_in_one_line(repository: Path, here: Path) -> None:
    environment = write_python(here, "exit 0")
    done = run_script(repository, "pope.sh", "run-1", "models/llava", cwd=here, LLAVA_EVAL_WORKERS="two", **environment)
    assert (done.returncode, done.stderr) == (2, "error: LLAVA_EVAL_WORKERS must be a number from 1 on, not two\n")


def test_a_name_that_the_shell_or_a_pattern_could_misread_is_taken_as_it_is(repository: Path, here: Path) -> None:
    answer, _ = dry_run(repository, here, "R&D {run} 50%", "models/llava")
    assert r"/answers/R\&D\ \{run\}\ 50%/merge.jsonl " in answer


NAMES = (
    *("R&D", "50%", "%s", "a\\b", "a b", " a ", "l\u00e4va-\u6a21\u578b", "{run}", "$(touch x)", "`touch x`", "*"),
    *("it's", '"', "a;b", "~", "a#b", "a/b", "..a", "!"),
)
BAD_NAMES = (
    *("../../../x", "..", ".", "a/../b", "/tmp/x", "a//b", "a/", "a\nb", "a\tb", "a\x1b[31mb", "\x7f"),
    *("a\u2028b", "a\u202eb"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_printable_is_the_folder_of_the_answers(repository: Path, here: Path, name: str) -> None:
    (here / "data" / "pope").mkdir(parents=True)
    environment = {"DRY_RUN": "1", "LLAVA_EVAL_ROOT": "data"}
    done = run_script(repository, "pope.sh", name, "models/llava", cwd=here, **environment)
    assert done.returncode == 0, done.stderr
    answer, score = map(shlex.split, done.stdout.splitlines())
    file = f"{here}/data/pope/answers/{name}/merge.jsonl"
    assert answer[answer.index("--answers") + 1] == score[score.index("--answers") + 1] == file
    assert not list(here.glob("**/x"))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_elsewhere_or_cannot_be_printed_is_refused(repository: Path, here: Path, name: str) -> None:
    (here / "data" / "pope").mkdir(parents=True)
    done = run_script(repository, "pope.sh", name, "models/llava", cwd=here, LLAVA_EVAL_ROOT="data")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: CKPT '") and "give a plain name" in line
    assert done.stderr.isprintable() or done.stderr.removesuffix("\n").isprintable()
    assert sorted(path.name for path in here.rglob("*")) == ["config.json", "data", "llava", "models", "pope"]


@pytest.mark.parametrize("workers", ["100000", "9" * 5000])
def test_a_number_of_workers_without_sense_is_refused(repository: Path, here: Path, workers: str) -> None:
    environment = write_python(here, "exit 0")
    done = run_script(
        repository, "pope.sh", "run-1", "models/llava", cwd=here, LLAVA_EVAL_WORKERS=workers, **environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: LLAVA_EVAL_WORKERS must be at most 256, not ")


@pytest.mark.parametrize("arguments", [["--help"], ["run-1", "models/llava", "--", "--help"], ["a", "b", "--", "-h"]])
def test_help_tells_the_usage(repository: Path, here: Path, arguments: list[str]) -> None:
    done = run_script(repository, "pope.sh", *arguments, cwd=here)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash scripts/v1_5/eval/pope.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE]")


def write_python(here: Path, body: str) -> dict[str, str]:
    """Put a stand-in for Python in place, and data for it; `$3` is the command of llava.eval. `run` is the real one."""
    python = here / "python"
    python.write_text(f'#!/usr/bin/env bash\n[[ $3 == run ]] && exec {sys.executable} "$@"\n{body}\n')
    python.chmod(0o755)
    (here / "data" / "pope").mkdir(parents=True, exist_ok=True)
    return {"LLAVA_EVAL_ROOT": "data", "PYTHON": str(python)}


def test_where_only_a_server_scores_the_upload_is_written_and_named(repository: Path, here: Path) -> None:
    environment = write_python(
        here,
        '[[ $3 == score ]] && echo "server only" >&2 && exit 4\n'
        '[[ $3 == export ]] && echo "upload: $*" && echo "send it to X" >&2\nexit 0',
    )
    done = run_script(repository, "pope.sh", "run-1", "models/llava", "r.txt", cwd=here, **environment)
    assert done.returncode == 0
    answers = f"{here}/data/pope/answers/run-1/merge"
    assert done.stdout == (
        f"upload: -m llava.eval export pope --out {answers}.upload --answers {answers}.jsonl --root {here}/data/pope\n"
    )
    assert done.stderr == "server only\nsend it to X\n"
    assert not (here / "r.txt").exists()


def test_without_a_judge_the_answers_are_ready_and_the_script_fails(repository: Path, here: Path) -> None:
    environment = write_python(here, '[[ $3 == score ]] && echo "error: no judge" >&2 && exit 2\nexit 0')
    done = run_script(repository, "pope.sh", "run-1", "models/llava", cwd=here, **environment)
    assert done.returncode == 2
    answers = f"{here}/data/pope/answers/run-1/merge.jsonl"
    assert done.stderr == f"error: no judge\npope: not scored; the answers are ready in {answers}\n"


def test_a_worker_that_dies_fails_the_script_by_name_and_a_rerun_goes_on(repository: Path, here: Path) -> None:
    environment = write_python(here, '[[ "$*" == *"--worker 1"* ]] && echo "it hurts" >&2 && kill -9 $$\nexit 0')
    done = run_script(repository, "pope.sh", "run-1", "models/llava", cwd=here, LLAVA_EVAL_WORKERS="2", **environment)
    assert done.returncode == 137
    assert "it hurts" in done.stderr
    assert "error: pope worker 1 (CPU) failed with exit code 137" in done.stderr
    assert done.stderr.splitlines()[-1] == "pope: not scored; run the same command again to go on where it stopped"


def test_after_a_mistake_nobody_is_told_to_run_the_same_command_again(repository: Path, here: Path) -> None:
    environment = write_python(here, '[[ $3 == answer ]] && echo "error: no weights" >&2 && exit 2\nexit 0')
    done = run_script(repository, "pope.sh", "run-1", "models/llava", cwd=here, **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no weights",
        "error: pope worker 0 (CPU) failed with exit code 2",
        "pope: not scored",
    ]


def test_unanswered_questions_stop_the_script_unless_partial_scores_are_allowed(repository: Path, here: Path) -> None:
    options = write_python(here, '[[ $3 == answer ]] && exit 3\necho "$3"')
    refused = run_script(repository, "pope.sh", "run-1", "models/llava", cwd=here, **options)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "error: pope worker 0 (CPU) could not answer some questions" in refused.stderr
    allowed = run_script(repository, "pope.sh", "run-1", "models/llava", "--", "--allow-partial", cwd=here, **options)
    assert (allowed.returncode, allowed.stdout) == (3, "score\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_script_ends_all_workers(repository: Path, here: Path, name: str) -> None:
    pids = here / "pids"
    environment = write_python(here, f'echo $$ >>"{pids}"; exec sleep 60')
    script = repository / "scripts" / "v1_5" / "eval" / "pope.sh"
    process = subprocess.Popen(
        ["bash", str(script), "run-1", "models/llava"],
        cwd=here,
        env={**ENVIRONMENT, **NO_GPU, **environment, "LLAVA_EVAL_WORKERS": "3"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not pids.exists() or pids.read_text().count("\n") < 3:
        time.sleep(0.02)
    number = getattr(signal, name)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_folder_of_a_benchmark_is_found_without_being_named(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path]
) -> None:
    folder = make_pope()
    command = [sys.executable, "-m", "llava.eval", "score", "pope", "--answers", "none.jsonl"]
    environment = {**ENVIRONMENT, "LLAVA_EVAL_ROOT": folder.parent.name, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: no such file: none.jsonl")
    environment["LLAVA_EVAL_ROOT"] = "nowhere"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f"error: no such file: {tmp_path}/nowhere/pope/llava_pope_test.jsonl")


@pytest.mark.slow
def test_the_script_answers_and_scores_alone_and_with_two_workers(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    folder = make_pope(6)
    results = tmp_path / "results" / "all.tsv"
    options = {"LLAVA_EVAL_ROOT": str(folder.parent), "PYTHON": sys.executable}
    lines = []
    for name, workers in (("one", "1"), ("two", "2")):
        arguments = [name, tiny_checkpoint, results, "--", "--max-new-tokens", "8", "--batch-size", "4"]
        done = run_script(repository, "pope.sh", *arguments, cwd=tmp_path, LLAVA_EVAL_WORKERS=workers, **options)
        assert done.returncode == 0, done.stderr
        assert "36/36" in done.stderr or workers == "2"
        lines.append(done.stdout)
    assert re.fullmatch(r"POPE \(Avg\. F1\)\t\d+\.\d\d\n", lines[0])
    assert results.read_text() == lines[0] * 2
    answers = [(folder / "answers" / name / "merge.jsonl").read_bytes() for name in ("one", "two")]
    assert answers[0] == answers[1]
    scores = json.loads((folder / "answers" / "two" / "merge.scores.json").read_text())
    assert (scores["count"], scores["missing"]) == (36, 0)
    assert 0 < scores["tokens"]["mean_tokens"] < scores["tokens"]["mean_patches"] == 36


@pytest.mark.slow
def test_a_model_killed_in_mid_run_and_resumed_writes_the_undisturbed_file(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    # Enough questions that no machine answers the rest of them between the look at the file and the kill.
    folder, dice = make_pope(40), random.Random(7)

    def start(file: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "llava.eval", "answer", "pope", "--root", folder, "--answers", file]
        command += ["--model-path", tiny_checkpoint, "--batch-size", "2"]
        return subprocess.Popen(list(map(str, command)), cwd=repository, env=ENVIRONMENT, stderr=subprocess.DEVNULL)

    undisturbed, killed = tmp_path / "undisturbed.jsonl", tmp_path / "killed.jsonl"
    assert start(undisturbed).wait(300) == 0
    part = tmp_path / "killed.jsonl.parts" / "0.jsonl"
    for target in (1, 40, 90):
        process = start(killed)
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < target):
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not killed.exists()
    assert start(killed).wait(300) == 0
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert len(read_answers(killed)) == 240
