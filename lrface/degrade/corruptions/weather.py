"""Snow, frost, fog, brightness. Levels are float32 [n, c, h, w] from 0 to 255."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions.blur import blur_along, zoomed_size
from lrface.degrade.corruptions.digital import brightness
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.frost import SHARES, textures

__all__ = ["brightness", "fog", "frost", "snow"]

_LUMA = (0.299, 0.587, 0.114)


def snow(
    levels: Tensor, constants: tuple[float, float, float, float, float, float, float], draws: Draws
) -> Tensor:
    """Magnified and moved flakes over a whitened image, and the same flakes turned by half a turn."""
    mean, deviation, enlargement, threshold, radius, sigma, left = constants
    height, width = levels.shape[-2:]
    crops, sizes = [], []
    for size in (height, width):
        _, crop, zoomed = zoomed_size(size, enlargement)
        crops.append(crop)
        sizes.append(zoomed)
    flakes = draws.normal("flakes", 1, *crops).mul_(deviation).add_(mean)
    flakes = F.interpolate(flakes, sizes, mode="bilinear", align_corners=True)
    flakes = flakes.masked_fill_(flakes < threshold, 0).clamp_(max=1).mul_(255)
    angle = draws.uniform("angle", 1).double().squeeze(1) * 90 - 135
    flakes = blur_along(flakes, radius, sigma, angle).round_()[..., :height, :width]
    grey = levels[:, :1]
    if levels.shape[1] == 3:
        weights = torch.tensor(_LUMA, device=levels.device).view(1, 3, 1, 1)
        grey = (levels * weights).sum(1, keepdim=True)
    white = torch.maximum(levels, grey.mul(1.5).add_(127.5)).mul_(1 - left)
    return levels.mul_(left).add_(white).add_(flakes + flakes.flip(-2, -1))


def frost(levels: Tensor, constants: tuple[float, float, float], draws: Draws) -> Tensor:
    """A crop of one of the textures of frost laid over the image."""
    image_weight, frost_weight, scale = constants
    height, width = levels.shape[-2:]
    pictures = textures(height, width, scale, levels.device)
    chance = draws.uniform("crop", 3)
    bounds = torch.tensor(SHARES, device=levels.device).cumsum(0)
    chosen = (chance[:, :1] >= bounds[:-1]).sum(1)
    tall, wide = pictures.shape[1:3]
    top = (chance[:, 1] * (tall - height)).long()
    side = (chance[:, 2] * (wide - width)).long()
    rows = top[:, None] + torch.arange(height, device=levels.device)
    columns = side[:, None] + torch.arange(width, device=levels.device)
    # Places are looked up, three values at once.
    places = (chosen[:, None] * tall + rows)[:, :, None] * wide + columns[:, None, :]
    crop = pictures.flatten(0, 2).index_select(0, places.flatten()).view(len(levels), height, width, 3)
    crop = crop.permute(0, 3, 1, 2)
    return levels.mul_(image_weight).add_(crop, alpha=frost_weight)


def plasma(draws: Draws, side: int, decay: float) -> Tensor:
    """Heights by the diamond-square algorithm.

    Args:
        side: a power of two.
        decay: what the random part shrinks by from octave to octave.

    Returns:
        float32 [n, side, side] from 0 to 1; left and right, top and bottom meet.
    """
    count = len(draws.seeds)
    random = draws.uniform("plasma", side * side).mul_(2).sub_(1)
    heights = torch.zeros(count, 1, 1, device=draws.device)
    wibble, used, size = 100.0, 1, 1
    while size < side:
        # Corners; then the middles of their squares; then the middles of the diamonds that both make.
        extents = random[:, used : used + 3 * size * size].view(count, 3, size, size) * (wibble * wibble)
        used += 3 * size * size
        pairs = heights + heights.roll(-1, 1)
        middles = (pairs + pairs.roll(-1, 2)).div_(4).add_(extents[:, 0])
        tops = (middles + middles.roll(1, 1)).add_(heights).add_(heights.roll(-1, 2))
        tops = tops.div_(4).add_(extents[:, 1])
        lefts = (middles + middles.roll(1, 2)).add_(pairs).div_(4).add_(extents[:, 2])
        rows = torch.stack([heights, tops], dim=3).view(count, size, 2 * size)
        between = torch.stack([lefts, middles], dim=3).view(count, size, 2 * size)
        size *= 2
        heights = torch.stack([rows, between], dim=2).view(count, size, size)
        wibble /= decay
    lowest = heights.amin(dim=(1, 2), keepdim=True)
    span = heights.amax(dim=(1, 2), keepdim=True) - lowest
    return (heights - lowest).div_(span.clamp_(min=1e-12))


def fog(levels: Tensor, constants: tuple[float, float], draws: Draws, least_side: int = 3) -> Tensor:
    """Add clouds and darken to the former maximum."""
    thickness, decay = constants
    height, width = levels.shape[-2:]
    side = 1 << (max(height, width, least_side) - 1).bit_length()
    clouds = plasma(draws, side, decay)[:, None, :height, :width]
    most = levels.amax(dim=(1, 2, 3), keepdim=True)
    share = most / (most + 255 * thickness)
    return levels.mul_(share).add_(clouds * (share * (255 * thickness)))
