"""Stylised versions of training images, from a folder that has one under the name of each (`lrface stylise`)."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lrface.data.dataset import FaceDataset
from lrface.data.folder import SUFFIXES, ImageFiles
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError


def stylised_name(name: str) -> str:
    """Where the stylised version of the image ``name`` lies below its folder: under the same name, with .png behind it where
    that is no image file's. Absolute names and ".." become names below the folder."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    path = PurePosixPath(*parts)
    return str(path) if path.suffix.lower() in SUFFIXES else f"{path}.png"


class StylisedSource(ImageFiles):
    """The stylised versions of ``source``, in its order; implements FaceSource.

    Raises:
        LrfaceError: the folder lacks one; says how many and the first.
    """

    format = "stylised folder"
    repair = "Remove it and run `lrface stylise` again"

    def __init__(self, source: FaceSource, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise LrfaceError(f"data.stylised: {folder}: no such folder; `lrface stylise` makes one")
        names = source.sources()
        self.identities, self.labels = source.identities, source.labels
        self.paths = [folder / stylised_name(name) for name in names]
        missing = [name for name, path in zip(names, self.paths, strict=True) if not path.is_file()]
        if missing:
            raise LrfaceError(
                f"data.stylised: {folder} lacks the stylised versions of {len(missing)} of {len(names)} images, the first "
                f"is {stylised_name(missing[0])}; `lrface stylise` with the same folder makes what is missing"
            )

    def sources(self) -> list[str]:
        return [path.as_posix() for path in self.paths]


class PairedDataset(FaceDataset):
    """Batches of ``dataset`` with ``stylised``, uint8 like ``image``: the same rows of ``other``."""

    def __init__(self, dataset: FaceDataset, other: FaceDataset):
        super().__init__(dataset.source, dataset.size, dataset.channels)
        self.dataset, self.other = dataset, other
        self.seeded = dataset.seeded

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        return {**self.dataset.__getitems__(indices), "stylised": self.other.__getitems__(indices)["image"]}
