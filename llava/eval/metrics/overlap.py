"""How much two texts have in common: the arithmetic of the offline stand-in for a judge. Not a benchmark's metric."""

import re
from collections import Counter
from collections.abc import Mapping

# A word of letters and digits, or one character of a script without spaces between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def split_words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def overlap_f1(first: str, second: str) -> float:
    """Return the F1 of the words that two texts share, 0 to 1; two texts without words are equal."""
    words = Counter(split_words(first)), Counter(split_words(second))
    total = words[0].total() + words[1].total()
    return 2 * (words[0] & words[1]).total() / total if total else 1.0


def contains_words(text: str, phrase: str) -> bool:
    return f" {' '.join(split_words(phrase))} " in f" {' '.join(split_words(text))} "


def find_elements(text: str, wanted: str) -> float:
    """Return the share of elements that a text contains, 0 to 1.

    `wanted` joins elements by `<AND>`; each is one or several alternatives joined by `<OR>`.
    """
    elements = [element.split("<OR>") for element in wanted.split("<AND>")]
    return sum(any(contains_words(text, each) for each in element) for element in elements) / len(elements)


def choose_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that shares most words with a text, the first of equals; None if none does."""
    likeness = {letter: overlap_f1(text, option) for letter, option in options.items()}
    best = max(likeness, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] > 0 else None
