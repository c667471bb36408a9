"""RecordIO against files laid down byte by byte from the format's description."""

import os
import pickle
import struct

import cv2
import numpy as np
import pytest

from lrface.data.recordio import RecordFile, RecordIOSource, RecordWriter
from lrface.data.source import FaceSource, check_source, open_source
from lrface.errors import LrfaceError

MAGIC = 0xCED7230A


def picture(number, side=16):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), pixels


def frame(data, flag=0):
    return struct.pack("<II", MAGIC, flag << 29 | len(data)) + data + bytes(-len(data) % 4)


def header(label, number=0):
    if isinstance(label, float):
        return struct.pack("<IfQQ", 0, label, number, 0)
    return struct.pack(f"<IfQQ{len(label)}f", len(label), 0.0, number, 0, *label)


def lay_down(folder, records, keys=None, name="train"):
    """A file of records with its index."""
    folder.mkdir(exist_ok=True)
    rec, idx = b"", ""
    for key, record in zip(keys or range(len(records)), records, strict=True):
        idx += f"{key}\t{len(rec)}\n"
        rec += record if record[:4] == struct.pack("<I", MAGIC) else frame(record)
    (folder / f"{name}.rec").write_bytes(rec)
    (folder / f"{name}.idx").write_text(idx)
    return folder


def insightface(folder):
    """Two identities of 2 and 3 images in InsightFace's flavour."""
    labels = [0.0, 0.0, 1.0, 1.0, 1.0]
    records = [header((6.0, 8.0))]
    records += [header(label, 1 + i) + picture(i)[0] for i, label in enumerate(labels)]
    records += [header((1.0, 3.0), 6), header((3.0, 6.0), 7)]
    lay_down(folder, records)
    (folder / "property").write_text("2,16,16")
    return folder


def test_insightface_flavour(tmp_path):
    source = open_source(insightface(tmp_path / "faces"))
    assert isinstance(source, RecordIOSource) and isinstance(source, FaceSource)
    check_source(source, "faces")
    assert source.format == "recordio" and source.declared == (2, 16, 16) and source.with_header
    assert source.labels.tolist() == [0, 0, 1, 1, 1] and source.labels.dtype == np.int64
    assert source.identities == ["0", "1"] and len(source) == 5
    for i in range(5):
        assert source.encoded(i) == bytes(source.view(i)) == picture(i)[0]
        np.testing.assert_array_equal(source.image(i), picture(i)[1])
    assert source.sources()[2] == "1/00000003" and len(set(source.sources())) == 5
    np.testing.assert_array_equal(source.image(-1), picture(4)[1])
    with pytest.raises(IndexError):
        source.image(5)
    assert isinstance(open_source(tmp_path / "faces" / "train.rec"), RecordIOSource)


def test_labels_without_ranges_and_with_several_numbers(tmp_path):
    records = [header((4.0, 4.0))]
    records += [header((float(label), 0.5)) + picture(label)[0] for label in (2, 0, 1)]
    source = RecordIOSource(lay_down(tmp_path, records))
    assert source.labels.tolist() == [2, 0, 1]
    assert source.encoded(0) == picture(2)[0]


def test_ranges_that_contradict_the_records_are_not_used(tmp_path):
    insightface(tmp_path)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    at = RecordFile(tmp_path / "train.rec").offsets[6]  # range of identity 0: (1, 3) becomes (1, 4)
    struct.pack_into("<f", data, int(at) + 8 + 24 + 4, 4.0)
    (tmp_path / "train.rec").write_bytes(data)
    assert RecordIOSource(tmp_path).labels.tolist() == [0, 0, 1, 1, 1]


def test_plain_im2rec_flavour(tmp_path):
    # Keys are in no order, as after a shuffled list; images come in the order of the file.
    records = [header(float(label), key) + picture(key)[0] for key, label in ((7, 1), (0, 0), (3, 1))]
    lay_down(tmp_path, records, keys=[7, 0, 3], name="val")
    source = open_source(tmp_path)
    assert isinstance(source, RecordIOSource) and not source.with_header and source.declared is None
    assert source.labels.tolist() == [1, 0, 1]
    assert [source.encoded(i) for i in range(3)] == [picture(key)[0] for key in (7, 0, 3)]
    (tmp_path / "val.idx").unlink()
    rebuilt = RecordIOSource(tmp_path)
    assert rebuilt.labels.tolist() == [1, 0, 1] and "val.idx does not exist" in rebuilt.records.rebuilt


def test_records_of_several_parts(tmp_path):
    magic = struct.pack("<I", MAGIC)
    image = b"abcd" + magic + b"efgh" + magic + magic + b"xyz"
    whole = header(0.0) + image
    parts = [frame(header(0.0) + b"abcd", 1), frame(b"efgh", 2), frame(b"", 2), frame(b"xyz", 3)]
    lay_down(tmp_path, [header(1.0) + b"0123", b"".join(parts), header(1.0) + b"tail"])
    for _ in range(2):  # with the index and without
        source = RecordIOSource(tmp_path)
        assert len(source) == 3 and source.labels.tolist() == [1, 0, 1]
        assert bytes(source.records.read(int(source.records.offsets[1]))) == whole
        assert [source.encoded(i) for i in range(3)] == [b"0123", image, b"tail"]
        (tmp_path / "train.idx").unlink(missing_ok=True)


def test_writer_cuts_records_where_the_magic_number_stands(tmp_path):
    magic = struct.pack("<I", MAGIC)
    images = [magic * 3, b"a" + magic, b"1234" + magic + b"5" + magic + b"678", b"", b"z" * 5]
    writer = RecordWriter(tmp_path, (1, 1))
    for image in images:
        writer.add(image, 0)
    assert writer.finish(["only"])
    data = (tmp_path / "train.rec").read_bytes()
    source = RecordIOSource(tmp_path)
    assert [source.encoded(i) for i in range(len(images))] == images
    assert source.records.rebuilt == ""
    # No reader that looks for the magic number at multiples of 4 is led astray.
    found = [at for at in range(0, len(data), 4) if data[at : at + 4] == magic]
    walked, at = [], 0
    while at < len(data):
        walked.append(at)
        at += 8 + (struct.unpack_from("<I", data, at + 4)[0] & (1 << 29) - 1) + 3 & ~3
    assert found == walked


def test_written_files_hold_what_the_format_says(tmp_path):
    writer = RecordWriter(tmp_path, (16, 16))
    for number, label in enumerate([0, 0, 2]):
        writer.add(picture(number)[0], label)
    assert writer.finish(["Ada", "Bela", "Çelik"])
    assert (tmp_path / "property").read_text() == "3,16,16"
    expected = [header((4.0, 7.0))]
    expected += [header(float(label), 1 + i) + picture(i)[0] for i, label in enumerate([0, 0, 2])]
    expected += [header((1.0, 3.0), 4), header((4.0, 4.0), 5), header((3.0, 4.0), 6)]
    other = lay_down(tmp_path / "other", expected)
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / name).read_bytes() == (other / name).read_bytes()
    source = RecordIOSource(tmp_path)
    assert source.identities == ["Ada", "Bela", "Çelik"] and source.labels.tolist() == [0, 0, 2]
    with pytest.raises(LrfaceError, match=r"gaps.*label 1 \(Bela\)"):
        check_source(source, "faces")


def test_labels_out_of_order_get_no_ranges(tmp_path):
    writer = RecordWriter(tmp_path, (16, 16))
    for number, label in enumerate([0, 1, 0]):
        writer.add(picture(number)[0], label)
    assert not writer.finish(["a", "b"])
    source = RecordIOSource(tmp_path)
    assert source.labels.tolist() == [0, 1, 0] and len(source.records) == 4


@pytest.mark.parametrize("damage", ["missing", "empty", "words", "shifted", "short", "foreign", "negative"])
def test_a_bad_index_is_rebuilt(tmp_path, damage):
    index = insightface(tmp_path) / "train.idx"
    lines = index.read_text().splitlines()
    if damage == "missing":
        index.unlink()
    else:
        index.write_text(
            {
                "empty": "",
                "words": "no index\nat all\n",
                "shifted": "\n".join(f"{k}\t{int(o) + 4}" for k, o in (line.split() for line in lines)),
                "short": "\n".join(lines[:4]),
                "foreign": "\n".join(f"{k}\t{int(k) * 64}" for k, _ in (line.split() for line in lines)),
                "negative": "\n".join(["-1\t0", *lines[1:]]),
            }[damage]
        )
    source = RecordIOSource(tmp_path)
    assert "train.idx" in source.records.rebuilt
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert [source.encoded(i) for i in range(5)] == [picture(i)[0] for i in range(5)]


def test_a_file_that_was_cut_off_says_so(tmp_path):
    insightface(tmp_path)
    path = tmp_path / "train.rec"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    source = RecordIOSource(tmp_path)
    assert 0 < len(source) < 5 and "damaged or cut off" in source.records.rebuilt
    path.write_bytes(data[:6])
    with pytest.raises(LrfaceError, match="does not begin with a RecordIO record"):
        RecordIOSource(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(LrfaceError, match="it is empty"):
        RecordIOSource(tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    insightface(tmp_path)
    path = tmp_path / "train.rec"
    source = RecordIOSource(tmp_path)
    data = bytearray(path.read_bytes())
    at = int(source.records.offsets[2])
    data[at + 40 : at + 60] = bytes(20)  # within the image
    path.write_bytes(data)
    with pytest.raises(LrfaceError, match=r"train.rec: record 2 is not a readable image"):
        RecordIOSource(tmp_path).image(1)


def test_wrong_labels_are_refused(tmp_path):
    for label, message in (
        (0.5, "label 0.5"),
        (float("nan"), "label nan"),
        (-1.0, "from -1"),
        (2.0**40, "run from"),
    ):
        records = [header(label) + picture(0)[0], header(0.0) + picture(1)[0]]
        with pytest.raises(LrfaceError, match=message):
            RecordIOSource(lay_down(tmp_path, records))


def test_which_record_file(tmp_path):
    insightface(tmp_path)
    lay_down(tmp_path, [header(0.0) + picture(0)[0]], name="other")
    assert open_source(tmp_path).path.name == "train.rec"
    (tmp_path / "train.rec").rename(tmp_path / "third.rec")
    with pytest.raises(LrfaceError, match="2 record files .other.rec, third.rec.; name one"):
        open_source(tmp_path)


def test_pickle_and_fork(tmp_path):
    source = RecordIOSource(insightface(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(3), source.image(3))
    assert len(pickle.dumps(source)) < 4000  # not the mapped file
    child = os.fork()
    if child == 0:
        os._exit(0 if source.encoded(4) == picture(4)[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_large_sets_have_rounded_numbers_in_record_0(tmp_path):
    """Above 2^24 a float32 is even: the end of the images is then found by the records around it."""
    begin = (1 << 24) + 4
    keys = [0, begin - 4, begin - 3, begin - 2, begin - 1, begin]
    for rounded in (begin - 2, begin, begin + 2):
        records = [header((float(rounded), float(rounded)))]
        records += [header(float(i // 2)) + picture(i)[0] for i in range(4)]
        records += [header((1.0, 2.0))]
        source = RecordIOSource(lay_down(tmp_path, records, keys=keys))
        assert [source.encoded(i) for i in range(len(source))] == [picture(i)[0] for i in range(4)]
        assert source.labels.tolist() == [0, 0, 1, 1]
