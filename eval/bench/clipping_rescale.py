"""Scaling perturbations to a length that holds after clipping: lrface.degrade.rescaling against a line search.

Both scale normal noise on a batch of 128 images of 3 x 224 x 224 values to the length 135 (paper 004) and give the clipped
images. The line search halves an interval of gamma twenty times, for the whole batch at once. They take turns; medians are
compared. The row also has the line search made friendlier to the processor's caches, a few images at a time as lrface works
(``ratio_peer_in_parts``), the first in processor time, both for 32 pixels, and how far the lengths are from 135 at most.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrface.degrade.rescaling import PART, epsilon_for, rescale

NAMES = ["clipping_rescale"]
THREADS = 1
BATCH, STEPS, LARGEST = 128, 20, 10.0


def line_search(images: Tensor, perturbation: Tensor, epsilon: float) -> Tensor:
    """The clipped images by twenty halvings of [0, 10]."""
    low = torch.zeros(len(images), 1, 1, 1)
    high = torch.full_like(low, LARGEST)
    for _ in range(STEPS):
        gamma = (low + high) / 2
        moved = (images + gamma * perturbation).clamp_(0, 1).sub_(images)
        long = torch.linalg.vector_norm(moved, dim=(1, 2, 3), keepdim=True) > epsilon
        low, high = torch.where(long, low, gamma), torch.where(long, gamma, high)
    return (images + (low + high) / 2 * perturbation).clamp_(0, 1)


def in_parts(images: Tensor, perturbation: Tensor, epsilon: float) -> Tensor:
    """:func:`line_search`, as many images at a time as lrface takes."""
    size = max(1, PART // images[0].numel())
    parts = zip(images.split(size), perturbation.split(size), strict=True)
    return torch.cat([line_search(image, noise, epsilon) for image, noise in parts])


def seconds(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """The median time of each, in turns, and as "NAME, processor" that of the processor."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            way()
            times.setdefault(f"{name}, processor", []).append(time.process_time() - processor)
            times.setdefault(name, []).append(time.perf_counter() - wall)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def compared(size: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each way, and the largest distance of a length from the one asked for."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, size, size, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    epsilon = epsilon_for(size, 135.0)
    ways = {
        "lrface": lambda: rescale(images, noise, epsilon).images,
        "line search": lambda: line_search(images, noise, epsilon),
        "in parts": lambda: in_parts(images, noise, epsilon),
    }
    wrong = {
        name: float(((way().double() - images.double()).flatten(1).norm(dim=1) - epsilon).abs().max())
        for name, way in ways.items()
    }
    return seconds(ways, rounds), wrong


def run(quick: bool = False) -> list[dict[str, Any]]:
    torch.set_num_threads(THREADS)
    times, wrong = compared(224, 1 if quick else 5)
    small, _ = compared(32, 3 if quick else 25)
    return [
        {
            "name": NAMES[0],
            "ours": round(BATCH / times["lrface"], 1),
            "peer": round(BATCH / times["line search"], 2),
            "ratio": round(times["line search"] / times["lrface"], 2),
            "unit": "images/s",
            "threads": THREADS,
            "ratio_processor_time": round(times["line search, processor"] / times["lrface, processor"], 2),
            "ratio_peer_in_parts": round(times["in parts"] / times["lrface"], 2),
            "ratio_32": round(small["line search"] / small["lrface"], 2),
            "ratio_32_peer_in_parts": round(small["in parts"] / small["lrface"], 2),
            "largest_error": {name: float(f"{value:.2g}") for name, value in wrong.items()},
        }
    ]
