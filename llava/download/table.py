"""The two records that tables of data are made of: a place in a folder, and the download that fills places.

Tables are kept beside what reads the files: a benchmark's in its file, those of training in `llava.train.download`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llava.download.inventory import has_files


@dataclass(frozen=True)
class Place:
    """A file or a folder that data are made of.

    Attributes:
        path: relative to the home folder of the data; a folder's ends with a slash.
        count: files in the published folder, in all levels, or records in the published file; None: not known.
        also: further paths at which the readers find it.
    """

    path: str
    count: int | None = None
    also: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")

    def find(self, home: Path) -> Path | None:
        """Return where it is; None for no file, an empty one, or a folder with fewer files than `count`."""
        return next((path for each in (self.path, *self.also) if self.is_at(path := home / each)), None)

    def is_at(self, path: Path) -> bool:
        """Whether a path holds what belongs here."""
        return has_files(path, self.count or 1) if self.is_folder else path.is_file() and path.stat().st_size > 0


@dataclass(frozen=True)
class Download:
    """What is fetched in one piece, a file or an archive.

    Attributes:
        places: what is there afterwards.
        page: where its publisher describes it.
        address: http(s) address; None: only a person can fetch it, see `by_hand`.
        unpack_in: the folder, relative to the home folder, that the archive is unpacked in; None for no archive.
        only: name patterns of the files that are unpacked; empty: all.
        by_hand: what a person needs for it, in words that follow "it needs".
        archive: the name under which a person saves an archive, in the folder `unpack_in`.
        size: in bytes, for the plan; as its publisher or others report it. None: not known. What counts later is what
            the server says.
        splits: of the benchmark that need it; empty: all.
    """

    places: tuple[Place, ...]
    page: str
    address: str | None = None
    unpack_in: str | None = None
    only: tuple[str, ...] = ()
    by_hand: str = ""
    archive: str | None = None
    size: int | None = None
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        paths = ", ".join(place.path for place in self.places)
        return f"{self.archive} ({paths})" if self.archive else paths

    @property
    def archive_name(self) -> str:
        """The archive's file name, another one for each address; empty for a file."""
        if self.unpack_in is None or not self.address:
            return self.archive or ""
        return f"{hashlib.sha256(self.address.encode()).hexdigest()[:8]}-{self.address.rpartition('/')[2]}"

    @property
    def folder(self) -> str:
        """The folder of a single file, relative to the home folder; empty for an archive."""
        return "" if self.unpack_in is not None else self.places[0].path.rpartition("/")[0]

    def is_there(self, home: Path) -> bool:
        return all(place.find(home) for place in self.places)


def format_size(size: int | None) -> str:
    """Write a number of bytes as pages of data do, in powers of 1000; None: unknown."""
    if size is None:
        return "size unknown"
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} bytes"
