"""Images inside a training set's parquet and Arrow files: where each lies, and its bytes when a sample is built."""

import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llava.errors import InputError
from llava.image import EmbeddedImage
from llava.model.stored_weights import first_line


@dataclass(frozen=True)
class ImageFile:
    """A parquet or Arrow file with a column of images."""

    path: str
    column: str


@dataclass(frozen=True)
class StoredImage:
    """An image inside a dataset's row, not read yet.

    Attributes:
        file: where it lies.
        row: number of the row in that file, from 0.
        position: number of the image within the row, from 0; None if a row holds a single one.
        label: how a message names it.
    """

    file: ImageFile
    row: int
    position: int | None
    label: str

    def read(self) -> EmbeddedImage:
        """Read the bytes of the image file.

        Raises:
            InputError: the dataset's file is gone or damaged.
        """
        try:
            cell = _open_images(self.file, os.getpid()).read(self.row)
        except (OSError, pa.ArrowException, KeyError, IndexError) as error:
            raise InputError(f"{self.label} of {self.file.path}: {first_line(error)}") from error
        part = cell if self.position is None else cell[self.position]
        return EmbeddedImage(self.label, (part["bytes"] if isinstance(part, dict) else part) or b"")

    def __str__(self) -> str:
        return self.label


class _ArrowImages:
    """Images in an Arrow file, memory-mapped: an image is read alone."""

    def __init__(self, file: ImageFile) -> None:
        self._column = open_arrow(file.path).column(file.column)

    def read(self, row: int) -> object:
        return self._column[row].as_py()


class _ParquetImages:
    """Images in a parquet file: the row group of the last one is kept."""

    def __init__(self, file: ImageFile) -> None:
        self._column = file.column
        # No thread of Arrow's is used: this also runs in loader workers, which are forked.
        self._file = pq.ParquetFile(file.path, memory_map=True)
        self._starts = [0]
        for group in range(self._file.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._kept: tuple[int, pa.ChunkedArray] | None = None

    def read(self, row: int) -> object:
        group = bisect_right(self._starts, row) - 1
        if self._kept is None or self._kept[0] != group:
            table = self._file.read_row_group(group, columns=[self._column], use_threads=False)
            self._kept = (group, table.column(self._column))
        return self._kept[1][row - self._starts[group]].as_py()


@lru_cache(maxsize=64)
def _open_images(file: ImageFile, process: int) -> _ArrowImages | _ParquetImages:
    """Open a file of images once per process: what was open when a worker was forked off is not shared."""
    return (_ParquetImages if file.path.endswith(".parquet") else _ArrowImages)(file)


def open_arrow(path: str | Path) -> pa.Table:
    """Map an Arrow stream file into memory."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
