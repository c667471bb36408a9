"""Which images of a batch are degraded and how: parameters are drawn first, then applied.

Drawing happens on the CPU from an explicit generator, applying on the images' device. The same seed replays the
same degraded batch on any device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrface.degrade.resolution import KERNELS, check_kernel, resample
from lrface.errors import UsageError


class Policy:
    """What a training batch looks like to the network.

    ``frame`` does what an image and its clean original have in common (mirroring, cropping), ``degrade`` what only the
    degraded image suffers. Whatever is random lies in the parameters: dataclasses whose tensors have a row an image.
    """

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> Any:
        """Draw the parameters of ``n`` images of side ``full_size`` pixels from a CPU ``generator``."""
        raise TypeError(f"{type(self).__name__} must define sample()")

    def frame(self, images: Tensor, parameters: Any) -> Tensor:
        """float [n, c, h, h] in [0, 1] -> the same, mirrored and cropped: the clean originals."""
        raise TypeError(f"{type(self).__name__} must define frame()")

    def degrade(self, hq: Tensor, parameters: Any) -> Tensor:
        """Framed images float [n, c, h, h] in [0, 1] -> the same, degraded. ``hq`` stays as it is."""
        raise TypeError(f"{type(self).__name__} must define degrade()")

    def apply(self, images: Tensor, parameters: Any) -> tuple[Tensor, Tensor]:
        """Frame and degrade.

        Args:
            images: float [n, c, h, h] in [0, 1].
            parameters: what :meth:`sample` drew for these n images.

        Returns:
            (degraded, clean), both float [n, c, h, h] in [0, 1]: what the encoder sees, and its HQ original.
        """
        hq = self.frame(images, parameters)
        return self.degrade(hq, parameters), hq


def rows_of(parameters: Any, rows: slice | Tensor) -> Any:
    """The parameters of some images: ``rows`` of every tensor in a dataclass and in dataclasses within it."""
    if isinstance(parameters, Tensor):
        return parameters[rows]
    if isinstance(parameters, tuple):
        return tuple(rows_of(value, rows) for value in parameters)
    if is_dataclass(parameters) and not isinstance(parameters, type):
        return replace(parameters, **{key: rows_of(value, rows) for key, value in vars(parameters).items()})
    return parameters


def check_share(name: str, share: float) -> None:
    """Raises UsageError unless ``degrade.NAME`` is between 0 and 1."""
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"degrade.{name} must be between 0 and 1; found {share}")


def check_range(name: str, given: Any, least: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """``degrade.NAME`` as (smallest, largest). Raises UsageError unless it is two numbers, least < smallest <= largest <
    most."""
    numbers = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    if numbers:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given)
    if not numbers or not least < given[0] <= given[1] < most:
        limit = f" below {most:g}" if most < math.inf else ""
        raise UsageError(
            f"degrade.{name} must be [smallest, largest], numbers above {least:g}{limit}; found {given!r}"
        )
    return float(given[0]), float(given[1])


def uniform(n: int, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """float32 [n], uniform between the limits."""
    smallest, largest = limits
    return smallest + (largest - smallest) * torch.rand(n, generator=generator)


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


class ResolutionPolicy(Policy):
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
        check_share("clean_share", clean_share)
        check_share("mirror", mirror)
        for name, values in (("sizes", sizes), ("continuous", continuous), ("down", down), ("up", up)):
            if values is not None and (isinstance(values, str) or not isinstance(values, Sequence)):
                raise UsageError(f"degrade.{name} must be a list; found {values!r}")
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

    def frame(self, images: Tensor, parameters: DegradeParameters) -> Tensor:
        mirror = parameters.mirror.to(images.device)
        return torch.where(mirror[:, None, None, None], images.flip(-1), images)

    def degrade(self, hq: Tensor, parameters: DegradeParameters) -> Tensor:
        full_size = hq.shape[-1]
        keys = torch.stack([parameters.size, parameters.down, parameters.up], dim=1)
        keys = keys[parameters.size < full_size]
        if keys.numel() == 0:
            return hq
        degraded = hq.clone()
        for size, down, up in torch.unique(keys, dim=0).tolist():
            chosen = (parameters.size == size) & (parameters.down == down) & (parameters.up == up)
            index = chosen.nonzero().squeeze(1).to(hq.device)
            degraded[index] = resample(hq[index], size, KERNELS[down], KERNELS[up])
        return degraded
