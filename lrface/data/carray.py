"""Faces as arrays of normalised pixels: bcolz carrays of InsightFace_Pytorch and AdaFace's memfiles.

Both hold float32 [n, 3, height, width], BGR, ``(x / 255 - 0.5) / 0.5``:

- ``NAME/`` is a bcolz carray: ``meta/sizes`` and ``meta/storage`` (JSON), and ``data/__0.blp``, ``data/__1.blp``, ...,
  each 16 bytes of Bloscpack header and one Blosc chunk of the same number of images (the last may be shorter).
- ``NAME/memfile/mem_file.dat`` is the array as it is in memory, ``mem_file.dat.conf`` its shape and dtype (JSON).

As a verification set, pairs are the images 2k and 2k + 1, and ``NAME_list.npy`` beside the folder says which pairs are of
one person (bool [n/2]). As training data, which is lrface's own use, ``NAME_labels.npy`` (int64 [n]) and
``NAME_identities.json`` lie beside.

Chunks are handed to Blosc only after their headers were found to fit the file and the array, one at a time.
"""

import ast
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lrface.data.source import IDENTITIES_NAME, identity_names, read_identities
from lrface.errors import LrfaceError
from lrface.files import read_json

MEMFILE = Path("memfile") / "mem_file.dat"
MAX_CHUNK_BYTES = 1 << 30
MAX_IMAGES = 1 << 32

_BLOSC = struct.Struct("<BBBBIII")  # versions, flags, type size, bytes, block size, bytes when compressed


def is_carray(path: str | Path) -> bool:
    """Whether ``path`` is a bcolz carray or holds a memfile."""
    path = Path(path)
    return (path / "meta" / "storage").is_file() or _memfile(path) is not None


def _memfile(path: Path) -> Path | None:
    for place in (path / MEMFILE, path / MEMFILE.name):
        if place.is_file():
            return place
    return None


def _name(path: Path) -> Path:
    """The path that NAME_list.npy is named after."""
    path = path.absolute()
    return path.parent if path.name == "memfile" else path


def pairs_path(path: str | Path) -> Path:
    """NAME_list.npy of the carray or memfile ``path``."""
    name = _name(Path(path))
    return name.with_name(f"{name.name}_list.npy")


def find_pairs(path: str | Path) -> Path | None:
    """The list of pairs of the carray or memfile ``path``; None when it is none, or has no such list."""
    return pairs_path(path) if is_carray(path) and pairs_path(path).is_file() else None


def to_pixels(values: np.ndarray, place: str) -> np.ndarray:
    """float32 [3, h, w], BGR, in [-1, 1] -> uint8 [h, w, 3], RGB: exactly what :func:`from_pixels` was given.

    Raises:
        LrfaceError: a value that no pixel is normalised to.
    """
    pixels = np.rint((values.astype(np.float32) + np.float32(1)) * np.float32(127.5))
    if not (pixels.min() >= 0 and pixels.max() <= 255):  # also where one is not a number
        raise LrfaceError(
            f"{place} has values from {values.min():.4g} to {values.max():.4g}; pixels normalised as "
            "(x / 255 - 0.5) / 0.5 lie between -1 and 1. It is damaged or was made in another way"
        )
    return np.ascontiguousarray(pixels.astype(np.uint8)[::-1].transpose(1, 2, 0))


def from_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3], RGB -> float32 [3, h, w], BGR, ``(x / 255 - 0.5) / 0.5``."""
    values = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32)
    values /= np.float32(255)
    values -= np.float32(0.5)
    values /= np.float32(0.5)
    return values


def _shape(value: Any, place: Path) -> tuple[int, int, int, int]:
    """The checked shape of an array of images."""
    sound = (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
        and value[1] == 3
        and 0 <= value[0] <= MAX_IMAGES
        and all(1 <= side <= 1 << 13 for side in value[2:])
    )
    if not sound:
        raise LrfaceError(f"{place}: field 'shape' should be [n, 3, height, width], found {str(value)[:80]}")
    return value[0], value[1], value[2], value[3]


class CarrayPixels:
    """The images of a carray or memfile, without labels: ``len()`` and ``image(index)`` (uint8 [h, w, 3], RGB).

    Where a carray and a memfile made from it are both there, the carray is read: a memfile whose making was interrupted
    looks whole. Can be pickled and survives a fork.

    Raises:
        LrfaceError: metadata or chunks that are missing or damaged, or arrays of another kind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        memfile = _memfile(self.path)
        if (self.path / "meta" / "storage").is_file():
            self.format = "bcolz"
            self._read_carray()
        elif memfile is not None:
            self.format = "memfile"
            self._read_memfile(memfile)
        else:
            raise LrfaceError(f"{path}: neither a bcolz carray (meta/storage) nor a memfile ({MEMFILE})")
        self._reset()

    def _reset(self) -> None:
        self._cached = -1
        self._chunk = np.empty(0, np.float32)
        self._mapped: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_chunk", "_mapped", "_cached")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _read_carray(self) -> None:
        sizes = self.path / "meta" / "sizes"
        storage = self.path / "meta" / "storage"
        self._shape = _shape(read_json(sizes, "sizes of a bcolz carray").get("shape"), sizes)
        settings = read_json(storage, "storage of a bcolz carray")
        self._dtype = self._float(settings.get("dtype"), storage)
        chunk = settings.get("chunklen")
        item = self._item_bytes()
        if not isinstance(chunk, int) or isinstance(chunk, bool) or not 1 <= chunk <= MAX_CHUNK_BYTES // item:
            raise LrfaceError(
                f"{storage}: field 'chunklen' is {str(chunk)[:40]}; expected images a chunk, 1 to {MAX_CHUNK_BYTES // item}"
            )
        self._per_chunk = chunk
        count = -(-self._shape[0] // chunk)
        last = self._chunk_path(count - 1)
        if count and not last.is_file():
            raise LrfaceError(
                f"{last}: missing, but {sizes} says {self._shape[0]} images. Copy the folder again"
            )

    def _read_memfile(self, path: Path) -> None:
        self._file = path
        settings_path = path.with_name(path.name + ".conf")
        settings = read_json(settings_path, "shape of a memfile")
        self._shape = _shape(settings.get("shape"), settings_path)
        self._dtype = self._float(settings.get("dtype"), settings_path)
        expected = self._shape[0] * self._item_bytes()
        found = path.stat().st_size
        if found != expected:
            raise LrfaceError(
                f"{path}: has {found} bytes, {settings_path.name} says {expected}: it was cut off or belongs to another. "
                "Copy both again"
            )

    def _float(self, name: Any, place: Path) -> np.dtype:
        if name not in ("float32", "<f4", "float64", "<f8"):
            raise LrfaceError(f"{place}: field 'dtype' should be 'float32', found {str(name)[:40]!r}")
        return np.dtype(name)

    def _item_bytes(self) -> int:
        return int(np.prod(self._shape[1:], dtype=np.int64)) * self._dtype.itemsize

    def _chunk_path(self, number: int) -> Path:
        return self.path / "data" / f"__{number}.blp"

    def _decompress(self, number: int) -> np.ndarray:
        """Chunk ``number``: float [k, 3, h, w]."""
        from bcolz.carray_ext import chunk

        path = self._chunk_path(number)
        item = self._item_bytes()
        whole = self._per_chunk * item
        rows = min(self._per_chunk, self._shape[0] - number * self._per_chunk)
        try:
            if path.stat().st_size > whole + (1 << 20):
                raise LrfaceError(
                    f"{path}: has more bytes than {self._per_chunk} images: it is damaged. Copy it again"
                )
            raw = path.read_bytes()
        except OSError as error:
            raise LrfaceError(f"{path}: cannot be read: {error.strerror}. Copy the folder again") from error
        data = raw[16:]
        if raw[:4] != b"blpk" or len(data) < _BLOSC.size:
            raise LrfaceError(f"{path}: is no Bloscpack file: it is damaged or cut off. Copy it again")
        version, _, flags, type_size, size, block, packed = _BLOSC.unpack_from(data)
        if packed != len(data):
            raise LrfaceError(
                f"{path}: has {len(data)} bytes, its header says {packed}: it was cut off. Copy it again"
            )
        plain = flags & 2 and packed == size + _BLOSC.size
        sound = (
            version in (1, 2)
            and size in (whole, rows * item)
            and type_size == self._dtype.itemsize
            and 1 <= block <= size
            and not flags & 8
            and (plain or self._blocks_fit(data, size, block, packed))
        )
        if not sound:
            raise LrfaceError(f"{path}: its header does not fit {rows} images: it is damaged. Copy it again")
        _one_thread()
        try:
            unpacked = chunk(data, self._dtype, None, _memory=False, _compr=True).getudata()
        except (RuntimeError, ValueError, MemoryError) as error:
            raise LrfaceError(
                f"{path}: cannot be decompressed ({error}): it is damaged. Copy it again"
            ) from error
        values = np.frombuffer(unpacked, self._dtype)[: rows * item // self._dtype.itemsize]
        return values.reshape(rows, *self._shape[1:])

    @staticmethod
    def _blocks_fit(data: bytes, size: int, block: int, packed: int) -> bool:
        """Whether every block begins behind the table of beginnings and within the chunk."""
        count = -(-size // block)
        table = _BLOSC.size + 4 * count
        if table > packed:
            return False
        starts = np.frombuffer(data, "<i4", count, _BLOSC.size)
        return bool(starts.min() >= table and starts.max() < packed)

    def __len__(self) -> int:
        return self._shape[0]

    def place(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def image(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 [h, w, 3], RGB, exactly the pixels it was made from. Raises LrfaceError."""
        count = len(self)
        position = index + count if index < 0 else index
        if not 0 <= position < count:
            raise IndexError(f"image {index} of {count} in {self.path}")
        if self.format == "memfile":
            if self._mapped is None:
                self._mapped = np.memmap(self._file, self._dtype, "r", shape=self._shape)
            return to_pixels(self._mapped[position], self.place(position))
        number, row = divmod(position, self._per_chunk)
        if number != self._cached:
            self._chunk = self._decompress(number)
            self._cached = number
        return to_pixels(self._chunk[row], self.place(position))


def _one_thread() -> None:
    """Blosc's own threads would not survive a fork, and one is enough for a chunk of an image or a few."""
    import bcolz

    bcolz.blosc_set_nthreads(1)


class CarraySource(CarrayPixels):
    """A carray or memfile with labels beside it, as a source of faces. Implements FaceSource.

    Raises:
        LrfaceError: NAME_labels.npy is missing or does not fit; else as :class:`CarrayPixels`.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        name = _name(self.path)
        place = name.with_name(f"{name.name}_labels.npy")
        if not place.is_file():
            pairs = pairs_path(self.path)
            raise LrfaceError(
                f"{self.path}: {place.name} with the labels is missing beside it"
                + (
                    f"; with {pairs.name} it is a verification set: lrface verify --benchmark {name}"
                    if pairs.is_file()
                    else ", without which it is no training data"
                )
            )
        self.labels = read_array(place, "iu").astype(np.int64)
        if len(self.labels) != len(self):
            raise LrfaceError(f"{place}: has {len(self.labels)} labels for {len(self)} images in {self.path}")
        names = read_identities(name.with_name(f"{name.name}_{IDENTITIES_NAME}"), self.labels)
        self.identities: list[str] = identity_names(self.labels, place) if names is None else names

    def encoded(self, index: int) -> None:
        """None: the format holds pixels."""
        return None

    def sources(self) -> list[str]:
        """IDENTITY/NUMBER, since the format has no names."""
        return [f"{self.identities[label]}/{row:08d}" for row, label in enumerate(self.labels.tolist())]


def read_array(path: Path, kinds: str) -> np.ndarray:
    """A one-dimensional .npy array of one of the ``kinds`` ("b" bool, "i" and "u" whole numbers), whose size is checked
    before anything is allocated. Raises LrfaceError."""
    try:
        data = path.read_bytes() if path.stat().st_size < 1 << 33 else b""
        major = data[6] if data[:6] == b"\x93NUMPY" else 0
        start = {1: 10, 2: 12, 3: 12}[major]
        length = int.from_bytes(data[8:start], "little")
        header = ast.literal_eval(data[start : start + min(length, 10_000)].decode("latin1").strip())
        kind, (count,) = np.dtype(header["descr"]), header["shape"]
        if kind.kind in kinds and kind.itemsize <= 8 and count * kind.itemsize == len(data) - start - length:
            return np.frombuffer(data, kind, count, start + length)
        raise ValueError(f"{kind} {header['shape']} in {len(data)} bytes")
    except OSError as error:
        raise LrfaceError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, SyntaxError, IndexError, MemoryError, RecursionError) as error:
        wanted = "bool" if kinds == "b" else "whole numbers"
        raise LrfaceError(f"{path}: is no one-dimensional .npy array of {wanted} ({error})") from error


class CarrayWriter:
    """Writes a bcolz carray into a folder, an image at a time; the folder is the caller's to make and rename.

    Args:
        images: how many are expected, which only the size of chunks follows.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], images: int):
        import bcolz

        _one_thread()
        self._array: Any = bcolz.carray(
            np.empty((0, 3, *size), np.float32),
            rootdir=str(Path(folder) / "carray"),
            mode="w",
            expectedlen=max(1, images),
        )
        self._folder = Path(folder)
        self._one = np.empty((1, 3, *size), np.float32)

    def add(self, image: np.ndarray) -> None:
        """Append uint8 [h, w, 3], RGB."""
        # bcolz takes an array of stride 0, as indexing with None gives, for a repeated constant.
        self._one[0] = from_pixels(image)
        self._array.append(self._one)

    def close(self) -> None:
        self._array.flush()
        for entry in (self._folder / "carray").iterdir():
            entry.rename(self._folder / entry.name)
        (self._folder / "carray").rmdir()


class MemfileWriter:
    """Writes AdaFace's memfile into a folder, an image at a time; the folder is the caller's to make and rename."""

    def __init__(self, folder: str | Path, size: tuple[int, int]):
        path = Path(folder) / MEMFILE
        path.parent.mkdir()
        self._path, self._size, self._count = path, size, 0
        self._file = open(path, "wb")

    def add(self, image: np.ndarray) -> None:
        """Append uint8 [h, w, 3], RGB."""
        self._file.write(from_pixels(image).tobytes())
        self._count += 1

    def close(self) -> None:
        self._file.close()
        settings = {"shape": [self._count, 3, *self._size], "dtype": "float32"}
        self._path.with_name(self._path.name + ".conf").write_text(json.dumps(settings))
