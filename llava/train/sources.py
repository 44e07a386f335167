"""Where training records come from: a JSON list, JSON lines, parquet files, a folder of those, a dataset of the hub.

The last three are read through `datasets`: rows stay on disk, and pictures inside them are read when their sample is
built. What a record is, `records` knows.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from llava.errors import InputError
from llava.image import EmbeddedImage

IMAGE_COLUMNS = ("image", "images")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A picture inside a dataset's row, not read yet.

    Attributes:
        table: the dataset's column of pictures.
        row: the row's number.
        position: which of the row's pictures; None where a row holds a single one.
        label: what a person calls it.
    """

    table: Any
    row: int
    position: int | None
    label: str

    def read(self) -> EmbeddedImage:
        """Read the picture's bytes."""
        cell = self.table[self.row].as_py()
        content = (cell if self.position is None else cell[self.position])["bytes"]
        return EmbeddedImage(self.label, content or b"")

    def __str__(self) -> str:
        """Name the picture, as a path does."""
        return self.label


def read_rows(source: str | Path) -> Iterator[Any]:
    """Read the rows of a training set.

    Args:
        source: `.json`, `.jsonl` or `.parquet` file, a folder of such, or a dataset of the hub (its `train` split).

    Yields:
        Rows as they are, pictures inside them as `StoredImage`.

    Raises:
        InputError: nothing there, or not readable.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        yield from _read_json(path)
        return
    yield from _read_table(_load_table(path))


def _read_json(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(f"--data_path {path}: no such file")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a JSON list of records, found {type(content).__name__}")
    return content


def _load_table(path: Path) -> datasets.Dataset:
    if not path.exists() and (path.suffix or path.is_absolute() or not HUB_NAME.fullmatch(str(path))):
        raise InputError(
            f"--data_path {path}: no such file; give a .json, .jsonl or .parquet file, a folder of them, or a hub name"
        )
    chosen = {"path": "parquet", "data_files": str(path)} if path.suffix == ".parquet" else {"path": str(path)}
    verbose = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**chosen, split="train")
    except Exception as error:
        # Many kinds: hub and network errors, arrow's own, a dataset without this split.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--data_path {path}: can't be read as a dataset: {reason}") from error
    finally:
        if verbose:
            datasets.enable_progress_bars()


def _read_table(table: datasets.Dataset) -> Iterator[dict[str, Any]]:
    columns = [name for name in IMAGE_COLUMNS if name in table.column_names]
    pictures = _list_pictures(table.data.column(columns[0])) if columns else [None] * len(table)
    for row, cell in zip(table.remove_columns(columns), pictures, strict=True):
        conversations = row.get("conversations")
        if isinstance(conversations, dict):  # a sequence of records, as older datasets gives it: lists by field
            fields = [dict(zip(conversations, turn, strict=True)) for turn in zip(*conversations.values(), strict=True)]
            row["conversations"] = fields
        yield row | {"image": cell}


def _list_pictures(column: pa.ChunkedArray) -> list[Any]:
    """List each row's pictures without reading any: names, `StoredImage`, or None."""
    if pa.types.is_struct(column.type):
        paths, is_inside = _describe(column)
        return [
            StoredImage(column, row, None, f"{path or 'picture'} of row {row}") if inside else path
            for row, (path, inside) in enumerate(zip(paths, is_inside, strict=True))
        ]
    if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
        lengths = pc.list_value_length(column).to_pylist()
        return [
            [StoredImage(column, row, position, f"picture {position} of row {row}") for position in range(length or 0)]
            for row, length in enumerate(lengths)
        ]
    return column.to_pylist()


def _describe(pictures: pa.ChunkedArray) -> tuple[list[str | None], list[bool]]:
    """Tell the paths of a column of pictures, and which of them have their bytes inside."""
    paths = pc.struct_field(pictures, "path").to_pylist()
    return paths, pc.is_valid(pc.struct_field(pictures, "bytes")).to_pylist()
