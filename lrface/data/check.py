"""Whether a data set is sound: every image decoded and hashed in worker processes, labels counted."""

import csv
import hashlib
import io
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lrface.data.source import FaceSource
from lrface.errors import LrfaceError, UsageError
from lrface.files import write_text
from lrface.progress import progress

KINDS = {
    "unreadable": "images that cannot be decoded",
    "truncated": "image files that are cut off",
    "label": "labels outside of the identities",
    "label gap": "identities without an image",
    "damaged": "images that decode with a warning",
    "blank": "images of one colour",
    "other size": "images of another size than most",
    "same file": "copies of an image file",
    "same pixels": "copies with the same pixels, stored differently",
    "single image": "identities with one image",
    "near duplicate": "images nearly equal to another of their identity",
    "label noise": "images that look like another identity's",
}
"""Kinds of findings, in the order they are reported."""

BROKEN = ("unreadable", "truncated", "label", "label gap")
"""Kinds that make a data set unsound; the others are worth a look."""

BLANK_DEVIATION = 1.0
"""An image whose channels all deviate less from their means (of 255) shows nothing."""

CHUNK = 128
REPORT_COLUMNS = (
    "kind",
    "index",
    "identity",
    "source",
    "other_index",
    "other_identity",
    "other_source",
    "detail",
)


@dataclass(frozen=True)
class Finding:
    """Something that was found: at an image (``index``) or an identity (``identity``), with the image that it
    repeats or resembles (``other``), and in words."""

    kind: str
    index: int | None = None
    identity: str = ""
    other: int | None = None
    detail: str = ""


@dataclass
class CheckReport:
    """The findings about one data set.

    pixels: uint64 [n, 2] and files: uint64 [n, 2], hashes of decoded pixels (with their shape) and of image
    files, 0 where there is none; readable: bool [n].
    """

    path: str
    images: int
    identities: int
    seconds: float
    findings: list[Finding]
    files: np.ndarray = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    readable: np.ndarray = field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings of each kind, in the order of ``KINDS``, kinds without any left out."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @property
    def sound(self) -> bool:
        """Whether nothing is broken: every image decodes whole, labels are without gaps."""
        return not any(kind in BROKEN for kind in self.counts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "images": self.images,
            "identities": self.identities,
            "sound": self.sound,
            "findings": self.counts,
            "across_identities": sum(f.kind in _COPIES and bool(f.detail) for f in self.findings),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images / max(self.seconds, 1e-9), 1),
        }

    def __str__(self) -> str:
        summary = self.to_dict()
        lines = [
            f"{self.path}: {self.images:,} images of {self.identities:,} identities decoded in {self.seconds:.1f} s "
            f"({summary['images_per_second']:,.0f} images/s)"
        ]
        counts = self.counts
        for kind, count in counts.items():
            mark = "BROKEN" if kind in BROKEN else ""
            lines.append(f"{mark:6}  {count:>9,}  {KINDS[kind]}")
        if summary["across_identities"]:
            lines.append(
                f"        {summary['across_identities']:>9,}  of the copies are of another identity's image"
            )
        lines.append(
            "sound: every image decodes whole and labels have no gaps"
            if self.sound
            else "NOT SOUND: what is marked BROKEN fails or is skipped in training"
        )
        return "\n".join(lines)

    def write(self, out: str | Path, source: FaceSource) -> None:
        """Write every finding as a line of CSV, whole or not at all.

        Columns: kind, index, identity, source, other_index, other_identity, other_source, detail.
        """
        names = source.sources() if self.findings else []
        labels = _labels(source)

        def place(index: int | None) -> list[Any]:
            if index is None:
                return ["", "", ""]
            label = -1 if labels is None else int(labels[index])
            known = 0 <= label < len(source.identities)
            return [index, source.identities[label] if known else "", names[index]]

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(REPORT_COLUMNS)
        order = list(KINDS)
        for finding in sorted(self.findings, key=lambda one: order.index(one.kind)):
            here = place(finding.index)
            if finding.identity:
                here[1] = finding.identity
            writer.writerow([finding.kind, *here, *place(finding.other), finding.detail])
        write_text(out, text.getvalue())


_COPIES = ("same file", "same pixels")


@dataclass
class _Decoded:
    """What one worker found in images ``start`` to ``start + len(readable)``."""

    start: int
    files: np.ndarray  # uint64 [n, 2]
    pixels: np.ndarray  # uint64 [n, 2]
    sizes: np.ndarray  # int32 [n, 2], height and width
    readable: np.ndarray  # bool [n]
    findings: list[Finding]


class _DecoderMessages:
    """Standard error of this process, kept aside: image decoders print there what they think of a file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        os.dup2(self._file.fileno(), 2)
        self._read = 0

    def take(self) -> str:
        """What was printed since the last call, on one line."""
        end = os.fstat(2).st_size
        if end == self._read:
            return ""
        text = os.pread(self._file.fileno(), min(end - self._read, 1000), self._read)
        # The descriptors share their place in the file: cut off, or a million warnings fill the disk.
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        self._read = 0
        return " ".join(text.decode(errors="replace").split())


_source: FaceSource
_messages: _DecoderMessages


def _start_worker(source: FaceSource) -> None:
    global _source, _messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    cv2.setNumThreads(0)
    _source, _messages = source, _DecoderMessages()


def _decode_images(start: int, stop: int) -> _Decoded:
    count = stop - start
    files, pixels = np.zeros((count, 2), np.uint64), np.zeros((count, 2), np.uint64)
    sizes, readable = np.zeros((count, 2), np.int32), np.zeros(count, bool)
    findings = []
    for row, index in enumerate(range(start, stop)):
        try:
            encoded = _source.encoded(index)
            if encoded is not None:
                files[row] = _hash(encoded)
            image = _source.image(index)
        except (LrfaceError, OSError, cv2.error) as error:
            _messages.take()
            findings.append(Finding("unreadable", index, detail=" ".join(str(error).split())))
            continue
        said = _messages.take()
        readable[row] = True
        sizes[row] = image.shape[:2]
        pixels[row] = _hash(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        if encoded is not None and (reason := truncated(encoded)):
            findings.append(Finding("truncated", index, detail=reason))
        elif said:
            findings.append(Finding("damaged", index, detail=said))
        if float(cv2.meanStdDev(image)[1].max()) < BLANK_DEVIATION:
            findings.append(Finding("blank", index, detail=f"mean colour {image.mean(axis=(0, 1)).round(1)}"))
    return _Decoded(start, files, pixels, sizes, readable, findings)


def _hash(data: bytes) -> np.ndarray:
    """128 bits of BLAKE2b as uint64 [2]; never 0, which stands for no image."""
    words = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)
    return words if words.any() else np.ones(2, np.uint64)


def truncated(encoded: bytes) -> str:
    """Why an image file is cut off, empty when it is not: decoders fill what lacks with grey and say nothing.

    Bytes after the end of a JPEG are allowed, as every decoder does.
    """
    # The end of a preview in the metadata stands before the last scan begins.
    if encoded.startswith(b"\xff\xd8") and encoded.rfind(b"\xff\xd9") < encoded.rfind(b"\xff\xda"):
        return f"JPEG of {len(encoded)} bytes without its end marker"
    if encoded.startswith(b"\x89PNG") and b"IEND" not in encoded:
        return f"PNG of {len(encoded)} bytes without its end chunk"
    if encoded.startswith(b"RIFF") and int.from_bytes(encoded[4:8], "little") + 8 > len(encoded):
        return f"WebP of {len(encoded)} bytes that announces {int.from_bytes(encoded[4:8], 'little') + 8}"
    return ""


def check_data(
    source: FaceSource,
    path: str,
    workers: int | None = None,
    show_progress: bool = True,
    description: str = "check",
) -> CheckReport:
    """Decode every image of ``source`` in ``workers`` processes (default: one a core) and report what is wrong.

    An image that fails is a finding and ends nothing. Memory grows by 50 bytes an image.

    Raises:
        UsageError: fewer than one worker.
        LrfaceError: a worker process died.
    """
    count = len(source)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers: at least 1 is needed; found {workers}")
    started = time.monotonic()
    files, pixels = np.zeros((count, 2), np.uint64), np.zeros((count, 2), np.uint64)
    sizes, readable = np.zeros((count, 2), np.int32), np.zeros(count, bool)
    findings: list[Finding] = []
    with progress(count, description, enabled=show_progress) as bar:
        for part in _parts(source, count, workers):
            rows = slice(part.start, part.start + len(part.readable))
            files[rows], pixels[rows] = part.files, part.pixels
            sizes[rows], readable[rows] = part.sizes, part.readable
            findings += part.findings
            bar.advance(len(part.readable))
    labels = _labels(source)
    findings += _label_findings(source, labels)
    findings += _size_findings(sizes, readable)
    findings += _copies(files, pixels, labels)
    return CheckReport(
        path, count, len(source.identities), time.monotonic() - started, findings, files, pixels, readable
    )


def _parts(source: FaceSource, count: int, workers: int) -> Iterator[_Decoded]:
    """The images in order, a chunk at a time, decoded by processes that are gone when this ends."""
    chunks = deque(range(0, count, CHUNK))
    workers = max(1, min(workers, len(chunks)))
    # Spawned, not forked: the caller may have threads (PyTorch's, OpenCV's), which do not survive a fork.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(source,)
    )
    waiting: deque[tuple[int, Future[_Decoded]]] = deque()
    try:
        while chunks or waiting:
            while chunks and len(waiting) < 4 * workers:
                start = chunks.popleft()
                waiting.append((start, pool.submit(_decode_images, start, min(start + CHUNK, count))))
            start, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                last = min(count, (waiting[-1][0] if waiting else start) + CHUNK) - 1
                raise LrfaceError(
                    f"a worker process died while images {start} to {last} were decoded: the machine ran out of "
                    "memory, or one of these images crashes its decoder. Try --workers 1"
                ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _labels(source: FaceSource) -> np.ndarray | None:
    try:
        return source.labels
    except LrfaceError:
        return None


def _label_findings(source: FaceSource, labels: np.ndarray | None) -> list[Finding]:
    identities = source.identities
    if labels is None:
        try:
            _ = source.labels
        except LrfaceError as error:
            return [Finding("label", detail=str(error))]
    assert labels is not None
    outside = np.flatnonzero((labels < 0) | (labels >= len(identities)))
    found = [
        Finding("label", index, detail=f"label {labels[index]} of {len(identities)} identities")
        for index in outside.tolist()
    ]
    inside = np.delete(labels, outside) if len(outside) else labels
    counts = np.bincount(inside, minlength=len(identities))
    for label in np.flatnonzero(counts == 0).tolist():
        found.append(Finding("label gap", identity=identities[label], detail=f"label {label} has no image"))
    alone = np.flatnonzero(counts == 1)
    if len(alone):
        first = np.full(len(identities), -1, np.int64)
        first[inside] = np.flatnonzero((labels >= 0) & (labels < len(identities)))
        found += [Finding("single image", int(first[label])) for label in alone.tolist()]
    return found


def _size_findings(sizes: np.ndarray, readable: np.ndarray) -> list[Finding]:
    kinds, inverse, counts = np.unique(sizes[readable], axis=0, return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        return []
    usual = int(counts.argmax())
    height, width = kinds[usual]
    return [
        Finding("other size", index, detail=f"{sizes[index][1]}x{sizes[index][0]}, most are {width}x{height}")
        for index in np.flatnonzero(readable)[inverse.reshape(-1) != usual].tolist()
    ]


def first_alike(hashes: np.ndarray) -> np.ndarray:
    """For every row of ``hashes`` (uint64 [n, 2]) the first row equal to it, int64 [n]; rows of 0 equal none."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1) | ~ordered[1:].any(axis=1)
    first = np.empty(len(hashes), np.int64)
    # lexsort is stable: the first of every run of equals is the one with the smallest index.
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first


def _copies(files: np.ndarray, pixels: np.ndarray, labels: np.ndarray | None) -> list[Finding]:
    """Every copy once, with the first image it equals: by its file, or else by its pixels."""
    own = np.arange(len(files))
    same_file, same_pixels = first_alike(files), first_alike(pixels)
    found = []
    for kind, first, chosen in (
        ("same file", same_file, same_file != own),
        ("same pixels", same_pixels, (same_file == own) & (same_pixels != own)),
    ):
        for index in np.flatnonzero(chosen).tolist():
            other = int(first[index])
            across = labels is not None and labels[index] != labels[other]
            found.append(Finding(kind, index, other=other, detail="of another identity" if across else ""))
    return found
