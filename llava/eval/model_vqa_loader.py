"""LLaVA's command `python -m llava.eval.model_vqa_loader`: a question file in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`. Beyond the original it resumes,
batches, reads several images per question, and knows `--reduce`.
"""

import argparse
from pathlib import Path

from llava.cli import positive, user_path
from llava.errors import run_command
from llava.eval.__main__ import add_answer_options, answer_and_exit
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS
from llava.eval.benchmarks._files import load_question_file

KEY_FIELDS = ("question_id", "prompt")
"""Ids alone repeat in the question files of TextVQA and MME."""


def main() -> None:
    answer_question_file("python -m llava.eval.model_vqa_loader", LOADER_MAX_NEW_TOKENS)


def answer_question_file(prog: str, max_new_tokens: int) -> None:
    """Answer the questions that the command line names; also the command `model_vqa`, with another length limit."""
    parser = make_parser(prog, "JSON Lines: question_id, image, text")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=positive, default=1)
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens)
    arguments = parser.parse_args()
    questions = load_question_file(arguments.question_file, arguments.image_folder)
    answer_and_exit(arguments, questions, arguments.answers_file, arguments.max_new_tokens, KEY_FIELDS)


def make_parser(prog: str, question_help: str, conv_mode: str = "llava_v1") -> argparse.ArgumentParser:
    """Describe the flags of LLaVA's commands that answer a question file.

    The defaults are LLaVA's: batches of one, and a template and temperature that no script uses.
    """
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--question-file", type=user_path, required=True, help=question_help)
    parser.add_argument("--image-folder", type=user_path, default=Path(), help="where the `image` names are looked up")
    parser.add_argument("--answers-file", type=user_path, default=Path("answer.jsonl"))
    add_answer_options(parser, conv_mode=conv_mode, temperature=0.2, batch_size=1)
    return parser


if __name__ == "__main__":
    run_command(main)
