"""Fingerprints of what a run starts from and trains on: by content, never by time stamps or the spelling of a path.

Weight files are sampled: every tensor gives its header and blocks of its bytes, so that another training result
never has the same fingerprint, and 7B take a second instead of a minute.
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from llava.files import explain_errors, parse_record
from llava.model.multimodal_encoder.builder import OPEN_CLIP_PREFIX
from llava.model.multimodal_encoder.loading import resolve_name
from llava.train.records import Record

BLOCK_BYTES = 2**14  # sampled at the start, the middle and the end of each tensor
STRIDE_BYTES = 2**22  # between samples of a file whose tensors are not listed at its front
CONTENT_SUFFIXES = (".safetensors", ".bin", ".pt", ".model", ".json", ".txt")
BY_PRODUCTS = ("run.json", "trainer_state.json", "training_args.bin", "results.json")


def hash_records(records: Iterable[Record]) -> str:
    """Return the fingerprint of training records: their texts and image names, in order."""
    digest = hashlib.sha256()
    for record in records:
        line = "\0".join([*record.turns, "", *map(str, record.images)])
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def hash_source(name: str, folder: str | None = None) -> str:
    """Return the fingerprint of a checkpoint, a tower or a file.

    Args:
        name: folder or file; anything else (a hub id, an open_clip name) is its own fingerprint.
        folder: of the checkpoint that names it, for relative names.

    Raises:
        InputError: it can only be a path, and there is nothing.
    """
    path = Path(name if name.startswith(OPEN_CLIP_PREFIX) else resolve_name(name, folder))
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        return name
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in CONTENT_SUFFIXES and file.name not in BY_PRODUCTS and file.is_file():
            digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the fingerprint of one file; of large ones samples are read.

    Raises:
        FileError: it cannot be read.
    """
    with explain_errors("read", path), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for start, end in _list_samples(file, size, path):
            file.seek(start)
            digest.update(file.read(end - start))
    return digest.hexdigest()


def _list_samples(file: BinaryIO, size: int, path: Path) -> list[tuple[int, int]]:
    """List the byte ranges that are read: all of a small file, else blocks of each tensor or at a fixed stride."""
    if size <= STRIDE_BYTES:
        return [(0, size)]
    if path.suffix != ".safetensors":
        return [(start, start + BLOCK_BYTES) for start in (*range(0, size, STRIDE_BYTES), size - BLOCK_BYTES)]
    (length,) = struct.unpack("<Q", file.read(8))
    front = 8 + length
    header = parse_record(file.read(length), f"{path}: header")
    samples = [(0, front)]
    for tensor in header.values():
        if "data_offsets" in tensor:
            start, end = (front + offset for offset in tensor["data_offsets"])
            places = {start, (start + end) // 2, max(start, end - BLOCK_BYTES)}
            samples += [(place, min(place + BLOCK_BYTES, end)) for place in sorted(places)]
    return samples
