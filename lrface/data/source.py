"""What every data set looks like to the rest of lrface: images with an identity each."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from lrface.errors import LrfaceError


@runtime_checkable
class FaceSource(Protocol):
    """Aligned faces by index.

    identities: names; label k belongs to ``identities[k]``.
    labels: int64 [n], without gaps from 0.
    ``image(index)``: uint8 [h, w, 3], RGB.
    ``encoded(index)``: the image file as it is stored (JPEG, PNG, ...), None where the format stores pixels.
    ``sources()``: a name for each image, a relative path without repetition where the format has one.
    ``format``: what the data is, for people: "packed", "folder", "recordio", "bcolz", ...
    """

    format: str

    @property
    def identities(self) -> list[str]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray: ...

    def encoded(self, index: int) -> bytes | None: ...

    def sources(self) -> list[str]: ...


def open_source(path: str | Path) -> FaceSource:
    """Open packed data (a directory with index.json) or a folder of identity folders of aligned crops.

    Raises:
        LrfaceError: the path does not exist or holds neither.
    """
    path = Path(path)
    if not path.exists():
        raise LrfaceError(
            f"{path}: no such file or directory; give packed data or a folder of identity folders"
        )
    if not path.is_dir():
        raise LrfaceError(
            f"{path} is a file; training data is a directory: packed data (made by `lrface align`) or identity folders"
        )
    if (path / "index.json").exists():
        from lrface.data.packed import PackedSource

        return PackedSource(path)
    from lrface.data.folder import FolderSource

    return FolderSource(path)


def check_source(source: FaceSource, name: str) -> None:
    """Refuse what cannot be trained on.

    Raises:
        LrfaceError: no images, one identity only, labels outside of or with gaps in 0..k-1.
    """
    labels = source.labels
    if len(labels) == 0:
        raise LrfaceError(f"{name} holds no images")
    identities = len(source.identities)
    if labels.min() < 0 or labels.max() >= identities:
        raise LrfaceError(
            f"{name}: labels run from {labels.min()} to {labels.max()} but there are {identities} identities; "
            f"labels must be 0 to {identities - 1}. Pack the data again with `lrface align`"
        )
    missing = np.setdiff1d(np.arange(identities), labels)
    if len(missing):
        raise LrfaceError(
            f"{name}: labels have gaps: {len(missing)} of {identities} identities have no image, the first is label "
            f"{missing[0]} ({source.identities[missing[0]]}). Remove them from the identity list or pack the data again"
        )
    if identities < 2:
        raise LrfaceError(
            f"{name} holds one identity only ({source.identities[0]}); a recogniser learns from the difference "
            "between at least 2. Is this the folder above the identity folders?"
        )
