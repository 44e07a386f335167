"""The tables of MMBench: one file of questions, options and pictures, as MMBench and MMBench-CN publish them.

Tab separated, with a header; pictures are base64 in a cell. Row `index + k * 1000000` is row `index` with its options
rotated. Prompts are those of LLaVA's `model_vqa_mmbench.py`.
"""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.benchmarks._files import find_file
from llava.image import EmbeddedImage
from llava.prompt import query_of

LETTERS = ("A", "B", "C", "D")
ROTATION_STEP = 1_000_000
"""Rotation k of a row has the row's index plus k times this."""
MAX_REFERENCE_LENGTH = 64
"""An `image` cell of at most so many characters is the index of the row that has the picture (VLMEvalKit's tables)."""
MISSING_CELLS = frozenset(
    ("", "NA", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A", "<NA>", "NULL", "null", "None", "nan", "NaN", "-nan", "-NaN")
) | {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
"""Cells that are empty to pandas, with which the published scripts read all tables."""
OPTION_ENDS = ("nan", "none")
"""Words that end the list of options, in whatever case."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table.

    Attributes:
        number: place in the table, from 1.
        index: as in the table; None if it is no whole number.
        cells: text by column; empty cells are absent.
    """

    number: int
    index: int | None
    cells: Mapping[str, str] = field(repr=False)

    @property
    def group(self) -> int:
        """Index of the row that this one is a rotation of."""
        return (self.index or 0) % ROTATION_STEP

    @property
    def answer(self) -> str | None:
        """Letter of the right option; None in the tables of a test split."""
        return self.cells.get("answer")

    @property
    def text(self) -> str:
        """Hint, if any, and question."""
        hint, question = self.cells.get("hint", ""), self.cells.get("question", "")
        return f"{hint}\n{question}" if hint and hint.lower() not in OPTION_ENDS else question

    @property
    def options(self) -> list[str]:
        """The leading options, up to the first empty cell: those that are shown."""
        shown = []
        for letter in LETTERS:
            text = self.cells.get(letter)
            if text is None or text.lower() in OPTION_ENDS:
                break
            shown.append(text)
        return shown


def read_cells(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a tab-separated file; cells with newlines or tabs stand in double quotes.

    Raises:
        InputError: the file is missing, no UTF-8, or no table.
    """
    # Pictures are longer than the module's limit, which holds for the whole process.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with find_file(path).open(encoding="utf-8-sig", newline="") as file:
            yield from csv.reader(file, delimiter="\t")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a tab-separated table ({error})") from None
    finally:
        csv.field_size_limit(limit)


def read_table(path: Path) -> list[TableRow]:
    """Read a table of MMBench.

    Raises:
        InputError: the file is missing or empty, lacks columns, or two rows share an index.
    """
    rows = [cells for cells in read_cells(path) if cells]
    columns = rows[0] if rows else []
    lacking = [name for name in ("index", "question", "A", "B", "image") if name not in columns]
    if lacking:
        raise InputError(f"{path} is not a table of MMBench: it lacks the column {', '.join(lacking)}")
    table = []
    for number, cells in enumerate(rows[1:], start=1):
        named = {name: cell for name, cell in zip(columns, cells, strict=False) if cell not in MISSING_CELLS}
        index = named.get("index", "")
        table.append(TableRow(number, int(index) if index.isdecimal() and len(cells) <= len(columns) else None, named))
    seen: dict[int, int] = {}
    for row in table:
        if row.index is not None and seen.setdefault(row.index, row.number) != row.number:
            raise InputError(f"{path}: rows {seen[row.index]} and {row.number} share the index {row.index}")
    if not any(row.index is not None for row in table):
        raise InputError(f"{path} has no row with an index")
    return table


def load_table_questions(path: Path, letter_line: str | None, all_rounds: bool = False) -> list[Question]:
    """Read the questions of a table.

    Args:
        path: the table.
        letter_line: what to ask for in the last line; None for nothing.
        all_rounds: ask each row once per option.
    """
    table = read_table(path)
    pictures = PictureCells(path.name, table)
    return [
        question
        for row in table
        for question in make_table_questions(row, pictures, path.name, letter_line, all_rounds)
    ]


class PictureCells:
    """The pictures of a table. Equal cells are one picture, named after the first row that has it."""

    def __init__(self, table_name: str, table: Sequence[TableRow]):
        """Take the cells; they are decoded when they are asked for."""
        self._table_name = table_name
        self._cells = {row.index: row.cells["image"] for row in table if row.index is not None and "image" in row.cells}
        self._pictures: dict[str, EmbeddedImage] = {}

    def find(self, row: TableRow) -> EmbeddedImage:
        """Return the picture of a row.

        Raises:
            InputError: it has none.
        """
        index = row.index
        cell = self._cells.get(index)
        if cell is None:
            raise InputError("the row has no image")
        if len(cell) <= MAX_REFERENCE_LENGTH and cell.isdecimal():
            index, cell = int(cell), self._cells.get(int(cell))
            if cell is None:
                raise InputError(f"its image is said to be in row {index}, which has none")
        if cell not in self._pictures:
            try:
                content = base64.b64decode(cell)
            except (binascii.Error, ValueError) as error:
                raise InputError(f"its image is not base64 ({error})") from None
            self._pictures[cell] = EmbeddedImage(f"{self._table_name} row {index}", content)
        return self._pictures[cell]


def make_table_questions(
    row: TableRow, pictures: PictureCells, table_name: str, letter_line: str | None, all_rounds: bool
) -> list[Question]:
    """Make the question of a row, or one per option, with the options one step further to the left each time."""
    where = f"{table_name} row {row.number}"
    if row.index is None:
        return [Question(id=where, fault="the index is no whole number, or there are more cells than columns")]
    try:
        if not row.options:
            raise InputError("it has no options")
        picture = pictures.find(row)
    except InputError as error:
        return [Question(id=row.index, fields={"round_id": 0}, fault=f"{where}: {error}")]
    questions = []
    for round_id in range(len(row.options) if all_rounds else 1):
        options, letters = rotate(row.options, round_id), rotate(LETTERS[: len(row.options)], round_id)
        text = "\n".join([row.text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])
        questions.append(
            Question(
                id=row.index,
                prompt=f"{text}\n{letter_line}" if letter_line else text,
                query=query_of(text),
                images=(picture,),
                record=text,
                category=row.cells.get("category"),
                fields={"round_id": round_id, "options": options, "option_char": letters},
            )
        )
    return questions


def rotate(items: Sequence[str], steps: int) -> list[str]:
    """Rotate to the left."""
    return [*items[steps:], *items[:steps]]
