"""What a JPEG encoder and decoder do to an image: libjpeg's arithmetic without its bit stream."""

from functools import lru_cache

import torch
from torch import Tensor

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import pad
from lrface.errors import UsageError

# Recommendation ITU-T T.81, tables K.1 and K.2, row by row.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


@lru_cache(maxsize=64)
def _steps(quality: int, chrominance: bool, device: torch.device) -> Tensor:
    """The steps of quantisation, float32 [8, 1, 8]."""
    table = torch.tensor(_CHROMINANCE if chrominance else _LUMINANCE)
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((table * percent + 50) // 100).clamp(1, 255).float().view(8, 1, 8).to(device)


@lru_cache(maxsize=4)
def _cosines(device: torch.device) -> Tensor:
    """The cosine transform of 8 values, times the square root of 8: float32 [8, 8]."""
    places = torch.arange(8, dtype=torch.float64)
    cosines = torch.cos((2 * places + 1) * places[:, None] * (torch.pi / 16)) * 2**0.5
    cosines[0] = 1
    return cosines.float().to(device)


def _code(plane: Tensor, quality: int, chrominance: bool) -> Tensor:
    """Quantise the coefficients of 8 x 8 blocks. [n, h, w], both sides multiples of 8, of whole levels -> the same.

    Rounds where libjpeg's "islow" transforms round: after rows to a quarter, coefficients to an eighth, and likewise
    on the way back. Halves go up; of coefficients, away from zero.
    """
    count, height, width = plane.shape
    cosines, steps = _cosines(plane.device), _steps(quality, chrominance, plane.device)
    strips = (count * height // 8, 8, width)
    rows = (plane - 128).view(-1, 8) @ (cosines.T * 4)
    eighths = (cosines / 4) @ rows.add_(0.5).floor_().view(strips)
    eighths = eighths.add_(0.5).floor_().view(-1, 8, width // 8, 8)
    coefficients = (
        eighths.abs().mul_(1 / 8).div_(steps).add_(0.5 + 1e-6).floor_().copysign_(eighths).mul_(steps)
    )
    columns = (cosines.T * 4) @ coefficients.view(strips)
    pixels = columns.add_(0.5).floor_().view(-1, 8) @ (cosines / 32)
    return pixels.add_(128.5).floor_().clamp_(0, 255).view(count, height, width)


def _enlarge(plane: Tensor, axis: int, first: float, second: float, whole: float) -> Tensor:
    """Twice the pixels along an axis: 3/4 of the pixel they lie in, 1/4 of the one they lie next to (times 4).

    ``first`` and ``second`` are added before flooring by ``whole``.
    """
    size = plane.shape[axis]
    before = torch.cat([plane.narrow(axis, 0, 1), plane.narrow(axis, 0, size - 1)], dim=axis)
    after = torch.cat([plane.narrow(axis, 1, size - 1), plane.narrow(axis, size - 1, 1)], dim=axis)
    triple = plane * 3
    both = torch.stack(
        [before.add_(triple).add_(first).mul_(whole), after.add_(triple).add_(second).mul_(whole)],
        dim=axis + 1,
    )
    shape = list(plane.shape)
    shape[axis] *= 2
    return both.view(shape)


def _upsample(chroma: Tensor) -> Tensor:
    """libjpeg's "fancy upsampling" of chroma by two along both axes; [n, h, w] -> [n, 2h, 2w], whole levels."""
    if chroma.shape[2] <= 2:  # libjpeg repeats the pixels of so narrow an image
        return chroma.repeat_interleave(2, 1).repeat_interleave(2, 2)
    tall = _enlarge(chroma, 1, 0, 0, 1)
    return _enlarge(tall, 2, 8, 7, 1 / 16).floor_()


def jpeg(levels: Tensor, quality: int) -> Tensor:
    """Encode as JPEG (4:2:0 chroma, libjpeg's tables of ``quality``) and decode again, on any device.

    Colour transform, cosine transforms, rounding of chroma and its enlargement are libjpeg's. Only the constants of
    the cosine transforms are exact here where libjpeg's have 13 bits: a coefficient may fall on the other side of a
    rounding now and then.

    Args:
        levels: float32 [n, 3, h, w] from 0 to 255; rounded first.
        quality: 1 to 100.

    Returns:
        float32 [n, 3, h, w] of whole levels from 0 to 255.
    """
    if not 1 <= quality <= 100:
        raise UsageError(f"JPEG quality must be 1 to 100; found {quality}")
    count, channels, height, width = levels.shape
    if channels != 3:
        raise UsageError(f"JPEG takes images of 3 channels; found {channels}")
    levels = levels.round()
    red, green, blue = levels.unbind(1)
    # libjpeg's whole numbers: none passes 2^24, so float32 holds them exactly.
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).mul_(2.0**-16).floor_()
    blueness = (blue * 32768).sub_(red, alpha=11059).sub_(green, alpha=21709)
    redness = (red * 32768).sub_(green, alpha=27439).sub_(blue, alpha=5329)
    chroma = torch.cat([blueness, redness]).add_((128 << 16) + 32767).mul_(2.0**-16).floor_()
    half = (height + 1) // 2, (width + 1) // 2
    # libjpeg fills up its blocks across before it averages, and down after.
    chroma = _fill(chroma, 2, 16)
    # Four pixels become one; rounded down and up in turn along a row.
    rows = chroma[:, ::2] + chroma[:, 1::2]
    chroma = rows[..., ::2] + rows[..., 1::2]
    bias = torch.ones(chroma.shape[-1], device=levels.device)
    bias[1::2] = 2
    chroma = chroma.add_(bias).mul_(0.25).floor_()
    luma = _code(_fill(luma, 8, 8), quality, False)[:, :height, :width]
    chroma = _code(_fill(chroma, 8, 8), quality, True)[:, : half[0], : half[1]]
    chroma = _upsample(chroma)[:, :height, :width].sub_(128)
    blueness, redness = chroma[:count], chroma[count:]
    out = torch.empty_like(levels)
    torch.add(luma, (redness * 1.402).round_(), out=out[:, 0])
    greenness = (blueness * -22554).sub_(redness, alpha=46802).add_(32768).mul_(2.0**-16).floor_()
    torch.add(luma, greenness, out=out[:, 1])
    torch.add(luma, (blueness * 1.772).round_(), out=out[:, 2])
    return out.clamp_(0, 255)


def _fill(plane: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column up to multiples of ``rows`` and ``columns``."""
    height, width = plane.shape[-2:]
    size = -(-height // rows) * rows, -(-width // columns) * columns
    return plane if size == (height, width) else pad(plane, (0, 0), size, "nearest")


def jpeg_compression(levels: Tensor, quality: int, draws: Draws) -> Tensor:
    """:func:`jpeg` as a corruption."""
    return jpeg(levels, quality)
