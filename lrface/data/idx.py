"""Images and labels in the IDX files that MNIST was published in, read in place, gzipped or not.

A file is 0, 0, the type of its numbers (8: unsigned bytes), how many dimensions they have, each dimension as a big-endian
32-bit number, and the numbers. Images are [n, rows, columns], labels [n].
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrface.data.source import identity_names
from lrface.errors import LrfaceError

_MARK = "idx3-ubyte"
MAX_BYTES = 4 << 30
"""Most bytes of a file after it is decompressed."""


def find_images(path: Path) -> Path | None:
    """The file of images that ``path`` is or holds (train-images-idx3-ubyte, .gz or not); None where there is none.

    Raises:
        LrfaceError: a folder of several, of which one must be named.
    """
    if path.is_file():
        return path if _MARK in path.name else None
    if not path.is_dir():
        return None
    found = sorted(entry for entry in path.iterdir() if _MARK in entry.name and entry.is_file())
    found = [file for file in found if not (file.suffix == ".gz" and file.with_suffix("") in found)]
    if len(found) > 1:
        raise LrfaceError(
            f"{path} holds several sets ({', '.join(file.name for file in found[:5])}); name one of these files, or put "
            "each with its labels into a folder of its own"
        )
    return found[0] if found else None


def labels_of(images: Path) -> Path:
    """The file of labels beside a file of images: train-images-idx3-ubyte.gz -> train-labels-idx1-ubyte, .gz or not.

    Raises:
        LrfaceError: there is none.
    """
    bare = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (bare, f"{bare}.gz"):
        if (images.parent / name).is_file() and name != images.name:
            return images.parent / name
    raise LrfaceError(
        f"{images}: its labels are not beside it; expected {images.parent / bare}, gzipped or not"
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes.

    Args:
        dimensions: how many it must have: 3 for images, 1 for labels.

    Returns:
        uint8 of the shape that the file gives.

    Raises:
        LrfaceError: missing, damaged, cut off, of other numbers or dimensions.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        else:
            if path.stat().st_size > MAX_BYTES:
                raise LrfaceError(f"{path}: larger than {MAX_BYTES >> 30} GiB; is it an IDX file?")
            data = path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise LrfaceError(f"{path} cannot be read ({error}); copy it again") from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:2] != b"\0\0":
        raise LrfaceError(f"{path} is no IDX file: it should begin with two zeros; found {data[:4].hex(' ')}")
    if data[2] != 8 or data[3] != dimensions:
        raise LrfaceError(
            f"{path}: expected unsigned bytes (type 8) in {dimensions} dimension{'s' if dimensions > 1 else ''}; found "
            f"type {data[2]} in {data[3]}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    count = 1
    for side in shape:
        count *= side
    if len(data) - head != count:
        raise LrfaceError(
            f"{path}: holds {len(data) - head} bytes after its head, which says {' x '.join(map(str, shape))}; it was cut "
            "off or damaged: copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


class IdxSource:
    """IDX files of images and labels as training data; implements FaceSource. Identities are the digits.

    Raises:
        LrfaceError: files that are missing or damaged, or other numbers of images and labels.
    """

    format = "idx"

    def __init__(self, path: str | Path):
        file = find_images(Path(path))
        if file is None:
            raise LrfaceError(f"{path}: no file of images in IDX format (train-images-idx3-ubyte)")
        labels = labels_of(file)
        self.pixels = read_idx(file, 3)
        self.labels = read_idx(labels, 1).astype(np.int64)
        if len(self.labels) != len(self.pixels):
            raise LrfaceError(
                f"{file} has {len(self.pixels)} images, {labels} {len(self.labels)} labels: they do not belong together"
            )
        if 0 in self.pixels.shape[1:]:
            raise LrfaceError(
                f"{file}: its images have {self.pixels.shape[1]} x {self.pixels.shape[2]} pixels"
            )
        self.identities = identity_names(self.labels, labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> np.ndarray:
        """uint8 [h, w, 3]: grey in three equal channels, as all sources give it."""
        return np.repeat(self.pixels[index][..., None], 3, axis=2)

    def encoded(self, index: int) -> bytes | None:
        """None: pixels are stored, no image files."""
        return None

    def sources(self) -> list[str]:
        """The images' numbers, with zeros in front."""
        width = len(str(max(0, len(self) - 1)))
        return [f"{index:0{width}d}" for index in range(len(self))]
