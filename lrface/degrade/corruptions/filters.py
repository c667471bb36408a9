"""Filters shared by the corruptions: separable blurs as matrix products, other kernels through Fourier transforms."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

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


@dataclass(frozen=True)
class AxisFilter:
    """A linear map of the pixels of one axis whose matrix is zero far from its diagonal.

    shape: (pixels out, pixels in).
    blocks: for a range of pixels out the range of pixels in that they depend on, and their part of the matrix.
    """

    shape: tuple[int, int]
    blocks: tuple[tuple[slice, slice, Tensor], ...]

    def down(self, images: Tensor) -> Tensor:
        """Map the columns of [..., h, w]."""
        if len(self.blocks) == 1:
            return self.blocks[0][2] @ images
        out = images.new_empty(*images.shape[:-2], self.shape[0], images.shape[-1])
        for to, of, matrix in self.blocks:
            out[..., to, :] = matrix @ images[..., of, :]
        return out

    def across(self, images: Tensor) -> Tensor:
        """Map the rows of [..., h, w]."""
        if len(self.blocks) == 1:
            return images @ self.blocks[0][2].T
        flat = images.reshape(-1, images.shape[-1])
        out = images.new_empty(len(flat), self.shape[0])
        for to, of, matrix in self.blocks:
            out[:, to] = flat[:, of] @ matrix.T
        return out.view(*images.shape[:-1], self.shape[0])


def axis_filter(matrix: Tensor, device: torch.device) -> AxisFilter:
    """A matrix [pixels out, pixels in] cut into blocks around what is not zero in it.

    On a GPU the whole is one block: few large products are faster there than many small ones.
    """
    out, into = matrix.shape
    reach = max(32, int((matrix != 0).sum(1).max()))
    step = reach if device.type == "cpu" and out > 2 * reach else out
    blocks = []
    for start in range(0, out, step):
        part = matrix[start : start + step]
        used = (part != 0).any(0).nonzero()
        of = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + len(part)), of, part[:, of].float().contiguous().to(device)))
    return AxisFilter((out, into), tuple(blocks))


def gaussian_matrix(size: int, sigma: float, radius: int, border: str) -> Tensor:
    """float64 [size, size] that blurs ``size`` pixels with a Gaussian cut at ``radius``."""
    taps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (taps.double() / sigma) ** 2)
    weights /= weights.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    read = border_index(torch.arange(size)[:, None] + taps, size, border)
    return matrix.scatter_add_(1, read, weights.expand(size, -1))


@lru_cache(maxsize=256)
def gaussian_filter(size: int, sigma: float, radius: int, border: str, device: torch.device) -> AxisFilter:
    """:func:`gaussian_matrix` as a filter, kept."""
    return axis_filter(gaussian_matrix(size, sigma, radius, border), device)


def blur_separably(
    images: Tensor, sigmas: tuple[float, float], truncate: float = 4.0, border: str = "nearest"
) -> Tensor:
    """Gaussian blur as scipy and scikit-image do it.

    Args:
        images: float32 [..., h, w].
        sigmas: pixels, down and across; 0 leaves that axis alone.
        truncate: the kernel is cut at this many sigmas.
    """
    height, width = images.shape[-2:]
    radii = [int(truncate * sigma + 0.5) for sigma in sigmas]
    if radii[1]:
        images = gaussian_filter(width, sigmas[1], radii[1], border, images.device).across(images)
    if radii[0]:
        images = gaussian_filter(height, sigmas[0], radii[0], border, images.device).down(images)
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
    after = size[0] - before[0] - height, size[1] - before[1] - width
    if border == "nearest" or (border == "mirror" and max(*before, *after) < min(height, width)):
        mode = "replicate" if border == "nearest" else "reflect"
        stacked = images.reshape(1, -1, height, width)
        padded = F.pad(stacked, (before[1], after[1], before[0], after[0]), mode=mode)
        return padded.view(*images.shape[:-2], *size)
    rows = border_index(torch.arange(-before[0], size[0] - before[0]), height, border)
    columns = border_index(torch.arange(-before[1], size[1] - before[1]), width, border)
    return images[..., rows.to(images.device), :][..., columns.to(images.device)]


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
