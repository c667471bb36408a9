"""From any format of training data into another: `lrface pack` and `lrface unpack`.

Image files are copied byte for byte wherever the source has files and the target holds files. Otherwise pixels are: a
target of pixels gets what the file decodes to, a target of files gets a PNG of the pixels. Labels, names and the order
of images are kept. Memory does not grow with the data.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from lrface.data.carray import CarrayWriter, MemfileWriter
from lrface.data.decode import BrokenImage, decode, read_header
from lrface.data.packed import PackedWriter, alignment_columns
from lrface.data.recordio import RecordWriter
from lrface.data.source import IDENTITIES_NAME, FaceSource, open_source, write_identities
from lrface.data.tables import ParquetWriter
from lrface.data.webdataset import ShardWriter
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, explain, locked
from lrface.progress import progress

TARGETS = ("arrow", "rec", "bcolz", "memfile", "parquet", "webdataset")
_PIXEL_TARGETS = ("bcolz", "memfile")
_SUFFIXES = {"jpeg": "jpg", "png": "png", "bmp": "bmp", "webp": "webp", "tiff": "tif"}
_LISTED = 100


@dataclass
class ConvertSummary:
    """What a conversion came to. ``skipped`` images were broken; the first 100 are listed with the reason."""

    source: str
    source_format: str
    out: str
    format: str
    images: int = 0
    identities: int = 0
    resized: int = 0
    skipped: int = 0
    skipped_images: list[dict[str, str]] = field(default_factory=list)
    identities_without_images: int = 0
    renamed_identities: int = 0
    labels_follow_names: bool = True
    seconds: float = 0.0
    images_per_second: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out} ({self.format}): {self.images} images of {self.identities} identities from {self.source} "
            f"({self.source_format}), {self.images_per_second:.0f} images/s"
        ]
        if self.resized:
            lines.append(f"{self.resized} images were resized")
        if self.skipped:
            first = self.skipped_images[0]
            lines.append(
                f"{self.skipped} broken images were left out, the first is {first['source']}: {first['reason']}"
            )
        if self.identities_without_images:
            lines.append(
                f"{self.identities_without_images} identities have no image, which `lrface train` refuses: labels have gaps"
            )
        if self.renamed_identities:
            lines.append(
                f"{self.renamed_identities} identities have names that no folder can have and got others"
            )
        if not self.labels_follow_names:
            lines.append(
                "the folders' names do not sort as the labels did: read back, labels are numbered anew"
            )
        return "\n".join(lines)


class Face(NamedTuple):
    """One image on its way: a file of ``kind`` ("jpeg", "png", ...), or pixels (uint8 [h, w, 3], RGB), or both."""

    data: bytes | None
    kind: str
    pixels: np.ndarray | None
    number: int
    label: int
    source: str


class _Target(Protocol):
    def add(self, face: Face) -> None: ...

    def finish(self) -> None: ...


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def _file(face: Face) -> bytes:
    if face.data is not None:
        return face.data
    assert face.pixels is not None
    return _png(face.pixels)


class _Arrow:
    """Packed data; what only alignment knows is kept from packed sources and unknown (NaN, face 0) from others."""

    def __init__(self, folder: Path, source: FaceSource, size: tuple[int, int]):
        self._writer, self._size, self._identities = PackedWriter(folder), size, source.identities
        self._alignment = alignment_columns(source)

    def add(self, face: Face) -> None:
        self._writer.add(
            {
                "image": _file(face),
                "label": face.label,
                "identity": self._identities[face.label],
                "source": face.source,
                **self._alignment(face.number),
            }
        )

    def finish(self) -> None:
        self._writer.finish(self._size, self._identities)


class _Record:
    def __init__(self, folder: Path, source: FaceSource, size: tuple[int, int]):
        self._writer = RecordWriter(folder, size)
        self._identities = source.identities

    def add(self, face: Face) -> None:
        self._writer.add(_file(face), face.label)

    def finish(self) -> None:
        self._writer.finish(self._identities)


class _Pixels:
    """A carray or memfile, with labels and names for the files beside it."""

    def __init__(self, folder: Path, source: FaceSource, size: tuple[int, int], out: Path, kind: str):
        self._writer: Any = (
            CarrayWriter(folder, size, len(source)) if kind == "bcolz" else MemfileWriter(folder, size)
        )
        self._labels: list[int] = []
        self._identities, self._out = source.identities, out

    def add(self, face: Face) -> None:
        assert face.pixels is not None
        self._writer.add(face.pixels)
        self._labels.append(face.label)

    def finish(self) -> None:
        self._writer.close()
        # They lie there first: without the folder nothing reads them.
        out = self._out
        with atomic_file(out.with_name(f"{out.name}_labels.npy")) as aside, open(aside, "wb") as file:
            np.save(file, np.asarray(self._labels, dtype=np.int64), allow_pickle=False)
        write_identities(out.with_name(f"{out.name}_{IDENTITIES_NAME}"), self._identities)


class _Parquet:
    def __init__(self, folder: Path, source: FaceSource):
        self._writer = ParquetWriter(folder, source.identities)

    def add(self, face: Face) -> None:
        self._writer.add(_file(face), face.label, face.source)

    def finish(self) -> None:
        self._writer.close()


class _WebDataset:
    def __init__(self, folder: Path, source: FaceSource):
        self._writer = ShardWriter(folder)
        self._identities = source.identities

    def add(self, face: Face) -> None:
        kind = _SUFFIXES[face.kind] if face.data is not None else "png"
        self._writer.add(_file(face), kind, face.label, self._identities[face.label], face.source)

    def finish(self) -> None:
        self._writer.close()


class _Folder:
    """Identity folders; a file keeps its name where it is a good one and the only one, else it is its number."""

    def __init__(self, folder: Path, source: FaceSource, summary: ConvertSummary):
        self._folders: list[Path] = []
        taken: set[str] = set()
        width = len(str(len(source.identities)))
        for label, name in enumerate(source.identities):
            # One component, not hidden, of no more bytes than file systems take; nothing leads out of the folder.
            safe = re.sub(r"[/\\\0]", "_", name).lstrip(".").encode()[:200].decode("utf-8", "ignore")
            if not safe.strip() or safe.lower() in taken:
                safe = f"{label:0{width}d}-{safe}" if safe.strip() else f"{label:0{width}d}"
            taken.add(safe.lower())
            summary.renamed_identities += safe != name
            self._folders.append(folder / safe)
        names = [path.name for path in self._folders]
        summary.labels_follow_names = names == sorted(names)
        self._digits = len(str(len(source)))

    def add(self, face: Face) -> None:
        folder = self._folders[face.label]
        folder.mkdir(exist_ok=True)
        kind = _SUFFIXES[face.kind] if face.data is not None else "png"
        stem, dot, suffix = face.source.rpartition("/")[2].rpartition(".")
        if not dot:
            stem, suffix = suffix, ""
        keeps = suffix.lower() in (kind, {"jpg": "jpeg", "tif": "tiff"}.get(kind))
        number = f"{face.number:0{self._digits}d}"
        stem = re.sub(r"[\\\0]", "_", stem).lstrip(".").encode()[:200].decode("utf-8", "ignore") or number
        data = _file(face)
        for name in (stem, f"{stem}-{number}"):
            try:
                with open(folder / f"{name}.{suffix if keeps else kind}", "xb") as file:
                    file.write(data)
                return
            except FileExistsError:
                continue
        raise LrfaceError(f"{folder}: two images want the name {name}")

    def finish(self) -> None:
        pass


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when all went well; what a killed run left there is removed.

    Raises:
        UsageError: ``out`` is there and not an empty folder. LrfaceError: another run writes it, or the disk is full.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already; give another place, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with locked(partial):
            try:
                for entry in partial.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name != ".lock":
                        entry.unlink()
                yield partial
                (partial / ".lock").unlink(missing_ok=True)
                os.sync()
                os.replace(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise explain(error, out) from error


def pack(
    source: str | Path,
    out: str | Path,
    to: str = "arrow",
    size: int | None = None,
    show_progress: bool = True,
) -> ConvertSummary:
    """Convert training data of any format that :func:`~lrface.data.source.open_source` reads into ``out``.

    Args:
        to: one of ``TARGETS``. "arrow" is lrface's packed data; "rec" is InsightFace's RecordIO; "bcolz" and "memfile"
            hold pixels, with ``OUT_labels.npy`` and ``OUT_identities.json`` beside the folder.
        size: resize images of another size to ``size`` x ``size`` pixels (these are encoded anew: JPEG stays JPEG, of
            quality 95; others become PNG). Without it images of different sizes are refused.

    Raises:
        UsageError: an unknown target, or ``out`` is there. LrfaceError: nothing readable in ``source``, images of
            different sizes, or ``out`` cannot be written. ``out`` is then not there.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: unknown format; there are {', '.join(TARGETS)}")
    if size is not None and not 1 <= size <= 4096:
        raise UsageError(f"--size {size}: expected 1 to 4096 pixels")
    out = Path(out)
    opened = open_source(source)
    summary = ConvertSummary(str(source), opened.format, str(out), to)
    faces = _Reader(opened, summary, size=size, one_size=True, pixels=to in _PIXEL_TARGETS)

    def target(folder: Path, shape: tuple[int, int]) -> _Target:
        if to == "arrow":
            return _Arrow(folder, opened, shape)
        if to == "rec":
            return _Record(folder, opened, shape)
        if to == "parquet":
            return _Parquet(folder, opened)
        if to == "webdataset":
            return _WebDataset(folder, opened)
        return _Pixels(folder, opened, shape, out, to)

    _convert(opened, faces, target, out, summary, show_progress)
    return summary


def unpack(source: str | Path, out: str | Path, show_progress: bool = True) -> ConvertSummary:
    """Convert training data of any format into a folder of identity folders of image files.

    Raises:
        UsageError: ``out`` is there. LrfaceError: nothing readable in ``source``, or ``out`` cannot be written.
    """
    opened = open_source(source)
    summary = ConvertSummary(str(source), opened.format, str(out), "folder")
    faces = _Reader(opened, summary, size=None, one_size=False, pixels=False)
    _convert(
        opened, faces, lambda folder, _: _Folder(folder, opened, summary), Path(out), summary, show_progress
    )
    return summary


class _Reader:
    """The faces of a source; broken images are noted in the summary and left out."""

    def __init__(
        self, source: FaceSource, summary: ConvertSummary, size: int | None, one_size: bool, pixels: bool
    ):
        self._source, self._summary = source, summary
        self._size, self._one_size, self._pixels = size, one_size, pixels
        self._first: tuple[tuple[int, int], str] | None = None
        self._labels = source.labels
        self._names = source.sources()

    def face(self, index: int) -> tuple[Face, tuple[int, int]] | None:
        """Face ``index`` and its (height, width); None when the image is broken."""
        name = self._names[index]
        try:
            data = self._source.encoded(index)
            pixels = self._source.image(index) if data is None or self._pixels else None
            kind, *shape = read_header(data) if data is not None else ("png", *_shape(pixels))
            if pixels is not None:
                shape = list(_shape(pixels))
            if self._size is not None and shape != [self._size, self._size]:
                data, pixels, kind = self._resize(data, pixels, kind, self._size)
                shape = [self._size, self._size]
        except (BrokenImage, LrfaceError) as error:
            self._summary.skipped += 1
            if len(self._summary.skipped_images) < _LISTED:
                self._summary.skipped_images.append({"source": name, "reason": str(error)})
            return None
        found = (shape[0], shape[1])
        if self._first is None:
            self._first = found, name
        elif self._one_size and found != self._first[0]:
            height, width = self._first[0]
            raise LrfaceError(
                f"{self._summary.source}: images have different sizes: {name} has {found[1]}x{found[0]} pixels, "
                f"{self._first[1]} has {width}x{height}. Give --size {width} to resize"
            )
        return Face(data, kind, pixels, index, int(self._labels[index]), name), found

    def _resize(
        self, data: bytes | None, pixels: np.ndarray | None, kind: str, size: int
    ) -> tuple[bytes | None, np.ndarray, str]:
        from lrface.data.dataset import fit_image  # brings torch, which nothing else here needs

        if pixels is None:
            assert data is not None
            pixels = decode(data)
        pixels = fit_image(pixels, size)
        self._summary.resized += 1
        if self._pixels:
            return None, pixels, "png"
        if kind != "jpeg":
            return _png(pixels), pixels, "png"
        options = [cv2.IMWRITE_JPEG_QUALITY, 95]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1]
        return encoded.tobytes(), pixels, "jpeg"


def _shape(pixels: np.ndarray | None) -> tuple[int, int]:
    assert pixels is not None
    return pixels.shape[0], pixels.shape[1]


def _convert(
    source: FaceSource, faces: _Reader, make: Any, out: Path, summary: ConvertSummary, show_progress: bool
) -> None:
    started = time.monotonic()
    labels = source.labels
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(source.identities):
        raise LrfaceError(
            f"{summary.source}: labels run from {labels.min()} to {labels.max()}, but there are "
            f"{len(source.identities)} identities"
        )
    seen = np.zeros(len(source.identities), dtype=bool)
    with _new_directory(out) as folder, progress(len(source), summary.format, enabled=show_progress) as bar:
        target: _Target | None = None
        for index in range(len(source)):
            found = faces.face(index)
            if found is not None:
                face, shape = found
                if target is None:
                    target = make(folder, shape)
                target.add(face)
                seen[face.label] = True
                summary.images += 1
            bar.advance()
        if target is None:
            reason = f", the first: {summary.skipped_images[0]['reason']}" if summary.skipped_images else ""
            raise LrfaceError(f"{summary.source}: none of its {len(source)} images could be read{reason}")
        target.finish()
    summary.identities = int(seen.sum())
    summary.identities_without_images = int((~seen).sum())
    summary.seconds = round(time.monotonic() - started, 3)
    summary.images_per_second = round(summary.images / max(summary.seconds, 1e-3), 1)
