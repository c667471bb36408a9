"""Image files decoded without trust: the header is read first, so that no picture makes the process run out of memory.

Every source of training faces decodes here. A JPEG, PNG, BMP, WebP or TIFF file says how large its picture is within
its first bytes; that is checked in a few microseconds before OpenCV allocates anything.
"""

import io
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np

from lrface.errors import LrfaceError

Encoded = bytes | memoryview | np.ndarray
"""An image file in memory; arrays are uint8 [n]."""

MAX_PIXELS = 16 << 20
"""Most pixels of a picture that is decoded, 4096 x 4096: OpenCV's PNG decoder takes up to 32 bytes for each."""
MAX_SCANS = 200
"""Most passes of a progressive JPEG; real ones have about ten, and each costs as much as the whole picture."""


_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD9)))  # markers without content; 0xff is filling


class BrokenImage(ValueError):
    """The bytes are no image that can be decoded; the message is the reason, without a place."""


class ImageHeader(NamedTuple):
    """What an image file says of itself: its format ("jpeg", "png", "bmp", "webp", "tiff") and size in pixels."""

    format: str
    height: int
    width: int


def read_header(data: Encoded) -> ImageHeader:
    """Format and size of an image file, from its first bytes.

    Raises:
        BrokenImage: no known format, a damaged header, or no pixels.
    """
    view = (
        data if isinstance(data, memoryview) else memoryview(data) if isinstance(data, bytes) else data.data
    )
    try:
        header = _read_header(view)
    except (struct.error, IndexError):
        raise BrokenImage(f"its header is cut off ({len(view)} bytes)") from None
    if header.height < 1 or header.width < 1:
        raise BrokenImage(f"its header says {header.width}x{header.height} pixels")
    return header


def _read_header(view: memoryview) -> ImageHeader:
    start = bytes(view[:32])
    if start.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(view)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        if start[12:16] != b"IHDR":
            raise BrokenImage("it is a PNG file without its header chunk")
        width, height = struct.unpack_from(">II", start, 16)
        _check_chunks(view)
        return ImageHeader("png", height, width)
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _read_webp(start)
    if start.startswith(b"BM"):
        if struct.unpack_from("<I", start, 14)[0] == 12:
            width, height = struct.unpack_from("<HH", start, 18)
        else:
            width, height = map(abs, struct.unpack_from("<ii", start, 18))
        return ImageHeader("bmp", height, width)
    if start.startswith((b"II*\0", b"MM\0*")):
        return _read_tiff(view)
    if not len(view):
        raise BrokenImage("it is empty")
    raise BrokenImage(f"it is no JPEG, PNG, BMP, WebP or TIFF file (it starts with {start[:8].hex(' ')})")


def _check_chunks(view: memoryview) -> None:
    """Refuse a PNG with a chunk that is longer than the file: OpenCV allocates what the chunk says, up to 2 GB."""
    position, length = 8, len(view)
    while position + 12 <= length:
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if end > length:
            raise BrokenImage("it is a PNG file with a chunk that ends behind it (damaged or cut off)")
        if view[position + 4 : position + 8] == b"IEND":
            return
        position = end


def _read_jpeg(view: memoryview) -> ImageHeader:
    # The frame header is nearly always within the first bytes, and bytes are read faster than a view.
    head = bytes(view[:1024])
    found = _find_frame(head)
    if found is None and len(view) > len(head):
        head = bytes(view)
        found = _find_frame(head)
    if found is None:
        raise BrokenImage("it is a JPEG file without a frame header (damaged or cut off)")
    kind, height, width = found
    # Progressive files come in passes; a forged one repeats empty passes to burn time.
    if kind in (0xC2, 0xC6, 0xCA, 0xCE) and bytes(view).count(b"\xff\xda") > MAX_SCANS:
        raise BrokenImage(f"it is a progressive JPEG of more than {MAX_SCANS} passes")
    return ImageHeader("jpeg", height, width)


def _find_frame(data: bytes) -> tuple[int, int, int] | None:
    """(marker, height, width) of the first frame header."""
    # Segments follow each other: 0xff, kind, length of what follows with the length itself.
    position, last = 2, len(data) - 9
    while position <= last:
        kind = data[position + 1]
        if data[position] != 0xFF:  # decoders skip what is no marker
            position = data.find(b"\xff", position)
            if position < 0:
                return None
        elif kind in _FRAMES:
            return (
                kind,
                data[position + 5] << 8 | data[position + 6],
                data[position + 7] << 8 | data[position + 8],
            )
        elif kind in _BARE:
            position += 1 if kind == 0xFF else 2
        elif kind in (0xD9, 0xDA):
            return None
        else:
            position += 2 + max(2, data[position + 2] << 8 | data[position + 3])
    return None


def _read_webp(start: bytes) -> ImageHeader:
    kind = start[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", start, 26))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", start, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width = int.from_bytes(start[24:27], "little") + 1
        height = int.from_bytes(start[27:30], "little") + 1
    else:
        raise BrokenImage("it is a WebP file of an unknown kind")
    return ImageHeader("webp", height, width)


def _read_tiff(view: memoryview) -> ImageHeader:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is judged by size and by decoding
            with Image.open(io.BytesIO(view), formats=("TIFF",)) as image:
                width, height = image.size
    except Exception as error:  # Pillow raises whatever a damaged directory leads to
        raise BrokenImage(f"it is a damaged TIFF file ({error})") from None
    return ImageHeader("tiff", height, width)


def decode(data: Encoded, max_pixels: int = MAX_PIXELS, reduced: int = 1) -> np.ndarray:
    """An image file as uint8 [h, w, 3], RGB; grey becomes three equal channels, transparency is dropped.

    Args:
        max_pixels: most pixels of a side times the other.
        reduced: 2, 4 or 8 decode a JPEG at a half, a quarter or an eighth of its size, rounded up. It may then have four
            times ``max_pixels``: a progressive one is held whole in memory all the same.

    Raises:
        BrokenImage: no image, damaged beyond decoding, or too large.
    """
    header = read_header(data)
    if header.format != "jpeg":
        reduced = 1
    if header.height * header.width > max_pixels * min(reduced, 2) ** 2:
        raise BrokenImage(
            f"it is {header.width}x{header.height} pixels large, more than the {max_pixels >> 20} megapixels allowed"
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS[reduced])
    except (cv2.error, MemoryError) as error:
        raise BrokenImage(
            f"its {header.format} data cannot be decoded ({getattr(error, 'err', error)})"
        ) from None
    if image is None or image.ndim != 3:
        raise BrokenImage(f"its {header.format} data cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class EncodedFaces:
    """What sources of image files share: ``image(index)`` from ``encoded(index)``."""

    repair = "Remove it or copy the data anew"
    """What to do about a broken image."""

    def encoded(self, index: int) -> bytes:
        """The image file ``index`` as it is stored."""
        raise NotImplementedError

    def view(self, index: int) -> Encoded:
        """The same without a copy, where the format allows."""
        return self.encoded(index)

    def place(self, index: int) -> str:
        """Where image ``index`` lies, for messages."""
        raise NotImplementedError

    def image(self, index: int) -> np.ndarray:
        """Image ``index`` decoded: uint8 [h, w, 3], RGB. Raises LrfaceError naming the place if it is broken."""
        try:
            return decode(self.view(index))
        except BrokenImage as error:
            raise LrfaceError(
                f"{self.place(index)} is not a readable image: {error}. {self.repair}"
            ) from error
