"""How an answer is searched for: the settings that every command and entry point shares.

Apart from `llava.generation`, so that a command can check its options before torch is imported.
"""

from dataclasses import dataclass
from numbers import Integral, Real

from llava.errors import InputError

MAX_BEAMS = 64
"""Beams are rows of one batch: more than this is a typing error, and would run for hours."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 100.0
"""Below, the quotients overflow; above, tokens are drawn almost evenly."""
MAX_NEW_TOKENS = 2**17
"""More than any context: a typing error."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is searched for.

    Attributes:
        temperature: 0 takes the likeliest token each time; `MIN_TEMPERATURE` to `MAX_TEMPERATURE`: tokens are drawn.
        top_p: draw among the likeliest tokens that together hold this probability; None: among all.
        num_beams: width of the beam search, at most `MAX_BEAMS`; 1 is none.
        max_new_tokens: length limit of an answer, at most `MAX_NEW_TOKENS`.
        seed: of the draw, set anew for each answer; None: every draw is another.

    Raises:
        InputError: a value is out of its range, or no number.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "num_beams", "max_new_tokens", "seed"):
            self._check_type(name)
        checks = (
            (
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                f"temperature {self.temperature}: expected 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
            ),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p {self.top_p}: expected a number above 0, at most 1"),
            (1 <= self.num_beams <= MAX_BEAMS, f"num_beams {self.num_beams}: expected 1 to {MAX_BEAMS}"),
            (self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens}: expected 1 or more"),
            (self.seed is None or 0 <= self.seed < 2**64, f"seed {self.seed}: expected 0 to 2**64 - 1"),
            (
                self.max_new_tokens <= MAX_NEW_TOKENS,
                f"max_new_tokens {self.max_new_tokens:.3g}: expected at most {MAX_NEW_TOKENS}",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise InputError(message)

    def _check_type(self, name: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if name in ("num_beams", "max_new_tokens", "seed"):
            is_number, wanted = is_number and isinstance(value, Integral), "a whole number"
        else:
            wanted = "a number"
        if not is_number and not (value is None and name in ("top_p", "seed")):
            raise InputError(f"{name} {value!r}: expected {wanted}")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is simply the likeliest one."""
        return self.temperature == 0 and self.num_beams == 1

    def as_arguments(self) -> dict[str, object]:
        """Return the keyword arguments of `generate`; without a draw, none that only a draw reads."""
        arguments: dict[str, object] = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            return arguments | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return arguments | {"do_sample": False}
