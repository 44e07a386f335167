"""LLaVA's command `python llava/eval/eval_pope.py`: score an answers file of POPE and print every number.

Flags, printed lines and the line in the results file are LLaVA's. Unlike LLaVA's it matches answers by id, makes sure
that the label files belong to the question file, and looks at no other file in their folder.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path
from typing import Any

from llava.errors import run_command
from llava.eval.benchmarks._files import load_question_file
from llava.eval.benchmarks.pope import IMAGE_FOLDER, Pope, score_pope
from llava.eval.predictions import pair_answers, read_answers
from llava.eval.results import Result, format_line, require_complete
from llava.files import append_line
from llava.gone import look_up

__getattr__ = look_up(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_pope")
    parser.add_argument("--annotation-dir", type=Path, required=True, help="folder of coco_pope_<category>.json")
    parser.add_argument("--question-file", type=Path, required=True, help="llava_pope_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="the answers file")
    parser.add_argument("--path_to_all_results", type=Path, help="append the average here, as `name<TAB>value`")
    arguments = parser.parse_args()
    questions = load_question_file(arguments.question_file, arguments.question_file.parent / IMAGE_FOLDER)
    answers = pair_answers(questions, read_answers(arguments.result_file), Pope.key_fields)
    require_complete(questions, answers, Pope.key_fields, arguments.result_file)
    scores = score_pope(questions, answers, arguments.annotation_dir)
    for category, numbers in scores.scores["categories"].items():
        print_category(category, numbers)
    print(f"avg of F1: {scores.headline:.2f}")
    if arguments.path_to_all_results:
        append_line(arguments.path_to_all_results, format_line(Result(Pope.name, Pope.row, scores.headline)))


def print_category(category: str, numbers: dict[str, Any]) -> None:
    print(f"Category: {category}, # samples: {numbers['n']}")
    print("TP\tFP\tTN\tFN\t")
    print("\t".join(str(numbers[name]) for name in ("TP", "FP", "TN", "FN")))
    titles = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1 score"}
    for name, title in {**titles, "yes_ratio": "Yes ratio"}.items():
        print(f"{title}: {numbers[name]}")
    print(", ".join(f"{numbers[name]:.3f}" for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
    print("====================================")


if __name__ == "__main__":
    run_command(main)
