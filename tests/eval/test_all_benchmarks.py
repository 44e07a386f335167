"""`eval_all_benchmarks.sh`: models, benchmarks, failures, the table at the end; with a stand-in for Python."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from llava.eval.benchmarks import BENCHMARKS
from tests.eval.test_promises import FOLDERS as ORACLE_FOLDERS
from tests.eval.test_promises import draw_images
from tests.eval.test_scripts import ENVIRONMENT, NO_GPU

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="the table is plotted with matplotlib")

ALL_SCRIPT = (Path(__file__).parents[2] / "eval_all_benchmarks.sh").read_text(encoding="utf-8")
LISTED = re.search('^ALL_BENCHMARKS="(.*)"$', ALL_SCRIPT, re.MULTILINE)[1].split()
"""The benchmarks that `eval_all_benchmarks.sh` runs; the package may have more."""
FOLDERS = {"gqa": "gqa", "pope": "pope", "mme": "MME"}

# Plays `python -m llava.eval`: `answer` fails where a file says so, `score` writes what the real one would write. `run`
# and `report` are the real ones.
PYTHON = """#!{python}
import json, os, subprocess, sys
arguments = sys.argv[1:]
option = lambda name: arguments[arguments.index(name) + 1]
command, task = arguments[2], arguments[3]
if command == "run":
    os.execv(sys.executable, [sys.executable, *arguments])
with open("{log}", "a") as log:
    log.write(" ".join(arguments) + "\\n")
if command == "report":
    sys.exit(subprocess.run([sys.executable, *arguments]).returncode)
model = option("--answers").split("/answers/")[1].split("/")
if command == "answer" and os.path.exists("{fails}"):
    sys.exit(json.load(open("{fails}")).get(task, 0))
if command == "score" and task == "mme":
    sys.exit(4)
if command == "score":
    row = {{"pope": "POPE (Avg. F1)", "gqa": "GQA"}}[task]
    headline = 80.0 if "plain" in option("--answers") else 76.0
    result = {{"task": task, "row": row, "headline": headline, "columns": {{"X": headline}}, "count": 5, "missing": 0}}
    result |= {{"model_id": "m", "tokens": {{"mean_tokens": 12.5, "mean_patches": 64.0}}}}
    os.makedirs(os.path.dirname(option("--json")), exist_ok=True)
    json.dump(result, open(option("--json"), "w"))
    os.makedirs(os.path.dirname(option("--results")), exist_ok=True)
    open(option("--results"), "a").write(f"{{row}}\\t{{headline:.2f}}\\n")
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two checkpoints, data of three benchmarks, and a stand-in for Python."""
    for name in ("llava", "llava-trim"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    for folder in FOLDERS.values():
        (tmp_path / "data" / folder).mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, log=tmp_path / "log.txt", fails=tmp_path / "fails.json"))
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def run_all(repository: Path, here: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        fixed = {"LLAVA_EVAL_ROOT": "data", "PYTHON": "./python", "RESULTS": "out", "BENCHMARKS": "gqa pope"}
        return subprocess.run(
            ["bash", str(repository / "eval_all_benchmarks.sh"), *arguments],
            cwd=here,
            env={**ENVIRONMENT, **NO_GPU, **fixed, **environment},
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )

    return run


MODELS = ("plain=models/llava --reduce none", "trim=models/llava-trim@lmsys/vicuna --reduce TRIM:-1")


def test_every_benchmark_of_every_model_ends_in_one_table(run_all: Callable, here: Path) -> None:
    done = run_all(*MODELS)
    assert done.returncode == 0, done.stderr
    assert "| GQA            | 80.00 | 76.00  95.0% |" in done.stdout
    assert "| Average        |     - |        95.0% |" in done.stdout
    assert "| Tokens, mean   | 12.50 |        12.50 |" in done.stdout
    markdown = (here / "out" / "table.md").read_text()
    assert "| GQA            | 80.00 |     12.50 | 76.00 |  95.00 |    12.50 |" in markdown
    assert "| Average        |     - |     12.50 |     - |  95.00 |    12.50 |" in markdown
    assert (here / "out" / "plain.txt").read_text() == "GQA\t80.00\nPOPE (Avg. F1)\t80.00\n"
    assert (here / "out" / "trim.txt").read_text() == "GQA\t76.00\nPOPE (Avg. F1)\t76.00\n"
    table = json.loads((here / "out" / "table.json").read_text())
    assert table["average"]["trim"] == {"retained_percent": 95.0, "num_benchmarks": 2, "mean_tokens": 12.5}
    for suffix in ("md", "tex", "png"):
        assert (here / "out" / f"table.{suffix}").stat().st_size > 100
    assert json.loads((here / "out" / "trim" / "pope.json").read_text())["headline"] == 76.0


def test_options_of_a_model_and_of_all_reach_the_commands(run_all: Callable, here: Path) -> None:
    assert run_all(*MODELS, "--", "--batch-size", "16", "--allow-partial", BENCHMARKS="pope").returncode == 0
    answers = [line for line in (here / "log.txt").read_text().splitlines() if " answer " in line]
    assert len(answers) == 2
    assert answers[0].endswith(f"--model-path {here}/models/llava --reduce none --batch-size 16")
    assert answers[1].endswith("llava-trim --model-base lmsys/vicuna --reduce TRIM:-1 --batch-size 16")


def test_a_failed_benchmark_does_not_stop_the_others_and_is_named(run_all: Callable, here: Path) -> None:
    (here / "out" / "plain").mkdir(parents=True)
    (here / "out" / "plain" / "gqa.json").write_text('{"an": "old number"}')
    (here / "fails.json").write_text('{"gqa": 2}')
    done = run_all(*MODELS)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: failed: gqa of plain, gqa of trim"
    assert "| POPE (Avg. F1) | 80.00 |" in done.stdout
    assert "GQA" not in done.stdout
    assert not (here / "out" / "plain" / "gqa.json").exists()


def test_what_only_a_server_scores_is_named_and_is_no_failure(run_all: Callable) -> None:
    done = run_all(*MODELS, BENCHMARKS="mme pope")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "for a server to score: mme of plain, mme of trim"


def test_a_benchmark_without_data_is_named_before_anything_runs(run_all: Callable, here: Path) -> None:
    done = run_all(*MODELS, BENCHMARKS="pope seed")
    first = done.stderr.splitlines()[0]
    assert first.startswith(
        f"seed: error: no folder {here}/data/seed_bench: `python -m llava.eval download seed` fetches"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: failed: seed of plain, seed of trim"
    assert "| POPE (Avg. F1) |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["plain=models/none"], {}, "error: no model at models/none: give a checkpoint folder or a hub id"),
        (["models/llava@./nowhere"], {}, "error: no model at ./nowhere"),
        (["a=models/llava", "a=models/llava-trim"], {}, "error: two models are called a; give each its own NAME=PATH"),
        (["a b=models/llava"], {}, "error: a model is NAME=PATH, and NAME, which names files, has letters"),
        (["a\nb=models/llava"], {}, "error: a model is NAME=PATH, and NAME, which names files, has letters"),
        (["--reduce", "none"], {}, "error: options such as --reduce go after --"),
        (["models/llava"], {"BENCHMARKS": "popp"}, "error: no benchmark popp; known: vqav2 gqa vizwiz"),
        (["models/llava"], {"LLAVA_EVAL_ROOT": "nowhere"}, "error: no folder {here}/nowhere: playground/data/eval/"),
        (["models/llava"], {"BENCHMARKS": "seed mmvet"}, "error: nothing to do: see above"),
        (["models/llava", "--", "--split"], {}, "error: nothing to do: see above"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_runs(
    run_all: Callable, here: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    done = run_all(*arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(words.format(here=here))
    assert not (here / "log.txt").exists()


def test_a_dry_run_prints_every_command_and_runs_none(run_all: Callable, here: Path) -> None:
    done = run_all(*MODELS, DRY_RUN="1", PYTHON="python")
    assert done.returncode == 0, done.stderr
    words = [re.sub(r"^python -m llava.eval ", "", line).split()[0] for line in done.stdout.splitlines()]
    gqa, pope = ["rm", "answer", "export", "score"], ["rm", "answer", "score"]
    assert words == [*gqa, *pope, *gqa, *pope, "report"]
    assert f"plain={here}/out/plain/gqa.json" in done.stdout.splitlines()[-1]
    assert not (here / "out").exists()


def test_without_arguments_the_models_of_the_list_are_run(run_all: Callable) -> None:
    done = run_all(DRY_RUN="1", BENCHMARKS="pope")
    assert "--model-path liuhaotian/llava-v1.5-7b --reduce TRIM:-1" in done.stdout


def test_help_tells_how_to_write_a_model(run_all: Callable) -> None:
    done = run_all("--help")
    assert done.returncode == 0
    assert "A model is NAME=PATH[@BASE][ OPTIONS]" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_real_scripts_answer_score_and_tabulate_every_listed_benchmark(
    run_all: Callable, here: Path, golden: Path, tiny_checkpoint: Path
) -> None:
    shutil.rmtree(here / "data")
    for name in LISTED:
        root = here / "data" / BENCHMARKS[name].folders[0]
        shutil.copytree(golden / "oracle" / ORACLE_FOLDERS.get(name, name), root)
        draw_images(BENCHMARKS[name], root, spare_last=False)
    options = ["--", "--batch-size", "32", "--max-new-tokens", "4", "--judge", "exact"]
    # One model: each costs a start of Python and a load of the checkpoint per benchmark.
    model = f"trim={tiny_checkpoint} --reduce TRIM:-1"
    done = run_all(model, *options, PYTHON=sys.executable, BENCHMARKS=" ".join(LISTED))
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((here / "out" / "table.json").read_text())
    assert [group["task"] for group in table["benchmarks"]] == [name for name in BENCHMARKS if name in LISTED]
    assert 1 <= table["average"]["trim"]["mean_tokens"] < 36
    lines = (here / "out" / "trim.txt").read_text().splitlines()
    assert len(lines) == len(LISTED)
    assert all(re.fullmatch(r"[^\t]+\t-?\d+\.\d\d", line) for line in lines)
    rows = {line.split("\t")[0] for line in lines}
    assert rows >= {"LLaVA-Bench (Wild) [judge: exact]", "MM-Vet [judge: exact]"}
