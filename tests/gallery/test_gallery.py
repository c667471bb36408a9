"""Enrolling and searching by images: which are taken, who is found, when nobody is; and `lrface gallery`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gallery_people import files_with, new_gallery, vectors
from PIL import Image
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.cli import app
from lrface.embed import UNCALIBRATED_THRESHOLD
from lrface.errors import LrfaceError, UsageError
from lrface.gallery import Gallery, people_in
from lrface.gallery import sources as sources_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from onnx_files import write_onnx  # noqa: E402


def face(person, image=0, size=112):
    """A crop: coarse patches with grain, so that it does not look enlarged, for a person, a little noise for an image."""
    coarse = np.random.default_rng(person).integers(0, 256, (7, 7, 3)).repeat(16, 0).repeat(16, 1)
    patches = coarse * 0.7 + 38 + np.random.default_rng(person + 50).normal(0, 40, (112, 112, 1))
    noise = np.random.default_rng([person, image]).normal(0, 4, patches.shape)
    pixels = (patches + noise).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((size, size))) if size != 112 else pixels


@pytest.fixture
def embedder(pooled_model):
    return load_embedder(pooled_model)


@pytest.fixture
def photographs(tmp_path):
    """A folder for each of three people, two images each, and things that are no images."""
    root = tmp_path / "photographs"
    for person, name in enumerate(["Ada", "Zoë B", "o'Neil"]):
        (root / name / "below").mkdir(parents=True)
        Image.fromarray(face(person, 0)).save(root / name / "0.png")
        Image.fromarray(face(person, 1)).save(root / name / "below" / "1.png")
    (root / "Ada" / "broken.jpg").write_bytes(b"\xff\xd8 nothing of an image")
    (root / "Ada" / "empty.png").write_bytes(b"")
    (root / "Ada" / "notes.txt").write_text("not an image by name")
    (root / "nobody").mkdir()
    return root


def enrolled(folder, embedder, people=5, **settings):
    gallery = Gallery.create(folder, embedder, **settings)
    gallery.add({f"person {n}": [face(n, 0), face(n, 1)] for n in range(people)})
    return gallery


# -------------------------------------------------------------------------------------------------- enrolling


def test_folders_of_people_are_enrolled_and_what_fails_is_listed(tmp_path, embedder, photographs):
    with Gallery.create(tmp_path / "g", embedder) as gallery:
        report = gallery.add(people_in(photographs))
        assert (report.images, report.enrolled, report.already, report.new_people) == (8, 6, 0, 3)
        reasons = dict(report.failures)
        assert set(reasons) == {
            str(photographs / "Ada" / "broken.jpg"),
            str(photographs / "Ada" / "empty.png"),
        }
        assert gallery.names() == {"Ada": 2, "Zoë B": 2, "o'Neil": 2}
        again = gallery.add(people_in(photographs))
        assert (again.enrolled, again.already, len(again.failures), again.new_people) == (0, 6, 2, 0)
    assert files_with(tmp_path / "g", str(photographs / "Ada" / "0.png").encode())


def test_images_of_any_kind_and_the_same_one_only_once(tmp_path, embedder):
    gallery = Gallery.create(tmp_path / "g", embedder)
    Image.fromarray(face(1)).save(tmp_path / "one.png")
    encoded = (tmp_path / "one.png").read_bytes()
    given = [("Ann", tmp_path / "one.png"), ("Ann", encoded), ("Ann", str(tmp_path / "one.png"))]
    given += [("Ann", face(1, 2)), ("Ann", Image.fromarray(face(1, 3)))]
    given += [("Ann", torch.from_numpy(face(1, 4)).permute(2, 0, 1)), ("Ben", encoded), ("Ben", face(2))]
    report = gallery.add(given)
    assert (report.enrolled, report.already) == (5, 2)
    assert report.failures == [("image 6", "the same image is enrolled as 'Ann'")]
    assert gallery.add([("Ben", encoded)]).failures == [("image 0", "the same image is enrolled as 'Ann'")]
    shutil.copy(tmp_path / "one.png", tmp_path / "copy.png")
    assert gallery.add({"Ann": tmp_path / "copy.png"}).already == 1
    assert gallery.names() == {"Ann": 4, "Ben": 1}


def test_a_broken_image_twice_fails_twice(tmp_path, embedder):
    gallery = Gallery.create(tmp_path / "g", embedder)
    report = gallery.add({"Ann": [b"nothing", b"nothing", tmp_path / "missing.png", face(1)]})
    assert (report.images, report.enrolled, report.already, len(report.failures)) == (4, 1, 0, 3)
    assert ("image 1" in dict(report.failures)) and "No such file" in dict(report.failures)[
        str(tmp_path / "missing.png")
    ]


def test_a_photograph_without_a_face_is_told_apart(tmp_path, embedder):
    gallery = Gallery.create(tmp_path / "g", embedder)
    photograph = np.full((150, 200, 3), 90, np.uint8)
    report = gallery.add({"Ann": [photograph, face(1)]})
    assert report.enrolled == 1 and report.no_face == 1 and "no face found" in report.failures[0][1]
    found = gallery.search([photograph, face(1, 5)])
    assert [match.source for match in found.matches] == [1] and found.matches[0].name == "Ann"
    assert found.failures[0][0] == 0 and "no face found" in found.failures[0][1]


def test_what_was_acknowledged_before_ctrl_c_stays_and_the_same_call_goes_on(tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(sources_module, "_COMMIT_IMAGES", 3)
    gallery = Gallery.create(tmp_path / "g", embedder)
    people = {f"p{n}": face(n) for n in range(8)}
    told = []

    def stop(images):
        told.extend(images)
        if len(told) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gallery.add(people, acknowledged=stop)
    assert told == [f"image {n}" for n in range(6)] and len(Gallery.open(tmp_path / "g").names()) == 6
    report = gallery.add(people)
    assert (report.enrolled, report.already) == (2, 6)


def test_memory_is_bounded_by_bytes_too(tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(sources_module, "_COMMIT_BYTES", 2 * face(0).nbytes)
    gallery = Gallery.create(tmp_path / "g", embedder)
    told = []
    gallery.add({f"p{n}": face(n) for n in range(5)}, acknowledged=lambda images: told.append(len(images)))
    assert told == [2, 2, 1]


def test_pooling_by_norm_weighs_clear_faces_more(tmp_path, embedder):
    found = embedder.embed([face(1), face(2)], flip=True)
    features = found.vectors * found.quality[:, None]
    for pooling, rows in (("mean", found.vectors), ("norm", features)):
        gallery = Gallery.create(tmp_path / pooling, embedder, pooling=pooling)
        gallery.add({"Ann": [face(1)]})
        gallery.add({"Ann": [face(2)]})
        template = rows.astype(np.float64).sum(axis=0)
        (match,) = gallery.search_vectors(template, threshold=0.0)
        assert match.candidates[0].similarity > 1 - 1e-6
    with pytest.raises(UsageError, match="pooling must be one of mean, norm; found 'median'"):
        Gallery.create(tmp_path / "h", embedder, pooling="median")


def test_flip_is_kept_and_used_for_both(tmp_path, embedder):
    for flip in (False, True):
        gallery = Gallery.create(tmp_path / str(flip), embedder, flip=flip)
        gallery.add({"Ann": face(1)})
        vector = embedder.embed(face(1), flip=flip).vectors
        assert gallery.search_vectors(vector)[0].candidates[0].similarity > 1 - 1e-6
        assert gallery.search(face(1)).matches[0].candidates[0].similarity > 1 - 1e-6
        mirrored = gallery.search(face(1)[:, ::-1]).matches[0].candidates[0].similarity
        assert (mirrored > 1 - 1e-6) == flip


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 501, 7, None, "\0"])
def test_names_that_are_none(tmp_path, embedder, name):
    gallery = Gallery.create(tmp_path / "g", embedder)
    with pytest.raises(UsageError, match="a person's name is text"):
        gallery.add([("Ann", face(1)), (name, face(2))])
    with pytest.raises(UsageError, match="a person's name is text"):
        gallery.remove(["Ann", name])
    assert gallery.names() == {}


def test_a_name_is_one_however_it_is_written(tmp_path):
    gallery = new_gallery(tmp_path / "g")
    written = [
        "Zoe\u0308",
        " Zo\u00eb ",
        "\u0645\u06cc\u200c\u062e",
    ]  # the last with a joiner, as Persian names have
    assert gallery.add_vectors(written, vectors(3)).new_people == 2
    assert gallery.names() == {"Zo\u00eb": 2, written[2]: 1}
    assert gallery.remove("Zoe\u0308").removed == {"Zo\u00eb": 2}


def test_vectors_of_another_model_are_refused(tmp_path, embedder, pooled_model):
    enrolled(tmp_path / "g", embedder)
    write_onnx(tmp_path / "other.onnx", size=112)
    with pytest.raises(LrfaceError, match=r"holds vectors of the model pooled \(sha256 .*other is another"):
        Gallery.open(tmp_path / "g", load_embedder(tmp_path / "other.onnx"))
    # The same file, given other pixels.
    with pytest.raises(LrfaceError, match=r"\(input .*pooled is another \(input"):
        Gallery.open(tmp_path / "g", load_embedder(pooled_model, colour="BGR"))
    gallery = Gallery.open(tmp_path / "g")
    for wrong in (np.zeros((1, 147)), np.full((1, 147), np.nan), np.ones((1, 5)), np.ones((1, 1, 147))):
        with pytest.raises(UsageError):
            gallery.add_vectors(["Ann"], wrong)
        with pytest.raises(UsageError):
            gallery.search_vectors(wrong)
    with pytest.raises(UsageError, match="opened without an embedder"):
        gallery.search(face(1))


def test_vectors_computed_elsewhere(tmp_path):
    gallery = new_gallery(tmp_path / "g")
    rows = vectors(6)
    report = gallery.add_vectors(
        list("abcabc"), 3 * rows, resolution=[112, 20, 30, 40, 50, 60], paths=["x"] * 6
    )
    assert (report.enrolled, report.new_people) == (6, 3)
    assert gallery.add_vectors(list("abc"), 3 * rows[:3]).already == 3
    (match,) = gallery.search_vectors(rows[0] + rows[3], k=3)
    assert match.candidates[0].name == "a" and match.candidates[0].resolution == 112
    for wrong in (
        {"resolution": [1, 2]},
        {"resolution": [0] * 6},
        {"quality": [np.inf] * 6},
        {"paths": ["x"]},
    ):
        with pytest.raises(UsageError):
            gallery.add_vectors(list("abcabc"), rows, **wrong)
    with pytest.raises(UsageError):
        gallery.add_vectors(["a"], rows)


# --------------------------------------------------------------------------------------------------- searching


def test_people_are_found_and_strangers_are_unknown(tmp_path, embedder):
    gallery = enrolled(tmp_path / "g", embedder)
    found = gallery.search([face(n, 7) for n in range(8)], k=3, threshold=0.8)
    assert [match.name for match in found.matches] == [*(f"person {n}" for n in range(5)), None, None, None]
    assert all(len(match.candidates) == 3 and match.threshold_from == "given" for match in found.matches)
    assert all(match.box is None and match.effective_resolution == 112 for match in found.matches)
    said = found.matches[7].to_dict()
    assert said["name"] is None and not any(each["accepted"] for each in said["candidates"])
    json.dumps([match.to_dict() for match in found.matches])
    assert gallery.search(face(1), threshold=1.0, k=1).matches[0].name is None
    for wrong in ({"k": 0}, {"k": 1.5}, {"threshold": 2}):
        with pytest.raises(UsageError):
            gallery.search(face(1), **wrong)


def test_thresholds_follow_the_smaller_resolution_of_probe_and_candidate(tmp_path, pooled_model):
    model = tmp_path / "model.onnx"
    shutil.copy(pooled_model, model)
    embedder = load_embedder(model)
    kept = {
        "model_sha256": embedder.model_sha256,
        "thresholds": {"112": 0.2, "56": 0.5, "14": 0.9},
        "thresholds_measured": {"false_accept_rate": 0.001},
    }
    Path(f"{model}.thresholds.json").write_text(json.dumps(kept))
    embedder = load_embedder(model)
    gallery = Gallery.create(tmp_path / "g", embedder)
    gallery.add({"clear": [face(1), face(1, size=16)], "small": face(2, size=16)})
    large, middle, tiny = gallery.search([face(1, 5), face(1, 5, 50), face(1, 5, 14)], k=2).matches
    assert [each.name for each in large.candidates] == ["clear", "small"]
    assert large.thresholds == [0.2, 0.9] and large.threshold_from == "card"
    assert middle.thresholds == [0.5, 0.9] and tiny.thresholds == [0.9, 0.9]
    said = gallery.info()
    assert said["thresholds"]["56"] == 0.5 and said["stranger_accepted"] == pytest.approx(
        1 - 0.999**2, abs=1e-6
    )
    assert gallery.search(face(1), threshold=0.1).matches[0].thresholds[0] == 0.1
    plain = Gallery.open(tmp_path / "g").search_vectors(np.ones(147))
    assert plain[0].threshold_from == "default" and plain[0].thresholds[0] == UNCALIBRATED_THRESHOLD


def test_thresholds_of_pairs_of_sizes_follow_both_resolutions(tmp_path):
    gallery = new_gallery(tmp_path / "g")
    rows = vectors(2)
    gallery.add_vectors(["small", "clear"], rows, resolution=[14, 112])
    table = {"112": 0.2, "14": 0.9, "112x14": 0.6}
    gallery._embedder = type("Card", (), {"card": {"thresholds": table}, "name": "m"})()
    sharp, tiny, between = gallery.search_vectors(rows[[1, 1, 1]], [112, 14, 30])
    for match, wanted in ((sharp, [0.2, 0.6]), (tiny, [0.6, 0.9]), (between, [0.6, 0.9])):
        named = dict(zip([each.name for each in match.candidates], match.thresholds, strict=True))
        assert [named["clear"], named["small"]] == wanted


def test_one_below_its_threshold_does_not_hide_the_next(tmp_path):
    gallery = new_gallery(tmp_path / "g")
    rows = vectors(2)
    gallery.add_vectors(["small", "clear"], rows, resolution=[10, 112])
    gallery._embedder = type("Card", (), {"card": {"thresholds": {"112": 0.3, "14": 0.99}}, "name": "m"})()
    (match,) = gallery.search_vectors(1.1 * rows[0] + rows[1])
    assert [each.name for each in match.candidates] == ["small", "clear"] and match.name == "clear"


# ----------------------------------------------------------------------------------------------------- sources


def test_csv_files(tmp_path, photographs):
    file = photographs / "people.csv"
    file.write_text(
        f"name,path,note\nAda,Ada/0.png,x\nBen,{photographs / 'Ada' / '0.png'},\n", encoding="utf-8-sig"
    )
    assert people_in(file) == [("Ada", photographs / "Ada/0.png"), ("Ben", photographs / "Ada" / "0.png")]
    for text, error, message in (
        ("file,name\na,b\n", UsageError, "column 'path' is missing"),
        ("", UsageError, "column 'path' is missing"),
        ("path,name\n", LrfaceError, "names no image"),
        ("path,name\na.png\n", LrfaceError, "line 2 lacks a path or a name"),
        ("path,name\na.png,\n", LrfaceError, "line 2 lacks a path or a name"),
    ):
        file.write_text(text)
        with pytest.raises(error, match=message):
            people_in(file)
    file.write_bytes(b"path,name\n\xff\xfe,\x00\n")
    with pytest.raises(LrfaceError, match="people.csv"):
        people_in(file)


def test_sources_without_people(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.fromarray(face(1)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "bare" / "Ann").mkdir(parents=True)
    for place, error, message in (
        ("missing", UsageError, "does not exist"),
        ("flat/a.png", UsageError, "is no folder and no .csv file"),
        ("empty", UsageError, "holds no folder for each person"),
        ("flat", UsageError, "with --name NAME all images in it are of that person"),
        ("bare", LrfaceError, "no images found in the folders of"),
    ):
        with pytest.raises(error, match=message):
            people_in(tmp_path / place)


# -------------------------------------------------------------------------------------------------- command line


def lrface(*arguments):
    return CliRunner().invoke(app, ["gallery", *map(str, arguments)])


def test_the_commands(tmp_path, photographs, pooled_model):
    place, model = tmp_path / "g", ("--model", pooled_model)
    result = lrface("add", place, photographs, *model, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and (report["enrolled"], report["new_people"], report["no_face"]) == (
        6,
        3,
        0,
    )
    assert len(report["failures"]) == 2
    result = lrface("add", place, photographs, *model)
    assert (
        result.exit_code == 0
        and "0 of 8 images enrolled" in result.stdout
        and "6 were there" in result.stdout
    )
    assert "broken.jpg: " in result.stderr

    for name, person in (("probe", 1), ("stranger", 9)):
        Image.fromarray(face(person, 7)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    images = [tmp_path / f"{name}.png" for name in ("probe", "stranger", "bad")]
    result = lrface("search", place, *images, *model, "--threshold", 0.8, "--top", 2)
    assert result.exit_code == 0 and "probe.png: Zoë B [Zoë B 1.000, " in result.stdout
    assert "stranger.png: unknown [" in result.stdout and "bad.png: " in result.stderr
    found = json.loads(lrface("search", place, *images, *model, "--threshold", 0.8, "--json").stdout)
    assert [each["name"] for each in found["results"]] == ["Zoë B", None]
    assert found["results"][0]["candidates"][0]["accepted"] and found["failures"][0][0] == str(images[2])

    Image.fromarray(face(5)).save(tmp_path / "new.png")
    result = lrface("add", place, tmp_path / "new.png", "--name", "New One", *model, "--json")
    assert json.loads(result.stdout)["new_people"] == 1
    said = json.loads(lrface("info", place, "--people", "--json").stdout)
    assert said["people"] == 4 and said["names"]["New One"] == 1 and said["model"]["name"] == "pooled"
    text = lrface("info", place, *model, "--people").stdout
    assert "people               4" in text and "New One: 1 images" in text

    result = lrface("remove", place, "Zoë B", "Nobody")
    assert result.exit_code == 1 and "removed Zoë B: 2 images" in result.stdout
    assert "nobody here is called 'Nobody'" in result.stderr
    assert json.loads(lrface("remove", place, "Ada", "--json").stdout) == {
        "removed": {"Ada": 2},
        "absent": [],
    }
    assert files_with(place, "Zoë B".encode()) == files_with(place, b"Ada") == []
    assert "stranger.png: unknown" in lrface("search", place, images[1], *model, "--threshold", 0.8).stdout


def test_wrong_calls_of_the_commands(tmp_path, photographs, pooled_model):
    place, model = tmp_path / "g", ("--model", pooled_model)
    for arguments, code, message in (
        (("info", place), 1, "is no gallery"),
        (("remove", place, "Ann"), 1, "is no gallery"),
        (("search", place, photographs, *model), 1, "is no gallery"),
        (("search", place, tmp_path / "nothing", *model), 1, "no images found"),
        (("add", place, tmp_path / "nothing", *model), 2, "does not exist"),
        (("add", place, photographs, "--model", tmp_path / "no.onnx"), 1, "no such file"),
        (("add", place, photographs, *model, "--pooling", "best"), 2, "pooling must be one of"),
        (("add", place, photographs, *model, "--index", "tree"), 2, "index must be one of"),
        (("add", place, photographs, *model, "--backend", "sqlite"), 2, "backend must be one of"),
        (("add", place, photographs, *model, "--uri", "x.db"), 2, "uri and token are for backend milvus"),
        (("add", place, photographs, *model, "--backend", "milvus"), 2, "backend milvus needs a uri"),
        (
            ("add", place, photographs / "Ada" / "broken.jpg", "--name", "Ann", *model),
            1,
            "0 of 1 images enrolled",
        ),
        (("add", photographs, photographs, *model), 2, "is no gallery; give a folder that is new or empty"),
    ):
        result = lrface(*arguments)
        assert result.exit_code == code and message in result.output, (arguments, result.output)
    lrface("add", place, photographs, *model)
    for option in ("--pooling", "norm"), ("--no-flip",):
        result = lrface("add", place, photographs, *model, *option)
        assert result.exit_code == 2 and "it cannot be" in result.output
    write_onnx(tmp_path / "other.onnx", size=112)
    result = lrface("search", place, photographs, "--model", tmp_path / "other.onnx")
    assert result.exit_code == 1 and "to which they mean nothing" in result.output


def test_photographs_of_lfw(tmp_path, shared):
    """The oracle finds enrolled people in other photographs of them, and does not know strangers."""
    oracle, images = shared / "oracle" / "mobilefacenet_ms1m.onnx", shared / "data" / "lfw" / "images"
    if not oracle.is_file() or not images.is_dir():
        pytest.skip(f"{oracle} or {images} is absent")
    people = [images / name for name in ("Adrien_Brody", "Alvaro_Uribe", "Amelie_Mauresmo", "Andy_Roddick")]
    gallery = Gallery.create(tmp_path / "g", load_embedder(oracle))
    pairs = [(each.name, image) for each in people[:2] for image in sorted(each.iterdir())[:2]]
    assert gallery.add(pairs).enrolled == 4
    matches = gallery.search([sorted(each.iterdir())[2] for each in people], threshold=0.35).matches
    assert [match.name for match in matches] == ["Adrien_Brody", "Alvaro_Uribe", None, None]
    assert all(match.box is not None and match.effective_resolution > 20 for match in matches)
