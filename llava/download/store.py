"""Bring data into a folder: what is missing is planned with its sizes, fetched, checked, unpacked, and noted.

`ROOT/.downloads` holds what is on its way and `manifest.json`: of each address the size and checksum of what came from
it first, and where it was unpacked. What comes from it later must have the same checksum.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.download.archive import DamagedArchiveError, find_mark, unpack
from llava.download.table import Download, format_size
from llava.download.transfer import (
    ChecksumError,
    Fetched,
    Notify,
    ask_size,
    fetch,
    hash_file,
    measure_space,
    name_partial,
    require_space,
)
from llava.errors import InputError
from llava.files import explain_errors, make_folder, read_json, write_json

WORK_FOLDER = ".downloads"
MANIFEST_FILE = "manifest.json"
LOCK_FILE = "lock"

MAX_LINES = 5
"""For single files of one folder."""

THERE, MISSING, BY_HAND = "there", "missing", "by hand"


@dataclass(frozen=True)
class DataSet:
    """Data of one name: its home folder, and all that is fetched for it."""

    name: str
    home: Path
    downloads: Sequence[Download]

    @property
    def items(self) -> list["Item"]:
        return [Item(self.home, download) for download in self.downloads]


@dataclass(frozen=True)
class Item:
    """One download of a data set; how it stands is looked up each time."""

    home: Path
    download: Download

    @property
    def state(self) -> str:
        if self.download.is_there(self.home) and not find_mark(self.download.archive_name, self.folder).is_file():
            return THERE
        return MISSING if self.download.address or self.saved_archive else BY_HAND

    @property
    def folder(self) -> Path:
        """Where the archive is unpacked; where a person saves it."""
        return Path(os.path.normpath(self.home / (self.download.unpack_in or "")))

    @property
    def saved_archive(self) -> Path | None:
        """The archive that a person has saved."""
        path = self.folder / (self.download.archive or "")
        return path if path.is_file() else None

    def with_size(self, work: Path) -> "Item":
        """Return it with its size, the one that has arrived or the server names, if that of an archive is unknown."""
        download = self.download
        is_asked = download.address and download.unpack_in is not None and download.size is None
        if not is_asked or self.state != MISSING or self.saved_archive:
            return self
        path = self.arrival(work)
        size = path.stat().st_size if path.is_file() else ask_size(download.address)
        return replace(self, download=replace(download, size=size))

    def arrival(self, work: Path) -> Path:
        """Return the file that arrives first: an archive in the folder `work`, a file in its place."""
        is_archive = self.download.unpack_in is not None
        return work / self.download.archive_name if is_archive else self.home / self.download.places[0].path

    def measure_arrived(self, work: Path) -> int:
        """Return how many bytes of it an earlier command has fetched."""
        path = self.arrival(work)
        return next((each.stat().st_size for each in (path, name_partial(path)) if each.is_file()), 0)

    def describe(self) -> str:
        """Say in one line what it is and how it stands."""
        download, state = self.download, self.state
        if state == BY_HAND:
            return f"{state}: {self.explain_by_hand()}"
        if state == MISSING and self.saved_archive:
            return f"{state}: {download}, to be unpacked from {self.saved_archive}"
        if state == MISSING:
            return f"{state}: {download}, {format_size(download.size)}, {download.address}"
        return f"{state}: {download}"

    def explain_by_hand(self) -> str:
        """Say what a person does to get it."""
        download = self.download
        if download.archive:
            then = f"save it as {self.folder / download.archive}, and give this command again"
        else:
            then = f"put it at {self.home / download.places[0].path}"
        return f"{download} needs {download.by_hand}: see {download.page} and {then}"


def bring(
    root: Path, data_sets: Sequence[DataSet], say: Notify, dry_run: bool = False, keep_archives: bool = False
) -> bool:
    """Say what is there and what is missing, fetch the latter, and say how it went.

    A download that fails does not keep the others from being tried.

    Args:
        root: the folder of all data sets, where the manifest is.
        data_sets: what should be there.
        say: prints a line.
        dry_run: only say what would be fetched.
        keep_archives: leave archives in `WORK_FOLDER` after unpacking.

    Returns:
        Whether everything is there in the end.

    Raises:
        InputError: too little space for all of it, or another process works in the folder.
    """
    # 1. The plan.
    missing = []
    for data_set in data_sets:
        say(f"{data_set.name}: {data_set.home}")
        items = [item.with_size(root / WORK_FOLDER) for item in data_set.items]
        for line in describe_items(items):
            say(f"  {line}")
        missing += [item for item in items if item.state == MISSING]
    plan = Plan.of(missing, root / WORK_FOLDER, keep_archives)
    say(f"to fetch: {plan}; {format_size(measure_space(root))} are free in {root}")
    # 2. The work.
    if missing and not dry_run:
        require_space(root, plan.peak, "all of it, with the largest archive beside what comes out of it,")
        with _locked(root):
            store = Store(root, say, keep_archives)
            for item in missing:
                try:
                    store.obtain(item)
                except InputError as fault:
                    say(f"failed: {item.download}: {fault}")
    # 3. The outcome.
    left = {each.name: sum(item.state != THERE for item in each.items) for each in data_sets}
    lacking = [f"{name} ({number} of its downloads)" for name, number in left.items() if number]
    say(f"still missing: {', '.join(lacking)}" if lacking else f"complete: {', '.join(left)}")
    return not lacking


def describe_items(items: Sequence[Item]) -> Iterator[str]:
    """Yield how downloads stand, a line for each; single files of one folder share a line."""
    for (state, folder), group in groupby(items, lambda item: (item.state, item.download.folder)):
        members = list(group)
        if folder and len(members) > MAX_LINES:
            yield f"{state}: {len(members)} files in {folder}, {members[0].download.page}"
        else:
            yield from (member.describe() for member in members)


@dataclass(frozen=True)
class Plan:
    """What is to be fetched, each address once.

    Attributes:
        num_files: downloads.
        size: in bytes, of those whose size is known.
        peak: bytes on the disk at most, of the same, without what has arrived already: while an archive is unpacked, it
            is there twice.
        num_unknown: downloads of unknown size.
    """

    num_files: int
    size: int
    peak: int
    num_unknown: int

    @classmethod
    def of(cls, items: Sequence[Item], work: Path, keep_archives: bool) -> "Plan":
        """Sum up what is missing; `work` is the folder that archives arrive in."""
        by_address = {item.download.address: item for item in items if not item.saved_archive}
        downloads = [item.download for item in by_address.values()]
        arrived = sum(item.measure_arrived(work) for item in by_address.values() if item.download.size)
        archives = [each.size or 0 for each in downloads if each.unpack_in is not None]
        size = sum(each.size or 0 for each in downloads)
        twice = sum(archives) if keep_archives else max(archives, default=0)
        return cls(len(downloads), size, size + twice - arrived, sum(each.size is None for each in downloads))

    def __str__(self) -> str:
        unknown = f", and {self.num_unknown} of unknown size" if self.num_unknown else ""
        return f"{self.num_files} downloads, {format_size(self.size)}{unknown}"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep two commands from fetching into the same folder; the kernel ends the lock with the process."""
    path = make_folder(root / WORK_FOLDER) / LOCK_FILE
    lock = FileLock(path)
    with explain_errors("write", path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another command fetches data into {root}: wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


class Store:
    """The folder that data come into, and its manifest."""

    def __init__(self, root: Path, say: Notify, keep_archives: bool = False):
        """Read the manifest, if there is one.

        Args:
            root: see `bring`.
            say: prints a line.
            keep_archives: leave archives in `WORK_FOLDER` after unpacking.
        """
        self._work = root / WORK_FOLDER
        self._say = say
        self._keep_archives = keep_archives
        self.manifest: dict[str, dict[str, Any]] = {}
        if self._manifest_file.is_file():
            self.manifest = read_json(self._manifest_file)
            if not isinstance(self.manifest, dict):
                raise InputError(f"{self._manifest_file} is no manifest: delete it")

    @property
    def _manifest_file(self) -> Path:
        return self._work / MANIFEST_FILE

    def obtain(self, item: Item) -> None:
        """Make sure that what a download brings is there.

        Raises:
            InputError: it is not; says why.
        """
        if item.state == THERE or self._link(item):  # another one has brought it
            return
        download, saved = item.download, item.saved_archive
        if saved:
            self._note(saved.name, Fetched(saved.stat().st_size, hash_file(saved)))
            self._unpack(saved, item, saved.name)
        elif download.unpack_in is None:
            self._fetch(download.address, item.arrival(self._work))
        else:
            archive = item.arrival(self._work)
            if not archive.is_file():
                self._fetch(download.address, archive)
            elif download.address not in self.manifest:  # it had just arrived when the command was killed
                self._note(download.address, Fetched(archive.stat().st_size, hash_file(archive)))
            try:
                self._unpack(archive, item, download.address)
            except DamagedArchiveError as fault:
                archive.unlink()
                raise InputError(f"{fault}; it is deleted, and the same command fetches it anew") from None
            if not self._keep_archives:
                archive.unlink()
        absent = [place.path for place in download.places if not place.find(item.home)]
        if absent:
            raise InputError(f"it came without {', '.join(absent)}, or with less in it than published")

    def _fetch(self, address: str, path: Path) -> None:
        known = self.manifest.get(address, {}).get("sha256")
        try:
            fetched = fetch(address, path, self._say, known)
        except ChecksumError as fault:
            if fault.wanted != known:
                raise
            raise InputError(
                f"{fault}; the first time it was another file: if the new one is right, delete its entry in "
                f"{self._manifest_file}"
            ) from None
        self._note(address, fetched)
        self._say(f"fetched: {path.name}, {format_size(fetched.size)}, sha256 {fetched.sha256}")

    def _note(self, key: str, fetched: Fetched) -> None:
        entry = self.manifest.setdefault(key, {"unpacked_in": []})
        entry |= {
            "size": fetched.size,
            "sha256": fetched.sha256,
            "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self._manifest_file, self.manifest)

    def _unpack(self, archive: Path, item: Item, key: str) -> None:
        unpacked = unpack(archive, item.folder, item.download.only)
        folders = self.manifest[key]["unpacked_in"]
        if str(item.folder) not in folders:
            folders.append(str(item.folder))
        write_json(self._manifest_file, self.manifest)
        kept = unpacked.kept
        other = f"; {len(kept)} were there with another size and stay, such as {kept[0]}" if kept else ""
        self._say(f"unpacked: {unpacked.num_files:,} files in {item.folder}{other}")

    def _link(self, item: Item) -> bool:
        """Link to what the same archive has brought to another data set; returns whether that does it."""
        download = item.download
        for folder in map(Path, self.manifest.get(str(download.address), {}).get("unpacked_in", [])):
            paths = [
                (item.home / place.path, folder / os.path.relpath(item.home / place.path, item.folder))
                for place in download.places
            ]
            if all(place.is_at(there) for place, (_, there) in zip(download.places, paths, strict=True)):
                with suppress(OSError):  # a system without links, or something is there
                    for here, there in paths:
                        here.parent.mkdir(parents=True, exist_ok=True)
                        here.symlink_to(os.path.relpath(there, here.parent), target_is_directory=True)
                if item.state == THERE:
                    self._say(f"linked: {', '.join(str(here) for here, _ in paths)} to {folder}")
                    return True
        return False
