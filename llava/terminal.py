"""What commands show in a terminal: tables as wide as it is, and bars of work that takes long.

A table has at most 100 columns; what does not fit goes into a second block below.
"""

import itertools
import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tqdm import tqdm

NARROWEST, WIDEST = 60, 100
"""Columns of a table at least and at most. Nobody reads along longer lines; files have tables of any width."""
PATIENCE_SECONDS = 5
"""A bar appears after that."""
NARROW = 24
"""Columns to which a cell of text is broken, where that keeps a table in one block."""
TITLE = 8
"""Columns that a title has before it is broken."""


@dataclass(frozen=True)
class Frame:
    """What stands before, between and behind the cells of a row; `ruled` tables have a line below their titles."""

    left: str
    between: str
    right: str
    ruled: bool

    def measure(self, widths: Sequence[int]) -> int:
        """Return how many columns cells of these widths take."""
        return len(self.left) + sum(widths) + len(self.between) * (len(widths) - 1) + len(self.right)


PIPES, SPACES = Frame("| ", " | ", " |", ruled=True), Frame("", "  ", "", ruled=False)


def find_width() -> int:
    """Return the columns of a table: the terminal's, within the limits; `COLUMNS` counts first, as everywhere.

    Where output goes to a file or a pipe, it is the most.
    """
    return min(max(shutil.get_terminal_size((WIDEST, 1)).columns, NARROWEST), WIDEST)


def make_bar(what: str, total: int, unit: str) -> tqdm:
    """Make a progress bar on stderr: it appears after a while, in a terminal only, and goes when it is done.

    Args:
        what: is done.
        total: of all steps.
        unit: of a step; "B": bytes.
    """
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=PATIENCE_SECONDS, disable=None, leave=False
    )


def lay_out(
    titles: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    frame: Frame = SPACES,
    width: int | None = None,
) -> str:
    """Write a table.

    Args:
        titles: of the columns; None: there are none.
        rows: cells, one text each.
        right: numbers of the columns that are aligned at the right.
        frame: around the cells.
        width: columns at most, as by `find_width`: titles are broken, then long texts; what still does not fit goes
            into further blocks, each with the first column again. None: any.
    """
    # 1. The width of each column.
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in titles or ()]
    widths = [max(map(len, column), default=0) for column in columns]
    if titles is not None:
        limits = [max(TITLE, own) if width else len(title) for own, title in zip(widths, titles, strict=True)]
        widths = [
            max([own, *map(len, textwrap.wrap(title, limit or 1, break_long_words=False))])
            for own, title, limit in zip(widths, titles, limits, strict=True)
        ]
    # 2. Blocks, and a row for each line.
    widths, split = _fit(widths, frame, width) if width else (widths, [list(range(len(widths)))])
    blocks = []
    for places in split:
        own, sides = [widths[place] for place in places], [place in right for place in places]
        lines = [] if titles is None else _break([titles[place] for place in places], own)
        if titles is not None and frame.ruled:
            lines.append(["-" * (each - side) + ":" * side for each, side in zip(own, sides, strict=True)])
        lines += [line for row in rows for line in _break([row[place] for place in places], own)]
        blocks.append("\n".join(_join(line, own, sides, frame) for line in lines))
    return "\n\n".join(blocks)


def _fit(widths: Sequence[int], frame: Frame, width: int) -> tuple[list[int], list[list[int]]]:
    """Make columns narrower where that is enough for one block, else spread them over several.

    Returns:
        The width of each column, and the columns of each block.
    """
    narrow = list(widths)
    while (excess := frame.measure(narrow) - width) > 0 and max(narrow) > NARROW:
        place = narrow.index(max(narrow))
        narrow[place] = max(NARROW, narrow[place] - excess)
    if excess <= 0:
        return narrow, [list(range(len(widths)))]
    # The first column and any other have room beside each other.
    narrow = [min(own, (width - frame.measure([0, 0])) // 2) for own in widths]
    blocks = [[0]]
    for place in range(1, len(widths)):
        if len(blocks[-1]) > 1 and frame.measure([narrow[each] for each in [*blocks[-1], place]]) > width:
            blocks.append([0])
        blocks[-1].append(place)
    return narrow, blocks


def _break(cells: Sequence[str], widths: Sequence[int]) -> list[Sequence[str]]:
    """Break the cells of a row into lines."""
    broken = [[cell] if len(cell) <= own else textwrap.wrap(cell, own) for cell, own in zip(cells, widths, strict=True)]
    return list(itertools.zip_longest(*broken, fillvalue=""))


def _join(cells: Sequence[str], widths: Sequence[int], sides: Sequence[bool], frame: Frame) -> str:
    aligned = [
        cell.rjust(own) if at_right else cell.ljust(own)
        for cell, own, at_right in zip(cells, widths, sides, strict=True)
    ]
    return f"{frame.left}{frame.between.join(aligned)}{frame.right}".rstrip()
