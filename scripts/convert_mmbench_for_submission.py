"""Turn an answers file of MMBench into the workbook that its server reads.

Reads `EXPERIMENT.jsonl` (or `EXPERIMENT/merge.jsonl`) in the folder of results, writes `EXPERIMENT.xlsx`. Of answers of
several rounds the first goes into the workbook: it is about the table's own order of options.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks.mmbench import MmBench, load_table_questions, write_upload
from llava.eval.predictions import pair_answers, read_answers
from llava.eval.results import require_complete


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--annotation-file", type=Path, required=True, help="the table, such as mmbench_dev_20230712.tsv"
    )
    parser.add_argument("--result-dir", type=Path, required=True, help="folder of the answers file")
    parser.add_argument("--upload-dir", type=Path, required=True, help="folder for the workbook")
    parser.add_argument("--experiment", required=True, help="name of the answers file, without .jsonl")
    arguments = parser.parse_args()
    result_file = arguments.result_dir / f"{arguments.experiment}.jsonl"
    merged = arguments.result_dir / arguments.experiment / "merge.jsonl"
    if not result_file.is_file() and merged.is_file():
        result_file = merged
    rows = read_answers(result_file)
    all_rounds = any(row.get("round_id") for row in rows)
    questions = load_table_questions(arguments.annotation_file, letter_line=None, all_rounds=all_rounds)
    answers = pair_answers(questions, rows, MmBench.key_fields)
    require_complete(questions, answers, MmBench.key_fields, result_file)
    upload = arguments.upload_dir / f"{arguments.experiment}.xlsx"
    print(write_upload(arguments.annotation_file, list(answers.values()), upload))


if __name__ == "__main__":
    run_command(main)
