"""What is there of a set of files: each folder is listed once, so that 200,000 images take seconds."""

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from llava.errors import InputError
from llava.files import explain_errors, parse_json, read_text
from llava.image import EmbeddedImage, load_image

Image = TypeVar("Image", Path, EmbeddedImage, Path | EmbeddedImage)

SEED = 20240916
DELETE = "; delete it, then"
"""Between what is wrong with a file and the command that fetches it: files that are there are not replaced."""


def has_files(folder: Path, number: int) -> bool:
    """Whether a folder holds at least a number of files, in all levels; hidden ones do not count."""
    return any(count >= number for count, _ in enumerate(_walk(folder), start=1))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder; of one that is not there, or cannot be listed, none."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        else:
            yield entry.path


def find_missing(files: Iterable[Path]) -> list[Path]:
    """Return those of some files that are not there, each once, in their order.

    Raises:
        FileError: a folder cannot be listed.
    """
    listed: dict[str, set[str]] = {}
    missing = {}
    for file in files:
        folder, name = os.path.split(file)
        if folder not in listed:
            listed[folder] = _list_names(Path(folder))
        if name not in listed[folder]:
            missing[file] = None
    return list(missing)


def _list_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    with explain_errors("read", folder):
        return set(os.listdir(folder))


def find_unreadable(images: Sequence[Image], number: int) -> dict[Image, str]:
    """Decode some images of many, drawn with a fixed seed; returns what is wrong with those that cannot be decoded."""
    drawn = images if len(images) <= number else random.Random(SEED).sample(list(images), number)
    faults = {}
    for image in drawn:
        try:
            load_image(image)
        except InputError as fault:
            faults[image] = str(fault)
    return faults


def count_records(path: Path) -> int:
    """Count what a JSON or JSON Lines file lists.

    Returns:
        The lines of JSON Lines, the length of a JSON list; of an object the length of its longest list, or, where it
        has no list, its number of keys.

    Raises:
        FileError: not there, or not JSON.
    """
    text = read_text(path).strip()
    lines = text.split("\n")
    if path.suffix == ".jsonl" or (len(lines) > 1 and _is_json(lines[0])):
        for number, line in enumerate(lines, start=1):
            parse_json(line, f"{path} line {number}")
        return len(lines)
    document = parse_json(text, str(path))
    if isinstance(document, dict):
        lists = [len(value) for value in document.values() if isinstance(value, list)]
        return max(lists, default=len(document))
    return len(document) if isinstance(document, list) else 1


def _is_json(line: str) -> bool:
    """Whether a line is a document of its own, as the first line of a list with a record per line is not."""
    try:
        parse_json(line, "")
    except InputError:
        return False
    return True
