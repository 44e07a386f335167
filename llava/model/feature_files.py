"""What a frozen vision tower computes of images, in files that several processes and runs share.

A file holds one part of one image's record: the patches with the image's size, or one intermediate that a token
reduction needs, each found by the image's content in a folder named by all else that it depends on. A reduction that
needs more adds files and reads those that are there. A file appears whole or not at all, and one whose checksum is
wrong counts as not there.
"""

import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llava.files import FileError, read_bytes, write_bytes
from llava.model.identity import fingerprint
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.token_reduction import Need

CHECKSUM = struct.Struct("<I")
PATCHES, SIZE, VALUES = "patches", "size", "values"


@dataclass(frozen=True)
class KeptFeatures:
    """An image as a tower encoded it.

    Attributes:
        features: patches `[C, N, D]` and intermediates, in any dtype, on the CPU.
        size: (width, height) of the image in pixels.
    """

    features: ImageFeatures
    size: tuple[int, int]


class FeatureFiles:
    """The files of one tower and one preprocessing."""

    def __init__(self, folder: Path, identity: str, needs: Collection[Need]):
        """Name the folder; nothing is read or made yet.

        Args:
            folder: where files go, in a folder of their own.
            identity: all that features depend on besides the image: tower, layer, dtype, preprocessing.
            needs: of the token reduction, besides the patches; those that no tower answers are passed over.
        """
        self.folder = folder / fingerprint(identity)
        self.needs = frozenset(need for need in needs if need.layer is not None)

    def __contains__(self, content: str) -> bool:
        """Whether every part of an image's record is there, whole or not."""
        return all(self._place(content, name).exists() for name in (PATCHES, *map(name_part, self.needs)))

    def num_bytes(self) -> int:
        """Return what all files take on the disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*/*.*"))

    def read(self, content: str) -> KeptFeatures | None:
        """Read an image's record; None unless every part is there and whole.

        Args:
            content: a hash of the image.
        """
        patches = self._read_part(content, PATCHES)
        if patches is None or patches.keys() != {PATCHES, SIZE}:
            return None
        intermediates = {}
        for need in self.needs:
            part = self._read_part(content, name_part(need))
            if part is None or part.keys() != {VALUES}:
                return None
            intermediates[need] = part[VALUES]
        width, height = patches[SIZE].tolist()
        return KeptFeatures(ImageFeatures(patches[PATCHES], intermediates), (width, height))

    def write(self, content: str, kept: KeptFeatures) -> None:
        """Write the parts of a record that are not there; a part that is damaged is replaced.

        Raises:
            FileError: a file cannot be written.
        """
        parts = {name_part(need): {VALUES: values} for need, values in kept.features.intermediates.items()}
        parts[PATCHES] = {PATCHES: kept.features.patches, SIZE: torch.tensor(kept.size)}
        for name, tensors in parts.items():
            if self._read_part(content, name) is None:
                payload = save({key: values.contiguous() for key, values in tensors.items()})
                write_bytes(self._place(content, name), CHECKSUM.pack(zlib.crc32(payload)) + payload)

    def _read_part(self, content: str, name: str) -> dict[str, Tensor] | None:
        try:
            stored = read_bytes(self._place(content, name))
            (checksum,) = CHECKSUM.unpack_from(stored)
            payload = stored[CHECKSUM.size :]
            return load(payload) if zlib.crc32(payload) == checksum else None
        except (FileError, struct.error, SafetensorError):
            return None

    def _place(self, content: str, name: str) -> Path:
        return self.folder / content[:2] / f"{content}.{name}"


def name_part(need: Need) -> str:
    """Name the file of an intermediate."""
    return f"{need.kind}{need.layer}"


def round_to_half(values: Tensor) -> Tensor:
    """Round to float16; what is out of its range stays in float32."""
    half = values.half()
    return half if bool(half.isfinite().all()) else values.float()
