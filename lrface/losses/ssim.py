"""Structural similarity of two images (Wang et al., IEEE Transactions on Image Processing 13(4), 2004)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.errors import UsageError

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def _filtered(images: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian means of each channel at every place where the window fits: [..., h, w] -> [..., h', w']."""
    offsets = torch.arange(window, dtype=images.dtype, device=images.device) - (window - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    flat = images.reshape(-1, 1, *images.shape[-2:])
    rows = F.conv2d(flat, weights.view(1, 1, -1, 1))
    done = F.conv2d(rows, weights.view(1, 1, 1, -1))
    return done.view(*images.shape[:-2], *done.shape[-2:])


@dataclass
class RaySimilarity:
    """SSIM of clean images x with all images on the rays from x to others: x + gamma (other - x).

    Means and variances of a window are polynomials of degree 2 in gamma. So the filters run once, whatever the number of
    places on the ray that are looked at, and it is no approximation.

    Args:
        clean, other: float [n, c, h, w], at least float32, in [0, 1].
        window: side of the window in pixels.
        sigma: standard deviation of its Gaussian weights in pixels.

    Raises:
        UsageError: different shapes, or images smaller than the window.
    """

    clean: Tensor
    other: Tensor
    window: int = WINDOW
    sigma: float = SIGMA

    def __post_init__(self) -> None:
        if self.clean.shape != self.other.shape or self.clean.ndim != 4:
            raise UsageError(
                f"SSIM compares two batches [n, c, h, w] of one shape; found {tuple(self.clean.shape)} and "
                f"{tuple(self.other.shape)}"
            )
        if min(self.clean.shape[-2:]) < self.window:
            raise UsageError(
                f"SSIM's window of {self.window} pixels does not fit images of {tuple(self.clean.shape[-2:])}"
            )
        with torch.autocast(self.clean.device.type, enabled=False):
            x = self.clean
            change = self.other - x
            stacked = torch.stack([x, change, x * x, x * change, change * change])
            mean, shift, *squares = _filtered(stacked, self.window, self.sigma)
        self._mean, self._shift = mean, shift
        self._variance = squares[0] - mean * mean
        self._covariance = squares[1] - mean * shift
        self._change = squares[2] - shift * shift

    def __call__(self, gamma: Tensor) -> Tensor:
        """SSIM at gamma [n] or [n, k] -> the same shape; the mean over places and channels."""
        several = gamma.unsqueeze(1) if gamma.ndim == 1 else gamma
        similarity = [self._at(column[:, None, None, None]) for column in several.unbind(1)]
        return torch.stack(similarity, 1).view_as(gamma)

    def _at(self, gamma: Tensor) -> Tensor:
        c1, c2 = K1**2, K2**2
        mean = self._mean + gamma * self._shift
        covariance = self._variance + gamma * self._covariance
        variance = covariance + gamma * (self._covariance + gamma * self._change)
        luminance = (2 * self._mean * mean + c1) / (self._mean.square() + mean.square() + c1)
        structure = (2 * covariance + c2) / (self._variance + variance + c2)
        return (luminance * structure).mean((1, 2, 3))


def ssim(images: Tensor, others: Tensor, window: int = WINDOW, sigma: float = SIGMA) -> Tensor:
    """Structural similarity with the paper's Gaussian window, K1 = 0.01, K2 = 0.03 and range 1.

    Only places where the whole window fits count; channels are compared each by itself and averaged. At its defaults this
    is ``skimage.metrics.structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1)``.

    Args:
        images, others: float [n, c, h, w], at least float32, in [0, 1].
        window: side of the window in pixels.
        sigma: standard deviation of its Gaussian weights in pixels.

    Returns:
        [n], at most 1: 1 for equal images. It has a gradient.

    Raises:
        UsageError: different shapes, or images smaller than the window.
    """
    return RaySimilarity(images, others, window, sigma)(torch.ones(len(images)).to(images))
