"""A gallery of enrolled people: add images, search by photograph, remove people for good."""

import csv
import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from lrface.embed import UNCALIBRATED_THRESHOLD, FaceEmbedder, find_images
from lrface.embed.results import _card_threshold
from lrface.errors import LrfaceError, UsageError
from lrface.gallery.faces import (
    INDEXES,
    POOLINGS,
    Candidate,
    EnrolledFaces,
    Store,
    check_name,
)
from lrface.gallery.folder import FolderStore
from lrface.progress import progress as progress_bar

BACKENDS = ("folder", "milvus")

# Images enrolled by one commit, and their bytes: what a killed run has not acknowledged, and what is in memory at once.
_COMMIT_IMAGES = 64
_COMMIT_BYTES = 64_000_000


@dataclass
class Enrolment:
    """What :meth:`Gallery.add` did.

    Attributes:
        images: how many were given.
        enrolled: how many of them are new in the gallery.
        already: how many were in it for the same person.
        new_people: how many people were not there before.
        failures: ``(image, reason)`` of every other image: not readable, no face found, enrolled as somebody else.
        seconds: wall time.
    """

    images: int = 0
    enrolled: int = 0
    already: int = 0
    new_people: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def no_face(self) -> int:
        """How many of the failures are photographs without a face."""
        return sum(reason.startswith("no face found") for _, reason in self.failures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "no_face": self.no_face}

    def __str__(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        return (
            f"{self.enrolled} of {self.images} images enrolled, {self.new_people} new people, in {self.seconds:.1f} s "
            f"({rate:.0f} images/s); {self.already} were there already, {len(self.failures)} failed "
            f"({self.no_face} without a face)"
        )


@dataclass(frozen=True)
class Match:
    """One face that was looked for.

    Attributes:
        source: position of its image among the probes.
        name: who it is; None: nobody in the gallery is like it enough.
        candidates: the people most like it, best first, whoever reaches the threshold or not.
        thresholds: the cosine that each candidate has to reach, chosen by the smaller effective resolution of the probe
            and the candidate's images.
        threshold_from: "given", "card" (measured for this model) or "default" (neither: uncalibrated).
        box: left, top, right, bottom in the photograph; None for a crop.
        effective_resolution: of the probe, in pixels.
    """

    source: int
    name: str | None
    candidates: list[Candidate]
    thresholds: list[float]
    threshold_from: str
    box: tuple[float, float, float, float] | None
    effective_resolution: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values; each candidate says whether it is ``accepted``."""
        return {
            "source": self.source,
            "name": self.name,
            "box": self.box,
            "effective_resolution": self.effective_resolution,
            "threshold_from": self.threshold_from,
            "candidates": [
                {**asdict(each), "threshold": threshold, "accepted": each.similarity >= threshold}
                for each, threshold in zip(self.candidates, self.thresholds, strict=True)
            ],
        }


@dataclass(frozen=True)
class Search:
    """Faces found in the probes, in the order of the images, and ``(position, reason)`` of images that gave none."""

    matches: list[Match]
    failures: list[tuple[int, str]]


@dataclass(frozen=True)
class Removal:
    """``removed``: how many images were deleted of each person; ``absent``: names that nobody in the gallery has."""

    removed: dict[str, int]
    absent: list[str]


class Gallery:
    """Made by :meth:`create` or :meth:`open`. One process or thread writes at a time, any number search; each call sees
    everything that was acknowledged before it."""

    def __init__(self, store: Store, place: str, embedder: FaceEmbedder | None):
        self._store = store
        self._place = place
        self._embedder = embedder
        if embedder is not None:
            self._check_model(embedder)

    @classmethod
    def create(
        cls,
        place: str | Path,
        embedder: FaceEmbedder,
        *,
        pooling: str = "mean",
        flip: bool = True,
        index: str = "auto",
        backend: str = "folder",
        uri: str | None = None,
        token: str | None = None,
    ) -> "Gallery":
        """An empty gallery for the vectors of one model.

        Args:
            place: a folder that is new or empty; with backend "milvus" the name of a collection.
            pooling: how a person's images become one vector: "mean" of the unit vectors, or "norm": weighed by the
                length of the features, which is smaller for unclear faces.
            flip: embed the mirrored face too, in the gallery and in probes.
            index: "exact", "hnsw", "ivf", or "auto": exact up to a million people, ivf beyond where faiss is installed.
                Folders only; in Milvus its own index does.
            backend: "folder", or "milvus" at ``uri``: a file NAME.db (Milvus Lite), or http://HOST:19530 of a server or
                cluster with ``token`` ("user:password").

        Raises:
            UsageError: an option with a wrong value, or the place is taken.
            LrfaceError: it cannot be written.
        """
        for name, value, allowed in (("pooling", pooling, POOLINGS), ("index", index, INDEXES)):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; found {value!r}")
        header = {"model": _fingerprint(embedder), "pooling": pooling, "flip": bool(flip), "index": index}
        if _is_milvus(backend, uri, token):
            from lrface.gallery.milvus import MilvusStore

            return cls(MilvusStore.create(str(place), str(uri), token, header), str(place), embedder)
        return cls(FolderStore.create(Path(place).expanduser(), header), str(place), embedder)

    @classmethod
    def open(
        cls,
        place: str | Path,
        embedder: FaceEmbedder | None = None,
        *,
        backend: str = "folder",
        uri: str | None = None,
        token: str | None = None,
    ) -> "Gallery":
        """A gallery that is there. Without ``embedder`` it takes vectors but no images.

        Raises:
            LrfaceError: nothing there, damaged, or made with another model: its vectors mean nothing to this one.
        """
        if _is_milvus(backend, uri, token):
            from lrface.gallery.milvus import MilvusStore

            return cls(MilvusStore.open(str(place), str(uri), token), str(place), embedder)
        return cls(FolderStore(Path(place).expanduser()), str(place), embedder)

    @classmethod
    def exists(
        cls, place: str | Path, *, backend: str = "folder", uri: str | None = None, token: str | None = None
    ) -> bool:
        """Whether a gallery is at this place."""
        if _is_milvus(backend, uri, token):
            from lrface.gallery.milvus import MilvusStore

            return MilvusStore.exists(str(place), str(uri), token)
        from lrface.gallery.folder import MANIFEST

        return (Path(place).expanduser() / MANIFEST).is_file()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    @property
    def model(self) -> dict[str, Any]:
        """The model whose vectors it holds: name, sha256, embedding_size and what is said of its input."""
        return dict(self._store.header["model"])

    # ---------------------------------------------------------------------------------------------- enrolling

    def add(
        self,
        people: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        kind: str = "auto",
        batch_size: int = 64,
        workers: int | None = None,
        index: str | None = None,
        progress: bool = False,
        acknowledged: Callable[[list[str]], None] = lambda images: None,
    ) -> Enrolment:
        """Enrol images of people; more images of somebody who is there are pooled with the earlier ones.

        Args:
            people: name -> image or list of images, or pairs of a name and one image; images as
                :meth:`lrface.embed.FaceEmbedder.embed` takes them. A photograph's largest central face is enrolled.
            kind, batch_size, workers: as there.
            index: search by this from now on ("auto", "exact", "hnsw", "ivf").
            progress: draw a bar on standard error.
            acknowledged: told which images (paths, or "image N") are stored whatever happens, as soon as they are.

        The same image again, by its content, changes nothing. Images that cannot be read, show no face, or are enrolled
        as somebody else are listed and do not end the call.

        Raises:
            UsageError: a name or option that is none.
            LrfaceError: somebody else writes, or the disk is full; what was acknowledged stays.
        """
        embedder = self._needed_embedder()
        pairs = [(check_name(name), image) for name, image in _pairs(people)]
        report = Enrolment(images=len(pairs))
        started = time.monotonic()
        with self._writing(), progress_bar(len(pairs), "enrol", enabled=progress) as bar:
            self._set_index(index)
            done = 0
            for read, batch in _batches(pairs, report):
                new = self._unknown(batch, report)
                if new:
                    found = embedder.embed(
                        [image.value for image in new],
                        kind=kind,
                        flip=self._store.header["flip"],
                        batch_size=batch_size,
                        workers=workers,
                        on_error="skip",
                    )
                    report.failures += [(new[position].label, reason) for position, reason in found.failures]
                    kept = _first_of_each([new[position] for position in found.source], report)
                    rows = [new[position] for position in found.source[kept]]
                    self._commit(
                        rows,
                        found.vectors[kept],
                        found.quality[kept],
                        found.effective_resolution[kept],
                        report,
                    )
                    acknowledged([image.label for image in rows])
                bar.advance(read - done, enrolled=report.enrolled, failed=len(report.failures))
                done = read
            self._refresh_index(progress)
        report.seconds = time.monotonic() - started
        return report

    def add_vectors(
        self,
        names: Sequence[str],
        vectors: ArrayLike,
        *,
        quality: ArrayLike | None = None,
        resolution: ArrayLike | None = None,
        paths: Sequence[str] | None = None,
        index: str | None = None,
        progress: bool = False,
    ) -> Enrolment:
        """Enrol vectors that were computed elsewhere with the gallery's model (and with ``flip`` as the gallery has it).

        Args:
            names: n, whose each is.
            vectors: float [n, d], scaled to unit length here; the same vector again, bit by bit, changes nothing.
            quality: float [n], lengths of the features; 1 where nobody says.
            resolution: float [n], effective resolutions in pixels; 112 where nobody says.
            paths: where each image was; empty where nobody says.

        Raises:
            UsageError: shapes that disagree, or a vector without a direction.
        """
        units = self._units(vectors)
        count = len(units)
        columns = [
            np.full(count, default, np.float32) if given is None else np.asarray(given, np.float32)
            for given, default in ((quality, 1.0), (resolution, 112.0))
        ]
        places = [""] * count if paths is None else [_text(path) for path in paths]
        if not len(names) == len(places) == count or any(column.shape != (count,) for column in columns):
            raise UsageError(f"names, quality, resolution and paths must be {count} each, as the vectors are")
        if any(not np.isfinite(column).all() or column.min(initial=1.0) <= 0 for column in columns):
            raise UsageError("quality and resolution must be finite and above 0")
        pairs = [
            _Given(check_name(name), f"vector {i}", places[i], hashlib.sha256(row.tobytes()).digest(), i)
            for i, (name, row) in enumerate(zip(names, units, strict=True))
        ]
        report, started = Enrolment(images=count), time.monotonic()
        with self._writing(), progress_bar(count, "enrol", unit="vectors", enabled=progress) as bar:
            self._set_index(index)
            for start in range(0, count, 16384):
                new = self._unknown(pairs[start : start + 16384], report)
                new = [new[i] for i in _first_of_each(new, report)]
                at = [each.value for each in new]
                self._commit(new, units[at], columns[0][at], columns[1][at], report)
                bar.advance(len(pairs[start : start + 16384]))
            self._refresh_index(progress)
        report.seconds = time.monotonic() - started
        return report

    # ----------------------------------------------------------------------------------------------- searching

    def search(
        self,
        images: Any,
        *,
        k: int = 5,
        threshold: float | None = None,
        kind: str = "auto",
        faces: str = "largest-central",
        batch_size: int = 64,
        workers: int | None = None,
    ) -> Search:
        """Who the faces in photographs or crops are.

        Args:
            images: as :meth:`lrface.embed.FaceEmbedder.embed` takes them, one or many.
            k: candidates for each face.
            threshold: the cosine that a candidate has to reach; None: the one on the model's card measured nearest to the
                smaller effective resolution of probe and candidate, else
                :data:`lrface.embed.UNCALIBRATED_THRESHOLD`. Thresholds of `lrface calibrate` hold for one comparison:
                a stranger meets as many as there are people here.
            kind, faces, batch_size, workers: as there.

        Raises:
            UsageError: an option with a wrong value.
            LrfaceError: the gallery cannot be read.
        """
        embedder = self._needed_embedder()
        found = embedder.embed(
            images,
            kind=kind,
            faces=faces,
            flip=self._store.header["flip"],
            batch_size=batch_size,
            workers=workers,
            on_error="skip",
        )
        matches = self.search_vectors(found.vectors, found.effective_resolution, k=k, threshold=threshold)
        return Search(
            [
                Match(
                    int(source),
                    match.name,
                    match.candidates,
                    match.thresholds,
                    match.threshold_from,
                    None if np.isnan(box).any() else tuple(box.tolist()),
                    match.effective_resolution,
                )
                for source, box, match in zip(found.source, found.box, matches, strict=True)
            ],
            found.failures,
        )

    def search_vectors(
        self,
        vectors: ArrayLike,
        resolution: ArrayLike | None = None,
        *,
        k: int = 5,
        threshold: float | None = None,
    ) -> list[Match]:
        """As :meth:`search`, for vectors float [n, d] of the gallery's model and their effective resolutions float [n]
        in pixels (112 where nobody says)."""
        if not isinstance(k, int) or k < 1:
            raise UsageError(f"k must be a whole number of at least 1; found {k!r}")
        if threshold is not None and not -1 <= threshold <= 1:
            raise UsageError(f"threshold is a cosine, between -1 and 1; found {threshold}")
        units = self._units(vectors)
        pixels = np.full(len(units), 112.0) if resolution is None else np.asarray(resolution, float)
        if pixels.shape != (len(units),) or not (np.isfinite(pixels) & (pixels > 0)).all():
            raise UsageError(f"resolution must be {len(units)} numbers above 0")
        matches = []
        for position, candidates in enumerate(self._store.search(units, k)):
            pairs = [
                self._threshold(min(pixels[position], each.resolution), threshold) for each in candidates
            ]
            values = [value for value, _ in pairs]
            accepted = [
                each for each, value in zip(candidates, values, strict=True) if each.similarity >= value
            ]
            matches.append(
                Match(
                    position,
                    accepted[0].name if accepted else None,
                    candidates,
                    values,
                    pairs[0][1] if pairs else self._threshold(112.0, threshold)[1],
                    None,
                    float(pixels[position]),
                )
            )
        return matches

    def _threshold(self, pixels: float, given: float | None) -> tuple[float, str]:
        if given is not None:
            return given, "given"
        if self._embedder is not None:
            value = _card_threshold(self._embedder.card, float(pixels), self._embedder.name)
            if value is not None:
                return value, "card"
        return UNCALIBRATED_THRESHOLD, "default"

    # ---------------------------------------------------------------------------------- removing and looking

    def remove(self, names: str | Sequence[str], *, progress: bool = False) -> Removal:
        """Delete people: their vectors, names and paths. In a folder, on return no byte of them is in any of its files
        (what the file system keeps of deleted files is its own affair); a search that runs meanwhile ends with what it
        began with. An approximate index is built again without them; until it is, search is exact. For Milvus see
        :mod:`lrface.gallery.milvus`.

        Raises:
            LrfaceError: somebody else writes, or there is no room to write the others' data again.
        """
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in wanted:
            check_name(name)
        with self._writing():
            removed, absent = self._store.remove(wanted)
            self._refresh_index(progress)
        return Removal(removed, absent)

    def names(self) -> dict[str, int]:
        """Everybody in alphabetical order, and how many images each has."""
        return self._store.names()

    def info(self) -> dict[str, Any]:
        """Plain values: ``people``, ``images``, ``model``, ``pooling``, ``flip`` and what the store says of itself.

        With an embedder also ``thresholds`` by resolution as its card has them, the ``false_accept_rate`` of one
        comparison they were measured at, and ``stranger_accepted``: the share of strangers that would be taken for
        somebody at that rate by as many people as there are, if comparisons were independent."""
        header = self._store.header
        said = {
            **self._store.info(),
            "model": self.model,
            "pooling": header["pooling"],
            "flip": header["flip"],
        }
        card = self._embedder.card if self._embedder is not None else {}
        if card.get("thresholds"):
            rate = float((card.get("thresholds_measured") or {}).get("false_accept_rate") or np.nan)
            said["thresholds"] = card["thresholds"]
            if rate == rate:
                said["false_accept_rate"] = rate
                said["stranger_accepted"] = round(1 - (1 - rate) ** said["people"], 6)
        return said

    # --------------------------------------------------------------------------------------------- internals

    def _needed_embedder(self) -> FaceEmbedder:
        if self._embedder is None:
            raise UsageError("this gallery was opened without an embedder: it takes vectors, no images")
        return self._embedder

    def _check_model(self, embedder: FaceEmbedder) -> None:
        kept, given = self.model, _fingerprint(embedder)
        differs = [
            key for key in ("sha256", "input", "output", "embedding_size") if kept.get(key) != given[key]
        ]
        if differs:
            raise LrfaceError(
                f"gallery {self._place} holds vectors of the model {kept['name']} ({differs[0]} {kept.get(differs[0])}); "
                f"{embedder.name} is another ({differs[0]} {given[differs[0]]}), to which they mean nothing. Use that "
                "model, or enrol into a new gallery"
            )

    def _units(self, vectors: ArrayLike) -> NDArray[np.float32]:
        rows = np.atleast_2d(np.asarray(vectors, np.float32))
        width = self.model["embedding_size"]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UsageError(f"vectors of this gallery are [n, {width}]; found {list(rows.shape)}")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise UsageError("a vector needs a direction; found one that is zero or not finite")
        return np.ascontiguousarray(rows / lengths)

    def _writing(self) -> AbstractContextManager[None]:
        return self._store.writing() if isinstance(self._store, FolderStore) else nullcontext()

    def _set_index(self, index: str | None) -> None:
        if index is None:
            return
        if index not in INDEXES:
            raise UsageError(f"index must be one of {', '.join(INDEXES)}; found {index!r}")
        if not isinstance(self._store, FolderStore):
            raise UsageError("index is for galleries in folders; Milvus has its own")
        self._store.set_index(index)

    def _refresh_index(self, progress: bool) -> None:
        if isinstance(self._store, FolderStore):
            self._store.refresh_index(progress)

    def _unknown(self, batch: list["_Given"], report: Enrolment) -> list["_Given"]:
        """Those that are not enrolled; the others are counted."""
        whose = self._store.enrolled([image.sha256 for image in batch])
        return [image for image in batch if not _known(image, whose.get(image.sha256), report)]

    def _commit(
        self,
        rows: list["_Given"],
        vectors: NDArray[np.float32],
        quality: NDArray[np.float32],
        resolution: NDArray[np.float32],
        report: Enrolment,
    ) -> None:
        if not rows:
            return
        names = [image.name for image in rows]
        hashes, paths = [image.sha256 for image in rows], [image.path for image in rows]
        report.new_people += self._store.add(
            EnrolledFaces(names, hashes, paths, vectors, quality, resolution)
        )
        report.enrolled += len(rows)


def _first_of_each(images: Sequence["_Given"], report: Enrolment) -> list[int]:
    """Positions of images that no earlier one equals; the others are counted."""
    seen: dict[bytes, str] = {}
    kept = []
    for position, image in enumerate(images):
        if not _known(image, seen.get(image.sha256), report):
            seen[image.sha256] = image.name
            kept.append(position)
    return kept


def _known(image: "_Given", name: str | None, report: Enrolment) -> bool:
    """Whether the image is ``name``'s already; it is counted then."""
    if name is None:
        return False
    if name == image.name:
        report.already += 1
    else:
        report.failures.append((image.label, f"the same image is enrolled as {name!r}"))
    return True


# --------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Given:
    """One image that is to be enrolled: whose, what it is called in messages, its path, hash and content."""

    name: str
    label: str
    path: str
    sha256: bytes
    value: Any


def _pairs(people: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    if not isinstance(people, Mapping):
        yield from people
        return
    for name, images in people.items():
        several = isinstance(images, list | tuple)
        yield from ((name, image) for image in (images if several else [images]))


def _batches(pairs: Sequence[tuple[str, Any]], report: Enrolment) -> Iterator[tuple[int, list[_Given]]]:
    """Images read and hashed, in runs that fit into memory, and how many were tried by then; files that cannot be read go
    to the report."""
    batch: list[_Given] = []
    size = 0
    for number, (name, image) in enumerate(pairs):
        label, path = f"image {number}", ""
        if isinstance(image, str | Path):
            label = path = _text(image)
            try:
                image = Path(image).expanduser().read_bytes()
            except OSError as error:
                report.failures.append((label, error.strerror or str(error)))
                continue
        content = _content(image)
        batch.append(_Given(name, label, path, hashlib.sha256(content).digest(), image))
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


def _text(path: str | Path) -> str:
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
            found += [(_text(folder.name), image) for image in find_images([folder])]
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


def enrol(
    place: str | Path,
    sources: Sequence[str | Path],
    embedder: Callable[[], FaceEmbedder],
    *,
    name: str | None = None,
    pooling: str | None = None,
    flip: bool | None = None,
    index: str | None = None,
    kind: str = "auto",
    batch_size: int = 64,
    backend: str = "folder",
    uri: str | None = None,
    token: str | None = None,
    progress: bool = True,
) -> Enrolment:
    """`lrface gallery add`: enrol what :func:`people_in` finds in each of ``sources`` (with ``name``: all images there
    are of that person) in the gallery at ``place``, which is made when it is not there.

    ``embedder`` makes the model when everything else was found right; ``pooling`` and ``flip`` are for a new gallery.

    Raises:
        UsageError: sources without people or images, or settings that an existing gallery has otherwise.
        LrfaceError: as :meth:`Gallery.open` and :meth:`Gallery.add`.
    """
    if name is None:
        pairs = [pair for source in sources for pair in people_in(source)]
    else:
        pairs = [(check_name(name), image) for image in find_images(sources)]
    there = {"backend": backend, "uri": uri, "token": token}
    if Gallery.exists(place, **there):
        gallery = Gallery.open(place, embedder(), **there)
        for option, value in (("pooling", pooling), ("flip", flip)):
            kept = gallery._store.header[option]
            if value not in (None, kept):
                raise UsageError(
                    f"{place} was made with {option} {kept}; it cannot be {value} for some images"
                )
    else:
        gallery = Gallery.create(
            place,
            embedder(),
            pooling=pooling or POOLINGS[0],
            flip=flip is not False,
            index=index or "auto",
            **there,
        )
        index = None
    with gallery:
        return gallery.add(pairs, kind=kind, batch_size=batch_size, index=index, progress=progress)


def matches_text(found: Search, files: Sequence[str]) -> str:
    """One line for each face: image, verdict, and the candidates."""
    lines = []
    for match in found.matches:
        others = (
            ", ".join(f"{each.name} {each.similarity:.3f}" for each in match.candidates) or "nobody enrolled"
        )
        at = f"{match.thresholds[0]:.3f} ({match.threshold_from})" if match.thresholds else "none"
        lines.append(
            f"{files[match.source]}: {match.name or 'unknown'} [{others}; threshold {at} at "
            f"{match.effective_resolution:.0f} pixels]"
        )
    return "\n".join(lines)


def _fingerprint(embedder: FaceEmbedder) -> dict[str, Any]:
    """What vectors depend on that must be the same for all of a gallery."""
    card = embedder.card
    return {
        "name": embedder.name,
        "sha256": embedder.model_sha256,
        "embedding_size": embedder.embedding_size,
        "input": card.get("input"),
        "output": card.get("output"),
    }


def _is_milvus(backend: str, uri: str | None, token: str | None) -> bool:
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    if backend == "milvus" and not uri:
        raise UsageError("backend milvus needs a uri: a file NAME.db for Milvus Lite, or http://HOST:19530")
    if backend != "milvus" and (uri or token):
        raise UsageError("uri and token are for backend milvus")
    return backend == "milvus"
