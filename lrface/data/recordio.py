"""InsightFace's RecordIO training data (``train.rec``, ``train.idx``, ``property``), read in place and written.

The format, from dmlc-core's ``recordio.h`` and mxnet's ``recordio.py``, everything little-endian:

- A frame is ``0xced7230a`` (uint32), a uint32 whose upper 3 bits are the continuation flag and whose lower 29 bits are
  the length of what follows, and that many bytes, filled up with zeros to a multiple of 4.
- The flag is 0 for a whole record; 1, 2 and 3 are the first, a middle and the last part of one. Parts are joined with the
  magic number between them: a record is cut where its own bytes hold that number at a multiple of 4.
- A record begins with ``IRHeader``: flag uint32, label float32, id uint64, id2 uint64. With flag > 0 that many float32
  labels follow. The rest is the image file.
- ``.idx`` holds a line ``key TAB offset`` for every record. ``property`` holds ``classes,height,width``.

Two flavours are read. InsightFace's: record 0 has no image but two labels; images are the records 1 to the first label
(excluded), and the records from there to the second label (excluded), one an identity, hold the range of its images.
Plain im2rec: every record is an image.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lrface.data.decode import EncodedFaces
from lrface.data.source import IDENTITIES_NAME, identity_names, read_identities, write_identities
from lrface.errors import LrfaceError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_LENGTH = (1 << 29) - 1
REC_NAME, IDX_NAME, PROPERTY_NAME = "train.rec", "train.idx", "property"

_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_MAX_LABELS = 1 << 16
_EXACT = 1 << 24  # up to here a float32 holds every whole number


class Record(NamedTuple):
    """One record: its labels (float32, at least one), id, and the image file (may be empty)."""

    labels: tuple[float, ...]
    flag: int
    id: int
    image: memoryview


class RecordFile:
    """A ``.rec`` file by position, memory-mapped; ``offsets`` int64 [n] are where records begin, ``keys`` int64 [n]
    their numbers, both in the order of the file. Can be pickled and survives a fork.

    ``rebuilt`` says why the index was made by walking through the file, which keeps nothing on disk; "" when the
    ``.idx`` file was good. A walk takes about half a second for a million records that are in memory, and reads one
    page of each where they are not.

    Raises:
        LrfaceError: the file is missing, empty, or does not begin with a record.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._open()
        self.rebuilt = ""
        index = self.path.with_suffix(".idx")
        try:
            self.keys, self.offsets = self._read_index(index)
        except LrfaceError as error:
            self.rebuilt = str(error)
            self.keys, self.offsets = self._walk()

    def _open(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = (
                "it is empty" if isinstance(error, ValueError) else getattr(error, "strerror", None) or error
            )
            raise LrfaceError(f"{self.path}: cannot be read: {reason}. Copy the file again") from error
        self._bytes = memoryview(self._map)
        self._size = len(self._bytes)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_map", "_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.offsets)

    def _read_index(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        from pyarrow import ArrowInvalid, csv, int64

        try:
            table = csv.read_csv(
                path,
                read_options=csv.ReadOptions(column_names=["key", "offset"], use_threads=False),
                parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
                convert_options=csv.ConvertOptions(
                    column_types={"key": int64(), "offset": int64()}, null_values=[]
                ),
            )
        except FileNotFoundError:
            raise LrfaceError(f"{path} does not exist") from None
        except (OSError, ArrowInvalid, MemoryError) as error:
            raise LrfaceError(f"{path} is damaged ({error})") from None
        keys, offsets = (table.column(name).to_numpy() for name in ("key", "offset"))
        if not len(keys):
            raise LrfaceError(f"{path} is empty")
        order = np.argsort(offsets, kind="stable")
        keys, offsets = keys[order], offsets[order]
        sound = (
            keys.min() >= 0
            and offsets[0] == 0
            and offsets[-1] <= self._size - _FRAME.size
            and not (offsets % 4).any()
            and (np.diff(offsets) >= _FRAME.size).all()
            and len(np.unique(keys)) == len(keys)
        )
        if sound:
            # A thousand records spread over the file: an index of another file does not fit.
            for at in np.unique(np.linspace(0, len(offsets) - 1, 1000).astype(np.int64)).tolist():
                end = offsets[at + 1] if at + 1 < len(offsets) else self._size
                if self._end(int(offsets[at])) != end:
                    sound = False
                    break
        if not sound:
            raise LrfaceError(f"{path} does not fit {self.path.name}")
        return keys, offsets

    def _frame(self, offset: int) -> tuple[int, int, int]:
        """(continuation flag, first byte, byte behind the last) of the frame at ``offset``."""
        if offset + _FRAME.size > self._size:
            raise LrfaceError(
                f"{self.path}: ends within a record at byte {offset}: it was cut off. Copy it again"
            )
        magic, word = _FRAME.unpack_from(self._bytes, offset)
        if magic != MAGIC:
            raise LrfaceError(
                f"{self.path}: no record at byte {offset}: found {magic:#010x}, expected {MAGIC:#010x}. Delete "
                f"{self.path.with_suffix('.idx').name} where the two do not belong together (it is rebuilt), else copy "
                "both again"
            )
        start = offset + _FRAME.size
        end = start + (word & MAX_LENGTH)
        if end > self._size:
            raise LrfaceError(
                f"{self.path}: the record at byte {offset} says {word & MAX_LENGTH} bytes, {self._size - start} are "
                "left: the file was cut off or is damaged. Copy it again"
            )
        return word >> 29, start, end

    def _end(self, offset: int) -> int:
        """Where the record after the one at ``offset`` begins; -1 when there is no whole record."""
        try:
            flag, _, end = self._frame(offset)
            while flag in (1, 2):
                flag, _, end = self._frame(-(-end // 4) * 4)
        except LrfaceError:
            return -1
        return min(-(-end // 4) * 4, self._size)

    def _walk(self) -> tuple[np.ndarray, np.ndarray]:
        """Every whole record from the start of the file; keys are their numbers. The last may be cut off."""
        starts: list[int] = []
        append, unpack, data = starts.append, _FRAME.unpack_from, self._bytes
        position, last = 0, self._size - _FRAME.size
        while position <= last:
            magic, word = unpack(data, position)
            end = position + 8 + ((word & MAX_LENGTH) + 3 & ~3)
            if magic != MAGIC or position + 8 + (word & MAX_LENGTH) > self._size:
                break
            if word >> 29 < 2:
                append(position)
            position = end
        if not starts:
            raise LrfaceError(
                f"{self.path}: does not begin with a RecordIO record (magic number {MAGIC:#010x}): it is of another "
                "format, damaged or cut off"
            )
        if position < self._size:
            self.rebuilt += (
                f"; records end at byte {position} of {self._size}, the rest is damaged or cut off"
            )
            # What began as a record of several parts must have its last one.
            if self._end(starts[-1]) < 0:
                starts.pop()
        offsets = np.asarray(starts, dtype=np.int64)
        return np.arange(len(offsets), dtype=np.int64), offsets

    def read(self, offset: int) -> memoryview:
        """The bytes of the record that begins at byte ``offset``, header included; not copied where it is of one part.

        Raises:
            LrfaceError: there is no whole record.
        """
        data = self._bytes
        # Written out for speed: this is the way of nearly every record.
        if offset + 8 <= self._size:
            magic, length = _FRAME.unpack_from(data, offset)
            end = offset + 8 + length
            if magic == MAGIC and length <= MAX_LENGTH and end <= self._size:
                return data[offset + 8 : end]
        flag, start, end = self._frame(offset)
        if flag != 1:
            raise LrfaceError(
                f"{self.path}: the record at byte {offset} has the continuation flag {flag}, a record begins with 0 "
                "or 1: the file is damaged. Copy it again"
            )
        parts = [bytes(data[start:end])]
        while flag != 3:
            following = -(-end // 4) * 4
            flag, start, end = self._frame(following)
            if flag not in (2, 3):
                raise LrfaceError(
                    f"{self.path}: the record at byte {offset} lacks its last part at byte {following}: the file is "
                    "damaged. Copy it again"
                )
            parts.append(bytes(data[start:end]))
        return memoryview(MAGIC_BYTES.join(parts))

    def record(self, offset: int) -> Record:
        """The record that begins at byte ``offset``, taken apart. Raises LrfaceError."""
        data = self.read(offset)
        try:
            flag, label, number, _ = _HEADER.unpack_from(data)
            if not flag:
                return Record((label,), 0, number, data[_HEADER.size :])
            if flag <= _MAX_LABELS:
                labels = struct.unpack_from(f"<{flag}f", data, _HEADER.size)
                return Record(labels, flag, number, data[_HEADER.size + 4 * flag :])
        except struct.error:
            pass
        raise LrfaceError(
            f"{self.path}: the record at byte {offset} has no image header (IRHeader) in its "
            f"{len(data)} bytes: the file is damaged. Copy it again"
        )

    def labels(self, starts: np.ndarray) -> np.ndarray:
        """The first label of each record that begins at ``starts`` (int64 [n]), float32 [n]. Raises LrfaceError."""
        found = np.empty(len(starts), dtype=np.float32)
        words = np.frombuffer(self._bytes, np.uint8)
        # Gathered 64 Ki records at a time: frame, flag and label of most, and the first extra label of others.
        for begin in range(0, len(starts), 1 << 16):
            offsets = starts[begin : begin + (1 << 16)]
            fits = offsets + 36 <= self._size
            simple = np.zeros(len(offsets), dtype=bool)
            if fits.any():
                gathered = words[np.where(fits, offsets, 0)[:, None] + np.arange(36)]
                numbers = gathered.view(
                    "<u4"
                )  # magic, length, flag, label, id (2), id2 (2), first extra label
                lengths, flags = numbers[:, 1], numbers[:, 2]
                simple = (
                    fits
                    & (numbers[:, 0] == MAGIC)
                    & (lengths <= MAX_LENGTH)
                    & (offsets + 8 + lengths <= self._size)
                    & (flags <= _MAX_LABELS)
                    & (lengths >= _HEADER.size + 4 * flags.astype(np.int64))
                )
                values = np.where(flags == 0, numbers[:, 3], numbers[:, 8]).view("<f4")
                found[begin : begin + len(offsets)] = values
            for at in np.flatnonzero(~simple).tolist():
                found[begin + at] = self.record(int(offsets[at])).labels[0]
        return found


def find_record_file(path: str | Path) -> Path | None:
    """The ``.rec`` file that ``path`` is or holds (``train.rec``, else the only one); None when there is none."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".rec" else None
    if (path / REC_NAME).is_file():
        return path / REC_NAME
    found = sorted(path.glob("*.rec"))
    if len(found) > 1:
        raise LrfaceError(
            f"{path} holds {len(found)} record files ({', '.join(file.name for file in found[:5])}); name one of them"
        )
    return found[0] if found else None


class RecordIOSource(EncodedFaces):
    """InsightFace training data, ``FOLDER/train.rec`` or a ``.rec`` file, as a source of faces.

    Implements FaceSource. Labels are the numbers in the records. Where record 0 gives the ranges of images, labels are
    taken from the first and last image of each range, which spares a read of every record; otherwise from each record.
    Names of identities are taken from ``identities.json`` beside the file (``lrface pack`` writes it), else they are the
    labels. ``declared`` is (classes, height, width) from the file ``property``, or None.

    Raises:
        LrfaceError: no such file, no record in it, no image, or labels that are no whole numbers from 0.
    """

    format = "recordio"
    repair = "Remove the record or copy the data again"

    def __init__(self, path: str | Path):
        found = find_record_file(path)
        if found is None:
            raise LrfaceError(
                f"{path}: no record file; expected {Path(path) / REC_NAME} or another .rec file"
            )
        self.path = found
        self.records = RecordFile(found)
        self.declared = self._read_property()
        first = self.records.record(int(self.records.offsets[0]))
        self.with_header = len(first.labels) == 2 and first.flag == 2 and not len(first.image)
        # Where records begin and their numbers, int64 [n] each.
        self._offsets, self._keys, self.labels = self._headed(first) if self.with_header else self._plain()
        self._starts = self._offsets.data  # a memoryview gives integers three times as fast as the array
        names = read_identities(found.parent / IDENTITIES_NAME, self.labels)
        self.identities: list[str] = identity_names(self.labels, found) if names is None else names

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_starts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._starts = self._offsets.data

    def _read_property(self) -> tuple[int, int, int] | None:
        with suppress(OSError, ValueError):
            text = (self.path.parent / PROPERTY_NAME).read_bytes()[:200].decode("ascii")
            classes, height, width = (int(part) for part in text.strip().split(","))
            return classes, height, width
        return None

    def _plain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        offsets = self.records.offsets
        return offsets, self.records.keys, self._whole(self.records.labels(offsets))

    def _headed(self, first: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        begin, end = first.labels
        if not (begin.is_integer() and 1 <= begin <= 1 << 40):
            raise LrfaceError(
                f"{self.path}: record 0 says that images end before record {begin}, which is no record number. Copy "
                "the file again"
            )
        # In the order of the keys, which are usually 0, 1, 2, ... in the file already.
        order = np.argsort(self.records.keys, kind="stable")
        keys, offsets = self.records.keys[order], self.records.offsets[order]
        low, high = np.searchsorted(keys, [1, int(begin)]).tolist()
        if begin > _EXACT:
            # A float32 has rounded the number: the records around it tell where images end.
            while high < len(keys) and len(self.records.record(int(offsets[high])).image):
                high += 1
            while high > low and not len(self.records.record(int(offsets[high - 1])).image):
                high -= 1
        if high == low:
            raise LrfaceError(f"{self.path}: it holds no image (record 0 says images 1 to {int(begin) - 1})")
        last = int(np.searchsorted(keys, int(end))) if begin < end <= _EXACT else high
        keys, starts, ranges = keys[low:high], offsets[low:high], offsets[high:last]
        labels = self._from_ranges(ranges, starts, keys)
        return starts, keys, self._whole(self.records.labels(starts)) if labels is None else labels

    def _from_ranges(self, ranges: np.ndarray, starts: np.ndarray, keys: np.ndarray) -> np.ndarray | None:
        """Labels by the identities' ranges, None where these do not cover the images exactly."""
        if not len(ranges) or keys[0] != 1 or keys[-1] != len(keys):
            return None
        bounds = np.empty((len(ranges), 2), dtype=np.float64)
        for row, offset in enumerate(ranges.tolist()):
            try:
                record = self.records.record(offset)
            except LrfaceError:
                return None
            if len(record.labels) != 2:
                return None
            bounds[row] = record.labels
        if not np.isfinite(bounds).all() or bounds.max() > _EXACT:
            return None
        ends = bounds[bounds[:, 1] > bounds[:, 0]].astype(np.int64)
        ends = ends[np.argsort(ends[:, 0], kind="stable")]
        chained = len(ends) and ends[0, 0] == 1 and ends[-1, 1] == len(keys) + 1
        if not chained or (ends[1:, 0] != ends[:-1, 1]).any():
            return None
        first = self._whole(self.records.labels(starts[ends[:, 0] - 1]))
        last = self._whole(self.records.labels(starts[ends[:, 1] - 2]))
        if (first != last).any():
            return None
        return np.repeat(first, ends[:, 1] - ends[:, 0])

    def _whole(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            labels = values.astype(np.int64)
        wrong = np.flatnonzero((values != labels) | ~np.isfinite(values))
        if len(wrong):
            raise LrfaceError(
                f"{self.path}: image {wrong[0]} has the label {values[wrong[0]]}; an identity is a whole number"
            )
        return labels

    def __len__(self) -> int:
        return len(self._offsets)

    def view(self, index: int) -> memoryview:
        """The image file ``index``, not copied. Raises IndexError, or LrfaceError for a damaged record."""
        data = self.records.read(self._starts[index])
        if len(data) >= 24 and data[:4] == b"\0\0\0\0":  # no further labels
            return data[24:]
        return self.records.record(self._starts[index]).image

    def encoded(self, index: int) -> bytes:
        """The image file ``index`` as it is stored."""
        return bytes(self.view(index))

    def place(self, index: int) -> str:
        return f"{self.path}: record {self._keys[index]}"

    def sources(self) -> list[str]:
        """IDENTITY/KEY: the record's number, since the format has no names."""
        keys = self._keys.tolist()
        names = self.identities
        return [f"{names[label]}/{key:08d}" for label, key in zip(self.labels.tolist(), keys, strict=True)]


class RecordWriter:
    """Writes ``train.rec``, ``train.idx``, ``property`` and ``identities.json`` in InsightFace's flavour into a folder.

    The folder is the caller's to make and to rename into place once :meth:`finish` has returned. Record 0 comes first
    but is known last, so its place is kept and filled in the end. Images of one label must follow each other for the
    identities' ranges; where they do not, the file gets no range records, which InsightFace's ArcFace readers do not
    need.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int]):
        self.folder = Path(folder)
        self.size = size
        self._rec: BinaryIO = open(self.folder / REC_NAME, "wb")
        self._idx: BinaryIO = open(self.folder / IDX_NAME, "wb")
        self._key = 0
        self._position = 0
        self._ranges: list[tuple[int, int, int]] = []  # label, first key, key behind the last
        self._write((0.0, 0.0), b"")

    def _write(self, labels: tuple[float, ...], image: bytes) -> None:
        if len(labels) == 1:
            data = _HEADER.pack(0, labels[0], self._key, 0) + image
        else:
            data = (
                _HEADER.pack(len(labels), 0.0, self._key, 0)
                + struct.pack(f"<{len(labels)}f", *labels)
                + image
            )
        frames = b"".join(_frames(data))
        self._idx.write(b"%d\t%d\n" % (self._key, self._position))
        self._rec.write(frames)
        self._key += 1
        self._position += len(frames)

    def add(self, image: bytes, label: int) -> None:
        """Append an image file. Raises LrfaceError when it is too large for a record or the label for a float32."""
        if len(image) > MAX_LENGTH - 64:
            raise LrfaceError(
                f"image {self._key} has {len(image)} bytes; a record holds at most {MAX_LENGTH}"
            )
        if label > _EXACT:
            raise LrfaceError(f"label {label}: the format holds labels as float32, exact up to {_EXACT}")
        if self._ranges and self._ranges[-1][0] == label:
            self._ranges[-1] = (label, self._ranges[-1][1], self._key + 1)
        else:
            self._ranges.append((label, self._key, self._key + 1))
        self._write((float(label),), image)

    def finish(self, identities: list[str]) -> bool:
        """Write ranges, record 0 and the files beside; returns whether there are ranges."""
        end = self._key
        by_label = {label: (first, last) for label, first, last in self._ranges}
        ranged = len(by_label) == len(self._ranges) and end + len(identities) <= _EXACT
        if ranged:
            for label in range(len(identities)):
                first, last = by_label.get(label, (end, end))
                self._write((float(first), float(last)), b"")
        header = (float(end), float(self._key))
        if end > _EXACT:
            # Rounded down, so that no reader looks for a record that is not there.
            below = np.float32(end)
            below = np.nextafter(below, np.float32(0)) if int(below) > end else below
            header = (float(below), float(below))
        self._rec.seek(0)
        self._rec.write(b"".join(_frames(_HEADER.pack(2, 0.0, 0, 0) + struct.pack("<2f", *header))))
        self.close()
        height, width = self.size
        (self.folder / PROPERTY_NAME).write_text(f"{len(identities)},{height},{width}")
        write_identities(self.folder / IDENTITIES_NAME, identities)
        return ranged

    def close(self) -> None:
        self._rec.close()
        self._idx.close()


def _frames(data: bytes) -> Iterator[bytes]:
    """The frames of one record: cut where the magic number stands at a multiple of 4, which is left out."""
    cuts = []
    at = data.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
            at = data.find(MAGIC_BYTES, at + 4)
        else:
            at = data.find(MAGIC_BYTES, at + 1)
    starts = [0, *(cut + 4 for cut in cuts)]
    ends = [*cuts, len(data)]
    for part, (start, end) in enumerate(zip(starts, ends, strict=True)):
        flag = 0 if not cuts else 1 if part == 0 else 3 if part == len(cuts) else 2
        length = end - start
        yield _FRAME.pack(MAGIC, flag << 29 | length) + data[start:end] + bytes(-length % 4)
