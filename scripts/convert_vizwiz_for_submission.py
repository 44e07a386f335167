"""Turn an answers file of VizWiz into the file that the server reads."""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks._files import load_question_file, write_upload
from llava.eval.benchmarks.vizwiz import VizWiz, make_upload
from llava.eval.predictions import pair_answers, read_answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--annotation-file", type=Path, required=True, help="the questions: llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="the answers file")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="where the upload goes")
    arguments = parser.parse_args()
    questions = load_question_file(arguments.annotation_file, arguments.annotation_file.parent, needs_image=True)
    answers = pair_answers(questions, read_answers(arguments.result_file), VizWiz.key_fields)
    write_upload(arguments.result_upload_file, make_upload(answers, questions))
    print(f"total results: {len(answers)}, total split: {len(questions)}, error_line: 0")


if __name__ == "__main__":
    run_command(main)
