"""Photographs that were damaged: each ends as a photograph or as a named reason, in bounded memory and time.

Mutations run in a process of their own whose address space is limited, so that an allocation without bound ends as a
failure here and not as a machine without memory. A mutation is a function of its number: any can be made again alone.
"""

import io
import json
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lrface.align.pipeline import UnreadableImage, _deep_tiff, read_photo

# Beside what importing takes: a 89-million-pixel photograph may need its pixels three times over.
MEMORY = 1 << 30
SECONDS = 10  # for one mutation


def seeds() -> list[tuple[str, bytes]]:
    """Small photographs in every common format and mode."""
    y, x = np.mgrid[:48, :64]
    colours = np.stack([x * 4, y * 5, 255 - x - y], axis=2).astype(np.uint8)
    rgb, grey = Image.fromarray(colours), Image.fromarray(colours[:, :, 0])
    layers = Image.fromarray(np.dstack([colours, (x * 4).astype(np.uint8)]))
    deep = Image.fromarray(colours[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    found = []
    for name, image, kind, options in [
        ("jpeg", rgb, "JPEG", {"quality": 90, "exif": exif}),
        ("progressive", rgb, "JPEG", {"progressive": True, "quality": 60}),
        ("grey jpeg", grey, "JPEG", {}),
        ("cmyk", rgb.convert("CMYK"), "JPEG", {}),
        ("png", rgb, "PNG", {"exif": exif}),
        ("alpha", layers, "PNG", {}),
        ("palette", rgb.quantize(16), "PNG", {"transparency": 3}),
        ("deep png", deep, "PNG", {}),
        ("apng", rgb, "PNG", frames),
        ("gif", rgb.quantize(32), "GIF", {}),
        ("animated gif", rgb, "GIF", frames),
        ("tiff", rgb, "TIFF", {"exif": exif}),
        ("lzw", rgb, "TIFF", {"compression": "tiff_lzw"}),
        ("deflate", layers, "TIFF", {"compression": "tiff_deflate"}),
        ("jpeg tiff", rgb, "TIFF", {"compression": "jpeg"}),
        ("deep tiff", deep, "TIFF", {}),
        ("deep colour tiff", deep, "OpenCV", {}),
        ("float tiff", Image.fromarray((colours[:, :, 0] / 255).astype(np.float32)), "TIFF", {}),
        ("webp", rgb, "WEBP", {"exif": exif}),
        ("lossless", layers, "WEBP", {"lossless": True}),
        ("animated webp", rgb, "WEBP", frames),
        ("bmp", rgb, "BMP", {}),
    ]:
        if kind == "OpenCV":
            found.append((name, cv2.imencode(".tiff", colours.astype(np.uint16) * 257)[1].tobytes()))
            continue
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append((name, file.getvalue()))
    return found


def mutation(number: int, originals: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Damage number ``number``: bits flipped, bytes overwritten, cut, doubled or moved, two files spliced, and above
    all lengths and sizes replaced by extreme ones."""
    random = np.random.default_rng(number)
    name, original = originals[number % len(originals)]
    data = bytearray(original)
    for _ in range(random.integers(1, 5)):
        if not data:
            break
        at = (
            int(random.integers(len(data)))
            if random.random() < 0.5
            else int(random.integers(min(len(data), 100)))
        )
        length = int(random.integers(1, 1 + max(1, len(data) // 4)))
        kind = random.integers(8)
        if kind == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            data[at] = int(random.integers(256))
        elif kind == 2:
            width, order = int(random.choice([2, 4])), str(random.choice(["<", ">"]))
            extremes = [0, 1, 2**15 - 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1]
            value = int(random.choice(extremes)) % 2 ** (8 * width)
            data[at : at + width] = struct.pack(order + ("H" if width == 2 else "I"), value)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:
            data[at : at + length] = random.bytes(length)
        else:
            other = originals[int(random.integers(len(originals)))][1]
            data[at:] = other[int(random.integers(len(other))) :]
    return name, repaired(bytes(data)) if random.random() < 0.5 else bytes(data)


def repaired(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right, so that damage gets past them."""
    if data[:4] != b"\x89PNG":
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


def run(first: int, count: int) -> None:
    """In the process of its own: read mutations, print what became of them."""
    import faulthandler
    import warnings

    warnings.simplefilter("ignore")
    originals = seeds()
    for _, data in originals:
        read_photo(data)  # everything is loaded before memory is limited
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcome: dict[str, int] = {"photographs": 0, "refused": 0}
    for number in range(first, first + count):
        print(number, file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        name, data = mutation(number, originals)
        try:
            pixels = read_photo(data)
        except UnreadableImage as error:
            assert error.reason and "\n" not in error.reason[:20], (number, name)
            outcome["refused"] += 1
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size, number
        outcome["photographs"] += 1
    outcome["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(outcome))


def fuzz(first: int, count: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, __file__, str(first), str(count)],
        capture_output=True,
        text=True,
        timeout=SECONDS * count,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_three_hundred_mutations():
    outcome = fuzz(0, 300)
    assert outcome["photographs"] + outcome["refused"] == 300
    # Otherwise damage would be too light or too heavy to show anything.
    assert outcome["photographs"] > 20 and outcome["refused"] > 100


@pytest.mark.slow
def test_ten_thousand_mutations():
    outcome = fuzz(1_000_000, 10_000)
    assert outcome["photographs"] + outcome["refused"] == 10_000


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + content + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that ask for much: headers of 100,000 x 100,000 pixels, and streams that inflate a thousandfold."""
    zeros = zlib.compress(bytes(50_000_000), 9)
    side = 100_000
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    start = jpeg.getvalue().index(b"\xff\xc0") + 5
    large_jpeg = jpeg.getvalue()[:start] + struct.pack(">HH", 65_535, 65_535) + jpeg.getvalue()[start + 4 :]
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    large_gif = gif.getvalue()[:6] + struct.pack("<HH", 65_535, 65_535) + gif.getvalue()[10:]
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, side), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    # 16 bits in three channels, which Pillow does not read and OpenCV would.
    deep = [(256, 4, side), (257, 4, side), (258, 3, 0), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, 3)]
    deep += [(278, 4, side), (279, 4, 100)]
    counts = {258: (3, 8 + 2 + 12 * len(deep) + 4)}
    entries = b"".join(
        struct.pack("<HHII", tag, kind, *counts.get(tag, (1, value))) for tag, kind, value in deep
    )
    deep_tiff = tiff[:8] + struct.pack("<H", len(deep)) + entries + bytes(4) + struct.pack("<HHH", 16, 16, 16)
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)
    )
    webp = (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<IB3x", 10, 0) + b"\xff" * 6 + bytes(8)
    )
    return {
        "png header": png(side, side, chunk(b"IDAT", zlib.compress(bytes(1000)))),
        "png stream": png(64, 64, chunk(b"IDAT", zeros)),
        "png text": png(
            64, 64, chunk(b"zTXt", b"key\0\0" + zeros) + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        ),
        "png profile": png(
            64, 64, chunk(b"iCCP", b"key\0\0" + zeros) + chunk(b"IDAT", zlib.compress(bytes(100)))
        ),
        "jpeg header": large_jpeg,
        "gif header": large_gif,
        "tiff header": tiff,
        "deep tiff header": deep_tiff,
        "bmp header": bmp + bytes(100),
        "webp header": webp,
        "ppm header": b"P6 100000 100000 255\n" + bytes(100),
    }


def test_sizes_of_deep_tiffs_are_read_before_pixels(monkeypatch):
    data = dict(seeds())["deep colour tiff"]
    assert read_photo(data).shape == (48, 64, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="64 x 48, the limit is 2000 pixels"):
        _deep_tiff(data)
    assert _deep_tiff(data[:8]) is None


def run_bombs() -> None:
    found = {}
    for name, data in bombs().items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found[name] = [list(read_photo(data).shape)]
        except UnreadableImage as error:
            found[name] = [error.reason]
        found[name].append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    print(json.dumps(found))


def test_small_files_that_ask_for_much():
    """Refused by their headers, or read within what their pixels need; memory grows by 32 MB at most."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(bombs())
    for name, (result, megabytes) in found.items():
        assert megabytes < 32, (name, found)
        if name.endswith("header"):
            assert isinstance(result, str), (name, found)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(int(sys.argv[1]), int(sys.argv[2]))
    else:
        run_bombs()
