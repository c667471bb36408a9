"""Packed face data: Arrow shards beside one index, readable with pyarrow alone.

A packed directory holds ``index.json`` and ``shard-00000.arrow``, ``shard-00001.arrow``, ... (Arrow IPC
*file* format, so that a shard is memory-mapped and a row is found without reading the others). Columns:

==========  =======================  =====================================================================
image       binary                   the aligned face, encoded as JPEG or PNG
label       int64                    0..k-1 without gaps: the position in ``identities`` of the index
identity    string                   name of the identity (the folder it came from)
source      string                   path of the photograph, relative to the folder that was packed
face        int32                    which face of that photograph (0 is the chosen one)
landmarks   fixed_size_list<float32>[10]  x0, y0, ..., x4, y4 in pixels of the photograph after EXIF rotation
box         fixed_size_list<float32>[4]   left, top, right, bottom in the same pixels
score       float32                  the detector's confidence, 0..1; 0: no face was found, this is the photograph's middle
==========  =======================  =====================================================================

Where faces were aligned elsewhere (`lrface pack`) landmarks, box and score are not a number (NaN) and face is 0.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lrface.data.arrowfile import BinaryColumn, checked, open_batches
from lrface.data.decode import EncodedFaces
from lrface.errors import LrfaceError
from lrface.files import atomic_file, write_json

FORMAT = "lrface-packed"
VERSION = 1
INDEX_NAME = "index.json"
SHARD_ROWS, SHARD_BYTES = 8192, 64 * 2**20

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("face", pa.int32(), nullable=False),
        pa.field("landmarks", pa.list_(pa.float32(), 10), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)

_REPAIR = "Run `lrface align` with the same arguments again, or copy the packed data anew."


def shard_name(number: int) -> str:
    """File name of shard ``number``: ``shard-00000.arrow``."""
    return f"shard-{number:05d}.arrow"


def table_from_records(records: Sequence[dict[str, Any]], metadata: dict[str, str] | None = None) -> pa.Table:
    """Records (one dict a face, keys as in ``SCHEMA``) as an Arrow table of one batch.

    ``landmarks`` may be [5, 2] or [10] floats and ``box`` [4]; ``image`` is the encoded bytes. Raises
    LrfaceError naming the record and the key when one is missing or of the wrong shape.
    """
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        try:
            columns[field.name] = [record[field.name] for record in records]
        except KeyError:
            at = next(i for i, record in enumerate(records) if field.name not in record)
            raise LrfaceError(
                f"record {at} lacks the key {field.name!r}; keys are {', '.join(SCHEMA.names)}"
            ) from None
    arrays = []
    for field in SCHEMA:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            width = field.type.list_size
            flat = [np.asarray(value, dtype=np.float32).reshape(-1) for value in values]
            for at, value in enumerate(flat):
                if value.size != width:
                    raise LrfaceError(f"record {at}: {field.name} has {value.size} numbers, needs {width}")
            joined = np.concatenate(flat) if flat else np.zeros(0, np.float32)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(joined, pa.float32()), type=field.type))
        else:
            try:
                arrays.append(pa.array(values, field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise LrfaceError(f"column {field.name}: {error}") from error
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata))


def write_table(path: str | Path, table: pa.Table) -> dict[str, Any]:
    """Write a table of ``SCHEMA`` atomically as one Arrow file; returns {"file", "rows", "bytes",
    "sha256"}."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        # One batch a file: rows are then found through one offset table.
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
    data = memoryview(sink.getvalue())
    with atomic_file(path) as aside:
        aside.write_bytes(data)
    return {
        "file": Path(path).name,
        "rows": table.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def write_shard(
    path: str | Path, records: Sequence[dict[str, Any]], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write records (dicts with the keys of ``SCHEMA``) atomically as one shard.

    ``metadata`` is stored in the Arrow schema. Returns the entry for the ``shards`` list of the index:
    {"file", "rows", "bytes", "sha256"}. The same records give the same bytes. Raises LrfaceError when a
    record lacks a key, has a wrong shape, or the file cannot be written.
    """
    return write_table(path, table_from_records(records, metadata))


def write_index(
    root: str | Path,
    *,
    image_size: tuple[int, int],
    identities: Sequence[str],
    shards: Sequence[dict[str, Any]],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``root/index.json`` atomically: the last step of packing, without it nothing reads the directory.

    ``image_size`` is (height, width), ``shards`` are the entries that ``write_shard`` returned, in order.
    ``extra`` adds keys (it may not replace those of the format). Returns the path.
    """
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "image_size": [int(image_size[0]), int(image_size[1])],
        "images": sum(int(shard["rows"]) for shard in shards),
        "identities": list(identities),
        "shards": [dict(shard) for shard in shards],
    }
    for key, value in (extra or {}).items():
        if key in index:
            raise LrfaceError(f"index key {key!r} belongs to the format and cannot be replaced")
        index[key] = value
    path = Path(root) / INDEX_NAME
    write_json(path, index)
    return path


class PackedWriter:
    """Packed data written shard by shard into a folder; a shard ends at ``SHARD_ROWS`` faces or ``SHARD_BYTES``."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.images = 0
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self._shards: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        """One face, with the keys of ``SCHEMA``."""
        self._records.append(record)
        self._bytes += len(record["image"])
        self.images += 1
        if len(self._records) >= SHARD_ROWS or self._bytes >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._records:
            self._shards.append(write_shard(self.root / shard_name(len(self._shards)), self._records))
            self._records, self._bytes = [], 0

    def finish(
        self, image_size: tuple[int, int], identities: Sequence[str], extra: dict[str, Any] | None = None
    ) -> None:
        """Write what is left and the index, without which nothing reads the folder."""
        self._flush()
        write_index(self.root, image_size=image_size, identities=identities, shards=self._shards, extra=extra)


def read_index(root: str | Path) -> dict[str, Any]:
    """The checked content of ``root/index.json``. Raises LrfaceError naming what is missing or wrong."""
    path = Path(root) / INDEX_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise LrfaceError(
            f"{path}: not found, so {root} is not packed data (or packing was interrupted). {_REPAIR}"
        ) from None
    except OSError as error:
        raise LrfaceError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LrfaceError(f"{path}: is not valid JSON ({error}). {_REPAIR}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise LrfaceError(f"{path}: field 'format' should be {FORMAT!r}, found {found!r}")
    if index.get("version") != VERSION:
        raise LrfaceError(
            f"{path}: version {index.get('version')!r}; this lrface reads version {VERSION}. "
            "Update lrface or pack the data again."
        )
    kinds = {"image_size": list, "identities": list, "shards": list, "images": int}
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise LrfaceError(f"{path}: field {key!r} is missing or is not a {kind.__name__}. {_REPAIR}")
    if not all(isinstance(name, str) for name in index["identities"]):
        raise LrfaceError(f"{path}: field 'identities' should be a list of names. {_REPAIR}")
    if len(index["image_size"]) != 2 or not all(isinstance(side, int) for side in index["image_size"]):
        raise LrfaceError(
            f"{path}: field 'image_size' should be [height, width], found {index['image_size']!r}"
        )
    for at, shard in enumerate(index["shards"]):
        if (
            not isinstance(shard, dict)
            or not isinstance(shard.get("file"), str)
            or not isinstance(shard.get("rows"), int)
            or shard["rows"] < 0
        ):
            raise LrfaceError(f"{path}: shards[{at}] needs 'file' and 'rows', found {shard!r}. {_REPAIR}")
        if Path(shard["file"]).name != shard["file"]:
            raise LrfaceError(
                f"{path}: shards[{at}] names {shard['file']!r}, which is not a file beside the index"
            )
    rows = sum(shard["rows"] for shard in index["shards"])
    if rows != index["images"]:
        raise LrfaceError(f"{path}: 'images' is {index['images']} but the shards hold {rows} rows. {_REPAIR}")
    return index


class _Shard(NamedTuple):
    """One opened shard: its table, and where its images lie."""

    table: pa.Table
    images: BinaryColumn


class PackedSource(EncodedFaces):
    """A packed directory as a source of faces; memory-mapped, opened when first read.

    Implements FaceSource: ``identities`` (list of str), ``labels`` (int64 [n]), ``len()``, ``image(index)``
    (uint8 [h, w, 3], RGB). It can be pickled and survives a fork: the maps are read-only and are opened
    anew after unpickling. Raises LrfaceError when the index or a shard is missing, of another size than the
    index says, or not readable.
    """

    format = "packed"
    repair = _REPAIR

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.index = read_index(self.root)
        self.identities: list[str] = list(self.index["identities"])
        height, width = self.index["image_size"]
        self.image_shape: tuple[int, int] = (height, width)
        self.image_size: int = height
        self._rows = [int(shard["rows"]) for shard in self.index["shards"]]
        self._ends: list[int] = np.cumsum(self._rows, dtype=np.int64).tolist()
        for shard in self.index["shards"]:
            path = self.root / shard["file"]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise LrfaceError(
                    f"{path}: listed in {INDEX_NAME} but not readable: {error.strerror}. {_REPAIR}"
                ) from error
            if "bytes" in shard and size != shard["bytes"]:
                raise LrfaceError(f"{path}: has {size} bytes, {INDEX_NAME} says {shard['bytes']}. {_REPAIR}")
        self._shards: dict[int, _Shard] = {}
        self._labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_shards"] = {}
        return state

    def _open(self, number: int) -> _Shard:
        opened = self._shards.get(number)
        if opened is not None:
            return opened
        path = self.root / self.index["shards"][number]["file"]
        try:
            table = pa.Table.from_batches(*reversed(open_batches(path)))
        except LrfaceError as error:
            raise LrfaceError(f"{error}. {_REPAIR}") from error
        if not table.schema.equals(SCHEMA, check_metadata=False):
            raise LrfaceError(f"{path}: columns are {table.schema.names}, expected {SCHEMA.names}. {_REPAIR}")
        if table.num_rows != self._rows[number]:
            raise LrfaceError(
                f"{path}: has {table.num_rows} rows, {INDEX_NAME} says {self._rows[number]}. {_REPAIR}"
            )
        opened = _Shard(table, BinaryColumn(table.column("image").chunks, f"{path}: column 'image'"))
        self._shards[number] = opened
        return opened

    def _locate(self, index: int) -> tuple[int, int]:
        count = self._ends[-1] if self._ends else 0
        position = index + count if index < 0 else index
        if not 0 <= position < count:
            raise IndexError(f"image {index} of {count} in {self.root}")
        number = bisect_right(self._ends, position)
        return number, position - self._ends[number] + self._rows[number]

    def view(self, index: int) -> memoryview:
        """The JPEG or PNG bytes of image ``index``, not copied."""
        number, row = self._locate(index)
        shard = self._shards.get(number)
        return (shard or self._open(number)).images.view(row)

    def encoded(self, index: int) -> bytes:
        """The JPEG or PNG bytes of image ``index``."""
        return bytes(self.view(index))

    def place(self, index: int) -> str:
        number, row = self._locate(index)
        return f"{self.root / self.index['shards'][number]['file']}: row {row}"

    def column(self, name: str) -> np.ndarray:
        """One column over all shards: label int64 [n], face int32 [n], score float32 [n], landmarks float32
        [n, 5, 2], box float32 [n, 4]; identity and source as arrays of str [n]."""
        if name not in SCHEMA.names or name == "image":
            known = ", ".join(column for column in SCHEMA.names if column != "image")
            raise LrfaceError(f"{self.root}: no column {name!r}; there are {known}")
        kind = SCHEMA.field(name).type
        parts = []
        for number in range(len(self._rows)):
            place = f"{self.root / self.index['shards'][number]['file']}: column {name!r}"
            chunks = [checked(chunk, place) for chunk in self._open(number).table.column(name).chunks]
            if pa.types.is_fixed_size_list(kind):
                parts += [chunk.flatten().to_numpy().reshape(-1, kind.list_size) for chunk in chunks]
            elif pa.types.is_string(kind):
                parts += [np.asarray(chunk.to_pylist(), dtype=object) for chunk in chunks]
            else:
                parts += [chunk.to_numpy() for chunk in chunks]
        if parts:
            joined = np.concatenate(parts)
        elif pa.types.is_fixed_size_list(kind):
            joined = np.zeros((0, kind.list_size), np.float32)
        else:
            joined = np.zeros(0, object if pa.types.is_string(kind) else kind.to_pandas_dtype())
        return joined.reshape(-1, 5, 2) if name == "landmarks" else joined

    @property
    def labels(self) -> np.ndarray:
        """int64 [n], each in 0..len(identities)-1. Raises LrfaceError when a label is outside."""
        if self._labels is None:
            labels = self.column("label")
            if len(labels) and (labels.min() < 0 or labels.max() >= len(self.identities)):
                raise LrfaceError(
                    f"{self.root}: labels run from {labels.min()} to {labels.max()} but {INDEX_NAME} lists "
                    f"{len(self.identities)} identities. {_REPAIR}"
                )
            self._labels = labels
        return self._labels

    def sources(self) -> list[str]:
        """Path of every image's photograph, relative to the folder that was packed."""
        return list(self.column("source"))


def verify_shards(root: str | Path, shards: Iterable[dict[str, Any]] | None = None) -> None:
    """Read every shard whole and compare it with the checksum in the index; raises LrfaceError naming the
    first that differs."""
    root = Path(root)
    for shard in read_index(root)["shards"] if shards is None else shards:
        path = root / shard["file"]
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LrfaceError(f"{path}: cannot be read: {error.strerror}. {_REPAIR}") from error
        if "sha256" in shard and digest != shard["sha256"]:
            raise LrfaceError(f"{path}: its content differs from the checksum in {INDEX_NAME}. {_REPAIR}")


def alignment_columns(source: object) -> Callable[[int], dict[str, Any]]:
    """A function of an image's number that gives what only alignment knows (face, landmarks, box, score): from packed
    data as it is; of any other source nothing is known, and numbers are NaN."""
    if isinstance(source, PackedSource):
        columns = {name: source.column(name) for name in ("face", "landmarks", "box", "score")}
        return lambda index: {name: values[index] for name, values in columns.items()}
    unknown: dict[str, Any] = {
        "face": 0,
        "landmarks": np.full(10, np.nan, np.float32),
        "box": np.full(4, np.nan, np.float32),
        "score": np.float32(np.nan),
    }
    return lambda index: unknown
