"""Uploads that are no whole photographs within the limits: damaged, cut off, huge, empty, or of other types."""

import importlib.util
import io
import random
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 1_000_000


@cache
def _fuzzing():
    spec = importlib.util.spec_from_file_location(
        "lrface_fuzzing", Path(__file__).resolve().parents[1] / "data" / "fuzzing.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def sound() -> tuple[bytes, ...]:
    """Small photographs of the types that are taken, in several ways of writing them."""
    y, x = np.mgrid[:112, :112]
    noise = np.random.default_rng(0).integers(0, 60, (112, 112, 3))
    image = Image.fromarray((np.stack([x * 2, y * 2, x + y], 2) + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind, changed, options in (
        ("JPEG", image, {"quality": 90, "exif": exif}),
        ("JPEG", image, {"progressive": True}),
        ("JPEG", image.convert("L"), {}),
        ("JPEG", image.convert("CMYK"), {}),
        ("PNG", image, {"exif": exif}),
        ("PNG", image.quantize(16), {"transparency": 3}),
        ("PNG", image.convert("RGBA"), {}),
        ("PNG", image.convert("I;16"), {}),
        ("WEBP", image, {"exif": exif}),
        ("WEBP", image.convert("RGBA"), {"lossless": True}),
        ("WEBP", image, {"save_all": True, "append_images": [image.rotate(90)]}),
    ):
        file = io.BytesIO()
        changed.save(file, kind, **options)
        found.append(file.getvalue())
    return tuple(found)


@cache
def _others() -> tuple[bytes, ...]:
    """Files of other types, and names for them that lie."""
    image = Image.new("RGB", (64, 64), (90, 120, 150))
    found = [
        b"",
        b"\0",
        b"%PDF-1.7\n%\xe2\xe3",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" + bytes(60),
    ]
    for kind in ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"):
        file = io.BytesIO()
        image.save(file, kind)
        found.append(file.getvalue())
    return (*found, zlib.compress(bytes(100_000)), b"\x7fELF" + bytes(200), "Größe".encode() * 40)


def _bomb(chance: random.Random) -> bytes:
    """A small file that says it is a large picture."""
    width, height = (chance.choice([1001, 4000, 30_000, 65_535, 2**31 - 1]) for _ in range(2))
    made = _fuzzing().bombs()
    return chance.choice([*made, _fuzzing().png_bomb(width, height), _fuzzing().png_bomb(1, 1_000_001)])


def refused_by_pillow(data: bytes) -> bool:
    """Whether Pillow by itself finds no whole JPEG, PNG or WebP picture of at most :data:`MAX_PIXELS`."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                return True
            image.load()
            image.convert("RGB")
        return False
    except Exception:
        return True


def malformed(number: int) -> bytes:
    """Upload ``number``, always the same. Damage that leaves a picture whole is damaged on."""
    chance = random.Random(number)
    kind = chance.random()
    if kind < 0.12:
        return chance.choice(_others())
    if kind < 0.24:
        return next(bomb for bomb in iter(lambda: _bomb(chance), None) if refused_by_pillow(bomb))
    if kind < 0.3:
        return chance.randbytes(chance.choice([1, 10, 1000, 20_000]))
    data = chance.choice(sound())
    bombs = _fuzzing().bombs()
    while True:
        data = _fuzzing().mutate(data, chance, bombs)
        if refused_by_pillow(data):
            return data


def still_whole(number: int) -> bytes:
    """Damage ``number`` as it comes: it may leave a picture that decodes."""
    chance = random.Random(-number)
    return _fuzzing().mutate(chance.choice(sound()), chance, _fuzzing().bombs())
