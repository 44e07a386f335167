"""Turn an answers file of VQAv2, `DIR/answers/SPLIT/CKPT/merge.jsonl`, into the file that the server reads."""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks._files import write_upload
from llava.eval.benchmarks.vqav2 import find_split, list_upload_ids, make_upload
from llava.eval.predictions import read_answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path("./playground/data/eval/vqav2"))
    parser.add_argument("--ckpt", required=True, help="name of the run")
    parser.add_argument("--split", required=True, help="such as llava_vqav2_mscoco_test-dev2015")
    arguments = parser.parse_args()
    ids = list_upload_ids(arguments.dir, find_split(arguments.split))
    rows = read_answers(arguments.dir / "answers" / arguments.split / arguments.ckpt / "merge.jsonl")
    upload = make_upload(rows, ids)
    write_upload(arguments.dir / "answers_upload" / arguments.split / f"{arguments.ckpt}.json", upload)
    print(f"total results: {len(rows)}, total split: {len(ids)}, error_line: 0")


if __name__ == "__main__":
    run_command(main)
