"""Faces that look alike: embeddings of a whole data set, and exact search in them, block by block."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.data.check import Finding
from lrface.data.dataset import fit_image
from lrface.data.info import readable_image
from lrface.data.source import FaceSource
from lrface.embed import FaceEmbedder
from lrface.errors import UsageError
from lrface.progress import progress

BLOCK = 2048
"""Rows of a block: 2048 x 2048 cosines are 16 MB."""


def compute_device(device: str) -> torch.device:
    """The device that a name means; "auto" is a GPU where PyTorch has one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def embed_source(
    source: FaceSource,
    embedder: FaceEmbedder,
    batch_size: int = 64,
    description: str = "embed",
    show_progress: bool = True,
) -> NDArray[np.float32]:
    """Unit vectors float32 [n, d] of all images; a row of zeros where an image cannot be decoded.

    Images are scaled to the network's size. One thread decodes ahead of the network; memory beyond the
    vectors does not grow with n.

    Raises:
        UsageError: batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size: at least 1 is needed; found {batch_size}")
    vectors = np.zeros((len(source), embedder.embedding_size), np.float32)
    with progress(len(source), description, enabled=show_progress) as bar:
        for start, stop, rows, images in _batches(source, embedder.input_size, batch_size):
            if len(rows):
                features = embedder.embed_tensor(images, batch_size)
                vectors[rows] = torch.nn.functional.normalize(features, dim=1).cpu().numpy()
            bar.advance(stop - start)
    return vectors


def _batches(
    source: FaceSource, size: int, batch_size: int
) -> Iterator[tuple[int, int, NDArray[np.int64], Tensor]]:
    def read(start: int) -> tuple[int, int, NDArray[np.int64], Tensor]:
        stop = min(start + batch_size, len(source))
        images, rows = [], []
        for index in range(start, stop):
            image = readable_image(source, index)
            if image is not None:
                images.append(fit_image(image, size))
                rows.append(index)
        if not rows:
            return start, stop, np.zeros(0, np.int64), torch.empty(0)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255.0)
        return start, stop, np.array(rows), pixels

    # One thread only: sources need not be safe to read from several.
    with ThreadPoolExecutor(1) as reader:
        starts = iter(range(0, len(source), batch_size))
        ahead = [reader.submit(read, start) for _, start in zip(range(2), starts, strict=False)]
        while ahead:
            batch = ahead.pop(0).result()
            ahead += [reader.submit(read, start) for _, start in zip(range(1), starts, strict=False)]
            yield batch


@dataclass
class Alike:
    """For every image the earlier image most like it: ``index`` int64 [n] (-1: none reaches the threshold) and
    ``cosine`` float32 [n], among images of its own identity and among those of others."""

    within: NDArray[np.int64]
    within_cosine: NDArray[np.float32]
    across: NDArray[np.int64]
    across_cosine: NDArray[np.float32]


def most_alike(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    within_threshold: float,
    across_threshold: float,
    device: str = "auto",
    block: int = BLOCK,
    show_progress: bool = True,
) -> Alike:
    """The nearest earlier image of every image, within its identity and across identities; exact.

    ``vectors`` float32 [n, d] of unit length or zero. Blocks of [block, block] cosines are looked at one by
    one, so memory does not grow with n beyond the result; 500,000 images of 512 numbers take 1.3e14
    operations. A pair of images is compared once.
    """
    count = len(vectors)
    alike = Alike(
        np.full(count, -1, np.int64),
        np.full(count, within_threshold, np.float32),
        np.full(count, -1, np.int64),
        np.full(count, across_threshold, np.float32),
    )
    least = min(within_threshold, across_threshold)
    starts = range(0, count, block)
    place = compute_device(device)
    label_tensor = torch.from_numpy(np.ascontiguousarray(labels)).to(place)
    with (
        progress(
            len(starts) * (len(starts) + 1) // 2, "compare", unit="blocks", enabled=show_progress
        ) as bar,
        torch.inference_mode(),
    ):
        for first in starts:
            rows = slice(first, min(first + block, count))
            left = torch.from_numpy(vectors[rows]).to(place)
            for second in range(0, first + 1, block):
                columns = slice(second, min(second + block, count))
                cosines = left @ torch.from_numpy(vectors[columns]).to(place).T
                if first == second:
                    cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).triu(), -2.0)
                if float(cosines.max()) >= least:
                    same = label_tensor[rows, None] == label_tensor[None, columns]
                    for wanted, index, best in (
                        (same, alike.within, alike.within_cosine),
                        (~same, alike.across, alike.across_cosine),
                    ):
                        nearest = torch.where(wanted, cosines, -2.0).max(dim=1)
                        top, at = nearest.values.cpu().numpy(), nearest.indices.cpu().numpy()
                        # The first of equals is kept; the threshold itself counts.
                        new = np.where(index[rows] < 0, top >= best[rows], top > best[rows])
                        index[rows][new] = at[new] + second
                        best[rows][new] = top[new]
                bar.advance()
    return alike


def check_thresholds(near_duplicate: float, label_noise: float) -> None:
    """Raises UsageError for a threshold that no cosine can be compared with."""
    for name, value in (("--near-duplicate", near_duplicate), ("--label-noise", label_noise)):
        if not -1 <= value <= 1:
            raise UsageError(f"{name}: a cosine between -1 and 1 is expected; found {value}")


def alike_findings(
    source: FaceSource,
    vectors: NDArray[np.float32],
    near_duplicate: float,
    label_noise: float,
    device: str = "auto",
    show_progress: bool = True,
) -> list[Finding]:
    """Findings for a :class:`~lrface.data.check.CheckReport`: near duplicates within identities, and images
    that look like another identity's. Every image at most once of each kind, with the image it resembles most
    among those before it. ``near_duplicate`` and ``label_noise`` are cosines.

    Raises:
        UsageError: a threshold outside of -1..1.
    """
    check_thresholds(near_duplicate, label_noise)
    alike = most_alike(
        vectors, source.labels, near_duplicate, label_noise, device, show_progress=show_progress
    )
    findings = []
    for kind, index, cosine in (
        ("near duplicate", alike.within, alike.within_cosine),
        ("label noise", alike.across, alike.across_cosine),
    ):
        findings += [
            Finding(kind, image, other=int(index[image]), detail=f"cosine {cosine[image]:.4f}")
            for image in np.flatnonzero(index >= 0).tolist()
        ]
    return findings
