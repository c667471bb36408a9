"""Losses of quality other than resolution, for tests along further axes. Pure functions on batches of tensors."""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.errors import LrfaceError, UsageError


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encode as JPEG (4:2:0 chroma, as libjpeg's default) and decode again.

    Args:
        images: float [n, 3, h, w] RGB in [0, 1]; rounded to 8 bits first.
        quality: libjpeg's, 1 to 100.

    Returns:
        float32 [n, 3, h, w] in [0, 1], on the device of ``images``.
    """
    if not 1 <= quality <= 100:
        raise UsageError(f"JPEG quality must be 1 to 100; found {quality}")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    out = np.empty((len(pixels), *pixels.shape[2:], 3), dtype=np.uint8)
    for row, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        done, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not done:
            raise LrfaceError("an image could not be encoded as JPEG")
        decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        assert decoded is not None  # it was encoded a line above
        out[row] = decoded[..., ::-1]
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(images.device).float() / 255.0


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of ``sigma`` pixels, cut at 4 sigma, edges mirrored. float [n, c, h, w] -> the same."""
    if sigma < 0:
        raise UsageError(f"blur: sigma must be at least 0 pixels; found {sigma}")
    if sigma == 0:
        return images
    radius = min(max(1, round(4 * sigma)), min(images.shape[-2:]) - 1)
    places = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    across = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def gaussian_noise(images: Tensor, sigma: float, seeds: list[int]) -> Tensor:
    """Add independent Gaussian noise to every value, clipped to [0, 1].

    Args:
        images: float [n, c, h, w] in [0, 1].
        sigma: standard deviation in 8-bit levels (0 to 255).
        seeds: one for each image; an image's noise depends on its seed alone.
    """
    if sigma < 0:
        raise UsageError(f"noise: sigma must be at least 0 of 255 levels; found {sigma}")
    drawn = torch.stack(
        [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    return (images + drawn.to(images) * (sigma / 255.0)).clamp(0.0, 1.0)
