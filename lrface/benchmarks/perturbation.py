"""How much noise a classifier bears: the smallest perturbation along a direction of noise at which it errs (paper 004,
section 3.4, eq. 4)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAMMAS = tuple(2.0 ** (step / 2) for step in range(-16, 21))
"""What a direction of root mean square 1 is multiplied with, in steps of sqrt 2: the line
search starts at the image, so that the first place where the classifier errs is found, not just any. At the last one
practically all values of the image are 0 or 1, and more noise changes nothing."""

BISECTIONS = 8
"""Then the first step that errs is halved as often: the size is known to sqrt 2 ** (1 / 256), 0.14 %, a root mean
square below 2 ** -8 to 0.00002."""

Wrong = Callable[[Tensor, Tensor], Tensor]
"""Perturbed images float [k, c, h, w] and which they are, int64 [k] -> whether the classifier errs on each, bool [k]."""


def perturbed(images: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """clip(x + gamma delta): float [n, c, h, w] twice and [n] -> float [n, c, h, w] in [0, 1]."""
    return (images + gamma[:, None, None, None] * noise).clamp_(0, 1)


def smallest_gamma(wrong: Wrong, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The line search of eq. 4 for a batch of images, all of them together.

    Args:
        wrong: asked only about images that are still open.
        images: float [n, c, h, w] in [0, 1].
        noise: one direction for each, of the same shape; its length does not matter.

    Returns:
        gamma, float64 [n], and the noise brought to a root mean square of 1, float [n, c, h, w]: clip(x + gamma delta) is
        wrong. 0 where the image itself is; infinity where no gamma is enough (and for a direction of zeros).
    """
    rms = noise.flatten(1).square().mean(1).sqrt()
    noise = noise / torch.where(rms > 0, rms, 1)[:, None, None, None]
    low = torch.zeros(len(images), dtype=torch.float64)
    high = torch.full_like(low, math.inf)

    def errs(rows: Tensor, gamma: Tensor) -> Tensor:
        return wrong(perturbed(images[rows], noise[rows], gamma.to(images)), rows)

    rows = torch.arange(len(images))
    for value in (0.0, *GAMMAS):
        if not len(rows):
            break
        found = errs(rows, torch.full((len(rows),), value, dtype=torch.float64))
        high[rows[found]] = value
        rows = rows[~found]
        low[rows] = value
    rows = ((high > 0) & high.isfinite()).nonzero().squeeze(1)
    for _ in range(BISECTIONS if len(rows) else 0):
        middle = (low[rows] + high[rows]) / 2
        found = errs(rows, middle)
        high[rows[found]] = middle[found]
        low[rows[~found]] = middle[~found]
    return high, noise


def lengths(images: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """||clip(x + gamma delta) - x||_2 over all values of an image, float64 [n]; 0 and infinity stay."""
    found = gamma.clone()
    rows = ((gamma > 0) & gamma.isfinite()).nonzero().squeeze(1)
    if len(rows):
        moved = perturbed(images[rows], noise[rows], gamma[rows].to(images)) - images[rows]
        found[rows] = moved.flatten(1).double().norm(dim=1)
    return found


def median_size(sizes: NDArray[np.float64]) -> float:
    """epsilon* of eq. 4: the median, to which images that nothing changes contribute infinity."""
    ordered = np.sort(sizes)
    middle = len(ordered) // 2
    if len(ordered) % 2 or math.isinf(ordered[middle]):
        return float(ordered[middle])
    return float(ordered[middle - 1] + ordered[middle]) / 2


def size_figures(sizes: Sequence[NDArray[np.float64]], values: int) -> dict[str, Any]:
    """What is said of one model and one kind of noise.

    Args:
        sizes: smallest sizes of the same images for each seed, each float64 [n]; 0 for images that are wrong when clean.
        values: c h w of an image.

    Returns:
        ``median``, epsilon* over all images, mean over seeds; ``deviation`` over seeds (n - 1; None for one seed);
        ``medians`` of each; ``median_of_correct``, the mean over seeds of the median over the images that are right when
        clean; ``rms``, the median as a root mean square of an image's values; ``unreached``, the share of images that no
        size changes. Infinity is ``None``.
    """
    medians = [median_size(own) for own in sizes]
    correct = [median_size(own[own > 0]) if (own > 0).any() else 0.0 for own in sizes]
    mean = float(np.mean(medians))
    spread = len(medians) > 1 and math.isfinite(mean)
    return {
        "median": finite(mean),
        "deviation": round(float(np.std(medians, ddof=1)), 4) if spread else None,
        "medians": [finite(value) for value in medians],
        "median_of_correct": finite(float(np.mean(correct))),
        "rms": finite(mean / math.sqrt(values)),
        "unreached": round(float(np.mean([np.isinf(own).mean() for own in sizes])), 4),
    }


def finite(value: float) -> float | None:
    """Rounded to 4 digits; None for infinity, which JSON lacks."""
    return round(value, 4) if math.isfinite(value) else None
