"""Where training records come from: JSON lists, JSON Lines, parquet files, folders, datasets on the hub, mixtures.

A file is read once, row by row, when `llava.train.store` makes a store of it. Images inside parquet files and the hub's
Arrow files stay there: a row names the place of each, and its bytes are read when their sample is built.
`llava.train.records` checks what a row holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llava.errors import InputError
from llava.files import FileError, explain_errors, parse_json
from llava.model.identity import fingerprint, hash_files
from llava.model.stored_weights import first_line
from llava.train.mixture import HUB_NAME, list_parts
from llava.train.stored_images import ImageFile, StoredImage, open_arrow
from llava.train.streaming import open_regular, read_lines, read_list

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMNS = ("image", "images")
TEXT_COLUMNS = ("id", "conversations")
SUFFIXES = (".json", ".jsonl", ".parquet")
HINT = "--data_path takes a .json, .jsonl or .parquet file, a folder of them, a .yaml mixture, or a name on the hub"

LARGEST_GROUP_BYTES = 32 * 2**20
"""Parquet is read by row groups. The images of a file with larger ones are copied into the store, one by one."""
ROWS_PER_BATCH = 1000
IMAGES_PER_BATCH = 16


# ------------------------------------------------------------------------------------------------------------ sources
@dataclass(frozen=True)
class Source:
    """A training set, or one part of a mixture.

    Attributes:
        name: what the user called it.
        files: `.json`, `.jsonl`, `.parquet` and `.arrow` files, in order.
        content: fingerprint of the files' contents.
        weight: how often each record counts; below 1 a share of the records.
        table: the rows of a dataset that lies in memory instead of in files.
    """

    name: str
    files: tuple[str, ...]
    content: str
    weight: float = 1.0
    table: "datasets.Dataset | None" = field(default=None, compare=False)


def find_sources(data_path: str | Path) -> list[Source]:
    """Find what `--data_path` names, without reading a record.

    Args:
        data_path: `.json`, `.jsonl` or `.parquet` file, a folder of those, a dataset on the hub (its `train` split), or
            a `.yaml` mixture of these.

    Raises:
        InputError: no such file or dataset, or not readable.
    """
    return [_find_source(name, weight) for name, weight in list_parts(Path(data_path))]


def _find_source(name: str, weight: float) -> Source:
    path = Path(name)
    if path.suffix in SUFFIXES:
        return _describe_files(name, [path], weight)
    if not path.exists() and (path.suffix or path.is_absolute() or not HUB_NAME.fullmatch(name)):
        raise FileError(f"no such file: {name}; {HINT}")
    with _explaining(name) as datasets:
        files = _list_train_files(datasets.load_dataset_builder(name)) if path.is_dir() else []
    if files and all(file.suffix in SUFFIXES for file in files):
        return _describe_files(name, files, weight)
    with _explaining(name) as datasets:
        table = datasets.load_dataset(path=name, split="train")
    return Source(
        name, tuple(file["filename"] for file in table.cache_files), fingerprint(table._fingerprint), weight, table
    )


def _describe_files(name: str, files: Sequence[Path], weight: float) -> Source:
    hashes = hash_files(files, "training data")
    for file in files:
        if hashes[file] is None:
            with open_regular(file, HINT):  # says why
                raise FileError(f"cannot read {file}")
    return Source(name, tuple(map(str, files)), fingerprint("\n".join(hashes[file] for file in files)), weight)


def _list_train_files(builder: "datasets.DatasetBuilder") -> list[Path]:
    """List the files of a folder's `train` split, as `datasets` finds them."""
    return [Path(file) for file in (builder.config.data_files or {}).get("train", [])]


@contextmanager
def _explaining(name: str) -> Iterator[object]:
    """Give `datasets`, without its progress bars; what it cannot do becomes one line."""
    import datasets  # takes a second

    verbose = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:
        # Errors of the hub, the network and arrow have no common class; so has a dataset without this split.
        raise InputError(f"--data_path {name}: cannot be read as a dataset: {first_line(error)}") from error
    finally:
        if verbose:
            datasets.enable_progress_bars()


# --------------------------------------------------------------------------------------------------------------- rows
def read_rows(source: Source, copies: Path) -> Iterator[object]:
    """Read the rows of a source; a batch of them is held at a time.

    Args:
        source: from `find_sources`.
        copies: folder for the images that are copied.

    Yields:
        Rows as they are, images inside them as `StoredImage`; for a line that is not JSON its error.

    Raises:
        InputError: a file cannot be read.
    """
    if source.table is not None and not source.files:
        yield from _read_arrow(source.table.data.to_batches(), None, copies, 0)
        return
    num_rows = 0
    for name in source.files:
        for row in _open_rows(Path(name), copies, num_rows, is_alone=len(source.files) == 1):
            num_rows += 1
            yield row


def _open_rows(path: Path, copies: Path, first: int, is_alone: bool) -> Iterable[object]:
    """Choose how a file is read; `first` is the number of its first row in the source."""
    if path.suffix == ".parquet":
        return _read_parquet(path, copies, first)
    if path.suffix == ".arrow":
        return _read_arrow(open_arrow(path).to_batches(), str(path), copies, first)
    # In folders `datasets` takes JSON Lines for `.json` as well, and writes them so.
    if path.suffix == ".jsonl" or (not is_alone and _starts_with_object(path)):
        return _read_json_lines(path)
    return read_list(path, HINT)


def _starts_with_object(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _read_json_lines(path: Path) -> Iterator[object]:
    for number, line in read_lines(path, HINT):
        try:
            yield parse_json(line, f"{path.name} line {number}")
        except FileError as error:
            yield error


def _read_parquet(path: Path, copies: Path, first: int) -> Iterator[dict[str, object]]:
    try:
        with open_regular(path, HINT):
            file = pq.ParquetFile(str(path), memory_map=True)
        names = file.schema_arrow.names
        column = next((name for name in IMAGE_COLUMNS if name in names), None)
        groups = [_RowGroup(file, number, column) for number in range(file.num_row_groups)]
        images = None if column is None else ImageFile(str(path), column)
        if any(group.num_bytes > LARGEST_GROUP_BYTES for group in groups):
            images = _copy_images(file.iter_batches(IMAGES_PER_BATCH, columns=[column]), images, copies)
        texts, num_rows = [name for name in TEXT_COLUMNS if name in names], 0
        for group in groups:
            cells = repeat(None) if images is None else group.list_cells(images, num_rows, first)
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group.number], columns=texts):
                yield from _join(batch, cells)
            num_rows += group.num_rows
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--data_path {path}: cannot be read as a dataset: {first_line(error)}") from error


class _RowGroup:
    """A row group of a parquet file, whose images are listed without reading them wherever that can be done.

    Attributes:
        number: in the file, from 0.
        num_rows: rows in it.
        num_bytes: size of its images.
    """

    def __init__(self, file: pq.ParquetFile, number: int, column: str | None) -> None:
        description = file.metadata.row_group(number)
        parts = (description.column(part) for part in range(description.num_columns))
        self._parts = {part.path_in_schema: part for part in parts if part.path_in_schema.split(".")[0] == column}
        self._file, self._column = file, column
        self.number, self.num_rows = number, description.num_rows
        self.num_bytes = sum(part.total_uncompressed_size for part in self._parts.values())

    def list_cells(self, images: ImageFile, start: int, first: int) -> Iterator[object]:
        """Yield each row's images, as `_list_cells`."""
        paths = self._read_paths()
        is_inside = None if paths is None else self._find_inside(paths)
        if is_inside is not None:
            yield from _list_cells(paths, images, start, first, is_inside)
            return
        for batch in self._file.iter_batches(IMAGES_PER_BATCH, row_groups=[self.number], columns=[self._column]):
            yield from _list_cells(batch.column(0), images, start, first)
            start += batch.num_rows

    def _read_paths(self) -> pa.Array | None:
        """Read the images' names without their bytes; None where there are no names beside bytes."""
        name = next((name for name in self._parts if name.endswith(".path")), None)
        if name is None:
            return None
        cells = self._file.read_row_group(self.number, columns=[name], use_threads=False).column(self._column)
        return pa.concat_arrays(cells.chunks)

    def _find_inside(self, paths: pa.Array) -> pa.Array | None:
        """Find which rows hold bytes, by the number of those that do not; None if that is not enough to know it."""
        if _is_list(paths.type):
            return paths.is_valid()
        part = self._parts.get(f"{self._column}.bytes")
        counts = part.statistics if part is not None and part.is_stats_set else None
        if counts is None or not counts.has_null_count:
            return None
        if counts.null_count == paths.null_count:
            return paths.is_valid()
        return pa.array([False] * len(paths)) if counts.null_count == len(paths) else None


def _read_arrow(
    batches: Sequence[pa.RecordBatch], path: str | None, copies: Path, first: int
) -> Iterator[dict[str, object]]:
    """Read rows of Arrow batches, which lie in a file, or if `path` is None in memory."""
    names = batches[0].schema.names if batches else []
    column = next((name for name in IMAGE_COLUMNS if name in names), None)
    images = None if column is None else ImageFile(path or "", column)
    if images is not None and path is None:
        images = _copy_images((batch.select([column]) for batch in batches), images, copies)
    num_rows = 0
    for batch in batches:
        cells = repeat(None) if images is None else _list_cells(batch.column(column), images, num_rows, first)
        yield from _join(batch.select([name for name in TEXT_COLUMNS if name in names]), cells)
        num_rows += batch.num_rows


def _join(batch: pa.RecordBatch, cells: Iterator[object]) -> Iterator[dict[str, object]]:
    """Put rows and their images together."""
    rows = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    for row, cell in zip(rows, cells, strict=False):
        conversations = row.get("conversations")
        if isinstance(conversations, dict):  # older versions of datasets give one list per field
            fields = [dict(zip(conversations, turn, strict=True)) for turn in zip(*conversations.values(), strict=True)]
            row["conversations"] = fields
        yield row | {"image": cell}


def _list_cells(
    column: pa.Array, images: ImageFile, start: int, first: int, is_inside: pa.Array | None = None
) -> Iterator[object]:
    """Yield each row's images: a name, a list of names, a `StoredImage`, a list of these, or None.

    Args:
        column: of images as structures of path and bytes, as bytes, or as names; or of lists of these.
        images: the file that holds them.
        start: number of the first row in that file.
        first: number of that file's first row in the source.
        is_inside: whether a row holds bytes, for a column from which they were left out.
    """
    kind, rows = column.type, range(start, start + len(column))
    if _is_list(kind) and _is_content(kind.value_type):
        for row, length in zip(rows, pc.list_value_length(column).to_pylist(), strict=True):
            yield [
                StoredImage(images, row, position, f"image {position} of row {first + row}")
                for position in range(length or 0)
            ]
    elif _is_content(kind):
        is_named = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        paths = pc.struct_field(column, "path").to_pylist() if is_named else [None] * len(column)
        if is_inside is None:
            is_inside = (pc.struct_field(column, "bytes") if pa.types.is_struct(kind) else column).is_valid()
        for row, path, inside in zip(rows, paths, is_inside.to_pylist(), strict=True):
            yield StoredImage(images, row, None, f"{path or 'image'} of row {first + row}") if inside else path
    else:
        yield from column.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_content(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _copy_images(batches: Iterable[pa.RecordBatch], images: ImageFile, copies: Path) -> ImageFile:
    """Write a column of images as an Arrow file, from which they are read one by one."""
    target = copies / f"images-{len(list(copies.glob('images-*')))}.arrow"
    batches = iter(batches)
    first = next(batches)
    with explain_errors("write", target), pa.ipc.new_stream(str(target), first.schema) as stream:
        for batch in chain([first], batches):
            stream.write_batch(batch)
    return ImageFile(str(target), images.column)
