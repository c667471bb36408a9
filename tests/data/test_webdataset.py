"""WebDataset shards as tarfile writes them, in every flavour of tar."""

import gzip
import io
import json
import os
import pickle
import tarfile

import cv2
import numpy as np
import pytest

from lrface.data.source import FaceSource, check_source, open_source
from lrface.data.webdataset import ShardWriter, WebDatasetSource
from lrface.errors import LrfaceError


def picture(seed, side=16, kind=".png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(kind, pixels[:, :, ::-1])[1].tobytes()


def lay_down(path, entries, form=tarfile.USTAR_FORMAT, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, **options) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(labels, prefix="", first=0):
    entries = []
    for number, label in enumerate(labels, first):
        entries += [
            (f"{prefix}{number:04d}.png", picture(number)),
            (f"{prefix}{number:04d}.cls", b"%d\n" % label),
        ]
    return entries


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "a/b.c/", "long/" * 17, "very/" * 60, "ünïcödé/" * 20])
def test_flavours_of_tar(tmp_path, form, prefix):
    if form == tarfile.USTAR_FORMAT and len(prefix.encode()) > 90:
        pytest.skip("ustar holds no such name")
    path = lay_down(tmp_path / "faces.tar", samples([0, 1, 1], prefix), form)
    source = open_source(path)
    assert isinstance(source, WebDatasetSource) and isinstance(source, FaceSource)
    check_source(source, "faces")
    assert source.labels.tolist() == [0, 1, 1] and source.identities == ["0", "1"]
    assert [source.encoded(number) for number in range(3)] == [picture(number) for number in range(3)]
    assert source.sources()[1] == f"faces/{prefix}0001"
    assert source.image(-1).shape == (16, 16, 3)
    with pytest.raises(IndexError):
        source.image(3)


def test_shards_and_kinds(tmp_path):
    entries = [
        ("x/1.JPG", picture(1, kind=".jpg")),
        ("x/1.json", json.dumps({"label": 1, "identity": "Bela", "source": "b/1"}).encode()),
        ("x/1.txt", b"a caption"),
        ("x/2.seg.png", b"a mask, not the image"),
        ("x/2.webp", picture(2, kind=".webp")),
        ("x/2.cls", b" 0 "),
        ("x/2.json", b'{"identity": "Ada", "source": "a/2"}'),
        ("notes.txt", b"no sample"),
    ]
    lay_down(tmp_path / "faces" / "1.tar", entries)
    lay_down(tmp_path / "faces" / "0.tar", [("0.jpeg", picture(0, kind=".jpg")), ("0.json", b'{"label": 2}')])
    source = open_source(tmp_path / "faces")
    assert source.labels.tolist() == [2, 1, 0] and source.identities == ["Ada", "Bela", "2"]
    assert source.encoded(2) == picture(2, kind=".webp")
    assert source.sources() == ["0/0", "1/x/1", "1/x/2"]  # the first has no source


def test_written_and_read(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=3000)
    for number in range(9):
        writer.add(
            picture(number), "png", number // 3, f"person {number // 3}", f"{number // 3}/{number}.png"
        )
    writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "000000.tar" and len(names) > 1
    with tarfile.open(tmp_path / names[0]) as archive:
        listed = [member.name for member in archive]
        assert listed[:3] == ["000000000.png", "000000000.cls", "000000000.json"]
        assert archive.extractfile("000000000.png").read() == picture(0)
    source = open_source(tmp_path)
    assert source.identities == ["person 0", "person 1", "person 2"] and len(source) == 9
    assert source.sources()[8] == "2/8.png" and source.encoded(8) == picture(8)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.encoded(8) == picture(8) and len(pickle.dumps(source)) < 4000
    child = os.fork()
    if child == 0:
        os._exit(0 if source.encoded(4) == picture(4) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_compressed_shards_are_refused_with_what_to_do(tmp_path):
    plain = lay_down(tmp_path / "plain.tar", samples([0, 1])).read_bytes()
    for name in ("faces.tar.gz", "faces.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(plain))
        with pytest.raises(LrfaceError, match=f"{name}: is a compressed tar file.*gzip -d"):
            open_source(tmp_path / name)
    (tmp_path / "hidden.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(LrfaceError, match="hidden.tar: is a compressed tar file"):
        open_source(tmp_path / "hidden.tar")
    lay_down(tmp_path / "zst.tar", [])
    (tmp_path / "zst.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(LrfaceError, match="zstd -d"):
        open_source(tmp_path / "zst.tar")


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            [("1.png", picture(1))],
            "sample '1': an image without a label; expected 1.cls or .json with 'label'",
        ),
        ([("1.png", picture(1)), ("1.cls", b"cat")], "its .cls is b'cat', no whole number"),
        ([("1.png", picture(1)), ("1.cls", b"-1")], "label -1 is no number of an identity"),
        ([("1.png", picture(1)), ("1.cls", b"9" * 18)], "is no number of an identity"),
        ([("1.png", picture(1)), ("1.cls", b"99999999")], "run from 99999999 to 99999999"),
        ([("1.png", picture(1)), ("1.json", b'{"label": "7"}')], "'label' in its .json is '7'"),
        ([("1.png", picture(1)), ("1.json", b"{")], "its .json cannot be read"),
        ([("1.png", picture(1)), ("1.json", b"[" * 100_000)], "its .json cannot be read"),
        ([("1.txt", b"x")], "no sample with an image"),
        ([], "no sample with an image"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, entries, message):
    lay_down(tmp_path / "x.tar", entries)
    with pytest.raises(LrfaceError, match=message):
        open_source(tmp_path / "x.tar")


def test_damage_is_named(tmp_path):
    path = lay_down(tmp_path / "x.tar", samples([0, 1]))
    data = path.read_bytes()
    path.write_bytes(data[:700])
    with pytest.raises(
        LrfaceError, match=r"x.tar: the member at byte 0 says \d+ bytes, 188 are left: it was cut off"
    ):
        open_source(path)
    path.write_bytes(b"z" + data[1:])
    with pytest.raises(LrfaceError, match="at byte 0 does not match its checksum"):
        open_source(path)
    path.write_bytes(data[:512] + data[512 + 512 :])
    with pytest.raises(LrfaceError, match="no tar header at byte|does not match its checksum|ends within"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(LrfaceError, match="it is empty"):
        open_source(path)
