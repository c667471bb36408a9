"""Corrupted evaluation sets on disk, in the layouts that ImageNet-C, CIFAR-10-C and MNIST-C were published in.

What an image becomes depends on its pixels, the corruption, the severity and the seed alone: not on the batch, the
number of workers, the other images or whether the run was killed in between.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lrface
from lrface.benchmarks.corrupted import (
    corrupt_images,
    corruptions_hash,
    known_corruption,
    known_severity,
)
from lrface.benchmarks.image_sets import (
    DESCRIPTION,
    ImageSet,
    batches,
    check_labels,
    load_array,
    open_images,
    prepare,
    store_lossy,
)
from lrface.benchmarks.report import left_out
from lrface.benchmarks.robustness import BENCHMARKS, Kind
from lrface.data.decode import BrokenImage
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, explain, locked, read_json, write_json
from lrface.progress import progress
from lrface.registry import nearest

SET_NAMES = {
    "imagenet-c": "imagenet_c",
    "cifar-c": "cifar10_c",
    "tiny-imagenet-c": "tiny_imagenet_c",
    "mnist-c": "mnist_c",
    "face": "face_c",
}
"""What ``--set`` takes, and the benchmark it is."""

_JOB = ".job.json"
_ASIDE = ".aside"


@dataclass(frozen=True)
class CorruptSummary:
    """What was written.

    Attributes:
        out: the folder.
        set: as ``--set`` names it.
        images: clean images that were corrupted.
        corruptions, severities: what they were made into.
        written: corrupted images written by this call; existing: those an earlier one had written.
        broken: (name, reason) of every image that could not be read or has a wrong size.
    """

    out: str
    set: str
    images: int
    corruptions: list[str]
    severities: list[int]
    written: int
    existing: int
    broken: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.images} images, {len(self.corruptions)} corruptions at severities "
            f"{', '.join(map(str, self.severities))}: {self.written} written"
            + (f", {self.existing} were there" if self.existing else "")
        ]
        return "\n".join([*lines, *left_out(self.broken, DESCRIPTION, "images ")])


def named_set(name: str) -> Kind:
    """The benchmark that ``--set`` names. Raises UsageError for another name."""
    if name not in SET_NAMES:
        raise UsageError(
            f"--set: unknown set {name!r}{nearest(name, SET_NAMES)}; there are {', '.join(SET_NAMES)}"
        )
    return BENCHMARKS[SET_NAMES[name]]


def chosen_corruptions(kind: Kind, names: Sequence[str], held_out: bool) -> list[str]:
    """The corruptions that are meant: those named, or all that count, with ``held_out`` the further ones too.

    Raises:
        UsageError: an unknown name, or held-out ones of a set that has none.
    """
    if held_out and not kind.held_out:
        raise UsageError(f"--held-out: {kind.title} has no held-out corruptions")
    if not names:
        return [*kind.names, *(kind.held_out if held_out else ())]
    known = (*kind.names, *kind.held_out)
    found = [known_corruption(name, known, f"--corruptions, {kind.title}") for name in names]
    return list(dict.fromkeys([*found, *(kind.held_out if held_out else ())]))


def chosen_severities(kind: Kind, severities: Sequence[int]) -> list[int]:
    """The severities that are meant, all without any named. Raises UsageError for another than 1 to 5, or for MNIST-C,
    whose corruptions have one severity each."""
    if not severities:
        return list(kind.severities)
    found = [known_severity(severity, "--severities") for severity in severities]
    if kind.name == "mnist_c":
        raise UsageError("--severities: each corruption of MNIST-C has one severity; leave the option out")
    return sorted(set(found))


def corrupt_set(
    source: str | Path,
    out: str | Path,
    set: str,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    *,
    held_out: bool = False,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int | None = None,
    show_progress: bool = True,
) -> CorruptSummary:
    """Write a corrupted evaluation set.

    - imagenet-c, tiny-imagenet-c: CORRUPTION/SEVERITY/CLASS/IMAGE.JPEG (quality 85), ImageNet's 224 pixels from the
      middle of the image with its shorter side at 256, as published;
    - face: the same with lossless PNG files, at the size of the faces;
    - cifar-c: CORRUPTION.npy uint8 [severities x n, 32, 32, 3], weakest severity first, and labels.npy;
    - mnist-c: CORRUPTION/{train,test}_{images,labels}.npy uint8 [n, 28, 28, 1], and identity/ with the clean images.

    OUT also gets ``corruptions.json``: what was done, and the images left out. A run that was killed goes on when the
    same call is made again; the result has the same bytes.

    Args:
        source: what :func:`lrface.benchmarks.image_sets.open_images` reads; for mnist-c also a folder with
            train_images.npy and test_images.npy.
        out: a folder that is not there, empty, or left by the same call.
        set: see :data:`SET_NAMES`.
        corruptions, severities: some of them; all without.
        held_out: with the four held-out corruptions.
        seed: another one gives another draw of the random corruptions.
        device: where images are corrupted.
        workers: threads that read and write; None for one a core.

    Raises:
        UsageError: unknown names, or OUT holds something else.
        LrfaceError: SRC cannot be read or has no usable image, or OUT cannot be written.
    """
    kind = named_set(set)
    names = chosen_corruptions(kind, corruptions, held_out)
    levels = chosen_severities(kind, severities)
    if batch_size < 1:
        raise UsageError(f"--batch-size: at least 1 is needed; found {batch_size}")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    parts = _parts(Path(source), kind)
    out = Path(out)
    job = {
        "benchmark": kind.name,
        "constants": kind.set,
        "source": str(Path(source).resolve()),
        "images": {split: _fingerprint(images) for split, images in parts.items()},
        "corruptions": names,
        "severities": levels,
        "seed": seed,
        "code": corruptions_hash(),
    }
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    with locked(out):
        _claim(out, job)
        writer = _Writer(kind, out, names, levels, seed, device, batch_size, workers, show_progress)
        write = writer.arrays if kind.name in ("cifar10_c", "mnist_c") else writer.files
        count = sum(write(images, split) for split, images in parts.items())
        shutil.rmtree(out / _ASIDE, ignore_errors=True)
        if count == 0:
            reason = f"; the first: {writer.broken[0][0]}: {writer.broken[0][1]}" if writer.broken else ""
            raise LrfaceError(f"{source}: none of its images could be corrupted{reason}")
        classes = next(iter(parts.values())).classes
        write_json(
            out / DESCRIPTION,
            {
                "format": "lrface-corrupted-set",
                "lrface_version": lrface.__version__,
                **{key: value for key, value in job.items() if key != "images"},
                "images": count,
                "classes": None if classes is None else list(classes),
                "quality": kind.quality,
                "broken": writer.broken,
            },
        )
    return CorruptSummary(str(out), set, count, names, levels, writer.written, writer.existing, writer.broken)


def _parts(source: Path, kind: Kind) -> dict[str, ImageSet]:
    """The clean images by split; only MNIST-C has a training split."""
    if not source.exists():
        raise LrfaceError(f"{source}: no such file or folder")
    if kind.name == "mnist_c" and (source / "train_images.npy").is_file():
        from lrface.benchmarks.image_sets import open_array

        found: dict[str, ImageSet] = {"train": open_array(source / "train_images.npy")}
        if (source / "test_images.npy").is_file():
            found["test"] = open_array(source / "test_images.npy")
        return found
    return {"test": open_images(source)}


def _fingerprint(images: ImageSet) -> str:
    digest = hashlib.sha256(json.dumps([len(images), list(images.classes or [])]).encode())
    for name in images.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.tobytes())
    return digest.hexdigest()


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Make ``out`` the folder of this job. Raises UsageError when it is another's."""
    mark = out / _JOB
    if mark.is_file():
        kept = read_json(mark, "what this folder is being filled with")
        # Written and read once, so that both have JSON's types.
        wanted = json.loads(json.dumps(job))
        changed = [key for key in wanted if kept.get(key) != wanted[key]]
        if changed:
            key = changed[0]
            raise UsageError(
                f"{out} holds a set made with other settings: {key} was {_short(kept.get(key))}, now "
                f"{_short(wanted[key])}. Give another folder, or delete this one"
            )
    else:
        others = [entry.name for entry in out.iterdir() if entry.name != ".lock"] if out.is_dir() else []
        if others:
            raise UsageError(f"{out} is not empty (it holds {sorted(others)[0]}); give another folder")
        write_json(mark, job)
    shutil.rmtree(out / _ASIDE, ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


@dataclass
class _Writer:
    kind: Kind
    out: Path
    corruptions: list[str]
    severities: list[int]
    seed: int
    device: str
    batch_size: int
    workers: int
    show_progress: bool

    def __post_init__(self) -> None:
        self.broken: list[tuple[str, str]] = []
        self.written = self.existing = 0

    def _corrupted(self, images: NDArray[np.uint8], name: str, severity: int) -> NDArray[np.uint8]:
        strength = self.kind.strength(name, severity)
        return corrupt_images(images, name, strength, self.kind.set, self.seed, self.device)

    # One file an image.

    def files(self, images: ImageSet, split: str) -> int:
        """Write the images into CORRUPTION/SEVERITY/CLASS; returns how many clean ones there were."""
        suffix = ".png" if self.kind.quality is None else ".JPEG"
        places = _places(images, suffix)
        conditions = [(name, severity) for name in self.corruptions for severity in self.severities]
        aside = self.out / _ASIDE
        count = 0
        total = len(images) * len(conditions)
        with (
            progress(total, f"corrupt {self.kind.title}", unit="images", enabled=self.show_progress) as bar,
            ThreadPoolExecutor(max(1, self.workers)) as pool,
        ):

            def missing(index: int) -> list[tuple[str, int]]:
                return [
                    (name, severity)
                    for name, severity in conditions
                    if not (self.out / name / str(severity) / places[index]).exists()
                ]

            for start in range(0, len(images), self.batch_size):
                part = range(start, min(start + self.batch_size, len(images)))
                wanted = {index: found for index in part if (found := missing(index))}
                done = (len(part) * len(conditions)) - sum(map(len, wanted.values()))
                self.existing += done
                count += len(part) - len(wanted)
                bar.advance(done)
                for rows, pixels, failed in batches(
                    lambda index: prepare(images.read(index), self.kind),
                    list(wanted),
                    len(part),
                    self.workers,
                ):
                    self.broken += [(images.names[index], reason) for index, reason in failed]
                    bar.advance(sum(len(wanted[index]) for index, _ in failed))
                    count += len(rows)
                    aside.mkdir(exist_ok=True)
                    waiting: deque[list[Future[None]]] = deque()
                    moves: list[tuple[Path, Path]] = []
                    for name, severity in conditions:
                        # Where a run was killed, only some images lack this condition.
                        lacking = [
                            number for number, row in enumerate(rows) if (name, severity) in wanted[row]
                        ]
                        if not lacking:
                            continue
                        done_images = self._corrupted(pixels[lacking], name, severity)
                        waiting.append([])
                        for number, pixel in zip(lacking, done_images, strict=True):
                            file = aside / f"{len(moves)}"
                            moves.append((file, self.out / name / str(severity) / places[rows[number]]))
                            waiting[-1].append(pool.submit(_write_image, file, pixel, self.kind.quality))
                        while len(waiting) > 4:  # images in memory
                            _finish(waiting.popleft())
                        bar.advance(len(lacking))
                    for futures in waiting:
                        _finish(futures)
                    _settle(moves)
                    self.written += len(moves)
        return count

    # One array a corruption.

    def arrays(self, images: ImageSet, split: str) -> int:
        """Write the images into arrays; returns how many clean ones there were."""
        labels = check_labels(images)
        name_of = (
            (lambda name: f"{name}.npy")
            if self.kind.name == "cifar10_c"
            else (lambda name: f"{name}/{split}_images.npy")
        )
        kept: list[int] = []
        pixels: list[NDArray[np.uint8]] = []
        with progress(len(images), "read", unit="images", enabled=self.show_progress) as bar:
            for rows, batch, failed in batches(
                lambda index: prepare(images.read(index), self.kind),
                range(len(images)),
                self.batch_size,
                self.workers,
            ):
                self.broken += [(images.names[index], reason) for index, reason in failed]
                kept += rows
                pixels += [batch] if len(rows) else []
                bar.advance(len(rows) + len(failed))
        if not kept:
            return 0
        clean = np.concatenate(pixels)
        own_labels = labels[kept].astype(np.uint8 if labels.max() < 256 else np.int64)
        each = len(self.severities) * len(clean)
        total = len(self.corruptions) * each
        with progress(total, f"corrupt {self.kind.title}", unit="images", enabled=self.show_progress) as bar:
            for name in self.corruptions:
                file = self.out / name_of(name)
                if file.is_file() and len(load_array(file)) == each:
                    self.existing += each
                    bar.advance(each)
                    continue
                with atomic_file(file) as aside:
                    self._fill(aside, clean, name, bar.advance)
                self.written += each
        if self.kind.name == "cifar10_c":
            _save(self.out / "labels.npy", np.tile(own_labels, len(self.severities)))
            return len(clean)
        for name in (*self.corruptions, "identity"):
            _save(self.out / name / f"{split}_labels.npy", own_labels)
        _save(self.out / "identity" / f"{split}_images.npy", clean[..., None])
        return len(clean)

    def _fill(self, file: Path, clean: NDArray[np.uint8], name: str, advance: Callable[[int], None]) -> None:
        shape = clean.shape if clean.ndim == 4 else (*clean.shape, 1)
        found = np.lib.format.open_memmap(
            file, mode="w+", dtype=np.uint8, shape=(len(self.severities) * len(clean), *shape[1:])
        )
        place = 0
        for severity in self.severities:
            for start in range(0, len(clean), 1024):
                done = self._corrupted(clean[start : start + 1024], name, severity)
                found[place : place + len(done)] = done.reshape(len(done), *shape[1:])
                place += len(done)
                advance(len(done))
        found.flush()


def _save(file: Path, array: NDArray[Any]) -> None:
    with atomic_file(file) as aside, aside.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)


def _places(images: ImageSet, suffix: str) -> list[str]:
    """Where each image goes below CORRUPTION/SEVERITY: CLASS/NAME, or NAME where there are no classes."""
    taken: dict[str, int] = {}
    found = []
    for index, name in enumerate(images.names):
        folder = ""
        if images.labels is not None and images.classes is not None:
            folder = images.classes[int(images.labels[index])]
            if folder in ("", ".", "..") or "/" in folder or "\0" in folder:
                raise LrfaceError(f"{images.origin}: the class {folder!r} cannot be the name of a folder")
        inner = [part for part in Path(name).with_suffix("").parts if part not in ("/", "..")]
        if len(inner) > 1 and inner[0] == folder:
            inner = inner[1:]
        place = str(Path(folder) / ("_".join(inner) or f"{index:06d}"))
        # Two files of one name but another suffix: the second keeps it.
        if place in taken:
            place = f"{place}{Path(name).suffix.replace('.', '_')}_{index}"
        taken[place] = index
        found.append(place + suffix)
    return found


def _write_image(file: Path, image: NDArray[np.uint8], quality: int | None) -> None:
    import cv2

    if quality is not None:
        data = store_lossy(image, quality)
    else:
        done, encoded = cv2.imencode(".png", image[..., ::-1])
        if not done:
            raise LrfaceError(f"{file}: an image could not be encoded as PNG")
        data = encoded.tobytes()
    try:
        file.write_bytes(data)
    except OSError as error:
        raise explain(error, file) from error


def _finish(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _settle(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename files into place once all are on disk: one sync for thousands, as each alone would take longer than to
    make the image."""
    if not moves:
        return
    os.sync()
    made: set[Path] = set()
    try:
        for file, target in moves:
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            os.replace(file, target)
    except OSError as error:
        raise explain(error, target) from error


# --------------------------------------------------------------------------------------------------------- sheet


def draw_preview(
    source: str | Path,
    file: str | Path,
    set: str,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    *,
    held_out: bool = True,
    seed: int = 0,
) -> None:
    """One sheet, FILE.png, of the first readable image of ``source`` (an image file, or images) under all corruptions
    and severities.

    Raises:
        UsageError: unknown names, or a file that does not end in .png.
        LrfaceError: no image can be read.
    """
    from lrface.benchmarks.image_sets import decode_image
    from lrface.data.sheet import SheetRow, check_sheet_path, draw_sheet

    check_sheet_path(Path(file))
    kind = named_set(set)
    names = chosen_corruptions(kind, corruptions, held_out and bool(kind.held_out) and not corruptions)
    levels = chosen_severities(kind, severities)
    path = Path(source)
    image, name, reason = None, path.name, "it holds no image"
    if path.is_file() and path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"):
        try:
            image = prepare(decode_image(path.read_bytes()), kind)
        except BrokenImage as error:
            reason = str(error)
    else:
        images = open_images(path)
        for index in range(min(len(images), 100)):
            try:
                image, name = prepare(images.read(index), kind), images.names[index]
                break
            except (BrokenImage, LrfaceError) as error:
                reason = f"{images.names[index]}: {error}"
    if image is None:
        raise LrfaceError(f"{source}: no image for a preview: {reason}")

    def shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels

    rows = []
    for corruption in names:
        done = [
            corrupt_images(image[None], corruption, kind.strength(corruption, level), kind.set, seed)[0]
            for level in levels
        ]
        lines = [corruption.replace("_", " ")]
        lines += ["held out"] if corruption in kind.held_out else []
        rows.append(SheetRow(lines, [[shown(image)], *[[shown(pixels)] for pixels in done]]))
    columns = ["clean", *(f"severity {level}" for level in levels)]
    if kind.name == "mnist_c":
        columns = ["clean", "corrupted"]
    title = f"{kind.title}: {len(names)} corruptions"
    draw_sheet(file, title, f"{name}, {image.shape[1]}x{image.shape[0]} pixels, seed {seed}", rows, columns)
