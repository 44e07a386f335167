"""LLaVA's command `python scripts/convert_mmvet_for_eval.py`: answers in the form that MM-Vet's evaluator reads."""

import argparse

from llava.cli import user_path
from llava.errors import run_command
from llava.eval.benchmarks.mmvet import write_predictions
from llava.eval.predictions import read_answers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python scripts/convert_mmvet_for_eval.py")
    parser.add_argument("--src", type=user_path, required=True, help="answers file (JSON Lines)")
    parser.add_argument("--dst", type=user_path, required=True, help="results/<name>.json")
    arguments = parser.parse_args()
    write_predictions(read_answers(arguments.src), arguments.dst)


if __name__ == "__main__":
    run_command(main)
