"""Image features, computed once per picture however many questions it gets.

What the vision tower says of a picture does not depend on the question; TRIM's choice among its patches does. So the
patches are kept here, in a cache of bounded size, and reduced anew for every question.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.eval.task import Picture
from llava.image import load_image
from llava.mm_utils import process_images


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the vision tower sees it.

    Attributes:
        patches: `[C, N, D]` patches of each crop (C = 1 in LLaVA-1.5).
        size: (width, height) of the picture in pixels.
    """

    patches: Tensor
    size: tuple[int, int]


class FeatureCache:
    """The last `capacity` pictures that were asked for, encoded."""

    def __init__(self, model: Any, image_processor: Any, capacity: int):
        """Start empty.

        Args:
            model: anything with `config` and `encode_patches`.
            image_processor: the CLIP image processor.
            capacity: number of pictures to keep between calls; one call may hold more.
        """
        self._model = model
        self._image_processor = image_processor
        self._capacity = capacity
        self._kept: OrderedDict[Picture, EncodedImage] = OrderedDict()

    def encode(
        self, paths: Iterable[Picture], batch_size: int
    ) -> tuple[dict[Picture, EncodedImage], dict[Picture, str]]:
        """Encode pictures, those in the cache excepted.

        Args:
            paths: pictures; equal ones are encoded once.
            batch_size: pictures per pass of the tower.

        Returns:
            The encoded pictures, and for each that cannot be read the reason.
        """
        wanted = list(dict.fromkeys(paths))
        found = {path: self._kept[path] for path in wanted if path in self._kept}
        absent = [path for path in wanted if path not in found]
        faults: dict[Picture, str] = {}
        for start in range(0, len(absent), batch_size):
            fresh, unreadable = self._encode_batch(absent[start : start + batch_size])
            found |= fresh
            faults |= unreadable
        self._keep(found)
        return found, faults

    def _encode_batch(self, paths: Sequence[Picture]) -> tuple[dict[Picture, EncodedImage], dict[Picture, str]]:
        faults: dict[Picture, str] = {}
        read: dict[Picture, tuple[Tensor, tuple[int, int]]] = {}
        for path in paths:
            try:
                read[path] = self._read(path)
            except (ValueError, OSError) as error:
                # InputError is a ValueError; so is what image processors raise for pictures of impossible shapes.
                faults[path] = str(error)
        patches = self._model.encode_patches([pixels for pixels, _ in read.values()])
        encoded = {
            path: EncodedImage(crops, size) for (path, (_, size)), crops in zip(read.items(), patches, strict=True)
        }
        return encoded, faults

    def _read(self, path: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Return `float32[3, S, S]` or `float32[C, 3, S, S]` and the picture's (width, height)."""
        image = load_image(path)
        pixels = process_images([image], self._image_processor, self._model.config)[0]
        return torch.as_tensor(pixels), image.size

    def _keep(self, used: dict[Picture, EncodedImage]) -> None:
        for path, image in used.items():
            self._kept[path] = image
            self._kept.move_to_end(path)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
