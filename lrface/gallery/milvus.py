"""A gallery in Milvus: Milvus Lite in a local file NAME.db, a server, or a cluster where one machine is outgrown.

Three collections: GALLERY_people (templates), GALLERY_images and GALLERY_settings. An add writes the new templates before
the images, a removal deletes the images before the templates: where one is cut short, the same command again completes
it. Nothing here holds off a second writer of a server: two that enrol images of one person at the same time may leave one
image out of the template, until that person gets another.

What deletion means here. Milvus marks rows as deleted: they are in no answer any more, but their bytes stay in its
segments until compaction. Milvus Lite (3.2) compacts only when files pile up; a removal therefore writes the rows that
stay into new collections and drops the old ones, so that no byte of the removed is in a file of NAME.db when it returns.
This takes as long as writing the gallery, and its room a second time. On a server a removal flushes, asks for a
compaction and waits for it; the segments before it then wait for the server's garbage collection (``dataCoord.gc``: hours
by default), the log for its retention, and object storage may keep versions and backups. That is the administrator's to
set; lrface cannot see it.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.errors import LrfaceError, UsageError
from lrface.gallery.faces import Candidate, EnrolledFaces, joined, templates_of

ROWS = 1000
"""Rows of a request: a thousand vectors of 512 numbers are 2 MB, and answers stay below Milvus' 16,384 rows."""

KEYS = 200
"""Keys named in a filter."""

COMPACTION_SECONDS = 600
"""How long a removal waits for the server's compaction."""


class MilvusStore:
    """See the module. A gallery that is there; ``create`` makes one."""

    def __init__(self, name: str, uri: str, token: str | None):
        self._name, self._uri = name, uri
        self._lite = _is_lite(uri)
        self._client = _connect(name, uri, token)
        with self._errors():
            if self._lite:
                self._recover()
            settings = _settings(self._client, name)
            if settings is None:
                raise LrfaceError(f"{uri} has no gallery {name!r}. `lrface gallery add` makes one")
            self.header: dict[str, Any] = settings
            # What a process before this one made is not in memory yet.
            for kind in ("people", "images"):
                self._client.load_collection(self._of(kind))

    @classmethod
    def exists(cls, name: str, uri: str, token: str | None) -> bool:
        if _is_lite(uri) and not Path(uri).exists():
            return False
        client = _connect(name, uri, token)
        with _translated(uri):
            # While Milvus Lite rewrites a gallery its settings stay where they are.
            return _settings(client, name) is not None

    @classmethod
    def create(cls, name: str, uri: str, token: str | None, header: dict[str, Any]) -> "MilvusStore":
        """An empty gallery with the settings ``header``. Raises UsageError where there is one of that name."""
        client = _connect(name, uri, token)
        with _translated(uri):
            if _settings(client, name) is not None:
                raise UsageError(f"{uri} has a gallery {name!r} already")
            width, begun = header["model"]["embedding_size"], client.has_collection(f"{name}_settings")
            if not begun:
                for kind in ("people", "images"):
                    if client.has_collection(f"{name}_{kind}"):
                        raise UsageError(
                            f"{uri} has a collection {name}_{kind} that is no gallery's; take another name"
                        )
                _make_collection(client, f"{name}_settings", "settings", 2)
            for kind in ("people", "images"):
                if client.has_collection(f"{name}_{kind}"):  # of a creation that was cut short
                    client.drop_collection(f"{name}_{kind}")
                _make_collection(client, f"{name}_{kind}", kind, width)
            # Written last: from here on it is a gallery.
            text = json.dumps({**header, "index": "milvus"})
            client.upsert(f"{name}_settings", [{"key": "gallery", "text": text, "vector": [1.0, 0.0]}])
        return cls(name, uri, token)

    def enrolled(self, sha256: Sequence[bytes]) -> dict[bytes, str]:
        with self._errors():
            rows = self._rows("images", "key", [digest.hex() for digest in sha256], ["key", "name"])
            return {bytes.fromhex(row["key"]): row["name"] for row in rows}

    def add(self, faces: EnrolledFaces) -> int:
        with self._errors():
            people = {name: _key(name) for name in dict.fromkeys(faces.names)}
            known = self._rows("people", "key", list(people.values()), ["key"])
            old = list(
                self._rows(
                    "images",
                    "person",
                    [row["key"] for row in known],
                    ["key", "name", "path", "vector", "quality", "resolution"],
                )
            )
            # The same image again, after an add that was cut short, counts once.
            new = {digest.hex() for digest in faces.sha256}
            parts = [_faces([row for row in old if row["key"] not in new]), faces]
            templates = templates_of(joined([part for part in parts if len(part)]), self.header["pooling"])
            self._upsert(
                "people",
                [
                    {
                        "key": people[name],
                        "name": name,
                        "vector": templates.vectors[i].tolist(),
                        "images": int(templates.images[i]),
                        "resolution": float(templates.resolution[i]),
                    }
                    for i, name in enumerate(templates.names)
                ],
            )
            self._upsert(
                "images",
                [
                    {
                        "key": faces.sha256[i].hex(),
                        "person": people[name],
                        "name": name,
                        "path": faces.paths[i],
                        "vector": faces.vectors[i].tolist(),
                        "quality": float(faces.quality[i]),
                        "resolution": float(faces.resolution[i]),
                    }
                    for i, name in enumerate(faces.names)
                ],
            )
            return len(people) - len(known)

    def remove(self, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        with self._errors():
            keys = {_key(name): name for name in names}
            there = {keys[row["key"]] for row in self._rows("people", "key", list(keys), ["key"])}
            images = [row["person"] for row in self._rows("images", "person", list(keys), ["person"])]
            counts = {name: images.count(key) for key, name in keys.items() if name in there or key in images}
            gone = [_key(name) for name in counts]
            for kind, field in (("images", "person"), ("people", "key")):
                for start in range(0, len(gone), KEYS):
                    self._client.delete(self._of(kind), filter=_among(field, gone[start : start + KEYS]))
            if gone:
                self._purge()
            return counts, [name for name in names if name not in counts]

    def search(self, vectors: NDArray[np.float32], k: int) -> list[list[Candidate]]:
        found: list[list[Candidate]] = []
        with self._errors():
            for start in range(0, len(vectors), ROWS):
                answers = self._client.search(
                    self._of("people"),
                    data=vectors[start : start + ROWS].tolist(),
                    limit=min(k, 16_384),
                    output_fields=["name", "images", "resolution"],
                )
                found += [
                    [
                        Candidate(
                            hit["entity"]["name"],
                            float(np.clip(hit["distance"], -1, 1)),
                            int(hit["entity"]["images"]),
                            float(hit["entity"]["resolution"]),
                        )
                        for hit in hits
                    ]
                    for hits in answers
                ]
        return found

    def names(self) -> dict[str, int]:
        with self._errors():
            return dict(
                sorted((row["name"], row["images"]) for row in self._all("people", ["name", "images"]))
            )

    def info(self) -> dict[str, Any]:
        with self._errors():
            people, images = (
                int(self._client.query(self._of(kind), filter="", output_fields=["count(*)"])[0]["count(*)"])
                for kind in ("people", "images")
            )
        return {"people": people, "images": images, "uri": self._uri, "search": "milvus"}

    def close(self) -> None:
        self._client.close()

    # --------------------------------------------------------------------------------------------- internals

    def _of(self, kind: str) -> str:
        return f"{self._name}_{kind}"

    def _errors(self) -> Any:
        return _translated(self._uri)

    def _upsert(self, kind: str, rows: list[dict[str, Any]], collection: str | None = None) -> None:
        for start in range(0, len(rows), ROWS):
            self._client.upsert(collection or self._of(kind), rows[start : start + ROWS])

    def _rows(self, kind: str, field: str, keys: Sequence[str], fields: list[str]) -> list[dict[str, Any]]:
        """Rows whose ``field`` is one of ``keys``."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(keys), KEYS):
            found += self._all(kind, fields, _among(field, keys[start : start + KEYS]))
        return found

    def _all(self, kind: str, fields: list[str], where: str = "") -> Iterable[dict[str, Any]]:
        rows = self._client.query_iterator(
            self._of(kind), batch_size=ROWS, filter=where, output_fields=fields
        )
        try:
            while batch := rows.next():
                yield from batch
        finally:
            rows.close()

    def _purge(self) -> None:
        """Have the bytes of what was deleted go; see the module."""
        if self._lite:
            for kind, fields in _fields().items():
                if kind != "settings":
                    self._rewrite(kind, [field for field, _, _ in fields] + ["vector"])
            return
        jobs = []
        for kind in ("images", "people"):
            self._client.flush(self._of(kind))
            jobs.append(self._client.compact(self._of(kind)))
        stop = time.monotonic() + COMPACTION_SECONDS
        while any(self._client.get_compaction_state(job) != "Completed" for job in jobs):
            if time.monotonic() > stop:
                raise LrfaceError(
                    f"{self._uri}: the people are deleted, but its compaction takes more than {COMPACTION_SECONDS} s: "
                    "look whether it is at work; until it is done their bytes stay in its segments"
                )
            time.sleep(1.0)

    def _rewrite(self, kind: str, fields: list[str]) -> None:
        """All rows into a new collection that takes the place of the old one."""
        fresh, width = f"{self._of(kind)}_new", self.header["model"]["embedding_size"]
        _make_collection(self._client, fresh, kind, width)
        batch: list[dict[str, Any]] = []
        for row in self._all(kind, fields):
            batch.append({field: row[field] for field in fields})
            if len(batch) == ROWS:
                self._upsert(kind, batch, fresh)
                batch = []
        self._upsert(kind, batch, fresh)
        self._client.flush(fresh)
        self._client.drop_collection(self._of(kind))
        self._client.rename_collection(fresh, self._of(kind))
        self._client.load_collection(self._of(kind))

    def _recover(self) -> None:
        """A rewriting that was cut short: what was dropped is renamed, what was not whole is dropped."""
        for kind in ("people", "images"):
            if self._client.has_collection(f"{self._of(kind)}_new"):
                if self._client.has_collection(self._of(kind)):
                    self._client.drop_collection(f"{self._of(kind)}_new")
                else:
                    self._client.rename_collection(f"{self._of(kind)}_new", self._of(kind))


def _is_lite(uri: str) -> bool:
    return "://" not in uri


def _connect(name: str, uri: str, token: str | None) -> Any:
    """A client. Raises UsageError for a name or address that Milvus does not take, LrfaceError where nobody answers."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
        raise UsageError(f"a gallery in Milvus is named with letters, digits and underscores; found {name!r}")
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise LrfaceError("backend milvus needs pymilvus: pip install 'lrface[milvus]'") from error
    if _is_lite(uri):
        if not uri.endswith(".db"):
            raise UsageError(f"a local Milvus is a file NAME.db, a server http://HOST:19530; found {uri!r}")
        try:
            import milvus_lite  # noqa: F401
        except ImportError as error:
            raise LrfaceError(f"{uri} needs Milvus Lite: pip install 'lrface[milvus]'") from error
        if not Path(uri).absolute().parent.is_dir():
            raise UsageError(f"{Path(uri).absolute().parent} does not exist; {uri} cannot be made there")
    # It writes tracebacks of its own for every error, which is told to the caller here.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)
    with _translated(uri, "; another process may have it open" if _is_lite(uri) else ""):
        return MilvusClient(uri=uri, token=token or "")


@contextmanager
def _translated(uri: str, hint: str = "") -> Iterator[None]:
    try:
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise LrfaceError("backend milvus needs pymilvus: pip install 'lrface[milvus]'") from error
    try:
        yield
    except MilvusException as error:
        message = (str(error.message) or type(error).__name__).splitlines()[0]
        raise LrfaceError(f"Milvus at {uri}: {message}{hint}") from error


def _settings(client: Any, name: str) -> dict[str, Any] | None:
    """What was settled when the gallery was made; None where it was not made, or not to the end."""
    if not client.has_collection(f"{name}_settings"):
        return None
    client.load_collection(f"{name}_settings")
    rows = client.query(f"{name}_settings", filter='key in ["gallery"]', output_fields=["text"])
    return json.loads(rows[0]["text"]) if rows else None


def _fields() -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """Columns beside the vector, their types of Milvus and their options; the first is the key."""
    key, text = {"max_length": 64}, {"max_length": 4096}
    return {
        "people": [
            ("key", "VARCHAR", key),
            ("name", "VARCHAR", text),
            ("images", "INT64", {}),
            ("resolution", "FLOAT", {}),
        ],
        "images": [
            ("key", "VARCHAR", key),
            ("person", "VARCHAR", key),
            ("name", "VARCHAR", text),
            ("path", "VARCHAR", {"max_length": 32768}),
            ("quality", "FLOAT", {}),
            ("resolution", "FLOAT", {}),
        ],
        "settings": [("key", "VARCHAR", key), ("text", "VARCHAR", {"max_length": 65535})],
    }


def _make_collection(client: Any, name: str, kind: str, width: int) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for number, (field, type_name, options) in enumerate(_fields()[kind]):
        schema.add_field(field, getattr(DataType, type_name), is_primary=number == 0, **options)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=width)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def _key(name: str) -> str:
    """The key of a person: it can stand in a filter whatever the name is."""
    return hashlib.sha256(name.encode()).hexdigest()


def _among(field: str, keys: Sequence[str]) -> str:
    return f"{field} in {json.dumps(list(keys))}"


def _faces(rows: list[dict[str, Any]]) -> EnrolledFaces:
    return EnrolledFaces(
        [row["name"] for row in rows],
        [bytes.fromhex(row["key"]) for row in rows],
        [row["path"] for row in rows],
        np.array([row["vector"] for row in rows], np.float32),
        np.array([row["quality"] for row in rows], np.float32),
        np.array([row["resolution"] for row in rows], np.float32),
    )
