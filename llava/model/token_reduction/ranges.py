"""A range in place of a number in a spec string, as in `TRIM:0.1-0.4`: training draws from it, nothing else does."""

import re
from dataclasses import dataclass

from llava.errors import InputError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(?<=[:=])\s*({_NUMBER})\s*-\s*({_NUMBER})\s*(?=[,|]|$)")
DIGITS = 6  # of a middle


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low, high: the ends; fractions of patches, counts, or values of an option.
        is_whole: whether only whole numbers are drawn: counts of patches.
    """

    low: float
    high: float
    is_whole: bool = False

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            InputError: `low` is not below `high`.
        """
        if not self.low < self.high < float("inf"):
            raise InputError(f"range {self}: the first number must be below the second")

    @classmethod
    def of_budget(cls, low: float, high: float) -> "Range":
        """The range of a budget: fractions, or counts.

        Raises:
            InputError: neither.
        """
        is_whole = low > 1 and low == int(low) and high == int(high)
        if not is_whole and not 0 < low < high <= 1:
            raise InputError(
                f"range {low:g}-{high:g}: use two fractions in (0, 1], as in 0.1-0.4, or two counts above 1, as in "
                "6-26, the lower one first"
            )
        return cls(low, high, is_whole)

    def at(self, share: float) -> str:
        """Return the number at a share in [0, 1) of the way from `low` to `high`, as a spec string writes it."""
        if self.is_whole:
            return _write(int(self.low) + int(share * (self.high - self.low + 1)))
        return _write(min(self.high, self.low + share * (self.high - self.low)))

    @property
    def lowest(self) -> str:
        return _write(self.low)

    @property
    def middle(self) -> str:
        """The number half way, of few digits."""
        return self.at(0.5) if self.is_whole else f"{(self.low + self.high) / 2:.{DIGITS}g}"

    @property
    def highest(self) -> str:
        return _write(self.high)

    def __str__(self) -> str:
        """The spelling that reads back to the same range."""
        return f"{self.lowest}-{self.highest}"


def _write(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def cut_ranges(spec: str) -> list[str | Range]:
    """Cut a spec string at its ranges; one piece where it has none.

    Raises:
        InputError: a range that is none.
    """
    pieces: list[str | Range] = []
    position = 0
    for found in _RANGE.finditer(spec):
        before, (low, high) = spec[position : found.start()], map(float, found.groups())
        pieces += [before, (Range.of_budget if before.endswith(":") else Range)(low, high)]
        position = found.end()
    return [*pieces, spec[position:]]
