"""Arrow files read without trust: batches mapped into memory, nothing decompressed, every offset checked once.

pyarrow checks the messages of a file, but neither where the values of a column lie nor how much a compressed buffer
says it unpacks to. Here the messages are walked from the start of the file (its footer is not followed), compressed
and dictionary batches are refused, and a column is used only after its offsets were found to lie in its data.
"""

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lrface.errors import LrfaceError

FILE_MAGIC = b"ARROW1\0\0"
ARROW_ERRORS = (OSError, pa.ArrowException, MemoryError, ValueError, TypeError, OverflowError)
"""What pyarrow raises for damaged files."""


def open_batches(path: str | Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The schema and batches of an Arrow IPC file or stream, mapped into memory.

    Lengths of columns and buffers are checked, values are not: use :class:`BinaryColumn` or :func:`checked`.

    Raises:
        LrfaceError: no Arrow file, damaged, cut off, compressed, or with dictionary columns.
    """
    path = Path(path)
    try:
        return _read_batches(path)
    except ARROW_ERRORS as error:
        raise LrfaceError(f"{path}: is not a readable Arrow file ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    mapped = pa.memory_map(str(path), "r")
    if mapped.size() < 8:
        raise ValueError("it is cut off")
    is_file = mapped.read(8) == FILE_MAGIC
    if is_file:
        if mapped.size() < 20:
            raise ValueError("it is cut off")
        mapped.seek(mapped.size() - 6)
        if mapped.read(6) != b"ARROW1":
            raise ValueError("it does not end as an Arrow file does: it was cut off")
    mapped.seek(8 if is_file else 0)
    messages = pa.ipc.MessageReader.open_stream(mapped)
    try:
        first = messages.read_next_message()
    except StopIteration:
        raise ValueError("it holds no message") from None
    if first.type != "schema":
        raise ValueError(f"it begins with a message of the kind {first.type!r}")
    schema = pa.ipc.read_schema(first)
    check_names(schema)
    batches: list[pa.RecordBatch] = []
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return schema, batches
        if message.type != "record batch":
            raise ValueError(f"a message of the kind {message.type!r}, which is not read in place")
        if _is_compressed(memoryview(message.metadata)):
            raise ValueError("its columns are compressed; write it without compression to read it in place")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
        batches.append(batch)


def check_names(schema: pa.Schema) -> None:
    """Raise UnicodeDecodeError where a column, or a field of its type, has a name that is no UTF-8."""

    def check(kind: pa.DataType) -> None:
        for field in (
            (kind.field(number) for number in range(kind.num_fields)) if pa.types.is_nested(kind) else ()
        ):
            str(field.name)
            check(field.type)

    for field in schema:
        str(field.name)
        check(field.type)


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch message says that its buffers are compressed.

    The message is a flatbuffer (Arrow's format/Message.fbs), verified by pyarrow when it was read: a table's fields are
    found through its list of offsets, where field ``k`` has its place at 4 + 2k, or 0 when it is absent.
    """

    def number(position: int, size: int, signed: bool = False) -> int:
        if not 0 <= position <= len(metadata) - size:
            raise ValueError("a damaged message")
        return int.from_bytes(metadata[position : position + size], "little", signed=signed)

    def field(table: int, index: int) -> int:
        offsets = table - number(table, 4, signed=True)
        if 4 + 2 * index >= number(offsets, 2):
            return 0
        offset = number(offsets + 4 + 2 * index, 2)
        return table + offset if offset else 0

    message = number(0, 4)
    header = field(message, 2)  # Message.header
    if not header:
        raise ValueError("a message without content")
    batch = header + number(header, 4)
    return field(batch, 3) != 0  # RecordBatch.compression


def checked(array: pa.Array, what: str) -> pa.Array:
    """``array`` once all its values were found sound and present. Raises LrfaceError naming ``what``."""
    try:
        array.validate(full=True)
    except ARROW_ERRORS as error:
        raise LrfaceError(f"{what} is damaged ({_reason(error)})") from error
    if array.null_count:
        raise LrfaceError(f"{what} has {array.null_count} rows without a value")
    return array


class BinaryColumn:
    """A binary column over batches: ``view(row)`` is a memoryview of a value, a microsecond each.

    Args:
        arrays: binary or large_binary arrays; only their offsets are read here. A value that is absent is empty.
        what: for messages.

    Raises:
        LrfaceError: an offset lies outside the data.
    """

    def __init__(self, arrays: list[pa.Array], what: str):
        self.starts: list[int] = []
        self._offsets: list[Any] = []
        self._data: list[memoryview] = []
        self.rows = 0
        for array in arrays:
            wide = pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)
            kind = np.dtype(np.int64 if wide else np.int32)
            _, offset_buffer, data_buffer = array.buffers()
            data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
            count = len(array)
            held = 0 if offset_buffer is None else offset_buffer.size // kind.itemsize
            if count and held < array.offset + count + 1:
                raise LrfaceError(f"{what} is damaged: {held} offsets for {count} rows")
            if not count:
                continue
            offsets = np.frombuffer(offset_buffer, kind, count + 1, array.offset * kind.itemsize)
            if offsets[0] < 0 or offsets[-1] > len(data) or (offsets[1:] < offsets[:-1]).any():
                raise LrfaceError(f"{what} is damaged: its offsets lie outside its {len(data)} bytes")
            self.starts.append(self.rows)
            # A memoryview gives Python's integers three times as fast as an array does.
            self._offsets.append(offsets.data)
            self._data.append(data)
            self.rows += count

    def view(self, row: int) -> memoryview:
        """The value of ``row``, 0 <= row < rows."""
        batch = bisect_right(self.starts, row) - 1 if len(self.starts) > 1 else 0
        offsets = self._offsets[batch]
        row -= self.starts[batch]
        return self._data[batch][offsets[row] : offsets[row + 1]]
