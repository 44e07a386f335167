"""Unpack a zip or tar archive of somebody else's: nothing leaves the folder, and nothing in it is replaced.

Everything is unpacked in a folder of its own first and moved to its place only when all of it is there, so that an
interrupted unpacking leaves no half file behind; the next one starts over. While files are moved, a mark tells that
more are to come.
"""

import errno
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from tqdm import tqdm

from llava.download.transfer import require_space
from llava.errors import InputError
from llava.files import explain_errors, partial_of, remove_leftovers

MAX_RATIO = 200
"""Bytes that come out of an archive, for each of its own; annotations as JSON have up to 30."""
COPY_BYTES = 2**20
LEFT_OUT = ("__MACOSX", ".DS_Store")
"""What macOS adds to archives."""


class DamagedArchiveError(InputError):
    """An archive that cannot be read to its end."""


@dataclass(frozen=True)
class Unpacked:
    """What unpacking an archive has come to.

    Attributes:
        num_files: in the archive.
        kept: files that were there already with another size; they stay as they are.
    """

    num_files: int
    kept: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Member:
    """A file of an archive: its name there, its size in bytes as announced, and how it is opened."""

    name: str
    size: int
    open: Callable[[], BinaryIO]


def unpack(archive: Path, folder: Path, only: Sequence[str] = ()) -> Unpacked:
    """Unpack an archive; files that are in the folder already stay.

    Args:
        archive: zip, or tar with any compression of the standard library.
        folder: it is made if it is not there.
        only: patterns of the names of the files that are wanted, such as `*.json`; none: all.

    Raises:
        InputError: no archive, damaged (`DamagedArchiveError`), encrypted, too little space, more than `MAX_RATIO`
            times its size; a name that leads out of the folder, a link or a device in it. Then nothing has changed.
    """
    # Beside the place of the files, so that moving them there only renames them.
    staging = folder / f".{archive.name}.unpacking"
    with explain_errors("write", staging):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        num_files = _write_members(archive, staging, only)
        mark = find_mark(archive.name, folder)
        kept: list[Path] = []
        with explain_errors("write", folder):
            mark.touch()
            if hasattr(os, "sync"):
                os.sync()  # a power cut must not leave empty files under the names of whole ones
            _move_content(staging, folder, kept)
            mark.unlink()
        return Unpacked(num_files, kept)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find_mark(name: str, folder: Path) -> Path:
    """Return the file that is there while the files of an archive are moved to their folder."""
    return folder / f".{name}.incomplete"


def _write_members(archive: Path, staging: Path, only: Sequence[str]) -> int:
    limit = archive.stat().st_size * MAX_RATIO
    total = num_files = 0
    with _opened(archive, only) as (members, announced):
        if announced is not None:
            _refuse_bomb(archive, announced, limit)
            require_space(staging, announced, f"unpacking {archive.name}")
        with tqdm(total=announced, unit="B", unit_scale=True, desc=f"unpack {archive.name}", disable=None) as progress:
            for member in members:
                path = safe_path(member.name, archive.name)
                num_files, total = num_files + 1, total + member.size
                _refuse_bomb(archive, total, limit)
                with _explain_damage(archive):
                    _write_member(member, staging / path, progress)
    if not num_files:
        raise InputError(f"{archive}: no {' or '.join(only) or 'file'} in this archive")
    return num_files


def _refuse_bomb(archive: Path, size: int, limit: int) -> None:
    if size > limit:
        raise InputError(
            f"{archive}: more than {MAX_RATIO} times its size would come out of it; it is not what it should be"
        )


def _write_member(member: _Member, path: Path, progress: tqdm) -> None:
    with explain_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        left = member.size
        with path.open("wb") as file, member.open() as stream:
            while chunk := _read(stream, COPY_BYTES):  # the libraries give no more than announced
                left -= len(chunk)
                file.write(chunk)
                progress.update(len(chunk))
    if left:
        raise EOFError(f"{member.name} is longer or shorter than announced")


def _read(stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:  # of the archive, not of the file that is written
        raise EOFError(error.strerror or str(error)) from error


def safe_path(name: str, archive: str) -> PurePosixPath:
    """Return a member's name as a path below the folder.

    Raises:
        InputError: it leads out of the folder, on this or another system.
    """
    path = PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    if not path.parts or leads_out or "\\" in name or "\0" in name:
        raise InputError(f"{archive} holds {name!r}, which leads out of the folder; it is not unpacked")
    return path


# ---------------------------------------------------------------------------------------------------------- archives
@contextmanager
def _opened(archive: Path, only: Sequence[str]) -> Iterator[tuple[Iterator[_Member], int | None]]:
    """Open an archive of either kind: the files wanted, and how many bytes they have, where it is known beforehand."""
    with explain_errors("read", archive), archive.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with _explain_damage(archive):
            source = zipfile.ZipFile(archive)
        with source:
            wanted = [info for info in source.infolist() if _is_wanted(info.filename, only)]
            yield _list_zip(source, wanted, archive), sum(info.file_size for info in wanted)
        return
    try:
        tar = tarfile.open(archive)  # noqa: SIM115
    except (tarfile.TarError, EOFError, OSError):
        raise DamagedArchiveError(f"{archive} is not a zip or tar archive, or not all of one") from None
    with tar:
        yield _list_tar(tar, only, archive), None


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    is_asked_for = not only or any(path.match(pattern) for pattern in only)
    return is_asked_for and not any(part in LEFT_OUT for part in path.parts)


def _list_zip(source: zipfile.ZipFile, wanted: Sequence[zipfile.ZipInfo], archive: Path) -> Iterator[_Member]:
    for info in wanted:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir():
            continue
        if kind not in (0, stat.S_IFREG):
            raise InputError(f"{archive} holds {info.filename!r}, a link or a device; it is not unpacked")
        if info.flag_bits & 1:
            raise InputError(f"{archive} is encrypted: unpack it yourself, with its password")
        yield _Member(info.filename, info.file_size, lambda info=info: source.open(info))


def _list_tar(source: tarfile.TarFile, only: Sequence[str], archive: Path) -> Iterator[_Member]:
    with _explain_damage(archive):
        for info in source:
            if info.isdir() or not _is_wanted(info.name, only):
                continue
            if not info.isreg():
                raise InputError(f"{archive} holds {info.name!r}, a link or a device; it is not unpacked")
            yield _Member(info.name, info.size, lambda info=info: source.extractfile(info))


@contextmanager
def _explain_damage(archive: Path) -> Iterator[None]:
    """Raise one line for everything that damaged data can be to the libraries that decompress them."""
    try:
        yield
    except InputError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise DamagedArchiveError(f"{archive} is damaged ({error})") from None
    except Exception as error:
        # zlib.error, lzma.LZMAError and others have no common class.
        if type(error).__module__ in ("zlib", "_lzma", "lzma", "_bz2"):
            raise DamagedArchiveError(f"{archive} is damaged ({error})") from None
        raise


# ------------------------------------------------------------------------------------------------------------ moving
def _move_content(source: Path, target: Path, kept: list[Path]) -> None:
    """Move what is in a folder into another one; what is there already stays, but for empty files and broken links.

    Args:
        source, target: the folders.
        kept: gets what stays although it has another size.
    """
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if place.is_symlink() and not place.exists():
            place.unlink()
        if entry.is_dir() and place.is_dir():
            _move_content(entry, place, kept)
        elif not os.path.lexists(place) or (place.is_file() and not place.stat().st_size):
            _move(entry, place)
        elif not (entry.is_file() and place.is_file() and entry.stat().st_size == place.stat().st_size):
            kept.append(place)


def _move(source: Path, target: Path) -> None:
    """Rename a file or folder; to another disk, where a folder is a link to one, copy it."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        remove_leftovers(target)
        partial = partial_of(target)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, partial)
        partial.replace(target)
