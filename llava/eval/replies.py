"""A judge's replies on disk: each is kept the moment it comes, so that nothing is asked, or paid for, twice.

JSON lines, one reply each, appended and synced. A line that a killed writer left torn is skipped (its question is
asked again); where a key stands twice, the first reply counts, so that a score never changes by itself.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.files import explain_errors

# How each line begins, by which a torn one is told from a line of some other file.
LINE_START = b'{"key": "'


class ReplyCache:
    """Replies by key, in memory and in a file; safe to use from several threads.

    Several processes may append to one file: a line is written by a single call.
    """

    def __init__(self, path: Path):
        """Read the file, if there is one.

        Args:
            path: JSON lines; made, with its folder, when the first reply comes.

        Raises:
            InputError: the file is there, but holds something else than replies.
        """
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise InputError(f"cannot read the judge's replies {path}: {error.strerror or error}") from None
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                self._read_line(line, number)
        self._needs_newline = not content.endswith(b"\n") and bool(content)

    def __len__(self) -> int:
        return len(self._replies)

    def find(self, key: str) -> str | None:
        """Return the reply of a key, or None."""
        with self._lock:
            return self._replies.get(key)

    def keep(self, key: str, reply: str, **about: Any) -> str:
        """Put a reply on the disk: after return it survives a power cut.

        Args:
            key: by which it is found again.
            reply: as it came.
            about: JSON data for people who read the file.

        Returns:
            The reply that counts: this one, or one that was there before.

        Raises:
            InputError: the file can't be written.
        """
        line = json.dumps({"key": key, **about, "reply": reply}).encode() + b"\n"
        with self._lock, explain_errors("write", self.path):
            if key in self._replies:
                return self._replies[key]
            self._append(b"\n" + line if self._needs_newline else line)
            self._needs_newline = False
            self._replies[key] = reply
        return reply

    def _append(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            written = file.write(content)
            if written != len(content):
                self._needs_newline = True
                raise OSError("the disk took only a part of the line")
            os.fsync(file.fileno())

    def _read_line(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            if line.startswith(LINE_START) or LINE_START.startswith(line):
                return
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("key", "reply")):
            raise InputError(f"{self.path} line {number} is no reply of a judge: give --judge-cache a file of its own")
        self._replies.setdefault(record["key"], record["reply"])
