"""Faces of a benchmark that are read piece by piece, and their features: sets too large to hold in memory at once."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lrface.benchmarks.cache import FeatureStore, image_hashes
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.lfw import CROP_SIZE, cache_name
from lrface.benchmarks.locate import cache_root
from lrface.benchmarks.verification import Embed, image_features
from lrface.data.packed import PackedSource
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError, UsageError
from lrface.progress import progress

CHUNK = 1024
"""Images decoded at once: 38 MB of crops."""


class Faces(Protocol):
    """Square crops by index, read when asked for.

    size: their side in pixels. aligned: bool [n], False for those cut without landmarks (the middle of the photograph,
    the whole of it enlarged, or grey where it cannot be read). scores: the detector's, float64 [n], or None where
    nobody gave any. read: uint8 [stop - start, size, size, 3], RGB.
    """

    size: int
    aligned: NDArray[np.bool_]
    scores: NDArray[np.float64] | None

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[np.uint8]: ...


class SourceFaces:
    """Crops of any :class:`~lrface.data.source.FaceSource`, in the order of ``rows``; row -1 is a grey crop.

    Raises:
        LrfaceError: no images, or (when read) one that is broken or of another size than the first.
    """

    def __init__(
        self,
        source: FaceSource,
        rows: NDArray[np.int64] | None = None,
        aligned: NDArray[np.bool_] | None = None,
        scores: NDArray[np.float64] | None = None,
        name: str = "",
    ):
        self.source = source
        self.rows = np.arange(len(source)) if rows is None else rows
        self.aligned = np.ones(len(self.rows), dtype=bool) if aligned is None else aligned
        self.scores = scores
        self.name = name or source.format
        real = self.rows[self.rows >= 0]
        if not len(real):
            raise LrfaceError(f"{self.name}: there are no images")
        self.size = int(source.image(int(real[0])).shape[0])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        images = np.full((stop - start, self.size, self.size, 3), 128, dtype=np.uint8)
        for place, row in enumerate(self.rows[start:stop]):
            if row < 0:
                continue
            image = self.source.image(int(row))
            if image.shape != images.shape[1:]:
                raise LrfaceError(
                    f"{self.name}: image {int(row)} ({self.source.sources()[int(row)]}) is {image.shape[1]}x"
                    f"{image.shape[0]} pixels, the first is {self.size}x{self.size}; aligned faces of one size are "
                    "needed (lrface align)"
                )
            images[place] = image
        return images


class FileFaces:
    """Crops made of image files, several at a time.

    Args:
        root: the folder that paths are relative to.
        paths: one file an image.
        make: index and photograph uint8 [h, w, 3] RGB -> crop uint8 [112, 112, 3].
        aligned, scores: see :class:`Faces`.

    Raises:
        LrfaceError: (when read) a file that cannot be read, or that ``make`` refuses with a ValueError.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        make: Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]],
        aligned: NDArray[np.bool_] | None = None,
        scores: NDArray[np.float64] | None = None,
    ):
        if not paths:
            raise LrfaceError(f"{root}: there are no images")
        self.root, self.paths, self.make = root, paths, make
        self.size, self.scores = CROP_SIZE, scores
        self.aligned = np.ones(len(paths), dtype=bool) if aligned is None else aligned
        self._threads = min(8, os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.paths)

    def _one(self, index: int) -> NDArray[np.uint8]:
        from lrface.align.pipeline import UnreadableImage, read_photo

        path = self.root / self.paths[index]
        try:
            return self.make(index, read_photo(path))
        except UnreadableImage as error:
            raise LrfaceError(
                f"{path}: {error.reason}. The benchmark names it; copy the data again"
            ) from error
        except ValueError as error:
            raise LrfaceError(f"{path}: {error}") from error

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        with ThreadPoolExecutor(self._threads) as pool:
            return np.stack(list(pool.map(self._one, range(start, stop))))


def as_crop(index: int, photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The photograph itself, which has to be a crop already. Raises ValueError for another size."""
    if photo.shape != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(
            f"is {photo.shape[1]}x{photo.shape[0]} pixels among crops of {CROP_SIZE}x{CROP_SIZE}"
        )
    return photo


def enlarged(index: int, photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The whole photograph as a crop: bilinear when it grows, pixel averages when it shrinks; sides are stretched
    alike, as low-resolution faces are commonly fed to networks that were trained on aligned crops."""
    kernel = cv2.INTER_AREA if min(photo.shape[:2]) > CROP_SIZE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(photo, (CROP_SIZE, CROP_SIZE), interpolation=kernel), dtype=np.uint8)


def enlarged_faces(root: Path, paths: Sequence[str]) -> FileFaces:
    """Image files enlarged whole (:func:`enlarged`); none counts as aligned."""
    return FileFaces(root, paths, enlarged, np.zeros(len(paths), dtype=bool))


def read_faces(faces: Faces, name: str, show_progress: bool = True) -> NDArray[np.uint8]:
    """All faces at once, uint8 [n, size, size, 3], under a progress bar."""
    images = np.empty((len(faces), faces.size, faces.size, 3), dtype=np.uint8)
    with progress(len(faces), f"read {name}", enabled=show_progress) as bar:
        for start in range(0, len(faces), 512):
            part = faces.read(start, min(start + 512, len(faces)))
            images[start : start + len(part)] = part
            bar.advance(len(part))
    return images


class FacesPart:
    """The faces ``start`` to ``stop - 1`` of others."""

    def __init__(self, faces: Faces, start: int, stop: int):
        self.faces, self.start, self.stop, self.size = faces, start, stop, faces.size
        self.aligned = faces.aligned[start:stop]
        self.scores = None if faces.scores is None else faces.scores[start:stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.faces.read(self.start + start, self.start + stop)


def unaligned(faces: Faces) -> int:
    """How many faces are not aligned."""
    return int((~faces.aligned).sum())


def are_crops(root: Path, paths: Sequence[str]) -> bool:
    """Whether all images are 112x112 pixels; reads headers, up to the first that says otherwise."""
    for path in paths:
        try:
            with Image.open(root / path) as header:
                if header.size != (CROP_SIZE, CROP_SIZE):
                    return False
        except FileNotFoundError as error:
            raise LrfaceError(f"{root / path}: the benchmark names it, and it is not there") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False  # the aligner lists what it cannot read, with the reason
    return True


def photograph_faces(
    root: Path,
    paths: Sequence[str],
    name: str,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    align: bool = True,
) -> Faces:
    """Faces of the image files ``root/path``, one each, in the order of ``paths``.

    Files of 112x112 pixels (all of them) are taken as aligned crops. Others are aligned, once: the packed result is
    kept in ``CACHE/aligned/NAME-HASH``, and the hash covers names and sizes of the files. Where no face is found the
    middle square is taken, and where a file cannot be read a grey crop; neither counts as aligned. With ``align``
    off every photograph is enlarged whole, and none counts as aligned.

    Raises:
        LrfaceError: no files, or a file that is not there.
    """
    if not paths:
        raise LrfaceError(f"{root}: there are no images")
    if are_crops(root, paths):
        return FileFaces(root, paths, as_crop)
    if not align:
        return enlarged_faces(root, paths)
    from lrface.align.pipeline import align_folder

    packed = cache_root(cache) / "aligned" / cache_name(name, root, paths, "center ")
    if not (packed / "index.json").is_file():
        align_folder(root, packed, fallback="center", workers=workers, show_progress=show_progress)
    source = PackedSource(packed)
    first = np.flatnonzero(source.column("face") == 0)
    names, scores = source.sources(), source.column("score").astype(np.float64)
    row_of = {names[row]: int(row) for row in first}
    rows = np.array([row_of.get(path, -1) for path in paths], dtype=np.int64)
    # The middle that is taken where no face is found carries score 0.
    found = np.where(rows >= 0, scores[np.maximum(rows, 0)], 0.0)
    return SourceFaces(source, rows, found > 0, found, str(packed))


def check_input(model: str, input_size: int, faces: Faces, name: str) -> None:
    """Refuse a model that takes another size than the faces have.

    Raises:
        UsageError: naming both sizes.
    """
    if input_size != faces.size:
        raise UsageError(
            f"{model} takes images of {input_size}x{input_size} pixels, the faces of {name} have "
            f"{faces.size}x{faces.size}; take a model for that size, or align the photographs to {input_size}"
        )


def face_features(
    embed: Embed,
    faces: Faces,
    condition: Condition,
    *,
    name: str,
    flip: bool = True,
    down: str = "nearest",
    up: str = "bilinear",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    store: FeatureStore | None = None,
    chunk: int = CHUNK,
    advance: Callable[[int], None] = lambda images: None,
) -> NDArray[np.float32]:
    """Features float32 [n, d] of all faces under one condition; at most ``chunk`` crops are in memory.

    The chunk is rounded up to whole batches, so that its size changes no batch and therefore no bit of a feature (of
    distinct images; equal ones within a chunk are embedded once, and share one feature).
    """
    step = -(-max(1, chunk) // batch_size) * batch_size
    features: NDArray[np.float32] | None = None
    for start in range(0, len(faces), step):
        stop = min(start + step, len(faces))
        images = faces.read(start, stop)
        hashes = image_hashes(images)
        numbers: dict[bytes, int] = {}
        inverse = np.array([numbers.setdefault(value.tobytes(), len(numbers)) for value in hashes])
        first = np.unique(inverse, return_index=True)[1]
        with torch.no_grad():
            found = image_features(
                embed,
                images if len(first) == len(images) else images[first],
                condition,
                name=f"{name}, images {start} to {stop - 1},",
                flip=flip,
                down=down,
                up=up,
                batch_size=batch_size,
                device=device,
                store=store,
                hashes=hashes[first],
            )
        if features is None:
            features = np.empty((len(faces), found.shape[1]), dtype=np.float32)
        features[start:stop] = found[inverse]
        advance(stop - start)
    assert features is not None
    return features
