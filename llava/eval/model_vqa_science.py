"""LLaVA's command `python -m llava.eval.model_vqa_science`: ScienceQA's questions in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`.
"""

import argparse
from pathlib import Path

from llava.cli import user_path
from llava.errors import run_command
from llava.eval.__main__ import add_answer_options, answer_and_exit
from llava.eval.benchmarks.sqa import Sqa, load_science_questions
from llava.eval.metrics.choice import LETTER_LINE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.model_vqa_science")
    parser.add_argument("--question-file", type=user_path, required=True, help="llava_test_CQM-A.json")
    parser.add_argument("--image-folder", type=user_path, default=Path(), help="where the `image` names are looked up")
    parser.add_argument("--answers-file", type=user_path, default=Path("answer.jsonl"))
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for nothing but the option's letter")
    parser.add_argument("--answer-prompter", action="store_true", help="accepted without effect, as in LLaVA")
    # LLaVA's defaults: batches of one, and a template and temperature that no script uses.
    add_answer_options(parser, conv_mode="llava_v0", temperature=0.2, batch_size=1)
    arguments = parser.parse_args()
    questions = load_science_questions(
        arguments.question_file,
        arguments.image_folder,
        LETTER_LINE if arguments.single_pred_prompt else None,
    )
    answer_and_exit(arguments, questions, arguments.answers_file, Sqa.max_new_tokens, Sqa.key_fields)


if __name__ == "__main__":
    run_command(main)
