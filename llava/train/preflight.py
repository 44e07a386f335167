"""What a training set teaches, found out before any weight is loaded: broken images, cut and empty answers, lengths.

Image headers and token counts of large sets are sampled, with a fixed seed, so that 665,000 records take seconds; while
it trains, the trainer counts every sample.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.files import read_json, write_json
from llava.image import EmbeddedImage
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.identity import DIGITS, is_settled, stamp_file
from llava.model.multimodal_encoder.builder import OPEN_CLIP_PREFIX, build_named_tower
from llava.model.token_reduction import CONFIG_KEY, read_training_reduction
from llava.train.dataset import TextFormat
from llava.train.flags import DataArguments, ModelArguments
from llava.train.records import locate_image, report_faults
from llava.train.store import ROWS_PER_BATCH, SHOWN_FAULTS, Faults, Record, Records
from llava.train.stored_images import StoredImage
from llava.train.targets import build_targets, render

SAMPLED_RECORDS = 2_000
SAMPLED_IMAGES = 20_000
NOTED_IMAGES = 1_000  # below, looking at them again costs less than a note
SEED = 20240916
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ImageTokens:
    """How many positions an image takes in the sequence.

    Attributes:
        per_view: of one view; the least possible where the reduction decides by the image.
        is_exact: whether every image takes as many.
        canvases: of "anyres", else None: an image is one view.
        side: of a view, in pixels.
        is_most: whether `per_view` is the largest number of those that training draws.
    """

    per_view: int
    is_exact: bool
    canvases: str | list | None = None
    side: int = 0
    is_most: bool = False

    def count(self, size: tuple[int, int] | None) -> int:
        """Count for an image of (width, height); None: not known, one view."""
        if self.canvases is None or size is None:
            return self.per_view
        columns, rows = get_anyres_image_grid_shape(size, self.canvases, self.side)
        return self.per_view * (columns * rows + 1)


@dataclass
class Findings:
    """What was found.

    Attributes:
        num_records: in the training set.
        num_sampled: of these, records whose tokens were counted.
        num_images: in all records.
        num_learnable: sampled records with a token to learn.
        lengths: of the sampled records, in positions.
        nothing: names of records without a token to learn.
        cut: names of records with an answer that is cut by `--model_max_length`, and something left to learn.
        empty: names of records with an empty answer.
        examples: decoded labels of a few records.
    """

    num_records: int
    num_images: int
    num_sampled: int = 0
    lengths: list[int] = field(default_factory=list)
    nothing: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def num_learnable(self) -> int:
        return self.num_sampled - len(self.nothing)

    def describe(self, limit: int, tokens: ImageTokens | None) -> str:
        """Describe it for people, in a few lines."""
        ordered = sorted(self.lengths)
        quantiles = ", ".join(f"{share:.0%} {ordered[round(share * (len(ordered) - 1))]}" for share in QUANTILES)
        sampled = f"{self.num_sampled} of {self.num_records}" if self.num_sampled < self.num_records else "all"
        remark = "" if tokens is None or tokens.is_exact else ", at least (the reduction decides by the image)"
        if tokens is not None and tokens.is_most:
            remark = ", at the largest budget that is drawn"
        lines = [
            f"preflight: {self.num_records} records, {self.num_images} images; tokens counted in {sampled}",
            f"  positions of --model_max_length {limit}: {quantiles}{remark}",
            f"  no token to learn: {name_records(self.nothing)}",
            f"  answers cut by --model_max_length: {name_records(self.cut)}",
            f"  empty answers: {name_records(self.empty)}",
            *(f"  learns: {example}" for example in self.examples),
        ]
        return "\n".join(lines)


def name_records(names: Sequence[str]) -> str:
    """Count records, and name the first few."""
    shown = "; ".join(names[:SHOWN_FAULTS]) + ("; ..." if len(names) > SHOWN_FAULTS else "")
    return f"{len(names)} records" + (f": {shown}" if names else "")


def sample(items: Sequence, limit: int) -> list:
    """Draw items with a fixed seed, in order; all of them if there are no more than `limit`."""
    if len(items) <= limit:
        return list(items)
    return [items[index] for index in sorted(random.Random(SEED).sample(range(len(items)), limit))]


# ----------------------------------------------------------------------------------------------------------- images
def find_broken_images(
    records: Sequence[Record], folder: str | Path | None, cache: str | Path | None = None
) -> dict[int, str]:
    """Read the headers of images, each once; of more than `SAMPLED_IMAGES` records a sample.

    Args:
        records: whose images exist.
        folder: the image folder; None if names are paths.
        cache: folder in which it is noted what was found, so that the next look at the same unchanged files costs one
            `stat` each; None: it is not.

    Returns:
        The fault of each record whose image is no image, by its position.
    """
    records = Records.of(records)
    positions, images = sample(range(len(records)), SAMPLED_IMAGES), []
    for start in range(0, len(positions), ROWS_PER_BATCH):
        part = positions[start : start + ROWS_PER_BATCH]
        for position, record in zip(part, records.read(part), strict=True):
            images += [(position, locate_image(name, folder)) for name in record.images]
    note = None if cache is None or len(images) < NOTED_IMAGES else _name_note(records, images, Path(cache))
    if note is not None:
        with suppress(InputError):
            return {int(position): fault for position, fault in read_json(note).items()}
    known: dict[str | StoredImage, str | None] = {}
    faults: dict[int, str] = {}
    for position, image in images:
        if image not in known:
            known[image] = find_header_fault(image)
        if known[image] and position not in faults:
            faults[position] = f"{records[position].name}: image {image}: {known[image]}"
    if note is not None:
        with suppress(InputError):  # it only saves time
            write_json(note, faults)
    return faults


def _name_note(records: Records, images: Sequence[tuple[int, str | StoredImage]], cache: Path) -> Path | None:
    """Name the file that says what was found in these images; None if one may still be changing."""
    digest = hashlib.sha256(json.dumps([store.folder.name for store in records.stores]).encode())
    now = time.time_ns()
    for position, image in images:
        stamp = None
        if isinstance(image, str) and "://" not in image:
            stamp = stamp_file(Path(image))
            if stamp is None or not is_settled(stamp, now):
                return None
        digest.update(f"{position} {image} {stamp}\n".encode())
    return cache / "images" / f"{digest.hexdigest()[:DIGITS]}.json"


def find_header_fault(image: str | StoredImage) -> str | None:
    """Read an image's header; None if it is one, or has to be downloaded."""
    try:
        _read_size(image)
    except UnidentifiedImageError:
        return "not an image in a known format, or empty"
    except (InputError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _read_size(image: str | StoredImage) -> tuple[int, int] | None:
    """Return (width, height) from an image's header; None for a URL."""
    if isinstance(image, StoredImage):
        return _size_of(image.read())
    if "://" in image:
        return None
    with Image.open(image) as header:
        return header.size


def _size_of(image: EmbeddedImage) -> tuple[int, int]:
    with Image.open(BytesIO(image.content)) as header:
        return header.size


# ----------------------------------------------------------------------------------------------------------- tokens
def count_image_tokens(model_args: ModelArguments, data_args: DataArguments) -> ImageTokens | None:
    """Find out how many positions an image takes, from the configs alone; None for an open_clip or unreadable tower."""
    name = model_args.vision_tower
    if name is None or name.startswith(OPEN_CLIP_PREFIX):
        return None
    try:
        tower = build_named_tower(name, folder=model_args.model_name_or_path)
        num_patches, image_size = tower.num_patches, tower.image_size
    except InputError:
        return None  # loading the tower says why
    reduction = read_training_reduction(getattr(model_args, CONFIG_KEY))
    reducer = reduction.highest.before
    canvases = list_canvases(data_args)
    if reducer is None:
        return ImageTokens(num_patches, True, canvases, image_size)
    if reducer.budget.is_automatic:
        return ImageTokens(1, False, canvases, image_size)
    return ImageTokens(reducer.budget.count(num_patches), False, canvases, image_size, reduction.varies)


def list_canvases(data_args: DataArguments) -> str | list | None:
    """Return the canvases of images of several crops; None where an image is one."""
    return data_args.image_grid_pinpoints if data_args.image_aspect_ratio == "anyres" else None


def inspect_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
    limit: int,
    tokens: ImageTokens | None,
    folder: str | Path | None,
    skip_broken: bool = False,
) -> Findings:
    """Count what is left to learn when sequences are cut at `limit` positions.

    Args:
        records: the training set.
        tokenizer: the language model's.
        text_format: template and placeholder.
        limit: `--model_max_length`.
        tokens: of an image; None: an image counts as one position.
        folder: the image folder, to read the sizes of images of several crops.
        skip_broken: go on with texts that the tokenizer cannot take, which training replaces.

    Raises:
        InputError: no sampled record has a token to learn, or the tokenizer cannot take a text.
    """
    records = Records.of(records)
    findings, faults = Findings(len(records), int(records.num_images.sum())), Faults()
    for record in records.read(sample(range(len(records)), SAMPLED_RECORDS)):
        try:
            targets = build_targets(render(record.turns, text_format.template, text_format.placeholder), tokenizer)
        except InputError as error:
            faults.add(f"{record.name}: {error}")
            continue
        sizes = [count_positions(image, tokens, folder) for image in record.images]
        learned, length = _cut(targets.input_ids, targets.labels, sizes, limit)
        total = sum(label != IGNORE_INDEX for label in targets.labels)
        findings.num_sampled += 1
        findings.lengths.append(length)
        if not learned:
            findings.nothing.append(record.name)
        elif len(learned) < total:
            findings.cut.append(record.name)
        if any(not answer.strip() for answer in record.turns[1::2]):
            findings.empty.append(record.name)
        if learned and len(findings.examples) < SHOWN_SAMPLES:
            text = tokenizer.decode(learned)
            findings.examples.append(f"{record.name}: {text[:SHOWN_CHARACTERS]!r}")
    report_faults(faults, "texts", skip_broken)
    if not findings.num_learnable:
        raise InputError(
            f"none of {findings.num_sampled} records has a token to learn within --model_max_length {limit} "
            f"(they take {min(findings.lengths)} to {max(findings.lengths)} positions): raise it, or shorten them"
        )
    return findings


def count_positions(image: str | StoredImage, tokens: ImageTokens | None, folder: str | Path | None) -> int:
    """Count the positions of one image, by the size in its header if it has several crops; arguments as above."""
    if tokens is None:
        return 1
    if tokens.canvases is None:
        return tokens.count(None)
    try:
        return tokens.count(_read_size(locate_image(image, folder)))
    except (InputError, OSError, ValueError, SyntaxError):
        return tokens.count(None)


def _cut(ids: Sequence[int], labels: Sequence[int], sizes: Iterable[int], limit: int) -> tuple[list[int], int]:
    """Cut a sample as the collator and the model do.

    Returns:
        The labels that are left, and the length before cutting, in positions.
    """
    learned, position, waiting = [], 0, iter(sizes)
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        position += next(waiting, 1) if token == IMAGE_TOKEN_INDEX else 1
        # The first token of a sequence is never predicted.
        if label != IGNORE_INDEX and 0 < index < limit and position <= limit:
            learned.append(label)
    return learned, position
