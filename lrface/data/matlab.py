"""MATLAB files of level 5 (``save`` without ``-v7.3``), read without trusting them: TinyFace's and AgeDB's lists.

Written after MathWorks' "MAT-File Format": a header of 128 bytes, then data elements of an 8-byte tag (type,
length) or a 4-byte one (length in its upper half, up to 4 bytes of data), padded to 8 bytes, possibly
deflated. Lengths are checked against what is there before anything is made of them; what a file may unfold
into is bounded by :data:`MAXIMUM_BYTES` and :data:`MAXIMUM_ARRAYS`.
"""

import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lrface.errors import LrfaceError

MAXIMUM_BYTES = 64 * 2**20
"""Of a file, and of all that it unfolds into. AgeDB's and TinyFace's lists have well under one MB."""

MAXIMUM_ARRAYS = 500_000
"""Arrays, cells and structure elements of one file, all together; AgeDB's list has about 60,000."""

_MAXIMUM_DEPTH = 32
_MAXIMUM_DIMENSIONS = 8

_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = range(6, 16)
_COMPLEX = 0x08


def read_matlab(path: str | Path) -> dict[str, Any]:
    """The variables of a MATLAB file of level 5.

    Numbers become arrays of the file's shape, in the type that they are stored in (MATLAB stores doubles that
    are small whole numbers as bytes); a row of characters a ``str``, several rows a list of ``str``; cells an
    array of objects of the file's shape; structures an array of ``dict``. What else MATLAB has (sparse and
    complex arrays, objects, functions) becomes None.

    Raises:
        LrfaceError: no such file, another format (level 4, 7.3), a damaged or truncated file, or one that
            unfolds into more than this module allows.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > MAXIMUM_BYTES:
            raise LrfaceError(
                f"{file}: {size / 2**20:.0f} MiB; a list in a MATLAB file has less than "
                f"{MAXIMUM_BYTES // 2**20} MiB. Is this another kind of file?"
            )
        data = file.read_bytes()
    except OSError as error:
        raise LrfaceError(f"{file}: cannot be read: {error.strerror or error}") from error
    return _Reader(data, str(file)).variables()


class _Reader:
    def __init__(self, data: bytes, origin: str):
        self.data = memoryview(data)
        self.origin = origin
        self.order = "<"
        self.bytes_left = MAXIMUM_BYTES
        self.arrays_left = MAXIMUM_ARRAYS

    def broken(self, what: str) -> NoReturn:
        raise LrfaceError(f"{self.origin}: not a readable MATLAB file (level 5): {what}. Copy the file again")

    def variables(self) -> dict[str, Any]:
        if len(self.data) < 128:
            self.broken(f"it has {len(self.data)} bytes, the header alone has 128")
        if bytes(self.data[:4]).count(0):
            self.broken("it is none, or one of level 4; save it in MATLAB with '-v7'")
        mark = bytes(self.data[126:128])
        if mark not in (b"IM", b"MI"):
            self.broken("the header does not end with the mark of the byte order")
        self.order = "<" if mark == b"IM" else ">"
        version = struct.unpack(f"{self.order}H", self.data[124:126])[0]
        if version != 0x0100:
            kind = "of version 7.3 (HDF5)" if version == 0x0200 else f"of version 0x{version:04x}"
            self.broken(f"it is {kind}; save it in MATLAB with '-v7'")
        found: dict[str, Any] = {}
        position = 128
        while position < len(self.data):
            code, content, position = self.element(self.data, position)
            if code == _COMPRESSED:
                content = self.inflate(content)
                code, content, _ = self.element(content, 0)
            if code == _MATRIX:
                name, value = self.matrix(content, 0)
                found[name] = value
        return found

    def inflate(self, content: memoryview) -> memoryview:
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(content, self.bytes_left + 1)
        except zlib.error as error:
            self.broken(f"a compressed part is damaged ({error})")
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise LrfaceError(
                f"{self.origin}: refused: it unfolds into more than {MAXIMUM_BYTES // 2**20} MiB; no list of "
                "images is so large"
            )
        if not inflater.eof:
            self.broken("a compressed part is cut short")
        return memoryview(data)

    def element(self, data: memoryview, position: int) -> tuple[int, memoryview, int]:
        """The type and content of the element at a position, and where the next one starts."""
        if position + 8 > len(data):
            self.broken("it is cut short")
        first, size = struct.unpack_from(f"{self.order}II", data, position)
        if first >> 16:
            code, size, start, end = first & 0xFFFF, first >> 16, position + 4, position + 8
            if size > 4:
                self.broken(f"a short element of {size} bytes")
        else:
            code, start = first, position + 8
            end = start + size
            if end > len(data):
                self.broken(f"it is cut short: {size} bytes are announced, {len(data) - start} are left")
            if code != _COMPRESSED:  # the only one that is not padded
                end = start + (size + 7) // 8 * 8
        return code, data[start : start + size], end

    def numbers(self, data: memoryview, position: int) -> tuple[np.ndarray, int]:
        code, content, position = self.element(data, position)
        if code not in _NUMBERS:
            self.broken(f"numbers of the unknown type {code}")
        kind = np.dtype(self.order + _NUMBERS[code])
        if len(content) % kind.itemsize:
            self.broken(f"{len(content)} bytes of numbers that have {kind.itemsize} each")
        return np.frombuffer(content, dtype=kind), position

    def charge(self, count: int) -> None:
        self.arrays_left -= count
        if self.arrays_left < 0:
            raise LrfaceError(
                f"{self.origin}: refused: it announces more than {MAXIMUM_ARRAYS:,} arrays; no list of images "
                "has so many"
            )

    def matrix(self, data: memoryview, depth: int) -> tuple[str, Any]:
        """Name and value of an array (its element's content)."""
        if depth > _MAXIMUM_DEPTH:
            self.broken(f"arrays are nested more than {_MAXIMUM_DEPTH} deep")
        self.charge(1)
        if not len(data):
            return "", np.empty((0, 0))
        flags, position = self.numbers(data, 0)
        if len(flags) != 2:
            self.broken("an array without flags")
        kind, bits = int(flags[0]) & 0xFF, int(flags[0]) >> 8 & 0xFF
        sizes, position = self.numbers(data, position)
        shape = tuple(int(size) for size in sizes) if sizes.dtype.kind != "f" else ()
        if (
            not 1 <= len(shape) <= _MAXIMUM_DIMENSIONS
            or min(shape) < 0
            or prod(max(1, size) for size in shape) > 2**40
        ):
            self.broken("an array whose shape is no shape")
        _, raw_name, position = self.element(data, position)
        name = bytes(raw_name).decode("latin-1")
        if kind == _CELL:
            return name, self.cells(data, position, shape, depth)
        if kind == _STRUCT:
            return name, self.structures(data, position, shape, depth)
        if kind == _CHAR:
            return name, self.characters(data, position, shape)
        if kind in _NUMERIC and not bits & _COMPLEX:
            values, _ = self.numbers(data, position)
            if len(values) != prod(shape):
                self.broken(f"an array of shape {shape} holds {len(values)} numbers")
            return name, values.reshape(shape, order="F")
        return name, None

    def objects(self, items: list[Any], shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            array[index] = item
        return array.reshape(shape, order="F")

    def inner(self, data: memoryview, position: int, depth: int) -> tuple[Any, int]:
        code, content, position = self.element(data, position)
        if code != _MATRIX:
            self.broken(f"an array is expected, found an element of type {code}")
        return self.matrix(content, depth + 1)[1], position

    def cells(self, data: memoryview, position: int, shape: tuple[int, ...], depth: int) -> np.ndarray:
        self.charge(prod(shape))
        items = []
        for _ in range(prod(shape)):
            item, position = self.inner(data, position, depth)
            items.append(item)
        return self.objects(items, shape)

    def structures(self, data: memoryview, position: int, shape: tuple[int, ...], depth: int) -> np.ndarray:
        lengths, position = self.numbers(data, position)
        _, raw, position = self.element(data, position)
        length = int(lengths[0]) if len(lengths) == 1 and lengths.dtype.kind != "f" else 0
        if length < 1 or len(raw) % length:
            self.broken("a structure without names of its fields")
        fields = [
            bytes(raw[start : start + length]).split(b"\0")[0].decode("latin-1")
            for start in range(0, len(raw), length)
        ]
        self.charge(prod(shape) * max(1, len(fields)))
        items = []
        for _ in range(prod(shape)):
            item: dict[str, Any] = {}
            for field in fields:
                item[field], position = self.inner(data, position, depth)
            items.append(item)
        return self.objects(items, shape)

    def characters(self, data: memoryview, position: int, shape: tuple[int, ...]) -> str | list[str]:
        code, content, _ = self.element(data, position)
        if code not in _TEXTS:
            self.broken(f"characters of the unknown type {code}")
        encoding = _TEXTS[code]
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if self.order == "<" else "-be"
        try:
            text = bytes(content).decode(encoding)
        except UnicodeDecodeError as error:
            self.broken(f"characters that are not valid {encoding} ({error.reason})")
        rows = shape[0]
        if rows <= 1:
            return text
        if rows * prod(shape[1:]) != len(text):
            self.broken(f"{len(text)} characters for the shape {shape}")
        self.charge(rows)
        return [text[row::rows] for row in range(rows)]
