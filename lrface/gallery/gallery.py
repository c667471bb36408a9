"""A gallery of enrolled people: add images, search by photograph, remove people for good."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrface.embed import UNCALIBRATED_THRESHOLD, FaceEmbedder, find_images
from lrface.embed.results import card_threshold
from lrface.errors import LrfaceError, UsageError
from lrface.gallery.faces import (
    INDEXES,
    POOLINGS,
    EnrolledFaces,
    Store,
    check_name,
)
from lrface.gallery.folder import FolderStore
from lrface.gallery.results import Enrolment, Match, Removal, Search
from lrface.gallery.sources import Given, batches, first_of_each, is_known, pairs_of, path_text, people_in
from lrface.progress import progress as progress_bar

BACKENDS = ("folder", "milvus")


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
            index: "exact", "hnsw", "ivf", or "auto": exact up to a million people, hnsw beyond where faiss is installed.
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

            return cls(MilvusStore(str(place), str(uri), token), str(place), embedder)
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
        pairs = [(check_name(name), image) for name, image in pairs_of(people)]
        report = Enrolment(images=len(pairs))
        started = time.monotonic()
        with self._writing(), progress_bar(len(pairs), "enrol", enabled=progress) as bar:
            self._set_index(index)
            done = 0
            for read, batch in batches(pairs, report):
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
                    kept = first_of_each([new[position] for position in found.source], report)
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
        places = [""] * count if paths is None else [path_text(path) for path in paths]
        if not len(names) == len(places) == count or any(column.shape != (count,) for column in columns):
            raise UsageError(f"names, quality, resolution and paths must be {count} each, as the vectors are")
        if any(not np.isfinite(column).all() or column.min(initial=1.0) <= 0 for column in columns):
            raise UsageError("quality and resolution must be finite and above 0")
        pairs = [
            Given(check_name(name), f"vector {i}", places[i], hashlib.sha256(row.tobytes()).digest(), i)
            for i, (name, row) in enumerate(zip(names, units, strict=True))
        ]
        report, started = Enrolment(images=count), time.monotonic()
        with self._writing(), progress_bar(count, "enrol", unit="vectors", enabled=progress) as bar:
            self._set_index(index)
            for start in range(0, count, 16384):
                new = self._unknown(pairs[start : start + 16384], report)
                new = [new[i] for i in first_of_each(new, report)]
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
                effective resolutions of probe and candidate, else
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
                self._threshold((float(pixels[position]), each.resolution), threshold) for each in candidates
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
                    pairs[0][1] if pairs else self._threshold((112.0, 112.0), threshold)[1],
                    None,
                    float(pixels[position]),
                )
            )
        return matches

    def _threshold(self, pixels: tuple[float, float], given: float | None) -> tuple[float, str]:
        if given is not None:
            return given, "given"
        if self._embedder is not None:
            value = card_threshold(self._embedder.card, pixels, self._embedder.name)
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
        given = [names] if isinstance(names, str) else names
        wanted = list(dict.fromkeys(check_name(name) for name in given))
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

    def _unknown(self, batch: list[Given], report: Enrolment) -> list[Given]:
        """Those that are not enrolled; the others are counted."""
        whose = self._store.enrolled([image.sha256 for image in batch])
        return [image for image in batch if not is_known(image, whose.get(image.sha256), report)]

    def _commit(
        self,
        rows: list[Given],
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
    there: dict[str, Any] = {"backend": backend, "uri": uri, "token": token}
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
