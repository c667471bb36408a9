import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from lrface.benchmarks.packs import RefusedPack, decode_crop, load_pack, read_pack
from lrface.errors import LrfaceError


def encoded_crop(seed: int, size: int = 112, kind: str = ".png") -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.imencode(kind, cv2.resize(coarse, (size, size)))[1].tobytes()


def write(tmp_path: Path, content: object, protocol: int = 4) -> Path:
    path = tmp_path / "pack.bin"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_raw(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "pack.bin"
    path.write_bytes(data)
    return path


AWKWARD = [b"\xff\xd8\x00'\"\n\\", b"", b"x" * 300, b"caf\xe9\r\n"]

IMAGE_FORMS = {
    "bytes": lambda pieces: list(pieces),
    "arrays": lambda pieces: [np.frombuffer(piece, dtype=np.uint8) for piece in pieces],
    "own arrays": lambda pieces: [np.frombuffer(piece, dtype=np.uint8).copy() for piece in pieces],
    "columns": lambda pieces: [np.frombuffer(piece, dtype=np.uint8).reshape(-1, 1) for piece in pieces],
    "bytearrays": lambda pieces: [bytearray(piece) for piece in pieces],
}
LABEL_FORMS = {
    "booleans": [True, False],
    "integers": [1, 0],
    "tuple": (True, False),
    "array": np.array([True, False]),
    "integer array": np.array([1, 0]),
    "big-endian array": np.array([1, 0], dtype=">i4"),
    "numpy booleans": [np.bool_(True), np.bool_(False)],
    "numpy integers": [np.int64(1), np.int64(0)],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("images", IMAGE_FORMS)
@pytest.mark.parametrize("labels", LABEL_FORMS)
def test_every_protocol_and_form_is_read(tmp_path, protocol, images, labels):
    pieces = [piece for piece in AWKWARD if piece or images in ("bytes", "bytearrays")]
    pieces = (pieces * 2)[:4]
    path = write(tmp_path, (IMAGE_FORMS[images](pieces), LABEL_FORMS[labels]), protocol)
    bins, same = read_pack(path)
    assert bins == pieces
    assert same.dtype == bool and same.tolist() == [True, False]


def python2_array(raw: bytes) -> bytes:
    """A uint8 array the way numpy under Python 2 pickles it (protocol 2)."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K" + bytes([len(raw)]) + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(raw)]) + raw + b"tb"
    )


def python2_array_as_text(raw: bytes) -> bytes:
    """The same in protocol 0, where everything is text (protocol 1 shares its names and marks)."""
    text = "".join(f"\\x{byte:02x}" for byte in raw).encode()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\nt" % len(raw)
        + b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'"
        + text
        + b"'\ntb"
    )


PYTHON2_PACKS = {
    # ([four str], [True, False]) by cPickle under Python 2
    "protocol 0": b"((lp1\nS'\\xff\\xd8\\n'\np2\naS'b\\'c'\np3\naS\"d'e\"\naS'f'\na(lp4\nI01\naI00\natp5\n.",
    "protocol 1": b"(]q\x01(U\x03\xff\xd8\nq\x02U\x03b'cU\x03d'eU\x01fe]q\x03(I01\nI00\netq\x04.",
    "protocol 2": b"\x80\x02]q\x01(U\x03\xff\xd8\nT\x03\x00\x00\x00b'cU\x03d'eU\x01fe]q\x02(\x88\x89e\x86.",
    "arrays": b"\x80\x02]("
    + b"".join(map(python2_array, (b"\xff\xd8\n", b"b'c", b"d'e", b"f")))
    + b"e](\x88\x89e\x86.",
    "arrays, protocol 0": b"((l"
    + b"".join(python2_array_as_text(raw) + b"a" for raw in (b"\xff\xd8\n", b"b'c", b"d'e", b"f"))
    + b"(lI01\naI00\nat.",
    "long strings and labels, protocol 1": b"(](T\x03\x00\x00\x00\xff\xd8\nU\x03b'cU\x03d'eU\x01fe]q\x00(L1L\nL0L\net.",
}


@pytest.mark.parametrize("name", PYTHON2_PACKS)
def test_packs_of_python_2_are_read(tmp_path, name):
    data = PYTHON2_PACKS[name]
    # the bytes written out above are what Python itself understands by them
    images, labels = pickle.loads(data, encoding="bytes")
    assert [bytes(image) for image in images] == [b"\xff\xd8\n", b"b'c", b"d'e", b"f"]
    assert labels == [True, False]
    bins, same = read_pack(write_raw(tmp_path, data))
    assert bins == [b"\xff\xd8\n", b"b'c", b"d'e", b"f"]
    assert same.tolist() == [True, False]


def test_the_real_pack_is_read(shared):
    path = shared / "data/formats/small_lfw.bin"
    bins, same = read_pack(path)
    assert len(bins) == 20 and same.tolist() == [True] * 10
    assert all(one.startswith(b"\xff\xd8\xff") for one in bins)
    benchmark = load_pack(path)
    assert benchmark.name == "small_lfw" and len(benchmark) == 10
    assert benchmark.images.shape[1:] == (112, 112, 3)
    assert len(benchmark.images) == len(set(bins)) < 20
    # faces are warm: in RGB order the red channel is the brightest
    means = benchmark.images[:, 30:80, 30:80].mean(axis=(0, 1, 2))
    assert means[0] > means[1] > means[2]


def test_a_pack_becomes_a_set_of_distinct_rgb_images(tmp_path):
    crops = [encoded_crop(seed) for seed in range(3)]
    path = write(tmp_path, ([crops[0], crops[1], crops[0], crops[2]], [True, False]))
    benchmark = load_pack(path, name="mini")
    assert benchmark.name == "mini"
    assert benchmark.left.tolist() == [0, 0] and benchmark.right.tolist() == [1, 2]
    assert benchmark.same.tolist() == [True, False] and benchmark.folds.tolist() == [0, 1]
    for image, encoded in zip(benchmark.images, crops, strict=True):
        blue_green_red = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(image, blue_green_red[:, :, ::-1])


def test_folds_are_ten_consecutive_blocks(tmp_path):
    crop = encoded_crop(0)
    benchmark = load_pack(write(tmp_path, ([crop] * 46, [True] * 23)))
    assert np.bincount(benchmark.folds).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert (np.diff(benchmark.folds) >= 0).all()


# what must be refused

MARKER = "lrface_pack_was_run"


def reduce_pickle(module: str, name: str, *arguments: object, protocol: int = 4) -> bytes:
    """``module.name(*arguments)`` as an item of the pack, in plain instructions."""
    packed = pickle.dumps(arguments, protocol=2)[2:-1]
    if protocol >= 4:
        call = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"
    else:
        call = f"c{module}\n{name}\n".encode()
    return b"\x80" + bytes([protocol]) + b"](" + call + packed + b"Re](\x88e\x86."


def command(tmp_path: Path) -> str:
    return f"touch {tmp_path / MARKER}"


ATTACKS = {
    "os.system": lambda c: reduce_pickle("os", "system", c),
    "os.system, old protocol": lambda c: reduce_pickle("os", "system", c, protocol=2),
    "posix.system": lambda c: reduce_pickle("posix", "system", c),
    "nt.system": lambda c: reduce_pickle("nt", "system", c),
    "subprocess.Popen": lambda c: reduce_pickle("subprocess", "Popen", c),
    "builtins.eval": lambda c: reduce_pickle("builtins", "eval", f"__import__('os').system({c!r})"),
    "builtins.exec": lambda c: reduce_pickle("builtins", "exec", f"__import__('os').system({c!r})"),
    "__builtin__.eval": lambda c: reduce_pickle("__builtin__", "eval", "1", protocol=2),
    "builtins.getattr": lambda c: reduce_pickle("builtins", "getattr", "a", "b"),
    "builtins.__import__": lambda c: reduce_pickle("builtins", "__import__", "os"),
    "builtins.bytes": lambda c: reduce_pickle("builtins", "bytes", 10**15),
    "builtins.bytearray": lambda c: reduce_pickle("builtins", "bytearray", 10**15),
    "numpy.load": lambda c: reduce_pickle("numpy", "load", "/etc/passwd"),
    "numpy.f2py.diagnose.run": lambda c: reduce_pickle("numpy", "f2py.diagnose.run"),
    "numpy.testing._private.utils.runstring": lambda c: reduce_pickle(
        "numpy.testing._private.utils", "runstring", f"import os; os.system({c!r})", {}
    ),
    "numpy.ndarray": lambda c: reduce_pickle("numpy", "ndarray", (10**12,)),
    "numpy.ndarray.__class__": lambda c: reduce_pickle("numpy", "ndarray.__class__"),
    "numpy.core.multiarray._reconstruct.__globals__": lambda c: reduce_pickle(
        "numpy.core.multiarray", "_reconstruct.__globals__"
    ),
    "numpy.core.multiarray.fromfile": lambda c: reduce_pickle(
        "numpy.core.multiarray", "fromfile", "/etc/passwd"
    ),
    "numpy.core._internal._makenames_list": lambda c: reduce_pickle(
        "numpy.core._internal", "_makenames_list"
    ),
    "_codecs.decode": lambda c: reduce_pickle("_codecs", "decode", "x", "unicode_escape"),
    "_codecs.encode": lambda c: reduce_pickle("_codecs", "encode", "x", "idna"),
    "copyreg._reconstructor": lambda c: reduce_pickle("copyreg", "_reconstructor"),
    "copy_reg._reconstructor": lambda c: reduce_pickle("copy_reg", "_reconstructor", protocol=2),
    "functools.partial": lambda c: reduce_pickle("functools", "partial", c),
    "operator.attrgetter": lambda c: reduce_pickle("operator", "attrgetter", "__class__"),
    "pickle.loads": lambda c: reduce_pickle("pickle", "loads", pickle.dumps(1)),
    "types.CodeType": lambda c: reduce_pickle("types", "CodeType"),
    "PIL.Image.open": lambda c: reduce_pickle("PIL.Image", "open", "/etc/passwd"),
    "lrface.benchmarks.packs.read_pack": lambda c: reduce_pickle("lrface.benchmarks.packs", "read_pack", "x"),
    "builtins.set": lambda c: reduce_pickle("builtins", "set"),
    "os.system, INST": lambda c: b"(S'" + c.encode() + b"'\nios\nsystem\n.",
    "OBJ": lambda c: b"(cnumpy\nndarray\nK\x01o.",
    "NEWOBJ": lambda c: b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.",
    "NEWOBJ_EX": lambda c: b"\x80\x04cnumpy\nndarray\n))\x92.",
    "EXT1": lambda c: b"\x80\x02\x82\x01.",
    "PERSID": lambda c: b"Pabc\n.",
    "BINPERSID": lambda c: b"\x80\x02K\x01Q.",
    "EXT2": lambda c: b"\x80\x02\x83\x01\x00.",
    "EXT4": lambda c: b"\x80\x02\x84\x01\x00\x00\x00.",
    "READONLY_BUFFER": lambda c: b"\x80\x05\x98.",
    "FROZENSET": lambda c: b"\x80\x04(\x91.",
    "DICT": lambda c: b"(d.",
    "SETITEMS": lambda c: b"\x80\x02](u.",
    "NEXT_BUFFER": lambda c: b"\x80\x05\x97.",
    "EMPTY_DICT": lambda c: b"\x80\x02}.",
    "EMPTY_SET": lambda c: b"\x80\x04\x8f.",
    "BINFLOAT": lambda c: b"\x80\x02G\x3f\xf0\x00\x00\x00\x00\x00\x00.",
    "DUP": lambda c: b"\x80\x02K\x012.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_no_pack_needs_is_refused_by_name(tmp_path, name):
    path = write_raw(tmp_path, ATTACKS[name](command(tmp_path)))
    with pytest.raises(RefusedPack) as refusal:
        read_pack(path)
    message = str(refusal.value)
    assert name.split(",")[0] in message
    assert str(path) in message and "Nothing in the file was run" in message
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    "module, attribute",
    [
        ("builtins\0", "eval"),
        (" builtins", "bytes"),
        ("builtins.bytes", ""),
        ("", "builtins.bytes"),
        ("numpy.core.multiarray._reconstruct", "__globals__"),
        ("numpy", "ndarray.fromfile"),
        ("numpy.core", "multiarray._reconstruct"),
        ("NUMPY", "ndarray"),
        ("numpy", "nd\u0430rray"),  # a Cyrillic letter
        ("numpy" * 1000, "ndarray"),
    ],
)
def test_names_are_taken_to_the_letter(tmp_path, module, attribute):
    texts = [b"X" + struct.pack("<I", len(raw)) + raw for raw in (module.encode(), attribute.encode())]
    kept = texts[0] + b"q\x00" + texts[1] + b"q\x01"  # the name is put together out of the memo
    for data in (b"".join(texts) + b"\x93", kept + b"00h\x00h\x01\x93"):
        with pytest.raises(RefusedPack, match="it asks for") as refusal:
            read_pack(write_raw(tmp_path, b"\x80\x04](" + data + b")Re](\x88e\x86."))
        assert len(str(refusal.value)) < 1000


def test_a_name_that_is_no_text_is_an_error(tmp_path):
    for pushed in (b"K\x01K\x02", b"B\x02\x00\x00\x00osB\x06\x00\x00\x00system", b")]", b"N\x88"):
        with pytest.raises(LrfaceError, match="a name that is not a string"):
            read_pack(write_raw(tmp_path, b"\x80\x04](" + pushed + b"\x93)Re](\x88e\x86."))


def test_a_call_within_a_call_is_refused(tmp_path):
    """numpy's own function is asked to rebuild an array of what os.system returns."""
    call = b"cos\nsystem\nU\x04true\x85R"
    for inner in (
        call,
        b"cnumpy\ndtype\n(" + call + b"tR",
        b"cnumpy.core.multiarray\n_reconstruct\n(" + call + b"tR",
    ):
        with pytest.raises(RefusedPack, match="os.system"):
            read_pack(write_raw(tmp_path, b"\x80\x02](cnumpy\ndtype\n(" + inner + b"tRe](\x88e\x86."))


class RunsWhenUnpickled:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(6))
def test_an_ordinary_malicious_pickle_is_refused(tmp_path, protocol):
    target = tmp_path / MARKER
    data = pickle.dumps(([RunsWhenUnpickled(str(target))] * 2, [True]), protocol=protocol)
    path = write_raw(tmp_path, data)
    with pytest.raises(RefusedPack, match=r"(posix|nt|os)\.system"):
        read_pack(path)
    assert not target.exists()
    pickle.loads(data)  # shows that the file would have run the command
    assert target.exists()


def test_a_refused_name_is_not_even_imported(tmp_path):
    path = write_raw(tmp_path, reduce_pickle("antigravity_of_lrface", "fly"))
    (tmp_path / "antigravity_of_lrface.py").write_text(f"open({str(tmp_path / MARKER)!r}, 'w')")
    code = (
        "import sys\nfrom lrface.benchmarks.packs import read_pack, RefusedPack\n"
        f"try: read_pack({str(path)!r})\n"
        "except RefusedPack: sys.exit(0 if 'antigravity_of_lrface' not in sys.modules else 3)\nsys.exit(4)\n"
    )
    folders = [str(tmp_path), str(Path(__file__).resolve().parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=600).returncode == 0
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    "array, found",
    [
        (np.array([object(), None], dtype=object), "object|Python objects|asks for"),
        (np.array([None, None], dtype=object), "Python objects"),
        (np.array(["a", "b"]), "type 'U1'"),
        (np.array([1.0, 2.0]), "type 'f8'"),
        (np.zeros(2, dtype=[("a", "u1"), ("b", "u1")]), "type 'V2'"),
        (np.array([1, 2], dtype="M8[s]"), "type 'M8'"),
    ],
    ids=["objects", "none", "text", "floats", "fields", "dates"],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_anything_but_whole_numbers_are_refused(tmp_path, array, found, protocol):
    with pytest.raises(RefusedPack, match=found):
        read_pack(write(tmp_path, ([array, array], [True]), protocol))


def test_object_arrays_in_disguise_are_refused(tmp_path):
    # the dtype says u1, its state brings fields, or the array's state brings a list of objects
    fields = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|N(U\x01at}NJ\xff\xff\xff\xffK\x00K\x00tb"
    with pytest.raises(RefusedPack):
        read_pack(write_raw(tmp_path, b"\x80\x02](" + fields + b"e](\x88e\x86."))
    for state in (b"](NNe", b"N", b"U\x01a", b"X\x01\x00\x00\x00a"):
        data = (
            b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89" + state + b"tbe](\x88e\x86."
        )
        with pytest.raises(LrfaceError):
            read_pack(write_raw(tmp_path, data))


def test_names_themselves_cannot_be_changed_or_kept(tmp_path):
    build_on_name = b"\x80\x02cnumpy\ndtype\n}b."
    with pytest.raises(RefusedPack):
        read_pack(write_raw(tmp_path, build_on_name))
    build_with_tuple = b"\x80\x02cnumpy\ndtype\nK\x01K\x02\x86b."
    with pytest.raises(RefusedPack, match="no array"):
        read_pack(write_raw(tmp_path, build_with_tuple))
    with pytest.raises(LrfaceError, match="image 0"):
        read_pack(write_raw(tmp_path, b"\x80\x02](cnumpy\ndtype\ncnumpy\ndtype\ne](\x88e\x86."))
    with pytest.raises(RefusedPack, match="no function"):
        read_pack(write_raw(tmp_path, b"\x80\x02U\x02os)R."))


# bombs

BOMBS = {
    "memo index": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "announced bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "announced frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"x.",
    "announced text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "long integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "long decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "nesting": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "nested lists": b"\x80\x02" + b"](" * 200_000 + b"e" * 200_000 + b".",
    "array shape": (
        b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"J\xff\xff\xff\x7f\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U\x01atbe](\x88e\x86."
    ),
    "negative shape": (
        b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"J\xff\xff\xff\xff\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U\x01atbe](\x88e\x86."
    ),
    # one megabyte of text, encoded a hundred thousand times over
    "repeated copies": b"\x80\x02]q\x00(X"
    + struct.pack("<I", 2**20)
    + b"a" * 2**20
    + b"q\x01U\x06latin1q\x02"
    + b"c_codecs\nencode\nq\x03"
    + b"h\x03h\x01h\x02\x86R" * 100_000
    + b"e](\x88e\x86.",
}


def laughs(closing: bytes) -> bytes:
    """Lists (or tuples) of ten references to the one before, twenty times over."""
    levels = b"(" + b"K\x01" * 10 + closing + b"q\x00"
    for level in range(1, 20):
        levels += b"(" + (b"h" + bytes([level - 1])) * 10 + closing + b"q" + bytes([level])
    return levels


BOMBS |= {
    "laughing lists as images": b"\x80\x02" + laughs(b"l") + b"](\x88e\x86.",
    "laughing tuples as images": b"\x80\x02" + laughs(b"t") + b"](\x88e\x86.",
    "laughing tuples as labels": b"\x80\x02](U\x01aU\x01be" + laughs(b"t") + b"\x86.",
    "laughing tuples as a shape": b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
    b"\x87R(K\x01" + laughs(b"t") + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U\x01atbe](\x88e\x86.",
    "reconstruct of a huge shape": b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    b"J\xff\xff\xff\x7f\x85U\x01b\x87Re](\x88e\x86.",
    "memo of nothing": b"\x80\x04]" + b"\x94" * 2_500_000 + b".",
    "empty lists": b"\x80\x04](" + b"]" * 2_500_000 + b"e](\x88e\x86.",
    "marks": b"\x80\x04" + b"(" * 2_500_000 + b".",
    "announced bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "announced string": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
    "negative string": b"\x80\x02T" + struct.pack("<i", -1) + b"x.",
}


def test_bombs_do_not_need_memory(tmp_path):
    """All of them in a process that may take 300 MB more than it has when it starts."""
    import resource

    paths = []
    for number, name in enumerate(BOMBS):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(BOMBS[name])
    child = os.fork()
    if not child:
        status = 0
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 300 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for number, path in enumerate(paths, start=1):
                status = number
                with pytest.raises(LrfaceError):
                    read_pack(path)
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert ended == 0, f"stopped at {list(BOMBS)[(ended >> 8) - 1]} (status {ended})"


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_early(tmp_path, name):
    import resource

    path = write_raw(tmp_path, BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LrfaceError) as stop:
        read_pack(path)
    assert len(str(stop.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_file_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.truncate(5 * 2**30)  # takes no room on the disk
    with pytest.raises(LrfaceError, match="5.0 GiB"):
        read_pack(path)


def test_an_image_of_huge_announced_size_is_not_decoded():
    header = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    )
    data = header + struct.pack(">I", 0) * 3
    with pytest.raises(LrfaceError, match="pack.bin: image 3"):
        decode_crop(data, "pack.bin: image 3")


# broken files


def test_every_truncation_is_an_error(tmp_path):
    for protocol in (0, 2, 4, 5):
        crops = [np.frombuffer(encoded_crop(seed, 8), np.uint8) for seed in range(2)]
        whole = pickle.dumps((crops, [True]), protocol=protocol)
        for length in range(0, len(whole) - 1, 7):
            with pytest.raises(LrfaceError) as stop:
                read_pack(write_raw(tmp_path, whole[:length]))
            assert "pack.bin" in str(stop.value)
            assert not isinstance(stop.value, RefusedPack)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    generator = np.random.default_rng(0)
    crops = [np.frombuffer(encoded_crop(seed, 8), np.uint8) for seed in range(2)]
    whole = pickle.dumps((crops, [np.bool_(True)]), protocol=2)
    for _ in range(400):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = generator.integers(0, 256)
        try:
            bins, same = read_pack(write_raw(tmp_path, bytes(damaged)))
        except LrfaceError:
            continue
        assert len(bins) == 2 * len(same) and all(isinstance(one, bytes) for one in bins)


def test_wrong_content_is_named(tmp_path):
    crop = encoded_crop(0)
    cases = [
        (([crop] * 3, [True, False]), "3 images for 2 pairs"),
        (([crop] * 3, [True]), r"two images a pair \(2\)"),
        ([crop, crop], "list of images is expected first"),
        ((crop,), "a tuple of 1"),
        (b"text", "a bytes"),
        (([crop, crop], None), "labels is expected second, found nothing"),
        (([crop, crop], [2]), "label 0 must be true or false .*2"),
        (([crop, crop], ["yes"]), "label 0 .*a str"),
        (([crop, crop], np.array([7])), "labels must be true or false"),
        (([crop, crop], np.array([[True]])), "one label a pair"),
        (([crop, "text"], [True]), "image 1 is a str"),
        (([crop, None], [True]), "image 1 is nothing"),
        (([crop, np.zeros((4, 4, 3), np.uint8)], [True]), r"image 1 is an array of shape \(4, 4, 3\)"),
        (([crop, np.zeros(4, np.int64)], [True]), "image 1 is an array of shape .* type i8"),
        (([], []), "no pairs"),
    ]
    for content, found in cases:
        with pytest.raises(LrfaceError, match=found):
            read_pack(write(tmp_path, content))


def test_files_that_are_no_packs(tmp_path):
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_pack(tmp_path / "absent.bin")
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_pack(tmp_path)
    with pytest.raises(LrfaceError, match="empty"):
        read_pack(write_raw(tmp_path, b""))
    with pytest.raises(LrfaceError, match="not a readable verification pack"):
        read_pack(write_raw(tmp_path, b"\xff\xd8\xff\xe0 a photograph"))
    with pytest.raises(LrfaceError, match="not a readable verification pack"):
        read_pack(write_raw(tmp_path, b"<html><body>Not found</body></html>"))
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    with pytest.raises(LrfaceError):
        read_pack(write_raw(tmp_path, buffer.getvalue()))


def test_images_that_cannot_be_used_are_named(tmp_path):
    crop = encoded_crop(0)
    wide = cv2.imencode(".png", np.zeros((100, 112, 3), np.uint8))[1].tobytes()
    photograph = cv2.imencode(".png", np.zeros((3000, 3000, 3), np.uint8))[1].tobytes()
    for bad, found in [
        (b"not an image", "image 3 is not an encoded image"),
        (wide, "image 3 is 112x100"),
        (photograph, "image 3 is 3000x3000"),
        (encoded_crop(0, kind=".jpg")[:200], "image 3"),
    ]:
        with pytest.raises(LrfaceError, match=found):
            load_pack(write(tmp_path, ([crop, crop, crop, bad], [True, False])))
    with pytest.raises(LrfaceError, match="one pair"):
        load_pack(write(tmp_path, ([crop, crop], [True])))


def test_square_crops_of_another_size_are_scaled(tmp_path):
    small, large = encoded_crop(1, 96), encoded_crop(1, 224)
    benchmark = load_pack(write(tmp_path, ([small, large, small, large], [True, False])))
    assert benchmark.images.shape == (2, 112, 112, 3)
    difference = np.abs(benchmark.images[0].astype(int) - benchmark.images[1].astype(int))
    assert difference.mean() < 6
