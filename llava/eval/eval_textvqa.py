"""LLaVA's command `python -m llava.eval.eval_textvqa`: score answers files of TextVQA.

Flags, printed lines and the line in the results file are LLaVA's.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.errors import InputError, run_command
from llava.eval.benchmarks.textvqa import TextVqa, score_textvqa
from llava.eval.predictions import read_answers
from llava.files import append_line
from llava.gone import look_up

__getattr__ = look_up(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_textvqa")
    parser.add_argument("--annotation-file", type=Path, required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", type=Path, help="an answers file")
    parser.add_argument("--result-dir", type=Path, help="a folder of answers files (*.jsonl)")
    parser.add_argument("--path_to_all_results", type=Path, help="append the accuracy here, as `name<TAB>value`")
    arguments = parser.parse_args()
    if arguments.result_file is None and arguments.result_dir is None:
        raise InputError("name what to score: --result-file FILE or --result-dir DIR")
    files = [arguments.result_file] if arguments.result_file else []
    if arguments.result_dir:
        files += sorted(arguments.result_dir.glob("*.jsonl"))
    if not files:
        raise InputError(f"no answers files (*.jsonl) in {arguments.result_dir}")
    for path in files:
        eval_single(arguments.annotation_file, path, arguments.path_to_all_results)


def eval_single(annotation_file: str | Path, result_file: str | Path, results: Path | None = None) -> None:
    """Print the name of an answers file, the number of answers and their accuracy; append the accuracy to `results`.

    Raises:
        InputError: a file cannot be read, has no answers, or does not fit the other.
    """
    path = Path(result_file)
    rows = read_answers(path)
    if not rows:
        raise InputError(f"{path} has no answers")
    scores = score_textvqa(rows, Path(annotation_file))
    print(path.stem)
    print(f"Samples: {scores.count}\nAccuracy: {scores.headline:.2f}%\n")
    if results:
        append_line(results, f"{TextVqa.row}\t{scores.headline:.2f}")


if __name__ == "__main__":
    run_command(main)
