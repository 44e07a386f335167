"""In which order questions are asked, and which ones together. Pure functions of lists.

Units are what workers share: runs of questions in which equal images meet. Batches are what `generate` gets:
sequences of like length, so that little is padded. Neither changes an answer.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llava.eval.benchmark import Question

Item = TypeVar("Item")

MIN_SHARED_UNIT = 8
UNITS_PER_WORKER = 4
"""Where several workers share a small benchmark, units are small enough that each worker gets about this many, of
`MIN_SHARED_UNIT` questions at least."""


def plan_units(questions: Sequence[Question], limit: int, num_workers: int = 1) -> list[list[Question]]:
    """Cut questions into units of work, the same for every worker, whatever its batch size.

    Args:
        questions: in question order.
        limit: questions of a unit at most: enough to sort by length and to meet an image again, few enough to hold
            in memory (`sizing.choose_unit_size`).
        num_workers: workers that share the units.

    Returns:
        Units of half the limit to the limit, the last may be smaller. Questions on the same images stand together,
        within one unit if they fit; groups come in the order in which they first appear.
    """
    if num_workers > 1:
        fair_share = -(-len(questions) // (num_workers * UNITS_PER_WORKER))
        limit = min(limit, max(MIN_SHARED_UNIT, fair_share))
    units: list[list[Question]] = []
    for group in group_by_images(questions):
        if not units or (len(units[-1]) + len(group) > limit and 2 * len(units[-1]) >= limit):
            units.append([])
        for question in group:
            if len(units[-1]) == limit:
                units.append([])
            units[-1].append(question)
    return units


def group_by_images(questions: Sequence[Question]) -> list[list[Question]]:
    """Bring questions on the same images together, keeping the order of first appearance; text alone is one group."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images, []).append(question)
    return list(groups.values())


def batch_by_length(
    items: Sequence[Item],
    length: Callable[[Item], int],
    allow: Callable[[int, int], bool],
    group: Callable[[Item], int] | None = None,
) -> list[list[Item]]:
    """Cut items into batches of like length; of equally long ones the earlier comes first.

    Args:
        items: in any order.
        length: of an item.
        allow: whether a batch may hold so many items of up to such a length.
        group: number of an item's group. Groups then come in the order of their numbers, and length counts only within
            a group; a batch may hold several, and a group may be cut.
    """
    batches: list[list[Item]] = []
    longest = 0
    for item in sorted(items, key=lambda item: (group(item) if group else 0, length(item))):
        longest = max(longest, length(item))
        if not batches or not allow(len(batches[-1]) + 1, longest):
            batches.append([])
            longest = length(item)
        batches[-1].append(item)
    return batches


def take_chunk(items: Sequence[Item], num_chunks: int, chunk_index: int) -> list[Item]:
    """Return one of `num_chunks` consecutive slices of ceil(n / num_chunks) items; late ones may be empty."""
    size = -(-len(items) // num_chunks)
    return list(items[chunk_index * size : (chunk_index + 1) * size])
