"""Yes/no questions scored as POPE's official script does (source of the rules: AoiDragon/POPE `evaluate.py`).

The parser is crude on purpose: it must read an answer exactly as the official one does.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass

NEGATIVE_WORDS = frozenset({"No", "not", "no"})


def parse_yes_no(text: str) -> str:
    """Read an answer as "yes" or "no".

    The text before the first period counts, without commas, split at single spaces (not at newlines and tabs). A word
    that is exactly `No`, `not` or `no` makes it "no"; everything else is "yes", also `NO`, `None` and "".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIVE_WORDS.isdisjoint(words) else "no"


@dataclass(frozen=True)
class YesNoCounts:
    """True and false positives and negatives, with "yes" as the positive class. All ratios are fractions in [0, 1].

    A ratio of nothing to nothing is 0; the official script stops with a division by zero there.
    """

    true_positive: int = 0
    false_positive: int = 0
    true_negative: int = 0
    false_negative: int = 0

    @property
    def num_questions(self) -> int:
        return self.true_positive + self.false_positive + self.true_negative + self.false_negative

    @property
    def accuracy(self) -> float:
        return divide(self.true_positive + self.true_negative, self.num_questions)

    @property
    def precision(self) -> float:
        return divide(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        return divide(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float:
        return divide(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return divide(self.true_positive + self.false_positive, self.num_questions)

    def numbers(self) -> dict[str, float]:
        """List every number under its official name."""
        counts = zip(("TP", "FP", "TN", "FN"), astuple(self), strict=True)
        ratios = {name: getattr(self, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
        return {**dict(counts), **ratios, "n": self.num_questions}


def count_yes_no(pairs: Iterable[tuple[str, str]]) -> YesNoCounts:
    """Count (prediction, label) pairs; every label but "no" means yes, as in the official script."""
    counts = Counter((prediction == "yes", label != "no") for prediction, label in pairs)
    return YesNoCounts(
        true_positive=counts[True, True],
        false_positive=counts[True, False],
        true_negative=counts[False, False],
        false_negative=counts[False, True],
    )


def divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
