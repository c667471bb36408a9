"""What every data set looks like to the rest of lrface: images with an identity each."""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from lrface.errors import LrfaceError
from lrface.files import read_json, write_text

IDENTITIES_NAME = "identities.json"
FREE_IDENTITIES = 1_000_000
"""Labels without names may run this far in a set of any size, and further only where there are as many images."""
LAYOUTS = (
    "packed data (a folder with index.json), InsightFace RecordIO (train.rec), a folder of identity folders of aligned "
    "crops, Parquet or Arrow files (.parquet, .arrow), WebDataset shards (.tar), a bcolz carray with NAME_labels.npy, or "
    "MNIST's files (train-images-idx3-ubyte and its labels)"
)


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


def open_source(path: str | Path, labelled: bool = True) -> FaceSource:
    """Open training data, of whatever format it is; told from the files that are there and how they begin.

    - packed data: a folder with index.json (``lrface align``, ``lrface pack``);
    - InsightFace RecordIO: a folder with train.rec (or one other .rec file), or a .rec file;
    - a folder of identity folders of aligned crops;
    - Parquet or Arrow with an image and a label column (Hugging Face's layout): a file or a folder of shards;
    - WebDataset: a .tar file or a folder of them;
    - a bcolz carray NAME/ or AdaFace's NAME/memfile, with NAME_labels.npy beside it;
    - MNIST's IDX files: train-images-idx3-ubyte or a folder with one such file, gzipped or not, and its labels;
    - unless ``labelled``, a folder of aligned crops.

    Raises:
        LrfaceError: the path does not exist or holds none of these.
    """
    from lrface.data import carray, idx, recordio, tables, webdataset

    path = Path(path)
    if not path.exists():
        raise LrfaceError(f"{path}: no such file or directory; training data is {LAYOUTS}")
    if path.is_dir() and (path / "index.json").exists():
        from lrface.data.packed import PackedSource

        return PackedSource(path)
    if recordio.find_record_file(path) is not None:
        return recordio.RecordIOSource(path)
    if carray.is_carray(path):
        return carray.CarraySource(path)
    if tables.find_tables(path):
        return tables.TableSource(path)
    if webdataset.find_shards(path):
        return webdataset.WebDatasetSource(path)
    if idx.find_images(path) is not None:
        return idx.IdxSource(path)
    if not path.is_dir():
        raise LrfaceError(f"{path}: a file of no known format; training data is {LAYOUTS}")
    from lrface.data.folder import FolderSource

    return FolderSource(path, labelled)


def identity_names(labels: np.ndarray, name: str | Path) -> list[str]:
    """Names for identities that have none: their labels, with zeros in front so that they sort as the numbers do.

    Raises:
        LrfaceError: a label below 0, or so far above the number of images that the labels must be damaged.
    """
    if not len(labels):
        return []
    smallest, largest = int(labels.min()), int(labels.max())
    limit = max(FREE_IDENTITIES, len(labels))
    if smallest < 0 or largest >= limit:
        raise LrfaceError(
            f"{name}: labels run from {smallest} to {largest}; labels of {len(labels)} images should be 0 to "
            f"{limit - 1} at most"
        )
    width = len(str(largest))
    return [f"{label:0{width}d}" for label in range(largest + 1)]


def read_identities(path: Path, labels: np.ndarray) -> list[str] | None:
    """The names of identities that ``lrface pack`` writes beside formats without names; None without the file.

    Raises:
        LrfaceError: the file is damaged or has fewer names than there are labels.
    """
    if not path.is_file():
        return None
    names = read_json(path, "names of the identities").get("identities")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LrfaceError(f"{path}: field 'identities' should be a list of names")
    if len(labels) and (labels.min() < 0 or labels.max() >= len(names)):
        raise LrfaceError(
            f"{path}: has {len(names)} names, labels run from {labels.min()} to {labels.max()}. Remove the file or "
            "copy the data again"
        )
    return names


def write_identities(path: Path, identities: list[str]) -> None:
    """Write what :func:`read_identities` reads."""
    write_text(path, json.dumps({"identities": identities}, ensure_ascii=False))


def check_source(source: FaceSource, name: str, labelled: bool = True) -> None:
    """Refuse what cannot be trained on; ``labelled``: whether anything learns from the labels.

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
    if identities < 2 and labelled:
        raise LrfaceError(
            f"{name} holds one identity only ({source.identities[0]}); a recogniser learns from the difference "
            "between at least 2. Is this the folder above the identity folders?"
        )
