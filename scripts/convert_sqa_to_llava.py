"""Make LLaVA's question file of ScienceQA, `llava_<split>_CQM-A.json`, from the dataset's own files."""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks.sqa import SPLIT, make_record, read_problems
from llava.files import write_json

PROMPT_FORMAT = "CQM-A"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "command", nargs="?", choices=["convert_to_llava"], help="as in LLaVA's script, which has no other"
    )
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", default=SPLIT)
    parser.add_argument("--prompt-format", choices=[PROMPT_FORMAT], default=PROMPT_FORMAT)
    arguments = parser.parse_args()
    problems = read_problems(arguments.base_dir, arguments.split)
    path = arguments.base_dir / f"llava_{arguments.split}_{arguments.prompt_format}.json"
    write_json(path, [make_record(pid, problem) for pid, problem in problems.items()])
    print(f"{len(problems)} questions in {path}")


if __name__ == "__main__":
    run_command(main)
