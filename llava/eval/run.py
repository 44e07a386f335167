"""One benchmark from a model to its score: `python -m llava.eval run TASK CKPT MODEL_DIR ...`, what the scripts call.

Starts one `answer` command per visible GPU, waits for all, then runs `export` where files go to a server, and `score`.
Everything is done by commands that a person could type: `DRY_RUN=1` prints them instead. Nothing here needs torch.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import InputError
from llava.eval.benchmark import Benchmark
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.predictions import check_workers
from llava.files import explain_errors, find_repository, find_target, make_folder, parse_natural, read_bytes
from llava.signals import GRACE_SECONDS, PARENT_VARIABLE, SIGNAL_CODE, STOP_SIGNALS, ending_on_signals

EXIT_INCOMPLETE = 1
"""Exit code of `download` and `check` when data are missing."""
EXIT_MISTAKE = 2
"""Exit code of every command after a mistake in its options or files: the same command would end the same way."""
EXIT_UNANSWERED = 3
"""Exit code of `answer` when questions stayed without an answer."""
EXIT_SERVER_ONLY = 4
"""Exit code of `score` where only a server can score the split; the answers are in order."""

USAGE = """\
usage: bash scripts/v1_5/eval/{task}.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
   or: python -m llava.eval run {task} CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
  CKPT        name of the run; answers go to a folder of this name
  MODEL_DIR   the checkpoint's folder (or the folder that holds a checkpoint folder CKPT), or a hub id
  RESULTS     file for the line NAME<TAB>VALUE; a score that is written again takes the place of its line
  MODEL_BASE  base model, for LoRA and projector-only checkpoints
  OPTIONS     for `python -m llava.eval answer`, e.g. --batch-size 16 --reduce none --limit 100;
              --split NAME for another split; --source hub for the public dataset instead of local files;
              --endpoint URL asks a server for the model that it calls MODEL_DIR;
              --engine vllm lets vLLM run the language model (docs/vllm.md);
              --allow-partial scores although answers are missing; --judge exact, --judge-model MODEL
Environment:
  LLAVA_EVAL_ROOT      folder that holds the benchmarks' folders (default: playground/data/eval)
  LLAVA_EVAL_WORKERS   number of workers, spread over the visible GPUs (default: one per GPU; without GPU one)
  LLAVA_EVAL_JSON      file for every number of the score (default: beside the answers, *.scores.json)
  LLAVA_EVAL_CHECK=1   only check the arguments and that the data's folder is there
  DRY_RUN=1            print the commands instead of running them
  PYTHON               interpreter of the commands (default: the one that runs this)"""

SCORE_OPTIONS = ("--judge", "--judge-model", "--judge-runs", "--judge-cache")
SHARED_OPTIONS = ("--split", "--source", "--hub-dataset")
CALIBRATED = "--calibrated"
"""An option of `answer` with a path as seen from where the user is."""
OWN_OPTIONS = {
    "--answers": "CKPT",
    "--root": "LLAVA_EVAL_ROOT",
    "--model-path": "MODEL_DIR",
    "--model-base": "MODEL_BASE",
    "--workers": "LLAVA_EVAL_WORKERS",
    "--worker": "LLAVA_EVAL_WORKERS",
    "--json": "LLAVA_EVAL_JSON",
    "--results": "RESULTS",
}
"""What this command sets itself, with the argument or variable that the value comes from."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
LAST_LINES = 20
MAX_WORKERS = 256
WORKER_GRACE_SECONDS = GRACE_SECONDS + 1.0
"""How long a worker that was told to end may take, before it is killed."""


# --------------------------------------------------------------------------------------------------------------- places
def find_data_root() -> Path:
    """Return the folder that holds the benchmarks' folders, as an absolute path."""
    named = os.environ.get("LLAVA_EVAL_ROOT")
    return absolute_path(named) if named else (find_repository() or Path.cwd()) / "playground" / "data" / "eval"


def absolute_path(text: str) -> Path:
    """Return a path as seen from where the user is; it need not exist."""
    return Path.cwd() / Path(text).expanduser()


def resolve_model(text: str) -> str:
    """Return an existing checkpoint as an absolute path, and a hub id as it is.

    Raises:
        InputError: it is neither.
    """
    candidates = [absolute_path(text)] + ([repository / text] if (repository := find_repository()) else [])
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    # `owner/name` is a hub id, unless `owner` is a folder here.
    if HUB_ID.fullmatch(text) and not absolute_path(text.split("/")[0]).is_dir():
        return text
    raise InputError(f"no model at {text}: give a checkpoint folder or a hub id")


def find_checkpoint(run: str, text: str) -> str:
    """Return the checkpoint MODEL_DIR, or in a folder of checkpoints the one that is called like the run."""
    model = resolve_model(text)
    folder = Path(model)
    is_checkpoint = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if folder.is_dir() and not is_checkpoint and (folder / run).is_dir():
        return str(folder / run)
    return model


# ------------------------------------------------------------------------------------------------------------ arguments
@dataclass
class Options:
    """What is given after `--`, by the commands that it belongs to."""

    answer: list[str] = field(default_factory=list)
    score: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    split: str | None = None
    from_hub: bool = False

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Options":
        """Sort options; paths become absolute.

        Raises:
            InputError: an option has no value, or is one of `OWN_OPTIONS`.
        """
        options, rest = cls(), iter(arguments)
        for argument in rest:
            name, has_value, value = argument.partition("=")
            if name in OWN_OPTIONS:
                raise InputError(f"{name} does not go after --: `run` sets it, from {OWN_OPTIONS[name]}")
            if name == "--allow-partial":
                options.partial = [argument]
            elif name not in (*SCORE_OPTIONS, *SHARED_OPTIONS, CALIBRATED):
                options.answer.append(argument)
            else:
                given = value if has_value else next(rest, None)
                if given is None:
                    raise InputError(f"{name} needs a value")
                options.add(name, given)
        return options

    @property
    def asks_server(self) -> bool:
        """Whether MODEL_DIR is what a server calls its model."""
        return any(argument.partition("=")[0] == "--endpoint" for argument in self.answer)

    @property
    def num_gpus(self) -> int:
        """How many GPUs a worker has."""
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--tensor-parallel", nargs="?")
        found = parser.parse_known_args(self.answer)[0].tensor_parallel
        return parse_natural(found or "") or 1  # `answer` refuses what is no number

    def add(self, name: str, value: str) -> None:
        """Take in an option with a value that is a path, or goes not to `answer` alone."""
        if name in ("--judge-cache", CALIBRATED) or (name == "--hub-dataset" and absolute_path(value).exists()):
            value = str(absolute_path(value))
        own = self.answer if name == CALIBRATED else self.shared
        (self.score if name in SCORE_OPTIONS else own).extend([name, value])
        if name == "--split":
            self.split = value
        self.from_hub |= (name, value) == ("--source", "hub")


@dataclass(frozen=True)
class Plan:
    """One benchmark run, checked and with absolute paths.

    Attributes:
        name: of the benchmark, as a command takes it.
        task: the benchmark, on the split that the options name.
        root: its folder.
        answers: the answers file.
        upload: folder for the files of `export`; None where they are written only if a server alone can score.
        model: checkpoint folder or hub id.
        base: of a LoRA or projector-only checkpoint.
        results: file for the result's line.
        numbers: file for every number of the score.
        options: what was given after `--`.
    """

    name: str
    task: Benchmark
    root: Path
    answers: Path
    upload: Path | None
    model: str
    base: str | None
    results: Path | None
    numbers: Path
    options: Options


def make_plan(name: str, arguments: Sequence[str]) -> Plan:
    """Check the arguments of a script.

    Args:
        name: of the benchmark, or the path of a `.py` file that defines one.
        arguments: CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS].

    Raises:
        InputError: an argument is wrong, the benchmark's folder is not there, or a file cannot be written.
    """
    # 1. The arguments.
    task, usage = find_benchmark(name), USAGE.format(task=name)
    if name not in BENCHMARKS:
        name = str(absolute_path(name))
    count = arguments.index("--") if "--" in arguments else len(arguments)
    run, model, results, base = read_positional(arguments[:count], usage)
    options = Options.parse(arguments[count + 1 :])
    checkpoint = model if options.asks_server else find_checkpoint(run, model)
    base_model = resolve_model(base) if base else None
    if options.split is not None:
        task = task.with_split(options.split)
    # 2. The places that it reads and writes.
    data_root = find_data_root()
    root = task.find_root(data_root)
    if not root.is_dir() and not is_dry() and not options.from_hub:
        raise InputError(
            f"no folder {data_root / task.folders[0]}: `python -m llava.eval download {name}` fetches it; "
            "LLAVA_EVAL_ROOT names another place"
        )
    answers = task.place_answers(root, run)
    if options.split is not None:  # answers to the questions of another split do not mix with these
        answers = answers.with_name(f"{answers.stem}.{options.split.replace('/', '_')}{answers.suffix}")
    place = absolute_path(results) if results else None
    named = os.environ.get("LLAVA_EVAL_JSON")
    numbers = absolute_path(named) if named else answers.with_name(f"{answers.stem}.scores.json")
    for path in filter(None, (place, numbers)):
        check_target(path)
    # 3. The interpreter.
    if not is_dry():
        check_python()
    return Plan(
        name, task, root, answers, task.place_upload(root, run), checkpoint, base_model, place, numbers, options
    )


def read_positional(arguments: Sequence[str], usage: str) -> tuple[str, str, str, str]:
    """Return CKPT, MODEL_DIR, RESULTS and MODEL_BASE; the last two may be empty."""
    for argument in arguments:
        if argument.startswith("-"):
            sys.stderr.write(f"{usage}\n")
            raise InputError(f"options such as {argument} go after --")
    if not 2 <= len(arguments) <= 4:
        sys.stderr.write(f"{usage}\n")
        raise InputError(f"two to four arguments are needed, not {len(arguments)}")
    run, model, results, base = [*arguments, "", ""][:4]
    if not run or not model:
        raise InputError("CKPT and MODEL_DIR must not be empty")
    check_run(run)
    return run, model, results, base


def check_target(path: Path) -> None:
    """Refuse a place that only the end of the run would find out it cannot write: a folder, a device, below a file."""
    with explain_errors("write", path):
        target = find_target(path)
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise InputError(f"cannot write {path}: {above} is not a folder")


def check_python() -> None:
    """Refuse a PYTHON that is no program."""
    python = make_command()[0]
    if shutil.which(python) is None:
        raise InputError(f"PYTHON={python} is no program: unset it, or name a Python")


def check_run(name: str) -> None:
    """Refuse a name of a run that would put its files elsewhere than under the answers folder."""
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable():
        raise InputError(f"CKPT {name!r} names the run's files: give a plain name, such as llava-v1.5-7b-TRIM")


# ------------------------------------------------------------------------------------------------------------- commands
def is_dry() -> bool:
    return os.environ.get("DRY_RUN") == "1"


def make_command(*arguments: object) -> list[str]:
    """Make a command of llava.eval; an interpreter that is named by a relative path is meant from here."""
    python = os.environ.get("PYTHON") or sys.executable
    return [str(absolute_path(python)) if "/" in python else python, "-m", "llava.eval", *map(str, arguments)]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> subprocess.Popen:
    """Start a command in the repository, so that it finds the package and what checkpoints name relative to it.

    It ends when this process is gone, even killed.
    """
    repository = find_repository()
    settings = {**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())}
    if repository:
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    if log is None:
        return subprocess.Popen(command, cwd=repository, env=settings)
    make_folder(log.parent)
    with explain_errors("write", log), log.open("wb") as file:
        return subprocess.Popen(command, cwd=repository, env=settings, stdout=file, stderr=subprocess.STDOUT)


def execute(command: Sequence[str]) -> int:
    """Run a command, or with DRY_RUN=1 print it; return its exit code."""
    if is_dry():
        print_command(command)
        return 0
    processes: list[subprocess.Popen] = []
    with ending_with(processes):
        with holding_signals():
            processes.append(start(command, {}))
        return exit_code(processes[0])


def print_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Print a command, quoted so that it can be pasted."""
    words = [*(f"{name}={value}" for name, value in (environment or {}).items()), *command]
    sys.stdout.write(" ".join(map(quote, words)) + "\n")
    sys.stdout.flush()


def quote(word: str) -> str:
    """Quote a word for the shell, by backslashes where that is enough."""
    return re.sub(r"[^\w./:=,@%+-]", r"\\\g<0>", word) if word and word.isprintable() else shlex.quote(word)


def exit_code(process: subprocess.Popen) -> int:
    """Wait for a process; of one that a signal ended the code is that of the shell, 128 and its number."""
    code = process.wait()
    return SIGNAL_CODE - code if code < 0 else code


@contextmanager
def ending_with(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """End these processes if the block is left early: by a signal to this process or an error."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + WORKER_GRACE_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold signals back until the block is over: what it starts can be ended by then."""
    received: list[int] = []
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def note(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# -------------------------------------------------------------------------------------------------------------- the run
def run_benchmark(arguments: Sequence[str]) -> None:
    """Answer and score one benchmark: the command `run`.

    Args:
        arguments: TASK CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS].

    Raises:
        InputError: see `make_plan`.
        SystemExit: with the code of the worst worker, or of `score`.
    """
    # 1. Check everything before anything starts.
    name = next(iter(arguments), "TASK")
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)
    if wants_help or name == "--" or not arguments:
        sys.stdout.write(USAGE.format(task=name if not name.startswith("-") else "TASK") + "\n")
        raise SystemExit(0 if wants_help else EXIT_MISTAKE)
    plan = make_plan(name, list(arguments[1:]))
    if os.environ.get("LLAVA_EVAL_CHECK") == "1":
        return
    try:
        # Longer than what ending the workers takes.
        with ending_on_signals(WORKER_GRACE_SECONDS + 1.0):
            answer_and_score(plan)
    except KeyboardInterrupt:
        note(f"{plan.task.name}: stopped; run the same command again to go on where it stopped")
        raise


def answer_and_score(plan: Plan) -> None:
    """Run what was planned; leave with the code of the worst worker, or of `score`."""
    # 2. Answer. What is answered stays; the same command goes on where it stopped.
    answered = answer(plan)
    if answered and not (answered == EXIT_UNANSWERED and plan.options.partial):
        advice = "" if answered == EXIT_MISTAKE else "; run the same command again to go on where it stopped"
        note(f"{plan.task.name}: not scored{advice}")
        raise SystemExit(answered)
    # 3. Score, and write the files for a server.
    scored = score(plan)
    if scored or answered:
        raise SystemExit(scored or answered)


@dataclass(frozen=True)
class Worker:
    """One `answer` command.

    Attributes:
        name: for messages.
        command: the command.
        environment: variables that differ for it: its GPU.
        log: file of its output; None: the terminal.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path | None


def answer(plan: Plan) -> int:
    """Run the workers, which share the questions among themselves; return the code of the worst."""
    workers = plan_workers(plan)
    if is_dry():
        for worker in workers:
            print_command(worker.command, worker.environment)
        return 0
    processes: list[subprocess.Popen] = []
    worst = 0
    with ending_with(processes):
        for worker in workers:
            with holding_signals():
                processes.append(start(worker.command, worker.environment, worker.log))
        for worker, process in zip(workers, processes, strict=True):
            code = exit_code(process)
            if code:
                report_failure(worker, code)
                worst = code if code != EXIT_UNANSWERED else worst or code
    return worst


def plan_workers(plan: Plan) -> list[Worker]:
    """Plan one worker per visible GPU (per N of them with `--tensor-parallel N`), or as LLAVA_EVAL_WORKERS asks for."""
    gpus = group_gpus(list_gpus(), plan.options.num_gpus)
    count = os.environ.get("LLAVA_EVAL_WORKERS") or str(max(1, len(gpus)))
    if not re.fullmatch("[1-9][0-9]*", count):
        raise InputError(f"LLAVA_EVAL_WORKERS must be a number from 1 on, not {count}")
    if len(count) > len(str(MAX_WORKERS)) or int(count) > MAX_WORKERS:
        raise InputError(f"LLAVA_EVAL_WORKERS must be at most {MAX_WORKERS}, not {count:.20}")
    check_workers(int(count))
    base = ["--model-base", plan.base] if plan.base else []
    command = make_command(
        *("answer", plan.name, "--root", plan.root, "--answers", plan.answers, "--model-path", plan.model),
        *(*base, *plan.options.shared, *plan.options.answer),
    )
    workers = []
    for number in range(int(count)):
        gpu = gpus[number % len(gpus)] if gpus else None
        shares = ["--workers", count, "--worker", str(number)] if count != "1" else []
        workers.append(
            Worker(
                name=f"{plan.task.name} worker {number} ({'CPU' if gpu is None else f'GPU {gpu}'})",
                command=command + shares,
                environment={} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu},
                # Worker 0 shows its progress, which counts all workers' answers; the others have a log each.
                log=None if number == 0 else plan.answers.with_name(f"{plan.answers.name}.worker_{number}.log"),
            )
        )
    return workers


def group_gpus(gpus: Sequence[str], size: int) -> list[str]:
    """Join so many ids at a time by commas; those that are left over are not used.

    Raises:
        InputError: there are GPUs, but not so many.
    """
    if gpus and size > len(gpus):
        raise InputError(f"--tensor-parallel {size}: there are {len(gpus)} GPUs")
    return [",".join(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]


def list_gpus() -> list[str]:
    """List the ids of the visible GPUs; none on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            visible = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return []
    return [gpu for gpu in re.split(r"[,\s]+", visible) if gpu not in ("", "-1")]


def report_failure(worker: Worker, code: int) -> None:
    """Name a worker that failed, with the end of its log."""
    if worker.log is not None:
        note(f"last lines of {worker.log}:")
        lines = read_bytes(worker.log).decode("utf-8", "replace").splitlines()
        note("\n".join(lines[-LAST_LINES:]))
    if code == EXIT_UNANSWERED:
        note(f"error: {worker.name} could not answer some questions (named above)")
    else:
        note(f"error: {worker.name} failed with exit code {code}")


def score(plan: Plan) -> int:
    """Write the upload files, if any, and score the answers; return the exit code."""
    name = plan.name
    shared = ["--answers", plan.answers, "--root", plan.root, *plan.options.shared, *plan.options.partial]
    if plan.upload and (code := execute(make_command("export", name, "--out", plan.upload, *shared))):
        return code
    results = ["--results", plan.results] if plan.results else []
    code = execute(make_command("score", name, *shared, "--json", plan.numbers, *results, *plan.options.score))
    if code == EXIT_SERVER_ONLY:
        upload = plan.answers.with_name(f"{plan.answers.stem}.upload")
        return 0 if plan.upload else execute(make_command("export", name, "--out", upload, *shared))
    if code:
        note(f"{plan.task.name}: not scored; the answers are ready in {plan.answers}")
    return code
