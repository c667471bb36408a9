"""The same gallery in Milvus Lite."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gallery_people import faces, files_with, traces, vectors
from typer.testing import CliRunner

pytest.importorskip("pymilvus", reason="pymilvus is not installed (extra milvus)")
pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed (extra milvus)")

from gallery_people import HEADER  # noqa: E402

from lrface.errors import LrfaceError, UsageError  # noqa: E402
from lrface.gallery import Gallery  # noqa: E402
from lrface.gallery.faces import templates_of  # noqa: E402
from lrface.gallery.milvus import MilvusStore  # noqa: E402


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One Milvus Lite for all tests: it takes seconds to start."""
    return str(tmp_path_factory.mktemp("milvus") / "faces.db")


def store(name, uri, **settings):
    return MilvusStore.create(name, uri, None, {**HEADER, **settings})


def folder_of(uri):
    from pathlib import Path

    return Path(uri)


def test_people_are_added_pooled_found_and_listed(uri):
    gallery = Gallery(store("first", uri), "first", None)
    rows = vectors(40)
    names = [f'o\'Neil "{number // 2}"' for number in range(40)]
    report = gallery.add_vectors(names, rows, paths=[f"/p/{n}.jpg" for n in range(40)])
    assert (report.enrolled, report.new_people) == (40, 20)
    assert gallery.add_vectors(names, rows).already == 40
    gallery.add_vectors([names[0]], vectors(1, seed=3), resolution=[200])
    again = Gallery.open("first", backend="milvus", uri=uri)
    assert again.names()[names[0]] == 3 and len(again.names()) == 20
    assert again.info()["people"] == 20 and again.info()["images"] == 41
    pooled = (rows[0].astype(np.float64) + rows[1] + vectors(1, seed=3)[0]) / 3
    (match,) = again.search_vectors(pooled, k=4, threshold=0.5)
    assert match.name == names[0] and match.candidates[0].resolution == 200
    assert abs(match.candidates[0].similarity - 1) < 1e-5 and len(match.candidates) == 4
    matches = again.search_vectors(rows, k=1, threshold=0.4)
    assert np.mean([match.name == name for match, name in zip(matches, names, strict=True)]) > 0.9
    assert again.search_vectors(vectors(1, seed=99), threshold=0.95)[0].name is None
    assert [len(each) for each in MilvusStore("first", uri, None).search(vectors(2), 500)] == [20, 20]


def test_no_byte_of_a_removed_person_is_left_in_milvus_lite(uri):
    kept = store("second", uri)
    given = faces([f"person {number // 2}!" for number in range(40)], vectors(40, seed=1))
    kept.add(given)
    kept._client.flush("second_images")
    kept._client.flush("second_people")
    own = faces(given.names[6:8], given.vectors[6:8])
    own.sha256[:], own.paths[:] = given.sha256[6:8], given.paths[6:8]
    marks = {what: content for what, content in traces(own).items() if "hash" not in what}
    marks["template"] = templates_of(own, "mean").vectors.tobytes()
    marks["key"] = own.sha256[0].hex().encode()
    here = folder_of(uri)
    # Parquet may write text compressed: what can be found before is looked for after.
    assert {what for what in marks if "vector" in what} <= {
        what for what, content in marks.items() if files_with(here, content)
    }
    assert kept.remove(["person 3!", "nobody"]) == ({"person 3!": 2}, ["nobody"])
    assert [what for what, content in marks.items() if files_with(here, content)] == []
    # Not in a compressed form either.
    import pyarrow.parquet as pq

    for file in here.rglob("second*/**/*.parquet"):
        assert "person 3!" not in json.dumps(
            pq.read_table(file).drop_columns("vector").to_pylist(), default=str
        )
    names = kept.names()
    assert "person 3!" not in names and len(names) == 19
    others = templates_of(given, "mean")
    found = MilvusStore("second", uri, None).search(others.vectors, 1)
    assert [each[0].name == name for each, name in zip(found, others.names, strict=True)].count(False) == 1
    kept.remove(list(names))
    assert kept.names() == {} and kept.search(vectors(1), 3) == [[]]
    assert kept.add(given) == 20


def test_a_rewriting_that_was_cut_short_is_completed_or_undone(uri):
    kept = store("third", uri)
    kept.add(faces(["Ann", "Ben"], vectors(2, seed=2)))
    client = kept._client
    client.rename_collection("third_people", "third_people_new")  # killed between drop and rename
    assert set(MilvusStore("third", uri, None).names()) == {"Ann", "Ben"}
    from lrface.gallery.milvus import _make_collection

    _make_collection(client, "third_people_new", "people", 24)  # killed while copying
    assert set(MilvusStore("third", uri, None).names()) == {"Ann", "Ben"}
    assert not client.has_collection("third_people_new")
    client.delete("third_settings", filter='key in ["gallery"]')  # killed while it was made
    assert not Gallery.exists("third", backend="milvus", uri=uri)
    with pytest.raises(LrfaceError, match="has no gallery 'third'"):
        MilvusStore("third", uri, None)
    assert store("third", uri).names() == {}


def test_an_add_that_was_cut_short_is_completed_by_the_same_one(uri, monkeypatch):
    kept = store("fourth", uri)
    gallery = Gallery(kept, "fourth", None)
    upsert = kept._upsert

    def cut_short(kind, rows, collection=None):
        if kind == "images":
            raise KeyboardInterrupt
        upsert(kind, rows, collection)

    monkeypatch.setattr(kept, "_upsert", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gallery.add_vectors(["Ann"], vectors(1))
    monkeypatch.undo()
    assert gallery.add_vectors(["Ann"], vectors(1)).enrolled == 1
    assert (
        gallery.names() == {"Ann": 1}
        and gallery.search_vectors(vectors(1))[0].candidates[0].similarity > 0.999
    )


def test_wrong_places(uri, tmp_path):
    for name, place, error, message in (
        ("two words", uri, UsageError, "letters, digits and underscores"),
        ("g", str(tmp_path / "gallery"), UsageError, "a file NAME.db, a server http"),
        ("g", str(tmp_path / "no" / "x.db"), UsageError, "does not exist"),
        ("nothere", uri, LrfaceError, "has no gallery 'nothere'"),
    ):
        with pytest.raises(error, match=message):
            Gallery.open(name, backend="milvus", uri=place)
    assert not Gallery.exists("g", backend="milvus", uri=str(tmp_path / "absent.db"))
    assert not (tmp_path / "absent.db").exists()
    store("fifth", uri)
    with pytest.raises(UsageError, match="has a gallery 'fifth' already"):
        store("fifth", uri)
    from lrface.gallery.milvus import _make_collection

    _make_collection(MilvusStore("fifth", uri, None)._client, "others_people", "people", 24)
    with pytest.raises(UsageError, match="a collection others_people that is no gallery's"):
        store("others", uri)
    with pytest.raises(LrfaceError, match="Milvus at http://127.0.0.1:9: "):
        Gallery.open("g", backend="milvus", uri="http://127.0.0.1:9")


def test_the_same_commands(uri, tmp_path, pooled_model):
    from PIL import Image

    from lrface.cli import app

    for number, name in enumerate(["Ada", "Ben"]):
        (tmp_path / "people" / name).mkdir(parents=True)
        pixels = (
            np.random.default_rng(number)
            .integers(0, 256, (7, 7, 3), dtype=np.uint8)
            .repeat(16, 0)
            .repeat(16, 1)
        )
        Image.fromarray(pixels).save(tmp_path / "people" / name / "0.png")

    def lrface(*arguments):
        options = ("--backend", "milvus", "--uri", uri, "--json")
        result = CliRunner().invoke(app, ["gallery", *map(str, arguments), *options])
        assert result.stdout, result.output
        return json.loads(result.stdout)

    model = ("--model", pooled_model)
    assert lrface("add", "staff", tmp_path / "people", *model)["enrolled"] == 2
    assert lrface("add", "staff", tmp_path / "people", *model)["already"] == 2
    probe = tmp_path / "people" / "Ben" / "0.png"
    assert lrface("search", "staff", probe, *model)["results"][0]["name"] == "Ben"
    assert lrface("remove", "staff", "Ben") == {"removed": {"Ben": 1}, "absent": []}
    assert lrface("search", "staff", probe, *model, "--threshold", 0.99)["results"][0]["name"] is None
    assert lrface("info", "staff", "--people")["names"] == {"Ada": 1}


def test_killed_in_the_middle_nobody_acknowledged_is_lost(tmp_path):
    """Milvus Lite in a process of its own, killed while it enrols."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from gallery_people import HEADER, faces, vectors\n"
        "from lrface.gallery.milvus import MilvusStore\n"
        "store = MilvusStore.create('g', sys.argv[1], None, HEADER)\n"
        "for n in range(10**6):\n"
        "    store.add(faces([f'p{n}'], vectors(1, seed=n), seed=n)); print(n, flush=True)\n"
    )
    from pathlib import Path

    place = str(tmp_path / "x.db")
    command = [sys.executable, "-c", code, place, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(4)]
    process.kill()
    lines += process.stdout.read().splitlines()
    process.wait()
    again = MilvusStore("g", place, None)
    assert [
        found[0].name
        for found in again.search(np.concatenate([vectors(1, seed=n) for n in range(len(lines))]), 1)
    ] == [f"p{n}" for n in range(len(lines))]
    again.close()
    shutil.rmtree(place, ignore_errors=True)
