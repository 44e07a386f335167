"""Multiple choice: how a letter is asked for, which one an answer means to the official scripts, and CircularEval.

The rules are crude on purpose: an answer must mean here exactly what it means to the official script. Sources:
LLaVA's `eval_science_qa.py`; VLMEvalKit `can_infer` (as in the ms-vlmeval 0.0.20 wheel) and `mcq_circular_eval`; the
first MMBench script, open-compass/opencompass `tools/eval_mmbench.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LETTER_LINE = "Answer with the option's letter from the given choices directly."
CHINESE_LETTER_LINE = "请直接回答选项字母。"
"""The last line of a question, which asks for the letter and nothing else."""

LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
"""What ScienceQA's script calls an answer without a letter."""

NO_MATCH = "Z"
"""VLMEvalKit's letter for "none of the options"."""
API_FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
TRUSTED_TAIL_WORDS = 4
"""A letter counts if it is one of the last four words; this condition differs between versions of VLMEvalKit."""
MAX_LENGTH_RATIO = 2
"""Answers longer than twice all options together are not searched for an option's text."""

OPENCOMPASS_FORMS = ("X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X).")
"""Forms of a letter X, in the order in which the opencompass script tries them."""
OPENCOMPASS_ARTICLE_WORDS = 3
"""In answers of more words a bare `A` may be the article."""

InferLetter = Callable[[str, Mapping[str, str]], str | None]
"""A rule: (prediction, text of the options by letter) to a letter, or None where it cannot decide."""


# ----------------------------------------------------------------------------------------------------------- letters
def parse_science_answer(text: str) -> str:
    """Read an answer to a ScienceQA question: the letter, which need not be one of the options, or `FAILED`.

    A letter A to E alone; or as `B. ...`; or in one and only one `The answer is B` with a character after it.
    """
    if text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    # The period is a wildcard in the official pattern.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else FAILED


def infer_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """Read an answer as VLMEvalKit does.

    Args:
        prediction: the answer as its table holds it; an empty cell is `nan`.
        options: text by letter, of the options that are there.

    Returns:
        A letter of the options, `Z` for a refusal, or None where only a judge can decide.
    """
    return _find_letter(prediction, options) or _find_text(prediction, options, MAX_LENGTH_RATIO)


def _find_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """Find the one option letter that is a word of its own near the end."""
    if API_FAILURE in prediction:
        return None
    if any(refusal in prediction for refusal in REFUSALS):
        return NO_MATCH
    words = prediction.translate(_PUNCTUATION_TO_SPACE).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) >= len(words) - TRUSTED_TAIL_WORDS:
        return present[0]
    return NO_MATCH if not present and NO_MATCH in words else None


def _find_text(prediction: str, options: Mapping[str, str], max_length_ratio: float | None = None) -> str | None:
    """Find the one option whose text occurs in the answer, in upper or lower case."""
    lowered = prediction.lower()
    if max_length_ratio is not None and len(lowered) > max_length_ratio * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def infer_letter_opencompass(prediction: str, options: Mapping[str, str]) -> str | None:
    """Read an answer as the first MMBench script did: letters A to E whatever the options are; see `infer_letter`."""
    words = prediction.split()
    present = [letter for letter in LETTERS if letter in words]
    if len(present) == 1 and (present[0] != "A" or len(words) <= OPENCOMPASS_ARTICLE_WORDS):
        return present[0]
    for form in OPENCOMPASS_FORMS:
        present = [letter for letter in LETTERS if form.replace("X", letter) in words]
        if len(present) == 1:
            return present[0]
    return _find_text(prediction, options)


# ------------------------------------------------------------------------------------------------------ CircularEval
@dataclass(frozen=True)
class ChoiceRow:
    """One order of a question's options, with the model's answer.

    Attributes:
        name: names the row among all.
        question: what was asked, with its hint.
        options: text by letter, as shown.
        answer: letter of the right option, as shown.
        prediction: the model's answer, as the official scripts read it.
        is_base: whether the other rows of its question are rotations of it.
        key: of the answer (`row_key`).
        categories: the question's place in each system of categories, by the system's name.
    """

    name: str
    question: str
    options: Mapping[str, str]
    answer: str
    prediction: str
    is_base: bool
    key: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)


def judge_group(
    rows: Sequence[ChoiceRow], infer: InferLetter, settle: Callable[[ChoiceRow], str | None] | None = None
) -> tuple[bool, list[str]]:
    """Decide whether a question is right in every order of its options.

    Args:
        rows: all orders of the question. Groups differ in size.
        infer: the rule that reads a letter in an answer.
        settle: asks a judge for the letter of a row that the rule cannot read; without it such a row is wrong (exact
            matching).

    Returns:
        Whether it is right, and the names of the rows for which the judge was asked.
    """
    letters = [infer(row.prediction, row.options) for row in rows]
    # 1. A letter that can be read and is wrong decides at once.
    if any(letter not in (None, row.answer) for letter, row in zip(letters, rows, strict=True)):
        return False, []
    # 2. Rows that cannot be read go to the judge one by one, until one is wrong.
    unread = [row for letter, row in zip(letters, rows, strict=True) if letter is None]
    if settle is None:
        return not unread, []
    judged: list[str] = []
    for row in unread:
        judged.append(row.name)
        if settle(row) != row.answer:
            return False, judged
    return True, judged
