"""CircularEval, the metric of MMBench: a question counts as right only if it is right in every order of its options.

Source: VLMEvalKit `mcq_circular_eval` and open-compass/opencompass `tools/eval_mmbench.py`; both flows are the same but
for the rule that reads a letter out of an answer (`choice`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llava.eval.metrics.choice import InferLetter


@dataclass(frozen=True)
class ChoiceRow:
    """One order of a question's options, with the model's answer.

    Attributes:
        name: names the row among all.
        group: the question that it is an order of.
        question: what was asked, with its hint.
        options: text by letter, as shown.
        answer: letter of the right option, as shown.
        prediction: the model's answer.
        is_base: it is the order that the others are rotations of.
        categories: the question's place in each system of categories, by the system's name.
    """

    name: str
    group: int
    question: str
    options: Mapping[str, str]
    answer: str
    prediction: str
    is_base: bool
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupVerdict:
    """Whether a question is right, and the rows for which a judge had to be asked."""

    is_right: bool
    judged: tuple[str, ...] = ()


def group_rows(rows: Sequence[ChoiceRow]) -> dict[int, list[ChoiceRow]]:
    """Collect the rows of each question, in their order. Groups differ in size: never assume the number of options."""
    groups: dict[int, list[ChoiceRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def judge_group(
    rows: Sequence[ChoiceRow], infer: InferLetter, settle: Callable[[ChoiceRow], str | None] | None = None
) -> GroupVerdict:
    """Judge one question.

    A letter that the rule reads and that is wrong decides at once. Rows that it can't read go to the judge in turn,
    until one is wrong.

    Args:
        rows: all orders of the question.
        infer: the rule.
        settle: asks a judge for the letter of a row; without it a row that can't be read is wrong (exact matching).
    """
    letters = [infer(row.prediction, row.options) for row in rows]
    if any(letter not in (None, row.answer) for letter, row in zip(letters, rows, strict=True)):
        return GroupVerdict(False)
    unread = [row for letter, row in zip(letters, rows, strict=True) if letter is None]
    if settle is None:
        return GroupVerdict(not unread)
    judged: list[str] = []
    for row in unread:
        judged.append(row.name)
        if settle(row) != row.answer:
            return GroupVerdict(False, tuple(judged))
    return GroupVerdict(True, tuple(judged))


def average(flags: Sequence[bool]) -> float:
    """Return the percentage of true ones; 0 of none."""
    return 100 * sum(flags) / len(flags) if flags else 0.0


def average_by_category(groups: Mapping[int, Sequence[ChoiceRow]], hits: Mapping[int, bool], name: str) -> dict:
    """Average the questions of each category.

    Args:
        groups: rows by question, a base row among them; a question belongs where that does.
        hits: whether each question is right.
        name: which system of categories.

    Returns:
        Percent by category, in the order of the alphabet.
    """
    members: dict[str, list[bool]] = {}
    for group, rows in groups.items():
        base = next(row for row in rows if row.is_base)
        members.setdefault(base.categories.get(name, ""), []).append(hits[group])
    return {category: average(members[category]) for category in sorted(members)}
