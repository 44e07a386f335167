"""Multiple choice: how a letter is asked for, and which one an answer means to the benchmarks' own scripts.

The rules are crude on purpose: an answer must mean here exactly what it means to the official script. Sources:
LLaVA's `eval_science_qa.py`; VLMEvalKit `can_infer` (as in the ms-vlmeval 0.0.20 wheel); the first MMBench script,
open-compass/opencompass `tools/eval_mmbench.py`.
"""

import re
from collections.abc import Callable, Mapping

LETTER_LINE = "Answer with the option's letter from the given choices directly."
CHINESE_LETTER_LINE = "请直接回答选项字母。"
"""The last line of a question, which asks for nothing but the letter."""

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
_PUNCTUATION_TO_BLANK = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
TRUSTED_TAIL_WORDS = 4
"""A letter counts if it stands among the last so many words; the condition differs between VLMEvalKit's versions."""
MAX_LENGTH_RATIO = 2
"""Answers longer than all options together times this are not searched for an option's text."""

OPENCOMPASS_DECORATIONS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
"""Forms of a letter as (before, after), in the order in which the opencompass script tries them."""
OPENCOMPASS_ARTICLE_WORDS = 3
"""In answers of more words a bare `A` may be the article."""

InferLetter = Callable[[str, Mapping[str, str]], str | None]
"""A rule: (prediction, text of the options by letter) to a letter, or None where it can't tell."""


def parse_science_answer(text: str) -> str:
    """Read an answer to a ScienceQA question.

    A letter A to E alone; or as `B. ...`; or in one and only one `The answer is B` with a character after it.

    Returns:
        The letter, which need not be one of the options, or `FAILED`.
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
        options: text by letter, the present ones.

    Returns:
        A letter of the options, `Z` for a refusal, or None where only a judge can tell.
    """
    return _find_letter(prediction, options) or _find_text(prediction, options, MAX_LENGTH_RATIO)


def _find_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """Find the one option letter that stands as a word near the end."""
    if API_FAILURE in prediction:
        return None
    if any(refusal in prediction for refusal in REFUSALS):
        return NO_MATCH
    words = prediction.translate(_PUNCTUATION_TO_BLANK).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) >= len(words) - TRUSTED_TAIL_WORDS:
        return present[0]
    return NO_MATCH if not present and NO_MATCH in words else None


def _find_text(prediction: str, options: Mapping[str, str], max_length_ratio: float | None = None) -> str | None:
    """Find the one option whose text occurs in the answer, in whatever case."""
    lowered = prediction.lower()
    if max_length_ratio is not None and len(lowered) > max_length_ratio * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def infer_letter_opencompass(prediction: str, options: Mapping[str, str]) -> str | None:
    """Read an answer as the first MMBench script did: letters A to E whatever the options are.

    Args:
        prediction: as for `infer_letter`.
        options: text by letter, the present ones.
    """
    words = prediction.split()
    present = [letter for letter in LETTERS if letter in words]
    if len(present) == 1 and (present[0] != "A" or len(words) <= OPENCOMPASS_ARTICLE_WORDS):
        return present[0]
    for before, after in OPENCOMPASS_DECORATIONS:
        decorated = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        if len(decorated) == 1:
            return decorated[0]
    return _find_text(prediction, options)
