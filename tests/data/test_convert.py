"""Conversions: round trips through every format, training in place from each, and nothing half-done."""

import json
import os
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from lrface import recipes
from lrface.cli import app
from lrface.config import parse_recipe
from lrface.data.convert import TARGETS, pack, unpack
from lrface.data.packed import PackedSource, verify_shards
from lrface.data.source import check_source, open_source
from lrface.errors import LrfaceError, UsageError

FORMATS = {"arrow": "packed", "rec": "recordio", "bcolz": "bcolz", "memfile": "memfile", "parquet": "parquet",
           "webdataset": "webdataset"}  # fmt: skip


def picture(seed, side=24):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def write(path, seed, side=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture(seed, side)[:, :, ::-1])


@pytest.fixture
def folder(tmp_path):
    """Four identities of JPEG and PNG files; names that need care in every format."""
    root = tmp_path / "faces"
    names = [
        "a b/1.jpg",
        "a b/2.png",
        "a b/deep/1.jpg",
        "b/x.jpeg",
        "b/x.png",
        "b/ü.jpg",
        "c/10.jpg",
        "c/9.JPG",
    ]
    for seed, name in enumerate([*names, "d/only.png"]):
        write(root / name, seed)
    return root


def same(first, second, pixels=False):
    """Every image and label is alike; returns how many."""
    assert len(first) == len(second)
    assert first.labels.tolist() == second.labels.tolist()
    for index in range(len(first)):
        if pixels:
            np.testing.assert_array_equal(first.image(index), second.image(index))
        else:
            assert first.encoded(index) == second.encoded(index)
    return len(first)


def test_folder_rec_arrow_bcolz_folder(folder, tmp_path):
    start = open_source(folder)
    for before, after in (("faces", "rec"), ("rec", "arrow")):
        pack(tmp_path / before, tmp_path / after, after, show_progress=False)
        assert same(start, open_source(tmp_path / after)) == 9
    unpack(tmp_path / "arrow", tmp_path / "files", show_progress=False)
    assert same(start, open_source(tmp_path / "files")) == 9
    pack(tmp_path / "arrow", tmp_path / "bcolz", "bcolz", show_progress=False)
    summary = unpack(tmp_path / "bcolz", tmp_path / "end", show_progress=False)
    end = open_source(tmp_path / "end")
    assert same(start, end, pixels=True) == 9
    assert end.identities == start.identities == ["a b", "b", "c", "d"]
    assert summary.labels_follow_names and summary.images == 9 and summary.identities == 4


@pytest.mark.parametrize("to", TARGETS)
def test_every_format_holds_the_same(folder, tmp_path, to):
    start, out = open_source(folder), tmp_path / "out"
    summary = pack(folder, out, to, show_progress=False)
    source = open_source(out)
    assert source.format == FORMATS[to] and summary.format == to and summary.source_format == "folder"
    same(start, source, pixels=to in ("bcolz", "memfile"))
    assert source.identities == start.identities
    check_source(source, to)
    if to in ("arrow", "parquet", "webdataset"):
        assert source.sources() == start.sources()
    assert len(set(source.sources())) == 9
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (summary.images, summary.identities, summary.skipped, summary.resized) == (9, 4, 0, 0)


def test_packed_data_keeps_what_alignment_knew_and_says_what_is_unknown(folder, tmp_path):
    pack(folder, tmp_path / "one", show_progress=False)
    one = PackedSource(tmp_path / "one")
    assert np.isnan(one.column("landmarks")).all() and np.isnan(one.column("box")).all()
    assert np.isnan(one.column("score")).all() and not one.column("face").any()
    verify_shards(tmp_path / "one")
    from lrface.data.packed import shard_name, write_index, write_shard

    known = {"face": 2, "landmarks": np.arange(10.0), "box": [1, 2, 3, 4], "score": 0.5}
    rows = [
        {"image": start, "label": label, "identity": "ab"[label], "source": f"{label}.png", **known}
        for label, start in enumerate([one.encoded(1), one.encoded(4)])
    ]
    (tmp_path / "two").mkdir()
    shards = [write_shard(tmp_path / "two" / shard_name(0), rows)]
    write_index(tmp_path / "two", image_size=(24, 24), identities=["a", "b"], shards=shards)
    pack(tmp_path / "two", tmp_path / "three", show_progress=False)
    three = PackedSource(tmp_path / "three")
    assert three.column("face").tolist() == [2, 2] and three.column("score").tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(three.column("landmarks")[1].ravel(), np.arange(10))


def test_shards_hold_everything_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lrface.data.packed.SHARD_ROWS", 2)
    pack(folder, tmp_path / "out", show_progress=False)
    assert len(list((tmp_path / "out").glob("*.arrow"))) == 5
    same(open_source(folder), open_source(tmp_path / "out"))


def test_sizes_must_be_one_or_are_made_so(folder, tmp_path):
    write(folder / "c" / "90.png", 90, side=30)
    write(folder / "c" / "91.jpg", 91, side=20)
    with pytest.raises(LrfaceError, match=r"c/90.png has 30x30 pixels, a b/1.jpg has 24x24. Give --size 24"):
        pack(folder, tmp_path / "out", show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]
    summary = pack(folder, tmp_path / "out", size=24, show_progress=False)
    assert summary.resized == 2 and summary.images == 11
    start, source = open_source(folder), open_source(tmp_path / "out")
    kept = [index for index, name in enumerate(start.sources()) if name not in ("c/90.png", "c/91.jpg")]
    assert all(start.encoded(index) == source.encoded(index) for index in kept)
    assert {source.image(index).shape for index in range(11)} == {(24, 24, 3)}
    assert source.encoded(start.sources().index("c/91.jpg"))[:2] == b"\xff\xd8"
    unpack(folder, tmp_path / "any", show_progress=False)  # folders hold every size
    pack(folder, tmp_path / "pixels", "bcolz", size=12, show_progress=False)
    assert open_source(tmp_path / "pixels").image(0).shape == (12, 12, 3)


def test_broken_images_are_counted_and_left_out(folder, tmp_path):
    (folder / "a b" / "0.jpg").write_bytes(b"no image at all")
    (folder / "d" / "only.png").write_bytes(b"")
    summary = pack(folder, tmp_path / "out", "rec", show_progress=False)
    assert summary.images == 8 and summary.skipped == 2 and summary.identities_without_images == 1
    assert [entry["source"] for entry in summary.skipped_images] == ["a b/0.jpg", "d/only.png"]
    assert "no JPEG" in summary.skipped_images[0]["reason"] and "labels have gaps" in str(summary)
    with pytest.raises(LrfaceError, match=r"gaps.*label 3 \(d\)"):
        check_source(open_source(tmp_path / "out"), "out")
    for path in folder.rglob("*.*"):
        path.write_bytes(b"junk")
    with pytest.raises(LrfaceError, match="none of its 10 images could be read, the first: it is no JPEG"):
        pack(folder, tmp_path / "none", show_progress=False)
    assert not (tmp_path / "none").exists()


def test_usage(folder, tmp_path):
    with pytest.raises(UsageError, match="--to mat: unknown format; there are arrow, rec"):
        pack(folder, tmp_path / "out", "mat")
    with pytest.raises(UsageError, match="--size 0"):
        pack(folder, tmp_path / "out", size=0)
    (tmp_path / "out").mkdir()
    pack(folder, tmp_path / "out", show_progress=False)  # an empty folder is as good as none
    with pytest.raises(UsageError, match="out exists already"):
        unpack(folder, tmp_path / "out")
    with pytest.raises(LrfaceError, match="no such file or directory; training data is packed data"):
        pack(tmp_path / "nowhere", tmp_path / "x")


def test_hostile_names_stay_inside(tmp_path):
    from lrface.data.packed import shard_name, write_index, write_shard

    names = ["../../up", "/etc/x", "...", "con\0trol", "same", "Same", "a" * 300]
    rest = {"face": 0, "landmarks": [0.0] * 10, "box": [0.0] * 4, "score": 1.0}
    png = cv2.imencode(".png", picture(0)[:, :, ::-1])[1].tobytes()
    rows = [
        {"image": png, "label": label, "identity": name, "source": f"../../{label}/../../x.png", **rest}
        for label, name in enumerate(names)
    ]
    rows += [{**rows[0], "source": name} for name in ("..", "/", "x.exe", "x.png", "")]
    (tmp_path / "src").mkdir()
    shards = [write_shard(tmp_path / "src" / shard_name(0), rows)]
    write_index(tmp_path / "src", image_size=(24, 24), identities=names, shards=shards)
    before = {path for path in tmp_path.rglob("*")}
    summary = unpack(tmp_path / "src", tmp_path / "out", show_progress=False)
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path == tmp_path / "out" or tmp_path / "out" in path.parents for path in new)
    assert sum(path.is_file() for path in new) == summary.images == len(rows)
    assert summary.renamed_identities == 6 and not summary.labels_follow_names
    assert {path.suffix for path in new if path.is_file()} == {".png"}


KILLED = """
import sys, time
from lrface.data import convert
add = convert.RecordWriter.add
def slowly(self, image, label):
    add(self, image, label)
    print("one", flush=True)
    time.sleep(60)
convert.RecordWriter.add = slowly
convert.pack(sys.argv[1], sys.argv[2], "rec", show_progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_that_looks_whole(folder, tmp_path, how):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout and process.stdout.readline() == b"one\n"
    with pytest.raises(LrfaceError, match="another run is working on it"):
        pack(folder, out, "rec", show_progress=False)
    process.send_signal(how)
    process.wait(30)
    assert not out.exists()
    assert (tmp_path / ".out.partial").exists() == (how == signal.SIGKILL)
    pack(folder, out, "rec", show_progress=False)
    same(open_source(folder), open_source(out))
    assert sorted(os.listdir(out)) == ["identities.json", "property", "train.idx", "train.rec"]
    assert not (tmp_path / ".out.partial").exists()


def test_commands(folder, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["pack", str(folder), str(tmp_path / "rec"), "--to", "rec", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["images"] == 9 and summary["format"] == "rec" and summary["skipped_images"] == []
    done = runner.invoke(app, ["unpack", str(tmp_path / "rec" / "train.rec"), str(tmp_path / "files")])
    assert done.exit_code == 0 and "9 images of 4 identities" in done.stdout
    same(open_source(folder), open_source(tmp_path / "files"))
    assert runner.invoke(app, ["pack", str(folder), str(tmp_path / "rec")]).exit_code == 2
    assert runner.invoke(app, ["pack", str(tmp_path / "none"), str(tmp_path / "new")]).exit_code == 1


@pytest.fixture(scope="module")
def tiny_faces(tmp_path_factory):
    root = tmp_path_factory.mktemp("training") / "faces"
    for number in range(12):
        write(root / f"identity{number % 3}" / f"{number}.png", number, side=112)
    return root


@pytest.mark.parametrize("to", TARGETS)
def test_training_from_every_format_in_place(tiny_faces, tmp_path, to):
    """One step from the data as it lies learns what one step from the folder learns."""
    pack(tiny_faces, tmp_path / "data", to, show_progress=False)
    place = tmp_path / "data" / "train.rec" if to == "rec" else tmp_path / "data"
    weights = []
    for number, path in enumerate((tiny_faces, place)):
        recipe = parse_recipe(
            {
                "name": "tiny",
                "out": str(tmp_path / f"run{number}"),
                "seed": 1,
                "data": {"path": str(path), "batch_size": 6, "cache": False},
                "backbone": {"name": "ir18", "width": 4, "embedding_size": 8},
                "trainer": {"device": "cpu", "precision": "float32", "tensorboard": False, "compile": False},
                "stages": [{"name": "only", "method": "classify", "steps": 1}],
            }
        )
        summary = recipes.run_recipe(recipe, show_progress=False)
        assert summary.images == 12 and summary.identities == 3
        weights.append(summary.weights_sha256)
    assert weights[0] == weights[1]
