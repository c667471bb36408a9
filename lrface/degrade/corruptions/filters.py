"""Filters shared by the corruptions: separable blurs as matrix products, other kernels through Fourier transforms."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lrface.errors import UsageError

BORDERS = ("nearest", "reflect", "mirror")


def border_index(places: Tensor, size: int, border: str) -> Tensor:
    """Where pixels beyond the edge are read from.

    Args:
        places: int64, any.
        size: number of pixels.
        border: "nearest" (a a | a b c), "reflect" (b a | a b c) or "mirror" (c b | a b c).
    """
    if border == "nearest":
        return places.clamp(0, size - 1)
    if border == "reflect":
        turned = places.remainder(2 * size)
        return torch.where(turned < size, turned, 2 * size - 1 - turned)
    if border == "mirror":
        period = max(2 * size - 2, 1)
        turned = places.remainder(period)
        return torch.where(turned < size, turned, period - turned)
    raise UsageError(f"border must be one of {', '.join(BORDERS)}; found {border!r}")


@lru_cache(maxsize=256)
def gaussian_matrix(size: int, sigma: float, radius: int, border: str, device: torch.device) -> Tensor:
    """float32 [size, size] that blurs ``size`` pixels with a Gaussian cut at ``radius``."""
    taps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (taps.double() / sigma) ** 2)
    weights /= weights.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    read = border_index(torch.arange(size)[:, None] + taps, size, border)
    matrix.scatter_add_(1, read, weights.expand(size, -1))
    return matrix.float().to(device)


def blur_separably(
    images: Tensor, sigmas: tuple[float, float], truncate: float = 4.0, border: str = "nearest"
) -> Tensor:
    """Gaussian blur as scipy and scikit-image do it.

    Args:
        images: float32 [..., h, w].
        sigmas: pixels, down and across; 0 leaves that axis alone.
        truncate: the kernel is cut at this many sigmas.
    """
    for axis, sigma in ((1, sigmas[1]), (0, sigmas[0])):
        radius = int(truncate * sigma + 0.5)
        if radius == 0:
            continue
        size = images.shape[-2 + axis]
        matrix = gaussian_matrix(size, sigma, radius, border, images.device)
        images = images @ matrix.T if axis == 1 else matrix @ images
    return images


@lru_cache(maxsize=1024)
def fast_length(least: int) -> int:
    """The smallest product of 2, 3 and 5 that is at least ``least`` and even."""
    best = 1 << max(1, (least - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            found = three << max(1, math.ceil(math.log2(least / three))) if least > three else 2 * three
            if found >= least:
                best = min(best, found)
            three *= 3
        five *= 5
    return best


def pad(images: Tensor, before: tuple[int, int], size: tuple[int, int], border: str) -> Tensor:
    """Extend [..., h, w] to ``size``, ``before`` rows and columns of it above and left."""
    height, width = images.shape[-2:]
    rows = border_index(torch.arange(-before[0], size[0] - before[0]), height, border)
    columns = border_index(torch.arange(-before[1], size[1] - before[1]), width, border)
    out = images.new_empty(*images.shape[:-2], *size)
    inner = out[..., before[0] : before[0] + height, :]
    inner[..., before[1] : before[1] + width] = images
    for column, source in enumerate(columns.tolist()):
        if not 0 <= column - before[1] < width:
            inner[..., column] = images[..., source]
    for row, source in enumerate(rows.tolist()):
        if not 0 <= row - before[0] < height:
            out[..., row, :] = inner[..., source, :]
    return out


def correlate(images: Tensor, kernel: Tensor, anchor: tuple[int, int], border: str) -> Tensor:
    """Correlation of images with a kernel, or with one each, through the Fourier transform.

    Args:
        images: float32 [n, c, h, w].
        kernel: float32 [kh, kw] or [n, kh, kw].
        anchor: place in the kernel of the pixel that is written.
        border: how the images go on beyond their edges.

    Returns:
        float32 [n, c, h, w].
    """
    height, width = images.shape[-2:]
    kernel_height, kernel_width = kernel.shape[-2:]
    size = fast_length(height + kernel_height - 1), fast_length(width + kernel_width - 1)
    spectrum = torch.fft.rfft2(pad(images, anchor, size, border))
    filtered = torch.fft.rfft2(kernel, s=size).conj()
    spectrum *= filtered if kernel.dim() == 2 else filtered[:, None]
    return torch.fft.irfft2(spectrum, s=size)[..., :height, :width]
