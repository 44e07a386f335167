"""LLaVA's command `python -m llava.eval.model_vqa_mmbench`: a table of MMBench in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`. The images are in the table:
`--image-folder` is without effect.
"""

import argparse

from llava.cli import complete_options, positive
from llava.errors import run_command
from llava.eval.__main__ import answer_and_exit
from llava.eval.__main__ import get_chunk as get_chunk
from llava.eval.__main__ import split_list as split_list
from llava.eval.benchmarks.mmbench import MmBench, load_table_questions
from llava.eval.metrics.choice import CHINESE_LETTER_LINE, LETTER_LINE
from llava.eval.model_vqa_loader import make_parser
from llava.gone import look_up

__getattr__ = look_up(__name__)

LETTER_LINES = {"en": LETTER_LINE, "cn": CHINESE_LETTER_LINE}


def main() -> None:
    eval_model(build_parser().parse_args())


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m llava.eval.model_vqa_mmbench", "such as mmbench_dev_20230712.tsv")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=positive, default=1)
    parser.add_argument(
        "--all-rounds", action="store_true", help="ask each row once per option, rotated, for tables without rotations"
    )
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for nothing but the option's letter")
    parser.add_argument("--lang", choices=list(LETTER_LINES), default="en", help="language in which it is asked for")
    return parser


def eval_model(args: object) -> None:
    """Answer a table of MMBench, as the command does; arguments as for `model_vqa_loader.eval_model`."""
    arguments = complete_options(build_parser(), args)
    questions = load_table_questions(
        arguments.question_file,
        LETTER_LINES[arguments.lang] if arguments.single_pred_prompt else None,
        arguments.all_rounds,
    )
    answer_and_exit(arguments, questions, arguments.answers_file, MmBench.max_new_tokens, MmBench.key_fields)


if __name__ == "__main__":
    run_command(main)
