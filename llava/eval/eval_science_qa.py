"""LLaVA's command `python llava/eval/eval_science_qa.py`: score an answers file of ScienceQA.

Flags, the printed line and both files are LLaVA's. Unlike LLaVA's it refuses incomplete answers unless told to take
them.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import run_command
from llava.eval.benchmark import Question, Row, Verdict, row_key
from llava.eval.benchmarks.sqa import (
    SPLIT,
    UNANSWERED,
    Problem,
    Sqa,
    average_points,
    choose_with_image,
    count_correct,
    describe_accuracy,
    find_option,
    judge_answers,
    read_problems,
)
from llava.eval.predictions import pair_answers, read_answers
from llava.eval.results import Result, format_line, require_complete
from llava.files import append_line, write_json
from llava.gone import look_up

__getattr__ = look_up(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_science_qa")
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--result-file", type=Path, required=True, help="the answers file")
    parser.add_argument("--output-file", type=Path, required=True, help="right and wrong answers go here (JSON)")
    parser.add_argument("--output-result", type=Path, required=True, help="the score and each option go here (JSON)")
    parser.add_argument("--split", default=SPLIT)
    parser.add_argument("--path_to_all_results", type=Path, help="append the accuracy here, as `name<TAB>value`")
    parser.add_argument("--allow-partial", action="store_true", help="count missing answers as wrong, as LLaVA does")
    arguments = parser.parse_args()
    problems = read_problems(arguments.base_dir, arguments.split)
    questions = [Question(id=pid) for pid in problems]
    answers = pair_answers(questions, read_answers(arguments.result_file), Sqa.key_fields)
    if not arguments.allow_partial:
        require_complete(questions, answers, Sqa.key_fields, arguments.result_file)
    keys = {question.id: row_key(question.head(), Sqa.key_fields) for question in questions}
    rows = {pid: answers[key] for pid, key in keys.items() if key in answers}
    verdicts = judge_answers(problems, rows)
    print(describe_accuracy(verdicts))
    write_json(arguments.output_file, list_analyses(verdicts, rows))
    write_json(arguments.output_result, list_results(problems, verdicts))
    if arguments.path_to_all_results:
        headline, missing = average_points(choose_with_image(verdicts.values())), len(questions) - len(answers)
        result = Result(Sqa.name, Sqa.row, headline, missing=missing)
        append_line(arguments.path_to_all_results, format_line(result))


def list_analyses(verdicts: Mapping[str, Verdict], rows: Mapping[str, Row]) -> dict[str, list[dict[str, Any]]]:
    """Sort the answers into right and wrong ones, as LLaVA's file has them."""
    analyses: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for pid, verdict in verdicts.items():
        analyses["correct" if verdict.correct else "incorrect"].append(
            {
                "question_id": pid,
                "parsed_ans": verdict.parsed,
                "ground_truth": verdict.reference,
                "question": rows.get(pid, UNANSWERED).get("prompt") or "",
                "pred": verdict.prediction,
                "is_multimodal": bool(choose_with_image([verdict])),
            }
        )
    return analyses


def list_results(problems: Mapping[str, Problem], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """List the score and each problem's option and answer, as LLaVA's file has them."""
    return {
        "acc": average_points(verdicts.values()),
        "correct": count_correct(verdicts.values()),
        "count": len(verdicts),
        "results": {pid: find_option(verdict.parsed, problems[pid]) for pid, verdict in verdicts.items()},
        "outputs": {pid: verdict.prediction for pid, verdict in verdicts.items()},
    }


if __name__ == "__main__":
    run_command(main)
