"""Read an image from a file or a URL, completely and as RGB, or fail with one line that says why; scale large images.

All that users have is read here: CMYK photographs, 16-bit scans, palettes, transparency, photographs that only an EXIF
tag turns upright, files cut off while downloading, files with the wrong extension. `llava.mm_utils` does the geometry
(padding, cropping, crops of a larger image); `scale_window` does it for images whose padded or scaled copy would not
fit into memory.
"""

import base64
import http
import http.client
import os
import re
import socket
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava.errors import InputError
from llava.files import parse_natural, read_bytes

Size = tuple[int, int]

MAX_SIDE = 2**18
"""Longest side in pixels; no camera or scanner makes more, and a file of a few bytes can claim it."""

FILE_BYTES = 2**31

SHOWN_LETTERS = 60
"""Of an address that is refused; one of `data:` may be megabytes long."""

DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**16

# 65535 / 257 is 255: the exact ratio of the full scales of 16 and 8 bit.
_SIXTEEN_TO_EIGHT_BIT = 257
_SIXTEEN_BIT_FILES = ("PPM",)
"""Files, by Pillow's names, whose 16-bit grey Pillow opens in mode "I"; it does not scale any other "I" to 16 bit."""


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


@dataclass(frozen=True)
class Trust:
    """How far the source of an image is trusted: a user's own command reads anything, a server for others does not.

    Attributes:
        max_pixels: largest width times height; None: Pillow's limit.
        formats: file formats that are read, by Pillow's names; None: all.
        connect: makes the connections of a download, in place of `socket.create_connection`; raises OSError where it
            refuses to. It is asked at every redirect. With one, proxies that the environment names are not used.
    """

    max_pixels: int | None = None
    formats: tuple[str, ...] | None = None
    connect: Callable[..., socket.socket] | None = None


FULL_TRUST = Trust()


def load_image(source: str | Path | EmbeddedImage, upright: bool = False, trust: Trust = FULL_TRUST) -> Image.Image:
    """Read one image completely.

    Args:
        source: path of a file, an http(s) address, or an embedded image.
        upright: rotate the image as its EXIF tag says. False keeps the stored pixels, as LLaVA's evaluation does.
        trust: what is read of this source.

    Returns:
        The first frame in mode RGB. Transparency is dropped, not blended (parity: `convert("RGB")`); 16-bit grey is
        scaled to 8 bit (the released code clips it to white).

    Raises:
        InputError: no such file, not an image, damaged, too large, or the download failed. The line holds nothing that
            a server sent, and of an address neither user name nor query.
    """
    address = str(source)
    if isinstance(source, EmbeddedImage):
        content = _refuse_empty(source.content, address)
    elif address.lower().startswith(("http://", "https://")):
        content, address = _download(address, trust.connect), _hide_secrets(address)
    else:
        check_path(address)
        content = _refuse_empty(read_bytes(Path(source), limit=FILE_BYTES), address)
    with _explain_damage(address, trust.formats), Image.open(BytesIO(content), formats=trust.formats) as image:
        return _read_pixels(image, address, upright, trust.max_pixels)


def check_path(address: str) -> None:
    """Refuse what is no file's path by its looks.

    Raises:
        InputError: it is empty, or an address of another kind than http(s).
    """
    if not address:
        raise InputError("the path of an image is empty: give a file or an http(s) address")
    scheme = re.match(r"data:|[a-z][a-z0-9+.-]*://", address, re.IGNORECASE)
    if scheme and not os.path.exists(address):
        shown = address if len(address) <= SHOWN_LETTERS else f"{address[:SHOWN_LETTERS]}..."
        raise InputError(f"image {shown}: {scheme[0]} is not read; give the path of a file or an http(s) address")


def _refuse_empty(content: bytes, address: str) -> bytes:
    if not content:
        raise InputError(f"image {address}: the file is empty")
    return content


def _hide_secrets(address: str) -> str:
    """Return an address without user name, password, query and fragment: they may be keys."""
    parts = re.match(r"(https?://)(?:[^/?#]*@)?([^/?#]*)([^?#]*)", address, re.IGNORECASE | re.DOTALL)
    scheme, host, path = parts.groups()
    # "user:pass?word@host" has its host behind the question mark.
    is_host = re.fullmatch(r"\[?[^\[\]:]*|\[[0-9a-f:.%]*\]", re.sub(r":\d*$", "", host), re.IGNORECASE)
    return scheme + (host + path if is_host else "...")


def _download(address: str, connect: Callable[..., socket.socket] | None) -> bytes:
    """Download within the limits of time and size.

    One limit of time covers everything: looking up names, connecting, redirects, headers that trickle, the content. The
    standard library limits single reads only, so a thread does the work, and is left behind when the time is up.
    """
    download = _Download(address, connect)
    threading.Thread(target=download.run, daemon=True).start()
    try:
        if not download.ended.wait(DOWNLOAD_SECONDS):
            raise InputError(
                f"image {_hide_secrets(address)}: download failed (timed out after {DOWNLOAD_SECONDS:g} seconds)"
            )
    finally:
        download.abandon()
    if download.fault:
        raise InputError(f"image {_hide_secrets(address)}: {download.fault}")
    return bytes(download.content)


class _Download:
    """One download; what goes wrong is kept for the thread that waits.

    Attributes:
        ended: set when there is nothing more to wait for.
        content: what has arrived.
        fault: why there is no image, without anything that the server sent: it may hold keys and control characters.
    """

    def __init__(self, address: str, connect: Callable[..., socket.socket] | None = None):
        self.ended = threading.Event()
        self.content = bytearray()
        self.fault: str | None = None
        self._address = address
        self._connect = connect
        self._is_abandoned = False
        self._connections: list[http.client.HTTPConnection] = []

    def run(self) -> None:
        try:
            self.fault = self._read()
        except urllib.error.HTTPError as error:
            self.fault = f"download failed ({_describe_status(error.code)})"
        except http.client.InvalidURL:
            self.fault = "download failed (not a valid address)"
        except http.client.HTTPException as error:
            self.fault = f"download failed (the answer is not HTTP: {type(error).__name__})"
        except OSError as error:
            self.fault = f"download failed ({error.reason if isinstance(error, urllib.error.URLError) else error})"
        except ValueError:
            self.fault = "download failed (not a valid address)"
        except MemoryError:
            self.fault = "download failed (it does not fit into memory)"
        finally:
            self.ended.set()

    def abandon(self) -> None:
        """Make the thread end soon, whatever it waits for."""
        self._is_abandoned = True
        for connection in self._connections:
            with suppress(OSError, AttributeError):  # closed, or not yet connected
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _read(self) -> str | None:
        """Fill `content`; return what is wrong with it."""
        if re.match(r"https?://[^/?#]*@", self._address, re.IGNORECASE):
            return "an address with a user name or a password is not supported"
        handlers = [_PlainHandler(self._note), _SecureHandler(self._note), _RedirectHandler()]
        if self._connect:
            handlers.append(urllib.request.ProxyHandler({}))
        opener = urllib.request.build_opener(*handlers)
        request = urllib.request.Request(self._address, headers={"User-Agent": "llava"})
        with opener.open(request, timeout=DOWNLOAD_SECONDS) as response:
            while not self._is_abandoned and (chunk := response.read1(_CHUNK_BYTES)):
                self.content += chunk
                if len(self.content) > DOWNLOAD_BYTES:
                    return f"larger than {DOWNLOAD_BYTES // 2**20} MiB"
            expected = response.headers.get("Content-Length", "")
        if len(self.content) < (parse_natural(expected) or 0):
            return f"download ended after {len(self.content)} of {expected} bytes"
        return None if self.content else "the response is empty"

    def _note(self, connection: http.client.HTTPConnection) -> None:
        """Prepare a connection that is going to be made, and keep it: another thread can then shut it down."""
        if self._connect:
            connection._create_connection = self._connect
        self._connections.append(connection)


class _NotingHandler(urllib.request.AbstractHTTPHandler):
    """Shows each connection to a function before it is made."""

    def __init__(self, note: Callable[[http.client.HTTPConnection], None]):
        super().__init__()
        self._note = note

    def do_open(
        self, http_class: Callable[..., http.client.HTTPConnection], req: urllib.request.Request, **options: object
    ) -> http.client.HTTPResponse:
        def connect(*args: object, **more: object) -> http.client.HTTPConnection:
            connection = http_class(*args, **more)
            self._note(connection)
            return connection

        return super().do_open(connect, req, **options)


class _PlainHandler(_NotingHandler, urllib.request.HTTPHandler):
    """For http://."""


class _SecureHandler(_NotingHandler, urllib.request.HTTPSHandler):
    """For https://."""


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Does not read the content of a redirect, which may never end, and follows none to another scheme, such as ftp."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: http.client.HTTPResponse,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()
        if not newurl.lower().startswith(("http://", "https://")):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _describe_status(code: int) -> str:
    """Describe a status in the standard's words, not in the server's."""
    if 300 <= code < 400:
        return f"{code}, redirected too often or to no web address"
    names = {status.value: status.phrase for status in http.HTTPStatus}
    return f"{code} {names.get(code, '')}".strip()


def read_image(image: Image.Image, address: str, upright: bool = False) -> Image.Image:
    """Read an image that Pillow has opened already.

    Args:
        image: of any mode; it stays open, and its pixels stay as they are.
        address: how an error names it.
        upright: rotate it as its EXIF tag says.

    Returns:
        A new image of mode RGB.

    Raises:
        InputError: damaged, or too large.
    """
    with _explain_damage(address):
        return _read_pixels(image, address, upright)


def _read_pixels(image: Image.Image, address: str, upright: bool, max_pixels: int | None = None) -> Image.Image:
    if max(image.size) > MAX_SIDE:
        raise InputError(f"image {address}: {image.width} x {image.height} pixels; a side has {MAX_SIDE:,} at most")
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise InputError(f"image {address}: {image.width} x {image.height} pixels; at most {max_pixels:,} are taken")
    image.load()
    return to_rgb(ImageOps.exif_transpose(image) if upright else image, address, image.format)


@contextmanager
def _explain_damage(address: str, formats: tuple[str, ...] | None = None) -> Iterator[None]:
    """Raise one line for everything that can go wrong with the pixels of an image."""
    try:
        with warnings.catch_warnings():
            # Images between Pillow's warning and its error limit are large but fine.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except UnidentifiedImageError:
        known = f" ({', '.join(formats)})" if formats else ""
        raise InputError(f"image {address}: not an image in a known format{known}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"image {address}: more than {limit:,} pixels, refused as a decompression bomb") from None
    except MemoryError:
        raise InputError(f"image {address}: does not fit into memory; make it smaller") from None
    except Exception as error:
        # On damaged bytes decoders raise nearly anything (OSError, SyntaxError, struct.error, IndexError, ...); the
        # cause is always the file.
        raise InputError(f"image {address}: damaged or truncated ({error})") from error


def to_rgb(image: Image.Image, address: str = "given as an object", file_format: str | None = None) -> Image.Image:
    """Convert an image of any mode to RGB.

    Mode "I;16", of PNG, TIFF and JPEG 2000 files or made in memory, is 16-bit grey: white is 65,535. Mode "I", whole
    numbers of 32 bit, has this scale in a PGM file, where Pillow sees to it, and no known one elsewhere.

    Args:
        image: not changed.
        address: how an error names it.
        file_format: of the file that it comes from, by Pillow's name; None: as the image says. Copies do not say.

    Raises:
        InputError: pixel values without a known scale.
    """
    if image.mode == "F":
        raise InputError(f"image {address}: floating-point pixels have no known scale; save it with 8 or 16 bit")
    if image.mode == "I" and (file_format or image.format) not in _SIXTEEN_BIT_FILES:
        raise InputError(
            f'image {address}: whole numbers of 32 bit (mode "I") have no known scale; make it 8 bit (mode "L") or 16 '
            'bit (mode "I;16")'
        )
    if image.mode.startswith("I"):
        image = _scale_to_eight_bit(image)
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as converting directly, without Pillow's warning about per-entry transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_to_eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey so that full white stays full white."""
    values = np.asarray(image)
    rounded = (values.astype(np.uint32) + _SIXTEEN_TO_EIGHT_BIT // 2) // _SIXTEEN_TO_EIGHT_BIT
    return Image.fromarray(rounded.astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------- scaling
@dataclass(frozen=True)
class Kernel:
    """An interpolation filter.

    Attributes:
        radius: in output pixels (in source pixels where an image is enlarged).
        weigh: weights of distances, float64[n] each.
    """

    radius: float
    weigh: Callable[[np.ndarray], np.ndarray]


def _weigh_linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _weigh_cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


KERNELS = {
    Image.Resampling.BILINEAR: Kernel(1, _weigh_linear),
    Image.Resampling.BICUBIC: Kernel(2, _weigh_cubic),
}
"""The filters that `scale_window` knows."""

# Pillow weighs 8-bit pixels with whole numbers, of which this one is 1.
_ONE = 2.0**22
_BLOCK_VALUES = 2**21
"""Values of the source, or weights, that are worked on at once: 16 MiB in float64."""
_BLOCK_OUTPUTS = 16


class _Axis:
    """How one side of a canvas is scaled: the weight of each source pixel in each output pixel.

    Pillow's `resize` scales the rows first, rounds to 8 bit, then scales the columns, with weights rounded to multiples
    of 2**-22. Here these weights are float64 whole numbers, so sums of products are exact in any order.
    """

    def __init__(self, length: int, size: int, window: Size, inside: Size, kernel: Kernel):
        """Find the output pixels that read anything of the image, and what they read.

        Args:
            length: of the canvas.
            size: of the scaled canvas.
            window: (first, after last) output pixel that is wanted.
            inside: (first, after last) source pixel of the image; all others have the canvas's colour.
            kernel: the filter.
        """
        scale = length / size
        self.stretch = max(scale, 1.0)
        self._kernel = kernel
        centers = (np.arange(*window) + 0.5) * scale
        reach = kernel.radius * self.stretch
        lows = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
        highs = np.minimum((centers + reach + 0.5).astype(np.int64), length)
        touched = np.flatnonzero((lows < inside[1]) & (highs > inside[0]))
        self.first, self.count = int(touched[0]) if len(touched) else 0, len(touched)
        self._centers, self._lows, self._highs = centers[touched], lows[touched], highs[touched]
        self._inside = inside
        self.rest = np.zeros(self.count)  # weight of the canvas's colour
        self._sums = np.ones(self.count)
        for output in range(self.count):
            low, high = int(self._lows[output]), int(self._highs[output])
            # Added up one by one, as Pillow does: the order decides the last bit.
            self._sums[output] = np.cumsum(self._weigh(output, low, high))[-1]
            if low < inside[0] or high > inside[1]:
                inner = self._round(output, max(low, inside[0]), min(high, inside[1]))
                self.rest[output] = self._round(output, low, high).sum() - inner.sum()
        # Neighbours read much in common; very long filters are taken one by one.
        self._step = max(1, int(min(_BLOCK_OUTPUTS / min(scale, 1.0), _BLOCK_VALUES / (_BLOCK_OUTPUTS * self.stretch))))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Cut the touched output pixels into (first, after last), few enough that their weights fit into memory."""
        for first in range(0, self.count, self._step):
            yield first, min(first + self._step, self.count)

    def span(self, first: int, last: int) -> Size:
        """Return (first, after last) source pixel of the image that some output pixels read."""
        low, high = int(self._lows[first]), int(self._highs[last - 1])
        return max(low, self._inside[0]), min(high, self._inside[1])

    def readers(self, low: int, high: int) -> Size:
        """Return (first, after last) output pixel that reads some source pixels."""
        return int(np.searchsorted(self._highs, low, "right")), int(np.searchsorted(self._lows, high, "left"))

    def weights(self, outputs: Size, span: Size) -> np.ndarray:
        """Return float64[outputs, span], in multiples of 2**-22."""
        matrix = np.zeros((outputs[1] - outputs[0], span[1] - span[0]))
        for output in range(*outputs):
            low, high = max(int(self._lows[output]), span[0]), min(int(self._highs[output]), span[1])
            matrix[output - outputs[0], low - span[0] : high - span[0]] = self._round(output, low, high)
        return matrix

    def _weigh(self, output: int, low: int, high: int) -> np.ndarray:
        distance = (np.arange(low, high) - self._centers[output] + 0.5) * (1.0 / self.stretch)
        return self._kernel.weigh(np.abs(distance))

    def _round(self, output: int, low: int, high: int) -> np.ndarray:
        shares = self._weigh(output, low, high) / self._sums[output]
        return np.trunc(shares * _ONE + np.copysign(0.5, shares))


def _to_eight_bit(sums: np.ndarray) -> np.ndarray:
    return np.clip(np.floor((sums + _ONE / 2) / _ONE), 0, 255)


def scale_window(
    image: Image.Image,
    size: Size,
    window: tuple[int, int, int, int],
    *,
    canvas: Size | None = None,
    color: tuple[int, ...] = (0, 0, 0),
    resample: int = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Center an image on a canvas, scale the canvas, and cut out a window, without ever making any of the two.

    The pixels are those of `Image.resize`, bit for bit, as long as a filter reads less than 16,448 source pixels a side
    (that is up to a side of 345,000 pixels scaled to 84 by "bicubic"); memory and time follow the image's own pixels.

    Args:
        image: mode RGB.
        size: (width, height) of the scaled canvas.
        window: (left, top, right, bottom) of what is wanted of it.
        canvas: (width, height), not smaller than the image; None: the image's own size.
        color: RGB of the canvas.
        resample: a filter in `KERNELS`.

    Returns:
        The window, mode RGB.
    """
    canvas, kernel = canvas or image.size, KERNELS[Image.Resampling(resample)]
    left, top = (canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2
    columns = _Axis(canvas[0], size[0], window[0::2], (left, left + image.width), kernel)
    rows = _Axis(canvas[1], size[1], window[1::2], (top, top + image.height), kernel)
    scaled = np.empty((window[3] - window[1], window[2] - window[0], len(color)), dtype=np.uint8)
    scaled[:] = color
    if not rows.count:
        return Image.fromarray(scaled)
    # 1. A block of output columns reads a vertical strip of the image, a few rows at a time.
    for block in columns.blocks():
        strip, lines = columns.span(*block), rows.span(0, rows.count)
        across = columns.weights(block, strip).T  # [strip, block]
        sums = np.zeros((len(color), rows.count, block[1] - block[0]))
        # Neither a part of the strip, nor its scaled rows, nor its weights in the output rows exceed the limit.
        across_limit = _BLOCK_VALUES // max(across.shape)
        step = max(1, min(across_limit, int((_BLOCK_VALUES * rows.stretch) ** 0.5)))
        for start in range(lines[0], lines[1], step):
            part = (start, min(start + step, lines[1]))
            outputs = rows.readers(*part)
            down = rows.weights(outputs, part)  # [outputs, part]
            source = image.crop((strip[0] - left, part[0] - top, strip[1] - left, part[1] - top))
            for band, values in enumerate(source.split()):
                # 2. Along the rows, rounded to 8 bit; then its share of each output row.
                narrow = np.asarray(values, dtype=np.float64) @ across + color[band] * columns.rest[slice(*block)]
                sums[band, slice(*outputs)] += down @ _to_eight_bit(narrow)
        # 3. The canvas above and below.
        sums += np.multiply.outer(color, rows.rest)[:, :, None]
        target = scaled[rows.first : rows.first + rows.count, columns.first + block[0] : columns.first + block[1]]
        target[:] = np.moveaxis(_to_eight_bit(sums), 0, 2)
    return Image.fromarray(scaled)


def to_data_url(image: Image.Image, kind: str = "PNG", **options: object) -> str:
    """Put an image into a `data:` address.

    Args:
        image: in a mode that the kind of file takes.
        kind: "PNG" or "JPEG".
        options: of Pillow's `save`.
    """
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
