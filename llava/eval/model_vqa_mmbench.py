"""LLaVA's command `python -m llava.eval.model_vqa_mmbench`: a table of MMBench in, an answers file out.

Flags, row keys and file names are LLaVA's; the work is done by `llava.eval.predict`.
"""

import argparse
from pathlib import Path

from llava.cli import positive, user_path
from llava.errors import run_command
from llava.eval.__main__ import add_answer_options, answer_and_exit
from llava.eval.benchmarks.mmbench import MmBench, load_table_questions
from llava.eval.metrics.choice import CHINESE_LETTER_LINE, LETTER_LINE

LETTER_LINES = {"en": LETTER_LINE, "cn": CHINESE_LETTER_LINE}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.model_vqa_mmbench")
    parser.add_argument("--question-file", type=user_path, required=True, help="such as mmbench_dev_20230712.tsv")
    parser.add_argument("--image-folder", type=user_path, help="accepted without effect: the images are in the table")
    parser.add_argument("--answers-file", type=user_path, default=Path("answer.jsonl"))
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=positive, default=1)
    parser.add_argument(
        "--all-rounds", action="store_true", help="ask each row once per option, rotated, for tables without rotations"
    )
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for nothing but the option's letter")
    parser.add_argument("--lang", choices=list(LETTER_LINES), default="en", help="language in which it is asked for")
    # LLaVA's defaults: batches of one, and a template and temperature that no script uses.
    add_answer_options(parser, conv_mode="llava_v1", temperature=0.2, batch_size=1)
    arguments = parser.parse_args()
    questions = load_table_questions(
        arguments.question_file,
        LETTER_LINES[arguments.lang] if arguments.single_pred_prompt else None,
        arguments.all_rounds,
    )
    answer_and_exit(arguments, questions, arguments.answers_file, MmBench.max_new_tokens, MmBench.key_fields)


if __name__ == "__main__":
    run_command(main)
