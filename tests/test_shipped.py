"""The model inside lrface: it is there, small, described, measured, and taken where no model is named."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.cli import app
from lrface.demo import align_photo, find_photo
from lrface.shipped import FOLDER, NAME, shipped_or

RESULTS = Path(__file__).resolve().parents[1] / "eval" / "results" / "shipped.json"
SIZES = (112, 56, 28, 14)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return align_photo(find_photo()).crops


@pytest.fixture(scope="module")
def embedder():
    return load_embedder()


def smaller(crop: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BOX).resize((112, 112)))


def test_it_is_small_and_says_what_it_is(embedder):
    assert sum(file.stat().st_size for file in FOLDER.glob("model.*")) <= 6e6
    card = json.loads((FOLDER / "model.json").read_text())
    assert embedder.card["weights_sha256"] == card["weights_sha256"]
    assert "non-commercial" in card["licence"] and card["training"]["images"] > 6000
    assert {"data", "labels", "teacher", "left_out_as_in_lfw"} <= card["training"].keys()
    assert {str(size) for size in SIZES} | {f"112x{size}" for size in SIZES[1:]} <= card["thresholds"].keys()
    assert "/work" not in json.dumps(card) and "/home" not in json.dumps(card)


def test_its_card_says_what_was_measured():
    measured = json.loads(RESULTS.read_text())
    card = json.loads((FOLDER / "model.json").read_text())
    assert measured["weights_sha256"] == card["weights_sha256"]
    assert measured["thresholds"] == card["thresholds"]
    text = (FOLDER / "README.md").read_text()
    for row in measured["rows"]:
        line = f"| {row['gallery_size']} x {row['probe_size']} | {row['accuracy']:.2f} |"
        assert line in text
        other = measured["onnxruntime_alone"][f"{row['gallery_size']}x{row['probe_size']}"]
        assert abs(row["accuracy"] - other) <= 0.05
    for heading in ("Data", "Labels", "Teacher", "## Licence and use", "## Limits"):
        assert heading in text


@pytest.mark.parametrize("size", [56, 28, 14])
def test_a_small_face_is_nearest_to_itself(embedder, faces, size):
    small = np.stack([smaller(face, size) for face in faces])
    cosines = embedder.similarity_matrix(list(small), list(faces))
    assert (cosines.argmax(axis=1) == np.arange(len(faces))).all()


def test_compare_without_a_model(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, face in (("a", faces[0]), ("small", smaller(faces[0], 28)), ("other", faces[1])):
        Image.fromarray(face).save(f"{name}.png")
    found = {}
    for other in ("small", "other"):
        done = CliRunner().invoke(app, ["compare", "a.png", f"{other}.png", "--json"])
        assert done.exit_code == 0, done.output
        found[other] = json.loads(done.stdout)
    assert found["small"]["verdict"] and not found["other"]["verdict"]
    assert found["small"]["threshold_from"] == "card" and found["small"]["probability"] > 0.5
    assert found["small"]["effective_resolutions"][1] < 45


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_or(NAME) == FOLDER and shipped_or("other") == Path("other")
    (tmp_path / NAME).mkdir()
    assert shipped_or(NAME) == Path(NAME)


@pytest.mark.slow
def test_lfw_is_as_on_the_card(shared):
    data = shared / "data"
    done = CliRunner().invoke(app, ["verify", "--benchmark", "lfw", "--cross", "--data", str(data), "--json"])
    assert done.exit_code == 0, done.output
    text = (FOLDER / "README.md").read_text()
    for row in json.loads(done.stdout)["results"]:
        stated = re.search(rf"^\| {row['gallery_size']} x {row['probe_size']} \| ([\d.]+)", text, re.M)
        assert abs(row["accuracy"] - float(stated[1])) <= 0.1
