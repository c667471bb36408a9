"""Contrast, brightness, saturation, elastic transform, pixelate. Levels are float32 [n, c, h, w] from 0 to 255."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import AxisFilter, axis_filter, blur_separably


def contrast(levels: Tensor, factor: float, draws: Draws) -> Tensor:
    """Pull every channel towards its mean over the image."""
    means = levels.mean(dim=(2, 3), keepdim=True)
    return levels.mul_(factor).add_(means.mul_(1 - factor))


def brightness(levels: Tensor, offset: float, draws: Draws) -> Tensor:
    """Add to the value of HSV. Hue and saturation stay: the three channels are multiplied alike."""
    value = levels.amax(dim=1, keepdim=True)
    raised = (value + 255 * offset).clamp_(max=255)
    black = value == 0
    return torch.where(black, raised, levels.mul_(raised / value.masked_fill(black, 1)))


def saturate(levels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """Multiply the saturation of HSV and add to it. Grey counts as red (hue 0)."""
    factor, offset = constants
    value = levels.amax(dim=1, keepdim=True)
    span = value - levels.amin(dim=1, keepdim=True)
    grey = span == 0
    # Distances from the value are saturation * value * (something of the hue): they scale as the saturation does.
    saturation = span / value.clamp(min=1e-6)
    wanted = (saturation * factor).add_(offset).clamp_(0, 1)
    distances = (value - levels).mul_(wanted * value / span.masked_fill(grey, 1))
    if offset:
        red = torch.tensor([0.0, 1.0, 1.0], device=levels.device).view(1, 3, 1, 1)
        distances = torch.where(grey, red * (wanted * value), distances)
    return value - distances


@lru_cache(maxsize=64)
def _box_windows(size: int, smaller: int, device: torch.device) -> tuple[AxisFilter, Tensor]:
    """How Pillow's box filter shrinks ``size`` pixels to ``smaller``, and how its nearest filter brings them back.

    Returns:
        The filter, each pixel of it the mean of a window of whole pixels; and for each of ``size``
        pixels the one it shows, int64.
    """
    scale = size / smaller
    weights = torch.zeros(smaller, size, dtype=torch.float64)
    for index in range(smaller):
        centre = (index + 0.5) * scale
        first = max(int(centre - scale / 2 + 0.5), 0)
        last = min(int(centre + scale / 2 + 0.5), size)
        # Of pixels whose centres lie on the window's edges, the one behind counts.
        inside = [-0.5 < (place - centre + 0.5) / scale <= 0.5 for place in range(first, last)]
        weights[index, first:last] = torch.tensor(inside).double() / sum(inside)
    # Pillow adds the step up from pixel to pixel: where pixels meet exactly, its rounding errors decide.
    step, place, shown = smaller / size, smaller / size / 2, []
    for _ in range(size):
        shown.append(min(int(place), smaller - 1))
        place += step
    return axis_filter(weights, device), torch.tensor(shown, device=device)


def pixelate(levels: Tensor, ratio: float, draws: Draws) -> Tensor:
    """Shrink to ``ratio`` by the mean over boxes of whole pixels, enlarge back without smoothing."""
    height, width = levels.shape[-2:]
    rows, row_shown = _box_windows(height, max(1, int(height * ratio)), levels.device)
    columns, column_shown = _box_windows(width, max(1, int(width * ratio)), levels.device)
    means = rows.down(columns.across(levels).add_(0.5).floor_())
    shown = means.add_(0.5).clamp_(0, 255).to(torch.uint8)
    return shown.index_select(3, column_shown).index_select(2, row_shown).float()


def _sample(levels: Tensor, rows: Tensor, columns: Tensor, mirrored_at_pixels: bool) -> Tensor:
    """Read images bilinearly at places in pixels, [n, h, w] each.

    Beyond the edge the image is mirrored, at the centre of its outermost pixels or at their outer rim.
    """
    height, width = levels.shape[-2:]
    if mirrored_at_pixels:
        grid = torch.stack(
            [columns * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1], dim=-1
        )
    else:
        grid = torch.stack([(columns + 0.5) * (2 / width) - 1, (rows + 0.5) * (2 / height) - 1], dim=-1)
    return F.grid_sample(
        levels, grid, mode="bilinear", padding_mode="reflection", align_corners=mirrored_at_pixels
    )


def elastic_transform(levels: Tensor, constants: tuple[str, float, float, float], draws: Draws) -> Tensor:
    """Displace pixels by smoothed noise, after a random affine map where the set has one."""
    kind, first, second, third = constants
    height, width = levels.shape[-2:]
    rows = torch.arange(height, dtype=torch.float32, device=levels.device)[:, None]
    columns = torch.arange(width, dtype=torch.float32, device=levels.device)
    if kind == "relative":
        strength = third * first * height
        sigmas = (height * second, width * second)
    else:
        strength, sigmas = first, (second, second)
        levels = _random_affine(levels, third, draws)
    if strength == 0:
        return levels
    shifts = draws.uniform("displacement", 2, height, width).mul_(2).sub_(1)
    shifts = blur_separably(shifts, sigmas, truncate=3, border="reflect").mul_(strength)
    return _sample(levels, rows + shifts[:, 1], columns + shifts[:, 0], mirrored_at_pixels=False)


def _random_affine(levels: Tensor, greatest: float, draws: Draws) -> Tensor:
    """The affine map that moves three points around the centre by up to ``greatest`` pixels along each axis."""
    height, width = levels.shape[-2:]
    middle_x, middle_y, arm = width // 2, height // 2, min(height, width) // 3
    if arm == 0:
        return levels  # the three points are one: no map is defined
    points = torch.tensor(
        [
            [middle_x + arm, middle_y + arm],
            [middle_x + arm, middle_y - arm],
            [middle_x - arm, middle_y - arm],
        ],
        dtype=torch.float32,
        device=levels.device,
    )
    moved = points + draws.uniform("affine", 3, 2).mul_(2).sub_(1).mul_(greatest)
    # Backwards: from where the points went to where they were. Three points fix six numbers; Cramer's rule, because
    # a solver on a GPU would wait for it.
    origin = moved[:, 2]
    one, two = moved[:, 0] - origin, moved[:, 1] - origin
    determinant = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
    determinant = torch.where(determinant.abs() < 1e-6, 1e-6, determinant)
    source_one, source_two = points[0] - points[2], points[1] - points[2]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=levels.device),
        torch.arange(width, dtype=torch.float32, device=levels.device),
        indexing="ij",
    )
    across, down = x - origin[:, 0, None, None], y - origin[:, 1, None, None]
    first = (across * two[:, 1, None, None] - down * two[:, 0, None, None]) / determinant[:, None, None]
    second = (down * one[:, 0, None, None] - across * one[:, 1, None, None]) / determinant[:, None, None]
    columns = points[2, 0] + first * source_one[0] + second * source_two[0]
    rows = points[2, 1] + first * source_one[1] + second * source_two[1]
    return _sample(levels, rows, columns, mirrored_at_pixels=True)
