"""Carrays and memfiles against bcolz itself and against torchvision's normalisation, which made the real ones."""

import json
import os
import pickle
import struct

import bcolz
import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from lrface.benchmarks.carrays import load_carray
from lrface.benchmarks.locate import locate_benchmark
from lrface.benchmarks.verification import load_benchmark
from lrface.data.carray import CarrayPixels, CarraySource, CarrayWriter, MemfileWriter, from_pixels, to_pixels
from lrface.data.source import FaceSource, check_source, open_source
from lrface.errors import LrfaceError, UsageError


def pictures(count, side=16):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def reference(image):
    """As InsightFace_Pytorch does it: ToTensor and Normalize(0.5, 0.5) of a BGR picture."""
    tensor = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1])).permute(2, 0, 1).float().div(255)
    return normalize(tensor, [0.5] * 3, [0.5] * 3).numpy()


def carray(path, images, chunk=None, dtype=np.float32, **options):
    """Made by bcolz itself."""
    values = np.stack([reference(image) for image in images]).astype(dtype)
    parameters = bcolz.cparams(**options) if options else None
    array = bcolz.carray(values, rootdir=str(path), mode="w", chunklen=chunk, cparams=parameters)
    array.flush()
    return path


def labelled(path, labels, names=None):
    np.save(path.with_name(f"{path.name}_labels.npy"), np.asarray(labels))
    if names:
        path.with_name(f"{path.name}_identities.json").write_text(json.dumps({"identities": names}))
    return path


def test_every_value_of_a_pixel_comes_back():
    values = np.arange(256, dtype=np.uint8)
    image = np.stack([np.tile(np.roll(values, 85 * channel), (2, 1)) for channel in range(3)], axis=-1)
    np.testing.assert_array_equal(from_pixels(image), reference(image))
    np.testing.assert_array_equal(to_pixels(from_pixels(image), ""), image)
    np.testing.assert_array_equal(to_pixels(reference(image), ""), image)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("codec", ["lz4", "blosclz", "zlib", "zstd"])
@pytest.mark.parametrize("options", [{"shuffle": 1}, {"shuffle": 0, "clevel": 0}, {"shuffle": 2}])
def test_what_bcolz_wrote(tmp_path, chunk, codec, options):
    images = pictures(7)
    images[2] = 40  # compresses well
    path = labelled(carray(tmp_path / "faces", images, chunk, cname=codec, **options), [0, 0, 1, 1, 2, 2, 2])
    source = open_source(path)
    assert isinstance(source, CarraySource) and isinstance(source, FaceSource) and source.format == "bcolz"
    check_source(source, "faces")
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 2] and source.identities == ["0", "1", "2"]
    for index in (6, 0, 3, 1, 5, 2, 4, -1):
        np.testing.assert_array_equal(source.image(index), images[index])
    assert source.encoded(0) is None and source.sources()[6] == "2/00000006"
    with pytest.raises(IndexError):
        source.image(7)


def test_float64(tmp_path):
    images = pictures(3)
    carray(tmp_path / "faces", images, dtype=np.float64)
    np.testing.assert_array_equal(CarrayPixels(tmp_path / "faces").image(1), images[1])


def test_bcolz_reads_what_is_written(tmp_path):
    images = pictures(50, 48)  # chunks of several images, the last one shorter
    (tmp_path / "faces").mkdir()
    writer = CarrayWriter(tmp_path / "faces", (48, 48), 50)
    for image in images:
        writer.add(image)
    writer.close()
    array = bcolz.carray(rootdir=str(tmp_path / "faces"), mode="r")
    assert array.shape == (50, 3, 48, 48) and array.dtype.base == np.float32 and array.chunklen > 1
    np.testing.assert_array_equal(array[:], np.stack([reference(image) for image in images]))
    pixels = CarrayPixels(tmp_path / "faces")
    assert all((pixels.image(index) == images[index]).all() for index in range(50))


def test_memfiles(tmp_path):
    images = pictures(5)
    root = tmp_path / "faces"
    (root / "memfile").mkdir(parents=True)
    values = np.stack([reference(image) for image in images])
    memory = np.memmap(root / "memfile" / "mem_file.dat", np.float32, "w+", shape=values.shape)
    memory[:] = values
    memory.flush()
    settings = {"shape": list(values.shape), "dtype": "float32"}
    (root / "memfile" / "mem_file.dat.conf").write_text(json.dumps(settings))
    labelled(root, [0, 1, 1, 0, 1], ["Ada", "Bela"])
    for path in (root, root / "memfile"):
        source = open_source(path)
        assert source.format == "memfile" and source.identities == ["Ada", "Bela"]
        for index in range(5):
            np.testing.assert_array_equal(source.image(index), images[index])
    (tmp_path / "own").mkdir()
    writer = MemfileWriter(tmp_path / "own", (16, 16))
    for image in images:
        writer.add(image)
    writer.close()
    for name in ("mem_file.dat", "mem_file.dat.conf"):
        assert (tmp_path / "own" / "memfile" / name).read_bytes() == (root / "memfile" / name).read_bytes()
    # An interrupted memfile looks whole: the carray it was made from is read where both are there.
    carray(tmp_path / "both", images)
    (root / "memfile").rename(tmp_path / "both" / "memfile")
    assert CarrayPixels(tmp_path / "both").format == "bcolz"
    with open(tmp_path / "own" / "memfile" / "mem_file.dat", "ab") as file:
        file.write(b"more")
    with pytest.raises(LrfaceError, match=r"mem_file.dat: has 15364 bytes, mem_file.dat.conf says 15360"):
        CarrayPixels(tmp_path / "own")


def test_pickle_and_fork(tmp_path):
    images = pictures(8)
    source = CarraySource(labelled(carray(tmp_path / "faces", images, 4), [0, 1] * 4))
    source.image(0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(5), images[5])
    child = os.fork()
    if child == 0:
        os._exit(0 if (source.image(6) == images[6]).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_labels_are_needed_for_training(tmp_path):
    path = carray(tmp_path / "faces", pictures(4))
    with pytest.raises(LrfaceError, match="faces_labels.npy with the labels is missing.*without which"):
        open_source(path)
    np.save(tmp_path / "faces_list.npy", np.array([True, False]))
    with pytest.raises(LrfaceError, match="verification set: lrface verify --benchmark"):
        open_source(path)
    for labels, message in (
        ([0, 1, 1], "has 3 labels for 4 images"),
        ([0.0, 1, 1, 0], "no one-dimensional .npy array of whole numbers"),
        ([[0, 1], [1, 0]], "no one-dimensional"),
        (np.array([None] * 4), "no one-dimensional"),
        ([0, 1, 1, -1], "run from -1"),
    ):
        np.save(tmp_path / "faces_labels.npy", np.asarray(labels), allow_pickle=True)
        with pytest.raises(LrfaceError, match=message):
            open_source(path)


@pytest.mark.parametrize(
    "file, field, value, message",
    [
        ("sizes", "shape", [4, 3, 16], "field 'shape' should be"),
        ("sizes", "shape", [10**12, 3, 16, 16], "field 'shape' should be"),
        ("sizes", "shape", [4, 3, 10**6, 10**6], "field 'shape' should be"),
        ("sizes", "shape", [400, 3, 16, 16], "missing, but .* says 400 images"),
        ("storage", "dtype", "object", "field 'dtype' should be 'float32', found 'object'"),
        ("storage", "chunklen", 10**9, "field 'chunklen' is 1000000000"),
        ("storage", "chunklen", 0, "field 'chunklen' is 0"),
        ("storage", "chunklen", 3, "its header does not fit"),
    ],
)
def test_false_metadata(tmp_path, file, field, value, message):
    path = carray(tmp_path / "faces", pictures(4), 2)
    place = path / "meta" / file
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    with pytest.raises(LrfaceError, match=message):
        for index in range(4):
            CarrayPixels(path).image(index)


def test_damaged_chunks_never_reach_blosc(tmp_path, monkeypatch):
    path = carray(tmp_path / "faces", pictures(4), 2)
    chunk = path / "data" / "__0.blp"
    data = chunk.read_bytes()
    monkeypatch.setattr("bcolz.carray_ext.chunk", lambda *_, **__: pytest.fail("it reached Blosc"))

    def damaged(offset, number):
        changed = bytearray(data)
        struct.pack_into("<I", changed, 16 + offset, number)
        return bytes(changed)

    for content, message in (
        (data[:-1], "it was cut off"),
        (data[:20], "no Bloscpack file"),
        (b"x" + data[1:], "no Bloscpack file"),
        (damaged(4, 0x7FFFFFFF), "does not fit 2 images"),
        (damaged(8, 0), "does not fit 2 images"),
        (damaged(12, 17), "it was cut off"),
        (data + bytes(3 << 20), "more bytes than 2 images"),
    ):
        chunk.write_bytes(content)
        with pytest.raises(LrfaceError, match=f"__0.blp: .*{message}"):
            CarrayPixels(path).image(0)


def test_values_that_are_no_pixels(tmp_path):
    bcolz.carray(np.full((2, 3, 8, 8), 3.0, np.float32), rootdir=str(tmp_path / "x"), mode="w").flush()
    with pytest.raises(LrfaceError, match="x: image 0 has values from 3 to 3"):
        CarrayPixels(tmp_path / "x").image(0)
    with pytest.raises(LrfaceError, match="nan"):
        to_pixels(np.full((3, 2, 2), np.nan, np.float32), "x")


def test_verification_sets(tmp_path):
    images = pictures(40)
    same = np.arange(20) % 3 == 0
    carray(tmp_path / "agedb_30", images, 3)
    np.save(tmp_path / "agedb_30_list.npy", same)
    for name, data in ((tmp_path / "agedb_30", None), ("agedb30", tmp_path), ("AgeDB-30", tmp_path)):
        found = locate_benchmark(name, data=data)
        assert found.kind == "bcolz" and found.path == tmp_path / "agedb_30"
        benchmark = load_benchmark(name, data=data, show_progress=False)
        np.testing.assert_array_equal(benchmark.images, images)
        assert benchmark.left.tolist() == list(range(0, 40, 2)) and benchmark.right.tolist() == list(
            range(1, 40, 2)
        )
        assert benchmark.same.tolist() == same.tolist()
        assert benchmark.folds.tolist() == [pair // 2 for pair in range(20)]
    np.save(tmp_path / "agedb_30_list.npy", same[:19])
    with pytest.raises(LrfaceError, match="has 19 pairs, but .* has 40 images"):
        load_carray(tmp_path / "agedb_30", "agedb30", show_progress=False)
    (tmp_path / "agedb_30_list.npy").unlink()
    with pytest.raises(UsageError, match="not a benchmark folder"):
        locate_benchmark(tmp_path / "agedb_30")
