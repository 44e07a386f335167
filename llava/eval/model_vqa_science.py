"""LLaVA's command `python -m llava.eval.model_vqa_science`: ScienceQA's questions in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`.
"""

import argparse

from llava.cli import complete_options
from llava.errors import run_command
from llava.eval.__main__ import answer_and_exit
from llava.eval.__main__ import get_chunk as get_chunk
from llava.eval.__main__ import split_list as split_list
from llava.eval.benchmarks.sqa import Sqa, load_science_questions
from llava.eval.metrics.choice import LETTER_LINE
from llava.eval.model_vqa_loader import make_parser


def main() -> None:
    eval_model(build_parser().parse_args())


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m llava.eval.model_vqa_science", "llava_test_CQM-A.json", conv_mode="llava_v0")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for nothing but the option's letter")
    parser.add_argument("--answer-prompter", action="store_true", help="accepted without effect, as in LLaVA")
    return parser


def eval_model(args: object) -> None:
    """Answer ScienceQA's questions, as the command does; arguments as for `model_vqa_loader.eval_model`."""
    arguments = complete_options(build_parser(), args)
    letter_line = LETTER_LINE if arguments.single_pred_prompt else None
    questions = load_science_questions(arguments.question_file, arguments.image_folder, letter_line)
    answer_and_exit(arguments, questions, arguments.answers_file, Sqa.max_new_tokens, Sqa.key_fields)


if __name__ == "__main__":
    run_command(main)
