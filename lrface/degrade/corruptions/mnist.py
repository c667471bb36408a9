"""MNIST-C's own corruptions (N. Mu and J. Gilmer, 2019), and what it does differently from ImageNet-C.

Levels are float32 [n, 1, h, w] from 0 to 255; lengths are in pixels of 28 x 28 digits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions import weather
from lrface.degrade.corruptions.blur import partners
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import blur_separably, gaussian_matrix


def glass_blur(levels: Tensor, constants: tuple[float, int, int], draws: Draws) -> Tensor:
    """Half of the pixels are swapped, and the blur runs down only: its authors' code took rows for channels."""
    sigma, reach, rounds = constants
    levels = blur_separably(levels, (sigma, 0)).clamp_(0, 255).floor_()
    return blur_separably(swap_pixels(levels, reach, rounds, draws), (sigma, 0))


def swap_pixels(levels: Tensor, reach: int, rounds: int, draws: Draws) -> Tensor:
    """Half of the pixels change places with one at most ``reach`` away, one after the other from the bottom right.

    Two swaps may change places if they touch different pixels, so all those on a diagonal, 2 * reach columns apart
    from row to row, are made at once.

    Args:
        levels: float [n, 1, h, w].
    """
    count, _, height, width = levels.shape
    if height <= 2 * reach or width <= 2 * reach:
        return levels
    pixels = levels.reshape(count, height * width)
    for number in range(rounds):
        chosen, inner = partners(height, width, reach, number, draws)
        places = torch.arange(height * width, device=levels.device).view(height, width)[inner]
        swapped = draws.bits(f"swapped {number}", *places.shape) < 0
        chosen = torch.where(swapped, chosen.long(), places).flip(1, 2)
        places = places.flip(0, 1)
        rows, columns = places.shape
        turns = torch.arange(columns) + 2 * reach * torch.arange(rows)[:, None]
        order = turns.flatten().argsort(stable=True).to(levels.device)
        counts = turns.flatten().bincount().tolist()
        all_here = places.flatten()[order].expand(count, -1).split(counts, dim=1)
        all_there = chosen.flatten(1)[:, order].split(counts, dim=1)
        for here, there in zip(all_here, all_there, strict=True):
            moved, met = pixels.gather(1, here), pixels.gather(1, there)
            pixels.scatter_(1, here, met)
            pixels.scatter_(1, there, moved)
    return pixels.view_as(levels)


def fog(levels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """A piece of a cloud of 256 x 256 pixels."""
    return weather.fog(levels, constants, draws, least_side=256)


def spatter(levels: Tensor, constants: tuple[float, float, float, float, float, int], draws: Draws) -> Tensor:
    """Grey mud at every severity."""
    mean, deviation, sigma, threshold, rim, _ = constants
    liquid = draws.normal("liquid", 1, *levels.shape[-2:]).mul_(deviation).add_(mean)
    mud = (blur_separably(liquid, (sigma, sigma)) > threshold).float()
    cover = blur_separably(mud, (rim, rim))
    cover = cover.masked_fill_(cover < 0.8, 0)
    return levels.mul_(1 - cover).add_(cover, alpha=63)


def _warp(levels: Tensor, maps: Tensor) -> Tensor:
    """Read images bilinearly where ``maps`` [n, 2, 3] send pixels (x, y, seen from the centre); black beyond."""
    height, width = levels.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=levels.device) - (height - 1) / 2,
        torch.arange(width, device=levels.device) - (width - 1) / 2,
        indexing="ij",
    )
    places = maps @ torch.stack([x.flatten(), y.flatten(), torch.ones_like(x).flatten()])
    half = torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2], device=levels.device)
    grid = (places.transpose(1, 2) / half).view(len(levels), height, width, 2)
    return F.grid_sample(levels, grid, align_corners=True)


def _signs(draws: Draws, count: int) -> Tensor:
    return torch.where(draws.bits("sign", count) < 0, -1.0, 1.0)


def _linear(levels: Tensor, a: Any, b: Any, c: Any, d: Any) -> Tensor:
    zero = torch.zeros(len(levels), device=levels.device)
    rows = [[zero + a, zero + b, zero], [zero + c, zero + d, zero]]
    return _warp(levels, torch.stack([torch.stack(row, dim=1) for row in rows], dim=1))


def shear(levels: Tensor, angle: float, draws: Draws) -> Tensor:
    """Shear to the left or to the right, the centre fixed."""
    return _linear(levels, 1, _signs(draws, 1)[:, 0] * -math.sin(angle), 0, math.cos(angle))


def rotate(levels: Tensor, angle: float, draws: Draws) -> Tensor:
    """Rotate by ``angle`` radians one way or the other, the centre fixed."""
    sine = _signs(draws, 1)[:, 0] * math.sin(angle)
    return _linear(levels, math.cos(angle), -sine, sine, math.cos(angle))


def scale(levels: Tensor, factor: float, draws: Draws) -> Tensor:
    """Shrink to ``factor``, the centre fixed."""
    return _linear(levels, 1 / factor, 0, 0, 1 / factor)


def translate(levels: Tensor, shift: int, draws: Draws) -> Tensor:
    """Move ``shift`` pixels along a diagonal."""
    signs = _signs(draws, 2) * shift
    unit = torch.eye(2, device=levels.device).expand(len(levels), 2, 2)
    return _warp(levels, torch.cat([unit, signs[:, :, None]], dim=2))


def stripe(levels: Tensor, constants: int, draws: Draws) -> Tensor:
    """Invert the left and the right quarter."""
    width = levels.shape[-1]
    inverted = torch.ones(width, dtype=torch.bool, device=levels.device)
    inverted[width // 4 : width - width // 4] = False
    return torch.where(inverted, 255 - levels, levels)


def _line(start: Tensor, end: Tensor, height: int, width: int) -> Tensor:
    """A soft line between two points (column, row), [n, 2] each, for the columns between: [n, h, w] from 0 to 1."""
    columns = torch.arange(width, device=start.device).float()
    rows = torch.arange(height, device=start.device).float()[:, None]
    run = (end - start)[:, 0]
    slope = (end - start)[:, 1] / torch.where(run == 0, 1.0, run)
    height_there = slope[:, None] * (columns - start[:, :1]) + start[:, 1:]
    distance = (rows - height_there[:, None, :]).abs().clamp_(max=2.3 - 1e-6)
    light = (distance.mul_(-1 / 2.3).log1p_() + 1).clamp_(0, 1)
    inside = (columns >= start[:, :1].floor()) & (columns < end[:, :1].ceil()) & (run != 0)[:, None]
    return light * inside[:, None, :]


def _integers(draws: Draws, stream: str, low: int, high: int, count: int) -> Tensor:
    """float32 [n, count], whole numbers from ``low`` to below ``high``."""
    return (draws.uniform(stream, count) * (high - low)).floor_().add_(low).clamp_(max=high - 1)


def dotted_line(levels: Tensor, constants: int, draws: Draws) -> Tensor:
    """A line from edge to edge, two columns on and two off."""
    height, width = levels.shape[-2:]
    ends = _integers(draws, "ends", 0, max(height - 1, 1), 2)
    start = torch.stack([torch.zeros_like(ends[:, 0]), ends[:, 0]], dim=1)
    end = torch.stack([torch.full_like(ends[:, 0], width - 1), ends[:, 1]], dim=1)
    on = torch.arange(width, device=levels.device) // 2 % 2 == 1
    return levels.add_((_line(start, end, height, width) * on)[:, None], alpha=255)


def zigzag(levels: Tensor, constants: int, draws: Draws) -> Tensor:
    """A zigzag of teeth 4 wide and 4 high along a slightly sloping line."""
    height, width = levels.shape[-2:]
    left, right = 2, width - 3
    if right <= left:
        return levels
    row = _integers(draws, "row", 0, max(height - 1, 1), 1)
    rise = _integers(draws, "rise", -5, 5, 1)
    angle = torch.atan(rise / (right - left))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    length = (right - left) / cosine
    # Corners in the frame of the line. Every image has those of the shortest line; a longer one adds up to two.
    previous = torch.zeros(len(levels), 2, device=levels.device)
    most = int(math.hypot(right - left, 5))
    for number in range((most - 2) // 4 + 2):
        along = float(4 * number + 2)
        across = 2.0 * (-1) ** number
        exists = along <= length
        past = 4 * ((length / 4).floor())
        stump = length - past
        ends_here = ~exists & (along - 4 <= length) & (stump > 0)
        last_across = -across / (2 * stump.clamp(min=1e-6))
        point = torch.cat(
            [torch.where(exists, along, length), torch.where(exists, across, last_across)], dim=1
        )
        drawn = (exists | ends_here).squeeze(1)
        corners = []
        for corner in (previous, point):
            x = corner[:, :1] * cosine - corner[:, 1:] * sine + left
            y = corner[:, :1] * sine + corner[:, 1:] * cosine + row
            corners.append(torch.cat([x, y], dim=1))
        light = _line(corners[0], corners[1], height, width) * drawn[:, None, None]
        levels = levels.add_(light[:, None], alpha=255).clamp_(max=255)
        previous = torch.where(drawn[:, None], point, previous)
    return levels


def canny_edges(levels: Tensor, constants: int, draws: Draws) -> Tensor:
    """Canny's edges (sigma 1, thresholds 0.1 and 0.2 of a Sobel gradient), white on black."""
    values = levels / 255
    height, width = values.shape[-2:]
    smooth = _blur_black_border(values)
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    difference = torch.tensor([-1.0, 0.0, 1.0], device=levels.device)
    sobel = torch.outer(torch.tensor([1.0, 2.0, 1.0], device=levels.device), difference).view(1, 1, 3, 3)
    across = F.conv2d(padded, sobel)
    down = F.conv2d(padded, sobel.transpose(2, 3))
    magnitude = torch.hypot(across, down)
    # An edge is as strong as both places one pixel along its gradient, read linearly between two neighbours.
    around = F.pad(magnitude, (1, 1, 1, 1))

    def shifted(row: Any, column: Any) -> Tensor:
        return around[:, :, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    steep = down.abs() >= across.abs()
    share = torch.where(
        steep, across.abs() / down.abs().clamp(min=1e-12), down.abs() / across.abs().clamp(min=1e-12)
    )
    same = (down * across) >= 0
    peak = magnitude >= 0.1
    for sign in (1, -1):
        straight = torch.where(steep, shifted(sign, 0), shifted(0, sign))
        diagonal = torch.where(
            same, shifted(sign, sign), torch.where(steep, shifted(sign, -sign), shifted(-sign, sign))
        )
        peak &= magnitude >= share * diagonal + (1 - share) * straight
    peak[:, :, [0, -1]] = False
    peak[:, :, :, [0, -1]] = False
    weak, strong = peak, peak & (magnitude >= 0.2)
    while True:  # a chain of weak edges that touches a strong one is kept
        grown = weak & (F.max_pool2d(strong.float(), 3, 1, 1) > 0)
        if torch.equal(grown, strong):
            return grown.float() * 255
        strong = grown


def _blur_black_border(values: Tensor) -> Tensor:
    """A Gaussian of 1 pixel over what lies inside the image alone."""
    height, width = values.shape[-2:]
    inside = []
    for size in (height, width):
        matrix = gaussian_matrix(size + 8, 1.0, 4, "nearest")[4:-4, 4:-4]
        inside.append((matrix / matrix.sum(1, keepdim=True)).to(values))
    return inside[0] @ values @ inside[1].T
