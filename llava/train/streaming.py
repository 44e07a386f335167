"""JSON files larger than memory, read item by item; messages are those of `llava.files`."""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llava.files import FileError, check_regular, explain_errors, not_json, not_readable, not_text, read_json

_SPACE = re.compile(r"[ \t\n\r]*")
"""What JSON calls white space."""


@contextmanager
def open_regular(path: Path, hint: str = "") -> Iterator[BinaryIO]:
    """Open a regular file for reading; errors of the file system inside the block become a `FileError`.

    Args:
        path: the file; links are followed.
        hint: ends the message if there is no such file.
    """
    with explain_errors("read", path, hint):
        check_regular(path)
        with Path(path).open("rb") as file:
            yield file


def read_lines(path: Path, hint: str = "") -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a text file with their numbers, counted from 1; one is held at a time.

    Only "\\n" ends a line: JSON strings may hold U+2028 and the like.
    """
    position = 0
    with open_regular(path, hint) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise not_text(path, position + error.start) from None
            position += len(line)
            if text.strip():
                yield number, text


def read_list(path: Path, hint: str = "") -> Iterator[Any]:
    """Yield the items of a file that is one JSON list; one item and a block of the file are held at a time.

    Raises:
        FileError: as for `read_json`, when the reading comes to it; or the document is no list.
    """
    with open_regular(path, hint) as file:
        text = _Window(path, file)
        if text.skip_space() != "[":
            content = read_json(path, hint)
            raise FileError(f"{path}: expected a JSON list of records, found {type(content).__name__}")
        text.position += 1
        is_open = text.skip_space() != "]"
        while is_open:
            yield text.read_item()
            is_open = text.skip_space() == ","
            if is_open:
                text.position += 1
                if text.skip_space() == "]":
                    raise text.explain("Expecting value")
            elif text.skip_space() != "]":
                raise text.explain("Expecting ',' delimiter")
        text.position += 1
        if text.skip_space():
            raise text.explain("Extra data")


class _Window:
    """The part of a JSON file that is being read.

    Attributes:
        position: of the reading, in `buffer`.
    """

    BLOCK_BYTES = 2**20
    LONGEST_WORD = 16
    """More characters than any word of JSON has, an escape or a name: an error farther from the end is no cut word."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._num_bytes, self._line, self._column = 0, 1, 1
        self.buffer, self.position, self._is_last = "", 0, False

    def skip_space(self) -> str:
        """Go to the next character that is no white space, and return it; "" at the end of the file."""
        while True:
            self.position = _SPACE.match(self.buffer, self.position).end()
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if self._is_last:
                return ""
            self._read_on()

    def read_item(self) -> Any:
        """Parse the value at the position, and go behind it."""
        while True:
            try:
                value, end = self._parse(self.buffer, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + self.LONGEST_WORD > len(self.buffer)
                if self._is_last or not is_cut:
                    raise self.explain(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise not_readable(self._path, error) from None
            else:
                if end + self.LONGEST_WORD <= len(self.buffer) or self._is_last:  # else a number may go on
                    self.position = end
                    return value
            self._read_on()

    def explain(self, reason: str, position: int | None = None) -> FileError:
        """Make the error of what is found at a position, by default the present one."""
        place = self.position if position is None else position
        line, column = self._count(place)
        return not_json(self._path, json.JSONDecodeError(reason, self.buffer, place), line, column)

    def _read_on(self) -> None:
        """Drop what is read, and read at least as much as is left: a long item is parsed a few times only."""
        dropped = max(0, self.position - self.LONGEST_WORD)  # messages look at what is in front of a mistake
        self._line, self._column = self._count(dropped)
        rest = self.buffer[dropped:]
        block = self._file.read(max(self.BLOCK_BYTES, len(rest)))
        start = self._num_bytes - len(self._decoder.getstate()[0])
        self._num_bytes += len(block)
        self._is_last = not block
        try:
            self.buffer = rest + self._decoder.decode(block, final=self._is_last)
        except UnicodeDecodeError as error:
            raise not_text(self._path, start + error.start) from None
        self.position -= dropped

    def _count(self, position: int) -> tuple[int, int]:
        """Return line and column of a position, from 1."""
        num_lines = self.buffer.count("\n", 0, position)
        if not num_lines:
            return self._line, self._column + position
        return self._line + num_lines, position - self.buffer.rindex("\n", 0, position)
