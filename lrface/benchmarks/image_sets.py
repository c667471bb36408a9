"""Images with classes, clean or corrupted, as benchmarks of classifiers store them.

Clean images come from a folder of class folders, a flat folder, arrays (.npy, .npz) or any training data that lrface
reads; corrupted ones from the layouts that ImageNet-C, CIFAR-10-C and MNIST-C were published in.
"""

import io
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.locate import data_roots
from lrface.benchmarks.robustness import BENCHMARKS, Kind
from lrface.data.decode import MAX_PIXELS, BrokenImage, read_header
from lrface.degrade.corruptions import GROUPS, SETS
from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json

DESCRIPTION = "corruptions.json"
"""What ``lrface corrupt`` writes beside the images; published sets have none."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_WNID = re.compile(r"n\d{8}(?=_)")
_IMAGE_KEYS = ("images", "test_images", "x_test", "data", "x")
_LABEL_KEYS = ("labels", "test_labels", "y_test", "y")
_CIFAR_10_1 = {"cifar10.1_v4_data.npy": 2021, "cifar10.1_v6_data.npy": 2000}
"""Files of CIFAR-10.1 and how many images each version has, as its authors say (Recht et al., arXiv 1806.00451)."""


class ImageSet(Protocol):
    """Images by index.

    names: one for each, a path below the set where it has files.
    labels: int64 [n]; None where nothing says which class an image is of.
    classes: names of the classes, by label; None where there are only numbers.
    origin: where it was read from.
    ``read(index)``: uint8 [h, w, 3] RGB, or [h, w]. Raises BrokenImage, or LrfaceError where the format does.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> NDArray[np.int64] | None: ...

    @property
    def classes(self) -> Sequence[str] | None: ...

    @property
    def origin(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]: ...


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """An image file as the published sets were read: by Pillow, without turning it as its EXIF data says. uint8
    [h, w, 3] RGB. Raises BrokenImage."""
    from PIL import Image

    header = read_header(data)
    if header.height * header.width > MAX_PIXELS:
        raise BrokenImage(f"it is {header.width}x{header.height} pixels large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "BMP", "WEBP", "TIFF")) as image:
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises whatever a damaged file leads to
        raise BrokenImage(f"its {header.format} data cannot be decoded ({error})") from None


@dataclass
class FileImages:
    """Image files; see :class:`ImageSet`."""

    root: Path
    names: Sequence[str]
    labels: NDArray[np.int64] | None
    classes: Sequence[str] | None

    @property
    def origin(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> NDArray[np.uint8]:
        try:
            data = (self.root / self.names[index]).read_bytes()
        except OSError as error:
            raise BrokenImage(f"it cannot be read: {error.strerror}") from None
        return decode_image(data)


@dataclass
class ArrayImages:
    """Images in an array uint8 [n, h, w, 3], [n, h, w, 1] or [n, h, w]; see :class:`ImageSet`."""

    origin: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: Sequence[str] | None = None
    names: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.images.shape
        if (
            self.images.dtype != np.uint8
            or len(shape) not in (3, 4)
            or len(shape) == 4
            and shape[3] not in (1, 3)
        ):
            raise LrfaceError(
                f"{self.origin}: images must be uint8 [n, height, width, 3] or [n, height, width]; found "
                f"{self.images.dtype} {list(shape)}"
            )
        if self.labels is not None and len(self.labels) != len(self.images):
            raise LrfaceError(f"{self.origin}: {len(self.images)} images have {len(self.labels)} labels")
        self.names = [f"{index:06d}" for index in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        image = np.asarray(self.images[index])
        return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


@dataclass
class SourceImages:
    """Training data of any format that lrface reads; see :class:`ImageSet`."""

    origin: str
    source: Any
    names: Sequence[str] = field(init=False)
    labels: NDArray[np.int64] | None = field(init=False)
    classes: Sequence[str] | None = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.source.sources()
        self.labels = np.asarray(self.source.labels, dtype=np.int64)
        self.classes = list(self.source.identities)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> NDArray[np.uint8]:
        data = self.source.encoded(index)
        return decode_image(data) if data is not None else self.source.image(index)


def load_array(path: Path) -> NDArray[Any]:
    """A .npy file, mapped into memory and never unpickled. Raises LrfaceError naming it."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise LrfaceError(f"{path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise LrfaceError(f"{path} is no readable .npy array ({error})") from error


def _labels(array: NDArray[Any], where: object) -> NDArray[np.int64]:
    found = np.asarray(array)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise LrfaceError(
            f"{where}: labels must be whole numbers [n]; found {found.dtype} {list(found.shape)}"
        )
    return found.astype(np.int64)


def open_array(path: Path) -> ArrayImages:
    """Images of a .npy file, with the labels beside it, or of a .npz archive; see :func:`open_images`."""
    if path.suffix == ".npy":
        images = load_array(path)
        beside = [path.with_name("labels.npy"), path.with_name(path.name.replace("images", "labels"))]
        beside.append(path.with_name(f"{path.stem}_labels.npy"))
        found = next((file for file in beside if file.is_file() and file != path), None)
        return ArrayImages(str(path), images, None if found is None else _labels(load_array(found), found))
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys = {key.lower(): key for key in stored.files}
            image = next((keys[key] for key in _IMAGE_KEYS if key in keys), None)
            label = next((keys[key] for key in _LABEL_KEYS if key in keys), None)
            if image is None:
                raise LrfaceError(
                    f"{path}: holds {', '.join(stored.files) or 'nothing'}; images should be called one of "
                    f"{', '.join(_IMAGE_KEYS)}, their labels one of {', '.join(_LABEL_KEYS)}"
                )
            images, labels = stored[image], None if label is None else stored[label]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LrfaceError(f"{path} is no readable .npz archive ({error})") from error
    return ArrayImages(str(path), images, None if labels is None else _labels(labels, path))


def open_cifar10_1(path: Path) -> ArrayImages:
    """CIFAR-10.1: cifar10.1_v4_data.npy or cifar10.1_v6_data.npy, uint8 [2021 or 2000, 32, 32, 3], with
    cifar10.1_v4_labels.npy or cifar10.1_v6_labels.npy beside it, whole numbers from 0 to 9.

    Args:
        path: the file with the images, or the folder of one version.

    Raises:
        UsageError: a folder of both versions. LrfaceError: a file is missing, or not what the version holds.
    """
    if path.is_dir():
        found = [path / name for name in _CIFAR_10_1 if (path / name).is_file()]
        if len(found) != 1:
            raise UsageError(f"{path} holds both versions of CIFAR-10.1; name one: {found[0]} or {found[1]}")
        path = found[0]
    count = _CIFAR_10_1[path.name]
    beside = path.with_name(path.name.replace("_data", "_labels"))
    images, labels = ArrayImages(str(path), load_array(path), None), _labels(load_array(beside), beside)
    if images.images.shape != (count, 32, 32, 3):
        raise LrfaceError(
            f"{path}: this version of CIFAR-10.1 is uint8 [{count}, 32, 32, 3]; found {list(images.images.shape)}. Copy it "
            "again"
        )
    if len(labels) != count or labels.min() < 0 or labels.max() > 9:
        raise LrfaceError(
            f"{beside}: {count} labels from 0 to 9 were expected; found {len(labels)} from {labels.min()} to "
            f"{labels.max()}. Copy it again"
        )
    images.labels = labels
    return images


def _files_below(folder: Path) -> list[str]:
    """Image files directly in ``folder``, sorted."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in _SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )


def find_images(path: str | Path, data: str | Path | None = None) -> Path:
    """``path`` as it stands, else below ``data``, $LRFACE_DATA or ~/.cache/lrface, in this order.

    Raises:
        LrfaceError: it is nowhere; names the places. UsageError: ``data`` is no folder.
    """
    path = Path(path)
    places = [path, *(root / path for _, root in data_roots(data))]
    for place in places:
        if place.exists():
            return place
    raise LrfaceError(
        f"{path}: no such file or directory; looked at {', '.join(dict.fromkeys(map(str, places)))}. Give the path, or the "
        "folder that it is in with --data ROOT or $LRFACE_DATA"
    )


def open_images(path: str | Path, data: str | Path | None = None) -> ImageSet:
    """Clean images with classes, of whatever form they have; looked for as :func:`find_images` does.

    - a folder of class folders; a flat folder, whose images have a class where all names begin with one of ImageNet's
      identifiers (n01440764_tench.jpg);
    - .npy [n, h, w, 3] or [n, h, w] with labels.npy or NAME_labels.npy beside it, .npz with images and labels;
    - CIFAR-10.1 as its authors published it, see :func:`open_cifar10_1`;
    - training data of any format, see :func:`lrface.data.source.open_source`.

    Raises:
        LrfaceError: nothing there, or none of these.
    """
    from lrface.data.source import open_source

    path = find_images(path, data)
    if path.name in _CIFAR_10_1 or path.is_dir() and any((path / name).is_file() for name in _CIFAR_10_1):
        return open_cifar10_1(path)
    if path.is_file() and path.suffix in (".npy", ".npz"):
        return open_array(path)
    if path.is_dir() and (path / "test_images.npy").is_file():
        return open_array(path / "test_images.npy")
    flat = _files_below(path) if path.is_dir() and not (path / "index.json").is_file() else []
    if not flat:
        found = open_source(path)
        if found.format == "folder":
            return FileImages(path, found.sources(), np.asarray(found.labels), list(found.identities))
        return SourceImages(str(path), found)
    marks = [_WNID.match(name) for name in flat]
    if not all(marks):
        return FileImages(path, flat, None, None)
    wnids = [mark.group() for mark in marks if mark is not None]
    classes = sorted(set(wnids))
    places = {name: number for number, name in enumerate(classes)}
    return FileImages(path, flat, np.array([places[name] for name in wnids], dtype=np.int64), classes)


def prepare(image: NDArray[np.uint8], kind: Kind) -> NDArray[np.uint8]:
    """An image as its benchmark corrupts it: ImageNet-C's shorter side is brought to 256 pixels (bilinear, by Pillow)
    and the middle 224 are cut out; those of the others are taken as they are, faces of any size.

    Returns:
        uint8 [side, side, 3], for MNIST-C [28, 28].

    Raises:
        BrokenImage: another size than the benchmark's.
    """
    if kind.channels == 1 and image.ndim == 3 and (image[..., :1] == image).all():
        image = image[..., 0]
    if kind.channels == 3 and image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if kind.name == "face_c":
        return image
    if kind.name == "imagenet_c":
        from PIL import Image
        from torchvision.transforms.functional import center_crop, resize

        image = np.asarray(center_crop(resize(Image.fromarray(image), 256), kind.side))
    wanted = (kind.side, kind.side, 3) if kind.channels == 3 else (kind.side, kind.side)
    if image.shape != wanted:
        raise BrokenImage(
            f"{kind.title} takes images of {kind.side}x{kind.side} pixels"
            f"{' in grey' if kind.channels == 1 else ''}; found {list(image.shape)}"
        )
    return image


def store_lossy(image: NDArray[np.uint8], quality: int) -> bytes:
    """A JPEG file as the published sets were stored: by Pillow, with optimised tables. ``image``: uint8 [h, w, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


Batch = tuple[list[int], NDArray[np.uint8], list[tuple[int, str]]]


def batches(
    read: Callable[[int], NDArray[np.uint8]], indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[Batch]:
    """Images read by ``workers`` threads, one batch ahead: (indices, uint8 [m, ...], what could not be read with its
    reason). Images of another shape than the first of all count as unreadable."""

    def attempt(index: int) -> NDArray[np.uint8] | str:
        try:
            return read(index)
        except (BrokenImage, LrfaceError) as error:
            return str(error)

    shape: tuple[int, ...] | None = None
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: deque[tuple[list[int], list[Future[NDArray[np.uint8] | str]]]] = deque()
        starts = iter(range(0, len(indices), batch_size))

        def more() -> None:
            start = next(starts, None)
            if start is not None:
                part = [int(index) for index in indices[start : start + batch_size]]
                waiting.append((part, [pool.submit(attempt, index) for index in part]))

        more()
        while waiting:
            more()
            part, futures = waiting.popleft()
            good: list[int] = []
            images: list[NDArray[np.uint8]] = []
            failed: list[tuple[int, str]] = []
            for index, future in zip(part, futures, strict=True):
                found = future.result()
                if isinstance(found, str):
                    failed.append((index, found))
                    continue
                shape = found.shape if shape is None else shape
                if found.shape != shape:
                    failed.append(
                        (index, f"its shape is {list(found.shape)}, that of the first {list(shape)}")
                    )
                    continue
                good.append(index)
                images.append(found)
            yield good, np.stack(images) if images else np.empty((0,), np.uint8), failed


# --------------------------------------------------------------------------------------------------- stored sets


@dataclass
class StoredSet:
    """A corrupted set on disk.

    Attributes:
        kind: what it is of; its corruptions and severities.
        path: the folder.
        conditions: (corruption, severity) -> opens its images.
        clean: the images before they were corrupted, where the set has them.
        description: what ``lrface corrupt`` said of it; empty for published sets.
    """

    kind: Kind
    path: Path
    conditions: dict[tuple[str, int], Callable[[], ImageSet]]
    clean: ImageSet | None = None
    description: dict[str, Any] = field(default_factory=dict)

    def open(self, corruption: str, severity: int) -> ImageSet:
        """The images of one condition. Raises LrfaceError where they are not there."""
        if (corruption, severity) not in self.conditions:
            there = sorted({name for name, _ in self.conditions})
            levels = sorted(level for name, level in self.conditions if name == corruption)
            found = f"severities {', '.join(map(str, levels))} of it" if levels else ", ".join(there)
            raise LrfaceError(
                f"{self.path}: holds no {corruption} at severity {severity}; found {found}. Copy it there, or leave "
                "it out with --corruptions and --severities"
            )
        return self.conditions[corruption, severity]()


_NAMES = frozenset(name for names in GROUPS.values() for name in names) | frozenset(SETS["mnist"].names)


def is_stored_set(path: Path) -> bool:
    """Whether ``path`` looks like a corrupted set in one of the published layouts."""
    return path.is_dir() and (bool(_corruption_folders(path)) or bool(_corruption_arrays(path)))


def _corruption_arrays(path: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(path.glob("*.npy")) if file.stem in _NAMES}


def _corruption_folders(path: Path) -> dict[str, Path]:
    """Folders of corruptions, directly in ``path`` or in folders of the groups (noise/gaussian_noise)."""
    found: dict[str, Path] = {}
    for place in (path, *(path / group for group in GROUPS)):
        if place.is_dir():
            for entry in sorted(place.iterdir()):
                if entry.name in _NAMES and entry.is_dir():
                    found.setdefault(entry.name, entry)
    return found


def open_stored(path: str | Path, kind: Kind | None = None) -> StoredSet:
    """A corrupted set as it was published, or as ``lrface corrupt`` writes it.

    - CORRUPTION.npy uint8 [severities x n, 32, 32, 3] and labels.npy (CIFAR-10-C);
    - CORRUPTION/test_images.npy uint8 [n, 28, 28, 1] and test_labels.npy; identity/ holds the clean images (MNIST-C);
    - CORRUPTION/SEVERITY/CLASS/IMAGE, where folders of the groups (noise, blur, ...) may come first (ImageNet-C).

    Args:
        kind: what it should be; None to tell from the set.

    Raises:
        LrfaceError: none of these, or damaged.
    """
    path = Path(path)
    description = {}
    if (path / DESCRIPTION).is_file():
        description = read_json(path / DESCRIPTION, "the description of the corrupted set")
    arrays, folders = _corruption_arrays(path), _corruption_folders(path)
    if arrays:
        return _open_arrays(path, arrays, kind or BENCHMARKS["cifar10_c"], description)
    if any((folder / "test_images.npy").is_file() for folder in folders.values()):
        return _open_mnist(path, folders, kind or BENCHMARKS["mnist_c"], description)
    if not folders:
        raise LrfaceError(
            f"{path}: no corrupted set: expected CORRUPTION/SEVERITY/CLASS/IMAGE (ImageNet-C), CORRUPTION.npy with "
            "labels.npy (CIFAR-10-C) or CORRUPTION/test_images.npy (MNIST-C). Clean images are given with --clean, and "
            "--benchmark then names what to make of them"
        )
    conditions: dict[tuple[str, int], Callable[[], ImageSet]] = {}
    for name, folder in folders.items():
        for severity in range(1, 6):
            if (folder / str(severity)).is_dir():
                conditions[name, severity] = lambda folder=folder / str(severity): open_images(folder)  # type: ignore[misc]
    if not conditions:
        raise LrfaceError(f"{path}: {', '.join(folders)} hold no folders 1 to 5, one a severity")
    if kind is None and description.get("benchmark") in BENCHMARKS:
        kind = BENCHMARKS[description["benchmark"]]
    if kind is None:
        first = next(iter(conditions.values()))()
        side = first.read(0).shape[0]
        kind = BENCHMARKS["tiny_imagenet_c" if side == 64 else "imagenet_c"]
    return StoredSet(kind, path, conditions, None, description)


def _open_arrays(path: Path, arrays: dict[str, Path], kind: Kind, description: dict[str, Any]) -> StoredSet:
    labels = _labels(load_array(path / "labels.npy"), path / "labels.npy")
    said = description.get("severities", list(kind.severities))
    classes = description.get("classes")
    conditions: dict[tuple[str, int], Callable[[], ImageSet]] = {}
    for name, file in arrays.items():
        images = load_array(file)
        if len(images) != len(labels) or len(images) % len(said):
            raise LrfaceError(
                f"{file}: {len(images)} images, {len(labels)} labels in labels.npy; expected as many of both, in "
                f"{len(said)} equal parts, one a severity"
            )
        count = len(images) // len(said)
        for number, severity in enumerate(said):
            part = slice(number * count, (number + 1) * count)
            conditions[name, int(severity)] = lambda file=file, images=images, part=part: ArrayImages(  # type: ignore[misc]
                str(file), images[part], labels[part], classes
            )
    return StoredSet(kind, path, conditions, None, description)


def _open_mnist(path: Path, folders: dict[str, Path], kind: Kind, description: dict[str, Any]) -> StoredSet:
    def opener(folder: Path) -> Callable[[], ImageSet]:
        return lambda: open_array(folder / "test_images.npy")

    conditions = {(name, 1): opener(folder) for name, folder in folders.items()}
    identity = path / "identity" / "test_images.npy"
    clean = open_array(identity) if identity.is_file() else None
    return StoredSet(kind, path, conditions, clean, description)


def find_benchmark(kind: Kind, data: str | Path | None = None) -> Path | None:
    """Where the stored set of ``kind`` is below ``data``, ``$LRFACE_DATA`` or ``~/.cache/lrface``; None for nowhere.
    It is looked for as imagenet_c, imagenet-c and ImageNet-C."""
    from lrface.benchmarks.locate import data_roots

    for _, root in data_roots(data):
        for name in (kind.name, kind.name.replace("_", "-"), kind.title):
            if is_stored_set(root / name):
                return root / name
    return None


def check_labels(images: ImageSet) -> NDArray[np.int64]:
    """The labels; raises UsageError where there are none."""
    if images.labels is None:
        raise UsageError(
            f"{images.origin}: nothing says which class an image is of; give a folder of class folders, or labels.npy "
            "beside an array"
        )
    return images.labels
