"""Turn an answers file of GQA into the file that GQA's own `eval.py` reads; `llava.eval score gqa` needs neither."""

import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks._files import write_upload
from llava.eval.benchmarks.gqa import make_predictions
from llava.eval.predictions import read_answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--src", type=Path, required=True, help="the answers file")
    parser.add_argument("--dst", type=Path, required=True, help="testdev_balanced_predictions.json")
    arguments = parser.parse_args()
    write_upload(arguments.dst, make_predictions(read_answers(arguments.src)))


if __name__ == "__main__":
    run_command(main)
