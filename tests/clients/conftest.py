"""What the clients' tests share: 312 questions as files of ours and as tasks of lmms-eval, and how both are asked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.files import read_json, write_json

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "playground/shapes/checkpoints"
NUM_IMAGES = 24  # 264 questions of POPE, 48 of GQA
NAMES = ("pope", "gqa")
PREFIX = "shapes_"
# Runs several commands of ours in one process: starting each takes longer than its answers.
RUN_ALL = """
import json, runpy, sys
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""

Answers = dict[str, list[str]]
"""Texts in the order of the questions, by benchmark."""


@dataclass(frozen=True)
class Asked:
    """How lmms-eval is called, and with it which answers of ours are to be the same."""

    model: str
    checkpoint: str
    reduce: str
    batch_size: str
    options: str


PLAIN, TRIMMED = "llava-shapes", "llava-shapes-trim"  # config.json of the second says TRIM:-1
ASKED = {
    "stock-none-1": Asked("llava", PLAIN, "none", "1", "device_map=auto"),
    "stock-none-8": Asked("llava", PLAIN, "none", "8", "device_map=auto"),
    "stock-TRIM-1": Asked("llava", TRIMMED, "TRIM:-1", "1", "device_map=auto"),
    "stock-TRIM-8": Asked("llava", TRIMMED, "TRIM:-1", "8", "device_map=auto"),
    "llava_trim-none": Asked("llava_trim", PLAIN, "none", "auto", "reduce=none"),
    "llava_trim-TRIM": Asked("llava_trim", PLAIN, "TRIM:-1", "auto", "reduce=TRIM:-1,dtype=float32"),
    "llava_trim-TRIM-1": Asked("llava_trim", PLAIN, "TRIM:-1", "1", "reduce=TRIM:-1,dtype=float32"),
}


@dataclass(frozen=True)
class Run:
    """A finished run of lmms-eval.

    Attributes:
        answers: texts.
        samples: lines of its sample files in the order of the questions, by benchmark.
        results: its result file.
    """

    answers: Answers
    samples: dict[str, list[dict]]
    results: dict


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of POPE and GQA on shapes (`eval`) and of the same as tasks (`tasks`)."""
    from playground.shapes.generate import write_eval
    from playground.shapes.lmms_tasks import write_tasks

    folder = tmp_path_factory.mktemp("world")
    write_eval(folder / "eval", NUM_IMAGES, seed=7, names=NAMES)
    write_tasks(folder / "eval", folder / "tasks")
    return folder


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies of pocket checkpoints with `tokenizer.model` alone, as liuhaotian's folders have it."""
    folder = tmp_path_factory.mktemp("bare")

    def copy(name: str) -> Path:
        if not (folder / name).exists():
            shutil.copytree(CHECKPOINTS / name, folder / name, ignore=shutil.ignore_patterns("tokenizer.json"))
            config = read_json(folder / name / "config.json")
            write_json(folder / name / "config.json", {**config, "mm_vision_tower": str(CHECKPOINTS / "shapes-clip")})
        return folder / name

    return copy


@pytest.fixture(scope="session")
def our_files(world: Path, bare_checkpoint: Callable[[str], Path]) -> dict[tuple[str, str, str], Path]:
    """Answers files of `python -m llava.eval answer`, by checkpoint, token reduction and benchmark."""
    files, commands = {}, []
    for checkpoint, reduce in dict.fromkeys((asked.checkpoint, asked.reduce) for asked in ASKED.values()):
        for name in NAMES:
            files[checkpoint, reduce, name] = world / "answers" / f"{len(files)}.jsonl"
            model = ("--model-path", str(bare_checkpoint(checkpoint)), "--reduce", reduce)
            root = str(BENCHMARKS[name].find_root(world / "eval"))
            out = str(files[checkpoint, reduce, name])
            commands.append(["llava.eval", "answer", name, "--root", root, "--answers", out, *model])
    run("-c", RUN_ALL, json.dumps(commands), folder=world)
    return files


@pytest.fixture(scope="session")
def our_answers(world: Path, our_files: dict[tuple[str, str, str], Path]) -> dict[tuple[str, str], Answers]:
    """What these files say, by checkpoint and token reduction."""
    answers: dict[tuple[str, str], Answers] = {}
    for (checkpoint, reduce, name), file in our_files.items():
        task = BENCHMARKS[name]
        rows = {row["question_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}
        questions = task.load(task.find_root(world / "eval"))
        answers.setdefault((checkpoint, reduce), {})[name] = [rows[question.id] for question in questions]
    return answers


@pytest.fixture(scope="session")
def runs(world: Path, bare_checkpoint: Callable[[str], Path]) -> dict[str, Run]:
    """What `python -m lmms_eval` writes for all of `ASKED`."""
    return run_lmms_eval(
        world,
        {
            label: {
                "model": asked.model,
                "model_args": f"pretrained={bare_checkpoint(asked.checkpoint)},device=cpu,{asked.options}",
                "batch_size": asked.batch_size,
            }
            for label, asked in ASKED.items()
        },
    )


def run_lmms_eval(world: Path, models: dict[str, dict[str, str]]) -> dict[str, Run]:
    """Ask all questions by several models of lmms-eval, one after another in one process."""
    tasks = ",".join(PREFIX + name for name in NAMES)
    common = {"tasks": tasks, "include_path": str(world / "tasks"), "log_samples": True}
    configs = [{**common, **model, "output_path": str(world / label)} for label, model in models.items()]
    file = world / f"{next(iter(models))}.yaml"
    write_json(file, configs)  # JSON is YAML
    told = run("-m", "lmms_eval", "--config", str(file), folder=world, HF_DATASETS_CACHE=str(world / "cache"))
    return {label: read_run(world / label, told) for label in models}


def read_run(folder: Path, told: str) -> Run:
    """Read the files of a run; a failed one leaves none, and says why on stderr."""
    files = list(folder.rglob("*_results.json"))
    assert files, told[-4000:]
    samples = {}
    for name in NAMES:
        (file,) = folder.rglob(f"*_samples_{PREFIX}{name}.jsonl")
        samples[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
    answers = {name: [line["filtered_resps"].strip() for line in lines] for name, lines in samples.items()}
    return Run(answers, samples, read_json(files[0]))


def run(*command: str, folder: Path, **environment: str) -> str:
    """Run this Python in a folder; return what it prints on stderr."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr
