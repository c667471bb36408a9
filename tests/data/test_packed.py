"""Packed data: round trips, pyarrow alone, and everything that can be wrong on disk."""

import json
import os
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pyarrow as pa
import pytest

from lrface.data.packed import (
    SCHEMA,
    PackedSource,
    read_index,
    shard_name,
    verify_shards,
    write_index,
    write_shard,
)
from lrface.data.source import FaceSource, check_source, open_source
from lrface.errors import LrfaceError

IDENTITIES = ["Ada", "Bela", "Çelik"]


def picture(seed, size=112):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def record(number, label, size=112):
    encoded = cv2.imencode(".png", picture(number, size)[:, :, ::-1])[1].tobytes()
    return {
        "image": encoded,
        "label": label,
        "identity": IDENTITIES[label],
        "source": f"{IDENTITIES[label]}/{number}.jpg",
        "face": 0,
        "landmarks": np.arange(10, dtype=np.float32).reshape(5, 2) + number,
        "box": [1, 2, 3, 4 + number],
        "score": 0.5 + number / 100,
    }


@pytest.fixture
def packed(tmp_path):
    root = tmp_path / "packed"
    root.mkdir()
    shards = [
        write_shard(root / shard_name(0), [record(0, 0), record(1, 0), record(2, 1)]),
        write_shard(root / shard_name(1), [record(3, 1), record(4, 2)]),
    ]
    write_index(root, image_size=(112, 112), identities=IDENTITIES, shards=shards, extra={"note": "test"})
    return root


def test_round_trip(packed):
    source = PackedSource(packed)
    assert isinstance(source, FaceSource)
    assert isinstance(open_source(packed), PackedSource)
    check_source(source, "packed")
    assert len(source) == 5
    assert source.image_size == 112
    assert source.identities == IDENTITIES
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    for i in range(5):
        np.testing.assert_array_equal(source.image(i), picture(i))
        assert source.encoded(i) == record(i, source.labels[i])["image"]
    np.testing.assert_array_equal(source.image(-1), picture(4))
    assert source.sources()[3] == "Bela/3.jpg"
    assert source.column("identity").tolist() == ["Ada", "Ada", "Bela", "Bela", "Çelik"]
    assert source.column("landmarks").shape == (5, 5, 2)
    np.testing.assert_array_equal(source.column("landmarks")[4], np.arange(10).reshape(5, 2) + 4)
    np.testing.assert_array_equal(source.column("box")[3], [1, 2, 3, 7])
    np.testing.assert_allclose(source.column("score"), 0.5 + np.arange(5) / 100, rtol=1e-6)
    assert source.column("face").tolist() == [0] * 5
    assert read_index(packed)["note"] == "test"
    verify_shards(packed)


def test_index_outside(packed):
    source = PackedSource(packed)
    for index in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            source.image(index)
    with pytest.raises(LrfaceError, match="no column 'colour'"):
        source.column("colour")


def test_pyarrow_alone_reads_a_shard(packed):
    script = (
        "import sys, pyarrow as pa\n"
        "table = pa.ipc.open_file(pa.memory_map(sys.argv[1])).read_all()\n"
        "assert table.column('label').to_pylist() == [0, 0, 1]\n"
        "assert table.column('image')[0].as_py()[:4] == b'\\x89PNG'\n"
        "assert len(table.column('landmarks')[0].as_py()) == 10\n"
        "assert 'lrface' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, packed / shard_name(0)], check=True, cwd=packed)


def test_same_records_same_bytes(tmp_path):
    first = write_shard(tmp_path / "a.arrow", [record(0, 0)], {"k": "v"})
    second = write_shard(tmp_path / "b.arrow", [record(0, 0)], {"k": "v"})
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    assert first["sha256"] == second["sha256"]
    assert first["bytes"] == (tmp_path / "a.arrow").stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.arrow", "b.arrow"]


def test_pickle_and_fork(packed):
    source = PackedSource(packed)
    source.image(0)  # open a shard first
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(4), picture(4))
    child = os.fork()
    if child == 0:
        good = np.array_equal(source.image(0), picture(0)) and np.array_equal(source.image(3), picture(3))
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_shards_are_opened_when_read(packed):
    # Same size, other content: opening the source must not read the shard, reading an image must name it.
    shard = packed / shard_name(1)
    shard.write_bytes(b"x" * shard.stat().st_size)
    source = PackedSource(packed)
    np.testing.assert_array_equal(source.image(0), picture(0))
    with pytest.raises(LrfaceError, match="shard-00001.arrow.*not a readable Arrow file"):
        source.image(3)
    with pytest.raises(LrfaceError, match="shard-00001.arrow.*checksum"):
        verify_shards(packed)


def test_shards_of_many_batches(packed):
    # Other writers may cut a shard into several batches.
    table = pa.ipc.open_file(packed / shard_name(0)).read_all()
    with pa.ipc.new_file(packed / shard_name(0), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    index = json.loads((packed / "index.json").read_text())
    for shard in index["shards"]:
        shard.pop("bytes")
    (packed / "index.json").write_text(json.dumps(index))
    source = PackedSource(packed)
    for i in range(5):
        np.testing.assert_array_equal(source.image(i), picture(i))
    assert source.labels.tolist() == [0, 0, 1, 1, 2]


def test_missing_and_truncated_shards(packed):
    shard = packed / shard_name(1)
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(LrfaceError, match="shard-00001.arrow: has .* bytes"):
        PackedSource(packed)
    shard.unlink()
    with pytest.raises(LrfaceError, match="shard-00001.arrow: listed in index.json but not readable"):
        PackedSource(packed)


def test_broken_image_names_shard_and_row(tmp_path):
    bad = record(1, 1) | {"image": b"no image"}
    empty = record(2, 2) | {"image": b""}
    shard = write_shard(tmp_path / shard_name(0), [record(0, 0), bad, empty])
    write_index(tmp_path, image_size=(112, 112), identities=IDENTITIES, shards=[shard])
    source = PackedSource(tmp_path)
    for row in (1, 2):
        with pytest.raises(LrfaceError, match=f"shard-00000.arrow: row {row} is not a readable image"):
            source.image(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "'format' should be 'lrface-packed', found 'other'"),
        ({"version": 99}, "version 99"),
        ({"shards": None}, "'shards' is missing"),
        ({"images": 7}, "'images' is 7 but the shards hold 5 rows"),
        ({"image_size": [112]}, "image_size"),
        ({"shards": [{"file": "../x.arrow", "rows": 5}]}, "not a file beside the index"),
        ({"shards": [{"rows": 5}]}, "shards\\[0\\] needs 'file' and 'rows'"),
    ],
)
def test_wrong_index(packed, change, message):
    index = json.loads((packed / "index.json").read_text()) | change
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(LrfaceError, match=message) as caught:
        PackedSource(packed)
    assert "index.json" in str(caught.value)


def test_index_missing_or_not_json(packed, tmp_path):
    (packed / "index.json").write_text("{")
    with pytest.raises(LrfaceError, match="index.json: is not valid JSON"):
        PackedSource(packed)
    with pytest.raises(LrfaceError, match="index.json: not found"):
        PackedSource(tmp_path)


def test_labels_outside_the_identities(tmp_path):
    shard = write_shard(tmp_path / shard_name(0), [record(0, 2)])
    write_index(tmp_path, image_size=(112, 112), identities=["Ada"], shards=[shard])
    with pytest.raises(LrfaceError, match="labels run from 2 to 2.*1 identities"):
        _ = PackedSource(tmp_path).labels


def test_rows_and_columns_must_match_the_index(tmp_path, packed):
    entry = read_index(packed)["shards"][1]
    other = write_shard(packed / shard_name(1), [record(3, 1)])
    assert other["rows"] != entry["rows"]
    index = json.loads((packed / "index.json").read_text())
    index["shards"][1]["bytes"] = other["bytes"]
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(LrfaceError, match="has 1 rows, index.json says 2"):
        PackedSource(packed).image(3)

    table = pa.table({"label": [1]})
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    write_index(tmp_path, image_size=(112, 112), identities=["Ada"], shards=[{"file": "x.arrow", "rows": 1}])
    with pytest.raises(LrfaceError, match="x.arrow: columns are \\['label'\\]"):
        _ = PackedSource(tmp_path).labels


def test_records_are_checked(tmp_path):
    incomplete = record(1, 0)
    del incomplete["score"]
    with pytest.raises(LrfaceError, match="record 1 lacks the key 'score'"):
        write_shard(tmp_path / "x.arrow", [record(0, 0), incomplete])
    with pytest.raises(LrfaceError, match="record 0: box has 3 numbers, needs 4"):
        write_shard(tmp_path / "x.arrow", [record(0, 0) | {"box": [1, 2, 3]}])
    with pytest.raises(LrfaceError, match="column label"):
        write_shard(tmp_path / "x.arrow", [record(0, 0) | {"label": "one"}])
    assert list(tmp_path.iterdir()) == []


def test_empty_shard(tmp_path):
    shard = write_shard(tmp_path / shard_name(0), [])
    write_index(tmp_path, image_size=(112, 112), identities=[], shards=[shard])
    source = PackedSource(tmp_path)
    assert len(source) == 0
    assert source.labels.shape == (0,) and source.column("landmarks").shape == (0, 5, 2)


def test_extra_may_not_replace_the_format(tmp_path):
    with pytest.raises(LrfaceError, match="'version' belongs to the format"):
        write_index(tmp_path, image_size=(1, 1), identities=[], shards=[], extra={"version": 2})


def test_write_errors_leave_nothing(tmp_path):
    (tmp_path / "x.arrow").mkdir()  # a folder where the file should go
    with pytest.raises(LrfaceError, match="x.arrow"):
        write_shard(tmp_path / "x.arrow", [record(0, 0)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.arrow"]


def test_full_disk(tmp_path):
    # /dev/full answers every write with "no space left on device".
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    aside = tmp_path / f".x.arrow.{os.getpid()}.tmp"
    aside.symlink_to("/dev/full")
    with pytest.raises(LrfaceError, match="x.arrow.*disk is full"):
        write_shard(tmp_path / "x.arrow", [record(0, 0)])
    assert list(tmp_path.iterdir()) == []


def test_schema_is_the_documented_one():
    expected = "image label identity source face landmarks box score".split()
    assert SCHEMA.names == expected
    assert SCHEMA.field("landmarks").type == pa.list_(pa.float32(), 10)
    assert SCHEMA.field("box").type == pa.list_(pa.float32(), 4)
