"""Noise: Gaussian, shot, impulse, speckle. Levels are float32 [n, c, h, w] from 0 to 255."""

from functools import lru_cache

import torch
from torch import Tensor

from lrface.degrade.corruptions.draws import Draws


def gaussian_noise(levels: Tensor, deviation: float | Tensor, draws: Draws) -> Tensor:
    """Add normal noise to every value; a tensor of deviations is [n, 1, 1, 1]."""
    return draws.normal("noise", *levels.shape[1:]).mul_(255 * deviation).add_(levels)


def speckle_noise(levels: Tensor, deviation: float | Tensor, draws: Draws) -> Tensor:
    """Add normal noise in proportion to every value; a tensor of deviations is [n, 1, 1, 1]."""
    return draws.normal("noise", *levels.shape[1:]).mul_(deviation).add_(1).mul_(levels)


def impulse_noise(levels: Tensor, share: float, draws: Draws) -> Tensor:
    """Set ``share`` of the values to black or to white, each as often."""
    count = levels[0].numel()
    bits = draws.bits("noise", (count + 1) // 2).view(torch.int16)[:, :count].view(levels.shape)
    # Of 2^16 equally likely numbers, those closest to 0: negative ones give black, the others white.
    hit = bits.abs() < max(1, round(share * 2.0**15))
    return torch.where(hit, (bits >= 0).float().mul_(255), levels)


@lru_cache(maxsize=16)
def _alias_table(photons: float, device: torch.device) -> tuple[Tensor, int]:
    """Walker's alias tables of the Poisson distributions of all 256 levels, one after another.

    Returns:
        int32 [256 * 2^k]: a threshold of 15 bits, then the alias of 16 bits; and k.
    """
    means = torch.arange(256, dtype=torch.float64) * (photons / 255)
    largest = int(photons + 9 * photons**0.5 + 9)
    columns = 1 << largest.bit_length()
    counts = torch.arange(columns, dtype=torch.float64)
    means[0] = 1.0  # replaced below
    logs = counts * means[:, None].log() - means[:, None] - torch.lgamma(counts + 1)
    chance = logs.exp()
    chance[0] = 0
    chance[0, 0] = 1
    scaled = (chance / chance.sum(1, keepdim=True) * columns).numpy()
    table = torch.empty(256, columns, dtype=torch.int32)
    for level, row in enumerate(scaled):
        values = row.tolist()
        thresholds, aliases = [1.0] * columns, list(range(columns))
        small = [column for column, value in enumerate(values) if value < 1]
        large = [column for column, value in enumerate(values) if value >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            thresholds[low], aliases[low] = values[low], high
            values[high] -= 1 - values[low]
            if values[high] < 1:
                small.append(large.pop())
        packed = (torch.tensor(thresholds) * 32767).round().to(torch.int32) << 16
        table[level] = packed | torch.tensor(aliases, dtype=torch.int32)
    return table.flatten().to(device), columns.bit_length() - 1


def shot_noise(levels: Tensor, photons: float, draws: Draws) -> Tensor:
    """Count photons: Poisson numbers whose mean at full white is ``photons``.

    A value between two 8-bit levels takes the distribution of one of both, so that the mean is exact.
    """
    table, bits = _alias_table(photons, levels.device)
    random = draws.bits("noise", *levels.shape[1:])
    # From the top: k bits choose the column, 15 are held against its threshold, the rest (at least 6) choose between
    # two levels.
    rest = 32 - bits - 15
    dither = random.bitwise_and((1 << rest) - 1).float().add_(0.5).mul_(2.0**-rest)
    level = dither.add_(levels).clamp_(0, 255).to(torch.int32)
    column = (random >> (32 - bits)).bitwise_and_((1 << bits) - 1)
    entry = table.index_select(0, level.bitwise_left_shift_(bits).add_(column).flatten()).view_as(random)
    keeps = random.bitwise_right_shift_(rest).bitwise_and_(32767) < (entry >> 16)
    return torch.where(keeps, column, entry.bitwise_and_(0xFFFF)).float().mul_(255 / photons)
