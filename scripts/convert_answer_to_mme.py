"""Turn an answers file of MME into the files that its own `eval_tool/calculation.py` reads.

Reads `answers/EXPERIMENT.jsonl`, writes `eval_tool/answers/EXPERIMENT/<subtask>.txt`, both in the folder of MME.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks.mme import QUESTION_FILE, Mme
from llava.eval.results import export_answers

DEFAULT_FOLDER = Path(__file__).parents[1] / "playground" / "data" / "eval" / "MME"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiment", required=True, help="name of the answers file, without .jsonl")
    parser.add_argument(
        "--root", type=Path, help=f"folder of MME (default: this one if it has {QUESTION_FILE}, else {DEFAULT_FOLDER})"
    )
    arguments = parser.parse_args()
    root = arguments.root or (Path() if Path(QUESTION_FILE).is_file() else DEFAULT_FOLDER)
    destination = root / "eval_tool" / "answers" / arguments.experiment
    files = export_answers(Mme(), root / "answers" / f"{arguments.experiment}.jsonl", root, destination)
    print(f"{len(files)} files in {destination}")


if __name__ == "__main__":
    run_command(main)
