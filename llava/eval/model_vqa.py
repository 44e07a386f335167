"""LLaVA's command `python -m llava.eval.model_vqa`: a question file in, an answers file of free text out.

The same as `model_vqa_loader`, with room for long answers; LLaVA-Bench and MM-Vet are answered by it.
"""

import argparse

from llava.errors import run_command
from llava.eval import model_vqa_loader
from llava.eval.__main__ import get_chunk as get_chunk
from llava.eval.__main__ import split_list as split_list

MAX_NEW_TOKENS = 1024


def main() -> None:
    eval_model(build_parser().parse_args())


def eval_model(args: object) -> None:
    """Answer a question file, as the command does; arguments as for `model_vqa_loader.eval_model`."""
    model_vqa_loader.answer_question_file(args, build_parser())


def build_parser() -> argparse.ArgumentParser:
    return model_vqa_loader.build_parser("python -m llava.eval.model_vqa", MAX_NEW_TOKENS)


if __name__ == "__main__":
    run_command(main)
