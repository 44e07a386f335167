"""Means in percent, overall and by group."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

Group = TypeVar("Group", bound=Hashable)
Member = TypeVar("Member")

POINTS, COUNT = "points", "count"
"""Names of the two sums that a mean of points is computed from; sums of these names alone are those of a mean."""


def mean_percent(points: Iterable[float]) -> float:
    """Return the mean of points in [0, 1] (or of true and false) as a percentage; 0 of none."""
    listed = list(points)
    return 100 * sum(listed) / len(listed) if listed else 0.0


def collect(pairs: Iterable[tuple[Group, Member]]) -> dict[Group, list[Member]]:
    """List the members of each group, both in the order in which they come."""
    groups: dict[Group, list[Member]] = {}
    for group, member in pairs:
        groups.setdefault(group, []).append(member)
    return groups
