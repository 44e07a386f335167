"""MMBench from the hub, English (both versions of dev) and Chinese: the rows of the official table, pictures as base64.

The circular rows are rows of the dataset, too, known by their index. A copy without them (indices below a million
only) is scored as it stands: each question then counts by its one row, which is the easier, "vanilla" score.
"""

import base64
import math
from collections.abc import Iterator
from typing import Any, ClassVar

from llava.eval.hub import HubForm, HubRow, HubRows, HubTable, Layout, Tables, image_bytes

COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)
NEEDED = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")


class MMBenchSource(HubForm):
    """A table of MMBench; `files` has its one name."""

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write the table."""
        layout.write_tsv(self.files[0], COLUMNS, make_rows(rows))


class MMBenchEnglish(MMBenchSource):
    """The version of 2023-07-12, which LLaVA reports: 4,377 rows."""

    dataset = "lmms-lab/MMBench_EN"
    tables: ClassVar[Tables] = {"rows": HubTable("dev", NEEDED)}
    files = ("mmbench_dev_20230712.tsv",)


class MMBenchEnglish2023October(MMBenchSource):
    """The version of 2023-10-03: 4,329 rows."""

    dataset = "lmms-lab/MMBench"
    tables: ClassVar[Tables] = {"rows": HubTable("dev", NEEDED, config="en")}
    files = ("mmbench_dev_en_20231003.tsv",)


class MMBenchChinese(MMBenchSource):
    """The Chinese version of 2023-10-03: 4,329 rows."""

    dataset = "lmms-lab/MMBench"
    tables: ClassVar[Tables] = {"rows": HubTable("dev", NEEDED, config="cn")}
    files = ("mmbench_dev_cn_20231003.tsv",)


def make_rows(rows: HubRows) -> Iterator[list[Any]]:
    """Yield the cells of each row in the official order."""
    for row in rows["rows"]:
        yield [make_cell(row, column) for column in COLUMNS]


def make_cell(row: HubRow, column: str) -> Any:
    """Return a cell; absent options and hints are empty, as in the official table."""
    if column == "image":
        return base64.b64encode(image_bytes(row["image"]) or b"").decode()
    # The dataset writes the second level with a capital.
    value = row.get(column, row.get("L2-category") if column == "l2-category" else None)
    absent = value is None or (isinstance(value, float) and math.isnan(value)) or value == "nan"
    return "" if absent else value
