"""Training records: LLaVA's conversations, checked and brought into one form.

All that can be checked before a model is loaded is checked here; messages name the record's index and id. Tokens,
tensors and templates come later, in `llava.train.targets` and `llava.train.dataset`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.train.sources import find_sources
from llava.train.store import SHOWN_FAULTS, Faults, Record, Records, find_data_cache, open_store
from llava.train.stored_images import StoredImage

logger = logging.getLogger(__name__)

USER, ASSISTANT = "human", "gpt"
AS_WRITTEN = "as_written"
"""Value of a record's `image_places`: placeholders stay where the record has them."""


def read_records(path: str | Path, skip_broken: bool = False, cache: str | Path | None = None) -> Records:
    """Open a training set; what is not in a store yet is read and checked, and put into one.

    Args:
        path: a file, folder, mixture or hub name, see `sources.find_sources`.
        skip_broken: leave broken records out and log them, instead of refusing the file.
        cache: folder of stores; None: `training_data` in the user's cache folder.

    Returns:
        All records, those of a mixture once each (`Records.repeated` applies its weights).

    Raises:
        InputError: no such file, not readable, no record, or (unless `skip_broken`) a broken record.
    """
    sources = find_sources(path)
    labels = [f"{Path(source.name).name} " if len(sources) > 1 else "" for source in sources]
    folder = find_data_cache(cache)
    stores = [open_store(source, folder, parse_record, label) for source, label in zip(sources, labels, strict=True)]
    faults = Faults()
    for store in stores:
        faults.count += store.faults.count
        faults.shown += [f"{store.label}{fault}" for fault in store.faults.shown]
    report_faults(faults, f"{path}", skip_broken)
    for source, store in zip(sources, stores, strict=True):
        if not len(store):
            raise InputError(f"{source.name}: no training record in this file")
    return Records(stores)


def parse_record(raw: object, number: int) -> Record:
    """Make a `Record` of one JSON object.

    Args:
        raw: `{"id": ..., "image": name or [names], "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}`,
            or the error that reading it gave. With `"image_places": "as_written"` placeholders stay where they are.
        number: its index in the file, from 0.

    Raises:
        InputError: the record cannot be trained on.
    """
    if isinstance(raw, InputError):
        raise InputError(f"record {number}: {raw}")
    if not isinstance(raw, dict):
        raise InputError(f"record {number}: expected a JSON object, found {type(raw).__name__}")
    name = f"record {number} (id {repr(raw.get('id'))[:80]})"
    images = _list_images(raw.get("image"), name)
    turns = _list_turns(raw.get("conversations"), name)
    places = raw.get("image_places")
    if places not in (None, AS_WRITTEN):
        raise InputError(f"{name}: image_places {repr(places)[:80]}: expected {AS_WRITTEN!r}, or no such entry")
    return Record(name, images, place_placeholders(turns, len(images), name, as_written=places == AS_WRITTEN))


def place_placeholders(
    turns: Sequence[str], num_images: int, name: str, *, as_written: bool = False
) -> tuple[str, ...]:
    """Put image placeholders where LLaVA's preprocessing puts them.

    A single placeholder of a turn moves to its front, on a line of its own. Several placeholders of a turn stay where
    they are if every one has its image; if only the number of turns with placeholders fits, those of a turn count as
    one (parity: the released code always counts them as one).

    Args:
        turns: texts of a record.
        num_images: of the record.
        name: of the record, for messages.
        as_written: change no turn, not even its spaces; there must be one placeholder for each image.

    Raises:
        InputError: the placeholders fit the images in neither reading.
    """
    counts = [turn.count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    merged = sum(counts) != num_images
    if merged and (as_written or sum(count > 0 for count in counts) != num_images):
        raise InputError(f"{name}: {sum(counts)} {DEFAULT_IMAGE_TOKEN} placeholders for {num_images} images")
    if as_written:
        return tuple(turns)
    return tuple(
        _placeholder_first(turn) if count == 1 or (merged and count) else turn.strip() if count else turn
        for turn, count in zip(turns, counts, strict=True)
    )


def check_image_files(records: Sequence[Record], folder: str | Path | None, skip_broken: bool = False) -> Records:
    """Check that every record's image files exist; each name is looked for once.

    Args:
        records: from `read_records`.
        folder: the image folder; None if names are paths.
        skip_broken: leave out the records whose file is missing and log them.

    Returns:
        The records whose images exist.

    Raises:
        InputError: a file is missing (unless `skip_broken`).
    """
    records = Records.of(records)
    is_broken = records.find_named(lambda name: not _exists(name, folder))
    usable = leave_out(
        records, is_broken, lambda place: _explain_missing(records[place], folder), "images", skip_broken
    )
    if not usable:
        raise InputError(f"no training record has its images in {folder}")
    return usable


def leave_out(
    records: Records, is_broken: np.ndarray, explain: Callable[[int], str], subject: str, skip: bool
) -> Records:
    """Refuse broken records, or log that they are left out; the first few are named.

    Args:
        records: among which they are.
        is_broken: bool[S].
        explain: says what is wrong with the record at a position.
        subject: what is wrong with them.
        skip: leave them out.

    Raises:
        InputError: there are some, and they are not to be skipped.
    """
    (positions,) = np.nonzero(is_broken)
    report_faults(Faults(len(positions), list(map(explain, positions[:SHOWN_FAULTS].tolist()))), subject, skip)
    return records.keep(~is_broken)


def locate_image(name: str | StoredImage, folder: str | Path | None) -> str | StoredImage:
    """Return the path of an image that a record names; URLs and images inside the data stay as they are."""
    if isinstance(name, StoredImage) or "://" in name or folder is None:
        return name
    return str(Path(folder) / name)


def _exists(name: str | StoredImage, folder: str | Path | None) -> bool:
    return isinstance(name, StoredImage) or "://" in name or os.path.isfile(os.path.join(folder or "", name))


def _explain_missing(record: Record, folder: str | Path | None) -> str:
    missing = next(image for image in record.images if not _exists(image, folder))
    return f"{record.name}: no image file {locate_image(missing, folder)}"


def _placeholder_first(turn: str) -> str:
    return f"{DEFAULT_IMAGE_TOKEN}\n{turn.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()


def _list_images(value: object, name: str) -> tuple[str | StoredImage, ...]:
    images = [] if value is None else value if isinstance(value, list) else [value]
    for image in images:
        if not isinstance(image, str | StoredImage) or not image:
            raise InputError(f"{name}: 'image' must be a file name or a list of file names, found {repr(image)[:80]}")
        if isinstance(image, str) and not _is_text(image):
            raise InputError(f"{name}: the name of its image holds half of a surrogate pair, which is no character")
    return tuple(images)


def _is_text(text: str) -> bool:
    """Whether a string can be encoded; JSON may hold `\\ud83d` without its other half."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _list_turns(value: object, name: str) -> list[str]:
    """List the turns' texts; a leading assistant turn is dropped, as in LLaVA's preprocessing."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{name}: 'conversations' must be a list of {{'from', 'value'}} objects")
    if value and value[0].get("from") == ASSISTANT:
        value = value[1:]
    for position, turn in enumerate(value):
        expected = (USER, ASSISTANT)[position % 2]
        if turn.get("from") != expected:
            raise InputError(f"{name}: turn {position} is from {repr(turn.get('from'))[:80]}, expected {expected!r}")
        if not isinstance(turn.get("value"), str):
            raise InputError(f"{name}: turn {position} has no text in 'value'")
        if not _is_text(turn["value"]):
            raise InputError(f"{name}: turn {position} holds half of a surrogate pair, which is no character")
        if expected == USER and not turn["value"].strip():
            raise InputError(f"{name}: turn {position}, the user's, is empty")
    if len(value) < len((USER, ASSISTANT)):
        raise InputError(f"{name}: a conversation needs a user's turn and an answer")
    return [turn["value"] for turn in value]


def report_faults(faults: Faults, subject: str, skip: bool) -> None:
    """Refuse broken records, or log that they are left out; the first few are named.

    Raises:
        InputError: there are faults, and they are not to be skipped.
    """
    if not faults.count:
        return
    shown = "; ".join(faults.shown[:SHOWN_FAULTS]) + ("; ..." if faults.count > SHOWN_FAULTS else "")
    if not skip:
        raise InputError(
            f"{subject}: {faults.count} broken records: {shown} (--skip_broken_records True trains without them)"
        )
    logger.warning("%s: left out %d broken records: %s", subject, faults.count, shown)
