"""Score an answers file of SEED-Bench by type, and turn it into the file that the leaderboard reads."""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmarks.seed import (
    Seed,
    judge_answers,
    list_texts,
    read_right_options,
    summarize,
    write_seed_upload,
)
from llava.eval.predictions import read_answers
from llava.eval.results import Result, format_line
from llava.files import append_line


def main() -> None:
    """Score, print, write. Questions without an answer are wrong, as in LLaVA's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--annotation-file", type=Path, required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", type=Path, required=True, help="the answers file")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="where the upload goes")
    parser.add_argument("--path_to_all_results", type=Path, help="append the image accuracy here, as `name<TAB>value`")
    arguments = parser.parse_args()
    options = read_right_options(arguments.annotation_file)
    texts = list_texts(read_answers(arguments.result_file))
    scores = summarize(judge_answers(options, list(options), texts))
    for name, numbers in scores["per_type"].items():
        print(f"{name}: {numbers['accuracy']:.2f}%")
    print(f"Total accuracy: {scores['total_accuracy']:.2f}%")
    for kind in ("image", "video"):
        if scores[f"n_{kind}"]:
            print(f"{kind} accuracy: {scores[f'{kind}_accuracy']:.2f}%")
    missing = sum(identity not in texts for identity in options)
    if missing:
        print(f"{missing} of {len(options)} questions have no answer: wrong above, empty in the upload")
    write_seed_upload(arguments.result_upload_file, list(options), texts)
    if arguments.path_to_all_results and scores["n_image"]:
        result = Result(Seed.name, Seed.row, scores["image_accuracy"], missing=missing)
        append_line(arguments.path_to_all_results, format_line(result))


if __name__ == "__main__":
    run_command(main)
