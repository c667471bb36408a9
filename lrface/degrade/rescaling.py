"""Perturbations scaled to a given length although the result is clipped to [0, 1].

Rauber and Bethge, "Fast differentiable clipping-aware normalization and rescaling", arXiv 2007.07677, state the problem:
find gamma >= 0 with ||clip(x + gamma delta, 0, 1) - x||_2 = epsilon. A value whose room is r (1 - x where delta > 0, x where
delta < 0) gives min(gamma^2 delta^2, r^2) to the squared length, so that this is a concave function of gamma^2 made of
straight pieces, with a corner where a value reaches its end. The root is found from piece to piece.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrface.errors import UsageError

PART = 1 << 20  # values that are worked on together on a CPU: they stay in its caches
SAMPLED = 17  # one value of so many tells where to begin
LIMIT = 200  # steps, far above what :func:`_root` can need


@dataclass
class Rescaled:
    """Images with perturbations of a given length.

    images: clip(x + gamma delta, 0, 1), the shape of x, float32 (float64 for float64); differentiable through delta.
    gamma: [n], same dtype; where the length is out of reach the last factor that was tried, 0 for a delta of zeros.
    reached: bool [n]; False where no gamma gives a perturbation of this length. The image then has the largest there is,
        each value at 0 or 1 where delta points (the image itself for a delta of zeros), and no gradient.
    """

    images: Tensor
    gamma: Tensor
    reached: Tensor


def rescale(images: Tensor, perturbation: Tensor, epsilon: float | Tensor) -> Rescaled:
    """Scale each image's perturbation so that what is left of it after clipping has the length ``epsilon``.

    The length is exact up to rounding: there is no search over gamma. With a value's room r as above and the set K of
    values that are not clipped, gamma^2 = (epsilon^2 - sum of r^2 outside K) / (sum of delta^2 in K). Newton's method finds
    K: on a concave function of straight pieces it rises to the root and ends there, after some three looks at the values.
    (Sorting the corners, as the paper does, takes many times as long.)

    Args:
        images: float [n, c, h, w] in [0, 1], constants to autograd.
        perturbation: float [n, c, h, w], any finite numbers; values below 1e-18 of an image's largest count as 0.
        epsilon: L2 length over the c h w values of an image, above 0; or one for each image, float [n].

    Raises:
        UsageError: shapes that differ, an epsilon that is not above 0, images that need a gradient.
    """
    if images.shape != perturbation.shape or images.ndim != 4:
        raise UsageError(
            f"images and perturbation must both be [n, c, h, w]; found {tuple(images.shape)} and "
            f"{tuple(perturbation.shape)}"
        )
    if images.requires_grad:
        raise UsageError("rescale gives gradients to the perturbation alone; detach the images")
    if not isinstance(epsilon, Tensor):
        if not 0 < epsilon < float("inf"):
            raise UsageError(f"epsilon must be above 0; found {epsilon}")
        epsilon = torch.full((len(images),), float(epsilon), dtype=torch.float64, device=images.device)
    if epsilon.shape != (len(images),):
        raise UsageError(
            f"epsilon must be a number or have shape [{len(images)}]; found {tuple(epsilon.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(images.dtype, perturbation.dtype), torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        rescaled, gamma, reached = _Rescale.apply(perturbation.to(dtype), images.to(dtype), epsilon.double())
    return Rescaled(rescaled, gamma, reached)


def epsilon_for(size: int, epsilon: float, at: int = 224) -> float:
    """The length for images of side ``size`` that has the same root mean square as ``epsilon`` at side ``at``.

    A length grows with the root of the number of values: epsilon_size = epsilon_at * size / at, for as many channels.
    The paper's 135 and 70 for 3 x 224 x 224 values in [0, 1] (root mean square 0.348 and 0.180) are 67.5 and 35 at 112
    pixels, 19.3 and 10 at 32; its 10 for MNIST's 1 x 28 x 28 is 0.357.
    """
    return epsilon * size / at


def _rows(images: Tensor, channels_last: bool) -> Tensor:
    """[k, c, h, w] -> [k, c h w], a view where the values lie in that order; any order of values gives the same length."""
    return (images.permute(0, 2, 3, 1) if channels_last else images).reshape(len(images), -1)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, perturbation: Tensor, images: Tensor, epsilon: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, values = len(images), images[0].numel() if len(images) else 1
        last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        learns = ctx.needs_input_grad[0]
        order = torch.channels_last if last else torch.contiguous_format
        out = torch.empty_like(images, memory_format=order)
        free = torch.empty(n, values, dtype=torch.bool, device=images.device) if learns else None
        scale, slope, gamma = (images.new_empty(n) for _ in range(3))
        reached = torch.empty(n, dtype=torch.bool, device=images.device)
        step = max(1, PART // values) if images.device.type == "cpu" else max(1, n)
        space = images.new_empty(4, min(step, n), values)
        precision = 32 * torch.finfo(images.dtype).eps
        for first in range(0, n, step):
            part = slice(first, first + step)
            x, delta = _rows(images[part], last), _rows(perturbation[part], last)
            # Into the same memory, and arithmetic only: on a CPU new pages, torch.where and comparisons take up to forty
            # times as long as the work itself.
            size, room, left, more = space[:, : len(x)]
            torch.abs(delta, out=size)
            scale[part] = largest = size.amax(1)
            size.div_(torch.where(largest > 0, largest, 1)[:, None])
            torch.sub(x, 0.5, out=left)
            torch.sign(delta, out=room).mul_(left).neg_().add_(0.5)
            found = _root(size, room, epsilon[part].square(), left, more, precision)
            squared, slope[part], reached[part] = found
            root = squared.sqrt()
            if free is not None:
                torch.lt(size.mul_(root.to(size)[:, None]), room, out=free[part])
            gamma[part] = torch.where(largest > 0, root / largest.double(), 0).to(gamma)
            moved = torch.addcmul(x, delta, gamma[part, None], out=left).clamp_(0, 1)
            if not bool(reached[part].all()):
                ends = torch.where(delta > 0, 1, torch.where(delta < 0, 0, x))
                moved = torch.where(reached[part, None], moved, ends)
            _rows(out[part], last).copy_(moved)
        ctx.save_for_backward(perturbation, free, scale, slope, gamma, reached)
        ctx.last = last
        ctx.mark_non_differentiable(gamma, reached)
        return out, gamma, reached

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upper: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        """With y = x + gamma delta and gamma^2 = (epsilon^2 - R) / D in K, D = sum of delta^2: d gamma / d delta_j =
        -gamma delta_j / D. Values outside K stay at their end."""
        perturbation, free, scale, slope, gamma, reached = ctx.saved_tensors
        unit = _rows(perturbation, ctx.last) / torch.where(scale > 0, scale, 1)[:, None]
        own = torch.where(free, _rows(upper, ctx.last), 0)
        along = torch.where(reached, (own * unit).sum(1) / torch.where(slope > 0, slope, 1), 0)
        lower = torch.where(free, own - unit * along[:, None], 0)
        lower *= torch.where(reached, gamma, 0)[:, None]
        n, c, h, w = perturbation.shape
        back = lower.view(n, h, w, c).permute(0, 3, 1, 2) if ctx.last else lower.view(n, c, h, w)
        return back, None, None


def _root(
    size: Tensor, room: Tensor, target: Tensor, left: Tensor, free: Tensor, precision: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sum of min(g size^2, room^2) is ``target``.

    Newton's method from the left of a root of a concave function stays there; with a residual that falls to h' and a slope
    that falls to s', h'/h + s'/s <= 1, so that each step quarters their product at least.

    Args:
        size, room: [k, values], sizes at most 1.
        target: float64 [k].
        left, free: memory of the same shape, which is overwritten.
        precision: residual to stop at, relative to the target; what is returned is a step further, where the residual is
            about its square.

    Returns:
        g, float64 [k]; the slope there; whether the target was reached, bool [k].
    """
    values = size.shape[1]
    squared = least = target / values  # g cannot be smaller
    if values > 1024:
        some, its_room = size[:, ::SAMPLED].contiguous(), room[:, ::SAMPLED].contiguous()
        left_there, free_there = torch.empty_like(some), torch.empty_like(some)
        found, _, _ = _root(some, its_room, target / SAMPLED, left_there, free_there, 0.01)
        squared = found.maximum(least)
    tolerance = target * precision
    for _ in range(LIMIT):
        torch.addcmul(room, size, -squared.sqrt().to(size)[:, None], out=left)
        # The sizes of values that have some way left.
        torch.ops.aten.threshold_backward.grad_input(size, left, 0, grad_input=free)
        slope = free.square_().sum(1).double()
        residual = target - torch.sub(room, left.relu_(), out=left).square_().sum(1).double()
        stuck = (residual > tolerance) & (slope <= 0)
        moved = torch.where(slope > 0, squared + residual / slope, 0).maximum(least)
        squared = torch.where(stuck, squared, moved)
        if bool((stuck | (residual.abs() <= tolerance)).all()):
            break
    return squared, slope.to(size), ~stuck
