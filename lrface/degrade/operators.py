"""Forward operators of inverse problems (paper 002, section 4.1): missing pixels and Gaussian blur.

The paper's third, additive Gaussian noise, is lrface.degrade.noise_policy's ``gaussian_noise``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import border_index
from lrface.degrade.framing import Frame, Framing
from lrface.degrade.policy import Policy, check_range, check_share, uniform
from lrface.errors import UsageError


@dataclass
class PixelMaskParameters:
    """What happens to each of n images. All tensors live on the CPU.

    frame: how they are mirrored and cropped.
    missing: float32 [n], share of the pixels that are black, 0 for an image that stays clean.
    seed: int64 [n]; which pixels they are is a function of it.
    """

    frame: Frame
    missing: Tensor
    seed: Tensor


class PixelMaskPolicy(Policy):
    """A random set of an image's pixels becomes black, in all channels alike: 50, 75 or 90 % in the paper.

    The set has exactly the share that is asked for, up to rounding to whole pixels.

    Args:
        missing: share of the pixels that go, above 0 and below 1; or
        missing_range: [smallest, largest] share, drawn uniformly for each image ([0.5, 0.95] in the paper).
        clean_share: share of the batch that stays clean, exact up to rounding; 0 in paper 002.
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: a share outside of its limits, a range that is none, both or neither of them.
    """

    def __init__(
        self,
        missing: float | None = None,
        missing_range: Sequence[float] | None = None,
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        if (missing is None) == (missing_range is None):
            raise UsageError("degrade: give exactly one of missing and missing_range")
        if missing is not None and not 0 < missing < 1:
            raise UsageError(f"degrade.missing must be above 0 and below 1; found {missing}")
        given = (missing, missing) if missing_range is None else missing_range
        self.limits = check_range("missing_range", given, 0, 1)
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> PixelMaskParameters:
        frame = self.framing.sample(n, generator)
        order = torch.randperm(n, generator=generator)
        missing = uniform(n, self.limits, generator)
        missing[order[: round(n * self.clean_share)]] = 0
        seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
        return PixelMaskParameters(frame, missing, seed)

    def frame(self, images: Tensor, parameters: PixelMaskParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: PixelMaskParameters) -> Tensor:
        height, width = hq.shape[-2:]
        numbers = Draws(parameters.seed.to(hq.device)).bits("mask", height * width)
        count = (parameters.missing.double() * height * width).round().long().to(hq.device)
        # The pixels with the smallest numbers go: all up to that of the last one.
        last = numbers.sort(dim=1).values.gather(1, (count - 1).clamp_min(0)[:, None])
        gone = (numbers <= last) & (count > 0)[:, None]
        return hq.masked_fill(gone.view(-1, 1, height, width), 0)


@dataclass
class GaussianBlurParameters:
    """What happens to each of n images. All tensors live on the CPU.

    frame: how they are mirrored and cropped.
    sigma: float32 [n], standard deviation in pixels of these images, 0 for an image that stays clean.
    """

    frame: Frame
    sigma: Tensor


class GaussianBlurPolicy(Policy):
    """Convolution with a Gaussian of kernel x kernel pixels, the image mirrored at its edges without repeating the last
    pixel: (21, 5) and (37, 9) in the paper, for images of 224 pixels.

    Args:
        kernel: side of the kernel in pixels, odd.
        sigma: standard deviation in pixels; or
        sigma_range: [smallest, largest], drawn uniformly for each image ([1, 5] in the paper's appendix D.8).
        reference_size: side of the images that kernel and sigma are meant for: images of another size get both in
            proportion, the kernel as the nearest odd number. Without it they are pixels of whatever size there is.
        clean_share: share of the batch that stays clean, exact up to rounding; 0 in paper 002.
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: an even kernel, a sigma that is not above 0, a range that is none, both or neither of them; when
            parameters are drawn, a kernel too large for the images.
    """

    def __init__(
        self,
        kernel: int = 21,
        sigma: float | None = None,
        sigma_range: Sequence[float] | None = None,
        reference_size: int | None = None,
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        if kernel < 3 or kernel % 2 == 0:
            raise UsageError(f"degrade.kernel must be an odd number of pixels, at least 3; found {kernel}")
        if (sigma is None) == (sigma_range is None):
            raise UsageError("degrade: give exactly one of sigma and sigma_range")
        if sigma is not None and not 0 < sigma < math.inf:
            raise UsageError(f"degrade.sigma must be above 0; found {sigma}")
        if reference_size is not None and reference_size < 1:
            raise UsageError(f"degrade.reference_size must be at least 1 pixel; found {reference_size}")
        self.limits = check_range("sigma_range", (sigma, sigma) if sigma_range is None else sigma_range)
        self.kernel = kernel
        self.reference_size = reference_size
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def scale(self, size: int) -> float:
        """What kernel and sigma are multiplied by for images of ``size`` pixels."""
        return 1.0 if self.reference_size is None else size / self.reference_size

    def reach(self, size: int) -> int:
        """Pixels of the kernel on each side of its middle, for images of ``size`` pixels."""
        return round((self.kernel * self.scale(size) - 1) / 2)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> GaussianBlurParameters:
        if self.reach(full_size) >= full_size:
            raise UsageError(
                f"degrade.kernel: {self.kernel} pixels are too many for images of {full_size}; for a kernel in "
                "proportion to the images set degrade.reference_size, 224 for the paper's"
            )
        if self.reach(full_size) < 1:
            raise UsageError(
                f"degrade.kernel: {self.kernel} pixels of {self.reference_size} are one pixel of {full_size}, which blurs "
                "nothing; take a larger kernel or a smaller reference_size"
            )
        frame = self.framing.sample(n, generator)
        order = torch.randperm(n, generator=generator)
        sigma = uniform(n, self.limits, generator) * self.scale(full_size)
        sigma[order[: round(n * self.clean_share)]] = 0
        return GaussianBlurParameters(frame, sigma)

    def frame(self, images: Tensor, parameters: GaussianBlurParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: GaussianBlurParameters) -> Tensor:
        rows = (parameters.sigma > 0).nonzero().squeeze(1)
        if not len(rows):
            return hq
        degraded, index = hq.clone(), rows.to(hq.device)
        sigmas, of_image = parameters.sigma[rows].unique(return_inverse=True)
        sides = [
            blur_matrices(sigmas, size, self.reach(hq.shape[-1])).to(hq)[of_image.to(hq.device), None]
            for size in hq.shape[-2:]
        ]
        degraded[index] = (sides[0] @ hq[index] @ sides[1].mT).clamp_(0, 1)
        return degraded


def blur_matrices(sigmas: Tensor, size: int, reach: int) -> Tensor:
    """float64 [k, size, size]: each maps a line of ``size`` pixels to the blurred one.

    A matrix product costs no more than a wide separable kernel, and takes another sigma for each image in its stride.
    """
    taps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (taps.double() / sigmas.double()[:, None]) ** 2)
    weights /= weights.sum(1, keepdim=True)
    matrices = torch.zeros(len(sigmas), size, size, dtype=torch.float64)
    lines = torch.arange(size)
    for number, tap in enumerate(taps.tolist()):
        matrices[:, lines, _sources(size, tap)] += weights[:, number, None]
    return matrices


@lru_cache(maxsize=256)
def _sources(size: int, tap: int) -> Tensor:
    return border_index(torch.arange(size) + tap, size, "mirror")
