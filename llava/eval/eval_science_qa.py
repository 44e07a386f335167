"""The published command `python llava/eval/eval_science_qa.py`: score an answers file of ScienceQA.

Flags, the printed line and both files are the published ones. Unlike the original it refuses incomplete answers unless
told to take them.
"""

# ruff: noqa: T201 (a command-line face prints)
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import run_command
from llava.eval.answers import pair_answers, read_answers
from llava.eval.benchmark import Question, row_key
from llava.eval.benchmarks.sqa import (
    SPLIT,
    MarkedAnswer,
    Sqa,
    average_right,
    count_right,
    describe_accuracy,
    mark_answers,
    read_problems,
)
from llava.eval.metrics.choice import LETTERS
from llava.eval.results import Result, format_line, require_complete
from llava.files import append_line, write_json


def main() -> None:
    """Score, print, write."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_science_qa")
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--result-file", type=Path, required=True, help="the answers file")
    parser.add_argument("--output-file", type=Path, required=True, help="right and wrong answers go here (JSON)")
    parser.add_argument("--output-result", type=Path, required=True, help="the score and each option go here (JSON)")
    parser.add_argument("--split", default=SPLIT)
    parser.add_argument("--path_to_all_results", type=Path, help="append the accuracy here, as `name<TAB>value`")
    parser.add_argument("--allow-partial", action="store_true", help="count missing answers as wrong, as published")
    arguments = parser.parse_args()
    problems = read_problems(arguments.base_dir, arguments.split)
    questions = [Question(id=pid) for pid in problems]
    answers = pair_answers(questions, read_answers(arguments.result_file), Sqa.key_fields)
    if not arguments.allow_partial:
        require_complete(questions, answers, Sqa.key_fields, arguments.result_file)
    keys = {question.id: row_key(question.head(), Sqa.key_fields) for question in questions}
    marked = mark_answers(problems, {pid: answers[key] for pid, key in keys.items() if key in answers})
    print(describe_accuracy(marked))
    write_json(arguments.output_file, list_analyses(problems, marked))
    write_json(arguments.output_result, list_results(marked))
    if arguments.path_to_all_results:
        with_image = [answer for answer in marked if answer.is_multimodal]
        missing = len(questions) - len(answers)
        result = Result(Sqa.name, Sqa.row, average_right(with_image), missing=missing)
        append_line(arguments.path_to_all_results, format_line(result))


def list_analyses(
    problems: Mapping[str, Mapping[str, Any]], marked: Sequence[MarkedAnswer]
) -> dict[str, list[dict[str, Any]]]:
    """Sort the answers into right and wrong ones, as the published file has them."""
    analyses: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for answer in marked:
        analyses["correct" if answer.is_right else "incorrect"].append(
            {
                "question_id": answer.pid,
                "parsed_ans": answer.parsed,
                "ground_truth": LETTERS[problems[answer.pid]["answer"]],
                "question": answer.prompt,
                "pred": answer.text,
                "is_multimodal": answer.is_multimodal,
            }
        )
    return analyses


def list_results(marked: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """List the score and each problem's option and answer, as the published file has them."""
    return {
        "acc": average_right(marked),
        "correct": count_right(marked),
        "count": len(marked),
        "results": {answer.pid: answer.index for answer in marked},
        "outputs": {answer.pid: answer.text for answer in marked},
    }


if __name__ == "__main__":
    run_command(main)
