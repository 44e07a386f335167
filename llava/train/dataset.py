"""Training samples: records turned into ids, labels and pixel values when the loader asks for them.

Texts and images are read here and nowhere before, so a training set may be larger than memory. Conversations are
tokenized per sample, which costs far less than decoding an image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import process_images
from llava.model.feature_files import FeatureFiles
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.protocols import ImageProcessor, Tokenizer
from llava.train.feature_cache import read_source
from llava.train.records import leave_out, locate_image
from llava.train.store import Record, Records
from llava.train.stored_images import StoredImage
from llava.train.targets import NO_CAPTION, build_targets, choose_query, render

MOST_TRIED = 100  # records that may stand in for a broken one


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        input_ids: int64[T] with IMAGE_TOKEN_INDEX at the images.
        labels: int64[T], IGNORE_INDEX where there is no loss.
        images: float32[3, H, W] each (float32[C, 3, H, W] for several crops), in order of the placeholders; with a
            feature cache what it holds of an image stands for its pixels.
        image_sizes: (width, height) of the images before any resizing.
        query: the text by which token reduction chooses patches, or its ids.
        replaced: faults of records that this sample stands in for.
        image_keys: with a feature cache, the name of each image in it.
    """

    input_ids: Tensor
    labels: Tensor
    images: list[Tensor | ImageFeatures] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    query: str | TextIds = ""
    replaced: tuple[str, ...] = ()
    image_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TextFormat:
    """How conversations become text: the template, the text for an image, and what token reduction reads."""

    template: Conversation
    placeholder: str = DEFAULT_IMAGE_TOKEN
    query_source: str = "questions"


@dataclass(frozen=True)
class ImageFormat:
    """How images become pixel values; `process_images` reads the last two fields.

    Attributes:
        folder: the folder that image names are relative to; None if names are paths.
        processor: the vision tower's image processor.
        image_aspect_ratio: "square", "pad" or "anyres".
        image_grid_pinpoints: canvases for "anyres".
    """

    folder: str | Path | None
    processor: ImageProcessor
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: str | list | None = None


def check_fit(
    records: Sequence[Record], template: Conversation, has_vision: bool, skip_broken: bool = False
) -> Records:
    """Check that records suit the template and the model, without reading an image.

    Args:
        records: from `read_records`.
        template: of `--version`.
        has_vision: whether there is a vision tower.
        skip_broken: leave out the records that do not suit and log them.

    Returns:
        The records that suit.

    Raises:
        InputError: an image for a model without a vision tower, or a conversation that the template cannot render
            (unless `skip_broken`).
    """
    records = Records.of(records)
    is_broken = np.zeros(len(records), bool) if has_vision else records.num_images > 0
    if template.sep_style is SeparatorStyle.PLAIN:
        is_broken = is_broken | ~records.column("is_caption")

    def explain(position: int) -> str:
        record = records[position]
        lacks_tower = record.images and not has_vision
        return f"{record.name}: {'has an image, but there is no --vision_tower' if lacks_tower else NO_CAPTION}"

    return leave_out(records, is_broken, explain, "--version and --vision_tower", skip_broken)


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{record.name}: {error}") from error


class ConversationDataset(Dataset):
    """Lazily built training samples.

    Args:
        records: the conversations.
        tokenizer: the language model's tokenizer.
        text_format: template, placeholder and query source.
        image_format: how to read images; None if no record has any.
        skip_broken: replace a record that turns out to be broken by the next good one of its modality, the same one
            whenever it is asked for; else such a record is an error.
        feature_files: of `--feature_cache`; an image that they hold is not decoded.
        read_query: makes ids of queries for the tower's text half, here instead of between the model's layers; None:
            queries stay texts.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        text_format: TextFormat,
        image_format: ImageFormat | None = None,
        skip_broken: bool = False,
        feature_files: FeatureFiles | None = None,
        read_query: TextReader | None = None,
    ):
        self.read_query = read_query
        self.feature_files = feature_files
        self.skip_broken = skip_broken
        self.records = Records.of(records)
        self.tokenizer = tokenizer
        self.text_format = text_format
        self.image_format = image_format

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Build one sample.

        Raises:
            InputError: an image cannot be read, or the record does not suit the template; names the record.
        """
        faults: list[str] = []
        for candidate in self._list_candidates(index):
            try:
                return replace(self._build(self.records[candidate]), replaced=tuple(faults))
            except InputError as error:
                if not self.skip_broken:
                    raise
                faults.append(str(error))
        raise InputError(f"{len(faults)} records in a row are broken, the first: {faults[0]}")

    def _list_candidates(self, index: int) -> Iterator[int]:
        """Yield a record's index, then those of the records that may stand in for it."""
        yield index
        has_image = self.records.num_images > 0
        (alike,) = np.nonzero(has_image == has_image[index])
        place = np.searchsorted(alike, index)
        yield from np.concatenate([alike[place + 1 :], alike[:place]])[:MOST_TRIED].tolist()

    def _build(self, record: Record) -> Sample:
        with _naming(record):
            rendered = render(record.turns, self.text_format.template, self.text_format.placeholder)
            targets = build_targets(rendered, self.tokenizer)
            images, sizes, keys = self._load_images(record.images)
        query = choose_query(record.turns, rendered, self.text_format.query_source)
        return Sample(
            input_ids=torch.tensor(targets.input_ids, dtype=torch.long),
            labels=torch.tensor(targets.labels, dtype=torch.long),
            images=images,
            image_sizes=sizes,
            image_keys=keys,
            query=query if self.read_query is None else self.read_query(query),
        )

    def _load_images(
        self, names: Sequence[str | StoredImage]
    ) -> tuple[list[Tensor | ImageFeatures], list[tuple[int, int]], list[str]]:
        """Load pixels or features of images, their sizes and their names in the feature cache."""
        if not names:
            return [], [], []
        found = [locate_image(name, self.image_format.folder) for name in names]
        if self.feature_files is not None:
            images, sizes, keys = zip(*(self._find_image(image) for image in found), strict=True)
            return list(images), list(sizes), list(keys)
        images = [load_image(image.read() if isinstance(image, StoredImage) else image) for image in found]
        values = process_images(images, self.image_format.processor, self.image_format)
        return list(values), [image.size for image in images], []

    def _find_image(self, image: str | StoredImage) -> tuple[Tensor | ImageFeatures, tuple[int, int], str]:
        """Find an image in the feature cache, and decode it if it is not there."""
        source, key = read_source(image)
        kept = self.feature_files.read(key)
        if kept is not None:
            return kept.features, kept.size, key
        decoded = source if isinstance(source, Image.Image) else load_image(source)
        (pixels,) = process_images([decoded], self.image_format.processor, self.image_format)
        return pixels, decoded.size, key
