"""Public datasets of the Hugging Face hub, written once into a benchmark's layout; from then on they are local data.

A `HubForm` names a dataset, its tables and columns, and writes them as question and annotation files under LLaVA's
names, so that questions and prompts are those of local data. A benchmark lists its forms by split (`Benchmark.hub`).
A local copy of a dataset is a folder as the hub's own downloads have it: `data/<split>-*.parquet`, or
`<config>/<split>-*.parquet` where there are several configurations; the files may also be in the folder itself.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from llava.errors import InputError
from llava.files import explain_errors, make_folder, read_json, read_text, write_bytes, write_json, write_text

ORGANISATIONS = ("lmms-lab", "lmms-lab-encoder")
"""The second is where the first's image datasets moved on 2026-07-30, under the same names."""

SHORT_ANSWER_LINE = "\nAnswer the question using a single word or phrase."

MARKER_FILE = ".hub.json"
"""In the benchmark's folder: which dataset each split came from."""
LOCK_FILE = ".hub.lock"
PARTIAL_FOLDER = ".hub-partial"
COMPLETE_FILE = ".complete"
OWNER_FILE = ".dataset"

_SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}

HubRow = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class HubTable:
    """A split of a configuration of a dataset.

    Attributes:
        split: its name.
        columns: those that the form needs.
        config: its configuration, where the dataset has several.
        columns_only: read these columns and no others, which spares the download of the images.
    """

    split: str
    columns: tuple[str, ...]
    config: str | None = None
    columns_only: bool = False

    def __str__(self) -> str:
        return f"split {self.split}" if self.config is None else f"config {self.config}, split {self.split}"


def read_rows(dataset: str, table: HubTable) -> Iterator[HubRow]:
    """Yield the rows of a table of a dataset (name on the hub, or local folder), one in memory at a time.

    Images are `{"bytes", "path"}`, not decoded. Whatever is missing or cannot be reached is an `InputError`.
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
        missing = [name for name in table.columns if name not in row]
        if missing:
            raise InputError(f"{where} has no column {', '.join(missing)}; it has {', '.join(row)}")
        yield row
        number += 1
    if number == 0:
        raise InputError(f"{where} has no rows")


def _open(dataset: str, table: HubTable) -> Any:
    from datasets import load_dataset  # takes seconds, and only `--source hub` needs it

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
    places = [folder / table.config] if table.config else [folder / "data", folder]
    for place in [*places, folder]:
        files = sorted([*place.glob(f"{table.split}-*.parquet"), *place.glob(f"{table.split}.parquet")])
        if files:
            return files
    raise InputError(f"{folder} has no {places[0].relative_to(folder) / table.split}-*.parquet ({table})")


def name_alternatives(dataset: str) -> list[str]:
    old, new = ORGANISATIONS
    owner, _, name = dataset.partition("/")
    return [dataset, f"{new}/{name}"] if owner == old else [dataset]


def _shorten(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


# ---------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class Layout:
    """A benchmark's folder in the making: images, question files and annotation files.

    Each file appears whole or not at all; what an earlier attempt left is kept.

    Attributes:
        folder: where the files go for now.
        final: where they will be in the end; images that are there already are not written again.
    """

    folder: Path
    final: Path

    def save_image(self, name: str, cell: Any) -> None:
        """Write an image's bytes (see `image_bytes`) as they are; without any, `answer` reports the missing file."""
        is_there = (self.folder / name).exists() or (self.final / name).exists()
        content = None if is_there else image_bytes(cell)
        if content is not None:
            write_bytes(self.folder / name, content)

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON Lines; text is not escaped, as in LLaVA's files."""
        self.write_text(name, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))

    def write_json(self, name: str, data: Any) -> None:
        self.write_text(name, f"{json.dumps(data, ensure_ascii=False)}\n")

    def write_text(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def write_tsv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a tab-separated table with a header; cells with tabs, quotes or newlines are quoted."""
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        self.write_text(name, text.getvalue())


def question_line(identity: int | str, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """Return a line of a LLaVA question file."""
    return {"question_id": identity, "image": image, "text": text, "category": category}


def image_bytes(cell: Any) -> bytes | None:
    """Return an image's bytes: from bytes, or from `{"bytes", "path"}`; None for an empty cell."""
    if isinstance(cell, Mapping):
        path = cell.get("path")
        content = cell.get("bytes")
        return Path(path).read_bytes() if content is None and path and Path(path).is_file() else content
    return bytes(cell) if cell else None


def guess_suffix(cell: Any) -> str:
    """Return the suffix of an image's file by its first bytes; `.jpg` where they are of no known format."""
    content = image_bytes(cell) or b""
    return next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), ".jpg")


def safe_name(name: object, where: str) -> str:
    """Return a dataset's cell as a file name; one that leads out of the benchmark's folder is refused."""
    text = str(name)
    if not text or text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise InputError(f"{where}: {text!r} is not a file name")
    return text


# ------------------------------------------------------------------------------------------------------------- forms
ReadTable = Callable[[str], Iterator[HubRow]]
"""Reads a table of a form, by its name, from the start."""


@dataclass(frozen=True)
class HubForm:
    """The hub's form of a benchmark, or of one split of it.

    Attributes:
        dataset: name on the hub.
        tables: what is read of it, by a name for `convert`.
        files: the files other than images that `convert` writes.
        convert: writes LLaVA's files.
    """

    dataset: str
    tables: Mapping[str, HubTable]
    files: Sequence[str]
    convert: Callable[[ReadTable, Layout], None]


def read_marker(root: Path) -> dict[str, str]:
    """Return which dataset each split in a benchmark's folder came from; a split that is not from the hub is absent."""
    return read_json(root / MARKER_FILE) if (root / MARKER_FILE).is_file() else {}


def fetch(form: HubForm, split: str, root: Path, dataset: str | None = None) -> None:
    """Make sure that a benchmark's folder holds the hub's data; does nothing the second time.

    Several processes may call it at once: one works, the others wait.

    Args:
        form: the dataset.
        split: the benchmark's name for it.
        root: the benchmark's folder, which must not hold other data.
        dataset: name on the hub or folder of parquet files, instead of the form's own.
    """
    name = dataset or form.dataset
    make_folder(root)
    # The kernel lets the next process in however this one ends.
    with explain_errors("write", root), FileLock(root / LOCK_FILE):
        held = read_marker(root)
        if held.get(split) == name:
            return
        if split in held:
            raise InputError(f"{root} holds {held[split]} already; name another --root for {name}")
        partial = root / PARTIAL_FOLDER / split
        if not _says(partial / COMPLETE_FILE, name):
            _convert(form, name, partial, root)
        _publish(partial, root, form.files)
        write_json(root / MARKER_FILE, {**held, split: name})
        shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)


def _says(path: Path, name: str) -> bool:
    return path.is_file() and read_text(path) == name


def _convert(form: HubForm, dataset: str, partial: Path, root: Path) -> None:
    """Write all files into a folder of their own, going on with what an earlier attempt of the same dataset left."""
    for path in (root / name for name in form.files):
        if path.exists():
            raise InputError(
                f"{path} is there already and is not from the hub; leave out --source hub, or name another --root"
            )
    if partial.exists() and not _says(partial / OWNER_FILE, dataset):
        shutil.rmtree(partial)

    def read_table(name: str) -> Iterator[HubRow]:
        table = form.tables[name]
        return iter(tqdm(read_rows(dataset, table), desc=f"{dataset}, {table}", unit="row"))

    write_text(partial / OWNER_FILE, dataset)
    form.convert(read_table, Layout(partial, root))
    write_text(partial / COMPLETE_FILE, dataset)


def _publish(partial: Path, root: Path, files: Sequence[str]) -> None:
    """Move the files to their places, images first, so that a question file is never there alone."""
    found = [path for path in partial.rglob("*") if path.is_file() and not path.name.startswith(".")]
    names = [str(path.relative_to(partial)) for path in found]
    for name in sorted(names, key=lambda name: (name in files, name)):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(target)
