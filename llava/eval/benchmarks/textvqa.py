"""TextVQA: questions about text in pictures, each answered by ten people, on the validation split.

Files: `llava_textvqa_val_v051_ocr.jsonl` (questions, with the words that a text reader saw), `TextVQA_0.5.1_val.json`
(answers), `train_images/`. A question's id is that of its picture and repeats; the annotation of an answer is found by
this id and the question within its prompt. Source of the rules: LLaVA `eval_textvqa.py` over facebookresearch/mmf
`m4c_evaluators.py`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import InputError
from llava.eval.benchmark import Benchmark, Judge, Question, Row, Scores
from llava.eval.benchmarks._files import load_question_file, read_document, require_any, take
from llava.eval.benchmarks._hub_textvqa import TextVqaVal
from llava.eval.hub import HubForm
from llava.eval.metrics.vqa_accuracy import grade_textvqa, round_half_even
from llava.eval.metrics.vqa_text import normalize_m4c

QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
IMAGE_FOLDER = "train_images"
NUM_REFERENCES = 10

_OLD_PROMPT_START = "OCR tokens: "
_OLD_QUESTION = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_OCR_LINE_START = "Reference OCR token:"


class TextVqa(Benchmark):
    """TextVQA: accuracy on val."""

    name = "textvqa"
    row = "TextVQA (Acc)"
    folders = ("textvqa",)
    hub: ClassVar[Mapping[str, HubForm]] = {"val": TextVqaVal()}
    key_fields = ("question_id", "prompt")

    def load(self, root: Path) -> list[Question]:
        """Read the questions."""
        return load_question_file(root / QUESTION_FILE, root / IMAGE_FOLDER, needs_image=True)

    def score(self, answers: Mapping[str, Row], root: Path, judge: Judge | None = None) -> Scores:
        """Score every answer, and average."""
        require_any(answers, "TextVQA")
        return score_textvqa(answers.values(), root / ANNOTATION_FILE)


def score_textvqa(rows: Iterable[Row], annotation_file: Path) -> Scores:
    """Score answers by the official rules.

    Args:
        rows: of the answers file, at least one.
        annotation_file: the official annotations.

    Raises:
        InputError: an answer is to no question of the annotations.
    """
    annotations = read_annotations(annotation_file)
    lines: list[dict[str, Any]] = []
    for row in rows:
        question = extract_question(row.get("prompt"), row["question_id"])
        annotation = annotations.get((str(row["question_id"]), question))
        if annotation is None:
            raise InputError(f'{annotation_file} has no question "{question}" about picture {row["question_id"]}')
        lines.append(
            {
                "question_id": annotation["question_id"],
                "image_id": annotation["image_id"],
                "score": grade_textvqa(row["text"], annotation["answers"]),
                "processed": normalize_m4c(row["text"]),
            }
        )
    accuracy = 100 * (sum(line["score"] for line in lines) / len(lines))
    return Scores(
        headline=accuracy,
        scores={
            "accuracy": round_half_even(accuracy),
            "accuracy_unrounded": accuracy,
            "per_answer_line": lines,
        },
        count=len(lines),
        columns={"Accuracy": accuracy},
    )


def extract_question(prompt: Any, identity: int | str) -> str:
    """Return the question within a prompt, in lower case.

    Args:
        prompt: the `prompt` column of an answer: two lines (question, how to answer), or three with a line of OCR
            tokens before or after the question, or the single line of older LLaVA versions.
        identity: the answer's `question_id`, for the message.

    Raises:
        InputError: the prompt has another form.
    """
    text = prompt if isinstance(prompt, str) else ""
    lines = text.split("\n")
    if text.startswith(_OLD_PROMPT_START):
        match = _OLD_QUESTION.search(text)
        question = match.group(1) if match else None
    elif f"{_OCR_LINE_START} " in text and len(lines) == 3:
        question = lines[1] if text.startswith(_OCR_LINE_START) else lines[0]
    else:
        question = lines[0] if len(lines) == 2 else None
    if question is None:
        raise InputError(f"textvqa: the prompt of answer {identity} is none of TextVQA's: {prompt!r}")
    return question.lower()


def read_annotations(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the annotations by picture and question in lower case.

    Raises:
        InputError: the file is missing, or something else; a question has not ten answers.
    """
    annotations = {}
    for number, record in enumerate(take(read_document(path), "data", list, str(path))):
        where = f"{path} question {number}"
        answers = take(record, "answers", list, where)
        if len(answers) != NUM_REFERENCES or not all(isinstance(answer, str) for answer in answers):
            raise InputError(f'{where}: "answers" must be a list of {NUM_REFERENCES} strings')
        take(record, "question_id", int, where)
        key = take(record, "image_id", str, where), take(record, "question", str, where).lower()
        annotations[key] = record
    return annotations
