"""Read an image from a file or a URL, completely and as RGB, or fail with one line that says why.

All that users have is read here: CMYK photographs, 16-bit scans, palettes, transparency, photographs that only an EXIF
tag turns upright, files cut off while downloading, files with the wrong extension. `llava.mm_utils` does the geometry
(padding, cropping, crops of a larger image).
"""

import http.client
import time
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava.errors import InputError
from llava.files import read_bytes

DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**16

# 65535 / 257 is 255: the exact ratio of the full scales of 16 and 8 bit.
_SIXTEEN_TO_EIGHT_BIT = 257
_SIXTEEN_BIT_MAX = 2**16 - 1


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside another file, such as a cell of MMBench's table.

    Attributes:
        name: how a message names it, such as `mmbench_dev_20230712.tsv row 7`.
        content: the bytes of an image file.
    """

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def load_image(source: str | Path | EmbeddedImage, upright: bool = False) -> Image.Image:
    """Read one image completely.

    Args:
        source: path of a file, an http(s) address, or an embedded image.
        upright: rotate the image as its EXIF tag says. False keeps the stored pixels, as LLaVA's evaluation does.

    Returns:
        The first frame in mode RGB. Transparency is dropped, not blended (parity: `convert("RGB")`); 16-bit grey is
        scaled to 8 bit (the released code clips it to white).

    Raises:
        InputError: no such file, not an image, damaged, too large, or the download failed.
    """
    address = str(source)
    if isinstance(source, EmbeddedImage):
        return _decode(BytesIO(_refuse_empty(source.content, address)), address, upright)
    if address.lower().startswith(("http://", "https://")):
        return _decode(BytesIO(_download(address)), address, upright)
    return _decode(BytesIO(_refuse_empty(read_bytes(Path(source)), address)), address, upright)


def _refuse_empty(content: bytes, address: str) -> bytes:
    if not content:
        raise InputError(f"image {address}: the file is empty")
    return content


def _download(address: str) -> bytes:
    """Download within the limits of time and size; the time limit covers the whole download, not each packet."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "llava"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read1(_CHUNK_BYTES):
                content += chunk
                if len(content) > DOWNLOAD_BYTES:
                    raise InputError(f"image {address}: larger than {DOWNLOAD_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"timed out after {DOWNLOAD_SECONDS:g} seconds")
            expected = response.headers.get("Content-Length")
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        code = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise InputError(f"image {address}: download failed ({code}{reason})") from error
    if expected is not None and expected.isdecimal() and len(content) < int(expected):
        raise InputError(f"image {address}: download ended after {len(content)} of {expected} bytes")
    if not content:
        raise InputError(f"image {address}: the response is empty")
    return bytes(content)


def _decode(stream: BinaryIO, address: str, upright: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Images between Pillow's warning and its error limit are large but fine.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(stream) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image) if upright else image, address)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"image {address}: not an image in a known format") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"image {address}: more than {limit:,} pixels, refused as a decompression bomb") from None
    except Exception as error:
        # On damaged bytes decoders raise nearly anything (OSError, SyntaxError, struct.error, IndexError, ...); the
        # cause is always the file.
        raise InputError(f"image {address}: damaged or truncated ({error})") from error


def to_rgb(image: Image.Image, address: str = "given as an object") -> Image.Image:
    """Convert an image of any mode to RGB.

    Args:
        image: not changed.
        address: how an error names it.

    Raises:
        InputError: pixel values without a known scale.
    """
    if image.mode == "F":
        raise InputError(f"image {address}: floating-point pixels have no known scale; save it with 8 or 16 bit")
    if image.mode.startswith("I"):
        image = _scale_to_eight_bit(image, address)
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as converting directly, without Pillow's warning about per-entry transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_to_eight_bit(image: Image.Image, address: str) -> Image.Image:
    """Scale 16-bit grey ("I;16", or "I" as older formats give it) so that full white stays full white."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > _SIXTEEN_BIT_MAX):
        raise InputError(f"image {address}: grey values outside 0..{_SIXTEEN_BIT_MAX}; save it with 8 or 16 bit")
    rounded = (values.astype(np.uint32) + _SIXTEEN_TO_EIGHT_BIT // 2) // _SIXTEEN_TO_EIGHT_BIT
    return Image.fromarray(rounded.astype(np.uint8))
