"""From answers to numbers on disk: the score of one run, its line in the results file, and tables of several runs.

A result is plain JSON data: `task`, `row`, `headline` (unrounded), `scores` (everything), `count`, `columns` (what a
table shows), `missing` (questions without an answer), `judge` (its name), `offline_judge`, `headline_judged` (the
headline is the judge's), `model_id` and `tokens` (means per question with an image).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.answers import explain_write_errors, name_questions, pair_answers, read_answers
from llava.eval.benchmark import Benchmark, Judge, Question, Row, row_key

Result = dict[str, Any]

OFFLINE_MARK = " [judge: exact]"
"""Beside every number of the offline stand-in for a judge, so that it is never taken for the benchmark's."""


class ServerOnlyError(InputError):
    """The score of this split is not to be had here: its annotations are not public."""


def score_answers(
    task: Benchmark, answers_file: Path, root: Path, allow_partial: bool = False, judge: Judge | None = None
) -> Result:
    """Score an answers file.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        allow_partial: score what is there although answers are missing.
        judge: for benchmarks that use one.

    Raises:
        InputError: answers are missing, belong to other questions, or contradict one another; there is no judge
            where one is needed.
        ServerOnlyError: the annotations of this split are not public.
    """
    questions, answers = pair_with_questions(task, answers_file, root, allow_partial)
    if judge is None and task.uses_judge == "always":
        raise InputError(f"{task.name} is scored by a judge: name one with --judge (a language model, or exact)")
    scores = task.score(answers, root, judge)
    if scores is None:
        raise ServerOnlyError(
            f"{task.name}: only {task.server or 'a server'} can score this split; "
            "`python -m llava.eval export` writes what to send there"
        )
    return {
        "task": task.name,
        "row": task.row,
        "headline": scores.headline,
        "scores": dict(scores.scores),
        "count": scores.count,
        "columns": dict(scores.columns),
        "missing": len(questions) - len(answers),
        "judge": judge.name if judge else None,
        "offline_judge": judge is not None and judge.offline,
        "headline_judged": task.uses_judge == "always",
        "model_id": next(iter(answers.values()))["model_id"] if answers else None,
        "tokens": average_tokens(answers.values()),
    }


def pair_with_questions(
    task: Benchmark, answers_file: Path, root: Path, allow_partial: bool = False
) -> tuple[list[Question], dict[str, Row]]:
    """Read a benchmark's questions and the answers to them.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        allow_partial: take what is there although answers are missing.

    Returns:
        All questions, and the row of each answered one by its key.

    Raises:
        InputError: answers are missing, belong to other questions, or contradict one another.
    """
    questions = task.load(root)
    answers = pair_answers(questions, read_answers(answers_file), task.key_fields)
    if not allow_partial:
        require_complete(questions, answers, task.key_fields, answers_file)
    return questions, answers


def export_answers(
    task: Benchmark, answers_file: Path, root: Path, destination: Path, allow_partial: bool = False
) -> list[Path]:
    """Write the files that the benchmark's server or official script reads; return them.

    Args:
        task: the benchmark.
        answers_file: one row per question, in any order.
        root: the benchmark's folder.
        destination: folder for the files; made if it is not there.
        allow_partial: export what is there although answers are missing.

    Raises:
        InputError: as for `score_answers`, or the benchmark has no such files, or they cannot be written.
    """
    _, answers = pair_with_questions(task, answers_file, root, allow_partial)
    with explain_write_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        return task.export(answers, root, destination)


def require_complete(
    questions: Sequence[Question], answers: Mapping[str, Row], key_fields: Sequence[str], answers_file: Path
) -> None:
    """Make sure that every question has an answer.

    Raises:
        InputError: some have none; the first are named.
    """
    missing = [question for question in questions if row_key(question.head(), key_fields) not in answers]
    if missing:
        raise InputError(
            f"{answers_file} lacks {len(missing)} of {len(questions)} answers (question {name_questions(missing)}); "
            "answer them, or score what is there with `python -m llava.eval score ... --allow-partial`"
        )


def average_tokens(rows: Sequence[Row]) -> dict[str, float] | None:
    """Average the visual tokens of questions with images.

    Returns:
        `mean_tokens` that the language model read and `mean_patches` that the vision tower saw, per question; None
        for answers that do not tell, such as those of other programs.
    """
    counts = [row.get("metadata") or {} for row in rows]
    counts = [count for count in counts if count.get("num_patches")]
    if not counts:
        return None
    return {
        "mean_tokens": sum(count["num_tokens"] for count in counts) / len(counts),
        "mean_patches": sum(count["num_patches"] for count in counts) / len(counts),
    }


def format_line(result: Result) -> str:
    """Write a result as its `name<TAB>value` line, two digits; a partial one and one of an offline judge say so."""
    # Not "so many of so many": some official scorers count a missing answer as a wrong one.
    partial = f" [{result['missing']} answers missing]" if result["missing"] else ""
    return f"{result['row']}{mark_judge(result)}{partial}\t{result['headline']:.2f}"


def mark_judge(result: Result) -> str:
    """Return what stands beside a headline that the offline judge gave, which is not the benchmark's; else nothing."""
    return OFFLINE_MARK if result.get("offline_judge") and result.get("headline_judged", True) else ""


def label_result(result: Result) -> str:
    """Name what a headline compares with: its benchmark and, where a judge gave it, the judge."""
    if not result.get("judge") or not result.get("headline_judged", True):
        return result["row"]
    return f"{result['row']}{mark_judge(result) or name_judge(result)}"


def name_judge(result: Result) -> str:
    """Return what stands beside the columns of a run that a judge had a part in; else nothing."""
    if result.get("offline_judge"):
        return OFFLINE_MARK
    return f" [judge: {result['judge']}]" if result.get("judge") else ""


def append_line(path: Path, line: str) -> None:
    """Append a line to the results file; it is on the disk after return."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> None:
    """Write JSON data; the file appears complete or not at all."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def read_result(path: Path) -> Result:
    """Read a result that `score --json` wrote.

    Raises:
        InputError: the file is missing or something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; `python -m llava.eval score ... --json {path}` makes it") from None
    except ValueError:
        raise InputError(f"{path} is not JSON") from None
    if not isinstance(result, dict) or not {"task", "row", "headline", "columns", "missing"} <= result.keys():
        raise InputError(f"{path} is not a result of `python -m llava.eval score`")
    return result


def compare_runs(runs: Sequence[tuple[str, Result]]) -> dict[str, list[dict[str, Any]]]:
    """Put runs side by side.

    Args:
        runs: (name of the run, result); results of several benchmarks may be mixed.

    Returns:
        For each benchmark's label the rows of its table, in the order given: the run, its columns, `Tokens` (mean
        visual tokens per question), `% of tokens` and `% of first` (of the headline), None where unknown.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, Result] = {}
    for name, result in runs:
        label = f"{result['row']}{name_judge(result)}"
        reference = first.setdefault(label, result)
        tokens = result.get("tokens") or {}
        kept, seen = tokens.get("mean_tokens"), tokens.get("mean_patches")
        tables.setdefault(label, []).append(
            {
                "Run": name + (f" ({result['missing']} answers missing)" if result["missing"] else ""),
                **result["columns"],
                "Tokens": kept,
                "% of tokens": 100 * kept / seen if seen else None,
                "% of first": 100 * result["headline"] / reference["headline"] if reference["headline"] else None,
            }
        )
    return tables


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as an aligned Markdown table.

    Args:
        rows: cells by column title; the first row's titles and order count. Numbers get two digits and stand at the
            right, None is a dash.
    """
    if not rows:
        return ""
    titles = list(rows[0])
    cells = [titles, *([format_cell(row.get(title)) for title in titles] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    is_text = [any(isinstance(row.get(title), str) for row in rows) for title in titles]

    def join(row: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, is_text, strict=True)]
    return "\n".join([join(cells[0]), f"| {' | '.join(rule)} |", *map(join, cells[1:])])


def format_cell(value: Any) -> str:
    """Write a table's cell: numbers with a fraction get two digits, None is a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
