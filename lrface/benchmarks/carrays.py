"""Verification sets of InsightFace_Pytorch and AdaFace: a bcolz carray or memfile, and NAME_list.npy beside it."""

from pathlib import Path

import numpy as np

from lrface.benchmarks.metrics import contiguous_folds
from lrface.benchmarks.verification import VerificationSet
from lrface.data.carray import CarrayPixels, pairs_path, read_array
from lrface.errors import LrfaceError
from lrface.progress import progress


def load_carray(path: str | Path, name: str, show_progress: bool = True) -> VerificationSet:
    """The pairs (2k, 2k + 1) of the images in a carray, in ten folds of consecutive pairs as InsightFace has them.

    Raises:
        LrfaceError: the carray or the list is missing or damaged, or they do not fit each other.
    """
    path = Path(path)
    images = CarrayPixels(path)
    same = read_array(pairs_path(path), "b")
    if len(images) != 2 * len(same) or not len(same):
        raise LrfaceError(
            f"{pairs_path(path)}: has {len(same)} pairs, but {path} has {len(images)} images; twice as many images as "
            "pairs are needed. Copy both again"
        )
    pixels: np.ndarray | None = None
    with progress(len(images), f"read {name}", enabled=show_progress) as bar:
        for index in range(len(images)):
            image = images.image(index)
            if pixels is None:
                pixels = np.empty((len(images), *image.shape), dtype=np.uint8)
            pixels[index] = image
            bar.advance()
    assert pixels is not None
    left = np.arange(0, len(images), 2)
    return VerificationSet(
        name=name,
        images=pixels,
        left=left,
        right=left + 1,
        same=same,
        folds=contiguous_folds(len(same)),
        origin=str(path),
    )
