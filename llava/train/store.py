"""Training records on disk: converted once per machine, memory-mapped by every rank and worker, read one by one.

A store is a folder, named by the content of what it is made of, so that changed data get another one:

    records.arrow   a row per record: how messages name it, its turns, its images
    names.arrow     the distinct names of image files
    *.npy           a number per record or image that is looked at for all records at once (`COLUMNS`)
    about.json      written last: sizes of these files, faults of records that are not in them, files that hold images

Stores lie in `--data_cache`, by default `training_data` in the user's cache folder (`LLAVA_CACHE`, else `llava` under
`XDG_CACHE_HOME` or `~/.cache`). They can be deleted whenever no run uses them.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm import tqdm

from llava.errors import InputError
from llava.files import FileError, atomic_folder, make_folder, read_json, write_json
from llava.model.identity import PATIENCE_SECONDS, find_cache_folder, fingerprint
from llava.train.mixture import repeat_by_weight
from llava.train.sources import Source, read_rows
from llava.train.stored_images import ImageFile, StoredImage, open_arrow
from llava.train.targets import is_caption

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the same sources would give another store: older ones are not found any more."""
ABOUT, RECORDS, NAMES = "about.json", "records.arrow", "names.arrow"
SHOWN_FAULTS = 5
ROWS_PER_BATCH = 1000
DIGEST_BYTES = 16

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "turns": pa.list_(pa.string()),
        # A name, or the place of an image inside a file; then the name is its label.
        "images": pa.list_(
            pa.struct({"name": pa.string(), "file": pa.int32(), "row": pa.int64(), "position": pa.int32()})
        ),
    }
)
COLUMNS = {"num_words": np.int32, "num_images": np.int32, "is_caption": np.bool_}
"""Per record: the length by which batches are grouped, images, whether the plain template can render it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One training conversation.

    Attributes:
        name: how a message names it: `record 7 (id 'c3')`.
        images: file names relative to the image folder (or URLs), or images inside the data, in order of their
            placeholders.
        turns: texts, alternating between user and assistant, user first; one `<image>` placeholder per image.
    """

    name: str
    images: tuple[str | StoredImage, ...]
    turns: tuple[str, ...]

    @property
    def num_words(self) -> int:
        """Number of words in all turns: the length by which batches are grouped."""
        return sum(len(turn.split()) for turn in self.turns)

    def digest(self) -> bytes:
        """Return what identifies its texts and image names, as `DIGEST_BYTES` bytes."""
        line = "\0".join([*self.turns, "", *map(str, self.images)])
        return hashlib.sha256(line.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


@dataclass
class Faults:
    """Faults of records: how many, and the first few in words."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(fault)


# ------------------------------------------------------------------------------------------------------------ writing
def write_store(folder: Path, records: Iterable[Record | InputError], files: Sequence[str]) -> None:
    """Write records into a folder, a batch at a time.

    Args:
        folder: holds images that were copied, and nothing else.
        records: read once; errors are counted as faults.
        files: of the source, by which images inside them are named.

    Raises:
        InputError: what reading the records raises.
    """
    faults, image_files = Faults(), {}
    columns = {name: _Growing(kind) for name, kind in COLUMNS.items()} | {"digests": _Growing(np.uint8)}
    with pa.ipc.new_stream(str(folder / RECORDS), SCHEMA) as stream:
        for batch in _batched(_without(records, faults)):
            rows = [
                {"name": record.name, "turns": record.turns, "images": _to_cells(record.images, image_files)}
                for record in batch
            ]
            stream.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
            columns["num_words"].extend([record.num_words for record in batch])
            columns["num_images"].extend([len(record.images) for record in batch])
            columns["is_caption"].extend([is_caption(record.turns) for record in batch])
            columns["digests"].extend(np.frombuffer(b"".join(record.digest() for record in batch), np.uint8))
    for name, column in columns.items():
        shape = (-1, DIGEST_BYTES) if name == "digests" else -1
        np.save(folder / f"{name}.npy", column.join().reshape(shape))
    _write_names(folder)
    places = [
        {"source": files.index(file.path), "column": file.column}
        if file.path in files
        else {"copy": Path(file.path).name, "column": file.column}
        for file in image_files
    ]
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    about = {"faults": vars(faults), "image_files": places, "sizes": sizes}
    write_json(folder / ABOUT, about)


def _without(records: Iterable[Record | InputError], faults: Faults) -> Iterator[Record]:
    for record in records:
        if isinstance(record, InputError):
            faults.add(str(record))
        else:
            yield record


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    for record in records:
        batch = [record]
        batch += [more for _, more in zip(range(ROWS_PER_BATCH - 1), records, strict=False)]
        yield batch


def _to_cells(images: Sequence[str | StoredImage], files: dict[ImageFile, int]) -> list[dict[str, object]]:
    return [
        {"name": image}
        if isinstance(image, str)
        else {
            "name": image.label,
            "file": files.setdefault(image.file, len(files)),
            "row": image.row,
            "position": image.position,
        }
        for image in images
    ]


class _Growing:
    """A column in the making, an array per batch."""

    def __init__(self, kind: type) -> None:
        self._kind, self._parts = kind, []

    def extend(self, values: Sequence) -> None:
        self._parts.append(np.asarray(values, dtype=self._kind))

    def join(self) -> np.ndarray:
        return np.concatenate([np.empty(0, self._kind), *self._parts])


def _write_names(folder: Path) -> None:
    """Write the distinct names of image files, and for each image of each record the number of its name, or -1."""
    images = pc.list_flatten(open_arrow(folder / RECORDS).column("images"))
    is_file = pc.is_null(pc.struct_field(images, "file"))
    names = pc.if_else(is_file, pc.struct_field(images, "name"), None).dictionary_encode().unify_dictionaries()
    numbers = pa.chunked_array([chunk.indices for chunk in names.chunks], pa.int32())
    np.save(folder / "image_names.npy", pc.fill_null(numbers, -1).to_numpy().astype(np.int32))
    distinct = names.chunk(0).dictionary if names.num_chunks else pa.array([], pa.string())
    schema = pa.schema({"name": pa.string()})
    with pa.ipc.new_stream(str(folder / NAMES), schema) as stream:
        stream.write_table(pa.table([distinct], schema), max_chunksize=ROWS_PER_BATCH)


# ------------------------------------------------------------------------------------------------------------ reading
class Store:
    """An open store; what it holds is mapped, not loaded.

    Attributes:
        folder: where it lies.
        files: of its source; they hold images that were not copied.
        label: put in front of the names of records; "" if they need none.
        weight: of its records in a mixture.
        faults: of the rows that are no records.
        names: distinct names of image files.
    """

    def __init__(self, folder: Path, files: Sequence[str], label: str = "", weight: float = 1.0) -> None:
        """Open a store.

        Raises:
            InputError: it is damaged or not there.
        """
        self.folder, self.files, self.label, self.weight = folder, tuple(files), label, weight
        try:
            about = read_json(folder / ABOUT)
            for name, size in about["sizes"].items():
                if (folder / name).stat().st_size != size:
                    raise FileError(f"{folder / name} has another size than it was written with")
            self.faults = Faults(**about["faults"])
            self._image_files = [
                ImageFile(
                    self.files[place["source"]] if "source" in place else str(folder / place["copy"]), place["column"]
                )
                for place in about["image_files"]
            ]
            self._rows = Dataset.from_file(str(folder / RECORDS))
            self.names = open_arrow(folder / NAMES).column("name")
            for name in (*COLUMNS, "digests", "image_names"):
                setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, pa.ArrowException, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{folder} is not the store that training writes: {error}") from error

    def __reduce__(self) -> tuple:
        """Pickle the place alone."""
        return Store, (self.folder, self.files, self.label, self.weight)

    def __len__(self) -> int:
        return len(self.num_words)

    def read(self, rows: Sequence[int]) -> list[Record]:
        """Read some records."""
        found = self._rows[rows]
        return [
            Record(f"{self.label}{name}", tuple(map(self._to_image, images)), tuple(turns))
            for name, images, turns in zip(found["name"], found["images"], found["turns"], strict=True)
        ]

    def find_names(self, numbers: np.ndarray, is_wanted: Callable[[str], bool]) -> np.ndarray:
        """Ask of the names with these numbers, which rise; returns bool[number of names]."""
        found = np.zeros(len(self.names), bool)
        for start in range(0, len(numbers), ROWS_PER_BATCH):
            part = numbers[start : start + ROWS_PER_BATCH]
            found[part] = [is_wanted(name) for name in self.names.take(pa.array(part)).to_pylist()]
        return found

    def _to_image(self, cell: dict) -> str | StoredImage:
        if cell["file"] is None:
            return cell["name"]
        return StoredImage(self._image_files[cell["file"]], cell["row"], cell["position"], cell["name"])


class Records(Sequence[Record]):
    """Training records in their order: those of one store or several, or some of them; read when they are asked for.

    Equal to a list of equal records.

    Args:
        stores: one after another.
        rows: int64[S], numbers of records as if the stores were one; None: all of them.
    """

    def __init__(self, stores: Sequence[Store], rows: np.ndarray | None = None) -> None:
        self.stores = tuple(stores)
        self._starts = np.cumsum([0, *map(len, self.stores)])
        self._rows = rows

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Records":
        """Return records as they are, or write a list of them into a temporary store, which ends with the process."""
        if isinstance(records, Records):
            return records
        folder = Path(tempfile.mkdtemp(dir=_make_temporary().name))
        images = (image for record in records for image in record.images if isinstance(image, StoredImage))
        files = list(dict.fromkeys(image.file.path for image in images))
        write_store(folder, records, files)
        return cls([Store(folder, files)])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, position: int | slice) -> "Record | Records":
        if isinstance(position, slice):
            return Records(self.stores, self._locate(np.arange(len(self))[position]))
        if not -len(self) <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        return self.read([position % len(self)])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), ROWS_PER_BATCH):
            yield from self.read(range(start, min(start + ROWS_PER_BATCH, len(self))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} records in {', '.join(str(store.folder) for store in self.stores)}>"

    def read(self, positions: Sequence[int]) -> list[Record]:
        """Read the records at some positions, in that order."""
        rows = self._locate(np.asarray(positions, dtype=np.int64))
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        found: list[Record | None] = [None] * len(rows)
        for number in np.unique(numbers):
            (places,) = np.nonzero(numbers == number)
            records = self.stores[number].read((rows[places] - self._starts[number]).tolist())
            for place, record in zip(places.tolist(), records, strict=True):
                found[place] = record
        return found

    def column(self, name: str) -> np.ndarray:
        """Return a number per record: one of `COLUMNS`, or "digests" (uint8[S, DIGEST_BYTES])."""
        return self._gather([getattr(store, name) for store in self.stores])

    @property
    def num_words(self) -> np.ndarray:
        """int32[S]: the lengths by which batches are grouped."""
        return self.column("num_words")

    @property
    def num_images(self) -> np.ndarray:
        """int32[S]."""
        return self.column("num_images")

    def find_named(self, is_wanted: Callable[[str], bool]) -> np.ndarray:
        """Find the records with an image file of a certain kind; each name is looked at once.

        Args:
            is_wanted: of a name. Images inside the data and names of other records are not asked about.

        Returns:
            bool[S].
        """
        marks, used = [], np.zeros(self._starts[-1], bool)
        used[self._locate(np.arange(len(self)))] = True
        for start, store in zip(self._starts, self.stores, strict=False):
            owners = np.repeat(np.arange(len(store)), store.num_images)
            asked = np.flatnonzero((store.image_names >= 0) & used[start : start + len(store)][owners])
            numbers = store.image_names[asked]
            mark = np.zeros(len(store), bool)
            mark[owners[asked[store.find_names(np.unique(numbers), is_wanted)[numbers]]]] = True
            marks.append(mark)
        return self._gather(marks)

    def keep(self, is_kept: np.ndarray) -> "Records":
        """Return some of the records: bool[S] says which."""
        return self if is_kept.all() else Records(self.stores, self._locate(np.flatnonzero(is_kept)))

    def repeated(self) -> "Records":
        """Return the records as often as the weights of their stores say."""
        if all(store.weight == 1 for store in self.stores):
            return self
        rows = self._locate(np.arange(len(self)))
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        parts = [repeat_by_weight(rows[numbers == number], store.weight) for number, store in enumerate(self.stores)]
        return Records(self.stores, np.concatenate(parts))

    def fingerprint(self) -> str:
        """Return what identifies the records' texts and image names, in order."""
        return hashlib.sha256(np.ascontiguousarray(self.column("digests")).tobytes()).hexdigest()

    def list_digests(self) -> list[bytes]:
        """Return what identifies each record's texts and image names."""
        return [row.tobytes() for row in self.column("digests")]

    def _locate(self, positions: np.ndarray) -> np.ndarray:
        return positions if self._rows is None else self._rows[positions]

    def _gather(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self._rows is None else whole[self._rows]


@lru_cache(maxsize=1)
def _make_temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="llava-records-")


def find_data_cache(named: str | Path | None = None) -> Path:
    """Return the folder of stores: `--data_cache`, or the one in the user's cache folder; it need not exist."""
    return find_cache_folder() / "training_data" if named is None else Path(named).expanduser()


def open_store(source: Source, cache: Path, parse: Callable[[object, int], Record], label: str = "") -> Store:
    """Open the store of a source; if there is none, make it.

    Of several processes that ask for it one makes it, and the others wait. It appears whole or not at all.

    Args:
        source: what it holds.
        cache: folder of stores.
        parse: makes a record of a row and its number, from 0.
        label: see `Store`.

    Raises:
        InputError: the source cannot be read, or the cache not written.
    """
    kinds = [FORMAT, source.content, [Path(file).name for file in source.files]]
    folder = cache / fingerprint(json.dumps(kinds))
    with suppress(FileError):
        return Store(folder, source.files, label, source.weight)
    try:
        make_folder(cache)
        lock = FileLock(cache / f"{folder.name}.lock")
        _acquire(lock, source.name)
    except (FileError, OSError, NotImplementedError) as error:
        reason = error if isinstance(error, FileError) else f"cannot write {cache}: {error}"
        raise FileError(f"{reason}; --data_cache takes another folder for the records") from error
    try:
        with suppress(FileError):
            return Store(folder, source.files, label, source.weight)  # another process was quicker
        for rest in [*cache.glob(f".{folder.name}.*.partial"), folder]:  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        with atomic_folder(folder) as partial:
            rows = read_rows(source, partial)
            with tqdm(
                rows, f"reading {source.name}", unit=" records", mininterval=1, delay=PATIENCE_SECONDS, leave=False
            ) as bar:
                write_store(partial, (_attempt(parse, row, number) for number, row in enumerate(bar)), source.files)
    finally:
        lock.release()
    return Store(folder, source.files, label, source.weight)


def _acquire(lock: FileLock, name: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process reads %s into the store: waiting for it", name)
        lock.acquire()


def _attempt(parse: Callable[[object, int], Record], row: object, number: int) -> Record | InputError:
    try:
        return parse(row, number)
    except InputError as error:
        return error
