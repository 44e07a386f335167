"""LLaVA's command `python llava/eval/summarize_gpt_review.py`: the numbers of LLaVA-Bench review files.

Flags and printed lines are LLaVA's: category, relative rating in percent, and the mean ratings of references and
answers times ten.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.cli import user_path
from llava.errors import InputError, run_command
from llava.eval.benchmarks._files import read_records
from llava.eval.benchmarks.llavabench import UNREADABLE, Summary, summarize_ratings
from llava.gone import look_up

__getattr__ = look_up(__name__)

REVIEW_PREFIXES = ("gpt4_text", "reviews_", "review_")
LONG_RULE = "================================="
VERSION_0613, VERSION_0314 = "0613", "0314"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.summarize_gpt_review")
    parser.add_argument("-d", "--dir", type=user_path, help="folder of review files")
    parser.add_argument("-v", "--version", choices=[VERSION_0314, VERSION_0613], help="only files of this judge")
    parser.add_argument("-s", "--select", nargs="*", default=[], metavar="TEXT", help="only names with all these texts")
    parser.add_argument("-f", "--files", nargs="*", default=[], metavar="FILE", help="these files, in --dir if given")
    parser.add_argument(
        "-i", "--ignore", nargs="*", default=[], type=int, metavar="ID", help="leave out these questions"
    )
    arguments = parser.parse_args()
    for path in find_review_files(arguments.dir, arguments.files):
        title = path.name.replace("gpt4_text_", "").replace(".jsonl", "")
        version = VERSION_0613 if VERSION_0613 in title else VERSION_0314
        if arguments.version in (None, version) and all(text in title for text in arguments.select):
            print_summary(title, summarize_reviews(path, set(arguments.ignore)))


def find_review_files(folder: Path | None, names: list[str]) -> list[Path]:
    """List the review files that the options mean, by name."""
    if names:
        return sorted((folder or Path()) / user_path(name) for name in names)
    if folder is None:
        raise InputError("which review files? give --files FILE ... or --dir FOLDER")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    is_review_folder = "review" in str(folder)
    found = [
        path
        for path in sorted(folder.glob("*.jsonl"))
        # The cache of a judge is beside the reviews.
        if (is_review_folder or path.name.startswith(REVIEW_PREFIXES)) and not path.name.endswith(".judge.jsonl")
    ]
    if not found:
        raise InputError(f"{folder} has no review files (*.jsonl)")
    return found


def summarize_reviews(path: Path, ignored: set[int]) -> Summary:
    """Average the ratings of a review file but for the questions left out."""
    reviews = [review for review in read_records(path) if review.get("question_id") not in list(ignored)]
    for review in reviews:
        where, ratings = f"{path}, question {review.get('question_id')}", review.get("tuple")
        is_pair = isinstance(ratings, list) and len(ratings) == len(UNREADABLE)
        if not is_pair or not all(isinstance(rating, int | float) for rating in ratings):
            raise InputError(f'{where}: "tuple" must be two numbers')
        if not isinstance(review.get("category"), str | None):
            raise InputError(f'{where}: "category" must be a string')
    if not reviews:
        raise InputError(f"{path}: no question is left")
    return summarize_ratings([review.get("category") for review in reviews], [review["tuple"] for review in reviews])


def print_summary(title: str, summary: Summary) -> None:
    print(title)
    for name, numbers in sorted(summary.items()):
        print(name, numbers["relative"], numbers["gpt4"], numbers["model"])
    print(LONG_RULE)


if __name__ == "__main__":
    run_command(main)
