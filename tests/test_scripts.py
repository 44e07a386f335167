"""The README's commands, run for real on the kept pocket checkpoints: the slow tier."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.signals import is_alive

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "playground" / "shapes" / "checkpoints"
DEMO = (ROOT / "scripts" / "demo.sh").read_text(encoding="utf-8")
ALL = re.search(r"^BENCHMARKS=\$\{BENCHMARKS:-(.*)\}$", DEMO, re.MULTILINE)[1]
"""The benchmarks that the demo runs; the package may have more."""
LISTED = os.environ.get("LLAVA_DEMO_BENCHMARKS", "pope mmbench").replace("all", ALL).split()
"""Those that are run here: one answered by yes or no, one by a letter. New weights are tried
on all of them: LLAVA_DEMO_BENCHMARKS=all. `eval/test_all_benchmarks.py` runs all scripts."""
IMAGES = 60  # per benchmark; POPE asks 18 questions about a picture with three objects


def run(command: list[str], timeout: int = 900, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The output folder of one run of the demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run(
        ["bash", "scripts/demo.sh"],
        timeout=1500,
        DEMO_OUT=str(folder),
        DEMO_IMAGES=str(IMAGES),
        BENCHMARKS=" ".join(LISTED),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def runs(demo) -> dict[str, dict[str, dict]]:
    """Results by run and benchmark."""
    return {
        name: {file.stem: json.loads(file.read_text()) for file in sorted((demo[0] / name).glob("*.json"))}
        for name in ("plain", "plain-trim", "finetuned-trim", "finetuned-random", "plain-random")
    }


def accuracy(result: dict) -> float:
    return result["scores"]["average_accuracy"]


@pytest.mark.slow
def test_demo_ends_with_a_row_per_benchmark_and_the_pictures_it_names(demo, runs):
    folder, printed = demo
    for word in (
        "no reduction",
        "TRIM:-1, training-free",
        "TRIM:-1, finetuned",
        "Random",
        "POPE",
        "MMBench",
    ):
        assert word in printed
    table = json.loads((folder / "table.json").read_text())
    assert {row["task"] for row in table["benchmarks"]} == set(LISTED)
    assert all(set(results) == set(LISTED) for name, results in runs.items() if name != "plain-random")
    assert all(len((folder / f"{name}.txt").read_text().splitlines()) == len(runs[name]) for name in runs)
    for word in ("Accuracy", "F1", "Tokens", "Random, training-free"):
        assert word in printed
    assert len(json.loads((folder / "pope.json").read_text())["POPE (Avg. F1)"]) == 5
    for number in range(3):
        assert (folder / f"kept_{number}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_ends_with_a_command_that_works_as_it_is_printed(demo):
    folder, printed = demo
    done = run(["bash", "-c", printed.splitlines()[-1]])
    assert done.returncode == 0, done.stderr
    assert "full model" in done.stdout and (folder / "coffee.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_script_ends_what_it_has_started(number):
    # A function in the background, as in demo.sh, with a command of its own below it.
    script = """
        source scripts/lib/common.sh; pass_signals_on
        work() { bash -c 'echo $$; sleep 600; :'; }
        work & wait $!
    """
    with subprocess.Popen(["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        below = int(running.stdout.readline())
        running.send_signal(number)
        _, told = running.communicate(timeout=20)
    assert running.returncode == 128 + number and f"error: stopped by {number.name}; " in told.decode()
    assert not is_alive(below)


@pytest.mark.parametrize("name", ["demo", "test", "results"])
def test_a_script_explains_itself_and_starts_nothing(name):
    done = run(["bash", f"scripts/{name}.sh", "--help"], PYTHON="/bin/false")
    assert done.returncode == 0 and f"bash scripts/{name}.sh" in done.stdout and done.stderr == ""


def test_the_demo_refuses_what_it_would_not_read():
    done = run(["bash", "scripts/demo.sh", "--images", "3"], PYTHON="/bin/false")
    assert done.returncode == 2 and "takes no arguments, not --images: DEMO_IMAGES" in done.stderr


@pytest.mark.parametrize(("has_packages", "used"), [(True, "bin/python"), (False, "none")])
def test_an_active_environment_is_used_if_it_has_the_packages(tmp_path, has_packages, used):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$*" = "llava/packages.py matplotlib" ] && exit {0 if has_packages else 2}\n')
    python.chmod(0o755)
    script = "source scripts/lib/environment.sh; prefer_active_environment matplotlib; echo ${PYTHON:-none}"
    done = run(["bash", "-c", script], PYTHON="", VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 0 and done.stdout.endswith(f"{used}\n")


@pytest.mark.slow
@pytest.mark.parametrize("task", LISTED)
def test_finetuned_trim_reads_at_most_a_quarter_of_the_tokens(runs, task):
    tokens = runs["finetuned-trim"][task]["tokens"]
    assert tokens["mean_tokens"] <= 0.25 * tokens["mean_patches"]


@pytest.mark.slow
def test_finetuned_trim_keeps_at_least_97_percent_of_the_plain_accuracy_on_pope(runs):
    assert accuracy(runs["finetuned-trim"]["pope"]) >= 0.97 * accuracy(runs["plain"]["pope"])


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["plain-random", "finetuned-random"])
def test_finetuned_trim_beats_random_patches_at_the_same_budget_by_eight_points_in_the_demo(runs, baseline):
    trim, random = runs["finetuned-trim"]["pope"], runs[baseline]["pope"]
    assert random["tokens"]["mean_tokens"] >= 0.99 * trim["tokens"]["mean_tokens"]
    assert accuracy(trim) >= accuracy(random) + 8


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> dict[str, dict]:
    """POPE on pictures that no choice of a checkpoint looked at, more of them than the demo has."""
    folder = tmp_path_factory.mktemp("unseen")
    numbers = {"train-images": 0, "calibrate-images": 0, "eval-images": 200, "seed": 101}
    options = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    done = run(
        [sys.executable, "-m", "playground.shapes.generate", "--out", str(folder), "--benchmarks", "pope", *options]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = {}
    for name, checkpoint, reduction in (
        ("finetuned-trim", "llava-shapes-trim", "TRIM:-1"),
        ("finetuned-random", "llava-shapes-trim", "Random:14"),
        ("plain-random", "llava-shapes", "Random:14"),
    ):
        done = run(["bash", "scripts/v1_5/eval/pope.sh", name, str(CHECKPOINTS / checkpoint), "--",
                    "--reduce", reduction], LLAVA_EVAL_ROOT=str(folder / "eval"),
                   LLAVA_EVAL_JSON=str(folder / f"{name}.json"))  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        results[name] = json.loads((folder / f"{name}.json").read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["plain-random", "finetuned-random"])
def test_finetuned_trim_beats_random_patches_at_the_same_budget_by_eight_points_on_unseen_pictures(unseen, baseline):
    trim, random = unseen["finetuned-trim"], unseen[baseline]
    assert random["tokens"]["mean_tokens"] >= trim["tokens"]["mean_tokens"]
    assert accuracy(trim) >= accuracy(random) + 8


def read_demo_table(document: Path) -> dict[str, list[float]]:
    """Rows of the demo's table by name: the scores of `COLUMNS`, then the tokens kept."""
    text = document.read_text(encoding="utf-8")
    rows = re.search(r"^\| benchmark \(metric\) \| no reduction .*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    return {
        name.removesuffix(" [judge: exact]"): [float(number.removesuffix(" of 64")) for number in numbers]
        for name, *numbers in cells
    }


COLUMNS = ("plain", "plain-trim", "finetuned-trim", "finetuned-random")
README_TABLE = read_demo_table(ROOT / "README.md")
MEANS = README_TABLE.pop("% of no reduction, mean")


@pytest.mark.slow
@pytest.mark.parametrize("task", LISTED)
def test_the_demo_gives_the_rows_of_the_readme(runs, task):
    *scores, tokens = README_TABLE[runs["plain"][task]["row"]]
    # Another processor rounds otherwise, and two answers of sixty may change.
    assert [runs[run][task]["headline"] for run in COLUMNS] == pytest.approx(scores, rel=0.06)
    assert runs["finetuned-trim"][task]["tokens"]["mean_tokens"] == pytest.approx(tokens, abs=0.1)


def test_the_means_under_the_readmes_table_are_those_of_its_twelve_rows():
    rows = list(README_TABLE.values())
    assert len(rows) == len(ALL.split()) == 12
    retained = [100 * sum(row[column] / row[0] for row in rows) / len(rows) for column in range(len(COLUMNS))]
    tokens = sum(row[-1] for row in rows) / len(rows)
    assert [*retained, tokens] == pytest.approx(MEANS, abs=0.06)


@pytest.mark.parametrize(
    "folder", [CHECKPOINTS.parent, CHECKPOINTS / "llava-shapes", CHECKPOINTS / "llava-shapes-trim"]
)
def test_every_card_shows_the_readmes_table(folder):
    table = read_demo_table(folder / "README.md")
    assert table == README_TABLE | {"% of no reduction, mean": MEANS}


def test_finetuned_trim_keeps_at_least_95_percent_of_the_plain_average_over_all_benchmarks():
    assert MEANS[COLUMNS.index("finetuned-trim")] >= 95


def test_finetuned_trim_beats_random_patches_on_every_benchmark():
    trim, random = COLUMNS.index("finetuned-trim"), COLUMNS.index("finetuned-random")
    assert [name for name, row in README_TABLE.items() if row[trim] <= row[random]] == []


# Answered by letter: the score of guessing among three options (SEED: four; MMBench wants every rotation right).
CHANCE = {"sqa": 100 / 3, "mmbench": 100 / 27, "mmbench_cn": 100 / 27, "seed": 25.0}


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(CHANCE) & set(LISTED)))
def test_options_are_named_by_letter_well_above_chance(runs, task):
    assert runs["finetuned-trim"][task]["headline"] >= CHANCE[task] + 15


@pytest.mark.slow
def test_calibrate_says_that_the_published_sign_fits_the_pocket_clip(demo):
    pictures = demo[0] / "data" / "calibrate" / "calibrate.jsonl"
    done = run([sys.executable, "-m", "llava.calibrate", "--vision-tower", str(CHECKPOINTS / "shapes-clip"),
                "--pictures", str(pictures), "--json", str(demo[0] / "sign.json")])  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "TRIM:-1" in done.stdout
    assert "neither" not in done.stdout


@pytest.mark.slow
def test_kept_checkpoints_fit_the_size_they_were_promised():
    total = sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file())
    assert total <= 16 * 1024 * 1024


@pytest.mark.parametrize("name", ["shapes-clip", "llava-shapes", "llava-shapes-trim"])
def test_every_kept_checkpoint_has_a_card_and_published_files(name):
    folder = CHECKPOINTS / name
    for file in ("README.md", "config.json", "model.safetensors", "tokenizer_config.json"):
        assert (folder / file).is_file()
    assert not list(folder.glob("*.bin"))
