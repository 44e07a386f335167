"""LLaVA's command `python llava/eval/eval_gpt_review_bench.py`: let a language model rate LLaVA-Bench answers.

Flags and the review file are LLaVA's. Unlike the original it pairs by id, works with `openai` 1 and later and any
compatible endpoint, and goes on after a kill: replies are kept in `<output>.judge.jsonl`, and the review file appears
when all are there. A review file of other answers is never mixed in or overwritten.
"""

# ruff: noqa: T201 (a command prints)
import argparse
from pathlib import Path

from llava.cli import positive, user_path
from llava.errors import InputError, run_command
from llava.eval.benchmarks._files import load_question_file, read_records
from llava.eval.benchmarks.llavabench import (
    IMAGE_FOLDER,
    MAX_TOKENS,
    OWN_RULE_FILE,
    LlavaBench,
    ask_judge,
    make_review,
    pair_comparisons,
)
from llava.eval.judge import make_judge
from llava.eval.predictions import pair_answers, read_answers
from llava.eval.results import require_complete
from llava.files import write_jsonl
from llava.gone import look_up

__getattr__ = look_up(__name__)

NUM_ANSWER_FILES = 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_gpt_review_bench")
    parser.add_argument("-q", "--question", type=user_path, required=True, help="questions.jsonl")
    parser.add_argument("-c", "--context", type=user_path, required=True, help="context.jsonl")
    parser.add_argument(
        "-a",
        "--answer-list",
        type=user_path,
        nargs=NUM_ANSWER_FILES,
        required=True,
        metavar=("REFERENCE", "ANSWERS"),
        help="answers_gpt4.jsonl and the model's answers",
    )
    parser.add_argument(
        "-r", "--rule", type=user_path, default=OWN_RULE_FILE, help="the instruction to the judge, by category"
    )
    parser.add_argument(
        "-o", "--output", type=user_path, required=True, help="where the reviews go, e.g. reviews/X.jsonl"
    )
    parser.add_argument("--max-tokens", type=positive, default=MAX_TOKENS, help="length limit of a reply")
    parser.add_argument("--judge", metavar="NAME", help="exact: an offline stand-in; default: the endpoint")
    parser.add_argument(
        "--judge-model", metavar="MODEL", help=f"model at the endpoint (default: {LlavaBench.judge_model})"
    )
    arguments = parser.parse_args()
    judge = make_judge(
        arguments.judge, arguments.judge_model, arguments.output.with_suffix(".judge.jsonl"), LlavaBench()
    )
    reference_file, answers_file = arguments.answer_list
    questions = load_question_file(arguments.question, arguments.question.parent / IMAGE_FOLDER)
    answers = pair_answers(questions, read_answers(answers_file), LlavaBench.key_fields)
    require_complete(questions, answers, LlavaBench.key_fields, answers_file)
    comparisons = pair_comparisons(questions, read_records(reference_file), answers, arguments.context, arguments.rule)
    refuse_other_reviews(arguments.output, {str(each.answer.get("answer_id")) for each in comparisons})
    replies = judge.map(lambda each: ask_judge(judge, each, max_tokens=arguments.max_tokens), comparisons)
    reviews = [
        make_review(number, each, reply)
        for number, (each, reply) in enumerate(zip(comparisons, replies, strict=True), start=1)
    ]
    write_jsonl(arguments.output, reviews)
    print(f"{len(reviews)} reviews by {judge.name} in {arguments.output}")


def refuse_other_reviews(path: Path, answer_ids: set[str]) -> None:
    """Refuse to overwrite a review file of other answers."""
    if not path.is_file() or not path.stat().st_size:
        return
    others = {str(review.get("answer2_id")) for review in read_records(path)} - answer_ids
    if others:
        raise InputError(f"{path} has reviews of other answers (answer {min(others)}): name another --output")


if __name__ == "__main__":
    run_command(main)
