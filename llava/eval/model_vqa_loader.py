"""LLaVA's command `python -m llava.eval.model_vqa_loader`: a question file in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`. Beyond the original it resumes,
batches, reads several images per question, and knows `--reduce`.
"""

import argparse
from pathlib import Path

from llava.cli import complete_options, positive, user_path
from llava.errors import run_command
from llava.eval.__main__ import add_answer_options, answer_and_exit
from llava.eval.__main__ import get_chunk as get_chunk
from llava.eval.__main__ import split_list as split_list
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS
from llava.eval.benchmarks._files import load_question_file
from llava.gone import look_up

__getattr__ = look_up(__name__)

KEY_FIELDS = ("question_id", "prompt")
"""Ids alone repeat in the question files of TextVQA and MME."""


def main() -> None:
    eval_model(build_parser().parse_args())


def eval_model(args: object) -> None:
    """Answer a question file, as the command does.

    Args:
        args: parsed options, or any object with LLaVA's attributes; all but `model_path` and `question_file` may be
            missing and then have the command's defaults.

    Raises:
        InputError: an option, the checkpoint, the questions or their images are not usable.
        SystemExit: with code 3 if questions stayed without an answer.
    """
    answer_question_file(args, build_parser())


def build_parser(
    prog: str = "python -m llava.eval.model_vqa_loader", max_new_tokens: int = LOADER_MAX_NEW_TOKENS
) -> argparse.ArgumentParser:
    """Return the parser of the command; also of `model_vqa`, with another length limit."""
    parser = make_parser(prog, "JSON Lines: question_id, image, text")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=positive, default=1)
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens)
    return parser


def answer_question_file(args: object, parser: argparse.ArgumentParser) -> None:
    """Answer the questions that options of `build_parser` name; see `eval_model`."""
    arguments = complete_options(parser, args)
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
