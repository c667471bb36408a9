"""Parquet and Arrow files with an image column, as Hugging Face's datasets stores them, read in place and written.

The image column is binary, or a struct with ``bytes`` (and ``path``); the label column holds whole numbers, or names.
Names of classes come from the schema's metadata ``huggingface`` or from ``dataset_info.json`` beside Arrow files.

Arrow files and streams are mapped into memory, any row is found at once. Parquet is compressed by row groups: one is
decoded whole for a single row of it, and decoded groups are kept up to ``CACHE_BYTES``. Where a training set is larger
than that, ``lrface pack`` makes it fast.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lrface.data.arrowfile import ARROW_ERRORS, BinaryColumn, check_names, checked, open_batches
from lrface.data.decode import EncodedFaces
from lrface.data.packed import SCHEMA
from lrface.data.source import identity_names
from lrface.errors import LrfaceError
from lrface.files import read_json

SUFFIXES = (".parquet", ".arrow")
CACHE_BYTES = 256 << 20
MAX_GROUP_BYTES = 2 << 30
"""Largest row group whose images are decoded; the format itself allows no more than that for one page."""

_LABEL_NAMES = ("label", "labels")


def find_tables(path: str | Path) -> list[Path]:
    """The Parquet or Arrow files of one data set that ``path`` is or holds; empty where there are none.

    Raises:
        LrfaceError: a folder of several splits or kinds of file, of which one must be named.
    """
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        raise LrfaceError(
            f"{path} holds the splits {', '.join(splits)}; name one, for example {path / splits[0]}"
            if splits
            else f"{path}: dataset_dict.json, but no split with state.json"
        )
    if (path / "state.json").is_file():
        listed = read_json(path / "state.json", "state of a Hugging Face data set").get("_data_files")
        entries = listed if isinstance(listed, list) else []
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        good = [name for name in names if isinstance(name, str) and name and Path(name).name == name]
        if not good or len(good) != len(entries):
            raise LrfaceError(f"{path / 'state.json'}: field '_data_files' should list the files beside it")
        return [path / name for name in good]
    files: list[Path] = []
    for folder in (path, path / "data"):
        if folder.is_dir() and not files:
            files = sorted(
                entry for entry in folder.iterdir() if entry.suffix in SUFFIXES and entry.is_file()
            )
    # "train-00000-of-00010.parquet" is a shard of the split "train".
    splits = sorted({f"{file.stem.partition('-')[0]}*{file.suffix}" for file in files})
    if len(splits) > 1:
        raise LrfaceError(
            f"{path} holds several tables ({', '.join(splits[:5])}); name one file, or put the shards of one split into "
            "a folder of their own"
        )
    return files


class TableSource(EncodedFaces):
    """Parquet or Arrow files as a source of faces. Implements FaceSource; can be pickled and survives a fork.

    Raises:
        LrfaceError: no file, a damaged one, no image or label column or more than one, rows without a label.
    """

    repair = "Remove the row or copy the file again"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = find_tables(self.path)
        if not files:
            raise LrfaceError(f"{self.path}: no Parquet or Arrow file")
        self.format = files[0].suffix[1:]
        self._parts = [
            _ParquetPart(file) if file.suffix == ".parquet" else _ArrowPart(file) for file in files
        ]
        if self.path.is_dir() and self._parts[0].schema.names == SCHEMA.names:
            raise LrfaceError(
                f"{self.path}: packed data without index.json: packing was interrupted. Run the same command again"
            )
        self._ends = np.cumsum([part.rows for part in self._parts], dtype=np.int64)
        labels = [part.labels() for part in self._parts]
        names = self._parts[0].names
        if labels[0].dtype == object:
            joined = np.concatenate(labels)
            found, self.labels = np.unique(joined.astype(str), return_inverse=True)
            self.identities: list[str] = found.tolist()
        else:
            self.labels = np.concatenate(labels) if self._ends[-1] else np.zeros(0, np.int64)
            self.identities = identity_names(self.labels, self.path) if names is None else names

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[Any, int]:
        count = len(self)
        position = index + count if index < 0 else index
        if not 0 <= position < count:
            raise IndexError(f"image {index} of {count} in {self.path}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        part = self._parts[number]
        return part, position - int(self._ends[number]) + part.rows

    def view(self, index: int) -> memoryview:
        """The image file ``index``, not copied."""
        part, row = self._locate(index)
        return part.view(row)

    def encoded(self, index: int) -> bytes:
        """The image file ``index`` as it is stored."""
        return bytes(self.view(index))

    def place(self, index: int) -> str:
        part, row = self._locate(index)
        return f"{part.file}: row {row}"

    def sources(self) -> list[str]:
        """The images' paths where all have one and all differ, else FILE/ROW."""
        paths: list[str | None] = []
        for part in self._parts:
            paths += part.paths()
        if None not in paths and len(set(paths)) == len(paths):
            return paths  # type: ignore[return-value]
        return [f"{part.file.stem}/{row:08d}" for part in self._parts for row in range(part.rows)]


class _Part:
    """One file: which of its columns are image, path and label."""

    def __init__(self, file: Path, schema: pa.Schema):
        self.file = file
        self.schema = schema
        features = self._features()
        self.image = self._image_column(features)
        kind = schema.field(self.image).type
        self.nested = pa.types.is_struct(kind)
        self.has_paths = self.nested and any(child.name == "path" and _is_text(child.type) for child in kind)
        self.label = self._label_column(features)
        self.text_labels = _is_text(schema.field(self.label).type)
        listed = features.get(self.label, {}).get("names")
        named = isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed)
        self.names: list[str] | None = listed if named else None

    def _features(self) -> dict[str, dict[str, Any]]:
        """Hugging Face's description of the columns, {} without one."""
        info: Any = None
        beside = self.file.parent / "dataset_info.json"
        try:
            text = (self.schema.metadata or {}).get(b"huggingface")
            if text is not None:
                info = json.loads(text).get("info")
            elif self.file.suffix == ".arrow" and beside.is_file():
                info = read_json(beside, "description of the data set")
        except (ValueError, RecursionError, AttributeError) as error:
            raise LrfaceError(f"{self.file}: its description of the columns is damaged ({error})") from error
        features = info.get("features") if isinstance(info, dict) else None
        if not isinstance(features, dict):
            return {}
        return {name: value for name, value in features.items() if isinstance(value, dict)}

    def _image_column(self, features: dict[str, dict[str, Any]]) -> str:
        if len(set(self.schema.names)) != len(self.schema.names):
            raise LrfaceError(f"{self.file}: has several columns of one name: {', '.join(self.schema.names)}")
        fields = {field.name: field.type for field in self.schema}
        found = [
            name
            for name, kind in fields.items()
            if _is_binary(kind)
            or (
                pa.types.is_struct(kind)
                and any(child.name == "bytes" and _is_binary(child.type) for child in kind)
            )
        ]
        return self._one(
            found,
            [name for name in found if features.get(name, {}).get("_type") == "Image"],
            ("image",),
            "an image column (binary, or a struct with bytes)",
        )

    def _label_column(self, features: dict[str, dict[str, Any]]) -> str:
        fields = {field.name: field.type for field in self.schema}
        numbers = [name for name, kind in fields.items() if pa.types.is_integer(kind)]
        if not numbers:
            numbers = [
                name
                for name, kind in fields.items()
                if _is_text(kind) and name in ("identity", *_LABEL_NAMES)
            ]
        classes = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
        return self._one(
            numbers, classes, _LABEL_NAMES, "a label column (whole numbers, or names called label)"
        )

    def _one(self, found: list[str], described: list[str], usual: tuple[str, ...], what: str) -> str:
        for choice in (described, [name for name in found if name in usual], found):
            if len(choice) == 1:
                return choice[0]
        raise LrfaceError(
            f"{self.file}: needs {what}; {'candidates are ' + ', '.join(found) if found else 'there is none'} among the "
            f"columns {', '.join(self.schema.names)}"
        )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


class _ArrowPart(_Part):
    """An Arrow IPC file or stream, mapped into memory."""

    def __init__(self, file: Path):
        schema, batches = open_batches(file)
        super().__init__(file, schema)
        self._take(batches)

    def _take(self, batches: list[pa.RecordBatch]) -> None:
        self._batches = batches
        self.rows = sum(batch.num_rows for batch in batches)
        self._images = BinaryColumn(self._column(self.image, "bytes"), f"{self.file}: column {self.image!r}")

    def _column(self, name: str, child: str | None = None) -> list[pa.Array]:
        arrays = [batch.column(self.schema.get_field_index(name)) for batch in self._batches]
        if child and self.nested:
            arrays = [array.field(child) for array in arrays]
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_batches", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take(open_batches(self.file)[1])

    def view(self, row: int) -> memoryview:
        return self._images.view(row)

    def labels(self) -> np.ndarray:
        place = f"{self.file}: column {self.label!r}"
        arrays = [checked(array, place) for array in self._column(self.label)]
        if self.text_labels:
            parts = [np.asarray(array.to_pylist(), dtype=object) for array in arrays]
            return np.concatenate(parts) if parts else np.zeros(0, object)
        return np.concatenate([np.zeros(0, np.int64), *(_whole(array, place) for array in arrays)])

    def paths(self) -> list[str | None]:
        if not self.has_paths:
            return [None] * self.rows
        place = f"{self.file}: paths of the images"
        found: list[str | None] = []
        for array in self._column(self.image, "path"):
            try:
                array.validate(full=True)
            except ARROW_ERRORS as error:
                raise LrfaceError(f"{place} are damaged ({error})") from error
            found += array.to_pylist()
        return found


class _Group:
    """The images of one decoded row group: every distinct one once, and which of them each row shows."""

    def __init__(self, column: pa.ChunkedArray, place: str):
        self._starts, self._parts, self.bytes = [], [], 0
        rows = 0
        for chunk in column.chunks:
            dictionary = chunk.dictionary
            indices = chunk.indices.fill_null(len(dictionary)).to_numpy()
            values = BinaryColumn([dictionary], place)
            if len(indices) and (indices.min() < 0 or indices.max() > values.rows):
                raise LrfaceError(f"{place} is damaged: a row shows image {indices.max()} of {values.rows}")
            self._starts.append(rows)
            self._parts.append((indices, values))
            self.bytes += dictionary.nbytes + indices.nbytes
            rows += len(indices)
        self.rows = rows

    def view(self, row: int) -> memoryview:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        indices, values = self._parts[number]
        chosen = int(indices[row - self._starts[number]])
        return values.view(chosen) if chosen < values.rows else memoryview(b"")


class _ParquetPart(_Part):
    """A Parquet file; row groups are decoded when a row of theirs is read.

    Images are asked for as dictionaries: pages that show one image a million times are then not blown up.
    """

    def __init__(self, file: Path):
        self.file = file
        schema = self._open(()).schema_arrow
        super().__init__(file, schema)
        self._leaf = f"{self.image}.bytes" if self.nested else self.image
        self._path_leaf = f"{self.image}.path" if self.has_paths else None
        opened = self._reopen()
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        counts = [group.num_rows for group in groups]
        self.rows = sum(counts)
        # A row takes some bytes: what says otherwise makes a reader allocate without end.
        if min(counts, default=0) < 0 or self.rows > file.stat().st_size:
            raise LrfaceError(f"{file}: says {self.rows} rows in {file.stat().st_size} bytes: it is damaged")
        for number, group in enumerate(groups):
            # Not that of the image column: pyarrow ends the process where the description of a column is damaged.
            if not 0 <= group.total_byte_size <= MAX_GROUP_BYTES:
                raise LrfaceError(
                    f"{file}: row group {number} has {group.total_byte_size} bytes, more than {MAX_GROUP_BYTES}; write "
                    "the file again with smaller row groups"
                )
        self._ends = np.cumsum(counts, dtype=np.int64)

    def _open(self, as_dictionary: tuple[str, ...]) -> Any:
        from pyarrow import parquet

        try:
            opened = parquet.ParquetFile(
                self.file,
                read_dictionary=list(as_dictionary),
                memory_map=True,
                pre_buffer=False,
                thrift_string_size_limit=64 << 20,
                thrift_container_size_limit=4 << 20,
            )
            check_names(opened.schema_arrow)
            return opened
        except ARROW_ERRORS as error:
            raise LrfaceError(f"{self.file}: is not a readable Parquet file ({error})") from error

    def _reopen(self) -> Any:
        text = [self.label] if self.text_labels else []
        self._file = self._open((self._leaf, *text, *([self._path_leaf] if self._path_leaf else [])))
        self._cache: OrderedDict[int, _Group] = OrderedDict()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_file", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reopen()

    def _read(self, number: int, column: str) -> pa.ChunkedArray:
        try:
            table = self._file.read_row_group(number, columns=[column], use_threads=False)
            found = table.column(0)
            found.validate(full=True)
        except ARROW_ERRORS as error:
            raise LrfaceError(
                f"{self.file}: row group {number}, column {column} is damaged ({error})"
            ) from error
        while pa.types.is_struct(found.type):
            found = pa.chunked_array([chunk.field(0) for chunk in found.chunks], found.type.field(0).type)
        expected = int(self._ends[number]) - (int(self._ends[number - 1]) if number else 0)
        if len(found) != expected:
            raise LrfaceError(
                f"{self.file}: row group {number}, column {column} has {len(found)} rows, {expected} were expected"
            )
        return found

    def _group(self, number: int) -> _Group:
        group = self._cache.get(number)
        if group is None:
            group = _Group(self._read(number, self._leaf), f"{self.file}: row group {number}")
            self._cache[number] = group
            while len(self._cache) > 1 and sum(each.bytes for each in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(number)
        return group

    def view(self, row: int) -> memoryview:
        number = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return self._group(number).view(row - first)

    def labels(self) -> np.ndarray:
        place = f"{self.file}: column {self.label!r}"
        parts: list[np.ndarray] = [np.zeros(0, object if self.text_labels else np.int64)]
        for number in range(len(self._ends)):
            for chunk in self._read(number, self.label).chunks:
                chunk = checked(chunk, place)
                if self.text_labels:
                    names = np.asarray(chunk.dictionary.to_pylist(), dtype=object)
                    parts.append(names[chunk.indices.to_numpy()] if len(names) else names)
                else:
                    parts.append(_whole(chunk, place))
        return np.concatenate(parts)

    def paths(self) -> list[str | None]:
        found: list[str | None] = []
        for number in range(len(self._ends)) if self._path_leaf else ():
            assert self._path_leaf
            for chunk in self._read(number, self._path_leaf).chunks:
                names = [*chunk.dictionary.to_pylist(), None]
                found += [names[at] for at in chunk.indices.fill_null(len(names) - 1).to_pylist()]
        return found if self._path_leaf else [None] * self.rows


def _whole(array: pa.Array, place: str) -> np.ndarray:
    try:
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except ARROW_ERRORS as error:
        raise LrfaceError(f"{place} holds no whole numbers of 64 bits ({error})") from error


class ParquetWriter:
    """Writes Hugging Face's layout into a folder: ``train-00000-of-00003.parquet`` with image{bytes, path} and label.

    Row groups have 256 rows, so that one image costs no more than that to read. The folder is the caller's to make and to
    rename into place.
    """

    def __init__(self, folder: str | Path, identities: list[str], shard_bytes: int = 256 << 20):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        features = {
            "image": {"_type": "Image"},
            "label": {"names": identities, "_type": "ClassLabel"},
        }
        description = json.dumps({"info": {"features": features}}, ensure_ascii=False)
        self._schema = pa.schema(
            [
                pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                pa.field("label", pa.int64()),
            ],
            {"huggingface": description},
        )
        self._rows: list[tuple[bytes, str, int]] = []
        self._shards: list[Path] = []
        self._writer: Any = None
        self._written = 0

    def add(self, image: bytes, label: int, source: str) -> None:
        """Append a row."""
        self._rows.append((image, source, label))
        if len(self._rows) == 256:
            self._flush()

    def _flush(self) -> None:
        from pyarrow import parquet

        if not self._rows:
            return
        if self._writer is not None and self._written >= self.shard_bytes:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._shards.append(self.folder / f"part-{len(self._shards):05d}")
            # Images do not shrink, and dictionaries of them would double the work.
            self._writer = parquet.ParquetWriter(
                self._shards[-1], self._schema, compression="NONE", use_dictionary=["label"]
            )
            self._written = 0
        images, sources, labels = zip(*self._rows, strict=True)
        self._written += sum(map(len, images))
        nested = pa.StructArray.from_arrays(
            [pa.array(images, pa.binary()), pa.array(sources, pa.string())], ["bytes", "path"]
        )
        self._writer.write_table(pa.table([nested, pa.array(labels, pa.int64())], schema=self._schema))
        self._rows = []

    def close(self) -> None:
        """Write what is left and give the shards their names."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        for number, shard in enumerate(self._shards):
            shard.rename(self.folder / f"train-{number:05d}-of-{len(self._shards):05d}.parquet")
