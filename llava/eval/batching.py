"""In which order questions are asked, and which ones together. Pure functions of lists.

Units are what workers share: runs of questions in which equal images meet. Batches are what `generate` gets:
sequences of like length, so that little is padded. Neither changes an answer.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llava.eval.task import Question

Item = TypeVar("Item")

UNIT_BATCHES = 8
"""Batches per unit: enough to sort by length and to meet an image again, few enough to hold in memory."""
UNITS_PER_WORKER = 4
"""Where several workers share a small benchmark, units are small enough that each worker gets about this many."""


def plan_units(questions: Sequence[Question], batch_size: int, num_workers: int = 1) -> list[list[Question]]:
    """Cut questions into units of work, the same for every worker.

    Args:
        questions: in question order.
        batch_size: questions per call of `generate`.
        num_workers: workers that share the units.

    Returns:
        Units of `batch_size` to `UNIT_BATCHES * batch_size` questions, the last may be smaller. Questions on the same
        images stand together, within one unit if they fit; groups come in the order in which they first appear.
    """
    limit = UNIT_BATCHES * batch_size
    if num_workers > 1:
        fair_share = -(-len(questions) // (num_workers * UNITS_PER_WORKER))
        limit = max(batch_size, min(limit, fair_share))
    units: list[list[Question]] = []
    for group in group_by_images(questions):
        if not units or (len(units[-1]) + len(group) > limit and len(units[-1]) >= batch_size):
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


def batch_by_length(items: Sequence[Item], length: Callable[[Item], int], batch_size: int) -> list[list[Item]]:
    """Cut items into batches of like length; of equally long ones the earlier comes first."""
    ordered = sorted(items, key=length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def take_chunk(items: Sequence[Item], num_chunks: int, chunk_index: int) -> list[Item]:
    """Return one of `num_chunks` consecutive slices of ceil(n / num_chunks) items; late ones may be empty."""
    size = -(-len(items) // num_chunks)
    return list(items[chunk_index * size : (chunk_index + 1) * size])
