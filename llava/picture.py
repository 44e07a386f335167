"""An image as a Python user has it: a file, an address, a Pillow image, an array or a tensor. Every one becomes RGB.

Commands and benchmarks name files and addresses only (`llava.image`). No torch here: a tensor is looked at as an array.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import InputError
from llava.image import check_path, load_image, read_image

KNOWN_TYPES = "a path, an http(s) address, a Pillow image, a NumPy array or a tensor"
CHANNELS = (1, 3, 4)
"""Grey, RGB, and RGB with transparency."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One image.

    Two pictures are equal if they are of the same path or address, or of the very same object: equal ones are encoded
    once.

    Attributes:
        source: path, address, Pillow image, `uint8[height, width]` or `uint8[height, width, channels]` array, or a
            tensor as torchvision has it, `uint8[channels, height, width]` or the same as floats in [0, 1]; 1, 3 or 4
            channels, of which transparency is dropped. Pillow images and files are turned upright, as their EXIF tag
            says.

    Raises:
        InputError: another type, shape or dtype, or a file that is not there.
    """

    source: Any

    def __post_init__(self) -> None:
        if self.is_named:
            _check_path(self)
        elif not isinstance(self.source, Image.Image):
            _check_array(self.source)

    @property
    def is_named(self) -> bool:
        """Whether it is a path or an address, not an object in memory."""
        return isinstance(self.source, (str, PathLike))

    @property
    def _key(self) -> object:
        return str(self.source) if self.is_named else id(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return str(self.source) if self.is_named else f"given as {_name(self.source)}"

    def load(self) -> Image.Image:
        """Read the image: a new one of mode RGB.

        Raises:
            InputError: it cannot be read (`llava.image.load_image`), or a tensor's values are outside [0, 1].
        """
        if isinstance(self.source, str) and self.source.lower().startswith(("http://", "https://")):
            return load_image(self.source, upright=True)
        if self.is_named:
            return load_image(Path(self.source).expanduser(), upright=True)
        if isinstance(self.source, Image.Image):
            return read_image(self.source, str(self), upright=True)
        return read_image(Image.fromarray(_to_bytes(self.source)), str(self))


class Snapshots:
    """Copies of images in memory, so that they stay what they were, whatever their owner writes into them.

    Paths and addresses stay what they are. An object that has not changed since it was last copied gets the same copy.
    """

    def __init__(self, is_frozen: bool):
        """Begin.

        Args:
            is_frozen: nothing is written into the images meanwhile: an object is copied once.
        """
        self._is_frozen = is_frozen
        self._copies: dict[int, Picture] = {}

    def take(self, picture: Picture) -> Picture:
        """Copy an image as it is now; one that cannot be read comes back as it is, and reading it will say why."""
        if picture.is_named:
            return picture
        known = self._copies.get(id(picture.source))
        if known is not None and self._is_frozen:
            return known
        try:
            copy = Picture(picture.load())
        except InputError:
            return picture
        if known is not None and known.source == copy.source:
            return known
        self._copies[id(picture.source)] = copy
        return copy


def to_pictures(images: object) -> tuple[Picture, ...]:
    """Read what a user gives for the images of one question: None, one image, or a list or tuple of images.

    Raises:
        InputError: something else.
    """
    if images is None:
        return ()
    if isinstance(images, (list, tuple)):
        return tuple(Picture(image) for image in images)
    return (Picture(images),)


def _name(source: object) -> str:
    """Name a type for a person: `a Pillow image`, `a tensor`, `bytes`."""
    if isinstance(source, Image.Image):
        return "a Pillow image"
    if isinstance(source, np.ndarray):
        return "a NumPy array"
    return "a tensor" if _is_tensor(source) else type(source).__name__


def _is_tensor(source: object) -> bool:
    return hasattr(source, "detach") and hasattr(source, "cpu")


def _check_path(picture: Picture) -> None:
    text = str(picture.source)
    if text.lower().startswith(("http://", "https://")):
        return
    check_path(text)
    try:
        is_there = Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name that no system has; reading it says what is wrong
        is_there = True
    if not is_there:
        raise InputError(f"image {text}: no such file")


def _check_array(source: object) -> None:
    name = _name(source)
    if not isinstance(source, np.ndarray) and not _is_tensor(source):
        raise InputError(f"an image is {KNOWN_TYPES}, or a list of these; not {name}")
    is_tensor = _is_tensor(source)
    wanted, shape = "[channels, height, width]" if is_tensor else "[height, width, channels]", tuple(source.shape)
    channels = shape[0 if is_tensor else -1] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in CHANNELS or 0 in shape:
        raise InputError(
            f"an image given as {name} of shape {list(shape)}: expected [height, width] or {wanted} with 1, 3 or 4 "
            "channels; several images are a list"
        )
    dtype = str(source.dtype).removeprefix("torch.")
    if dtype != "uint8" and not (is_tensor and source.is_floating_point()):
        also = ", or floats in [0, 1]" if is_tensor else ""
        raise InputError(f"an image given as {name} of {dtype}: expected uint8 (0 to 255){also}")


def _to_bytes(source: Any) -> np.ndarray:
    """Turn a checked array or tensor into `uint8[height, width]` or `uint8[height, width, 3 or 4]`."""
    values = source
    if _is_tensor(source):
        values = source.detach().cpu()
        if values.is_floating_point():
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise InputError(
                    "an image given as a tensor of floats: values outside [0, 1]; give the image as it was before it "
                    "was normalised"
                )
            values = (values.float() * 255).round().byte()
        values = values.numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    return np.ascontiguousarray(values)
