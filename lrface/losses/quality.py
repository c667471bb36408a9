"""The quality loss of QualNet: distance between the reconstruction and the clean image."""

import torch
from torch import Tensor

from lrface.errors import UsageError


def quality_loss(reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
    """L_quality, eq. (4) of paper 001: mean absolute difference to the clean (HQ) image.

    The mean is over images, channels and pixels, so that lambda does not depend on the image size.

    Args:
        reconstruction: float [n, 3, h, w], the decoder's output.
        hq: float [n, 3, h, w] in [0, 1], the clean images.
        clip: clip the reconstruction to [0, 1] first, "for stable training" (paper 000, appendix A). A
            clipped pixel has no gradient.

    Returns:
        Scalar, float32 (float64 for float64).

    Raises:
        UsageError: shapes differ.
    """
    if reconstruction.shape != hq.shape:
        raise UsageError(
            f"the decoder's output {tuple(reconstruction.shape)} and the clean image {tuple(hq.shape)} differ in shape"
        )
    if reconstruction.dtype in (torch.float16, torch.bfloat16):
        reconstruction = reconstruction.float()
    if clip:
        reconstruction = reconstruction.clamp(0.0, 1.0)
    return (reconstruction - hq.to(reconstruction.dtype)).abs().mean()
