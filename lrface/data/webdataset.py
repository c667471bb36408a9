"""WebDataset shards (tar files of samples), read in place and written.

A sample is the files of one name that follow each other: ``KEY.jpg`` (or jpeg, png, webp, bmp) and ``KEY.cls`` (the
label as text) or ``KEY.json`` (with ``label``); the key ends at the first dot behind the last slash. ``KEY.json`` may
name the ``identity`` and the ``source``. Tar headers are read once and kept in memory, images stay where they are.
"""

import json
import mmap
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lrface.data.decode import EncodedFaces
from lrface.data.source import identity_names
from lrface.errors import LrfaceError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "bmp")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

_BLOCK = 512
_MAX_NAME = 1 << 16  # bytes of a long name or of a pax header
_MAX_TEXT = 1 << 20  # bytes of a .cls or .json
_MAGICS = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


def find_shards(path: str | Path) -> list[Path]:
    """The shards that ``path`` is or holds, by name; empty where there are none.

    Raises:
        LrfaceError: there are compressed tar files, which cannot be read at random places.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    shards = [file for file in files if file.suffix == ".tar"]
    if not shards:
        for file in files:
            if file.name.lower().endswith(COMPRESSED):
                raise LrfaceError(f"{file}: {_COMPRESSED_ADVICE}")
    return shards


_COMPRESSED_ADVICE = (
    "is a compressed tar file, which cannot be read at random places. Unpack the compression (for example with gzip -d; "
    "images hardly shrink by it), and name the .tar"
)


class Member(NamedTuple):
    """A file in a tar file: its name, and where its bytes are."""

    name: str
    start: int
    size: int


def members(data: memoryview, place: str) -> Iterator[Member]:
    """The regular files of a tar file (ustar, GNU and pax long names).

    Raises:
        LrfaceError: a damaged header, or a member that ends behind the file.
    """
    position, length = 0, len(data)
    name: str | None = None
    size: int | None = None
    while position + _BLOCK <= length:
        block = bytes(data[position : position + _BLOCK])
        if block[0] == 0 and not any(block):
            return
        start = position + _BLOCK
        try:
            stored = int(block[148:156].strip(b" \0"), 8)
            written = _number(block[124:136])
        except ValueError:
            raise LrfaceError(
                f"{place}: no tar header at byte {position}: it is damaged. Copy it again"
            ) from None
        # The sum of the header's bytes, its own field taken as 8 spaces. Adler-32 has the sum of bytes in its lower half,
        # modulo 65521, and takes a hundredth of the time of adding them up.
        if zlib.adler32(block) & 0xFFFF != (1 + stored - 8 * 32 + sum(block[148:156])) % 65521:
            raise LrfaceError(
                f"{place}: the tar header at byte {position} does not match its checksum: it is damaged. Copy it again"
            )
        if written < 0 or start + written > length:
            raise LrfaceError(
                f"{place}: the member at byte {position} says {written} bytes, {length - start} are left: it was cut "
                "off or is damaged. Copy it again"
            )
        kind = block[156:157]
        if kind in (b"L", b"x"):
            if written > _MAX_NAME:
                raise LrfaceError(f"{place}: the name at byte {position} has {written} bytes: it is damaged")
            text = bytes(data[start : start + written])
            if kind == b"L":
                name = _text(text)
            else:
                fields = _pax(text)
                name = _text(fields[b"path"]) if b"path" in fields else name
                if b"size" in fields and fields[b"size"].isdigit():
                    size = int(fields[b"size"][:18])
        elif kind in (b"0", b"\0", b"7"):
            if size is not None and start + size > length:
                raise LrfaceError(f"{place}: the member at byte {position} says {size} bytes: it was cut off")
            if name is None:
                name = _text(block[:100])
                if block[257:262] == b"ustar" and block[263:265] == b"00" and block[345]:
                    name = f"{_text(block[345:500])}/{name}"
            written = written if size is None else size
            yield Member(name, start, written)
            name = size = None
        elif kind not in (b"K", b"g"):  # folders, links and devices
            name = size = None
        position = start + -(-written // _BLOCK) * _BLOCK
    if position < length and any(data[position:]):
        raise LrfaceError(
            f"{place}: ends within a tar header at byte {position}: it was cut off. Copy it again"
        )


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's binary form, for 8 GB and more
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.strip(b" \0")
    return int(text, 8) if text else 0


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n", LENGTH being that of the whole record."""
    fields: dict[bytes, bytes] = {}
    position = 0
    while match := re.compile(rb"(\d{1,6}) ([^=]+)=").match(text, position):
        end = position + int(match[1])
        if end <= match.end() or end > len(text):
            break
        fields[match[2]] = text[match.end() : end - 1]
        position = end
    return fields


class WebDatasetSource(EncodedFaces):
    """WebDataset shards as a source of faces. Implements FaceSource; can be pickled and survives a fork.

    Samples come in the order of the shards' names and of the tar files. Identities are named by the ``identity`` in
    ``KEY.json`` of the first sample of each, else by their labels.

    Raises:
        LrfaceError: no shard, a compressed or damaged one, a sample with an image and without a label, or labels that
            are no whole numbers from 0.
    """

    format = "webdataset"
    repair = "Remove the sample or copy the shard again"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shards = find_shards(self.path)
        if not self.shards:
            raise LrfaceError(f"{self.path}: no .tar file")
        self._maps: dict[int, memoryview] = {}
        shard, start, size, json_start, json_size = (array(kind) for kind in "iqqqq")
        labels = array("q")
        self._keys: list[str] = []
        for number, file in enumerate(self.shards):
            for sample in self._samples(number, file):
                image, text = sample.image, sample.json
                assert image is not None
                shard.append(number)
                start.append(image.start)
                size.append(image.size)
                json_start.append(text.start if text else 0)
                json_size.append(text.size if text else 0)
                labels.append(self._label(number, sample))
                self._keys.append(sample.key)
        if not self._keys:
            raise LrfaceError(
                f"{self.path}: no sample with an image ({', '.join(IMAGE_KINDS)}) in {len(self.shards)} tar files"
            )
        self._shard, self._start, self._size = shard, start, size
        self._json = json_start, json_size
        self.labels = np.frombuffer(labels, np.int64)
        self.identities = self._names()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _open(self, number: int) -> memoryview:
        file = self.shards[number]
        try:
            with open(file, "rb") as opened:
                mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            reason = "it is empty" if isinstance(error, ValueError) else error.strerror
            raise LrfaceError(f"{file}: cannot be read: {reason}. Copy it again") from error
        for magic in _MAGICS:
            if bytes(mapped[: len(magic)]) == magic:
                raise LrfaceError(f"{file}: {_COMPRESSED_ADVICE.replace('gzip -d', _MAGICS[magic])}")
        self._maps[number] = mapped
        return mapped

    def _samples(self, number: int, file: Path) -> Iterator["_Sample"]:
        sample = _Sample()
        for member in members(self._open(number), str(file)):
            folder, slash, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            key = folder + slash + stem
            if key != sample.key:
                if sample.image:
                    yield sample
                sample = _Sample(key)
            kind = kind.lower()
            if kind in IMAGE_KINDS:
                sample.image = member
            elif kind == "cls":
                sample.cls = member
            elif kind == "json":
                sample.json = member
        if sample.image:
            yield sample

    def _read(self, number: int, start: int, size: int) -> memoryview:
        data = self._maps.get(number)
        return (self._open(number) if data is None else data)[start : start + size]

    def _label(self, number: int, sample: "_Sample") -> int:
        place = f"{self.shards[number]}: sample {sample.key!r}"
        found: Any = None
        if sample.cls:
            text = bytes(self._read(number, sample.cls.start, min(sample.cls.size, 100)))
            try:
                found = int(text)
            except ValueError:
                raise LrfaceError(f"{place}: its .cls is {text[:30]!r}, no whole number") from None
        elif sample.json:
            found = self._fields(number, sample.json.start, sample.json.size, place).get("label")
            if not isinstance(found, int) or isinstance(found, bool):
                raise LrfaceError(f"{place}: 'label' in its .json is {found!r}, no whole number")
        else:
            raise LrfaceError(
                f"{place}: an image without a label; expected {sample.key}.cls or .json with 'label'"
            )
        if not 0 <= found < 1 << 40:
            raise LrfaceError(f"{place}: the label {found} is no number of an identity")
        return found

    def _fields(self, number: int, start: int, size: int, place: str) -> dict[str, Any]:
        if size > _MAX_TEXT:
            raise LrfaceError(f"{place}: its .json has {size} bytes, more than {_MAX_TEXT}")
        try:
            fields = json.loads(bytes(self._read(number, start, size)))
        except (ValueError, RecursionError) as error:
            raise LrfaceError(f"{place}: its .json cannot be read: {error}") from None
        return fields if isinstance(fields, dict) else {}

    def _extra(self, index: int) -> dict[str, Any]:
        start, size = self._json[0][index], self._json[1][index]
        return self._fields(self._shard[index], start, size, self.place(index)) if size else {}

    def _names(self) -> list[str]:
        names = identity_names(self.labels, self.path)
        labels, first = np.unique(self.labels, return_index=True)
        for label, index in zip(labels.tolist(), first.tolist(), strict=True):
            name = self._extra(index).get("identity")
            if isinstance(name, str) and name:
                names[label] = name
        return names

    def __len__(self) -> int:
        return len(self._keys)

    def view(self, index: int) -> memoryview:
        """The image file ``index``, not copied."""
        return self._read(self._shard[index], self._start[index], self._size[index])

    def encoded(self, index: int) -> bytes:
        """The image file ``index`` as it is stored."""
        return bytes(self.view(index))

    def place(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]}: sample {self._keys[index]!r}"

    def sources(self) -> list[str]:
        """``source`` of KEY.json where every sample has one and all differ, else SHARD/KEY."""
        found = [self._extra(index).get("source") for index in range(len(self))]
        if all(isinstance(name, str) for name in found) and len(set(found)) == len(found):
            return found  # type: ignore[return-value]
        keys = zip(self._shard, self._keys, strict=True)
        return [f"{self.shards[number].stem}/{key}" for number, key in keys]


class _Sample:
    """The files of one key."""

    __slots__ = ("cls", "image", "json", "key")

    def __init__(self, key: str = ""):
        self.key = key
        self.image: Member | None = None
        self.cls: Member | None = None
        self.json: Member | None = None


class ShardWriter:
    """Writes samples (image, .cls, .json with label, identity and source) into ``000000.tar``, ``000001.tar``, ...

    The folder is the caller's to make and to rename into place. The same samples give the same bytes.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = 256 << 20):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.shards = 0
        self._count = 0
        self._file: BinaryIO | None = None

    def add(self, image: bytes, kind: str, label: int, identity: str, source: str) -> None:
        """Append a sample; ``kind`` is the image's file name extension without the dot."""
        if self._file is None or self._file.tell() >= self.shard_bytes:
            self.close()
            self._file = open(self.folder / f"{self.shards:06d}.tar", "wb")
            self.shards += 1
        key = f"{self._count:09d}"
        fields = json.dumps({"label": label, "identity": identity, "source": source}, ensure_ascii=False)
        for extension, data in ((kind, image), ("cls", str(label).encode()), ("json", fields.encode())):
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(data)
            self._file.write(header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK))
        self._count += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.write(bytes(2 * _BLOCK))
            self._file.close()
            self._file = None
