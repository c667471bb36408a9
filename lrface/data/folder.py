"""A folder of identity folders of aligned crops, read in place."""

from pathlib import Path

import cv2
import numpy as np

from lrface.errors import LrfaceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class FolderSource:
    """ROOT/IDENTITY/**/IMAGE; an identity is a first-level folder that holds at least one image.

    Hidden files and files that are no images by name are passed over. Labels follow the sorted folder names.

    Raises:
        LrfaceError: no identity folder with an image in it.
    """

    format = "folder"

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.identities: list[str] = []
        self.paths: list[Path] = []
        labels: list[int] = []
        for folder in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            if folder.name.startswith("."):
                continue
            images = sorted(
                path
                for path in folder.rglob("*")
                if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
            )
            if images:
                labels += [len(self.identities)] * len(images)
                self.identities.append(folder.name)
                self.paths += images
        if not self.paths:
            raise LrfaceError(
                f"{self.root}: no images found; expected {self.root}/IDENTITY/IMAGE.jpg (aligned crops). "
                "Photographs are aligned first: lrface align SRC OUT"
            )
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        """uint8 [h, w, 3], RGB. Raises LrfaceError naming a file that cannot be decoded."""
        path = self.paths[index]
        image = (
            cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
        )
        if image is None:
            raise LrfaceError(f"{path} cannot be decoded as an image; remove it or copy it again")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        return self.paths[index].read_bytes()

    def sources(self) -> list[str]:
        """Paths relative to the root, with forward slashes."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]
