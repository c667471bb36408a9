"""A gallery in a folder: Arrow files that are only ever added or replaced whole, and one small file that says which of
them count.

    gallery.json                what counts: model, settings, names of the other files
    faces-00000007.arrow        images: person, sha256, path, vector, quality, resolution
    templates-00000008.arrow    people: row, person, name, vector, images, resolution
    index-00000031.faiss        an approximate index over templates, where there is one

An add writes new files, syncs them, and then replaces gallery.json, which is the moment it counts. Files that gallery.json
does not name are leftovers of a killed process; the next writer deletes them. A person who gets more images gets a new
template row under the next number; of a person's rows the one with the largest number counts. Small files are merged,
eight of a size into one. Readers map the files that gallery.json named when they looked; they look again at the start of
every call.
"""

import json
import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lrface.data.arrowfile import checked, open_batches
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, explain, locked, write_json
from lrface.gallery.faces import INDEXES, Candidate, EnrolledFaces, joined, templates_of
from lrface.gallery.index import SPARE, ApproximateIndex, exact_top, has_faiss

MANIFEST = "gallery.json"
FORMAT = "lrface gallery"
FORMAT_VERSION = 1

MERGED = 8
"""Files of a size that are merged into one."""

LARGE = 8192
"""Rows from which on a file is not merged any more: what a removal rewrites stays below 64 times a thousand rows."""

EXACT_ROWS = 1_000_000
"""People up to whom the index "auto" searches exactly."""

_OWN_FILE = re.compile(
    r"(faces|templates)-\d{8,}\.arrow|index-\d{8,}\.faiss"
    r"|\.((faces|templates)-\d{8,}\.arrow|index-\d{8,}\.faiss|gallery\.json)\.\d+\.tmp"
)
_MANIFEST_KEYS = (
    *("id", "version", "model", "pooling", "flip", "index", "next_file", "next_person", "next_row"),
    *("faces", "templates", "search_index"),
)
_COLUMNS = {
    "faces": {
        "person": pa.int64(),
        "sha256": pa.binary(32),
        "path": pa.string(),
        "vector": None,
        "quality": pa.float32(),
        "resolution": pa.float32(),
    },
    "templates": {
        "row": pa.int64(),
        "person": pa.int64(),
        "name": pa.string(),
        "vector": None,
        "images": pa.int32(),
        "resolution": pa.float32(),
    },
}

# Folders that a thread of this process writes to: the lock of lrface.files holds off other processes only.
_writing: set[str] = set()
_writing_guard = threading.Lock()


@dataclass(frozen=True)
class _Part:
    """One Arrow file, mapped. ``vectors`` float32 [n, d] lies in the file."""

    file: str
    table: pa.RecordBatch
    vectors: NDArray[np.float32]

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> NDArray[Any]:
        return self.table[column].to_numpy()

    @cached_property
    def person(self) -> NDArray[np.int64]:
        return np.array(self.numbers("person"))

    @cached_property
    def row(self) -> NDArray[np.int64]:
        return np.array(self.numbers("row"))


class _View:
    """Everything that counts at one version; never changes."""

    def __init__(self, manifest: dict[str, Any], faces: list[_Part], templates: list[_Part], index: Any):
        self.manifest = manifest
        self.faces = faces
        self.templates = templates
        self.index: ApproximateIndex | None = index

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Numbers int64 [n] of all template rows, file after file."""
        return np.concatenate([np.zeros(0, np.int64), *(part.row for part in self.templates)])

    @cached_property
    def live(self) -> NDArray[np.bool_]:
        """bool [n]: the newest row of its person."""
        person = np.concatenate([np.zeros(0, np.int64), *(part.person for part in self.templates)])
        order = np.lexsort((self.rows, person))
        newest = np.ones(len(order), bool)
        newest[:-1] = person[order][1:] != person[order][:-1]
        live = np.empty(len(order), bool)
        live[order] = newest
        return live

    @cached_property
    def by_row(self) -> NDArray[np.int64]:
        return np.argsort(self.rows)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each file's rows begin, and the end."""
        return np.cumsum([0, *(len(part) for part in self.templates)])

    @property
    def people(self) -> int:
        return int(self.live.sum())

    def live_rows(self, part: int) -> NDArray[np.bool_]:
        return self.live[self.starts[part] : self.starts[part + 1]]

    def people_named(self, names: Sequence[str]) -> dict[str, int]:
        """Numbers of those of these people who are there."""
        wanted, found = pa.array(names, pa.string()), {}
        for part in self.templates:
            at = np.flatnonzero(pc.is_in(part.table["name"], value_set=wanted).to_numpy(zero_copy_only=False))
            found.update({part.table["name"][int(i)].as_py(): int(part.person[i]) for i in at})
        return found

    def names_of(self, people: NDArray[np.int64]) -> dict[int, str]:
        found = {}
        for part in self.templates:
            for i in np.flatnonzero(np.isin(part.person, people)):
                found[int(part.person[i])] = part.table["name"][int(i)].as_py()
        return found

    def faces_of(self, people: dict[str, int]) -> list[EnrolledFaces]:
        names = {number: name for name, number in people.items()}
        wanted = np.array(list(names), np.int64)
        found = []
        for part in self.faces:
            at = np.flatnonzero(np.isin(part.person, wanted))
            if len(at):
                found.append(
                    EnrolledFaces(
                        [names[int(number)] for number in part.person[at]],
                        [part.table["sha256"][int(i)].as_py() for i in at],
                        [part.table["path"][int(i)].as_py() for i in at],
                        part.vectors[at],
                        part.numbers("quality")[at],
                        part.numbers("resolution")[at],
                    )
                )
        return found


class FolderStore:
    """See the module. A gallery that is there; ``create`` makes one. Any number of threads may use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._guard = threading.Lock()
        self._seen = b""
        self._view: _View | None = None
        self.header = self._look().manifest

    @classmethod
    def create(cls, folder: Path, header: dict[str, Any]) -> "FolderStore":
        """An empty gallery with the settings ``header``.

        Raises:
            UsageError: there is something else in the folder.
            LrfaceError: it cannot be written.
        """
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; a gallery is a folder")
        with _sole_writer(folder):
            others = sorted(set(os.listdir(folder)) - {".lock"})
            if others:
                raise UsageError(
                    f"{folder} holds {others[0]} and is no gallery; give a folder that is new or empty"
                )
            write_json(
                folder / MANIFEST,
                {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    "id": uuid.uuid4().hex,
                    "version": 1,
                    **header,
                    "next_file": 1,
                    "next_person": 1,
                    "next_row": 1,
                    "faces": [],
                    "templates": [],
                    "search_index": None,
                },
            )
        return cls(folder)

    # --------------------------------------------------------------------------------------------- reading

    def _look(self) -> _View:
        """The newest version; files that were open already stay open."""
        with self._guard:
            for _ in range(100):
                seen = _manifest_bytes(self.folder)
                if self._view is not None and seen == self._seen:
                    return self._view
                manifest = _parsed_manifest(self.folder, seen)
                try:
                    self._view = self._open(manifest)
                except FileNotFoundError as error:
                    # A writer replaced the file between the two looks, unless gallery.json still names it.
                    if _manifest_bytes(self.folder) == seen:
                        raise LrfaceError(
                            f"{error.filename} is missing, though {self.folder / MANIFEST} names it: the gallery is "
                            "damaged; enrol its people again"
                        ) from error
                    continue
                self._seen = seen
                return self._view
            raise LrfaceError(f"{self.folder} changes faster than it can be read; try again")

    def _open(self, manifest: dict[str, Any]) -> _View:
        old = self._view
        known: dict[str, _Part] = {}
        index, entry = None, manifest["search_index"]
        if old is not None and old.manifest["id"] == manifest["id"]:
            known = {part.file: part for part in [*old.faces, *old.templates]}
            if entry is not None and entry == old.manifest["search_index"]:
                index = old.index
        width = manifest["model"]["embedding_size"]
        kinds = {
            kind: [
                known.get(each["file"]) or _read_part(self.folder, kind, each, width)
                for each in manifest[kind]
            ]
            for kind in _COLUMNS
        }
        if entry is not None and index is None and has_faiss():
            file = self.folder / entry["file"]
            if not file.is_file():
                raise FileNotFoundError(2, "missing", str(file))
            index = ApproximateIndex.read(file, entry)
        return _View(manifest, kinds["faces"], kinds["templates"], index)

    def enrolled(self, sha256: Sequence[bytes]) -> dict[bytes, str]:
        view = self._look()
        wanted, found = pa.array(sha256, pa.binary(32)), {}
        for part in view.faces:
            at = np.flatnonzero(
                pc.is_in(part.table["sha256"], value_set=wanted).to_numpy(zero_copy_only=False)
            )
            found.update({part.table["sha256"][int(i)].as_py(): int(part.person[i]) for i in at})
        names = view.names_of(np.array(list(found.values()), np.int64)) if found else {}
        return {digest: names[person] for digest, person in found.items()}

    def search(self, vectors: NDArray[np.float32], k: int) -> list[list[Candidate]]:
        view = self._look()
        probe, at = self._nearest(view, vectors, k + SPARE)
        part = np.searchsorted(view.starts, at, side="right") - 1
        offset = at - view.starts[part]
        rows = np.empty((len(at), vectors.shape[1]), np.float32)
        for number in np.unique(part):
            chosen = part == number
            rows[chosen] = view.templates[number].vectors[offset[chosen]]
        cosine = np.clip(
            np.einsum("nd,nd->n", rows.astype(np.float64), vectors[probe].astype(np.float64)), -1, 1
        )
        order = np.lexsort((view.rows[at], -cosine, probe))
        found: list[list[Candidate]] = [[] for _ in vectors]
        for i in order:
            if len(found[probe[i]]) < k:
                table, row = view.templates[part[i]].table, int(offset[i])
                found[probe[i]].append(
                    Candidate(
                        table["name"][row].as_py(),
                        float(cosine[i]),
                        table["images"][row].as_py(),
                        table["resolution"][row].as_py(),
                    )
                )
        return found

    def _nearest(
        self, view: _View, vectors: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Probes and positions among all template rows."""
        through = -1 if view.index is None else view.manifest["search_index"]["through"]
        parts: list[tuple[NDArray[np.float32], NDArray[np.bool_] | None]] = []
        starts = []
        for number, part in enumerate(view.templates):
            counts = view.live_rows(number) & (part.row > through)
            if counts.any():
                parts.append((part.vectors, None if counts.all() else counts))
                starts.append(view.starts[number])
        probe, at, _ = exact_top(parts, vectors, k)
        # Numbered through the parts that were searched: to numbers through all of them.
        lengths = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        which = np.searchsorted(lengths, at, side="right") - 1
        at = at - lengths[which] + np.array([*starts, 0])[which]
        if view.index is None:
            return probe, at
        stale = view.rows[~view.live & (view.rows <= through)]
        _, rows = view.index.search(vectors, min(k, view.manifest["search_index"]["rows"]), stale)
        near, column = np.nonzero(rows >= 0)
        place = np.searchsorted(view.rows, rows[near, column], sorter=view.by_row)
        place = view.by_row[np.minimum(place, len(view.rows) - 1)]
        # A row that a merge dropped since the index was built was stale before.
        there = (view.rows[place] == rows[near, column]) & view.live[place]
        return np.concatenate([probe, near[there]]), np.concatenate([at, place[there]])

    def names(self) -> dict[str, int]:
        view = self._look()
        found: dict[str, int] = {}
        for number, part in enumerate(view.templates):
            live = pa.array(view.live_rows(number))
            found.update(
                zip(
                    part.table["name"].filter(live).to_pylist(),
                    part.table["images"].filter(live).to_pylist(),
                    strict=True,
                )
            )
        return dict(sorted(found.items()))

    def info(self) -> dict[str, Any]:
        view = self._look()
        entry = view.manifest["search_index"]
        return {
            "people": view.people,
            "images": sum(len(part) for part in view.faces),
            "version": view.manifest["version"],
            "files": len(view.faces) + len(view.templates) + (entry is not None),
            "bytes": sum(each.stat().st_size for each in self.folder.iterdir() if each.is_file()),
            "search": "exact" if view.index is None else entry["kind"],
            "search_index": entry
            and {key: entry[key] for key in ("kind", "rows", "effort", "recall")}
            | {"people_searched_exactly": int((view.live & (view.rows > entry["through"])).sum())},
        }

    def close(self) -> None:
        with self._guard:
            self._view, self._seen = None, b""

    # --------------------------------------------------------------------------------------------- writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer; leftovers of killed ones are deleted first.

        Raises LrfaceError where somebody else is, or the folder cannot be written.
        """
        with _sole_writer(self.folder):
            self._sweep(self._look().manifest)
            try:
                yield
            except BaseException:
                with suppress(LrfaceError):
                    self._sweep(self._look().manifest)
                raise

    def add(self, faces: EnrolledFaces) -> int:
        view = self._look()
        manifest = _copied(view.manifest)
        known = view.people_named(list(dict.fromkeys(faces.names)))
        people = dict(known)
        for name in dict.fromkeys(faces.names):
            if name not in people:
                people[name] = manifest["next_person"]
                manifest["next_person"] += 1
        templates = templates_of(joined([*view.faces_of(known), faces]), manifest["pooling"])
        rows = np.arange(len(templates.names)) + manifest["next_row"]
        manifest["next_row"] += len(rows)
        self._write(
            manifest,
            "faces",
            [
                pa.array([people[name] for name in faces.names], pa.int64()),
                pa.array(faces.sha256, pa.binary(32)),
                pa.array(faces.paths, pa.string()),
                _vectors(faces.vectors),
                pa.array(faces.quality, pa.float32()),
                pa.array(faces.resolution, pa.float32()),
            ],
        )
        self._write(
            manifest,
            "templates",
            [
                pa.array(rows, pa.int64()),
                pa.array([people[name] for name in templates.names], pa.int64()),
                pa.array(templates.names, pa.string()),
                _vectors(templates.vectors),
                pa.array(templates.images, pa.int32()),
                pa.array(templates.resolution, pa.float32()),
            ],
        )
        self._commit(manifest)
        self._merge()
        return len(people) - len(known)

    def remove(self, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        view = self._look()
        people = view.people_named(names)
        absent = [name for name in names if name not in people]
        if not people:
            return {}, absent
        manifest = _copied(view.manifest)
        gone = np.array(list(people.values()), np.int64)
        images = np.concatenate([np.zeros(0, np.int64), *(part.person for part in view.faces)])
        counts = {name: int((images == number).sum()) for name, number in people.items()}
        for kind, parts in (("faces", view.faces), ("templates", view.templates)):
            for part in parts:
                stays = ~np.isin(part.person, gone)
                if not stays.all():
                    self._replace(manifest, kind, [(part, stays)])
        # What the index learnt from them goes with them; until it is built again, search is exact.
        manifest["search_index"] = None
        self._commit(manifest)
        return counts, absent

    def set_index(self, kind: str) -> None:
        """Search by "exact", "hnsw", "ivf" or "auto" from now on; :meth:`refresh_index` builds it."""
        manifest = _copied(self._look().manifest)
        if manifest["index"] != kind:
            self._commit({**manifest, "index": kind, "search_index": None})
            self.header = self._look().manifest

    def refresh_index(self, show_progress: bool = True) -> None:
        """Build the approximate index that is wanted and absent, or that more than a tenth of the people are not in."""
        view = self._look()
        wanted = view.manifest["index"]
        if wanted not in INDEXES:
            raise LrfaceError(
                f"{self.folder / MANIFEST}: index must be {', '.join(INDEXES)}; found {wanted!r}"
            )
        if wanted == "auto":
            wanted = "hnsw" if view.people > EXACT_ROWS and has_faiss() else "exact"
        entry = view.manifest["search_index"]
        if wanted == "exact" or not view.people:
            if entry is not None:
                self._commit({**_copied(view.manifest), "search_index": None})
            return
        if entry is not None and entry["kind"] == wanted:
            outside = int((view.live & (view.rows > entry["through"])).sum())
            if outside <= view.people // 10:
                return
        vectors = np.concatenate(
            [part.vectors[view.live_rows(number)] for number, part in enumerate(view.templates)]
        )
        rows = view.rows[view.live]
        index = ApproximateIndex.build(wanted, vectors, rows, show_progress)
        manifest = _copied(view.manifest)
        file = f"index-{manifest['next_file']:08d}.faiss"
        manifest["next_file"] += 1
        with atomic_file(self.folder / file) as aside:
            index.write(aside)
        manifest["search_index"] = {
            "file": file,
            "kind": wanted,
            "rows": len(rows),
            "through": int(rows.max()),
            "effort": index.effort,
            "recall": index.recall,
        }
        self._commit(manifest)

    def _merge(self) -> None:
        """Merge eight files of a size into one, and drop rows that newer ones replaced."""
        view = self._look()
        manifest = _copied(view.manifest)
        merged = False
        for kind, parts in (("faces", view.faces), ("templates", view.templates)):
            stays = [
                view.live_rows(number) if kind == "templates" else np.ones(len(part), bool)
                for number, part in enumerate(parts)
            ]
            sizes: dict[int, list[int]] = {}
            for number, part in enumerate(parts):
                if 2 * stays[number].sum() < len(part):  # mostly rows that newer ones replaced
                    sizes[-1 - number] = [number]
                elif len(part) < LARGE:
                    sizes.setdefault(int(np.log2(len(part))) // 3, []).append(number)
            for size, chosen in sizes.items():
                if size < 0 or len(chosen) >= MERGED:
                    merged = True
                    self._replace(manifest, kind, [(parts[number], stays[number]) for number in chosen])
        if merged:
            self._commit(manifest)

    def _replace(
        self, manifest: dict[str, Any], kind: str, parts: list[tuple[_Part, NDArray[np.bool_]]]
    ) -> None:
        """One new file with those rows of ``parts`` that stay, in the place of them."""
        files = {part.file for part, _ in parts}
        manifest[kind] = [each for each in manifest[kind] if each["file"] not in files]
        tables = [part.table.take(pa.array(np.flatnonzero(stays))) for part, stays in parts]
        table = pa.Table.from_batches(tables).combine_chunks()
        if table.num_rows:
            self._write(manifest, kind, [column.combine_chunks() for column in table.columns])

    def _write(self, manifest: dict[str, Any], kind: str, columns: list[pa.Array]) -> None:
        file = f"{kind}-{manifest['next_file']:08d}.arrow"
        manifest["next_file"] += 1
        batch = pa.RecordBatch.from_arrays(columns, names=list(_COLUMNS[kind]))
        with atomic_file(self.folder / file) as aside, pa.OSFile(str(aside), "wb") as sink:
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
        manifest[kind].append({"file": file, "rows": batch.num_rows})

    def _commit(self, manifest: dict[str, Any]) -> None:
        """From here on ``manifest`` counts; files that it does not name are gone when this returns."""
        manifest["version"] += 1
        write_json(self.folder / MANIFEST, manifest)
        self._sweep(manifest)

    def _sweep(self, manifest: dict[str, Any]) -> None:
        named = {each["file"] for kind in _COLUMNS for each in manifest[kind]}
        if manifest["search_index"] is not None:
            named.add(manifest["search_index"]["file"])
        left = [name for name in os.listdir(self.folder) if _OWN_FILE.fullmatch(name) and name not in named]
        if not left:
            return
        try:
            for name in left:
                with suppress(FileNotFoundError):
                    (self.folder / name).unlink()
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explain(error, self.folder) from error


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    place = os.path.realpath(folder)
    with _writing_guard:
        if place in _writing:
            raise LrfaceError(f"{folder}: another thread of this process is writing to it; wait for it")
        _writing.add(place)
    try:
        with locked(folder):
            yield
    finally:
        with _writing_guard:
            _writing.discard(place)


def _manifest_bytes(folder: Path) -> bytes:
    """Raises LrfaceError where there is no gallery."""
    try:
        return (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LrfaceError(
            f"{folder} is no gallery: it has no {MANIFEST}. `lrface gallery add` makes one"
        ) from error
    except OSError as error:
        raise LrfaceError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error


def _parsed_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LrfaceError(f"{file} is damaged: {error}") from error
    known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not known or manifest.get("format_version") != FORMAT_VERSION:
        raise LrfaceError(f"{file} is not of the format {FORMAT!r}, version {FORMAT_VERSION}")
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise LrfaceError(f"{file} is damaged: {missing[0]} is missing")
    return manifest


def _copied(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, **{kind: list(manifest[kind]) for kind in _COLUMNS}}


def _vectors(vectors: NDArray[np.float32]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _read_part(folder: Path, kind: str, entry: dict[str, Any], width: int) -> _Part:
    """Raises FileNotFoundError, and LrfaceError for a file that is damaged."""
    file = folder / entry["file"]
    if not _OWN_FILE.fullmatch(entry["file"]):
        raise LrfaceError(
            f"{folder / MANIFEST} names the file {entry['file']!r}, which is no file of a gallery"
        )
    if not file.is_file():
        raise FileNotFoundError(2, "missing", str(file))
    schema, batches = open_batches(file)
    wanted = {
        name: pa.list_(pa.float32(), width) if column is None else column
        for name, column in _COLUMNS[kind].items()
    }
    found = {field.name: field.type for field in schema}
    if found != wanted or len(batches) != 1 or batches[0].num_rows != entry["rows"]:
        raise LrfaceError(
            f"{file} is damaged: {entry['rows']} rows of {', '.join(wanted)} were written; found "
            f"{sum(batch.num_rows for batch in batches)} rows of {', '.join(found)}"
        )
    for name in wanted:
        checked(batches[0][name], f"{file}: {name}")
    vectors = batches[0]["vector"].flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
    return _Part(entry["file"], batches[0], vectors)
