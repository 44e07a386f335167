"""Write a benchmark's published layout: pictures, question files and annotation files under one folder.

Everything goes to a folder of its own first. What is there already from an earlier attempt that was cut off is kept:
each file appears whole or not at all.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.answers import explain_write_errors

SHORT_ANSWER_LINE = "\nAnswer the question using a single word or phrase."
LETTER_LINE = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"

_SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


class Layout:
    """A folder in the making.

    Attributes:
        folder: where the files go for now.
        final: where they will be in the end; pictures that are there already are not written again.
    """

    def __init__(self, folder: Path, final: Path):
        """Name the folders; the first is made."""
        self.folder = folder
        self.final = final
        self._made: set[Path] = set()

    def has(self, name: str) -> bool:
        """Tell whether a file is there, from this attempt or an earlier one."""
        return (self.folder / name).exists() or (self.final / name).exists()

    def save_picture(self, name: str, cell: Any) -> None:
        """Write a picture's bytes as they are; a row without picture leaves none, and `answer` reports it.

        Args:
            name: of the file.
            cell: the dataset's picture, see `read_picture`.
        """
        content = None if self.has(name) else read_picture(cell)
        if content is not None:
            self._write(name, content)

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON lines."""
        self._write(name, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        self._write(name, f"{json.dumps(data, ensure_ascii=False)}\n".encode())

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        self._write(name, text.encode())

    def write_tsv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a tab-separated table with a header; cells with tabs, quotes or newlines are quoted."""
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        self.write_text(name, text.getvalue())

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        with explain_write_errors(path):
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made.add(path.parent)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(content)
            partial.replace(path)


def read_picture(cell: Any) -> bytes | None:
    """Return a picture's bytes: from bytes, or from `{"bytes", "path"}`; None for an empty cell."""
    if isinstance(cell, Mapping):
        path = cell.get("path")
        content = cell.get("bytes")
        return Path(path).read_bytes() if content is None and path and Path(path).is_file() else content
    return bytes(cell) if cell else None


def guess_suffix(cell: Any) -> str:
    """Return the suffix of a picture's file by its first bytes; `.jpg` where they tell nothing."""
    content = read_picture(cell) or b""
    return next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), ".jpg")


def safe_name(name: Any, where: str) -> str:
    """Return a file name from a dataset's cell as text.

    Raises:
        InputError: it would lead out of the benchmark's folder.
    """
    text = str(name)
    if not text or text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise InputError(f"{where}: {text!r} is no file name")
    return text
