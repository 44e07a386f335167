"""What a scorer may ask of a judge: a language model that reads a question, a reference and an answer.

Only the interface is here, for the benchmarks to be written against; `judge.py` has the judges.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """What is judged, in the benchmark's own terms, for judges that compute instead of reading.

    Attributes:
        task: word of the benchmark.
        key: name of the question and, where it is asked several times, of the round; cached replies are found by it.
        question: what was asked.
        references: right answers, as the benchmark gives them.
        prediction: the model's answer.
        options: text by letter, for multiple choice.
    """

    task: str
    key: str
    question: str
    references: Sequence[str]
    prediction: str
    options: Mapping[str, str] | None = None


class Judge(Protocol):
    """A judge, safe to call from several threads.

    Attributes:
        name: the model, as it stands beside every number that depends on it.
        offline: it is the stand-in that compares texts; its numbers are not the benchmark's and are marked so.
        num_runs: how many times each answer is judged; the benchmark averages, and gives each run attempts of its own.
    """

    name: str
    offline: bool
    num_runs: int

    def ask(
        self,
        case: Case,
        messages: Sequence[Mapping[str, str]],
        *,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
    ) -> str:
        """Return the reply to a chat, from the cache if the same was asked before.

        Args:
            case: what is judged.
            messages: `role` and `content` each, as the benchmark words them.
            attempt: counts how often a case is asked (once more for each run, and for each reply that could not be
                read), so that each time has its own reply.
            temperature: of the reply.
            max_tokens: length limit of the reply.

        Raises:
            InputError: no reply after bounded retries; says which question and what came back.
        """

    def map(self, judge_one: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Judge items, several at a time, and return the results in the order of the items."""
