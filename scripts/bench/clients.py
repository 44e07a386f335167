"""Questions per second: our runner and `llava_trim` against lmms-eval's own `llava` model, with the same answers.

Each has a process of its own, with the memory settings that it brings along; they take turns in one run, over the same
checkpoint, images and questions (POPE's form on images of shapes). `--whole` also times the two commands, from start to
result file, on 264 questions of POPE. Needs lmms-eval; `bash scripts/test_clients.sh FOLDER` makes an environment.

    FOLDER/bin/python -m scripts.bench.clients
    FOLDER/bin/python -m scripts.bench.clients --whole
"""
# ruff: noqa: T201

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from llava.cli import ModelSpec, positive
from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    parser.add_argument("--model-path", default=str(side_by_side.CHECKPOINT))
    parser.add_argument("--images", type=positive, default=20)
    parser.add_argument("--questions-per-image", type=positive, default=18)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8, 32], help="of lmms-eval's llava")
    parser.add_argument("--whole", action="store_true", help="time the commands too, from start to result file")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

from PIL import Image

from llava.efficiency.timing import Spread, ratio_by_round
from llava.errors import InputError, run_command
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS, Question
from llava.eval.predict import Settings, answer_questions
from llava.sampling import Sampling
from playground.shapes.generate import write_eval
from playground.shapes.lmms_tasks import PREFIX, write_tasks

Ask = Callable[[], list[str]]
TASK = "bench"
RUNNER, PLUGIN = "our runner", "llava_trim"
WHOLE_IMAGES = 24  # 264 questions


# ----------------------------------------------------------------------------------------------------------- candidates
def prepare_runner(checkpoint: str, questions: Sequence[Question]) -> Ask:
    """Load a model for our runner, which reads the image files."""
    tokenizer, model, image_processor = ModelSpec(checkpoint, device="cpu").load(quiet=True)
    settings = Settings(model_id=RUNNER, sampling=Sampling(max_new_tokens=LOADER_MAX_NEW_TOKENS))

    def ask() -> list[str]:
        sink = side_by_side.MemorySink()
        with side_by_side.hide_progress():
            answer_questions(model, tokenizer, image_processor, questions, sink, settings)
        texts = {row["question_id"]: row["text"] for row in sink.done.values()}
        return [texts[question.id] for question in questions]

    return ask


def prepare_plugin(checkpoint: str, questions: Sequence[Question]) -> Ask:
    """Load `llava_trim`."""
    from llava.lmms.model import LlavaTrim

    return ask_lmms(LlavaTrim(checkpoint, device="cpu", batch_size="auto"), questions)


def prepare_stock(batch_size: int, checkpoint: str, questions: Sequence[Question]) -> Ask:
    """Load lmms-eval's `llava`."""
    from lmms_eval.models.simple.llava import Llava

    return ask_lmms(Llava(checkpoint, device="cpu", device_map="auto", batch_size=batch_size), questions)


def ask_lmms(model: object, questions: Sequence[Question]) -> Ask:
    """Ask a model of lmms-eval by its own interface; the documents read the same image files."""
    from lmms_eval.api.instance import Instance, unwrap_generation_output

    model.task_dict = {TASK: {"test": {question.id: question for question in questions}}}

    def to_visual(question: Question) -> list[Image.Image]:
        return [Image.open(path).convert("RGB") for path in question.images]

    def ask() -> list[str]:
        requests = [
            Instance(
                "generate_until",
                # Its `llava` writes into the generation arguments: new ones for each request.
                (question.prompt, {"max_new_tokens": LOADER_MAX_NEW_TOKENS}, to_visual, question.id, TASK, "test"),
                idx=0,
                metadata={"task": TASK, "doc_id": question.id, "repeats": 1},
            )
            for question in questions
        ]
        with side_by_side.hide_progress():
            return [unwrap_generation_output(output)[0].strip() for output in model.generate_until(requests)]

    return ask


# ---------------------------------------------------------------------------------------------------------------- turns
def serve(connection: Connection, prepare: Callable[[], Ask]) -> None:
    """Answer once more for each message, until the other side closes; the body of a candidate's process."""
    ask = prepare()
    connection.send(None)  # ready
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        answers = ask()
        connection.send((time.perf_counter() - start, answers))


@contextmanager
def started(prepare: Callable[[], Ask]) -> Iterator[Connection]:
    """Run a candidate in a process of its own; gives the connection once it is ready.

    Raises:
        InputError: it ended before.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, prepare), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
    except EOFError:
        raise InputError("a candidate's process ended; its error is above") from None
    finally:
        ours.close()
        process.join()


def take_turns(
    candidates: dict[str, Callable[[], Ask]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Let candidates answer in turns, after a round that is not counted.

    Returns:
        Seconds of each round, and the answers of the last, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    answers: dict[str, list[str]] = {}
    with ExitStack() as stack:
        connections = {name: stack.enter_context(started(prepare)) for name, prepare in candidates.items()}
        for number in range(rounds + 1):
            for name, connection in connections.items():
                connection.send(None)
                taken, answers[name] = connection.recv()
                if number:
                    seconds[name].append(taken)
    return seconds, answers


# ------------------------------------------------------------------------------------------------------------- commands
def time_commands(checkpoint: str, batch_sizes: Sequence[int], folder: Path) -> dict[str, float]:
    """Time whole commands on POPE of shapes, each once: seconds by name."""
    write_eval(folder / "eval", WHOLE_IMAGES, seed=7, names=("pope", "gqa"))
    write_tasks(folder / "eval", folder / "tasks")
    model = str(Path(checkpoint).absolute())
    root = str(folder / "eval/pope")
    answer = ["llava.eval", "answer", "pope", "--root", root, "--answers", "answers.jsonl", "--model-path", model]
    commands = {RUNNER: [*answer, "--device", "cpu"]}
    for batch_size in batch_sizes:
        commands[name_stock(batch_size)] = [
            *("lmms_eval", "eval", "--model", "llava", "--batch_size", str(batch_size), "--log_samples"),
            *("--model_args", f"pretrained={model},device_map=auto,device=cpu", "--tasks", f"{PREFIX}pope"),
            *("--include_path", "tasks", "--output_path", f"out{batch_size}"),
        ]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd()), "HF_DATASETS_CACHE": str(folder / "cache")}
    return {name: time_command(command, folder, {**os.environ, **settings}) for name, command in commands.items()}


def time_command(command: Sequence[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a module of this Python and return the seconds that it took.

    Raises:
        InputError: it failed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    # A failed evaluation leaves lmms-eval with code 0.
    if done.returncode or "Error during evaluation" in done.stderr:
        raise InputError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - start


def name_stock(batch_size: int) -> str:
    return f"lmms-eval llava, batch {batch_size}"


def main() -> None:
    args = make_parser().parse_args()
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError("lmms-eval is not installed: bash scripts/test_clients.sh FOLDER makes an environment with it")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        questions = side_by_side.draw_questions(folder / "images", args.images, args.questions_per_image)
        stock = {name_stock(size): partial(prepare_stock, size) for size in args.batch_sizes}
        prepared = {RUNNER: prepare_runner, PLUGIN: prepare_plugin, **stock}
        candidates = {name: partial(prepare, args.model_path, questions) for name, prepare in prepared.items()}
        seconds, answers = take_turns(candidates, args.rounds)
        whole = time_commands(args.model_path, args.batch_sizes, folder) if args.whole else {}
    report(args, seconds, answers, whole)


def report(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    answers: dict[str, list[str]],
    whole: dict[str, float],
) -> None:
    """Print and write the figures; exit with 1 if answers differ."""
    num_questions = len(answers[RUNNER])
    print(f"{args.questions_per_image} question(s) per image, {args.images} images")
    side_by_side.tell_times(seconds, dict.fromkeys(seconds, num_questions))
    best = min(map(name_stock, args.batch_sizes), key=lambda name: Spread.of(seconds[name]).median)
    ratios = {}
    for name in (RUNNER, PLUGIN):
        ratios[name] = ratio_by_round(seconds[best], seconds[name])
        print(f"{name} over {best}: {ratios[name].format(1, 2)} (median [quartiles] of {args.rounds} rounds)")
    same = {name: sum(map(str.__eq__, texts, answers[RUNNER])) for name, texts in answers.items()}
    print(f"same answers of {num_questions}: {min(same.values())}; distinct answers: {len(set(answers[RUNNER]))}")
    for name, value in whole.items():
        print(f"whole command, {name}: {value:.1f} s")
    side_by_side.write_figures(
        {"options": {key: str(value) for key, value in vars(args).items()}}
        | {"seconds": seconds, "best": best, "ratios": ratios, "same_answers": same, "whole_seconds": whole},
        args.json,
    )
    if min(same.values()) < num_questions:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
