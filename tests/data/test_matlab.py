import random
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from lrface.data.matlab import read_matlab
from lrface.errors import LrfaceError


def cell(items: list, shape: tuple[int, ...] = (-1, 1)) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


CONTENT = {
    "names": cell(["1_1.jpg", "22_1.jpg", ""]),
    "ids": np.array([[1], [22], [65_000]], np.uint16),
    "wide": cell([f"{n}" for n in range(6)], (2, 3)),
    "double": np.arange(6.0).reshape(2, 3) / 4,
    "single": np.float32([[1.5]]),
    "signed": np.array([[-1, 1]], np.int8),
    "long": np.array([[2**60]], np.int64),
    "deep": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    "flags": np.array([[True, False]]),
    "text": "a name that is longer than four bytes",
    "short": "hé",
    "rows": np.array(["abc", "def"]),
    "nothing": np.empty((0, 0)),
    "person": {"name": "Ann", "age": 20, "inner": {"x": np.arange(3)}},
}
UNSUPPORTED = {
    "complex": np.array([1 + 2j]),
    "sparse": __import__("scipy.sparse", fromlist=["a"]).eye(3).tocsc(),
}


@pytest.mark.parametrize("compress", [True, False])
def test_what_scipy_writes_is_read_alike(tmp_path, compress):
    scipy.io.savemat(tmp_path / "x.mat", CONTENT | UNSUPPORTED, do_compression=compress)
    found = read_matlab(tmp_path / "x.mat")
    expected = scipy.io.loadmat(tmp_path / "x.mat", chars_as_strings=True)
    assert set(found) == set(CONTENT) | set(UNSUPPORTED)
    for name in ("ids", "double", "single", "signed", "long", "deep", "flags", "nothing"):
        assert found[name].shape == expected[name].shape, name
        assert np.array_equal(found[name], expected[name]), name
    for name in ("names", "wide"):
        assert found[name].shape == expected[name].shape and found[name].dtype == object
        assert [value for value in found[name].flat] == [
            str(value[0]) if value.size else "" for value in expected[name].flat
        ]
    assert found["text"] == CONTENT["text"] and found["short"] == "hé" and found["rows"] == ["abc", "def"]
    person = found["person"]
    assert person.shape == (1, 1) and person[0, 0]["name"] == "Ann" and person[0, 0]["age"].item() == 20
    assert person[0, 0]["inner"][0, 0]["x"].tolist() == [[0, 1, 2]]
    assert found["complex"] is None and found["sparse"] is None


# files put together by hand, after the format's description


def element(code: int, content: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", code, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind: int, shape: tuple[int, ...], name: bytes, *parts: bytes, order: str = "<") -> bytes:
    head = element(6, struct.pack(f"{order}II", kind, 0), order)
    head += element(5, struct.pack(f"{order}{len(shape)}i", *shape), order) + element(1, name, order)
    return element(14, head + b"".join(parts), order)


def file_of(*elements: bytes, order: str = "<", version: int = 0x0100) -> bytes:
    mark = b"IM" if order == "<" else b"MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", version) + mark + b"".join(elements)


def compressed(data: bytes) -> bytes:
    packed = zlib.compress(data)
    return struct.pack("<II", 15, len(packed)) + packed


def write(tmp_path, data: bytes):
    path = tmp_path / "x.mat"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_are_read(tmp_path, order):
    numbers = element(9, struct.pack(f"{order}2d", 1.5, -2.0), order)
    text = element(4, "né".encode("utf-16-le" if order == "<" else "utf-16-be"), order)
    data = file_of(
        matrix(6, (1, 2), b"x", numbers, order=order), matrix(4, (1, 2), b"t", text, order=order), order=order
    )
    found = read_matlab(write(tmp_path, data))
    assert found["x"].tolist() == [[1.5, -2.0]] and found["t"] == "né"


EMPTY = element(14, b"")
BOMBS = {
    "unfolds": file_of(compressed(matrix(9, (1, 2**27), b"x", element(2, bytes(2**27))))),
    "unfolds many times": file_of(*[compressed(matrix(9, (1, 2**24), b"x", element(2, bytes(2**24))))] * 9),
    "many cells": file_of(compressed(matrix(1, (1, 600_000), b"x", EMPTY * 600_000))),
    "announced cells": file_of(matrix(1, (2**31 - 1, 2**31 - 1), b"x")),
    "announced structures": file_of(
        matrix(2, (2**31 - 1, 1), b"x", element(5, struct.pack("<i", 8)), element(1, b""))
    ),
    "announced numbers": file_of(matrix(6, (2**31 - 1, 1), b"x", element(9, bytes(8)))),
    "dimensions": file_of(matrix(6, (1,) * 200, b"x", element(9, bytes(8)))),
    "empty of all dimensions": file_of(matrix(1, (0,) + (2**31 - 1,) * 7, b"x")),
    "announced length": file_of(struct.pack("<II", 14, 2**32 - 1) + bytes(64)),
    "negative shape": file_of(matrix(6, (-1, -1), b"x", element(9, bytes(8)))),
    "rows": file_of(matrix(4, (10**6, 1), b"x", element(1, b"a" * 10**6))),
}


def nested(depth: int) -> bytes:
    inner = EMPTY
    for _ in range(depth):
        inner = matrix(1, (1, 1), b"", inner)
    return inner


BOMBS["nesting"] = file_of(nested(1000))


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_early(tmp_path, name):
    import resource

    path = write(tmp_path, BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LrfaceError) as stop:
        read_matlab(path)
    assert "x.mat" in str(stop.value) and len(str(stop.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # kilobytes


BROKEN = [
    (b"", "0 bytes"),
    (b"text" * 40, "mark of the byte order"),
    (b"\0" * 128, "level 4"),
    (file_of(version=0x0200), "version 7.3"),
    (file_of(version=0x0300), "version 0x0300"),
    (file_of(b"\x0e\0\0\0"), "cut short"),
    (file_of(struct.pack("<II", 15, 4) + b"abcd"), "damaged"),
    (file_of(struct.pack("<II", 15, 8) + zlib.compress(bytes(100))[:8]), "cut short"),
    (file_of(matrix(6, (1, 2), b"x", element(9, bytes(8)))), "holds 1 numbers"),
    (file_of(matrix(6, (1, 1), b"x", element(9, bytes(7)))), "7 bytes of numbers"),
    (file_of(matrix(6, (1, 1), b"x", element(99, bytes(8)))), "unknown type 99"),
    (file_of(matrix(4, (1, 1), b"x", element(99, b"a"))), "characters of the unknown type"),
    (file_of(matrix(4, (1, 1), b"x", element(16, b"\xff"))), "not valid utf-8"),
    (file_of(matrix(1, (1, 1), b"x", element(9, bytes(8)))), "an array is expected"),
    (file_of(matrix(2, (1, 1), b"x", element(5, bytes(4)), element(1, b"a"))), "names of its fields"),
    (file_of(element(14, element(6, bytes(4)))), "without flags"),
    (file_of(struct.pack("<HH", 14, 5) + bytes(4)), "short element of 5"),
]


@pytest.mark.parametrize("data, found", BROKEN)
def test_broken_files_are_explained(tmp_path, data, found):
    with pytest.raises(LrfaceError, match=found) as stop:
        read_matlab(write(tmp_path, data))
    assert "x.mat" in str(stop.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_matlab(tmp_path / "absent.mat")
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_matlab(tmp_path)
    with open(tmp_path / "large.mat", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(LrfaceError, match="65 MiB"):
        read_matlab(tmp_path / "large.mat")


def test_every_truncation_is_an_error_or_fewer_variables(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", CONTENT)
    whole = (tmp_path / "x.mat").read_bytes()
    names = list(CONTENT)
    for length in random.Random(0).sample(range(len(whole)), 200):
        try:
            found = read_matlab(write(tmp_path, whole[:length]))
        except LrfaceError:
            continue
        assert list(found) == names[: len(found)] and len(found) < len(names)
