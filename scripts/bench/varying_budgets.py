"""One checkpoint for many budgets: training at a range of budgets against training for each, on the shapes world.

From one start, the training script finetunes for the same steps on the same samples at each budget, and once at the
range from the lowest to the highest; then all are scored at all budgets. Differences are paired, with 95 % intervals
over images. What is there already is not repeated.

    python -m scripts.bench.varying_budgets
"""
# ruff: noqa: T201

import argparse
from pathlib import Path

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    parser.add_argument("--work", type=Path, default=Path("results/varying_budgets"), help="data, models and scores")
    parser.add_argument("--start", type=Path, default=side_by_side.CHECKPOINT, help="the checkpoint to go on from")
    parser.add_argument("--budgets", type=int, nargs="+", default=[6, 13, 26], help="counts of patches, rising")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=7, help="of training (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--images", type=int, default=200, help="of POPE; of the others four times as many")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from llava.cli import ModelSpec
from llava.errors import InputError, run_command
from llava.eval.benchmarks import find_benchmark
from llava.eval.compare import REFERENCE, Entry, Place, Runner
from llava.eval.metrics.evidence import PairedDifference, paired_difference
from llava.eval.results import Result
from llava.eval.samples import pair_samples

TASKS = {"pope": 1, "gqa": 4, "vqav2": 4}
"""How many times `--images` are drawn for each: POPE asks eleven questions about an image, the others two."""
TRAIN_SEED, EVAL_SEED = 11, 2026
"""Of images that no kept checkpoint was trained or scored on."""
SETTINGS = {
    "PRECISION": "fp32",
    "ZERO": "scripts/zero2.json",
    "GRADIENT_CHECKPOINTING": "False",
    "NUM_WORKERS": "0",
    "MAX_LENGTH": "512",
    "LOGGING_STEPS": "50",
    "BATCH_SIZE": "16",
    "GLOBAL_BATCH": "32",
    "VISION_TOWER": "playground/shapes/checkpoints/shapes-clip",
    "PROJECTOR": "",
    "reduce_func": REFERENCE,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Those of `playground/shapes/train.sh`."""


def run(command: list[str], log: Path, **variables: str) -> None:
    """Run a command with its output in a log.

    Raises:
        InputError: it failed; names the log.
    """
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            command, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        raise InputError(f"{' '.join(command[:4])} ... ended with code {done.returncode}: see {log}")


def draw_data(args: Namespace, logs: Path) -> None:
    """Write the training set and the benchmarks."""
    generate = [sys.executable, "-m", "playground.shapes.generate", "--calibrate-images", "0"]
    if not (args.work / "train/exam.json").is_file():
        sizes = ["--train-images", str(args.train_images), "--samples-per-image", "5", "--eval-images", "0"]
        run([*generate, "--out", str(args.work), *sizes, "--seed", str(TRAIN_SEED)], logs / "generate.log")
    for task, times in TASKS.items():
        if not find_benchmark(task).find_root(args.work / "eval").is_dir():
            sizes = ["--train-images", "0", "--eval-images", str(times * args.images), "--benchmarks", task]
            run([*generate, "--out", str(args.work), *sizes, "--seed", str(EVAL_SEED)], logs / "generate.log")


def train(args: Namespace, budget: str, logs: Path) -> Path:
    """Finetune at a budget, or at a range of them; a finished run is not repeated."""
    output = args.work / f"trained-{budget}"
    print(f"training at TRIM:{budget}", flush=True)
    run(
        ["bash", "scripts/finetune_8gpu_TRIM.sh", "--", "--max_steps", str(args.steps), "--save_strategy", "no"],
        logs / f"train-{budget}.out",
        **SETTINGS,
        NUM_GPUS=os.environ.get("NUM_GPUS", "2"),
        PYTHON=sys.executable,
        MODEL=str(args.start),
        OUTPUT=str(output),
        LOG=str(logs / f"train-{budget}.log"),
        DATA=str(args.work / "train/exam.json"),
        IMAGES=str(args.work / "train/images"),
        LEARNING_RATE=str(args.learning_rate),
        SEED=str(args.seed),
        reduce_func_param=budget,
    )
    return output


def score(args: Namespace, model: Path) -> dict[tuple[int, str], Result]:
    """Score a checkpoint at all budgets: results by budget and benchmark."""
    print(f"scoring {model.name}", flush=True)
    place = Place(args.work / "scores" / model.name, ModelSpec(str(model)), batch_size=32)
    runner = Runner(place, [REFERENCE], args.budgets, [], print)
    results = {}
    for task in map(find_benchmark, TASKS):
        for budget in args.budgets:
            entry = Entry(REFERENCE, budget, f"{REFERENCE}:{budget}")
            results[budget, task.name] = runner.run(task, task.find_root(args.work / "eval"), entry, None)
    return results


def compare(task: str, here: Result, there: Result) -> PairedDifference:
    """Compare two runs on the same questions."""
    return paired_difference(*pair_samples(find_benchmark(task), here.verdicts, there.verdicts))


def tell(results: Mapping[tuple[str, int, str], Result], budgets: list[int], varying: str) -> list[dict[str, Any]]:
    """Print the table and return its rows.

    Args:
        results: by budget or range of training, budget of scoring, and benchmark.
        budgets: of training and scoring.
        varying: the range.
    """
    arms = [*map(str, budgets), varying]
    print(f"| scored at | benchmark | {' | '.join(f'trained at {arm}' for arm in arms)} | {varying} less own, 95 % |")
    print("| ---: | --- |" + " ---: |" * (len(arms) + 1))
    rows = []
    for budget in budgets:
        differences = []
        for task in TASKS:
            found = {arm: results[arm, budget, task] for arm in arms}
            difference = compare(task, found[varying], found[str(budget)])
            differences.append(difference.value)
            scores = {arm: result.headline for arm, result in found.items()}
            low, high = difference.interval.low, difference.interval.high
            cells = " | ".join(f"{value:.2f}" for value in scores.values())
            name = f"{found[varying].row}, {found[varying].count} questions"
            print(f"| {budget} | {name} | {cells} | {difference.value:+.2f} [{low:+.2f}, {high:+.2f}] |")
            rows.append({"budget": budget, "task": task, "scores": scores, "difference": asdict(difference)})
        means = {arm: fmean(results[arm, budget, task].headline for task in TASKS) for arm in arms}
        cells = " | ".join(f"{value:.2f}" for value in means.values())
        print(f"| {budget} | mean | {cells} | {fmean(differences):+.2f} |")
        rows.append({"budget": budget, "task": "mean", "scores": means})
    return rows


def main() -> None:
    args = make_parser().parse_args()
    args.work = args.work.absolute()
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    draw_data(args, logs)
    varying = f"{args.budgets[0]}-{args.budgets[-1]}"
    models = {arm: train(args, arm, logs) for arm in [*map(str, args.budgets), varying]}
    results = {(arm, *where): result for arm, model in models.items() for where, result in score(args, model).items()}
    rows = tell(results, args.budgets, varying)
    side_by_side.write_figures({"steps": args.steps, "seed": args.seed, "rows": rows}, args.json)


if __name__ == "__main__":
    run_command(main)
