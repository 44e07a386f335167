"""What the towers say, computed once per picture and once per query however many questions they meet in.

What the vision tower says of a picture does not depend on the question; TRIM's choice among its patches does. So
patches and embedded queries are kept here, in caches of bounded size, and reduced anew for every question.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llava.eval.benchmark import ImageSource
from llava.eval.reading import PictureReader
from llava.model.multimodal_encoder.tower import ImageFeatures

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key")

TOWER_BATCH = 32
"""Pictures per pass of the vision tower, and queries per pass of the text tower."""
CACHED_QUERIES = 4096


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the vision tower sees it.

    Attributes:
        patches: what the vision tower gives for its crops.
        size: (width, height) of the picture in pixels.
    """

    patches: ImageFeatures
    size: tuple[int, int]


class RecentlyUsed(Generic[Key, Result]):
    """The last `capacity` things that were used."""

    def __init__(self, capacity: int):
        """Start empty."""
        self._capacity = capacity
        self._kept: OrderedDict[Key, Result] = OrderedDict()

    def find(self, keys: Iterable[Key]) -> dict[Key, Result]:
        """Return those of the keys that are there, with their values."""
        return {key: self._kept[key] for key in keys if key in self._kept}

    def use(self, items: dict[Key, Result]) -> None:
        """Note items as used last; others may fall out."""
        for key, value in items.items():
            self._kept[key] = value
            self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


class FeatureCache:
    """The last pictures that were asked for, encoded, and the next ones, being read."""

    def __init__(self, model: Any, image_processor: Any, capacity: int):
        """Start empty.

        Args:
            model: anything with `config` and `encode_patches`.
            image_processor: the CLIP image processor.
            capacity: number of pictures to keep between calls; one call may hold more.
        """
        self._model = model
        self._reader = PictureReader(image_processor, model.config)
        self._kept: RecentlyUsed[ImageSource, EncodedImage] = RecentlyUsed(capacity)

    def announce(self, pictures: Iterable[ImageSource]) -> None:
        """Say which pictures `encode` will be called with, so that they are read meanwhile."""
        wanted = list(dict.fromkeys(pictures))
        kept = self._kept.find(wanted)
        self._reader.announce(picture for picture in wanted if picture not in kept)

    def encode(self, pictures: Iterable[ImageSource]) -> tuple[dict[ImageSource, EncodedImage], dict[ImageSource, str]]:
        """Encode pictures, those in the cache excepted.

        Args:
            pictures: equal ones are encoded once.

        Returns:
            The encoded pictures, and for each that cannot be read the reason.
        """
        wanted = list(dict.fromkeys(pictures))
        found = self._kept.find(wanted)
        self._reader.forget(found)
        absent = [picture for picture in wanted if picture not in found]
        self._reader.announce(absent)
        faults: dict[ImageSource, str] = {}
        for start in range(0, len(absent), TOWER_BATCH):
            fresh, unreadable = self._encode_batch(absent[start : start + TOWER_BATCH])
            found |= fresh
            faults |= unreadable
        self._kept.use(found)
        return found, faults

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.close()

    def _encode_batch(
        self, pictures: Sequence[ImageSource]
    ) -> tuple[dict[ImageSource, EncodedImage], dict[ImageSource, str]]:
        faults: dict[ImageSource, str] = {}
        read: dict[ImageSource, tuple[Tensor, tuple[int, int]]] = {}
        for picture in pictures:
            try:
                read[picture] = self._reader.take(picture)
            except (ValueError, OSError) as error:
                # InputError is a ValueError; so is what image processors raise for pictures of impossible shapes.
                faults[picture] = str(error)
        patches = apply_in_parts(self._model.encode_patches, [pixels for pixels, _ in read.values()], TOWER_BATCH)
        encoded = {
            picture: EncodedImage(crops, size)
            for (picture, (_, size)), crops in zip(read.items(), patches, strict=True)
        }
        return encoded, faults


class QueryCache:
    """The last queries that were asked, embedded."""

    def __init__(self, model: Any, capacity: int = CACHED_QUERIES):
        """Start empty; the model is anything with `embed_queries`."""
        self._model = model
        self._kept: RecentlyUsed[str, Tensor] = RecentlyUsed(capacity)

    def embed(self, queries: Sequence[str]) -> dict[str, Tensor] | None:
        """Embed queries, those in the cache excepted.

        Args:
            queries: equal ones are embedded once.

        Returns:
            `float32[P]` by query; None where the token reduction reads no text.
        """
        distinct = list(dict.fromkeys(queries))
        found = self._kept.find(distinct)
        absent = [query for query in distinct if query not in found]
        if absent:
            rows = apply_in_parts(self._embed_some, absent, TOWER_BATCH)
            if rows[0] is None:
                return None
            found |= dict(zip(absent, rows, strict=True))
        self._kept.use(found)
        return found

    def _embed_some(self, queries: Sequence[str]) -> Sequence[Tensor | None]:
        embedded = self._model.embed_queries(list(queries))
        return [None] * len(queries) if embedded is None else embedded.unbind()


def apply_in_parts(
    function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], size: int
) -> list[Result]:
    """Apply a function of lists to at most `size` items at a time, to fewer where memory does not last.

    Raises:
        torch.OutOfMemoryError: there is not enough for a single item.
    """
    results: list[Result] = []
    start = 0
    while start < len(items):
        part = items[start : start + size]
        try:
            results += function(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            size = (len(part) + 1) // 2
        else:
            start += len(part)
    return results
