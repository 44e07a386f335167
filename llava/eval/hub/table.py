"""Rows of a public dataset, from the Hugging Face hub or from a local copy of its parquet files.

A local copy is a folder as the hub's own downloads have it: `data/<split>-*.parquet`, or `<config>/<split>-*.parquet`
where a dataset has several configurations; the files may also lie in the folder itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import InputError

ORGANISATIONS = ("lmms-lab", "lmms-lab-encoder")
"""The second is where the first's picture datasets were moved on 2026-07-30, under the same names."""

HubRow = Mapping[str, Any]


@dataclass(frozen=True)
class HubTable:
    """A split of a configuration of a dataset.

    Attributes:
        split: its name.
        columns: those without which nothing can be made of it.
        config: its configuration, where the dataset has several.
        columns_only: read these columns and no others, which spares the download of the pictures.
    """

    split: str
    columns: tuple[str, ...]
    config: str | None = None
    columns_only: bool = False

    def __str__(self) -> str:
        """Name the table, as a person finds it."""
        return f"split {self.split}" if self.config is None else f"config {self.config}, split {self.split}"


Tables = dict[str, HubTable]
"""The tables of a dataset, by what a converter calls them."""


def read_rows(dataset: str, table: HubTable) -> Iterator[HubRow]:
    """Yield the rows of a table, one in memory at a time; pictures are `{"bytes", "path"}`, not decoded.

    Args:
        dataset: name on the hub, or a local folder.
        table: what of it.

    Raises:
        InputError: there is no such dataset or table, it cannot be reached, or a column is missing.
    """
    where = f"{dataset} ({table})"
    rows = iter(_open(dataset, table).decode(False))
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            # The libraries below raise errors of many kinds for a broken connection or file.
            raise InputError(f"{where}: row {number} cannot be read: {_shorten(error)}") from error
        if row is None:
            break
        if number == 0:
            require_columns(row, table.columns, where)
        yield row
        number += 1
    if number == 0:
        raise InputError(f"{where} has no rows")


def require_columns(row: HubRow, columns: tuple[str, ...], where: str) -> None:
    """Make sure that a row has what is needed.

    Raises:
        InputError: it has not; says what it has.
    """
    missing = [name for name in columns if name not in row]
    if missing:
        raise InputError(f"{where} has no column {', '.join(missing)}; it has {', '.join(row)}")


def _open(dataset: str, table: HubTable) -> Any:
    from datasets import load_dataset

    options: dict[str, Any] = {"streaming": True}
    if table.columns_only:
        options["columns"] = list(table.columns)
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        files = [str(path) for path in find_parquet(folder, table)]
        attempts = [("parquet", {"data_files": {table.split: files}})]
        hint = ""
    else:
        attempts = [(name, {"name": table.config}) for name in name_alternatives(dataset)]
        hint = "; without network give a folder with its parquet files by --hub-dataset"
    reasons = []
    for name, place in attempts:
        try:
            return load_dataset(name, **place, split=table.split, **options)
        except Exception as error:
            # Not found, no network, gated, unknown configuration, a broken file: each has its own kind.
            reasons.append(_shorten(error))
    raise InputError(f"the dataset {dataset} ({table}) cannot be read: {reasons[0]}{hint}")


def find_parquet(folder: Path, table: HubTable) -> list[Path]:
    """Find a table's files in a local copy.

    Raises:
        InputError: there are none.
    """
    places = [folder / table.config] if table.config else [folder / "data", folder]
    for place in [*places, folder]:
        files = sorted([*place.glob(f"{table.split}-*.parquet"), *place.glob(f"{table.split}.parquet")])
        if files:
            return files
    raise InputError(f"{folder} has no {places[0].relative_to(folder) / table.split}-*.parquet ({table})")


def name_alternatives(dataset: str) -> list[str]:
    """List the names under which a dataset may be found."""
    old, new = ORGANISATIONS
    owner, _, name = dataset.partition("/")
    return [dataset, f"{new}/{name}"] if owner == old else [dataset]


def _shorten(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
