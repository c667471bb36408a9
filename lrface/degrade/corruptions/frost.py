"""Textures of frost, drawn by rule: no photograph is used.

Five textures stand for the five different photographs of ImageNet-C's frost (one of its six files is there twice).
Each has the mean colour, deviation and radial spectrum that were measured on one of them; what it shows is its own:
feathers, needles and grains of ice on clouds.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

HEIGHT, WIDTH = 448, 672


@dataclass(frozen=True)
class _Look:
    """mean, deviation: RGB levels. bands: log2 of the power of grey in six octaves of spatial frequency, from 1/128 to
    1/2 cycles a pixel. crystals: (kind, number, length in pixels)."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    bands: tuple[float, float, float, float, float, float]
    crystals: tuple[tuple[str, int, float], ...]


_LOOKS = (
    _Look((78, 149, 166), (27, 16, 15), (29.0, 26.8, 24.6, 23.2, 22.5, 21.0), (("needle", 700, 40),)),
    _Look((201, 205, 214), (21, 22, 23), (27.5, 26.4, 25.8, 23.9, 21.9, 19.6), (("needle", 2200, 60),)),
    _Look(
        (138, 153, 165),
        (28, 28, 30),
        (27.8, 27.6, 26.8, 25.6, 24.4, 22.6),
        (("grain", 9000, 4), ("feather", 60, 22)),
    ),
    _Look((112, 123, 135), (44, 43, 42), (32.2, 30.8, 29.0, 27.2, 25.3, 23.5), (("feather", 420, 45),)),
    _Look((71, 95, 105), (35, 43, 47), (31.2, 28.8, 27.3, 25.5, 23.8, 21.6), (("feather", 130, 100),)),
)
SHARES = (1 / 6, 1 / 3, 1 / 6, 1 / 6, 1 / 6)
"""How often each texture is chosen."""


def _clouds(random: np.random.Generator, steepness: float) -> np.ndarray:
    """float64 [HEIGHT, WIDTH] of deviation 1 whose amplitude falls with frequency to the power of ``steepness``."""
    down, across = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) * frequency**-steepness
    spectrum[0, 0] = 0
    clouds = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    return clouds / clouds.std()


def _stroke(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, light: float, width: int) -> None:
    points = [(int(point[0] * 16), int(point[1] * 16)) for point in (start, end)]
    cv2.line(canvas, points[0], points[1], light, width, cv2.LINE_AA, 4)


def _draw_crystal(canvas: np.ndarray, random: np.random.Generator, kind: str, typical: float) -> None:
    place = random.uniform((0, 0), (WIDTH, HEIGHT))
    angle = random.uniform(0, 2 * np.pi)
    length = typical * random.lognormal(0, 0.4)
    light = random.uniform(60, 255)
    direction = np.array([np.cos(angle), np.sin(angle)])
    if kind == "grain":
        axes = max(1, int(length / 2)), max(1, int(length / 4))
        cv2.ellipse(
            canvas, (int(place[0]), int(place[1])), axes, np.rad2deg(angle), 0, 360, light, -1, cv2.LINE_AA
        )
        return
    _stroke(canvas, place, place + direction * length, light, 1 + (length > 50))
    if kind == "needle":
        return
    # Barbs on both sides of the stem, 60 degrees off as water freezes, shorter towards its tip.
    side = np.array([np.cos(angle + np.pi / 3), np.sin(angle + np.pi / 3)])
    other = np.array([np.cos(angle - np.pi / 3), np.sin(angle - np.pi / 3)])
    spacing = max(2.5, length / 18)
    for distance in np.arange(length * 0.1, length, spacing):
        reach = (length - distance) * random.uniform(0.25, 0.5)
        root = place + direction * distance
        for barb in (side, other):
            _stroke(canvas, root, root + barb * reach, light * random.uniform(0.45, 1.0), 1)


def _shape_spectrum(grey: np.ndarray, bands: tuple[float, ...]) -> np.ndarray:
    """Scale each spatial frequency so that the octaves get the power of ``bands`` (up to one common factor)."""
    down, across = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    octave = np.log2(np.maximum(np.hypot(down, across), 1 / 256))
    spectrum = np.fft.rfft2(grey - grey.mean())
    centres = np.arange(6) - 6.5
    found = [
        np.log2(np.mean(np.abs(spectrum[(octave >= centre - 0.5) & (octave < centre + 0.5)]) ** 2))
        for centre in centres
    ]
    gain = 2 ** (0.5 * np.interp(octave, centres, np.array(bands) - found))
    shaped = np.fft.irfft2(spectrum * gain, s=(HEIGHT, WIDTH))
    return shaped / shaped.std()


def _draw(number: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3] RGB."""
    look = _LOOKS[number]
    random = np.random.default_rng(number)
    clouds = _clouds(random, 1.4)
    canvas = np.full((HEIGHT, WIDTH), 40, dtype=np.uint8)
    for kind, count, length in look.crystals:
        for _ in range(count):
            _draw_crystal(canvas, random, kind, length)
    # Ice is thick in places and thin in others.
    grey = canvas * (0.6 + 0.4 * np.tanh(clouds)) + 25 * _clouds(random, 0.9)
    grey = _shape_spectrum(grey, look.bands)
    # Tones drift slowly from channel to channel, as a sky behind the pane tints it.
    tint = _clouds(random, 1.8)
    channels = []
    for mean, deviation, lean in zip(look.mean, look.deviation, (0.15, 0.0, -0.15), strict=True):
        tone = grey + lean * tint
        channels.append(mean + deviation * tone / tone.std())
    return np.clip(np.stack(channels, axis=2), 0, 255).round().astype(np.uint8)


@lru_cache(maxsize=1)
def _originals() -> list[np.ndarray]:
    return [_draw(number) for number in range(len(_LOOKS))]


@lru_cache(maxsize=8)
def textures(height: int, width: int, scale: float, device: torch.device) -> Tensor:
    """The textures for images of this size, drawn at first use and kept in memory.

    Args:
        height, width: of the images, pixels.
        scale: of the textures; where they are smaller than an image they are enlarged until they are not.

    Returns:
        uint8 [5, tall, wide, 3] RGB, taller and wider than the images.
    """
    fit = max(scale, (height + 1) / HEIGHT, (width + 1) / WIDTH)
    size = int(np.ceil(WIDTH * fit)), int(np.ceil(HEIGHT * fit))
    kernel = cv2.INTER_CUBIC if fit > 1 else cv2.INTER_LINEAR
    resized = [cv2.resize(picture, size, interpolation=kernel) for picture in _originals()]
    return torch.from_numpy(np.stack(resized)).to(device)
