"""How often two runs differ in being right: what is gained, what is lost, and how far they agree."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Flips:
    """Questions (or groups) that two runs answered, by whether each was right.

    Attributes:
        num_gained: right here, wrong there.
        num_lost: wrong here, right there.
        both_right, both_wrong: no flip.
    """

    num_gained: int
    num_lost: int
    both_right: int
    both_wrong: int

    @property
    def count(self) -> int:
        return self.num_gained + self.num_lost + self.both_right + self.both_wrong

    @property
    def agreement(self) -> float:
        """Percent of the questions on which both are right or both are wrong; 100 of none."""
        return 100 * (self.both_right + self.both_wrong) / self.count if self.count else 100.0


def count_flips(pairs: Iterable[tuple[bool, bool]]) -> Flips:
    """Count (right here, right there) of each question."""
    counts = Counter(pairs)
    return Flips(counts[True, False], counts[False, True], counts[True, True], counts[False, False])
