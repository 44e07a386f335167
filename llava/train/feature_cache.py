"""`--feature_cache`: images that the frozen tower has encoded once, for later epochs and other token reductions.

Workers look an image up by its bytes and hand on what they find, without decoding it; of the others the tower makes
features, which a thread writes. Whether found or made, features are rounded to half precision before they are used, so
that what is learned does not depend on what the cache held.
"""

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from llava.errors import InputError
from llava.files import FileError, read_bytes
from llava.image import FILE_BYTES, EmbeddedImage, load_image
from llava.model.feature_files import FeatureFiles, KeptFeatures, round_to_half
from llava.model.identity import identify_checkpoint, identify_tower
from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower
from llava.model.multimodal_encoder.tower import ImageFeatures, VisionTower
from llava.model.token_reduction import Need
from llava.train.flags import DataArguments, ModelArguments
from llava.train.stored_images import StoredImage

logger = logging.getLogger(__name__)

FORMAT = 1
RESERVED_BYTES = 2**30
"""So much of the disk stays free: a checkpoint may have to be written."""
MOST_WAITING = 256
"""Images that wait to be written; then the training waits for the disk."""


class FeatureCache:
    """The cache as the trainer sees it."""

    def __init__(self, files: FeatureFiles, tower: VisionTower):
        """Take the files and the tower; a thread starts with the first image that is written."""
        self.files = files
        self._tower = tower
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._waiting: deque[Future[None]] = deque()
        self._is_full = False

    def complete(
        self, images: Sequence[Tensor | ImageFeatures], keys: Sequence[str], sizes: Sequence[tuple[int, int]]
    ) -> list[ImageFeatures]:
        """Encode the images of a batch that are pixels, and write them.

        Args:
            images: `float32[3, S, S]` or `float32[C, 3, S, S]`, or what a worker found in the cache.
            keys: of the images, by content.
            sizes: (width, height) of the images.

        Returns:
            All of them, in float32, on the tower's device.
        """
        absent = [number for number, image in enumerate(images) if isinstance(image, Tensor)]
        kept = dict(enumerate(images))
        if absent:
            crops = [images[number].reshape(-1, *images[number].shape[-3:]) for number in absent]
            encoded = self._tower.extract(torch.cat(crops), self.files.needs)
            for number, features in zip(absent, encoded.split([len(each) for each in crops]), strict=True):
                kept[number] = features.map(lambda values: round_to_half(values.cpu()))
                self._write(keys[number], KeptFeatures(kept[number], sizes[number]))
        device = self._tower.device
        return [kept[number].map(lambda values: values.to(device, non_blocking=True).float()) for number in kept]

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write(self, key: str, kept: KeptFeatures) -> None:
        if self._is_full:
            return
        self._waiting.append(self._writer.submit(self._write_now, key, kept))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > MOST_WAITING):
            self._waiting.popleft().result()

    def _write_now(self, key: str, kept: KeptFeatures) -> None:
        """Write one image; where that is not possible, say so once and write no more."""
        if self._is_full:
            return
        try:
            self.files.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.files.folder).free < RESERVED_BYTES:
                raise FileError(f"less than {RESERVED_BYTES / 2**30:g} GiB of its disk is free")
            self.files.write(key, kept)
        except (FileError, OSError) as error:
            self._is_full = True
            logger.warning(
                "--feature_cache %s: %s; nothing more is written, and images that are not in it are encoded whenever "
                "they are met",
                self.files.folder.parent,
                error,
            )


def open_cache(
    model_args: ModelArguments, data_args: DataArguments, tower: VisionTower, needs: Collection[Need]
) -> FeatureCache | None:
    """Open the cache of `--feature_cache`; None without the flag.

    Args:
        model_args: from `complete_arguments`.
        data_args: likewise.
        tower: loaded.
        needs: of the token reduction.

    Raises:
        InputError: the tower's files cannot be read, so that nobody could tell its features from another one's.
    """
    if not data_args.feature_cache:
        return None
    start, name = model_args.model_name_or_path, model_args.vision_tower
    content = identify_checkpoint(start) if isinstance(tower, StoredVisionTower) else identify_tower(name, start)
    if content is None:
        raise InputError(f"--feature_cache: the files of vision tower {name} cannot be read; leave it out")
    is_anyres = data_args.image_aspect_ratio == "anyres"
    identity = {
        "format": FORMAT,
        "tower": content,
        "select": [tower.select_layer, tower.select_feature, str(tower.dtype)],
        "processor": tower.image_processor.to_dict(),
        "images": [data_args.image_aspect_ratio, str(data_args.image_grid_pinpoints) if is_anyres else None],
    }
    files = FeatureFiles(Path(data_args.feature_cache), json.dumps(identity, sort_keys=True, default=str), needs)
    return FeatureCache(files, tower)


def read_source(image: str | StoredImage) -> tuple[EmbeddedImage | Image.Image, str]:
    """Read an image without decoding it, and hash its bytes.

    Args:
        image: a path, an address, or an image inside the data.

    Returns:
        What can be decoded, and the hash. What an address leads to is decoded here, and counts by its pixels.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(image, str) and "://" in image:
        decoded = load_image(image)
        return decoded, hashlib.sha256(str(decoded.size).encode() + decoded.tobytes()).hexdigest()
    source = (
        image.read()
        if isinstance(image, StoredImage)
        else EmbeddedImage(image, read_bytes(Path(image), limit=FILE_BYTES))
    )
    return source, hashlib.sha256(source.content).hexdigest()
