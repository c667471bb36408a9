"""Splits by identity: nobody on both sides, nothing lost, nothing changed."""

import hashlib
import json

import cv2
import numpy as np
import pytest

from lrface.data.folder import FolderSource
from lrface.data.packed import PackedSource, verify_shards
from lrface.data.source import check_source, open_source
from lrface.data.split import choose_held_out, parse_held_out, read_drop_list, split_source
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.errors import LrfaceError, UsageError

PEOPLE = {f"person {number:02d}": number % 4 + 2 for number in range(12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    for name, count in PEOPLE.items():
        (root / name).mkdir()
        for number in range(count):
            seed = int(name[-2:]) * 1000 + number
            image = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            (root / name / f"{number}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    (root / "person 03" / "9.jpg").write_bytes(b"an image that does not decode is kept as it is")
    return root


def content(source):
    """(identity, path, SHA-256 of the file) of every image, in order."""
    return [
        (source.identities[label], path, hashlib.sha256(source.encoded(index)).hexdigest())
        for index, (label, path) in enumerate(zip(source.labels.tolist(), source.sources(), strict=True))
    ]


def split(source, place, held_out=0.25, **settings):
    summary = split_source(
        source, "faces", place / "train", place / "held", held_out, show_progress=False, **settings
    )
    return summary, open_source(place / "train"), open_source(place / "held")


def test_nobody_is_on_both_sides_and_nothing_is_lost(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lrface.data.packed.SHARD_ROWS", 7)
    source = FolderSource(folder)
    summary, train, held = split(source, tmp_path)
    for part in (train, held):
        assert isinstance(part, PackedSource)
        check_source(part, "part")  # labels without gaps
        verify_shards(part.root)
        assert part.column("identity").tolist() == [part.identities[label] for label in part.labels]
    assert set(train.identities).isdisjoint(held.identities)
    assert sorted(train.identities + held.identities) == sorted(PEOPLE)
    assert len(held.identities) == 3
    assert sorted(content(train) + content(held)) == sorted(content(source))
    # The order of the source is kept within each part.
    paths = source.sources()
    for part in (train, held):
        assert part.sources() == [path for path in paths if path.split("/")[0] in part.identities]
    assert len(train.index["shards"]) == -(-len(train) // 7)
    assert (summary.train_images, summary.held_out_images) == (len(train), len(held))
    assert summary.train_images + summary.held_out_images == len(source)
    assert train.index["split"] == {
        "source": "faces",
        "part": "train",
        "held_out": 0.25,
        "seed": 0,
        "dropped": 0,
    }
    assert train.image_shape == (24, 24)


def test_the_same_seed_gives_the_same_bytes_and_another_other_people(folder, tmp_path):
    source = FolderSource(folder)
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        split(source, tmp_path / name, seed=1 if name == "three" else 0)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    held = [
        json.loads((tmp_path / n / "held" / "index.json").read_text())["identities"] for n in ("one", "three")
    ]
    assert held[0] != held[1]


def test_the_people_held_out_do_not_depend_on_the_format(folder, tmp_path):
    """Packed data split again: same people; what only alignment knows stays."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    _, first, _ = split(FolderSource(folder), tmp_path / "a", held_out=2)
    assert np.isnan(first.column("landmarks")).all()
    _, train, held = split(first, tmp_path / "b", held_out=2)
    chosen = choose_held_out(sorted(first.identities), 2, 0)
    assert held.identities == [sorted(first.identities)[at] for at in chosen]
    assert sorted(content(train) + content(held)) == sorted(content(first))


def test_columns_of_packed_data_stay(folder, tmp_path):
    from lrface.data.packed import shard_name, write_index, write_shard

    source = FolderSource(folder)
    root = tmp_path / "packed"
    root.mkdir()
    rows = [
        {
            "image": source.encoded(index),
            "label": int(source.labels[index]),
            "identity": source.identities[source.labels[index]],
            "source": source.sources()[index],
            "face": index,
            "landmarks": np.arange(10) + index,
            "box": np.arange(4) * index,
            "score": index / 100,
        }
        for index in range(len(source))
    ]
    shard = write_shard(root / shard_name(0), rows)
    write_index(root, image_size=(24, 24), identities=source.identities, shards=[shard])
    _, train, held = split(PackedSource(root), tmp_path)
    row_of = {row["source"]: row for row in rows}
    for part in (train, held):
        for index, path in enumerate(part.sources()):
            assert part.column("face")[index] == row_of[path]["face"]
            np.testing.assert_array_equal(
                part.column("landmarks")[index].reshape(-1), row_of[path]["landmarks"]
            )
            np.testing.assert_array_equal(part.column("box")[index], row_of[path]["box"])
            assert part.column("score")[index] == np.float32(row_of[path]["score"])


def test_stored_pixels_lose_nothing_and_held_out_pairs_can_be_drawn(tmp_path):
    source = SyntheticFaces(identities=6, images_per_identity=3, size=32)
    _, train, held = split(source, tmp_path, held_out=2)
    place = {path: index for index, path in enumerate(source.sources())}
    for part in (train, held):
        for index, path in enumerate(part.sources()):
            np.testing.assert_array_equal(part.image(index), source.image(place[path]))
    left, right, same = verification_pairs(held, pairs=8, seed=0)
    assert ((held.labels[left] == held.labels[right]) == same).all()


def test_dropped_identities_are_in_neither_part(folder, tmp_path):
    source = FolderSource(folder)
    dropped = ["person 00", "person 05"]
    (tmp_path / "list.csv").write_text("reasons,identity\nname,person 00\nsame person,person 05\n")
    assert read_drop_list(tmp_path / "list.csv") == dropped
    (tmp_path / "list.txt").write_text("person 00\n\nperson 05\n")
    assert read_drop_list(tmp_path / "list.txt") == dropped
    summary, train, held = split(source, tmp_path, held_out=3, drop=dropped)
    assert set(train.identities) | set(held.identities) == set(PEOPLE) - set(dropped)
    assert (summary.dropped_identities, summary.dropped_images) == (
        2,
        PEOPLE["person 00"] + PEOPLE["person 05"],
    )
    assert sorted(content(train) + content(held)) == sorted(
        row for row in content(source) if row[0] not in dropped
    )


def test_a_list_of_another_data_set_is_refused(folder, tmp_path):
    with pytest.raises(LrfaceError, match="1 of the identities to drop are not in faces, the first: nobody"):
        split(FolderSource(folder), tmp_path, drop=["nobody"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_drop_list(tmp_path / "missing.csv")


def test_outputs_that_exist_are_left_alone(folder, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "precious").write_text("kept")
    with pytest.raises(UsageError, match="held exists"):
        split(FolderSource(folder), tmp_path)
    assert (tmp_path / "held" / "precious").read_text() == "kept"
    with pytest.raises(UsageError, match="same place"):
        split_source(FolderSource(folder), "faces", tmp_path / "a", tmp_path / "b" / ".." / "a", 0.2)


def test_a_failure_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    source = FolderSource(folder)
    source.paths[-1] = folder / "gone.jpg"
    with pytest.raises(LrfaceError, match="gone.jpg"):
        split(source, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, value", [("0.1", 0.1), ("30", 30), ("1", 1), ("0.999", 0.999)])
def test_held_out_is_a_share_or_a_number(text, value):
    assert parse_held_out(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "nan", "inf"])
def test_other_amounts_are_refused(text):
    with pytest.raises(UsageError, match="--held-out"):
        parse_held_out(text)


@pytest.mark.parametrize("held_out", [1, 11, 12, 0.01, 0.99])
def test_each_part_needs_two_people(held_out):
    with pytest.raises(UsageError, match="at least 2"):
        choose_held_out(sorted(PEOPLE), held_out, 0)
