"""How many pixels an aligned face really has, measured on its pixels: a crop that was enlarged says so.

Enlarging leaves two traces along rows and columns, whatever the kernel. The spectrum falls off beyond what the small
image could hold; and the kernel's pieces meet at a regular distance, so that the size of the second difference beats
with the number of small pixels (Gallagher, "Detection of linear and cubic interpolation in JPEG compressed images",
CRV 2005). A small regression, fitted by eval/fit_resolution.py on degraded faces, reads the number from both.
"""

import base64
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrface.degrade.resolution import resize

SIDE = 112
"""Side of the crops that are measured, in pixels; of more than that many nothing can be seen in them."""

CANDIDATES = np.geomspace(8, SIDE, 48)
"""Sizes in pixels among which the regression finds the likeliest."""

CLEARLY = 0.85
"""Measured below this share of the span, a face has fewer pixels than its span: closer ones may be errors."""

MEASURES = 113
_BINS = 56


def measures(crops: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the regression reads: float32 [n, 112, 112] grey in 0 to 255 -> float32 [n, 113].

    The logarithmic power of first differences relative to that at low frequencies (1 to 56 cycles a crop), the
    logarithmic power of the beat of second differences (the same frequencies), and the level of the first.
    """
    window = np.hanning(SIDE + 1)[1:-1].astype(np.float32)
    power = np.zeros((len(crops), _BINS), np.float32)
    beat = np.zeros((len(crops), _BINS), np.float32)
    for lines in (crops, crops.transpose(0, 2, 1)):
        # Every third and every second line are enough: neighbours say nearly the same.
        first = np.diff(lines[:, ::3], axis=2) * window
        spectrum = np.fft.rfft(first, SIDE, axis=2)[:, :, 1:]
        power += (spectrum.real**2 + spectrum.imag**2).mean(axis=1)
        second = np.abs(np.diff(lines[:, ::2], 2, axis=2)).mean(axis=1)
        # Against the level around it: where a face has detail, second differences are larger anyway.
        sums = np.cumsum(np.pad(second, ((0, 0), (8, 7)), mode="reflect"), axis=1)
        around = (sums[:, 15:] - sums[:, :-15]) / 15
        beats = np.fft.rfft((second / (around + 0.05) - 1) * np.hanning(SIDE)[1:-1], SIDE, axis=1)[:, 1:]
        beat += beats.real**2 + beats.imag**2
    # Below what rounding to 8 bits leaves nothing is told apart.
    logarithm = np.log(power / SIDE + 0.05)
    level = logarithm[:, :6].mean(axis=1, keepdims=True)
    return np.concatenate([logarithm - level, np.log(beat + 0.05), level], axis=1).astype(np.float32)


@cache
def _regression() -> tuple[NDArray[np.float32], ...]:
    """Weights and biases of the two layers."""
    from lrface.embed.resolution_constants import CONSTANTS, HIDDEN

    numbers = np.frombuffer(base64.b85decode("".join(CONSTANTS.split())), "<f2").astype(np.float32)
    sizes = (MEASURES * HIDDEN, HIDDEN, HIDDEN * len(CANDIDATES), len(CANDIDATES))
    first, bias, second, last = np.split(numbers, np.cumsum(sizes)[:-1])
    return first.reshape(MEASURES, HIDDEN), bias, second.reshape(HIDDEN, -1), last


def likely(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Size in pixels from how likely each of :data:`CANDIDATES` is: the mean, on a scale of doublings, of the seven
    neighbours that are the likeliest together. The beat of s and of 112 - s pixels is one, so there may be two peaks.

    float32 [n, 48] -> float32 [n], 8 to 112.
    """
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    window = np.lib.stride_tricks.sliding_window_view(np.pad(probability, ((0, 0), (3, 3))), 7, axis=1)
    best = window[np.arange(len(logits)), window.sum(axis=2).argmax(axis=1)]
    place = np.lib.stride_tricks.sliding_window_view(np.pad(np.log2(CANDIDATES), 3), 7)
    where = place[window.sum(axis=2).argmax(axis=1)]
    return (2.0 ** ((best * where).sum(axis=1) / best.sum(axis=1))).astype(np.float32)


def measured_resolutions(crops: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the pixels alone say: float32 [n, 112, 112] grey in 0 to 255 -> float32 [n], 8 to 112 pixels."""
    if len(crops) == 0:
        return np.zeros(0, np.float32)
    first, bias, second, last = _regression()
    return likely(np.maximum(measures(crops) @ first + bias, 0) @ second + last)


def effective_resolutions(crops: Tensor, spans: NDArray[np.float32]) -> NDArray[np.float32]:
    """How many pixels aligned faces really have.

    Args:
        crops: float32 [n, 3, s, s] RGB in [0, 1], as the network gets them.
        spans: float32 [n], how many pixels of the image span each: it has no more than that.

    Returns:
        float32 [n]: ``spans``, but what was measured where that is clearly less (below :data:`CLEARLY` of the span, or
        of what the crop or 112 pixels can show of a larger one). A crop without any detail, or of fewer than 8
        pixels, keeps its span.
    """
    grey = crops[:, 1:2].float().cpu()
    if grey.shape[-1] != SIDE:
        grey = resize(grey, SIDE, "bilinear")
    levels = grey[:, 0].numpy() * np.float32(255)
    measured = measured_resolutions(levels)
    flat = levels.std(axis=(1, 2)) < 1
    less = (measured < CLEARLY * np.minimum(spans, min(SIDE, crops.shape[-1]))) & ~flat
    return np.where(less, measured, spans).astype(np.float32)
