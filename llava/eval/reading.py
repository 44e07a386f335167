"""Pictures from disk to pixel values, in threads ahead of the model.

Pillow decodes and resizes without holding Python's lock, so threads are enough. What waits to be used is bounded,
and a picture that cannot be read fails where it is asked for, not where it was read.
"""

import os
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from llava.eval.benchmark import ImageSource
from llava.image import load_image
from llava.mm_utils import process_images

MAX_THREADS = 8
READ_AHEAD = 64

Pixels = tuple[Tensor, tuple[int, int]]
"""`float32[3, S, S]` or `float32[C, 3, S, S]`, and the picture's (width, height)."""


class PictureReader:
    """Reads pictures that were announced before they are asked for."""

    def __init__(self, image_processor: Any, model_config: Any):
        """Take the image processor and what `process_images` reads of the config; threads start with the first use."""
        self._image_processor = image_processor
        self._config = model_config
        self._announced: OrderedDict[ImageSource, None] = OrderedDict()
        self._started: dict[ImageSource, Future[Pixels]] = {}
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="picture")

    def announce(self, pictures: Iterable[ImageSource]) -> None:
        """Say which pictures will be asked for, in this order."""
        self._announced.update((picture, None) for picture in pictures if picture not in self._started)
        self._top_up()

    def forget(self, pictures: Iterable[ImageSource]) -> None:
        """Say that announced pictures are not needed."""
        for picture in pictures:
            self._announced.pop(picture, None)
            future = self._started.pop(picture, None)
            if future is not None:
                future.cancel()
        self._top_up()

    def take(self, picture: ImageSource) -> Pixels:
        """Return a picture, announced or not.

        Raises:
            ValueError: it cannot be read (`InputError`), or the image processor refuses its shape.
            OSError: likewise.
        """
        self._announced.pop(picture, None)
        future = self._started.pop(picture, None) or self._pool.submit(self._read, picture)
        self._top_up()
        return future.result()

    def close(self) -> None:
        """Stop; what is being read is finished, nothing else is begun."""
        self._announced.clear()
        self._started.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _top_up(self) -> None:
        while self._announced and len(self._started) < READ_AHEAD:
            picture, _ = self._announced.popitem(last=False)
            self._started[picture] = self._pool.submit(self._read, picture)

    def _read(self, picture: ImageSource) -> Pixels:
        image = load_image(picture)
        pixels = process_images([image], self._image_processor, self._config)[0]
        return torch.as_tensor(pixels), image.size
