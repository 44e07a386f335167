"""`python -m llava.eval {list,answer,score,report}`: the command-line face of the benchmarks."""

# ruff: noqa: T201 (a command-line face prints)
import argparse
import sys
from pathlib import Path

from llava.errors import InputError, run_command
from llava.eval.prompting import DEFAULT_CONV_MODE
from llava.eval.results import (
    append_line,
    compare_runs,
    format_line,
    format_table,
    read_result,
    score_answers,
    write_json,
)
from llava.eval.tasks import TASKS, find_task

EXIT_UNANSWERED = 3
"""Exit code of `answer` when questions stayed without an answer; 2 is a mistake in the command or its files."""


def main() -> None:
    """Run one of the commands."""
    arguments = make_parser().parse_args()
    arguments.command(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval", description="Benchmarks of LLaVA with TRIM.")
    commands = parser.add_subparsers(required=True, metavar="{list,answer,score,report}")

    listing = commands.add_parser("list", help="name the benchmarks")
    listing.set_defaults(command=list_tasks)

    answer = commands.add_parser("answer", help="let a model answer a benchmark's questions; resumes after a kill")
    answer.add_argument("task", metavar="TASK", help="a word of `list`")
    answer.add_argument("--root", required=True, type=user_path, metavar="DIR", help="the benchmark's folder")
    answer.add_argument(
        "--answers", required=True, type=user_path, metavar="FILE", help="where the answers go (JSON lines)"
    )
    answer.add_argument("--max-new-tokens", type=positive, help="default: the benchmark's own limit")
    answer.add_argument("--limit", type=positive, metavar="N", help="answer only the first N questions")
    answer.add_argument("--workers", type=positive, default=1, metavar="N", help="number of workers that share FILE")
    answer.add_argument("--worker", type=natural, default=0, metavar="K", help="which of them this is, from 0")
    add_model_options(answer, conv_mode=DEFAULT_CONV_MODE, temperature=0.0, batch_size=8)
    answer.set_defaults(command=answer_task)

    score = commands.add_parser("score", help="score an answers file by the official rules")
    score.add_argument("task", metavar="TASK", help="a word of `list`")
    score.add_argument("--answers", required=True, type=user_path, metavar="FILE")
    score.add_argument(
        "--root", required=True, type=user_path, metavar="DIR", help="folder of questions and annotations"
    )
    score.add_argument("--json", type=user_path, metavar="OUT", help="write every number here")
    score.add_argument("--results", type=user_path, metavar="FILE", help="append the line `name<TAB>value` here")
    score.add_argument("--allow-partial", action="store_true", help="score although answers are missing")
    score.set_defaults(command=score_task)

    report = commands.add_parser("report", help="put several results side by side")
    report.add_argument("results", nargs="+", metavar="[NAME=]FILE.json", help="written by `score --json`")
    report.add_argument("--json", type=user_path, metavar="OUT", help="write the table as JSON, too")
    report.set_defaults(command=report_results)
    return parser


def add_model_options(parser: argparse.ArgumentParser, *, conv_mode: str, temperature: float, batch_size: int) -> None:
    """Add the options that say which model answers and how, common to `answer` and the published commands."""
    parser.add_argument("--model-path", required=True, metavar="DIR", help="checkpoint folder or hub id")
    parser.add_argument("--model-base", metavar="DIR", help="base model of a LoRA or projector-only checkpoint")
    parser.add_argument("--conv-mode", default=conv_mode, metavar="NAME", help=f"conversation template ({conv_mode})")
    parser.add_argument("--temperature", type=float, default=temperature, help=f"0: greedy (default {temperature})")
    parser.add_argument("--reduce", metavar="SPEC", help="token reduction, e.g. TRIM:-1 or none (default: config.json)")
    parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N")
    parser.add_argument("--num-chunks", type=positive, default=1, metavar="N", help="cut the questions into N slices")
    parser.add_argument("--chunk-idx", type=natural, default=0, metavar="K", help="and answer slice K, from 0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator if there is one)")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="default: float16; on a CPU float32"
    )


def user_path(text: str) -> Path:
    """Read a path; a leading `~` is the home folder."""
    return Path(text).expanduser()


def positive(text: str) -> int:
    """Read a whole number above 0."""
    return _read_number(text, 1)


def natural(text: str) -> int:
    """Read a whole number from 0."""
    return _read_number(text, 0)


def _read_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least} on is needed, not {text!r}")
    return int(text)


def list_tasks(arguments: argparse.Namespace) -> None:
    """Print the benchmarks."""
    rows = [
        {"Word": task.name, "Line in the results": task.row, "New tokens": task.max_new_tokens}
        for task in TASKS.values()
    ]
    print(format_table(rows))


def answer_task(arguments: argparse.Namespace) -> None:
    """Answer a benchmark's questions; leave with code 3 if some stayed without an answer."""
    task = find_task(arguments.task)
    questions = task.load(arguments.root)
    max_new_tokens = arguments.max_new_tokens or task.max_new_tokens
    answer_and_exit(arguments, questions, arguments.answers, max_new_tokens, task.key_fields)


def answer_and_exit(
    arguments: argparse.Namespace, questions: list, answers_file: Path, max_new_tokens: int, key_fields: tuple[str, ...]
) -> None:
    """Answer a chunk of questions with the model of `add_model_options`, and tell how it went.

    Args:
        arguments: with the values of `add_model_options`; optionally `limit`, `workers`, `worker`,
            `top_p`, `num_beams`.
        questions: all questions, from which the chunk is taken.
        answers_file: where the answers go.
        max_new_tokens: length limit of an answer.
        key_fields: columns that together name a question.

    Raises:
        SystemExit: with code 3 if questions stayed without an answer.
    """
    # Only this command needs torch; the others answer at once.
    from llava.eval.answering import Checkpoint, make_answers
    from llava.eval.batching import take_chunk
    from llava.eval.runner import Settings

    if arguments.chunk_idx >= arguments.num_chunks:
        raise InputError(
            f"--chunk-idx {arguments.chunk_idx}: with --num-chunks {arguments.num_chunks} it counts from 0"
        )
    checkpoint = Checkpoint(
        path=str(user_path(arguments.model_path)),
        base=arguments.model_base,
        reduce=arguments.reduce,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    settings = Settings(
        model_id=checkpoint.name,
        conv_mode=arguments.conv_mode,
        max_new_tokens=max_new_tokens,
        temperature=arguments.temperature,
        top_p=getattr(arguments, "top_p", None),
        num_beams=getattr(arguments, "num_beams", 1),
        batch_size=arguments.batch_size,
        num_workers=getattr(arguments, "workers", 1),
    )
    outcome = make_answers(
        checkpoint,
        take_chunk(questions, arguments.num_chunks, arguments.chunk_idx),
        answers_file,
        settings,
        key_fields,
        limit=getattr(arguments, "limit", None),
        worker=getattr(arguments, "worker", 0),
        notify=_tell,
    )
    for line in outcome.describe(answers_file):
        _tell(line)
    if not outcome.complete:
        raise SystemExit(EXIT_UNANSWERED)


def score_task(arguments: argparse.Namespace) -> None:
    """Score answers, print the headline, write what was asked for."""
    task = find_task(arguments.task)
    result = score_answers(task, arguments.answers, arguments.root, arguments.allow_partial)
    result["answers"] = str(arguments.answers)
    line = format_line(result)
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.results:
        append_line(arguments.results, line)
    print(line)


def report_results(arguments: argparse.Namespace) -> None:
    """Print one Markdown table per benchmark, a row per run."""
    runs = []
    for argument in arguments.results:
        name, _, file = argument.rpartition("=")
        result = read_result(Path(file))
        runs.append((name or result["model_id"] or Path(file).stem, result))
    tables = compare_runs(runs)
    if arguments.json:
        write_json(arguments.json, tables)
    print("\n\n".join(f"{label}\n\n{format_table(rows)}" for label, rows in tables.items()))


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    run_command(main)
