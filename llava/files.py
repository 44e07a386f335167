"""Read and write files: text, JSON and JSON Lines, with one error for everything that can go wrong with a file.

Reading touches regular files only: a pipe or a device may never end. Writing is atomic: a file appears whole or not at
all. It follows links, and never replaces anything but a regular file.
"""

import errno
import glob
import json
import os
import platform
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.signals import is_alive

_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


class FileError(InputError):
    """A file that cannot be read or written, or does not hold what it should."""


def find_repository() -> Path | None:
    """Return the repository that this package lies in; None for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


# ----------------------------------------------------------------------------------------------------------- reading
def read_bytes(path: Path, hint: str = "", limit: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: the file; links are followed.
        hint: ends the message if there is no such file, for example with the command that makes it.
        limit: largest size in bytes.

    Raises:
        FileError: missing, not a regular file, not readable, or larger than the limit or the memory.
    """
    with explain_errors("read", path, hint):
        size = check_regular(path)
        if limit is not None and size > limit:
            raise FileError(f"{path} is larger than {limit / 2**30:g} GiB")
        return Path(path).read_bytes()


def check_regular(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        FileError: it is a folder, a pipe, a device or the like.
        OSError: it cannot be looked at; see `explain_errors`.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise FileError(f"{path} is {_kind(path)}, not a regular file")
    return state.st_size


def read_text(path: Path, hint: str = "") -> str:
    """Read a UTF-8 text file; a byte order mark is skipped, line ends stay as they are.

    Raises:
        FileError: as for `read_bytes`, or the bytes are not UTF-8.
    """
    try:
        return read_bytes(path, hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(path, error.start) from None


def read_lines(path: Path, hint: str = "") -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a text file with their numbers, counted from 1.

    Only "\\n" ends a line: JSON strings may hold U+2028 and the like.
    """
    for number, line in enumerate(read_text(path, hint).split("\n"), start=1):
        if line.strip():
            yield number, line


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON document.

    Args:
        text: the document.
        where: names it in the message, for example a file, or a file and a line.

    Raises:
        FileError: not JSON (with line and column), nested too deeply, or a number of more digits than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise not_json(where, error, error.lineno, error.colno) from None
    except UnicodeDecodeError as error:
        raise not_text(where, error.start) from None
    except (RecursionError, ValueError) as error:
        raise not_readable(where, error) from None


def not_text(where: str | Path, byte: int) -> FileError:
    """Make the error of bytes that are not UTF-8, from the position of the first."""
    return FileError(f"{where} is not UTF-8 text (byte {byte}); save it as UTF-8")


def not_json(where: str | Path, error: json.JSONDecodeError, line: int, column: int) -> FileError:
    """Make the error of a mistake in JSON at a line and column, from 1."""
    place = f"line {line} column {column}" if line > 1 else f"column {column}"
    return FileError(f"{where} is not JSON: {_explain_syntax(error)} at {place}")


def not_readable(where: str | Path, error: RecursionError | ValueError) -> FileError:
    """Make the error of JSON that Python does not read."""
    if isinstance(error, RecursionError):
        return FileError(f"{where}: the JSON is nested too deeply")
    return FileError(f"{where} is not readable JSON: {error}")


def parse_natural(text: str) -> int | None:
    """Read a whole number from 0 on; None for other text, and for more digits (4,300) than Python reads."""
    try:
        return int(text) if text.isdecimal() else None
    except ValueError:
        return None


def _explain_syntax(error: json.JSONDecodeError) -> str:
    """Name the commonest mistake, a comma before a closing bracket, instead of what the parser missed after it."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]"):
        return f'a comma before the closing "{after[0]}"'
    if after[:1] == "," and after[1:].lstrip()[:1] in ("}", "]"):  # Python 3.13 points at the comma itself
        return f'a comma before the closing "{after[1:].lstrip()[0]}"'
    return error.msg


def read_json(path: Path, hint: str = "") -> Any:
    """Read a file that is one JSON document.

    Raises:
        FileError: as for `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, hint), str(path))


def read_jsonl(path: Path, hint: str = "") -> list[dict[str, Any]]:
    """Read a JSON Lines file in which every line is an object.

    Raises:
        FileError: as for `read_text`, the file has no lines, or a line is something else.
    """
    records = [parse_record(line, f"{path} line {number}") for number, line in read_lines(path, hint)]
    if not records:
        raise FileError(f"{path} is empty")
    return records


def parse_record(line: str | bytes, where: str) -> dict[str, Any]:
    """Parse one line of a JSON Lines file.

    Raises:
        FileError: it is not a JSON object.
    """
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise FileError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    return record


# ----------------------------------------------------------------------------------------------------------- writing
def find_target(path: Path) -> Path:
    """Return the file that writing to a path means: the path itself, or what it links to.

    Raises:
        FileError: it is a folder, a device or the like.
        OSError: it cannot be looked at; see `explain_errors`.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if target.is_symlink():
        raise FileError(f"cannot write {path}: its links lead in a circle; name a regular file")
    if target.exists() and not target.is_file():
        raise FileError(f"cannot write {path}: it is {_kind(target)}; name a regular file")
    return target


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the place of `path` when the block ends without an error.

    The file is on disk (synced) before it appears. Folders are made; a link stays a link, and what it points to is
    written. Use the functions below where they fit.

    Raises:
        FileError: the place is a folder or a device, or cannot be written.
    """
    with explain_errors("write", path):
        target = find_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(target)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which becomes `path` when the block ends without an error.

    What a killed process of this machine left of an earlier attempt is deleted first.

    Args:
        path: not there yet, or an empty folder.

    Raises:
        FileError: something is there, or the place cannot be written.
    """
    with explain_errors("write", path):
        if path.is_dir() and any(path.iterdir()):
            raise FileError(f"{path} holds files already: name another folder, or delete that one first")
        if path.exists() and not path.is_dir():
            raise FileError(f"{path} is not a folder: name another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        partial = partial_of(path)
        try:
            partial.mkdir()
            yield partial
            _publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """Name what this process writes before it becomes `path`: no other process, of no machine, has the same name."""
    return path.with_name(f"{_opening(path)}{os.getpid()}.partial")


def _opening(path: Path) -> str:
    start = os.fsencode(path.name)[:200].decode(errors="ignore")  # names have 255 bytes at most
    return f".{start}.{_MACHINE}-"


def remove_leftovers(path: Path) -> None:
    """Delete what processes of this machine that are gone have left unfinished of a file or folder."""
    opening = _opening(path)
    for partial in path.parent.glob(f"{glob.escape(opening)}*.partial"):
        process = partial.name.removeprefix(opening).removesuffix(".partial")
        if process.isdecimal() and (int(process) == os.getpid() or not is_alive(int(process))):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with suppress(OSError):
                    partial.unlink()


def _publish(partial: Path, path: Path) -> None:
    """Rename a folder that is complete.

    Raises:
        FileError: another process has written one there meanwhile.
    """
    try:
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileError(f"{path} was written by another process meanwhile, and is kept: name another folder") from None


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file and return its path.

    Raises:
        FileError: see `atomic_write`.
    """
    with atomic_write(path) as partial:
        partial.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file and return its path; line ends stay as they are.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its escape `\\ud83d`.
    """
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: Any, indent: int | None = 1) -> Path:
    """Write a JSON document, with a newline at its end, and return its path."""
    return write_text(path, json.dumps(data, indent=indent) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSON Lines file and return its path."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; after return it is on disk.

    Raises:
        FileError: see `atomic_write`.
    """
    with explain_errors("write", path):
        target = find_target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def make_folder(path: Path) -> Path:
    """Make a folder, if it is not there, and return its path.

    Raises:
        FileError: it cannot be made.
    """
    with explain_errors("write", path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def explain_errors(action: str, path: Path, hint: str = "") -> Iterator[None]:
    """Turn every error of the file system inside the block into a `FileError`.

    Args:
        action: "read" or "write".
        path: the file or folder that the message names.
        hint: ends the message if there is no such file.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileError(f"no such file: {path}" + (f"; {hint}" if hint else "")) from None
    except OSError as error:
        raise FileError(f"cannot {action} {path}: {error.strerror or error}") from error
    except MemoryError:
        raise FileError(f"cannot {action} {path}: it does not fit into memory") from None
    except UnicodeEncodeError:
        if _is_encodable(path):
            raise
        raise FileError(f"cannot {action} {str(path)!r}: the name is not valid Unicode") from None
    except ValueError as error:
        if isinstance(error, InputError) or "null" not in str(error):
            raise
        raise FileError(f"cannot {action} {str(path)!r}: the name holds a null byte") from None


def _is_encodable(path: Path) -> bool:
    """Whether a path can be the name of a file: half of a surrogate pair, which JSON can hold, cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    """Say what a path is that is not a regular file."""
    mode = os.stat(path).st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
