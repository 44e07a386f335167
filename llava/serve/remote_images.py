"""The images of a request: a data URL, a web address, or, where the server allows it, a file of the server.

Whoever sends an address makes this server connect to it. So an address is looked up here, every address it has must be
public, and the connection goes to the very address that was checked: a name that points elsewhere a moment later, and a
redirect into the server's own network, find the same check.
"""

import base64
import binascii
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from llava.errors import InputError
from llava.image import EmbeddedImage, Trust, load_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What clients send. Pillow reads many more formats, some by other programs."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE | re.ASCII)
# These hold an IPv4 address that a gateway may connect to: 6to4, Teredo, and NAT64 of both kinds.
_TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48")))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    Loopback, private, shared, link-local, multicast and reserved addresses are not, nor is an IPv6 address that carries
    an IPv4 address which is not, or which a tunnel would reach.

    Args:
        address: as `socket.getaddrinfo` returns it.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return is_public(str(found.ipv4_mapped))
        if any(found in network for network in _TUNNELS):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def connect_to_public(
    address: tuple[str, int], timeout: float | None = None, source_address: tuple[str, int] | None = None
) -> socket.socket:
    """Connect as `socket.create_connection` does, to a public address alone.

    Raises:
        OSError: one of the host's addresses is not public, or none answers.
    """
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    if not all(is_public(place[0]) for *_, place in found):
        raise OSError("the address is not public: this server does not connect to it")
    failure = OSError("the host has no address")
    for *_, place in found:
        try:
            # A numeric address is not looked up again.
            return socket.create_connection(place[:2], timeout, source_address)
        except OSError as error:
            failure = error
    raise failure


@dataclass(frozen=True)
class ImageReader:
    """Reads the images that requests name.

    Attributes:
        max_pixels: largest width times height.
        files: folder whose files may be named by `file://`; None: no file may.
        is_private_allowed: whether addresses of private networks and of this machine are read as well.
    """

    max_pixels: int
    files: Path | None = None
    is_private_allowed: bool = False

    def read(self, url: str, name: str) -> Image.Image:
        """Read an image, turned upright, as RGB.

        Args:
            url: `data:image/...;base64,...`, an http(s) address, or `file:///...`.
            name: how messages name an image that has no address, such as `messages[0].content[1]`.

        Raises:
            InputError: it is none of these, is refused, or cannot be read. The line never holds the image's content.
        """
        scheme = url[:16].partition(":")[0].lower()
        if scheme in ("http", "https"):
            connect = None if self.is_private_allowed else connect_to_public
            return load_image(url, upright=True, trust=Trust(self.max_pixels, FORMATS, connect))
        trust = Trust(self.max_pixels, FORMATS)
        if scheme == "data":
            return load_image(EmbeddedImage(name, _decode(url, name)), upright=True, trust=trust)
        if scheme == "file":
            return load_image(self._find_file(url), upright=True, trust=trust)
        raise InputError(f"image {name}: expected an address that begins with data:image/, https:// or http://")

    def _find_file(self, url: str) -> Path:
        """Return the path of a file URL; of files outside the folder not even whether they exist is told."""
        if self.files is None:
            raise InputError("file:// is not allowed here: the server's option --allow-files DIR allows a folder")
        if not url.lower().startswith(("file:///", "file://localhost/")):
            raise InputError("file://: write file:///path, with three slashes")
        try:
            path = os.path.realpath(unquote(urlsplit(url).path))
        except ValueError:  # a null byte, or half of a surrogate pair
            path = os.sep
        if not Path(path).is_relative_to(os.path.realpath(self.files)):
            raise InputError("file://: this file is outside the folder that --allow-files allows")
        return Path(path)


def _decode(url: str, name: str) -> bytes:
    start = _DATA_URL.match(url)
    if not start:
        raise InputError(f"image {name}: a data URL begins with data:image/png;base64, or another type of image")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"image {name}: the data URL is not base64 ({error})") from None
