"""POPE and GQA of the embedded world as tasks of lmms-eval: parquet files like the hub's, and the YAML that names them.

    python -m playground.shapes.generate --out DIR --train-images 0 --benchmarks "pope gqa"
    python -m playground.shapes.lmms_tasks --root DIR/eval --out TASKS
    python -m lmms_eval eval --tasks shapes_pope,shapes_gqa --include_path TASKS --model ...

Document i of a task is line i of the benchmark's question file. Prompts, generation arguments and metrics are those of
lmms-eval's own `pope` and `gqa`, whose data lie on the hub.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from llava.errors import run_command
from llava.eval.benchmark import Question
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.gqa import ANNOTATION_FILE, DATA_FOLDER, read_scene_questions
from llava.eval.benchmarks.pope import LABEL_FOLDER, pair_labels
from llava.files import atomic_write, write_text
from playground.shapes import sentence

MAX_NEW_TOKENS = {"pope": 128, "gqa": 16}
"""Of lmms-eval's own tasks. Its `llava` model mixes tasks of equal generation arguments up in batches."""
PREFIX = "shapes_"

TASK = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function {module}.to_visual
doc_to_text: !function {module}.to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
{scoring}metadata:
  - version: 0.0
"""
SCORING = {
    "pope": """\
process_results: !function {module}.pope_process_results
metric_list:
  - metric: pope_accuracy
    aggregation: !function {module}.pope_aggregate_accuracy
    higher_is_better: true
""",
    "gqa": """\
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
""",
}
MODULE = "shapes_utils"
FUNCTIONS = f'''\
"""What the tasks beside this file take from a document."""

from lmms_eval.tasks.pope.utils import pope_aggregate_accuracy, pope_process_results  # noqa: F401


def to_visual(doc):
    return [doc["image"].convert("RGB")]


def to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + {sentence.SUFFIX!r}
'''


def pope_answers(root: Path, questions: list[Question]) -> dict[object, str]:
    return {question.id: label for question, label in pair_labels(questions, root / LABEL_FOLDER)}


def gqa_answers(root: Path, questions: list[Question]) -> dict[object, str]:
    records = read_scene_questions(root / DATA_FOLDER / ANNOTATION_FILE)
    return {question.id: records[question.id]["answer"] for question in questions}


ANSWERS: dict[str, Callable[[Path, list[Question]], dict[object, str]]] = {"pope": pope_answers, "gqa": gqa_answers}


def write_tasks(data_root: Path, out: Path) -> list[str]:
    """Write both tasks.

    Args:
        data_root: folder that holds the benchmarks' folders.
        out: folder for the tasks, `--include_path` of lmms-eval.

    Returns:
        The names of the tasks.

    Raises:
        InputError: a benchmark's folder or file is not as it should be.
    """
    for name, max_new_tokens in MAX_NEW_TOKENS.items():
        task = BENCHMARKS[name]
        root = task.find_root(data_root)
        questions = task.load(root)
        parquet = out.absolute() / f"{name}.parquet"
        write_parquet(parquet, questions, ANSWERS[name](root, questions))
        text = TASK.format(
            task=PREFIX + name,
            parquet=parquet,
            module=MODULE,
            max_new_tokens=max_new_tokens,
            scoring=SCORING[name].format(module=MODULE),
        )
        write_text(out / f"{PREFIX}{name}.yaml", text)
    write_text(out / f"{MODULE}.py", FUNCTIONS)
    return [PREFIX + name for name in MAX_NEW_TOKENS]


def write_parquet(path: Path, questions: list[Question], answers: dict[object, str]) -> None:
    """Write one row per question, the image file's bytes within."""
    from datasets import Dataset, Features, Image, Value

    rows = [
        {
            "question_id": str(question.id),
            "question": question.prompt.removesuffix(sentence.SUFFIX),
            "answer": answers[question.id],
            "image": {"bytes": question.images[0].read_bytes(), "path": question.images[0].name},
        }
        for question in questions
    ]
    texts = {name: Value("string") for name in ("question_id", "question", "answer")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        Dataset.from_list(rows, features=Features({**texts, "image": Image()})).to_parquet(str(partial))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write POPE and GQA on shapes as tasks of lmms-eval.")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the benchmarks' folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks (--include_path of lmms-eval)")
    arguments = parser.parse_args()
    print(*write_tasks(arguments.root, arguments.out), sep="\n")  # noqa: T201


if __name__ == "__main__":
    run_command(main)
