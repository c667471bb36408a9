"""Images that are to be enrolled: from folders and CSV files, read and hashed."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lrface.embed import find_images
from lrface.errors import LrfaceError, UsageError
from lrface.gallery.results import Enrolment

# Images enrolled by one commit, and their bytes: what a killed run has not acknowledged, and what is in memory at once.
_COMMIT_IMAGES = 64
_COMMIT_BYTES = 64_000_000


@dataclass(frozen=True)
class Given:
    """One image that is to be enrolled: whose, what it is called in messages, its path, hash and content."""

    name: str
    label: str
    path: str
    sha256: bytes
    value: Any


def pairs_of(people: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    if not isinstance(people, Mapping):
        yield from people
        return
    for name, images in people.items():
        several = isinstance(images, list | tuple)
        yield from ((name, image) for image in (images if several else [images]))


def batches(pairs: Sequence[tuple[str, Any]], report: Enrolment) -> Iterator[tuple[int, list[Given]]]:
    """Images read and hashed, in runs that fit into memory, and how many were tried by then; files that cannot be read go
    to the report."""
    batch: list[Given] = []
    size = 0
    for number, (name, image) in enumerate(pairs):
        label, path = f"image {number}", ""
        if isinstance(image, str | Path):
            label = path = path_text(image)
            try:
                image = Path(image).expanduser().read_bytes()
            except OSError as error:
                report.failures.append((label, error.strerror or str(error)))
                continue
        content = _content(image)
        batch.append(Given(name, label, path, hashlib.sha256(content).digest(), image))
        size += len(content)
        if len(batch) >= _COMMIT_IMAGES or size >= _COMMIT_BYTES:
            yield number + 1, batch
            batch, size = [], 0
    yield len(pairs), batch


def _content(image: Any) -> bytes:
    """The bytes that say whether two images are the same."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return f"{image.dtype} {image.shape} ".encode() + np.ascontiguousarray(image).tobytes()
    raise UsageError(
        f"an image is a path, bytes, a PIL image, a numpy array or a tensor; found {type(image).__name__}"
    )


def path_text(path: str | Path) -> str:
    """A path as text that can be written: bytes that are no UTF-8 are written out, as in lrface.align."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def people_in(source: str | Path) -> list[tuple[str, Path]]:
    """Whose image each file is: a folder with one folder for each person (``NAME/...``), or a CSV file with the columns
    ``path`` (as it stands, or from the CSV file's folder) and ``name``.

    Raises:
        UsageError: neither, or a column is missing.
        LrfaceError: no image in it.
    """
    source = Path(source).expanduser()
    if source.is_file() and source.suffix.lower() == ".csv":
        return _people_in_csv(source)
    if not source.is_dir():
        what = "is no folder and no .csv file" if source.exists() else "does not exist"
        raise UsageError(f"{source} {what}; give a folder of folders, one a person, a CSV file, or a --name")
    folders = sorted(each for each in source.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not folders:
        raise UsageError(
            f"{source} holds no folder for each person; with --name NAME all images in it are of that person"
        )
    found = []
    for folder in folders:
        try:
            found += [(path_text(folder.name), image) for image in find_images([folder])]
        except LrfaceError:  # a person without images
            continue
    if not found:
        raise LrfaceError(f"no images found in the folders of {source}")
    return found


def _people_in_csv(file: Path) -> list[tuple[str, Path]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LrfaceError(f"{file} cannot be read: {error}") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in ("path", "name") if column not in (rows.fieldnames or [])]
    if missing:
        raise UsageError(
            f"{file}: column {missing[0]!r} is missing; its first line must name the columns path and name; found "
            f"{', '.join(rows.fieldnames or []) or 'nothing'}"
        )
    found = []
    try:
        for row in rows:
            if not row["path"] or not row["name"]:
                raise LrfaceError(f"{file}: line {rows.line_num} lacks a path or a name")
            path = Path(row["path"]).expanduser()
            found.append((row["name"], path if path.is_absolute() else file.parent / path))
    except csv.Error as error:
        raise LrfaceError(f"{file}: line {rows.line_num}: {error}") from error
    if not found:
        raise LrfaceError(f"{file} names no image")
    return found


def first_of_each(images: Sequence[Given], report: Enrolment) -> list[int]:
    """Positions of images that no earlier one equals; the others are counted."""
    seen: dict[bytes, str] = {}
    kept = []
    for position, image in enumerate(images):
        if not is_known(image, seen.get(image.sha256), report):
            seen[image.sha256] = image.name
            kept.append(position)
    return kept


def is_known(image: Given, name: str | None, report: Enrolment) -> bool:
    """Whether the image is ``name``'s already; it is counted then."""
    if name is None:
        return False
    if name == image.name:
        report.already += 1
    else:
        report.failures.append((image.label, f"the same image is enrolled as {name!r}"))
    return True
