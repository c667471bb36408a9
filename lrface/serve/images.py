"""Uploaded bytes to pixels, without trust: type and size by the header first, then decoding in a worker's thread."""

import io

import numpy as np
from PIL import Image

from lrface.align.pipeline import UnreadableImage, read_photo
from lrface.data.decode import BrokenImage, read_header
from lrface.serve.limits import Refused

Image.init()  # every decoder is there before threads use them
_PILLOW = ("JPEG", "PNG", "WEBP")


def check_header(data: bytes, number: int, max_pixels: int) -> int:
    """How many pixels the image file ``data`` says it has, read from its first bytes.

    Args:
        number: of the image in the request, from 1, for messages.

    Raises:
        Refused: 422 for no bytes or a damaged header, 415 for another type than JPEG, PNG and WebP, 413 for more pixels
            than ``max_pixels``.
    """
    if not data:
        raise Refused(422, "empty", f"image {number} has 0 bytes")
    known = data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (data[:4], data[8:12]) == (
        b"RIFF",
        b"WEBP",
    )
    if not known:
        raise Refused(415, "wrong_type", f"image {number} is no JPEG, PNG or WebP file by its first bytes")
    try:
        header = read_header(data)
    except BrokenImage as error:
        raise Refused(422, "unreadable", f"image {number} cannot be read: {error}") from None
    pixels = header.height * header.width
    _check_pixels(header.width, header.height, number, max_pixels)
    return pixels


def decode_image(data: bytes, number: int, max_pixels: int) -> np.ndarray:
    """uint8 [h, w, 3] RGB, upright. Raises Refused: 422 for what does not decode whole, 413 for too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW) as image:
            # Files can say one size in two places: this is the one that Pillow will allocate.
            _check_pixels(*image.size, number, max_pixels)
            return read_photo(image)
    except UnreadableImage as error:
        raise Refused(422, "unreadable", f"image {number} cannot be read: {error.reason}") from None
    except Refused:
        raise
    except Exception as error:  # decoders meet arbitrary bytes and raise nearly anything
        raise Refused(
            422,
            "unreadable",
            f"image {number} cannot be read: its header is damaged ({type(error).__name__})",
        ) from None


def _check_pixels(width: int, height: int, number: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Refused(
            413,
            "too_many_pixels",
            f"image {number} is {width} x {height} pixels large; at most {max_pixels} are taken",
        )
