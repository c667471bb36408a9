"""Folders of photographs -> packed, aligned faces. Resumable, and the same result whatever interrupted it.

The sorted list of files is cut into parts. A worker turns one part into one file under ``OUT/unfinished``,
written aside and renamed, so that a part is there whole or not at all. When every part is there, labels are
known: parts are joined into shards with their final labels, ``report.csv`` says of every file what became
of it, and ``index.json`` is written last. Nothing depends on the number of workers, on timing, or on where
a run was killed.
"""

import csv
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from lrface.align.detect import (
    FACE_RULES,
    FALLBACKS,
    MAX_SIDE,
    Detection,
    FaceDetector,
    central_face,
    choose_faces,
    describe_detector,
    load_detector,
)
from lrface.align.warp import effective_resolution, warp_face
from lrface.data.packed import (
    INDEX_NAME,
    SCHEMA,
    read_index,
    shard_name,
    table_from_records,
    write_index,
    write_table,
)
from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json, write_json, write_text
from lrface.progress import progress

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .jp2 .avif .mpo".split()
)
# Only formats decoded in-process: Pillow would start an outside program for some others (PostScript).
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")

ALIGNED, FALLBACK, NO_FACE, UNREADABLE = "aligned", "fallback", "no_face", "unreadable"
NOT_AN_IMAGE, NO_IDENTITY = "not_an_image", "no_identity"
STATUSES = (ALIGNED, FALLBACK, NO_FACE, UNREADABLE, NOT_AN_IMAGE, NO_IDENTITY)

ENGINES = ("local", "ray")

REPORT_NAME = "report.csv"
_UNFINISHED = "unfinished"
_REPORT_KEY = b"lrface-report"
_NOT_LISTED = "folder cannot be listed"

# A batch for the detector ends at so many photographs or pixels, which bounds memory.
_BATCH_PHOTOGRAPHS, _BATCH_PIXELS = 16, 4_000_000


class UnreadableImage(LrfaceError):
    """A file that cannot be used as a photograph; ``reason`` says why, ``is_image`` whether it claims to be
    one."""

    def __init__(self, reason: str, is_image: bool = True):
        super().__init__(reason)
        self.reason = reason
        self.is_image = is_image

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.is_image)


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def read_photo(photo: str | Path | bytes | Image.Image) -> np.ndarray:
    """A photograph as uint8 [h, w, 3] RGB, upright (EXIF rotation applied), an array of its own.

    Takes a path, the bytes of a file, or a PIL image. Handles grey, palette, CMYK, 16-bit and
    floating-point images, transparency (laid over white) and animations (first frame). Raises
    UnreadableImage with the reason for a file that is missing, not permitted, empty, truncated, damaged,
    too large, or no image.
    """
    return read_reduced(photo, None)[0]


def read_reduced(
    photo: str | Path | bytes | Image.Image, side: int | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """As ``read_photo``, but a JPEG whose longer side is at least twice ``side`` is decoded at a half, a quarter
    or an eighth, no smaller than ``side``; in a fraction of the time and memory. Also gives (height, width) of
    the whole photograph. ``side`` None decodes it whole."""
    if isinstance(photo, Image.Image):
        return _decode(photo, side)
    if isinstance(photo, bytes):
        if not photo:
            raise UnreadableImage("empty file (0 bytes)")
        return _open_and_decode(io.BytesIO(photo), photo[:4], True, side)
    path = Path(photo)
    is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("a folder, not a file", is_image=False)
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for ever.
            raise UnreadableImage("not a regular file", is_image=False)
        if status.st_size == 0:
            raise UnreadableImage("empty file (0 bytes)", is_image=is_image)
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            return _open_and_decode(file, start, is_image, side)
    except FileNotFoundError:
        reason = "link to a file that does not exist" if path.is_symlink() else "no such file"
        raise UnreadableImage(reason) from None
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from error


def _open_and_decode(
    file: Any, start: bytes, is_image: bool, side: int | None
) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        with Image.open(file, formats=_formats()) as image:
            return _decode(image, side)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        if start in (b"II*\0", b"MM\0*"):
            file.seek(0)
            pixels = _deep_tiff(file.read())
            if pixels is not None:
                return pixels, pixels.shape[:2]
        known = "damaged: not a readable image despite its name" if is_image else "no known image format"
        raise UnreadableImage(known, is_image) from None
    except Exception as error:
        # Decoders meet arbitrary bytes and raise nearly anything; one bad file must not end a job of a
        # million.
        raise UnreadableImage(_decoder_reason(error)) from error


def _deep_tiff(data: bytes) -> np.ndarray | None:
    """16-bit colour TIFF, which Pillow does not read and OpenCV does; None for what neither reads. Raises
    UnreadableImage for one too large."""
    width, height = _tiff_size(data)
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62)  # as Pillow's own, before anything is allocated
    if width * height > limit:
        raise UnreadableImage(
            f"too many pixels (decompression bomb): {width} x {height}, the limit is {limit} pixels"
        )
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if width else None
    except (cv2.error, MemoryError):
        return None
    return None if decoded is None else cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Width and height by the first directory of a TIFF file (TIFF 6.0, section 2); 0, 0 where they cannot be
    read."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], order)

    start = number(4, 4)
    found = {}
    for at in range(start + 2, min(start + 2 + 12 * number(start, 2), len(data) - 11), 12):
        # A short or a long lies in the last four bytes of its entry.
        found[number(at, 2)] = number(at + 8, 2 if number(at + 2, 2) == 3 else 4)
    width, height = found.get(256, 0), found.get(257, 0)
    return (width, height) if width and height else (0, 0)


def _decoder_reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels (decompression bomb): {error}"
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    message = str(error) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in message.lower():
        return f"truncated: {message}"
    return f"damaged: {message}"


def _decode(image: Image.Image, side: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        width, height = image.size
        if side is not None and image.format in ("JPEG", "MPO"):
            reduce = next((by for by in (8, 4, 2) if max(width, height) // by >= side), 1)
            if reduce > 1:
                image.draft(None, (width // reduce, height // reduce))
        image.load()
        pixels = _to_rgb(image)
        orientation = _orientation(image)
        turned = _upright(pixels, orientation)
    except UnreadableImage:
        raise
    except Exception as error:  # as above: decoders raise nearly anything
        raise UnreadableImage(_decoder_reason(error)) from error
    if 0 in turned.shape:
        raise UnreadableImage(f"image without pixels: {turned.shape[1]} x {turned.shape[0]}")
    if orientation >= 5:
        width, height = height, width
    return np.require(turned, requirements=["C", "W"]), (height, width)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(np.asarray(image))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, layers).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _grey_to_rgb(values: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits: 16-bit integers, or floats in 0..1 or 0..255."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise UnreadableImage("damaged: pixels that are not finite numbers")
        scaled = values * 255.0 if values.max() <= 1.0 else values
    elif values.max() > 255 or values.dtype.itemsize == 2:
        if values.max() > 65535:
            raise UnreadableImage("integers of more than 16 bits a pixel are not supported")
        scaled = values / 257.0
    else:
        scaled = values
    grey = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the eight EXIF orientations (1: as stored, 3: half turn, 6: quarter turn clockwise, ...)."""
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.rot90(pixels, turns) if turns else pixels


@dataclass
class AlignSummary:
    """What came of a folder. ``files`` = aligned + fallback + no_face + unreadable + not_an_image + no_identity;
    ``photographs`` are the first four. ``fallback`` counts photographs that gave their middle as no face was
    found, ``faces`` crops, ``reused`` the files that an earlier, interrupted run had done; ``seconds`` and
    ``images_per_second`` are of this run."""

    out: str
    report: str
    files: int
    photographs: int
    aligned: int
    fallback: int
    faces: int
    no_face: int
    unreadable: int
    not_an_image: int
    no_identity: int
    identities: int
    shards: int
    reused: int
    seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.faces} faces of {self.identities} identities in {self.out}"]
        lines.append(f"  {self.aligned} of {self.photographs} photographs aligned")
        names = {
            FALLBACK: "without a face, given by their middle",
            NO_FACE: "without a face",
            UNREADABLE: "unreadable",
            NOT_AN_IMAGE: "files that are no images",
            NO_IDENTITY: "outside of an identity folder",
        }
        lines += [f"  {getattr(self, key)} {text}" for key, text in names.items() if getattr(self, key)]
        lines.append(f"  every file with its reason: {self.report}")
        fresh = self.files - self.reused
        if fresh:
            lines.append(f"  {self.seconds:.1f} s, {self.images_per_second:.1f} images/s")
        if self.reused:
            lines.append(f"  {self.reused} files were done by an earlier run")
        return "\n".join(lines)


def align_folder(
    src: str | Path,
    out: str | Path,
    *,
    image_size: int = 112,
    face_rule: str = "largest-central",
    workers: int | None = None,
    detector_model: str | Path | None = None,
    min_score: float | None = None,
    min_face_size: int | None = None,
    fallback: str = "skip",
    image_format: str = "jpeg",
    quality: int = 95,
    shard_size: int = 8192,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    show_progress: bool = True,
) -> AlignSummary:
    """Align a folder of identity folders of photographs into packed data.

    Killed at any moment, the same call goes on and ends with the same bytes; finished, it returns at once.

    Args:
        src: one folder an identity, photographs in it at any depth (the identity is the first-level folder); what lies
            directly in ``src`` is listed as outside of an identity.
        out: gets ``shard-*.arrow``, ``index.json`` and ``report.csv`` (columns source, status, reason, faces: one row a
            file).
        image_size: side of the crops.
        face_rule: "largest-central", "largest" or "all" (every face of a photograph then counts as its identity).
        workers: processes, one thread each; None is one a core, 1 works in this process.
        detector_model, min_score, min_face_size: see :func:`lrface.align.detect.load_detector`.
        fallback: what a photograph without a face gives: "skip", nothing, or "center", its largest centred square (with
            score 0, box and landmarks of the square as ``central_landmarks`` gives them, and the status "fallback" in
            the report).
        image_format: "jpeg" (with ``quality`` 1 to 100) or "png".
        shard_size: photographs a shard, about.
        device: where the detector runs.
        engine: "local", or "ray": workers are actors of the Ray cluster at ``address`` (None: a cluster of this
            machine's own, for the run); src and out must then lie where every machine sees them. Neither changes what
            is written.

    Raises:
        UsageError: wrong arguments (also: ``out`` holds something else, or was begun with other settings or other
            photographs).
        LrfaceError: the job cannot go on (disk full, a worker killed, no face in any photograph).
        KeyboardInterrupt: after workers have been stopped.
    """
    started = time.monotonic()
    src, out = Path(src), Path(out)
    settings: dict[str, Any] = {
        "image_size": image_size,
        "face_rule": face_rule,
        "fallback": fallback,
        "image_format": image_format,
        "quality": quality if image_format == "jpeg" else None,
        "shard_size": shard_size,
        **describe_detector(detector_model, min_face_size, min_score),
    }
    _check_arguments(src, out, settings)
    crew = _Crew(src, settings, detector_model, device, workers, engine, address)
    files = _list_files(src)
    if not files:
        raise UsageError(f"{src}: no files found; expected {src}/IDENTITY/PHOTOGRAPH.jpg")
    if all(not file.identity for file in files) and any(_looks_like_image(file.path) for file in files):
        raise UsageError(
            f"{src}: photographs lie directly in it, so nobody knows who is who; move them into one folder a "
            f"person: {src}/PERSON/{Path(files[0].path).name}"
        )
    job = {"settings": settings, "files": len(files), "files_sha256": _digest(files)}

    if (out / INDEX_NAME).exists():
        index = read_index(out)
        _check_same_job(index.get("align"), job, out)
        shutil.rmtree(out / _UNFINISHED, ignore_errors=True)
        return _summary(out, index, started, reused=len(files))

    work = out / _UNFINISHED
    _prepare_out(out, work)
    with _locked(work):
        _remove_strays(out, work)
        settings_file = work / "job.json"
        if settings_file.exists():
            _check_same_job(read_json(settings_file, "settings of the interrupted run"), job, out)
        else:
            write_json(settings_file, job)
        parts = _cut(files)
        plan_file = work / "plan.json"
        reused = len(files)
        if not plan_file.exists():
            missing = [number for number in range(len(parts)) if not _part_is_whole(_part_path(work, number))]
            reused = len(files) - sum(len(parts[number]) for number in missing)
            if missing:
                _run_parts(crew, work, parts, missing, reused, show_progress)
            write_json(plan_file, _plan(out, work, len(parts)))
        index = _finish(out, work, parts, job, read_json(plan_file, "plan of the shards"))
    shutil.rmtree(work, ignore_errors=True)
    return _summary(out, index, started, reused)


def _check_arguments(src: Path, out: Path, settings: dict[str, Any]) -> None:
    if not src.is_dir():
        what = "is not a folder" if src.exists() else "does not exist"
        raise UsageError(f"{src} {what}; give a folder of identity folders of photographs")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the packed faces")
    if out.resolve() == src.resolve() or src.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies in {src}, where photographs are looked for; choose another folder")
    if not 16 <= settings["image_size"] <= 2048:
        raise UsageError(f"image size must be 16 to 2048 pixels, found {settings['image_size']}")
    if settings["face_rule"] not in FACE_RULES:
        raise UsageError(f"unknown face rule {settings['face_rule']!r}; there are {', '.join(FACE_RULES)}")
    if settings["image_format"] not in ("jpeg", "png"):
        raise UsageError(f"image format must be jpeg or png, found {settings['image_format']!r}")
    if settings["quality"] is not None and not 1 <= settings["quality"] <= 100:
        raise UsageError(f"quality must be 1 to 100, found {settings['quality']}")
    if settings["fallback"] not in FALLBACKS:
        raise UsageError(f"unknown fallback {settings['fallback']!r}; there are {', '.join(FALLBACKS)}")
    if settings["shard_size"] < 1:
        raise UsageError(f"shard_size must be at least 1, found {settings['shard_size']}")


class _Crew:
    """Who does the work, and with what; checked when it is made. ``detector`` is one for this process."""

    def __init__(
        self,
        src: Path,
        settings: dict[str, Any],
        detector_model: str | Path | None,
        device: str,
        workers: int | None,
        engine: str,
        address: str | None,
    ):
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise UsageError(f"unknown device {device!r}; use cpu or cuda") from error
        if engine not in ENGINES:
            raise UsageError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
        if address is not None and engine != "ray":
            raise UsageError("address is that of a Ray cluster: give engine ray with it")
        if kind == "cuda" and engine == "local" and not torch.cuda.is_available():
            raise UsageError("device cuda: no CUDA device is available here; use device cpu")
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, found {workers}")
        if workers is None and engine == "local":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            # Processes on one GPU each hold a context of their own.
            workers = cores if kind == "cpu" else min(cores, 4)
        self.src, self.settings, self.device, self.workers = src, settings, device, workers
        self.engine, self.address = engine, address
        self._detector_settings = {
            "model": detector_model,
            "min_score": settings["min_score"],
            "min_face_size": settings["min_face_size"],
        }
        with _one_thread():
            # Here, so that what is wrong with it is said at once; and forked workers have everything loaded.
            place = device if engine == "local" else "cpu"
            self.detector: FaceDetector | None = load_detector(device=place, **self._detector_settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "detector": None}  # other processes make their own

    def aligner(self) -> "_Aligner":
        """A worker for this process."""
        if self.detector is None:
            self.detector = load_detector(device=self.device, **self._detector_settings)
        return _Aligner(self.src, self.settings, self.detector)

    def ray_worker(self) -> "Callable[[_Task], Counter[str]]":
        """A worker for an actor of Ray, in its process. Raises LrfaceError where it cannot work."""
        _settle()
        if not self.src.is_dir():
            raise LrfaceError(
                f"{self.src} is not there on {platform.node()}: SRC and OUT must lie where every machine of the "
                "cluster sees them"
            )
        aligner = self.aligner()
        return lambda task: aligner.part(task[1], task[2])


class _File(NamedTuple):
    """One entry of the source: path relative to it, identity ("" outside of one), size, and why it is
    passed over."""

    path: str
    identity: str
    size: int
    skip: str


def _list_files(src: Path) -> list[_File]:
    """Every file below ``src``, sorted; links to folders are followed, but not in circles."""
    found: list[_File] = []

    def visit(folder: str, relative: str, identity: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise LrfaceError(f"{folder}: cannot be listed: {error.strerror or error}") from error
            found.append(_File(relative, identity, 0, f"{_NOT_LISTED}: {error.strerror or error}"))
            return
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            try:
                status = entry.stat()
            except OSError:
                # A broken link or one in a circle: reading it will say so.
                found.append(_File(path, identity, 0, ""))
                continue
            if not stat.S_ISDIR(status.st_mode):
                found.append(_File(path, identity, status.st_size, ""))
                continue
            key = (status.st_dev, status.st_ino)
            if entry.name.startswith("."):
                found.append(_File(path, identity, 0, "hidden folder, not searched"))
            elif key in above:
                found.append(_File(path, identity, 0, "link to a folder above it, not searched"))
            else:
                if _looks_like_image(entry.name):
                    found.append(_File(path, identity, 0, "a folder, not a file (its content is searched)"))
                visit(entry.path, path, identity or entry.name, above | {key})

    status = src.stat()
    visit(str(src), "", "", frozenset({(status.st_dev, status.st_ino)}))
    return found


def _looks_like_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _digest(files: Sequence[_File]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{_text(file.path)}\0{file.size}\n".encode())
    return digest.hexdigest()


def _text(name: str) -> str:
    """A file name as valid Unicode: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _check_same_job(before: Any, job: dict[str, Any], out: Path) -> None:
    if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
        raise UsageError(f"{out}: holds packed data that `lrface align` did not make; choose another folder")
    remedy = f"Use the same settings to go on, or another folder, or delete {out} to start again."
    for name, value in job["settings"].items():
        if before["settings"].get(name) != value:
            raise UsageError(
                f"{out} was begun with {name} {before['settings'].get(name)!r}, now it is {value!r}. {remedy}"
            )
    if (before.get("files"), before.get("files_sha256")) != (job["files"], job["files_sha256"]):
        raise UsageError(
            f"{out} was begun with other photographs: {before.get('files')} files then, {job['files']} now, "
            "and names or sizes differ. Align into another folder, or delete "
            f"{out} to start again."
        )


def _prepare_out(out: Path, work: Path) -> None:
    if out.exists() and not work.exists():
        foreign = sorted(entry.name for entry in out.iterdir() if not _is_stray(entry.name))
        if foreign:
            raise UsageError(
                f"{out} is not empty and not from `lrface align` (it holds {foreign[0]}); "
                "choose an empty folder"
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrfaceError(f"{work}: cannot be made: {error.strerror or error}") from error


def _is_stray(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _remove_strays(*folders: Path) -> None:
    for folder in folders:
        for entry in folder.iterdir():
            if _is_stray(entry.name):
                entry.unlink(missing_ok=True)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Two runs on one folder would undo each other's work."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    global _lock_descriptor
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LrfaceError(f"{work.parent}: another run is working on it; wait for it or stop it") from None
    except OSError:
        pass  # a file system without locks: go on without
    _lock_descriptor = descriptor
    try:
        yield
    finally:
        _lock_descriptor = None
        os.close(descriptor)


_lock_descriptor: int | None = None

# Number of a part, its files, and where its faces go.
_Task = tuple[int, Sequence[_File], Path]


def _cut(files: Sequence[_File]) -> list[Sequence[_File]]:
    """Parts of equal length; which length depends on the number of files only."""
    length = min(512, max(16, len(files) // 64))
    return [files[start : start + length] for start in range(0, len(files), length)]


def _part_path(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.arrow"


def _open_part(path: Path) -> tuple[pa.Table, list[list[Any]]]:
    """The faces of a part and its rows of the report: [source, status, reason, faces]."""
    with pa.memory_map(str(path), "r") as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    return table, json.loads(table.schema.metadata[_REPORT_KEY])


def _part_is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        _open_part(path)
    except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError):
        path.unlink()  # damaged from outside: made again
        return False
    return True


class _Photo(NamedTuple):
    """A photograph or a reduced copy of it, uint8 [h, w, 3], and (height, width) of the whole."""

    pixels: np.ndarray
    shape: tuple[int, int]

    @property
    def is_reduced(self) -> bool:
        return self.pixels.shape[:2] != self.shape

    def in_whole(self, face: Detection) -> Detection:
        """A face in pixels of the whole photograph."""
        if not self.is_reduced:
            return face
        factor = np.array(
            [self.shape[1] / self.pixels.shape[1], self.shape[0] / self.pixels.shape[0]], np.float32
        )
        # Pixel centres: 0 of the copy lies at (factor - 1) / 2 of the whole.
        return Detection(face.box * np.tile(factor, 2), face.score, (face.landmarks + 0.5) * factor - 0.5)


class _Aligner:
    """What one worker does: files in, faces and report rows out."""

    def __init__(self, src: Path, settings: dict[str, Any], detector: FaceDetector):
        self._src = src
        self._settings = settings
        self._detector = detector
        if settings["image_format"] == "png":
            self._suffix, self._options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 6]
        else:
            # Full colour resolution: at this size, halved chroma is visible.
            sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
            self._suffix, self._options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, settings["quality"], *sampling]

    def part(self, files: Sequence[_File], path: Path) -> Counter[str]:
        """Align ``files`` into the part file ``path``; returns how many ended in which status."""
        records: list[dict[str, Any]] = []
        report: list[list[Any]] = []
        waiting: list[tuple[int, _File, _Photo]] = []
        for file in files:
            status, reason, photo = self._read(file)
            report.append([_text(file.path), status, reason, 0])
            if photo is None:
                continue
            waiting.append((len(report) - 1, file, photo))
            pixels = sum(each.pixels.shape[0] * each.pixels.shape[1] for _, _, each in waiting)
            if len(waiting) == _BATCH_PHOTOGRAPHS or pixels >= _BATCH_PIXELS:
                self._align(waiting, report, records)
                waiting = []
                del photo
        self._align(waiting, report, records)
        metadata = {_REPORT_KEY.decode(): json.dumps(report)}
        write_table(path, table_from_records(records, metadata))
        return Counter(status for _, status, _, _ in report)

    def _read(self, file: _File) -> "tuple[str, str, _Photo | None]":
        if file.skip:
            return (UNREADABLE if file.skip.startswith(_NOT_LISTED) else NOT_AN_IMAGE), file.skip, None
        try:
            photo = _Photo(*read_reduced(self._src / file.path, MAX_SIDE))
        except UnreadableImage as error:
            return (UNREADABLE if error.is_image else NOT_AN_IMAGE), error.reason, None
        if not file.identity:
            return NO_IDENTITY, "lies directly in the source, not in an identity folder", None
        return ALIGNED, "", photo

    def _align(
        self,
        photos: Sequence[tuple[int, _File, _Photo]],
        report: list[list[Any]],
        records: list[dict[str, Any]],
    ) -> None:
        found = self._detector.detect([photo.pixels for _, _, photo in photos])
        for (row, file, photo), detections in zip(photos, found, strict=True):
            faces = choose_faces(detections, photo.pixels.shape, self._settings["face_rule"])
            try:
                crops = self._crops(file, photo, faces)
            except UnreadableImage as error:
                report[row][1:3] = [UNREADABLE, error.reason]
                continue
            for number, (face, crop) in enumerate(crops):
                if isinstance(crop, str):
                    report[row][2] = f"a face cannot be aligned: {crop}"
                    continue
                records.append(self._record(file, number, face, crop))
                report[row][3] += 1
            if report[row][3] == 0 and self._settings["fallback"] == "center":
                records.append(self._record(file, 0, *self._middle(file, photo)))
                report[row][1:] = [FALLBACK, f"{report[row][2] or 'no face found'}; the middle was taken", 1]
            elif report[row][3] == 0:
                report[row][1:3] = [NO_FACE, report[row][2] or "no face found"]

    def _crops(
        self, file: _File, photo: _Photo, faces: Sequence[Detection]
    ) -> list[tuple[Detection, np.ndarray | str]]:
        """Every face in pixels of the whole photograph, with its crop or why there is none."""
        size = self._settings["image_size"]
        crops: list[tuple[Detection, np.ndarray | str]] = []
        whole: np.ndarray | None = None
        for reduced in faces:
            face = photo.in_whole(reduced)
            try:
                pixels, landmarks = photo.pixels, reduced.landmarks
                # A face that the reduced copy shows with fewer pixels than the crop has is cut from the whole.
                if photo.is_reduced and effective_resolution(landmarks, size) < size:
                    whole = read_photo(self._src / file.path) if whole is None else whole
                    pixels, landmarks = whole, face.landmarks
                crops.append((face, warp_face(pixels, landmarks, size)))
            except ValueError as error:
                crops.append((face, str(error)))
        return crops

    def _middle(self, file: _File, photo: _Photo) -> tuple[Detection, np.ndarray]:
        """The largest centred square of a photograph as if it were a face of score 0."""
        landmarks = central_face(*photo.pixels.shape[:2]).landmarks
        return central_face(*photo.shape), warp_face(photo.pixels, landmarks, self._settings["image_size"])

    def _record(self, file: _File, number: int, face: Detection, crop: np.ndarray) -> dict[str, Any]:
        done, encoded = cv2.imencode(self._suffix, cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), self._options)
        if not done:
            raise LrfaceError(f"{file.path}: the crop could not be encoded as {self._suffix}")
        return {
            "image": encoded.tobytes(),
            "label": 0,  # known once every part is there
            "identity": _text(file.identity),
            "source": _text(file.path),
            "face": number,
            "landmarks": face.landmarks,
            "box": face.box,
            "score": face.score,
        }


def _run_parts(
    crew: _Crew,
    work: Path,
    parts: Sequence[Sequence[_File]],
    missing: Sequence[int],
    done: int,
    show_progress: bool,
) -> None:
    total = sum(len(part) for part in parts)
    counts: Counter[str] = Counter()
    tasks = [(number, parts[number], _part_path(work, number)) for number in missing]
    with progress(total, "align", initial=done, enabled=show_progress) as bar:
        for number, part_counts in _finished_parts(crew, tasks):
            counts.update(part_counts)
            shown = {
                "faces": counts[ALIGNED],
                "no face": counts[NO_FACE] + counts[FALLBACK],
                "unreadable": counts[UNREADABLE],
            }
            bar.advance(len(parts[number]), **shown)


def _finished_parts(crew: _Crew, tasks: Sequence[_Task]) -> Iterator[tuple[int, Counter[str]]]:
    """Do every part; yields (number, counts) as they finish."""
    if crew.engine == "ray":
        from lrface.cluster import on_ray

        crew.src = crew.src.resolve()
        resolved = [(number, files, path.resolve()) for number, files, path in tasks]
        gpus = 1 if torch.device(crew.device).type == "cuda" else 0
        for at, part_counts in on_ray(crew.ray_worker, resolved, crew.workers, crew.address, gpus):
            yield tasks[at][0], part_counts
        return
    assert crew.workers is not None
    workers = min(crew.workers, len(tasks))
    if workers > 1:
        yield from _in_processes(crew, tasks, workers)
        return
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        aligner = crew.aligner()
        for number, files, path in tasks:
            yield number, aligner.part(files, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread in torch and OpenCV: rounding, and so the bytes written, then do not depend on the
    machine's load or cores; and nothing is running when processes are forked."""
    torch_threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv_threads)


def _in_processes(crew: _Crew, tasks: Sequence[_Task], workers: int) -> Iterator[tuple[int, Counter[str]]]:
    """Give tasks to worker processes, one at a time each; yields (number, counts) as they finish.

    Workers are always gone when this ends, whatever ends it.
    """
    processes: dict[Connection, Any] = {}
    queue = iter(tasks)

    def give(connection: Connection) -> None:
        try:
            connection.send(next(queue, None))
        except ConnectionError:
            pass  # the worker has died, which reading from it will tell

    try:
        with _one_thread():
            # Forked workers have everything loaded at once. A CUDA context does not survive a fork.
            cpu = torch.device(crew.device).type == "cpu"
            fork = "fork" in multiprocessing.get_all_start_methods() and cpu
            context: Any = multiprocessing.get_context("fork" if fork else "spawn")
            for _ in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_worker, args=(there, crew), daemon=True)
                process.start()
                there.close()
                processes[here] = process
        for connection in processes:
            give(connection)
        active = set(processes)
        while active:
            for ready in wait(list(active)):
                assert isinstance(ready, Connection)
                try:
                    answer = ready.recv()
                except (EOFError, ConnectionError):
                    process = processes[ready]
                    process.join(5)
                    raise LrfaceError(_how_it_died(process.exitcode, workers)) from None
                if isinstance(answer, LrfaceError):
                    raise answer
                if answer is None:
                    active.discard(ready)
                    continue
                give(ready)
                yield answer
    finally:
        for connection, process in processes.items():
            connection.close()
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _settle() -> None:
    """Make this process, which is a worker's own, fit for the work."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than GNU's
        return
    # Large blocks stay with the process when they are freed. By default they go back to the system at once, and
    # the page faults of taking new ones are a quarter of the time that a photograph takes.
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def _how_it_died(exit_code: int | None, workers: int) -> str:
    kept = "Finished parts are kept; run the same command again"
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = " (usually: the machine ran out of memory)" if -exit_code == signal.SIGKILL else ""
        fewer = f" with fewer workers than {workers}" if workers > 1 else ""
        return f"a worker process was stopped by {name}{memory}. {kept}{fewer}."
    return f"a worker process ended with exit code {exit_code}; its message is above. {kept}."


def _worker(connection: Connection, crew: _Crew) -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _lock_descriptor is not None:
        os.close(_lock_descriptor)  # inherited: the lock must end with the parent
    _settle()
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        aligner = crew.aligner()
        while connection in wait([connection, parent.sentinel]):
            task = connection.recv()
            if task is None:
                connection.send(None)
                return
            number, files, path = task
            connection.send((number, aligner.part(files, path)))
    except (EOFError, ConnectionError):
        return  # the parent has gone
    except LrfaceError as error:
        if parent.is_alive():
            connection.send(error)


def _plan(out: Path, work: Path, parts: int) -> dict[str, Any]:
    """Write the report, and decide labels and the rows of every part."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["source", "status", "reason", "faces"])
    identities: set[str] = set()
    counts: Counter[str] = Counter()
    rows = []
    for number in range(parts):
        table, report = _open_part(_part_path(work, number))
        writer.writerows(report)
        counts.update(status for _, status, _, _ in report)
        identities.update(table.column("identity").to_pylist())
        rows.append(table.num_rows)
    write_text(out / REPORT_NAME, lines.getvalue())
    return {
        "identities": sorted(identities),
        "rows": rows,
        "counts": {status: counts[status] for status in STATUSES},
    }


def _finish(
    out: Path, work: Path, parts: Sequence[Sequence[_File]], job: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """Join parts into shards with their labels, then write the index; returns it."""
    settings = job["settings"]
    if not plan["identities"]:
        counts = ", ".join(f"{number} {status}" for status, number in plan["counts"].items() if number)
        raise LrfaceError(
            f"no face was found in any of {job['files']} files ({counts}); "
            f"{out / REPORT_NAME} gives the reason for each"
        )
    label_of = {identity: label for label, identity in enumerate(plan["identities"])}
    together = max(1, settings["shard_size"] // len(parts[0]))
    shards: list[dict[str, Any]] = []
    for start in range(0, len(parts), together):
        numbers = range(start, min(start + together, len(parts)))
        if not any(plan["rows"][number] for number in numbers):
            continue
        path = out / shard_name(len(shards))
        if path.exists():
            shards.append(_shard_entry(path, sum(plan["rows"][number] for number in numbers)))
        else:
            shards.append(_write_joined(path, [_part_path(work, number) for number in numbers], label_of))
        for number in numbers:
            _part_path(work, number).unlink(missing_ok=True)
    size = settings["image_size"]
    extra = {"align": {**job, "counts": plan["counts"], "report": REPORT_NAME}}
    write_index(out, image_size=(size, size), identities=plan["identities"], shards=shards, extra=extra)
    return read_index(out)


def _write_joined(path: Path, parts: Sequence[Path], label_of: dict[str, int]) -> dict[str, Any]:
    try:
        tables = [_open_part(part)[0].replace_schema_metadata(None) for part in parts]
    except (OSError, pa.ArrowInvalid) as error:
        raise LrfaceError(
            f"{path.parent}: an unfinished part is missing or damaged ({error}); delete "
            f"{path.parent} and start again"
        ) from error
    table = pa.concat_tables(tables)
    labels = pa.array([label_of[name] for name in table.column("identity").to_pylist()], pa.int64())
    table = table.set_column(SCHEMA.get_field_index("label"), SCHEMA.field("label"), labels)
    return write_table(path, table)


def _shard_entry(path: Path, rows: int) -> dict[str, Any]:
    """The index entry of a shard that an interrupted run had already written."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest}


def _summary(out: Path, index: dict[str, Any], started: float, reused: int) -> AlignSummary:
    counts = index["align"]["counts"]
    files = index["align"]["files"]
    seconds = time.monotonic() - started
    return AlignSummary(
        out=str(out),
        report=str(out / REPORT_NAME),
        files=files,
        photographs=sum(counts[status] for status in (ALIGNED, FALLBACK, NO_FACE, UNREADABLE)),
        aligned=counts[ALIGNED],
        fallback=counts[FALLBACK],
        faces=index["images"],
        no_face=counts[NO_FACE],
        unreadable=counts[UNREADABLE],
        not_an_image=counts[NOT_AN_IMAGE],
        no_identity=counts[NO_IDENTITY],
        identities=len(index["identities"]),
        shards=len(index["shards"]),
        reused=reused,
        seconds=round(seconds, 3),
        images_per_second=round((files - reused) / seconds, 2) if files > reused else 0.0,
    )
