"""LLaVA's command `python -m llava.eval.model_vqa`: a question file in, an answers file of free text out.

The same as `model_vqa_loader`, with room for long answers; LLaVA-Bench and MM-Vet are answered by it.
"""

from llava.errors import run_command
from llava.eval.model_vqa_loader import answer_question_file

MAX_NEW_TOKENS = 1024


def main() -> None:
    answer_question_file("python -m llava.eval.model_vqa", MAX_NEW_TOKENS)


if __name__ == "__main__":
    run_command(main)
