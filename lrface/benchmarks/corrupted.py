"""Corrupting images of a benchmark: what happens to an image depends on what it shows, not on its place or batch."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lrface
from lrface.degrade.corruptions import CorruptionParameters, apply, check_set
from lrface.errors import UsageError
from lrface.registry import nearest


def known_corruption(name: str, names: Sequence[str], where: str) -> str:
    """``name``; raises UsageError naming the nearest when it is not among ``names``."""
    if name not in names:
        raise UsageError(
            f"{where}: unknown corruption {name!r}{nearest(name, names)}; there are {', '.join(names)}"
        )
    return name


def known_severity(severity: int, where: str) -> int:
    """``severity``; raises UsageError unless it is 1 to 5."""
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise UsageError(f"{where}: a severity is a whole number from 1 to 5; found {severity!r}")
    return severity


def content_seeds(images: NDArray[np.uint8], salt: str) -> Tensor:
    """A seed for each image, of its pixels and ``salt``: int64 [n] for uint8 [n, ...]."""
    start = hashlib.blake2b(f"{salt} {images.shape[1:]}".encode(), digest_size=8)
    seeds = []
    for image in images:
        digest = start.copy()
        digest.update(np.ascontiguousarray(image).data)
        seeds.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(seeds, dtype=torch.int64)


def corrupt_images(
    images: NDArray[np.uint8],
    name: str,
    severity: int,
    set: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NDArray[np.uint8]:
    """One corruption of a batch of images.

    Args:
        images: uint8 [n, h, w, 3] RGB, for the set "mnist" [n, h, w].
        name, severity, set: see :mod:`lrface.degrade.corruptions`.
        seed: another one gives another draw of every random corruption.

    Returns:
        uint8 of the same shape. An image becomes the same in whatever batch it stands.
    """
    if check_set(set).channels == 1:
        batch = torch.from_numpy(np.ascontiguousarray(images))[:, None]
    else:
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    size = int(batch.shape[2]), int(batch.shape[3])
    strength = torch.full((len(batch),), severity)
    parameters = CorruptionParameters(
        name, set, size, strength, content_seeds(images, f"{set} {name} {severity} {seed}")
    )
    done = apply(batch.to(device), parameters).cpu()
    if done.shape[1] == 1:
        return done[:, 0].numpy()
    return np.ascontiguousarray(done.permute(0, 2, 3, 1).numpy())


@cache
def corruptions_hash() -> str:
    """A hash of the code and constants of the corruptions: what else a corrupted image depends on."""
    folder = Path(lrface.__file__).parent / "degrade" / "corruptions"
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
