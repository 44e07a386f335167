"""Make LLaVA's question file of ScienceQA, `llava_<split>_CQM-A.json`, from the dataset's own files."""

# ruff: noqa: T201 (a command-line face prints)
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import run_command
from llava.eval.benchmarks.sqa import SPLIT, read_problems
from llava.eval.metrics.choice import LETTERS
from llava.files import write_json

PROMPT_FORMAT = "CQM-A"


def main() -> None:
    """Convert, and say where the file is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="?", choices=["convert_to_llava"], help="as published; nothing else is there")
    parser.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", default=SPLIT)
    parser.add_argument("--prompt-format", choices=[PROMPT_FORMAT], default=PROMPT_FORMAT)
    arguments = parser.parse_args()
    problems = read_problems(arguments.base_dir, arguments.split)
    path = arguments.base_dir / f"llava_{arguments.split}_{arguments.prompt_format}.json"
    write_json(path, [make_record(pid, problem) for pid, problem in problems.items()])
    print(f"{len(problems)} questions in {path}")


def make_record(pid: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    """Make the record of a problem: context, question and options, as LLaVA-1.5 words them."""
    lines = [f"Context: {problem['hint']}"] if problem.get("hint") else []
    lines += [
        problem["question"],
        *(f"{letter}. {text}" for letter, text in zip(LETTERS, problem["choices"], strict=False)),
    ]
    image = {"image": f"{pid}/{problem['image']}"} if problem.get("image") else {}
    text = "\n".join([DEFAULT_IMAGE_TOKEN, *lines] if image else lines)
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": LETTERS[problem["answer"]]}]
    return {"id": pid, **image, "conversations": turns}


if __name__ == "__main__":
    run_command(main)
