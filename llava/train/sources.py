"""Where training records come from: a JSON list, JSON Lines, parquet files, a folder of those, a dataset on the hub.

The last three are read through `datasets`: rows stay on disk, and images inside them are read when their sample is
built. `llava.train.records` checks what a row holds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.files import FileError, parse_json, read_json, read_lines
from llava.image import EmbeddedImage

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "images")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HINT = "--data_path takes a .json, .jsonl or .parquet file, a folder of them, or a name on the hub"


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image inside a dataset's row, not read yet.

    Attributes:
        column: the dataset's column of images.
        row: number of the row, from 0.
        position: number of the image within the row, from 0; None if a row holds a single one.
        label: how a message names it.
    """

    column: "pa.ChunkedArray"
    row: int
    position: int | None
    label: str

    def read(self) -> EmbeddedImage:
        """Read the bytes of the image file."""
        cell = self.column[self.row].as_py()
        content = (cell if self.position is None else cell[self.position])["bytes"]
        return EmbeddedImage(self.label, content or b"")

    def __str__(self) -> str:
        return self.label


def read_rows(source: str | Path) -> Iterator[object]:
    """Read the rows of a training set.

    Args:
        source: `.json`, `.jsonl` or `.parquet` file, a folder of those, or a dataset on the hub (its `train` split).

    Yields:
        Rows as they are, images inside them as `StoredImage`; for a line that is not JSON its error.

    Raises:
        InputError: no such file or dataset, or not readable.
    """
    path = Path(source)
    if path.suffix == ".json":
        yield from _read_list(path)
    elif path.suffix == ".jsonl":
        for number, line in read_lines(path, HINT):
            try:
                yield parse_json(line, f"{path} line {number}")
            except FileError as error:
                yield error
    else:
        yield from _read_table(_load_table(path))


def _read_list(path: Path) -> list[object]:
    content = read_json(path, HINT)
    if not isinstance(content, list):
        raise FileError(f"{path}: expected a JSON list of records, found {type(content).__name__}")
    return content


def _load_table(path: Path) -> "datasets.Dataset":
    if not path.exists() and (path.suffix or path.is_absolute() or not HUB_NAME.fullmatch(str(path))):
        raise FileError(f"no such file: {path}; {HINT}")
    chosen = {"path": "parquet", "data_files": str(path)} if path.suffix == ".parquet" else {"path": str(path)}
    import datasets  # takes a second, and only parquet files and the hub need it

    verbose = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**chosen, split="train")
    except Exception as error:
        # Errors of the hub, the network and arrow have no common class; so has a dataset without this split.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--data_path {path}: cannot be read as a dataset: {reason}") from error
    finally:
        if verbose:
            datasets.enable_progress_bars()


def _read_table(table: "datasets.Dataset") -> Iterator[dict[str, object]]:
    columns = [name for name in IMAGE_COLUMNS if name in table.column_names]
    images = _list_images(table.data.column(columns[0])) if columns else [None] * len(table)
    for row, cell in zip(table.remove_columns(columns), images, strict=True):
        conversations = row.get("conversations")
        if isinstance(conversations, dict):  # older versions of datasets give one list per field
            fields = [dict(zip(conversations, turn, strict=True)) for turn in zip(*conversations.values(), strict=True)]
            row["conversations"] = fields
        yield row | {"image": cell}


def _list_images(column: "pa.ChunkedArray") -> list[object]:
    """List each row's images without reading any: names, `StoredImage`, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        paths, is_inside = _describe(column)
        return [
            StoredImage(column, row, None, f"{path or 'image'} of row {row}") if inside else path
            for row, (path, inside) in enumerate(zip(paths, is_inside, strict=True))
        ]
    if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
        lengths = pc.list_value_length(column).to_pylist()
        return [
            [StoredImage(column, row, position, f"image {position} of row {row}") for position in range(length or 0)]
            for row, length in enumerate(lengths)
        ]
    return column.to_pylist()


def _describe(column: "pa.ChunkedArray") -> tuple[list[str | None], list[bool]]:
    """List the path of each image of a column, and whether the row holds its bytes."""
    import pyarrow.compute as pc

    paths = pc.struct_field(column, "path").to_pylist()
    return paths, pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
