"""Crops of photographs for training: each image at a place, size and shape drawn anew every time it is shown."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from lrface.data.decode import MAX_PIXELS, BrokenImage, decode, read_header
from lrface.data.source import FaceSource
from lrface.errors import UsageError
from lrface.registry import Registry

TRIES = 10
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


class RandomResizedCrop:
    """The crop that ImageNet is trained with (Szegedy et al., CVPR 2015, section 6), by the rules of torchvision's
    RandomResizedCrop.

    A share of the image's area and a ratio of width to height are drawn, the ratio evenly on a logarithmic scale; a crop of
    that area and shape is taken from a place drawn evenly among those where it lies inside. Where it fits nowhere, another
    is drawn, up to ten times; then it is the largest one in the middle whose shape is allowed.

    Args:
        scale: least and largest share of the image's area.
        ratio: least and largest width / height.

    Raises:
        UsageError: no two numbers above 0 in order, or a share above 1.
    """

    def __init__(self, scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)):
        for name, pair, most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
            numbers = (
                isinstance(pair, Sequence)
                and len(pair) == 2
                and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
            )
            if not numbers or not 0 < pair[0] <= pair[1] <= most or math.isinf(pair[1]):
                raise UsageError(
                    f"data.crop.{name} must be two numbers in order, above 0"
                    f"{' and at most 1' if most == 1 else ''}; found {pair!r}"
                )
        self.scale = float(scale[0]), float(scale[1])
        self.ratio = float(ratio[0]), float(ratio[1])

    def draw(self, count: int, seed: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) for ``count`` images, [count, 10, 4]: a function of the seed alone."""
        return np.random.default_rng((seed, TRIES)).random((count, TRIES, 4))

    def box(self, height: int, width: int, numbers: NDArray[np.float64]) -> Box:
        """The crop of an image of ``height`` x ``width`` pixels for one image's ``numbers`` [10, 4]."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for share, shape, down, right in numbers.tolist():
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
        wide, tall = width, height
        if width / height < self.ratio[0]:
            tall = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            wide = round(height * self.ratio[1])
        return (height - tall) // 2, (width - wide) // 2, tall, wide


CROPS: Registry[RandomResizedCrop] = Registry("data.crop")
CROPS.register("random_resized", RandomResizedCrop)


def read_crop(
    source: FaceSource, index: int, crop: RandomResizedCrop, numbers: NDArray[np.float64], size: int
) -> np.ndarray:
    """The crop of an image, resized: uint8 [size, size, 3], RGB.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the crop has at least ``size`` pixels left
    either way, which costs a fraction of the time; and where the whole picture would be larger than lrface decodes.

    Raises:
        LrfaceError: the image cannot be read; names it.
    """
    data = source.encoded(index)
    if data is not None:
        try:
            found = _read_reduced(data, crop, numbers, size)
            if found is not None:
                return found
        except BrokenImage:
            pass  # the source says the same, and where the image is
    image = source.image(index)
    top, left, tall, wide = crop.box(image.shape[0], image.shape[1], numbers)
    return resize(image[top : top + tall, left : left + wide], size)


def _read_reduced(
    data: bytes, crop: RandomResizedCrop, numbers: NDArray[np.float64], size: int
) -> np.ndarray | None:
    """The crop of a JPEG that is better not decoded whole; None where it is."""
    header = read_header(data)
    if header.format != "jpeg":
        return None
    top, left, tall, wide = crop.box(header.height, header.width, numbers)
    factor = max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(tall, wide) >= factor * size)
    if header.height * header.width > MAX_PIXELS:
        factor = max(factor, 2)
    if factor == 1:
        return None
    image = decode(data, reduced=factor)
    height, width = -(-header.height // factor), -(-header.width // factor)
    if image.shape[:2] != (
        height,
        width,
    ):  # turned by what its camera said: the crop was of the picture before
        top, left, tall, wide = crop.box(header.width, header.height, numbers)
        height, width = width, height
        if image.shape[:2] != (height, width):
            return None
    # Edges to the nearest pixel of the smaller picture.
    top, bottom = (min(round(edge / factor), height) for edge in (top, top + tall))
    left, right = (min(round(edge / factor), width) for edge in (left, left + wide))
    return resize(image[top : max(bottom, top + 1), left : max(right, left + 1)], size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [size, size, 3]: an axis that shrinks by means over areas, one that grows bilinearly."""
    height, width = image.shape[:2]
    small = min(height, size), min(width, size)
    if small != (height, width):
        image = cv2.resize(image, (small[1], small[0]), interpolation=cv2.INTER_AREA)
    if small != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    return image
