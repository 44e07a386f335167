"""How the VQA scorers rewrite an answer before they compare it, character by character as the official code does.

Two recipes: that of the VQA v2 scorer (`normalize_vqa`; VizWiz's is the same with another table) and that of the
TextVQA scorer (`normalize_m4c`), which LLaVA also applies to answers before it uploads them. Sources: GT-Vision-Lab/VQA
`vqaEval.py`, facebookresearch/mmf `m4c_evaluators.py`, written anew. What looks like a mistake here is one there.
"""

import re
from collections.abc import Mapping

from llava.eval.metrics.contractions import VQA_CONTRACTIONS

PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})

MAX_DELETED_PERIODS = 32
"""The official code passes a regex flag, whose value is 32, as the number of replacements."""

_COMMA_BETWEEN_DIGITS = re.compile(r"[0-9],[0-9]")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?![0-9])")


def flatten_lines(text: str) -> str:
    """Turn newlines and tabs into spaces, and strip."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_punctuation(text: str) -> str:
    """Delete punctuation, or replace it with a space.

    A character with a space beside it somewhere in the text is deleted everywhere, others become a space; where there
    is a comma between digits, all are deleted. Then the first 32 periods that no digit follows are deleted.
    Apostrophes, colons and `$ % & # *` stay.
    """
    joins = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for character in PUNCTUATION.intersection(text):
        deletes = joins or f"{character} " in text or f" {character}" in text
        result = result.replace(character, "" if deletes else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", result, count=MAX_DELETED_PERIODS)


def normalize_words(text: str, contractions: Mapping[str, str] = VQA_CONTRACTIONS) -> str:
    """Lowercase, write the numbers up to ten as digits, drop articles, repair contractions; join with single spaces."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def normalize_vqa(text: str, contractions: Mapping[str, str] = VQA_CONTRACTIONS) -> str:
    """Rewrite an answer, after `flatten_lines`, as the VQA v2 scorer does; VizWiz's has its own contractions."""
    return normalize_words(normalize_punctuation(text), contractions)


def normalize_m4c(text: str) -> str:
    """Rewrite an answer as the TextVQA scorer does, and LLaVA before an upload to VQAv2 and VizWiz.

    Commas and question marks are deleted before the punctuation rules apply, and each `'s` gets a space before it.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(normalize_punctuation(flatten_lines(text)))
