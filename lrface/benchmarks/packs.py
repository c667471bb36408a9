"""InsightFace verification packs (agedb_30.bin, cfp_fp.bin, lfw.bin): written, and read without unpickling.

A pack is a pickle of ``(bins, issame)``: ``2 * n`` encoded images (bytes or one-dimensional uint8 arrays) and
``n`` booleans; images ``2 * i`` and ``2 * i + 1`` are pair ``i``. Such files are downloaded from anywhere,
and a pickle can run any code. So the file never meets :mod:`pickle`: :class:`_PackReader` interprets those
few instructions that build bytes, strings, whole numbers, booleans, lists, tuples and arrays, and refuses
every other instruction and every other name. Nothing in the file is imported, looked up or called, and numpy
never sees a pickled state: an array is made from its bytes and a dtype out of a short list. Memory stays in
proportion to the size of the file.
"""

import codecs
import pickle
import pickletools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.metrics import contiguous_folds
from lrface.benchmarks.verification import VerificationSet, load_benchmark
from lrface.data.decode import BrokenImage, decode, read_header
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file

CROP_SIZE = 112
"""Width and height of the crops in InsightFace's packs."""

MAXIMUM_SIDE = 2048
"""A pack holds face crops; a larger image is refused before it is decoded."""

MAXIMUM_BYTES = 4 * 2**30
"""A pack is read whole; InsightFace's have 60 to 200 MB."""

_DTYPES = ("u1", "b1", "i1", "i2", "i4", "i8", "u2", "u4", "u8")
_MAXIMUM_INTEGER_BYTES = 8
# An instruction of one byte can make an object of a hundred. A pack has at most 40 instructions an image.
_FREE_INSTRUCTIONS, _BYTES_AN_INSTRUCTION = 1_000_000, 32


class RefusedPack(LrfaceError):
    """The file asks for something that a verification pack has no use for. Nothing of it was run."""


class _Mark:
    """Where a list or tuple starts on the stack."""


_MARK = _Mark()


@dataclass(frozen=True)
class _Name:
    """A name out of the table below; never the object that Python would find under it."""

    role: str
    text: str


@dataclass
class _ArrayType:
    code: str
    order: str = "|"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array as it is described by the file; ``data`` is filled in by the BUILD instruction."""

    type: _ArrayType | None = None
    shape: tuple[int, ...] = ()
    data: bytes | bytearray | None = None

    def numpy(self) -> NDArray[Any]:
        assert self.type is not None and self.data is not None
        # order within the array does not matter: only arrays along one axis are used
        return np.frombuffer(self.data, dtype=self.type.numpy())


def _role_table() -> dict[tuple[str, str], str]:
    table = {("_codecs", "encode"): "encode", ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype"}
    for builtins in ("builtins", "__builtin__"):
        table[(builtins, "bytes")] = "bytes"
        table[(builtins, "bytearray")] = "bytearray"
    for core in ("numpy.core", "numpy._core"):
        table[(f"{core}.multiarray", "_reconstruct")] = "reconstruct"
        table[(f"{core}.multiarray", "scalar")] = "scalar"
        table[(f"{core}.numeric", "_frombuffer")] = "frombuffer"
    return table


_ROLES = _role_table()


class _PackReader:
    """Interprets the part of the pickle language that builds plain data (protocols 0 to 5)."""

    def __init__(self, data: bytes, origin: str):
        self.data = data
        self.origin = origin
        self.position = 0
        self.start = 0  # of the instruction at hand
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # every copy that the file asks for is charged, so that a small file cannot grow without end
        self.copies_left = len(data)
        self.steps = {
            opcode.code.encode("latin-1")[0]: getattr(self, f"_op_{opcode.name.lower()}", None)
            for opcode in pickletools.opcodes
        }
        self.names = {opcode.code.encode("latin-1")[0]: opcode.name for opcode in pickletools.opcodes}

    # reading

    def broken(self, what: str) -> NoReturn:
        raise LrfaceError(f"{self.origin}: not a readable verification pack: {what} (at byte {self.start})")

    def refuse(self, what: str) -> NoReturn:
        raise RefusedPack(
            f"{self.origin}: refused: {what} (at byte {self.start}). A verification pack holds only bytes, "
            "strings, lists, tuples, whole numbers, booleans and arrays of numbers. Nothing in the file "
            "was run; do not open it with pickle, and get the pack again from a source that you trust"
        )

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            self.broken(
                f"the file is truncated: {count} more bytes are announced, "
                f"{len(self.data) - self.position} are left"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            self.broken("the file is truncated: a line does not end")
        piece = self.data[self.position : end]
        self.position = end + 1
        return piece

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def decimal(self, text: bytes) -> int:
        if len(text) > 40:
            self.broken("a number of more than 40 digits")
        try:
            return int(text)
        except ValueError:
            self.broken(f"{text!r} is not a whole number")

    def run(self) -> Any:
        instructions_left = _FREE_INSTRUCTIONS + len(self.data) // _BYTES_AN_INSTRUCTION
        while True:
            self.start = self.position
            instructions_left -= 1
            if instructions_left < 0:
                self.refuse("the file is nearly all instructions, with next to no images")
            if self.position >= len(self.data):
                self.broken("the file is truncated: it ends without the closing instruction")
            code = self.data[self.position]
            self.position += 1
            if code == ord("."):
                return self.pop()
            if code not in self.names:
                self.broken(f"byte 0x{code:02x} is no pickle instruction")
            step = self.steps[code]
            if step is None:
                self.refuse(f"the instruction {self.names[code]}")
            step()

    # the stack

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.broken("an instruction finds nothing to work on")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        self.broken("an instruction looks for the start of a list that was never opened")

    def charge(self, count: int) -> None:
        self.copies_left -= count
        if self.copies_left < 0:
            self.refuse("the file unfolds into more data than it holds")

    def text(self, raw: bytes, encoding: str) -> str:
        try:
            return raw.decode(encoding, errors="surrogatepass" if encoding == "utf-8" else "strict")
        except UnicodeDecodeError as error:
            self.broken(f"a string is not valid {encoding}: {error.reason}")

    # instructions: framing and numbers

    def _op_proto(self) -> None:
        protocol = self.number("<B")
        if protocol > 5:
            self.broken(f"pickle protocol {protocol}; 0 to 5 are known")

    def _op_frame(self) -> None:
        length = self.number("<Q")
        if length > len(self.data) - self.position:
            self.broken(
                f"the file is truncated: {length} more bytes are announced, "
                f"{len(self.data) - self.position} are left"
            )

    def _op_none(self) -> None:
        self.stack.append(None)

    def _op_newtrue(self) -> None:
        self.stack.append(True)

    def _op_newfalse(self) -> None:
        self.stack.append(False)

    def _op_int(self) -> None:
        raw = self.line()
        self.stack.append({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else self.decimal(raw))

    def _op_binint(self) -> None:
        self.stack.append(self.number("<i"))

    def _op_binint1(self) -> None:
        self.stack.append(self.number("<B"))

    def _op_binint2(self) -> None:
        self.stack.append(self.number("<H"))

    def _op_long(self) -> None:
        self.stack.append(self.decimal(self.line().removesuffix(b"L")))

    def _op_long1(self) -> None:
        length = self.number("<B")
        if length > _MAXIMUM_INTEGER_BYTES:
            self.refuse(f"a whole number of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    # instructions: bytes and strings. What Python 2 called str becomes bytes

    def _op_string(self) -> None:
        raw = self.line().rstrip(b"\r")
        if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
            self.broken("a string without quotes")
        try:
            self.stack.append(codecs.escape_decode(raw[1:-1])[0])
        except ValueError as error:
            self.broken(f"a string with a broken escape: {error}")

    def _op_binstring(self) -> None:
        length = self.number("<i")
        if length < 0:
            self.broken(f"a string of {length} bytes")
        self.stack.append(self.take(length))

    def _op_short_binstring(self) -> None:
        self.stack.append(self.take(self.number("<B")))

    def _op_binbytes(self) -> None:
        self.stack.append(self.take(self.number("<I")))

    _op_short_binbytes = _op_short_binstring

    def _op_binbytes8(self) -> None:
        self.stack.append(self.take(self.number("<Q")))

    _op_bytearray8 = _op_binbytes8

    def _op_unicode(self) -> None:
        self.stack.append(self.text(self.line(), "raw-unicode-escape"))

    def _op_binunicode(self) -> None:
        self.stack.append(self.text(self.take(self.number("<I")), "utf-8"))

    def _op_short_binunicode(self) -> None:
        self.stack.append(self.text(self.take(self.number("<B")), "utf-8"))

    def _op_binunicode8(self) -> None:
        self.stack.append(self.text(self.take(self.number("<Q")), "utf-8"))

    # instructions: lists and tuples

    def _op_mark(self) -> None:
        self.stack.append(_MARK)

    def _op_pop(self) -> None:
        if not self.stack:
            self.broken("an instruction finds nothing to work on")
        self.stack.pop()

    def _op_pop_mark(self) -> None:
        self.since_mark()

    def _op_empty_list(self) -> None:
        self.stack.append([])

    def _op_list(self) -> None:
        self.stack.append(self.since_mark())

    def _op_append(self) -> None:
        item = self.pop()
        self.extend([item])

    def _op_appends(self) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        if not self.stack or not isinstance(self.stack[-1], list):
            self.broken("something is appended to what is not a list")
        self.stack[-1].extend(items)

    def _op_empty_tuple(self) -> None:
        self.stack.append(())

    def _op_tuple(self) -> None:
        self.stack.append(tuple(self.since_mark()))

    def last(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _op_tuple1(self) -> None:
        self.last(1)

    def _op_tuple2(self) -> None:
        self.last(2)

    def _op_tuple3(self) -> None:
        self.last(3)

    # instructions: the memo

    def remember(self, index: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.broken(f"it refers to value {index}, which it never stored")
        self.stack.append(self.memo[index])

    def _op_put(self) -> None:
        self.remember(self.decimal(self.line()))

    def _op_binput(self) -> None:
        self.remember(self.number("<B"))

    def _op_long_binput(self) -> None:
        self.remember(self.number("<I"))

    def _op_memoize(self) -> None:
        self.remember(len(self.memo))

    def _op_get(self) -> None:
        self.recall(self.decimal(self.line()))

    def _op_binget(self) -> None:
        self.recall(self.number("<B"))

    def _op_long_binget(self) -> None:
        self.recall(self.number("<I"))

    # instructions: names and what is done with them

    def name(self, module: str, attribute: str) -> None:
        role = _ROLES.get((module, attribute))
        if role is None:
            self.refuse(f"it asks for {module}.{attribute}"[:300])
        self.stack.append(_Name(role, f"{module}.{attribute}"))

    def _op_global(self) -> None:
        module, attribute = self.line(), self.line()
        self.name(self.text(module, "utf-8"), self.text(attribute, "utf-8"))

    def _op_stack_global(self) -> None:
        attribute, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            self.broken("a name that is not a string")
        self.name(module, attribute)

    def _op_inst(self) -> None:
        module, attribute = self.text(self.line(), "utf-8"), self.text(self.line(), "utf-8")
        self.refuse(f"it asks for an object of {module}.{attribute}"[:300])

    def _op_reduce(self) -> None:
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, _Name) or not isinstance(arguments, tuple):
            self.refuse("a call of something that is no function")
        result = getattr(self, f"_call_{callee.role}", None)
        if result is None:
            self.refuse(f"a call of {callee.text}")
        self.stack.append(result(callee, arguments))

    def odd(self, callee: _Name) -> NoReturn:
        self.refuse(f"a call of {callee.text} with arguments that no pack has")

    def _call_encode(self, callee: _Name, arguments: tuple[Any, ...]) -> bytes:
        """Bytes, as Python 3 writes them in protocols 0 to 2: text to be encoded."""
        if not (
            len(arguments) == 2
            and isinstance(arguments[0], str)
            and arguments[1] in ("latin1", "latin-1", b"latin1", b"latin-1")
        ):
            self.odd(callee)
        self.charge(len(arguments[0]))
        try:
            return arguments[0].encode("latin-1")
        except UnicodeEncodeError:
            self.broken("text that stands for bytes has characters above 255")

    def _call_bytes(self, callee: _Name, arguments: tuple[Any, ...]) -> bytes:
        if arguments:  # only the empty bytes object is written so; bytes(n) would reserve n bytes
            self.odd(callee)
        return b""

    def _call_bytearray(self, callee: _Name, arguments: tuple[Any, ...]) -> bytes:
        if not arguments:
            return b""
        if len(arguments) == 1 and isinstance(arguments[0], bytes):
            return arguments[0]
        return self._call_encode(callee, arguments)

    def _call_dtype(self, callee: _Name, arguments: tuple[Any, ...]) -> _ArrayType:
        if not arguments or not isinstance(arguments[0], str | bytes) or len(arguments) > 3:
            self.odd(callee)
        code = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode("latin-1")
        plain = {"bool": "b1", "uint8": "u1"}.get(code, code.lstrip("|<>=")[:20])
        if plain not in _DTYPES:
            kind = " (Python objects)" if plain.startswith("O") else ""
            self.refuse(f"an array of type {plain!r}{kind}")
        return _ArrayType(plain, code[0] if code[0] in "<>" else "|")

    def _call_reconstruct(self, callee: _Name, arguments: tuple[Any, ...]) -> _Array:
        if not (
            len(arguments) == 3
            and isinstance(arguments[0], _Name)
            and arguments[0].role == "ndarray"
            and arguments[1] in ((0,), 0)
        ):
            self.odd(callee)
        return _Array()

    def _call_frombuffer(self, callee: _Name, arguments: tuple[Any, ...]) -> _Array:
        """Arrays as numpy writes them in protocol 5."""
        if len(arguments) != 4:
            self.odd(callee)
        array = _Array()
        self.fill(array, arguments[2], arguments[1], arguments[0])
        return array

    def _call_scalar(self, callee: _Name, arguments: tuple[Any, ...]) -> bool | int:
        if not (
            len(arguments) == 2 and isinstance(arguments[0], _ArrayType) and isinstance(arguments[1], bytes)
        ):
            self.odd(callee)
        data_type = arguments[0].numpy()
        if len(arguments[1]) != data_type.itemsize:
            self.odd(callee)
        value: bool | int = np.frombuffer(arguments[1], dtype=data_type)[0].item()
        return value

    def _op_build(self) -> None:
        state = self.pop()
        target = self.pop()
        self.stack.append(target)
        if isinstance(target, _ArrayType):
            # (version, byte order, sub-array, field names, fields, item size, alignment, flags, ...)
            if not (isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)):
                self.refuse("an array type with fields")
            order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
            if order not in ("|", "<", ">"):
                self.refuse("an array type of unknown byte order")
            target.order = order
        elif isinstance(target, _Array):
            # (version, shape, type, whether Fortran order, bytes)
            if not (isinstance(state, tuple) and len(state) == 5) or target.data is not None:
                self.refuse("an array whose description is not numpy's")
            self.fill(target, state[1], state[2], state[4])
        else:
            self.refuse("a change to an object that is no array")

    def fill(self, target: _Array, shape: Any, data_type: Any, data: Any) -> None:
        if isinstance(data, list):
            self.refuse("an array of Python objects")
        if isinstance(shape, int) and not isinstance(shape, bool):
            shape = (shape,)
        if not (
            isinstance(shape, tuple)
            and len(shape) <= 4
            and all(
                isinstance(length, int) and not isinstance(length, bool) and length >= 0 for length in shape
            )
            and isinstance(data_type, _ArrayType)
            and isinstance(data, bytes)
        ):
            self.refuse("an array whose description is not numpy's")
        items = 1
        for length in shape:
            items *= length
        if items * data_type.numpy().itemsize != len(data):
            self.broken(f"an array of shape {shape} and type {data_type.code} is given {len(data)} bytes")
        target.type, target.shape, target.data = data_type, shape, data


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, _Array):
        return (
            "an array" if value.type is None else f"an array of shape {value.shape}, type {value.type.code}"
        )
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def read_pack(path: str | Path) -> tuple[list[bytes], NDArray[np.bool_]]:
    """The encoded images (``2 * n`` bytes objects) and the labels (bool [n]) of a verification pack.

    Reads packs pickled by Python 2 and 3, protocols 0 to 5. Executes nothing: see the module's text.

    Raises:
        RefusedPack: the file asks for any name, call or type that a pack has no use for; the message has the
            name.
        LrfaceError: no such file, a truncated one, another structure.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > MAXIMUM_BYTES:
            raise LrfaceError(
                f"{file}: {size / 2**30:.1f} GiB; a verification pack has less than "
                f"{MAXIMUM_BYTES / 2**30:.0f} GiB. Is this another kind of file?"
            )
        data = file.read_bytes()
    except OSError as error:
        raise LrfaceError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise LrfaceError(f"{file}: the file is empty; a verification pack (.bin) is expected")
    content = _PackReader(data, str(file)).run()

    expected = "a verification pack holds a pair (images, same-or-different)"
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise LrfaceError(f"{file}: {expected}, found {_kind(content)}")
    bins, labels = content
    if not isinstance(bins, list | tuple):
        raise LrfaceError(f"{file}: {expected}; a list of images is expected first, found {_kind(bins)}")
    same = _labels(labels, file)
    if len(bins) != 2 * len(same):
        raise LrfaceError(
            f"{file}: {len(bins)} images for {len(same)} pairs; a pack has two images a pair "
            f"({2 * len(same)})"
        )
    if len(same) == 0:
        raise LrfaceError(f"{file}: the pack has no pairs")
    return [_encoded(value, index, file) for index, value in enumerate(bins)], same


def _labels(labels: Any, file: Path) -> NDArray[np.bool_]:
    if isinstance(labels, _Array) and labels.type is not None:
        values = labels.numpy()
        if len(labels.shape) != 1:
            raise LrfaceError(f"{file}: one label a pair is expected, found {_kind(labels)}")
    elif isinstance(labels, list | tuple):
        for index, label in enumerate(labels):
            if not isinstance(label, int):
                raise LrfaceError(f"{file}: label {index} must be true or false, found {_kind(label)}")
            if label not in (0, 1):
                raise LrfaceError(f"{file}: label {index} must be true or false (1 or 0), found {label}")
        values = np.array(labels, dtype=bool)
    else:
        raise LrfaceError(f"{file}: a list of labels is expected second, found {_kind(labels)}")
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise LrfaceError(f"{file}: labels must be true or false (1 or 0), found others")
    return values.astype(bool)


def _encoded(value: Any, index: int, file: Path) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, _Array) and value.type is not None and value.data is not None:
        # older OpenCV encodes into arrays of shape (n, 1)
        if value.type.code == "u1" and value.shape and max(value.shape) == len(value.data):
            return bytes(value.data)
    raise LrfaceError(
        f"{file}: image {index} is {_kind(value)}; encoded images (bytes, or a uint8 array along one axis) "
        "are expected"
    )


def write_pack(
    path: str | Path, images: Sequence[bytes], same: Sequence[bool] | NDArray[np.bool_], protocol: int = 4
) -> None:
    """Write a verification pack as InsightFace's scripts do: a pickle of a list of bytes and a list of booleans.

    Args:
        path: the file, which appears whole or not at all.
        images: ``2 * n`` encoded images; ``2 * i`` and ``2 * i + 1`` are pair ``i``. An object that occurs more
            than once is stored once.
        same: n booleans.
        protocol: pickle protocol, 2 to 4 (2 for readers that run Python 2).

    Raises:
        LrfaceError: images and labels that do not fit together, or a place that cannot be written.
    """
    labels = [bool(label) for label in same]
    if not labels or len(images) != 2 * len(labels):
        raise LrfaceError(
            f"{path}: {len(images)} images for {len(labels)} pairs; a pack has two images a pair, and one pair "
            "at least"
        )
    if not 2 <= protocol <= 4:
        raise UsageError(f"protocol: 2, 3 or 4 is needed, got {protocol}")
    for index, image in enumerate(images):
        if not isinstance(image, bytes) or not image:
            raise LrfaceError(f"{path}: image {index} must be encoded (bytes that are not empty)")
    with atomic_file(path) as aside, open(aside, "wb") as file:
        pickle.dump((list(images), labels), file, protocol=protocol)


def benchmark_to_pack(
    benchmark: VerificationSet | str | Path, path: str | Path, data: str | Path | None = None
) -> int:
    """Write a benchmark as a verification pack: its pairs in their order, its crops as PNG, which keeps every pixel.

    Folds are not part of a pack: whoever reads it cuts the pairs into ten consecutive blocks.

    Args:
        benchmark: one that was loaded, or what :func:`~lrface.benchmarks.verification.load_benchmark` takes.
        path: the pack.
        data: where a known name is looked for, as ``--data``.

    Returns:
        The number of pairs.

    Raises:
        LrfaceError: the benchmark cannot be loaded, or the place cannot be written.
    """
    if not isinstance(benchmark, VerificationSet):
        benchmark = load_benchmark(benchmark, data=data)
    encoded = [
        cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        for image in benchmark.images
    ]
    sides = np.stack((benchmark.left, benchmark.right), axis=1).ravel()
    write_pack(path, [encoded[index] for index in sides], benchmark.same)
    return len(benchmark)


def decode_crop(encoded: bytes, where: str, size: int = CROP_SIZE) -> NDArray[np.uint8]:
    """An encoded square face crop as uint8 [size, size, 3] RGB.

    Another square size is scaled (area downwards, bilinear upwards), as InsightFace's own reader does.

    Raises:
        LrfaceError: bytes that are no JPEG, PNG, BMP, WebP or TIFF, that do not decode, or an image that is not
            square or wider than 2048 pixels. ``where`` starts the message.
    """
    try:
        header = read_header(encoded)
    except BrokenImage as error:
        raise LrfaceError(f"{where} is not an encoded image: {error}") from error
    width, height = header.width, header.height
    if max(width, height) > MAXIMUM_SIDE:
        raise LrfaceError(f"{where} is {width}x{height} pixels; an aligned face of 112x112 is expected")
    if width != height:
        raise LrfaceError(
            f"{where} is {width}x{height} pixels; an aligned, square face (112x112) is expected. For "
            "photographs use a folder with pairs.txt, which lrface aligns"
        )
    try:
        image = decode(encoded)
    except BrokenImage as error:
        raise LrfaceError(f"{where} cannot be decoded: {error}; the file is damaged") from error
    if width != size:
        image = cv2.resize(
            image, (size, size), interpolation=cv2.INTER_AREA if width > size else cv2.INTER_LINEAR
        )
    return np.asarray(image, dtype=np.uint8)


def load_pack(path: str | Path, name: str | None = None, size: int = CROP_SIZE) -> VerificationSet:
    """A verification pack as a :class:`VerificationSet`; images that occur more than once are held once.

    Folds are ten consecutive blocks of pairs, as in InsightFace's script (fewer when there are fewer pairs).

    Raises:
        RefusedPack, LrfaceError: see :func:`read_pack` and :func:`decode_crop`; a pack of a single pair.
    """
    file = Path(path)
    encoded, same = read_pack(file)
    if len(same) < 2:
        raise LrfaceError(f"{file}: the pack has one pair; at least two are needed to choose a threshold")
    numbers: dict[bytes, int] = {}
    indices = np.array([numbers.setdefault(one, len(numbers)) for one in encoded], dtype=np.int64)
    images = np.empty((len(numbers), size, size, 3), dtype=np.uint8)
    seen = -1
    for position, index in enumerate(indices):
        if index > seen:
            images[index] = decode_crop(encoded[position], f"{file}: image {position}", size)
            seen = int(index)
    return VerificationSet(
        name=name or file.stem,
        images=images,
        left=indices[0::2],
        right=indices[1::2],
        same=same,
        folds=contiguous_folds(len(same)),
        origin=str(file),
    )
