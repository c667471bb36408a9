"""A benchmark, or any training data, as a source of images: for questions about data rather than about a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.carrays import load_carray
from lrface.benchmarks.locate import FoundBenchmark, locate_benchmark
from lrface.benchmarks.metrics import contiguous_folds
from lrface.benchmarks.packs import read_pack
from lrface.benchmarks.protocols import Photograph, agedb_name, is_image_name, read_protocol
from lrface.benchmarks.verification import VerificationSet, load_benchmark
from lrface.data.decode import EncodedFaces
from lrface.data.folder import FolderSource, ImageFiles
from lrface.data.info import SourceInfo, describe_source
from lrface.data.source import FaceSource, open_source
from lrface.errors import LrfaceError, UsageError


@dataclass
class Images:
    """Images with what is known about them.

    named: whether identities have names or numbers of their own. Those of a verification pack are only "what
        pairs of the same person join": two of them may be one person.
    pairs: counts of a benchmark's pairs (pairs, same, different, folds); None for other data.
    different: left and right int64 [p], the images of the pairs of different people; None where identities
        say it.
    """

    source: FaceSource
    name: str
    named: bool = True
    pairs: dict[str, int] | None = None
    different: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None


class _Distinct:
    """Images of pairs without names; those that occur more than once are held once, in order of appearance.

    ``identities`` are the groups that same pairs join, named group-0, group-1, ... by their first image;
    ``left``, ``right`` int64 [p] and ``same`` bool [p] are the pairs, ``positions`` int64 [n] the places where
    the images appear first.
    """

    def __init__(self, contents: Iterable[bytes], same: NDArray[np.bool_]):
        numbers: dict[bytes, int] = {}
        indices = np.array([numbers.setdefault(one, len(numbers)) for one in contents], dtype=np.int64)
        self.distinct = list(numbers)
        self.positions = np.unique(indices, return_index=True)[1]
        self.left, self.right, self.same = indices[0::2], indices[1::2], same
        self.labels = joined_groups(len(numbers), self.left[same], self.right[same])
        self.identities = [f"group-{number}" for number in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.distinct)

    def sources(self) -> list[str]:
        """The place of each image among those of the pairs, where it appears first."""
        return [f"image {position}" for position in self.positions]


class PackImages(_Distinct, EncodedFaces):
    """The distinct images of a verification pack (.bin)."""

    format = "verification pack"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        super().__init__(*read_pack(self.path))

    def encoded(self, index: int) -> bytes:
        return self.distinct[index]

    def place(self, index: int) -> str:
        return f"{self.path}: image {self.positions[index]}"


class CarrayImages(_Distinct):
    """The distinct images of a carray or memfile with a list of pairs; they are held in memory."""

    format = "bcolz or memfile with pairs"

    def __init__(self, path: str | Path, show_progress: bool = True):
        benchmark = load_carray(path, Path(path).name, show_progress)
        self._shape = benchmark.images.shape[1:]
        super().__init__((image.tobytes() for image in benchmark.images), benchmark.same)

    def image(self, index: int) -> np.ndarray:
        return np.frombuffer(self.distinct[index], np.uint8).reshape(self._shape)

    def encoded(self, index: int) -> None:
        return None


def joined_groups(count: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the groups of 0..count-1 that pairs (left, right) join, int64 [count], by their first members."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.unique([root(item) for item in range(count)], return_inverse=True)[1].astype(np.int64)


class PhotographFiles(ImageFiles):
    """One folder of image files whose names say who it is: AgeDB, CALFW, CPLFW as given out.

    Raises:
        LrfaceError: the folder holds no images.
    """

    format = "folder of image files"

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.paths = sorted(
            path for path in self.root.iterdir() if is_image_name(path.name) and path.is_file()
        )
        if not self.paths:
            raise LrfaceError(f"{self.root}: no images found")
        names = [identity_of(("", path.name)) for path in self.paths]
        self.identities, self.labels = numbered(names)

    def sources(self) -> list[str]:
        return [path.name for path in self.paths]


class AlignedImages:
    """The aligned images of a :class:`VerificationSet` with the names that its protocol gives them."""

    format = "aligned benchmark"

    def __init__(self, benchmark: VerificationSet, left: list[Photograph], right: list[Photograph]):
        self.images = benchmark.images
        photographs: list[Photograph] = [("", "")] * len(benchmark.images)
        for indices, named in ((benchmark.left, left), (benchmark.right, right)):
            for index, photograph in zip(indices.tolist(), named, strict=True):
                photographs[index] = photograph
        self._sources = [" ".join(part for part in photograph if part) for photograph in photographs]
        names = [identity_of(photograph) for photograph in photographs]
        self.identities, self.labels = numbered(names)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def encoded(self, index: int) -> None:
        return None

    def sources(self) -> list[str]:
        return self._sources


def numbered(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different names, sorted, and int64 [n]: which of them each one is."""
    identities = sorted(set(names))
    position = {name: label for label, name in enumerate(identities)}
    return identities, np.array([position[name] for name in names], dtype=np.int64)


def identity_of(photograph: Photograph) -> str:
    """Whom a photograph of a protocol shows: its folder's name, or what its file's name says."""
    folder, token = photograph
    if folder:
        return folder.split("/")[0]
    stem = token.rsplit(".", 1)[0] if is_image_name(token) else token
    agedb = agedb_name(stem)
    if agedb is not None:
        return agedb[1]
    name, _, number = stem.rpartition("_")
    return name if name and number.isdigit() else stem


def open_images(
    path: str | Path,
    data: str | Path | None = None,
    aligned: bool = False,
    show_progress: bool = True,
) -> Images:
    """Open a benchmark by name or path, or training data of any format.

    Of a benchmark given out as photographs ``aligned=True`` gives the aligned faces of its pairs (aligned when
    first asked for, then kept), and otherwise all photographs as they are.

    Raises:
        UsageError, LrfaceError: what :func:`~lrface.benchmarks.locate.locate_benchmark` and
            :func:`~lrface.data.source.open_source` raise.
    """
    found = _benchmark(path, data)
    if found is None:
        return Images(open_source(path), str(path))
    if found.kind in ("pack", "bcolz"):
        pack = PackImages(found.path) if found.kind == "pack" else CarrayImages(found.path, show_progress)
        folds = contiguous_folds(len(pack.same)) if len(pack.same) > 1 else np.zeros(1, np.int64)
        different = pack.left[~pack.same], pack.right[~pack.same]
        return Images(pack, str(found.path), False, _counts(pack.same, folds), different)
    assert found.pairs is not None
    pairs = read_protocol(found.pairs)
    counts = _counts(pairs.same, pairs.folds)
    if found.kind == "packed":
        return Images(open_source(found.path), str(found.path), pairs=counts)
    if aligned:
        place = Path(path).expanduser()
        benchmark = load_benchmark(place if place.exists() else path, data, show_progress=show_progress)
        return Images(AlignedImages(benchmark, pairs.left, pairs.right), str(found.path), pairs=counts)
    try:
        source: FaceSource = FolderSource(found.path)
    except LrfaceError:
        source = PhotographFiles(found.path)
    return Images(source, str(found.path), pairs=counts)


def _benchmark(path: str | Path, data: str | Path | None) -> FoundBenchmark | None:
    """The benchmark that ``path`` names or is, None for training data."""
    place = Path(path).expanduser()
    if not place.exists():
        return locate_benchmark(str(path), data=data)
    if place.is_file():
        return locate_benchmark(place) if place.suffix == ".bin" else None
    try:
        return locate_benchmark(place)
    except UsageError:  # InsightFace's training folders hold packs beside the images
        return None


def _counts(same: NDArray[np.bool_], folds: NDArray[np.int64]) -> dict[str, int]:
    return {
        "pairs": len(same),
        "same": int(same.sum()),
        "different": int((~same).sum()),
        "folds": len(np.unique(folds)),
    }


def describe(path: str | Path, data: str | Path | None = None) -> tuple[SourceInfo, FaceSource]:
    """What :func:`~lrface.data.info.describe_source` says of any data, with the counts of a benchmark's pairs.

    Raises:
        UsageError, LrfaceError: see :func:`open_images`.
    """
    images = open_images(path, data)
    info = describe_source(images.source, images.name, named=images.named)
    info.pairs = images.pairs
    return info, images.source
