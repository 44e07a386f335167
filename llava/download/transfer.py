"""Fetch one file over HTTP: what has arrived is kept, and the same call goes on there, unless the file has changed.

While `NAME` is fetched, `NAME.part` holds its beginning and `NAME.part.json` what the server said of it (size, ETag,
date). A later request asks for the rest under the condition that the file is still the same one; where a server cannot
do this, or says otherwise, the file is fetched from the start.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.download.table import format_size
from llava.errors import InputError
from llava.files import FileError, explain_errors, make_folder, parse_natural, read_json, write_json

Notify = Callable[[str], None]

CHUNK_BYTES = 2**18
TIMEOUT_SECONDS = 60.0
"""Of connecting and of each read; a transfer as a whole may take days."""
ASK_SECONDS = 10.0
"""Of a question for a size."""
HEADERS = {"User-Agent": "llava", "Accept-Encoding": "identity"}
MAX_TRIES = 5
"""In a row that bring nothing new."""
FIRST_WAIT_SECONDS = 1.0
"""Before the second try; each further one doubles it."""
MAX_CHANGES = 3
"""How often a file may change while it is fetched."""
BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers after which a further try makes sense, beside those of a failing server (5xx)."""
SHA256 = re.compile(r'"?([0-9a-f]{64})"?')


@dataclass(frozen=True)
class Fetched:
    """A file that is there: its size in bytes, and its checksum, 64 hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What a server says of a file. Two answers about the same file contradict each other in nothing.

    Attributes:
        address: that was asked.
        size: in bytes, where it is said.
        etag: a name for exactly these bytes; None where the server gives none that is as strict ("W/...").
        modified: the date of the last change.
        sha256: the checksum of a large file on the Hugging Face hub.
    """

    address: str
    size: int | None = None
    etag: str | None = None
    modified: str | None = None
    sha256: str | None = None

    def contradicts(self, other: "Identity") -> bool:
        """Whether both say something of a kind, and it differs."""
        pairs = [(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        return any(mine is not None and others is not None and mine != others for mine, others in pairs)


class ChecksumError(InputError):
    """A file that has arrived is another one than it should be."""

    def __init__(self, message: str, wanted: str):
        super().__init__(message)
        self.wanted = wanted


class _BrokenConnection(Exception):
    """What another try may mend."""


class _Unusable(Exception):
    """What has arrived cannot be gone on with; says why."""


def fetch(address: str, path: Path, notify: Notify, sha256: str | None = None) -> Fetched:
    """Fetch a file; goes on with what an earlier call has left.

    Args:
        address: http(s).
        path: where the file goes; it appears there whole.
        notify: is told, in a line, what begins, and about every further try.
        sha256: the checksum that the file must have, where it is known; one that the server names counts as well.

    Raises:
        ChecksumError: another file has arrived; it is deleted.
        InputError: not found, not reachable after `MAX_TRIES` tries, no space, or not what the server announces. What
            has arrived stays where a later call can go on with it.
    """
    make_folder(path.parent)
    part = _Part(path, address)
    num_idle = num_changes = most = 0
    while True:
        try:
            part.advance(notify)
            return part.finish(sha256)
        except _BrokenConnection as fault:
            num_idle = 0 if part.length > most else num_idle + 1
            most = max(most, part.length)
            if num_idle == MAX_TRIES:
                kept = f"; {format_size(most)} are kept, and the same command goes on there" if part.length else ""
                raise InputError(f"{address}: {fault}, {MAX_TRIES} times in a row{kept}") from None
            wait = FIRST_WAIT_SECONDS * 2**num_idle
            notify(f"{address}: {fault} at {format_size(part.length)}; next try in {wait:g} seconds")
            time.sleep(wait)
        except _Unusable as reason:
            num_changes += 1
            part.drop()
            if num_changes > MAX_CHANGES:
                raise InputError(f"{address}: {reason}, {num_changes} times: try again later") from None
            notify(f"{address}: {reason}; fetching it from the start")


def ask_size(address: str) -> int | None:
    """Ask a server how large a file is, in bytes; None if it does not say so at once."""
    request = urllib.request.Request(address, headers=HEADERS, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
            return parse_natural(response.headers.get("Content-Length", "")) or None
    except (OSError, http.client.HTTPException):
        return None


def name_partial(path: Path) -> Path:
    """Return where the beginning of a file is kept."""
    return path.with_name(f"{path.name}.part")


class _Part:
    """The beginning of a file, on the disk, and what the server said of the whole."""

    def __init__(self, path: Path, address: str):
        self.path = path
        self.partial = name_partial(path)
        self.note = path.with_name(f"{path.name}.part.json")
        self.identity = Identity(address)
        self.address = address
        if self.note.is_file():
            said = read_json(self.note)
            if isinstance(said, dict) and said.get("address") == address:
                self.identity = Identity(**{each.name: said.get(each.name) for each in fields(Identity)})
            else:
                self.drop()

    @property
    def length(self) -> int:
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def drop(self) -> None:
        """Forget what has arrived."""
        with explain_errors("write", self.partial):
            self.note.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
        self.identity = Identity(self.address)

    def advance(self, notify: Notify) -> None:
        """Fetch what is missing, as far as the connection lasts."""
        if not self.note.is_file():  # nothing is known of what has arrived
            self.drop()
        start = self.length
        if start and start == self.identity.size:
            return
        handler = _RedirectHandler()
        try:
            response = urllib.request.build_opener(handler).open(self._request(start), timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                self._judge_status(error.code, start)
        except http.client.InvalidURL:
            raise InputError(f"{self.address}: not a valid address") from None
        except http.client.HTTPException as error:
            raise _BrokenConnection(f"the answer is not HTTP ({type(error).__name__})") from None
        except OSError as error:
            raise _BrokenConnection(_describe(error)) from None
        with response:
            self._receive(response, handler.sha256, start, notify)

    def _request(self, start: int) -> urllib.request.Request:
        headers = dict(HEADERS)
        if start:
            headers["Range"] = f"bytes={start}-"
            if condition := self.identity.etag or self.identity.modified:
                headers["If-Range"] = condition
        return urllib.request.Request(self.address, headers=headers)

    def _judge_status(self, code: int, start: int) -> None:
        """Raise what follows from a status that is no success."""
        name = f"{code} {HTTPStatus(code).phrase}" if code in list(HTTPStatus) else str(code)
        if start and code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _Unusable(f"the file is shorter now than the {format_size(start)} that had arrived")
        if code >= 500 or code in BUSY:
            raise _BrokenConnection(f"the server says {name}")
        raise InputError(f"{self.address}: the server says {name}: it may have moved, or need an account")

    def _receive(self, response: Any, sha256: str | None, start: int, notify: Notify) -> None:
        """Append what a response brings, at the place that it is for."""
        told = _identify(self.address, response, sha256)
        if "text/html" in response.headers.get("Content-Type", "") and not self.path.suffix.startswith(".htm"):
            raise InputError(
                f"{self.address}: the server sends a web page instead of the file: look at it in a browser"
            )
        if start and response.status != HTTPStatus.PARTIAL_CONTENT:
            changed = self.identity.contradicts(told)
            notify(
                f"{self.address}: {'the file has changed' if changed else 'the server cannot go on in the middle'}; "
                "fetching it from the start"
            )
            self.drop()
            start = 0
        elif start and (self.identity.contradicts(told) or _first_byte(response) != start):
            raise _Unusable("the file has changed")
        self.identity = told
        write_json(self.note, asdict(told))
        if told.size is not None:
            require_space(self.path.parent, told.size - start, f"the rest of {self.path.name}")
        there = f", {format_size(start)} of it are there" if start else ""
        notify(f"fetching {self.path.name}, {format_size(told.size)}{there}")
        with tqdm(
            total=told.size, initial=start, unit="B", unit_scale=True, desc=self.path.name, disable=None
        ) as progress:
            self._copy(response, progress)
        if told.size is not None and self.length < told.size:
            raise _BrokenConnection("the connection ended")

    def _copy(self, response: Any, progress: tqdm) -> None:
        try:
            with explain_errors("write", self.partial), self.partial.open("ab") as file:
                while chunk := _read(response):
                    file.write(chunk)
                    progress.update(len(chunk))
        except FileError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENOSPC:
                raise
            raise InputError(
                f"the disk of {self.partial} is full: {format_size(self.length)} of "
                f"{format_size(self.identity.size)} are kept; make room, and the same command goes on there"
            ) from None

    def finish(self, sha256: str | None) -> Fetched:
        """Check what has arrived, and give it its name."""
        size = self.length
        if self.identity.size not in (None, size):
            raise _Unusable(f"{size:,} bytes have arrived instead of {self.identity.size:,}")
        digest = hash_file(self.partial)
        for wanted, source in ((self.identity.sha256, "the server names"), (sha256, "it should be")):
            if wanted not in (None, digest):
                self.drop()
                raise ChecksumError(
                    f"{self.address}: the checksum is wrong: {source} sha256 {wanted}, and {digest} has arrived", wanted
                )
        with explain_errors("write", self.path):
            with self.partial.open("rb+") as file:
                os.fsync(file.fileno())
            self.partial.replace(self.path)
            self.note.unlink(missing_ok=True)
        return Fetched(size, digest)


def _read(response: Any) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)  # what there is; `read` would wait for all of it
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenConnection(_describe(error)) from None


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Notes the checksum that the Hugging Face hub names as it sends a client on to where a large file is stored."""

    sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        named = SHA256.fullmatch(headers.get("X-Linked-Etag", ""))
        self.sha256 = named[1] if named else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _identify(address: str, response: Any, sha256: str | None) -> Identity:
    """Read what a response, whole or partial, says of the whole file."""
    headers = response.headers
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        size = parse_natural(headers.get("Content-Range", "").rpartition("/")[2])
    else:
        size = parse_natural(headers.get("Content-Length", ""))
    etag = headers.get("ETag")
    return Identity(
        address, size, etag if etag and not etag.startswith("W/") else None, headers.get("Last-Modified"), sha256
    )


def _first_byte(response: Any) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return parse_natural(found[1]) if found else None


def _describe(error: Exception) -> str:
    """Describe a failed connection without anything that a server sent."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, http.client.HTTPException):
        return "the connection ended"
    if isinstance(reason, TimeoutError):
        return f"no answer for {TIMEOUT_SECONDS:g} seconds"
    return getattr(reason, "strerror", None) or str(reason)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to write more than a disk has room for.

    Raises:
        InputError: says what is needed and what is free.
    """
    free = measure_space(folder)
    if needed > free:
        raise InputError(
            f"{what} needs {format_size(needed)}, and {format_size(free)} are free in {folder}: make room, "
            "and give the same command again"
        )


def measure_space(folder: Path) -> int:
    """Return how many bytes are free on the disk of a folder, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with explain_errors("read", folder):
        return shutil.disk_usage(folder).free


def hash_file(path: Path) -> str:
    """Return the SHA-256 checksum of a file, 64 hexadecimal digits."""
    with explain_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
