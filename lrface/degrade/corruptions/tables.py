"""What the corruptions are called and the constants of the published sets.

Sources: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, and the constants published with it for ImageNet-C, CIFAR-10-C and Tiny-ImageNet-C;
N. Mu and J. Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision", 2019.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The 15 corruptions in their four groups, and the four held out for validation."""

CORRUPTIONS: tuple[str, ...] = tuple(name for group in GROUPS if group != "extra" for name in GROUPS[group])
"""The 15 corruptions that count, in the order of the paper's tables."""

HELD_OUT: tuple[str, ...] = GROUPS["extra"]

MNIST_SEVERITY: dict[str, int] = {
    "shot_noise": 5,
    "impulse_noise": 4,
    "glass_blur": 1,
    "motion_blur": 1,
    "shear": 2,
    "scale": 3,
    "rotate": 2,
    "brightness": 5,
    "translate": 3,
    "stripe": 1,
    "fog": 5,
    "spatter": 4,
    "dotted_line": 1,
    "zigzag": 1,
    "canny_edges": 1,
}
"""The corruptions of MNIST-C and the one severity each was published at (1 where it has only one)."""

# name -> constants of severities 1 to 5
Table = dict[str, tuple[Any, Any, Any, Any, Any]]


def _zooms(*ranges: tuple[float, float]) -> tuple[Any, Any, Any, Any, Any]:
    """Magnifications 1, 1 + step, ... below each stop, counted as numpy.arange counts them."""
    found = tuple(
        tuple(1 + ((1 + step) - 1) * index for index in range(math.ceil((stop - 1) / step)))
        for stop, step in ranges
    )
    return found[0], found[1], found[2], found[3], found[4]


_IMAGENET: Table = {
    # standard deviation of values in [0, 1]
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    # photons at full white
    "shot_noise": (60, 25, 12, 5, 3),
    # share of values replaced
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    # radius of the disk, sigma of the blur that smooths its rim
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    # sigma, greatest displacement of a swap, rounds
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    # radius, sigma
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": _zooms((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    # mean and deviation of the flakes, their enlargement, threshold, radius and sigma of their motion, what is left
    # of the image
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    # weight of the image, weight of the frost, scale of its texture
    "frost": ((1, 0.4, 1.1), (0.8, 0.6, 1.1), (0.7, 0.7, 1.1), (0.65, 0.7, 1.1), (0.6, 0.75, 1.1)),
    # thickness, decay of the fractal from octave to octave
    "fog": ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    # added to the value of HSV
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    # As imagecorruptions has it, in parts of the image's side: amplitude, deviation of the smoothing, strength.
    "elastic_transform": tuple(("relative", 0.005, 0.01, 250 * s) for s in (0.05, 0.065, 0.085, 0.1, 0.12)),  # type: ignore[dict-item]
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    # quality
    "jpeg_compression": (25, 18, 15, 10, 7),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    # mean and deviation of the liquid, sigma, threshold, strength (water) or sigma of the rim (mud), 1 for mud
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    # factor and offset of the saturation of HSV
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}


def _affine(side: int, *values: tuple[float, float, float]) -> tuple[Any, Any, Any, Any, Any]:
    """Strength and sigma of the displacements, greatest shift of the affine map's three points, in pixels."""
    found = tuple(
        ("affine", side * strength, side * sigma, side * shift) for strength, sigma, shift in values
    )
    return found[0], found[1], found[2], found[3], found[4]


# ImageNet-C as it was published. The imagecorruptions package, whose elastic transform has no affine part, is what
# the set "imagenet" follows.
_IMAGENET_PUBLISHED: Table = _IMAGENET | {
    "elastic_transform": _affine(
        244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
    )
}

_CIFAR: Table = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": _zooms((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": _affine(
        32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}

_TINY_IMAGENET: Table = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
    "shot_noise": (250, 100, 50, 30, 15),
    "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
    "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    "zoom_blur": _CIFAR["zoom_blur"],
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    "frost": ((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": _affine(
        64, (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)
    ),
    "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
    "jpeg_compression": (65, 58, 50, 40, 25),
    "speckle_noise": (0.15, 0.2, 0.25, 0.3, 0.35),
    "gaussian_blur": (0.5, 0.75, 1, 1.25, 1.5),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.6, 0),
        (0.65, 0.1, 0.8, 0.7, 0.6, 0),
        (0.65, 0.3, 1, 0.69, 0.6, 0),
        (0.65, 0.1, 0.7, 0.68, 0.6, 1),
        (0.65, 0.1, 0.5, 0.67, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
}

_MNIST: Table = {
    name: _IMAGENET[name]
    for name in (
        "shot_noise",
        "impulse_noise",
        "glass_blur",
        "motion_blur",
        "brightness",
        "fog",
        "spatter",
    )
} | {
    "shear": (0.2, 0.4, 0.6, 0.8, 1.0),
    "rotate": (0.2, 0.4, 0.6, 0.8, 1.0),
    # side of the digit afterwards
    "scale": (0.9, 0.8, 0.7, 0.6, 0.5),
    # pixels
    "translate": (1, 2, 3, 4, 5),
    "stripe": (0, 0, 0, 0, 0),
    "dotted_line": (0, 0, 0, 0, 0),
    "zigzag": (0, 0, 0, 0, 0),
    "canny_edges": (0, 0, 0, 0, 0),
}


def _scale_frost(constants: Any, by: float) -> Any:
    return constants[0], constants[1], constants[2] * by


def _scale_snow(constants: Any, by: float) -> Any:
    mean, deviation, enlargement, threshold, radius, sigma, left = constants
    return mean, deviation, max(1.0, enlargement * by), threshold, radius * by, sigma * by, left


def _scale_spatter(constants: Any, by: float) -> Any:
    # Averaging over fewer pixels leaves more deviation: less is put in, so that as much of the image is covered.
    mean, deviation, sigma, threshold, strength, mud = constants
    return mean, deviation * by, sigma * by, threshold, strength * by if mud else strength, mud


_SCALED: dict[str, Callable[[Any, float], Any]] = {
    "defocus_blur": lambda constants, by: (constants[0] * by, constants[1]),
    "glass_blur": lambda constants, by: (constants[0] * by, max(1, round(constants[1] * by)), constants[2]),
    "motion_blur": lambda constants, by: (constants[0] * by, constants[1] * by),
    "snow": _scale_snow,
    "frost": _scale_frost,
    # Amplitude and smoothing grow with the image, their quotient does not: displacements are in pixels.
    "elastic_transform": lambda constants, by: (*constants[:3], constants[3] * by),
    "gaussian_blur": lambda constants, by: constants * by,
    "spatter": _scale_spatter,
}


@dataclass(frozen=True)
class CorruptionSet:
    """A set of constants.

    side: pixels, the size of image that the constants were made for.
    channels: 3 (RGB) or 1 (grey).
    scaled: constants that are lengths in pixels grow and shrink with the image.
    """

    side: int
    table: Table
    channels: int = 3
    scaled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions of this set."""
        return tuple(self.table)

    def constants(self, name: str, severity: int, size: tuple[int, int]) -> Any:
        """What severity 1 to 5 of ``name`` means for images of ``size`` (height, width)."""
        constants = self.table[name][severity - 1]
        if not self.scaled or name not in _SCALED:
            return constants
        return _SCALED[name](constants, math.sqrt(size[0] * size[1]) / self.side)


SETS: dict[str, CorruptionSet] = {
    "imagenet": CorruptionSet(224, _IMAGENET),
    "imagenet_published": CorruptionSet(224, _IMAGENET_PUBLISHED),
    "cifar": CorruptionSet(32, _CIFAR),
    "tiny_imagenet": CorruptionSet(64, _TINY_IMAGENET),
    "face": CorruptionSet(224, _IMAGENET, scaled=True),
    "mnist": CorruptionSet(28, _MNIST, channels=1),
}
"""The sets by name.

"imagenet" (ImageNet-C as the package imagecorruptions makes it), "imagenet_published" (the same with the affine part
of ImageNet-C's elastic transform), "cifar" (CIFAR-10-C), "tiny_imagenet" (Tiny-ImageNet-C) and "mnist" (MNIST-C) use
their published constants at any size of image, as their authors' code does.

"face" is for images of any size, 112 x 112 above all: ImageNet-C's constants where they do not depend on size
(strengths, qualities, thresholds, and what is already in parts of the image: zoom, fog, pixelate), and ImageNet-C's
lengths in pixels times sqrt(height * width) / 224 (radii and sigmas of blurs, displacements of glass and of the
elastic transform, size and path of snow flakes, size of frost and spatter). A corrupted face of 112 pixels looks like
a corrupted photograph of 224 pixels seen at half its size, except that noise and JPEG blocks keep their size in pixels.
"""
