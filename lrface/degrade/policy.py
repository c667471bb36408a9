"""Which images of a batch are degraded and how: parameters are drawn first, then applied.

Drawing happens on the CPU from an explicit generator, applying on the images' device. The same seed replays the
same degraded batch on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrface.degrade.resolution import KERNELS, check_kernel, resample
from lrface.errors import UsageError


@dataclass
class DegradeParameters:
    """What happens to each of n images. All tensors have shape [n] and live on the CPU.

    mirror: bool, flipped left to right (image and its clean original alike).
    size: int64, side of the low-resolution version in pixels; the full size means clean.
    down, up: int64, index into :data:`lrface.degrade.resolution.KERNELS`.
    """

    mirror: Tensor
    size: Tensor
    down: Tensor
    up: Tensor


class ResolutionPolicy:
    """Part of each batch stays clean, the rest loses resolution.

    Args:
        clean_share: share of the batch that stays clean, exact up to rounding (0.5 in the paper).
        sizes: the low resolutions, drawn uniformly (56, 28, 14 in the paper); or
        continuous: (smallest, largest) for any whole number of pixels between, drawn log-uniformly so that
            each halving of the resolution gets the same share of images.
        down, up: kernels, one drawn uniformly for each image.
        mirror: probability of a left-right flip.

    Raises:
        UsageError: a share outside [0, 1], no sizes, an unknown kernel.
    """

    def __init__(
        self,
        clean_share: float = 0.5,
        sizes: Sequence[int] = (56, 28, 14),
        continuous: Sequence[int] | None = None,
        down: Sequence[str] = ("nearest",),
        up: Sequence[str] = ("bilinear",),
        mirror: float = 0.5,
    ):
        for name, share in (("clean_share", clean_share), ("mirror", mirror)):
            if not 0.0 <= share <= 1.0:
                raise UsageError(f"degrade.{name} must be between 0 and 1; found {share}")
        if continuous is not None and (len(continuous) != 2 or not 1 <= continuous[0] <= continuous[1]):
            raise UsageError(f"degrade.continuous must be [smallest, largest] in pixels; found {continuous}")
        if continuous is None and clean_share < 1.0 and (not sizes or min(sizes) < 1):
            raise UsageError(
                f"degrade.sizes must list at least one resolution of 1 pixel or more; found {sizes}"
            )
        self.clean_share = clean_share
        self.sizes = tuple(sizes)
        self.continuous = tuple(continuous) if continuous is not None else None
        self.down = tuple(KERNELS.index(check_kernel(kernel, "degrade.down")) for kernel in down)
        self.up = tuple(KERNELS.index(check_kernel(kernel, "degrade.up")) for kernel in up)
        if not self.down or not self.up:
            raise UsageError("degrade.down and degrade.up must name at least one kernel each")
        self.mirror = mirror

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> DegradeParameters:
        """Draw the parameters of ``n`` images of side ``full_size`` pixels from a CPU ``generator``."""

        def choose(options: Sequence[int]) -> Tensor:
            return torch.tensor(options)[torch.randint(len(options), (n,), generator=generator)]

        mirror = torch.rand(n, generator=generator) < self.mirror
        order = torch.randperm(n, generator=generator)
        if self.continuous is not None:
            smallest, largest = self.continuous
            uniform = torch.rand(n, generator=generator, dtype=torch.float64)
            size = (smallest * ((largest + 1) / smallest) ** uniform).floor().long().clamp(smallest, largest)
        elif self.sizes:
            size = choose(self.sizes)
        else:
            size = torch.full((n,), full_size)
        size[order[: round(n * self.clean_share)]] = full_size
        return DegradeParameters(mirror, size, choose(self.down), choose(self.up))

    def apply(self, images: Tensor, parameters: DegradeParameters) -> tuple[Tensor, Tensor]:
        """Mirror and degrade.

        Args:
            images: float [n, c, h, h] in [0, 1].
            parameters: what :meth:`sample` drew for these n images.

        Returns:
            (degraded, clean), both float [n, c, h, h] in [0, 1]: what the encoder sees, and its HQ original.
        """
        full_size = images.shape[-1]
        mirror = parameters.mirror.to(images.device)
        hq = torch.where(mirror[:, None, None, None], images.flip(-1), images)
        keys = torch.stack([parameters.size, parameters.down, parameters.up], dim=1)
        keys = keys[parameters.size < full_size]
        if keys.numel() == 0:
            return hq, hq
        degraded = hq.clone()
        for size, down, up in torch.unique(keys, dim=0).tolist():
            chosen = (parameters.size == size) & (parameters.down == down) & (parameters.up == up)
            index = chosen.nonzero().squeeze(1).to(images.device)
            degraded[index] = resample(hq[index], size, KERNELS[down], KERNELS[up])
        return degraded, hq
