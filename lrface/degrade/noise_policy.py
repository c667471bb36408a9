"""Noise on part of each batch: Gaussian and Speckle noise training (paper 004, sections 3.1 and 4.5)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrface.degrade.corruptions import noise
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.framing import Frame, Framing
from lrface.degrade.policy import Policy, check_range, check_share, uniform
from lrface.errors import UsageError


@dataclass
class NoiseParameters:
    """What happens to each of n images. All tensors live on the CPU.

    frame: how they are mirrored and cropped.
    sigma: float32 [n], standard deviation of the noise, 0 for an image that stays clean.
    seed: int64 [n]; every random number of an image's noise is a function of it.
    """

    frame: Frame
    sigma: Tensor
    seed: Tensor


class NoisePolicy(Policy):
    """Part of each batch stays clean, each other image x gets normal noise z on every value, clipped to [0, 1].

    Args:
        sigma: standard deviation of the noise in units of [0, 1]; of a list, one is drawn uniformly for each image.
        sigma_range: [smallest, largest] instead of sigma, drawn uniformly for each image.
        clean_share: share of the batch that stays clean, exact up to rounding (0.5 in the paper).
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: a sigma that is not above 0, an empty list, a share outside [0, 1].
    """

    add: ClassVar[Callable[[Tensor, Tensor, Draws], Tensor]]

    def __init__(
        self,
        sigma: float | Sequence[float],
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
        sigma_range: Sequence[float] | None = None,
    ):
        check_share("clean_share", clean_share)
        sigmas = sigma if isinstance(sigma, Sequence) and not isinstance(sigma, str) else [sigma]
        for value in sigmas:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise UsageError(f"degrade.sigma must be above 0, or a list of such numbers; found {sigma!r}")
        if not sigmas:
            raise UsageError("degrade.sigma must list at least one standard deviation")
        self.sigmas = tuple(float(value) for value in sigmas)
        self.limits = None if sigma_range is None else check_range("sigma_range", sigma_range)
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> NoiseParameters:
        frame = self.framing.sample(n, generator)
        order = torch.randperm(n, generator=generator)
        sigma = torch.tensor(self.sigmas)[torch.randint(len(self.sigmas), (n,), generator=generator)]
        if self.limits is not None:
            sigma = uniform(n, self.limits, generator)
        sigma[order[: round(n * self.clean_share)]] = 0
        seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
        return NoiseParameters(frame, sigma, seed)

    def frame(self, images: Tensor, parameters: NoiseParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: NoiseParameters) -> Tensor:
        rows = (parameters.sigma > 0).nonzero().squeeze(1)
        if not len(rows):
            return hq
        degraded, index = hq.clone(), rows.to(hq.device)
        sigma = parameters.sigma[rows].to(hq.device)[:, None, None, None]
        draws = Draws(parameters.seed[rows].to(hq.device))
        degraded[index] = type(self).add(hq[index] * 255, sigma, draws).div_(255).clamp_(0, 1)
        return degraded


class GaussianNoisePolicy(NoisePolicy):
    """x + sigma z, the corruption gaussian_noise: sigma 0.5 in the paper, or its set 0.08, 0.12, 0.18, 0.26, 0.38 (the
    severities of ImageNet-C). The rest as in :class:`NoisePolicy`."""

    add = noise.gaussian_noise

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.5,
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
        sigma_range: Sequence[float] | None = None,
    ):
        super().__init__(sigma, clean_share, mirror, crop_padding, sigma_range)


class SpeckleNoisePolicy(NoisePolicy):
    """x + x sigma z, the corruption speckle_noise: by default the severities of ImageNet-C, from which the paper's noise is.
    The rest as in :class:`NoisePolicy`."""

    add = noise.speckle_noise

    def __init__(
        self,
        sigma: float | Sequence[float] = (0.15, 0.2, 0.35, 0.45, 0.6),
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
        sigma_range: Sequence[float] | None = None,
    ):
        super().__init__(sigma, clean_share, mirror, crop_padding, sigma_range)
