"""Decoding without trust: headers against what OpenCV and Pillow make of the same bytes, and pictures that are traps."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from lrface.data import decode as module
from lrface.data.decode import BrokenImage, ImageHeader, decode, read_header


def pixels(height=13, width=22):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(kind, image=None, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels() if image is None else image).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0" + b"M" * 3000, "comment": b"\xff\xc0" * 10}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
        ("TIFF", {}),
    ],
)
def test_headers_and_pixels(kind, options):
    data = encoded(kind, **options)
    name = {"JPEG": "jpeg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "TIFF": "tiff"}[kind]
    assert read_header(data) == ImageHeader(name, 13, 22)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    for form in (data, memoryview(data), np.frombuffer(data, np.uint8)):
        np.testing.assert_array_equal(decode(form), expected)
    if kind in ("PNG", "BMP", "TIFF") or options.get("lossless"):
        np.testing.assert_array_equal(decode(data), pixels())


def test_grey_and_transparent_pictures_have_three_channels():
    grey = np.full((4, 5), 77, np.uint8)
    assert (decode(encoded("PNG", grey)) == 77).all() and decode(encoded("JPEG", grey)).shape == (4, 5, 3)
    clear = np.dstack([pixels(), np.zeros((13, 22), np.uint8)])
    np.testing.assert_array_equal(decode(encoded("PNG", clear)), pixels())


def test_headers_of_old_and_upside_down_bitmaps():
    data = bytearray(encoded("BMP"))
    struct.pack_into("<i", data, 22, -13)
    assert read_header(bytes(data)) == ImageHeader("bmp", 13, 22)
    old = b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 22, 13, 1, 24)
    assert read_header(old) == ImageHeader("bmp", 13, 22)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_cut_off_headers(kind):
    data = encoded(kind)
    for length in (1, 2, 3, 4, 8, 11, 12, 15, 16, 20, 23):
        with pytest.raises(BrokenImage):
            read_header(data[:length])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "it is empty"),
        (b"hello world", "it is no JPEG, PNG, BMP, WebP or TIFF file .it starts with 68 65"),
        (b"GIF89a" + bytes(50), "it is no JPEG"),
        (b"\xff\xd8\xff\xd9" + bytes(20), "without a frame header"),
        (b"\xff\xd8\xff\xe0\xff\xff" + bytes(20), "without a frame header"),
        (encoded("PNG")[:12] + b"IDAT" + bytes(30), "without its header chunk"),
        (b"II*\0" + bytes(40), "damaged TIFF"),
    ],
)
def test_what_is_no_image_is_refused_by_its_header(data, message):
    with pytest.raises(BrokenImage, match=message):
        decode(data)


def with_size(kind, width, height):
    """An image that says it is another size."""
    data = bytearray(encoded(kind))
    if kind == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


@pytest.mark.parametrize("kind, side", [("PNG", 100_000), ("JPEG", 65_535), ("BMP", 60_000)])
def test_bombs_are_refused_before_they_are_decoded(kind, side, monkeypatch):
    monkeypatch.setattr(module.cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(BrokenImage, match=f"{side}x{side} pixels large, more than the 16 megapixels"):
        decode(with_size(kind, side, side))
    with pytest.raises(BrokenImage, match="0x7 pixels"):
        decode(with_size(kind, 0, 7))


def test_a_long_narrow_picture_is_no_bomb():
    tall = np.random.default_rng(0).integers(0, 256, (100_000, 1, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encoded("PNG", tall)), tall)


def test_chunks_longer_than_the_file_are_refused(monkeypatch):
    data = bytearray(encoded("PNG"))
    struct.pack_into(">I", data, 33, 0xC7000000)  # OpenCV would allocate 3 GB and take 20 seconds
    monkeypatch.setattr(module.cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(BrokenImage, match="a chunk that ends behind it"):
        decode(bytes(data))


def test_thousands_of_passes_are_refused(monkeypatch):
    data = encoded("JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff", start + 14)
    forged = data[:end] + data[start:end] * 300 + data[end:]
    monkeypatch.setattr(module.cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(BrokenImage, match="more than 200 passes"):
        decode(forged)


def test_damaged_pictures_are_refused_whatever_opencv_raises(monkeypatch):
    data = bytearray(encoded("PNG"))
    data[60:90] = bytes(30)
    with pytest.raises(BrokenImage, match="its png data cannot be decoded"):
        decode(bytes(data))

    def fail(*_):
        raise cv2.error("no memory")

    monkeypatch.setattr(module.cv2, "imdecode", fail)
    with pytest.raises(BrokenImage, match="its png data cannot be decoded"):
        decode(encoded("PNG"))
