"""A folder of identity folders of aligned crops, read in place."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lrface.data.decode import EncodedFaces
from lrface.errors import LrfaceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class ImageFiles(EncodedFaces):
    """Images that are files of their own: ``paths``, one an image."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> bytes:
        """The file's bytes. Raises LrfaceError when it cannot be read."""
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise LrfaceError(f"{self.paths[index]}: cannot be read: {error.strerror}") from error

    def place(self, index: int) -> str:
        return str(self.paths[index])


class FolderSource(ImageFiles):
    """ROOT/IDENTITY/**/IMAGE; an identity is a first-level folder that holds at least one image.

    Hidden files and files that are no images by name are passed over. Labels follow the sorted folder names.

    Args:
        labelled: without labels, images may also lie in ROOT itself, where no folder holds any; all are of one identity
            then, named as ROOT.

    Raises:
        LrfaceError: no identity folder with an image in it.
    """

    format = "folder"
    repair = "Remove it or copy it again"

    def __init__(self, root: str | Path, labelled: bool = True):
        self.root = Path(root)
        self.identities: list[str] = []
        self.paths: list[Path] = []
        labels: list[int] = []
        for folder in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            if folder.name.startswith("."):
                continue
            images = _images(folder.rglob("*"))
            if images:
                labels += [len(self.identities)] * len(images)
                self.identities.append(folder.name)
                self.paths += images
        if not self.paths and not labelled:
            self.paths = _images(self.root.iterdir())
            self.identities, labels = [self.root.name], [0] * len(self.paths)
        if not self.paths:
            raise LrfaceError(
                f"{self.root}: no images found; expected {self.root}/IDENTITY/IMAGE.jpg (aligned crops). "
                "Photographs are aligned first: lrface align SRC OUT"
            )
        self.labels = np.asarray(labels, dtype=np.int64)

    def sources(self) -> list[str]:
        """Paths relative to the root, with forward slashes."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
