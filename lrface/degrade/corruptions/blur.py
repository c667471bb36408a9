"""Defocus, glass, motion, zoom and Gaussian blur. Levels are float32 [n, c, h, w] from 0 to 255."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import blur_separably, correlate, gaussian_matrix


def gaussian_blur(levels: Tensor, sigma: float, draws: Draws) -> Tensor:
    """A Gaussian cut at 4 sigma, the edge repeated."""
    return blur_separably(levels, (sigma, sigma))


@lru_cache(maxsize=64)
def disk_kernel(radius: float, sigma: float, device: torch.device) -> Tensor:
    """float32 [k, k]: a disk of whole pixels, its rim smoothed by a small Gaussian."""
    reach, taps = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    places = torch.arange(-reach, reach + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).double()
    disk /= disk.sum()
    if sigma > 0:
        smooth = gaussian_matrix(len(places), sigma, taps, "mirror")
        disk = smooth @ disk @ smooth.T
    used = int(places[(disk > 1e-9).any(1)].abs().max())
    return disk[reach - used : reach + used + 1, reach - used : reach + used + 1].float().to(device)


def defocus_blur(levels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """The image of a disk: each point spreads evenly over it."""
    kernel = disk_kernel(*constants, levels.device)
    middle = len(kernel) // 2
    return correlate(levels, kernel, (middle, middle), "mirror")


def blur_along(levels: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:
    """Motion blur: a Gaussian tail of 2 * radius + 1 pixels along a line, away from each pixel on one side.

    Where the line grows longer than the image it is cut, without making up for what is lost, as the reference does.

    Args:
        angle: degrees, float64 [n]; 0 reads from the right, 90 from below.
    """
    height, width = levels.shape[-2:]
    radius = max(1, round(radius))
    taps = torch.arange(2 * radius + 1, dtype=torch.float64, device=levels.device)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    # The end of the tail that together moves no pixel by a tenth of a level is left out.
    length = 1 + sum(
        math.exp(-0.5 * (tap / sigma) ** 2) / (sigma * 1.2533) > 1e-5 for tap in range(1, 2 * radius + 1)
    )
    taps, weights = taps[:length], weights[:length]
    turn = torch.deg2rad(angle.double())[:, None]
    down = (taps * torch.sin(turn) - 0.5).ceil().long()
    right = (taps * torch.cos(turn) - 0.5).ceil().long()
    kept = (down.abs() < height) & (right.abs() < width)
    # Images whose line goes up or left are turned over for the while: then all lines go down and right.
    turned_down, turned_right = down[:, -1] < 0, right[:, -1] < 0
    reach = min(length, height), min(length, width)
    kernel = torch.zeros(len(levels), reach[0] * reach[1], dtype=torch.float32, device=levels.device)
    place = down.abs() * reach[1] + right.abs()
    kernel.scatter_add_(1, place.masked_fill(~kept, 0), (weights * kept).float())
    kernel = kernel.view(len(levels), *reach)
    if levels.device.type == "cpu":  # a GPU would be waited for
        kernel = kernel[:, : int(down.abs().max()) + 1, : int(right.abs().max()) + 1]
    flipped = _turn(levels, turned_down, turned_right)
    return _turn(correlate(flipped, kernel, (0, 0), "nearest"), turned_down, turned_right)


def _turn(levels: Tensor, down: Tensor, right: Tensor) -> Tensor:
    levels = torch.where(down[:, None, None, None], levels.flip(-2), levels)
    return torch.where(right[:, None, None, None], levels.flip(-1), levels)


def motion_blur(levels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """A one-sided Gaussian tail along a line at -45 to 45 degrees."""
    angle = draws.uniform("angle", 1).double().squeeze(1) * 90 - 45
    return blur_along(levels, *constants, angle)


def zoomed_size(size: int, factor: float) -> tuple[int, int, int]:
    """How ``size`` pixels are magnified: where the crop starts, its pixels, its pixels after magnification."""
    crop = math.ceil(size / factor)
    return (size - crop) // 2, crop, round(crop * factor)


@lru_cache(maxsize=8)
def _zoom_grids(height: int, width: int, factors: Sequence[float], device: torch.device) -> list[Tensor]:
    """Where each magnified copy is read, in the coordinates of grid_sample with aligned corners."""
    grids = []
    for factor in factors:
        axes = []
        for size in (height, width):
            start, crop, zoomed = zoomed_size(size, factor)
            places = torch.arange(size, dtype=torch.float64) * ((crop - 1) / max(zoomed - 1, 1)) + start
            axes.append(places * (2 / max(size - 1, 1)) - 1)
        rows, columns = torch.meshgrid(axes[0], axes[1], indexing="ij")
        grids.append(torch.stack([columns, rows], dim=-1).float().to(device))
    return grids


def zoom_blur(levels: Tensor, factors: Sequence[float], draws: Draws) -> Tensor:
    """The mean of the image and of its magnified copies."""
    count, channels, height, width = levels.shape
    # All images share each grid: as channels of a few large images they share the work on it.
    groups = next(k for k in (2, 1) if count % k == 0) if levels.device.type == "cpu" else 1
    stacked = levels.reshape(groups, count // groups * channels, height, width)
    total = stacked * 2 if factors[0] == 1 else stacked.clone()
    for factor, grid in zip(factors, _zoom_grids(height, width, factors, levels.device), strict=True):
        if factor != 1:
            total += F.grid_sample(stacked, grid.expand(groups, -1, -1, -1), align_corners=True)
    return total.reshape(levels.shape).mul_(1 / (len(factors) + 1))


def glass_blur(levels: Tensor, constants: tuple[float, int, int], draws: Draws) -> Tensor:
    """Blur, let pixels take the colour of near ones in turn, blur again."""
    sigma, reach, rounds = constants
    levels = blur_separably(levels, (sigma, sigma)).clamp_(0, 255).floor_()
    return blur_separably(shuffle_pixels(levels, reach, rounds, draws), (sigma, sigma))


def partners(
    height: int, width: int, reach: int, number: int, draws: Draws
) -> tuple[Tensor, tuple[slice, slice]]:
    """The pixel that each pixel meets in round ``number`` of a shuffle.

    Returns:
        int32 [n, rows, columns], places counted along rows of the image, and which rows and columns of it they are
        for: the reference leaves out a margin above and left.
    """
    rows, columns = height - 2 * reach, width - 2 * reach
    inner = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    bits = draws.bits(f"partners {number}", rows, columns)
    right = (bits & 0x7FFF).mul_(2 * reach).bitwise_right_shift_(15)
    down = bits.bitwise_right_shift_(16).bitwise_and_(0x7FFF).mul_(2 * reach).bitwise_right_shift_(15)
    places = torch.arange(height * width, dtype=torch.int32, device=draws.device).view(height, width)[inner]
    return down.mul_(width).add_(right).add_(places - reach * (width + 1)), inner


def shuffle_pixels(levels: Tensor, reach: int, rounds: int, draws: Draws) -> Tensor:
    """Every pixel takes the colour of one at most ``reach`` away, one pixel after the other from the bottom right.

    The authors of ImageNet-C meant a swap; with the views of numpy both pixels of a swap end up with the colour of
    one, and that is what their sets show. A pixel may take a colour that has come from further away in the same
    round: where its partner had its turn before, the partner's own partner counts, and so on. These chains are
    shortened for all pixels at once, each time by half.
    """
    count, channels, height, width = levels.shape
    if height <= 2 * reach or width <= 2 * reach:
        return levels
    pixels = height * width
    # All images as one row of places: int32 is enough for those that lie in memory together, and faster.
    every = torch.arange(count * pixels, dtype=torch.int32, device=levels.device)
    first = every.view(count, pixels)[:, 0].view(count, 1, 1)
    turn = torch.arange(pixels, dtype=torch.int32, device=levels.device).view(height, width)
    packed = _pack(levels).flatten()
    for number in range(rounds):
        chosen, inner = partners(height, width, reach, number, draws)
        source = every.clone()
        source.view(count, height, width)[:, inner[0], inner[1]] = chosen + first
        if reach > 1:  # within reach 1 all partners have their turn later
            # Where the partner had its turn before, the chain goes on from it; elsewhere it ends.
            moved = turn.new_zeros(height, width, dtype=torch.bool)
            moved[inner] = True
            had_turn = (chosen > turn[inner]) & moved.flatten()[chosen]
            end = every.clone()
            end.view(count, height, width)[:, inner[0], inner[1]] = (
                torch.where(had_turn, chosen, turn[inner]) + first
            )
            # A chain goes on with a chance below 0.43: one longer than 32 is not seen in 10^11 pixels.
            for _ in range(5):
                end = end.index_select(0, end)
            source = source.index_select(0, end)
        packed = packed.index_select(0, source)
    return _unpack(packed, levels.shape)


def _pack(levels: Tensor) -> Tensor:
    """The whole levels of up to 3 channels as one number: int32 [n, h * w]."""
    whole = levels.to(torch.int32)
    packed = whole[:, 0].clone(memory_format=torch.contiguous_format)
    for channel in range(1, levels.shape[1]):
        packed |= whole[:, channel] << (8 * channel)
    return packed.view(len(levels), -1)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    shifts = torch.arange(0, 8 * shape[1], 8, dtype=torch.int32, device=packed.device).view(1, -1, 1, 1)
    return (packed.view(shape[0], 1, *shape[2:]) >> shifts).bitwise_and_(255).float()
