"""Images read ahead of the model, and every image and every query encoded once, however many questions they meet in.

What the vision tower computes of an image does not depend on the question; which patches TRIM keeps does. So encoded
images and embedded queries are kept here, in caches of bounded size, and reduced anew for every question.

Images are decoded and resized by threads (Pillow does it without Python's lock). What waits to be used is bounded, and
an image that cannot be read fails where it is asked for, not where it was read.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from llava.clock import StageClock
from llava.eval.benchmark import ImageSource
from llava.image import load_image
from llava.mm_utils import process_images
from llava.model.feature_files import FeatureFiles, KeptFeatures
from llava.model.identity import hash_files
from llava.model.token_reduction import Need
from llava.picture import Picture
from llava.protocols import ImageProcessor, ImageSettings, VisionLanguageModel

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key")

TOWER_BATCH = 32
"""Images per pass of the vision tower, and queries per pass of the text tower."""
CACHED_QUERIES = 4096
MAX_THREADS = 8
READ_AHEAD = 64

Pixels = tuple[Tensor, tuple[int, int]]
"""`float32[3, S, S]` or `float32[C, 3, S, S]`, and the image's (width, height)."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as the vision tower sees it.

    Attributes:
        features: the record of `encode_patches`, handed on to `make_image_tokens` as it is.
        size: (width, height) of the image in pixels.
    """

    features: object
    size: tuple[int, int]


class FeatureCache:
    """The last images that were asked for, encoded, and the next ones, being read."""

    def __init__(
        self,
        model: VisionLanguageModel,
        image_processor: ImageProcessor,
        capacity: int,
        store: "FeatureStore | None" = None,
    ):
        """Start empty.

        Args:
            model: its `config` and `encode_patches` are used.
            image_processor: of the vision tower.
            capacity: number of images to keep between calls; one call may hold more.
            store: a folder of images encoded for several reductions; it is asked before an image is encoded.
        """
        self._model = model
        self._store = store
        self.clock = StageClock(model.device)  # "read": waiting for images; "encode": the vision tower
        self._reader = ImageReader(image_processor, model.config)
        self._kept: RecentlyUsed[ImageSource, EncodedImage] = RecentlyUsed(capacity)

    def announce(self, images: Iterable[ImageSource]) -> None:
        """Tell which images `encode` will be called with next, so that they are read meanwhile."""
        wanted = list(dict.fromkeys(images))
        kept = self._kept.find(wanted)
        stored = self._store or ()
        self._reader.announce(image for image in wanted if image not in kept and image not in stored)

    def encode(self, images: Iterable[ImageSource]) -> tuple[dict[ImageSource, EncodedImage], dict[ImageSource, str]]:
        """Encode images, those in the cache excepted.

        Args:
            images: equal ones are encoded once.

        Returns:
            The encoded images, and for each that cannot be read the reason.
        """
        wanted = list(dict.fromkeys(images))
        found = self._kept.find(wanted)
        if self._store is not None:
            found |= self._store.find(image for image in wanted if image not in found)
        self._reader.forget(found)
        absent = [image for image in wanted if image not in found]
        self._reader.announce(absent)
        faults: dict[ImageSource, str] = {}
        for start in range(0, len(absent), TOWER_BATCH):
            pixels: dict[ImageSource, Pixels] = {}
            with self.clock.stage("read"):
                for image in absent[start : start + TOWER_BATCH]:
                    try:
                        pixels[image] = self._reader.take(image)
                    except (ValueError, OSError) as error:
                        # InputError is a ValueError; so is what image processors raise for images of impossible shapes.
                        faults[image] = str(error)
            encode = self._model.encode_patches if self._store is None else self._store.encode
            with self.clock.stage("encode"):
                encoded = apply_in_parts(encode, [values for values, _ in pixels.values()], TOWER_BATCH)
            for (image, (_, size)), features in zip(pixels.items(), encoded, strict=True):
                found[image] = EncodedImage(features, size)
                if self._store is not None:
                    self._store.keep(image, found[image])
        self._kept.use(found)
        return found, faults

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.close()


class FeatureStore:
    """Images encoded once for several reductions, in files found by content: see `FeatureFiles`."""

    def __init__(
        self, folder: Path, model: VisionLanguageModel, needs: Collection[Need], identity: str, max_bytes: int
    ):
        """Name the folder; nothing is read yet.

        Args:
            folder: where files go, in a folder of their own.
            model: encodes.
            needs: of all reductions; the tower is ready for them.
            identity: of the checkpoint with its tower and preprocessor.
            max_bytes: no more files once there are so many bytes: further images are encoded whenever they are met.
        """
        self._files = FeatureFiles(folder, identity, needs)
        self._model = model
        self._needs = frozenset(needs)
        self._max_bytes = max_bytes
        self._hashes: dict[ImageSource, str | None] = {}
        self._bytes = self._files.num_bytes()

    def __contains__(self, image: ImageSource) -> bool:
        content = self._hash(image)
        return content is not None and content in self._files

    def encode(self, pixels: Sequence[Tensor]) -> list[object]:
        """Run the vision tower for all reductions at once."""
        return self._model.encode_patches(list(pixels), self._needs)

    def find(self, images: Iterable[ImageSource]) -> dict[ImageSource, EncodedImage]:
        """Return the images that are there."""
        found: dict[ImageSource, EncodedImage] = {}
        for image in images:
            content = self._hash(image)
            kept = None if content is None else self._files.read(content)
            if kept is not None:
                found[image] = EncodedImage(kept.features.map(lambda values: values.to(self._model.device)), kept.size)
        return found

    def keep(self, image: ImageSource, encoded: EncodedImage) -> None:
        """Write an image, unless there is no room."""
        content, features = self._hash(image), encoded.features
        size = sum(values.nbytes for values in (features.patches, *features.intermediates.values()))
        if content is None or self._bytes + size > self._max_bytes:
            return
        self._files.write(content, KeptFeatures(features.map(Tensor.cpu), encoded.size))
        self._bytes += size

    def _hash(self, image: ImageSource) -> str | None:
        if image not in self._hashes:
            self._hashes[image] = (
                hash_files([image], "images")[image]
                if isinstance(image, Path)
                else hashlib.sha256(image.content).hexdigest()
            )
        return self._hashes[image]


class QueryCache:
    """The last queries that were asked, embedded."""

    def __init__(self, model: VisionLanguageModel, capacity: int = CACHED_QUERIES):
        """Start empty; of the model its `embed_queries` is used."""
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


class RecentlyUsed(Generic[Key, Result]):
    """The last `capacity` things that were used."""

    def __init__(self, capacity: int):
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


class ImageReader:
    """Reads images that were announced before they are asked for."""

    def __init__(self, image_processor: ImageProcessor, settings: ImageSettings):
        """Take what `process_images` needs; threads start with the first use."""
        self._image_processor = image_processor
        self._settings = settings
        self._announced: OrderedDict[ImageSource, None] = OrderedDict()
        self._started: dict[ImageSource, Future[Pixels]] = {}
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="image")

    def announce(self, images: Iterable[ImageSource]) -> None:
        """Tell which images will be asked for, in this order."""
        self._announced.update((image, None) for image in images if image not in self._started)
        self._top_up()

    def forget(self, images: Iterable[ImageSource]) -> None:
        """Tell that announced images are not needed."""
        for image in images:
            self._announced.pop(image, None)
            future = self._started.pop(image, None)
            if future is not None:
                future.cancel()
        self._top_up()

    def take(self, image: ImageSource) -> Pixels:
        """Return an image, announced or not.

        Raises:
            ValueError: it cannot be read (`InputError`), or the image processor refuses its shape.
            OSError: likewise.
        """
        self._announced.pop(image, None)
        future = self._started.pop(image, None) or self._pool.submit(self._read, image)
        self._top_up()
        return future.result()

    def close(self) -> None:
        """Stop; what is being read is finished, nothing else is begun."""
        self._announced.clear()
        self._started.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _top_up(self) -> None:
        while self._announced and len(self._started) < READ_AHEAD:
            image, _ = self._announced.popitem(last=False)
            self._started[image] = self._pool.submit(self._read, image)

    def _read(self, source: ImageSource) -> Pixels:
        image = source.load() if isinstance(source, Picture) else load_image(source)
        pixels = process_images([image], self._image_processor, self._settings)[0]
        return torch.as_tensor(pixels), image.size


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
