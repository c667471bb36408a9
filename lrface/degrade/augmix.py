"""AugMix (Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020),
batched: chains of operations on each image, mixed with each other and with the image.

The operations are Pillow's, on whole levels, and none is one of the test corruptions (no contrast, colour, brightness,
sharpness). Their strengths are those of the authors: at level l of 10, posterize keeps 4 - int(4 l / 10) bits, solarize
turns values from 256 - int(25.6 l) up, rotate goes to int(3 l) degrees, shear to 0.03 l, translate to a thirtieth of
l sides.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.framing import Frame, Framing
from lrface.degrade.policy import Policy, check_share
from lrface.errors import UsageError

OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclass
class AugMixParameters:
    """What happens to each of n images. All tensors live on the CPU.

    frame: how they are mirrored and cropped.
    operation: int64 [n, width, depth], index into :data:`OPERATIONS`, or -1 where a chain is shorter.
    level: float32 [n, width, depth], strength of the operation, 0 to 10.
    negative: bool [n, width, depth], to the other side.
    weight: float32 [n, width], of the chains; adds up to 1.
    mix: float32 [n], share of the chains in the result; 0 for an image that stays clean.
    """

    frame: Frame
    operation: Tensor
    level: Tensor
    negative: Tensor
    weight: Tensor
    mix: Tensor


class AugMixPolicy(Policy):
    """Each image becomes (1 - m) image + m sum_k w_k chain_k(image), w from Dirichlet(alpha), m from Beta(alpha, alpha).

    Args:
        width: k, chains of an image.
        depth: operations of a chain; 0 draws 1, 2 or 3 for each.
        severity: greatest level of an operation, above 0.1 and up to 10; levels are uniform from 0.1 (3 in the paper for
            CIFAR, 1 in the authors' code for ImageNet).
        alpha: of the Dirichlet and Beta distributions.
        clean_share: share of the batch that stays clean, exact up to rounding; none in the paper.
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        width: int = 3,
        depth: int = 0,
        severity: float = 3.0,
        alpha: float = 1.0,
        clean_share: float = 0.0,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        if width < 1 or depth < 0:
            raise UsageError(
                f"degrade.width must be at least 1 and degrade.depth at least 0; found {width} and {depth}"
            )
        if not 0.1 < severity <= 10:
            raise UsageError(f"degrade.severity must lie above 0.1 and up to 10; found {severity}")
        if not 0 < alpha < float("inf"):
            raise UsageError(f"degrade.alpha must be above 0; found {alpha}")
        self.width, self.depth = width, depth
        self.severity, self.alpha = severity, alpha
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> AugMixParameters:
        frame = self.framing.sample(n, generator)
        shape = (n, self.width, self.depth or 3)
        operation = torch.randint(len(OPERATIONS), shape, generator=generator)
        if not self.depth:
            depth = torch.randint(1, 4, shape[:2], generator=generator)
            operation[torch.arange(3) >= depth[..., None]] = -1
        level = torch.rand(shape, generator=generator) * (self.severity - 0.1) + 0.1
        negative = torch.rand(shape, generator=generator) < 0.5
        # PyTorch's own gamma numbers take no generator.
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        weight = torch.from_numpy(random.dirichlet([self.alpha] * self.width, n)).float()
        mix = torch.from_numpy(random.beta(self.alpha, self.alpha, n)).float()
        mix[torch.randperm(n, generator=generator)[: round(n * self.clean_share)]] = 0
        return AugMixParameters(frame, operation, level, negative, weight, mix)

    def frame(self, images: Tensor, parameters: AugMixParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: AugMixParameters) -> Tensor:
        mixed = parameters.mix > 0
        rows = mixed.nonzero().squeeze(1)
        if not len(rows):
            return hq
        index = rows.to(hq.device)
        own = hq[index]
        count, width, depth = parameters.operation[rows].shape
        levels = (own * 255).round_().repeat_interleave(width, dim=0)
        for step in range(depth):
            drawn = (parameters.operation, parameters.level, parameters.negative)
            levels = apply_operations(levels, *(value[rows, :, step].flatten() for value in drawn))
        weight = (parameters.weight * parameters.mix[:, None])[rows].to(hq.device, hq.dtype)
        chains = levels.view(count, width, *hq.shape[1:]).mul_(weight[:, :, None, None, None] / 255).sum(1)
        mix = parameters.mix[rows].to(hq.device, hq.dtype)[:, None, None, None]
        done = own * (1 - mix) + chains
        if len(rows) == len(hq):
            return done
        degraded = hq.clone()
        degraded[index] = done
        return degraded


def apply_operations(levels: Tensor, operation: Tensor, level: Tensor, negative: Tensor) -> Tensor:
    """One operation on each of n images.

    Args:
        levels: float [n, c, h, w], whole numbers 0 to 255.
        operation: int64 [n] on the CPU, index into :data:`OPERATIONS`; -1 leaves an image as it is.
        level: float [n] on the CPU, 0 to 10.
        negative: bool [n] on the CPU: geometric operations go to the other side.

    Returns:
        The same shape, whole numbers 0 to 255.
    """
    done = levels.clone()
    geometric = torch.zeros(len(levels), dtype=torch.bool)
    for number, name in enumerate(OPERATIONS):
        if name in GEOMETRIC:
            geometric |= operation == number
            continue
        rows = (operation == number).nonzero().squeeze(1)
        if not len(rows):
            continue
        index = rows.to(levels.device)
        own, strength = levels[index], level[rows].to(levels.device)[:, None, None, None]
        if name == "autocontrast":
            done[index] = autocontrast(own)
        elif name == "equalize":
            done[index] = equalize(own)
        elif name == "posterize":
            step = 2.0 ** (4 + (strength * 4 / 10).floor())
            done[index] = (own / step).floor_().mul_(step)
        else:
            threshold = 256 - (strength * 256 / 10).floor()
            done[index] = torch.where(own < threshold, own, 255 - own)
    rows = geometric.nonzero().squeeze(1)
    if len(rows):
        index = rows.to(levels.device)
        height, width = levels.shape[-2:]
        matrices = affine_matrices(operation[rows], level[rows], negative[rows], height, width)
        done[index] = warp(levels[index], matrices)
    return done


def autocontrast(levels: Tensor) -> Tensor:
    """Stretch each channel to 0 to 255. float [n, c, h, w], whole numbers, and back."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    # Double precision and this order, as Pillow computes its table: the result is cut to whole levels. 255.0 / x would
    # be 255 times the rounded 1 / x.
    scale = torch.full_like(high, 255, dtype=torch.float64) / (high - low)
    stretched = (levels.double() * scale - low.double() * scale).floor().clamp(0, 255).to(levels.dtype)
    return torch.where(high > low, stretched, levels)


def equalize(levels: Tensor) -> Tensor:
    """Level the histogram of each channel, as Pillow does. float [n, c, h, w], whole numbers, and back."""
    count, channels, height, width = levels.shape
    values = levels.long().view(count * channels, -1)
    # One count of all channels, each with 256 bins of its own.
    first = torch.arange(count * channels, device=levels.device)[:, None] * 256
    histogram = torch.bincount((values + first).flatten(), minlength=count * channels * 256).view(-1, 256)
    last = values.amax(1, keepdim=True)
    step = (height * width - histogram.gather(1, last)).div(255, rounding_mode="floor")
    below = histogram.cumsum(1) - histogram
    divisor = step.clamp_min(1)
    table = (below + step.div(2, rounding_mode="floor")).div(divisor, rounding_mode="floor").clamp_max_(255)
    equalized = table.gather(1, values)
    return torch.where(step > 0, equalized, values).view_as(levels).to(levels.dtype)


def affine_matrices(operation: Tensor, level: Tensor, negative: Tensor, height: int, width: int) -> Tensor:
    """Where each result's pixel is read: float64 [n, 2, 3], from (x, y, 1) in pixels, pixel centres at halves.

    Args: as :func:`apply_operations`, geometric operations only.
    """
    level = level.double()
    sign = torch.where(negative, -1.0, 1.0).double()

    def is_(name: str) -> Tensor:
        return operation == OPERATIONS.index(name)

    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(len(operation), 1, 1)
    # Image axes point down: Pillow turns counterclockwise for positive angles.
    angle = torch.deg2rad(torch.where(is_("rotate"), sign * (level * 30 / 10).floor(), 0.0))
    cosine, sine = angle.cos(), angle.sin()
    matrices[:, 0, 0], matrices[:, 0, 1] = cosine, -sine
    matrices[:, 1, 0], matrices[:, 1, 1] = sine, cosine
    x, y = width / 2, height / 2
    matrices[:, 0, 2] = x - cosine * x + sine * y
    matrices[:, 1, 2] = y - sine * x - cosine * y
    shear = sign * level * 0.3 / 10
    matrices[:, 0, 1] += torch.where(is_("shear_x"), shear, 0.0)
    matrices[:, 1, 0] += torch.where(is_("shear_y"), shear, 0.0)
    shift = [sign * (level * (side / 3) / 10).floor() for side in (width, height)]
    matrices[:, 0, 2] += torch.where(is_("translate_x"), shift[0], 0.0)
    matrices[:, 1, 2] += torch.where(is_("translate_y"), shift[1], 0.0)
    return matrices


def warp(levels: Tensor, matrices: Tensor) -> Tensor:
    """Read each image through its matrix, bilinearly; black where that lies outside of it.

    Args:
        levels: float [n, c, h, w], whole numbers 0 to 255.
        matrices: float64 [n, 2, 3] on the CPU, as :func:`affine_matrices` gives them.

    Returns:
        The same shape, whole numbers.
    """
    height, width = levels.shape[-2:]
    size = torch.tensor([width, height], dtype=torch.float64)
    # To grid_sample's coordinates, -1 to 1 from edge to edge, on both sides.
    scaled = matrices.clone()
    scaled[:, :, :2] *= size
    scaled[:, :, 2] = matrices[:, :, 2] * 2 + matrices[:, :, :2] @ size - size
    scaled /= size[None, :, None]
    theta = scaled.to(levels.device, torch.float32)
    grid = F.affine_grid(theta, [len(levels), 1, height, width], align_corners=False)
    # Pillow repeats the edge within half a pixel of it and is black outside.
    inside = ((grid >= -1 - 1e-5) & (grid < 1 - 1e-5)).all(-1)[:, None]
    read = F.grid_sample(levels.float(), grid, padding_mode="border", align_corners=False)
    return torch.where(inside, read.round_(), 0.0).to(levels.dtype)
