"""What a checkpoint, a vision tower or any other file is, by content: answers and training runs are compared by it.

Contents count; names, places, times and unrelated files do not. A local folder is the SHA-256 of the files that loading
reads, a hub id the commit that the hub's cache resolves it to.

Hashes are kept in the user's cache folder (`LLAVA_CACHE`, else `llava` under `XDG_CACHE_HOME` or `~/.cache`), so that
the second look at a file costs one `stat`. A kept hash counts while device, inode, size, modification and change time
are the same. Size and modification time can be forged; the change time is the kernel's own (on Windows there is none).
A file that changed less than `SETTLED_NS` before it was hashed is not kept: it could change again unnoticed within the
resolution of the clock.
"""

import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from llava.errors import InputError
from llava.files import FileError, read_json, write_json
from llava.model.config_rules import is_hf_layout
from llava.model.hf_layout import USUAL_TOWER
from llava.model.multimodal_encoder.builder import OPEN_CLIP_PREFIX
from llava.model.multimodal_encoder.loading import resolve_name
from llava.model.stored_weights import INDEX_FILES, find_file

CONFIG_FILE = "config.json"
SETTINGS_FILES = (
    *(CONFIG_FILE, "generation_config.json", "preprocessor_config.json", "adapter_config.json"),
    *("open_clip_config.json", "processor_config.json", *INDEX_FILES),
)
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja"),
)
WEIGHT_SUFFIXES = (".safetensors", ".bin")
TRAINING_FILES = ("training_args.bin", "optimizer.bin", "scheduler.bin")
"""What a trainer leaves beside the weights under the same suffix."""
PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
TOWER = "mm_vision_tower"
"""These settings say where something is; what is there counts by itself."""
OPEN_CLIP_PATH = re.compile(r"(local-dir:|,pretrained=).*?(?=,\w+=|$)")

DIGITS = 16
"""Hexadecimal digits of a fingerprint: 64 bits."""
BLOCK_BYTES = 2**20
MAX_THREADS = 8
PATIENCE_SECONDS = 5.0
"""Hashing that takes longer shows its progress."""
SETTLED_NS = 2 * 10**9

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, modification and change time in nanoseconds."""


# --------------------------------------------------------------------------------------------------------------- models
def identify_checkpoint(place: str) -> str | None:
    """Fingerprint a folder by the files that loading reads, a hub id by its commit; None for what cannot be read."""
    return _fingerprint_part(list_checkpoint(place))


def identify_tower(name: str, folder: str | Path | None = None) -> str | None:
    """Fingerprint a vision tower; None for what cannot be read.

    Args:
        name: as in `mm_vision_tower`: folder, hub id, or open_clip's.
        folder: of the checkpoint that names it, for relative names.
    """
    try:
        return _fingerprint_part(list_tower(name, folder))
    except (InputError, OSError):
        return None


def identify_tower_of(checkpoint: str) -> str | None:
    """Fingerprint the vision tower that a checkpoint's config.json names; None if none can be read.

    A llava-hf folder holds its vision half itself, and the CLIP that it names gives the text half at most.
    """
    folder = Path(checkpoint).expanduser()
    file = folder / CONFIG_FILE if folder.is_dir() else find_file(checkpoint, CONFIG_FILE)
    try:
        values = read_json(Path(file)) if file else {}
        if is_hf_layout(values):
            return identify_tower(values.get(TOWER, USUAL_TOWER), folder) or "in the checkpoint"
        name = values.get(TOWER)
    except (InputError, AttributeError):
        return None
    return identify_tower(name, folder) if isinstance(name, str) else None


def identify_parts(checkpoint: str, base: str | None = None) -> dict[str, str | None]:
    """Fingerprint a checkpoint, its base ("none" without one) and its vision tower; None for what cannot be read."""
    return {
        "checkpoint": identify_checkpoint(checkpoint),
        "base_checkpoint": identify_checkpoint(base) if base else "none",
        "vision_tower": identify_tower_of(checkpoint),
    }


def _fingerprint_part(part: Sequence[Path] | str | None) -> str | None:
    """Fingerprint listed files by their names and contents, None if one cannot be read; anything else is its own."""
    if part is None or isinstance(part, str):
        return part
    hashes = hash_files([file for file in part if file.suffix != ".json"], "checkpoint")
    hashes |= {file: hash_settings(file) for file in part if file.suffix == ".json"}
    entries = [(file.name, hashes[file]) for file in sorted(set(part))]
    return None if any(content is None for _, content in entries) else fingerprint(json.dumps(entries))


def list_checkpoint(place: str) -> list[Path] | str | None:
    """List the files of a folder that loading reads; of a hub id return the commit, None where there is neither."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return find_commit(place)
    names = {file.name for file in folder.iterdir()}
    wanted = names & {*SETTINGS_FILES, *TOKENIZER_FILES}
    wanted |= {name for name in names - {*TRAINING_FILES} if name.endswith(WEIGHT_SUFFIXES)}
    if {"model.safetensors", INDEX_FILES[0]} & names:  # these are loaded, and the same weights in the other format not
        wanted -= {name for name in names if name.startswith("pytorch_model")}
    return [folder / name for name in sorted(wanted)]


def find_commit(hub_id: str) -> str | None:
    """Return `owner/name@commit` of what loading takes from the hub, or offline from its cache."""
    file = find_file(hub_id, CONFIG_FILE)
    # .../models--owner--name/snapshots/<commit>/config.json
    return None if file is None else f"{hub_id}@{Path(file).parent.name}"


def list_tower(name: str, folder: str | Path | None) -> list[Path] | str | None:
    """List the files of a vision tower; of a hub id return the commit.

    Raises:
        InputError: it can only be a path, and there is nothing.
    """
    if name.startswith(OPEN_CLIP_PREFIX):
        return list_open_clip(name.removeprefix(OPEN_CLIP_PREFIX), folder)
    return list_checkpoint(resolve_name(name, folder))


def list_open_clip(spec: str, folder: str | Path | None) -> list[Path] | str | None:
    """List the files of an open_clip tower: its weights, and those of its folder where it has one."""
    # open_clip takes seconds to import, and few checkpoints need it.
    from llava.model.multimodal_encoder.open_clip_source import HUB_PREFIX, LOCAL_PREFIX, parse_source

    source = parse_source(spec, folder)
    if source.model.startswith(HUB_PREFIX):
        file = find_file(source.model.removeprefix(HUB_PREFIX), "open_clip_config.json")
        return None if file is None else f"{spec}@{Path(file).parent.name}"
    if source.model.startswith(LOCAL_PREFIX):
        return [source.weights, *list_checkpoint(source.model.removeprefix(LOCAL_PREFIX))]
    # A tag of open_clip names the same weights for ever.
    return [source.weights] if isinstance(source.weights, Path) else spec


def hash_settings(file: Path) -> str | None:
    """Hash a JSON file without the places that it names; None if it cannot be read."""
    try:
        settings = read_json(file)
    except InputError:
        return None
    if isinstance(settings, dict):
        settings = {name: value for name, value in settings.items() if name not in PLACES}
        tower = str(settings.pop(TOWER, ""))
        if tower.startswith(OPEN_CLIP_PREFIX):  # model and activation count
            settings[TOWER] = OPEN_CLIP_PATH.sub(r"\1", tower)
    return fingerprint(json.dumps(settings, sort_keys=True))


def fingerprint(text: str) -> str:
    """Shorten a text to `DIGITS` hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


# --------------------------------------------------------------------------------------------------------------- hashes
def hash_files(files: Iterable[Path], what: str) -> dict[Path, str | None]:
    """Return the SHA-256 of each file; None of one that is not there, not regular, or not readable.

    Args:
        files: hashed by threads, each unless its hash is kept.
        what: they are, for the progress bar.
    """
    hashes: dict[Path, str | None] = {}
    stamps: dict[Path, Stamp] = {}
    kept = HashCache()
    start = time.time_ns()
    for file in files:
        stamp = stamp_file(file)
        hashes[file] = kept.find(file, stamp) if stamp else None
        if stamp and hashes[file] is None:
            stamps[file] = stamp
    stopped = threading.Event()
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="hash")
    total = sum(stamp[2] for stamp in stamps.values())
    bar = tqdm(total=total, desc=f"hashing {what}", unit="B", unit_scale=True, delay=PATIENCE_SECONDS, leave=False)
    try:
        futures = {pool.submit(hash_file, file, bar, stopped): file for file in stamps}
        for future in as_completed(futures):
            file = futures[future]
            hashes[file] = future.result()
            if hashes[file] is not None and stamp_file(file) == stamps[file] and is_settled(stamps[file], start):
                kept.keep(file, stamps[file], hashes[file])
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    kept.save()
    return hashes


def stamp_file(file: Path) -> Stamp | None:
    """Return what changes with a file's content; None where there is no regular file."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def is_settled(stamp: Stamp, now: int) -> bool:
    """Whether a file last changed so long before `now` that a further change has another time."""
    return now - max(stamp[3:]) > SETTLED_NS


def hash_file(file: Path, bar: tqdm, stopped: threading.Event) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read, or if hashing was stopped."""
    state = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(BLOCK_BYTES):
                if stopped.is_set():
                    return None
                state.update(block)
                bar.update(len(block))
    except OSError:
        return None
    return state.hexdigest()


def find_cache_folder() -> Path:
    """Return the folder of what can be made again; it need not exist."""
    named = os.environ.get("LLAVA_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llava").expanduser()


class HashCache:
    """Hashes of files as they were when last looked at: a JSON file per folder, of the stamp and hash by name.

    It only saves time: a cache that cannot be read or written is none, and of two writers the last one wins.
    """

    def __init__(self) -> None:
        """Read nothing yet; each folder's file is read when it is asked for."""
        self._folders: dict[Path, dict[str, list[int | str]]] = {}
        self._changed: set[Path] = set()

    def find(self, file: Path, stamp: Stamp) -> str | None:
        """Return the hash of a file that is unchanged, or None."""
        *known, content = self._read(file.parent).get(file.name) or [None]
        return content if tuple(known) == stamp and isinstance(content, str) else None

    def keep(self, file: Path, stamp: Stamp, content: str) -> None:
        """Note a hash."""
        self._read(file.parent)[file.name] = [*stamp, content]
        self._changed.add(file.parent)

    def save(self) -> None:
        """Write what is new, where it can be written."""
        for folder in self._changed:
            with suppress(FileError):
                write_json(self._place(folder), self._folders[folder], indent=None)
        self._changed.clear()

    def _read(self, folder: Path) -> dict[str, list[int | str]]:
        if folder not in self._folders:
            try:
                data = read_json(self._place(folder))
            except InputError:
                data = {}
            entries = data.items() if isinstance(data, dict) else ()
            self._folders[folder] = {name: entry for name, entry in entries if isinstance(entry, list)}
        return self._folders[folder]

    @staticmethod
    def _place(folder: Path) -> Path:
        return find_cache_folder() / "hashes" / f"{fingerprint(os.path.realpath(folder))}.json"
