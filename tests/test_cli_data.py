"""`lrface data info` and `lrface data check` as a user runs them; overlap and split are in test_overlap."""

import csv
import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from lrface.cli import app


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)


def jpeg(image, quality=95):
    return cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()


@pytest.fixture
def faces(tmp_path):
    root = tmp_path / "faces"
    for name in ("ada", "bela"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            (root / name / f"{number}.jpg").write_bytes(jpeg(picture(len(name) * 10 + number)))
    return root


def lrface(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_info_prints_and_draws(faces, tmp_path):
    result = lrface("info", faces, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert "images          6" in result.stdout
    assert "64x64, all" in result.stdout
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None
    assert "sheet.png" in result.stderr


def test_info_as_json_is_one_object(faces):
    result = lrface("info", faces, "--json")
    info = json.loads(result.stdout)
    assert (info["images"], info["identities"], info["format"]) == (6, 2, "folder")
    assert info["sizes"] == [[64, 64, 6]]


def test_wrong_usage_and_missing_data_have_their_exit_codes(faces, tmp_path):
    for arguments in (
        ("info", faces, "--sheet", tmp_path / "sheet.gif"),
        ("info", tmp_path / "missing"),
        ("check", faces, "--workers", 0),
        ("split", faces, tmp_path / "a", tmp_path / "b", "--held-out", "some"),
        ("overlap", faces, faces, "--threshold", 7),
    ):
        result = lrface(*arguments)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
    (tmp_path / "empty").mkdir()
    result = lrface("check", tmp_path / "empty")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_check_of_sound_data_exits_with_0(faces):
    result = lrface("check", faces, "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sound"] is True
    assert (found["images"], found["findings"]) == (6, {})
    assert found["images_per_second"] > 0


def test_check_of_broken_data_lists_it_and_exits_with_1(faces, tmp_path):
    (faces / "ada" / "1.jpg").write_bytes(b"no image")
    result = lrface("check", faces, "--workers", 1, "--report", tmp_path / "report.csv")
    assert result.exit_code == 1
    assert "NOT SOUND" in result.stdout
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["identity"], row["source"]) for row in rows] == [
        ("unreadable", "ada", "ada/1.jpg")
    ]


def test_check_with_a_model_finds_likeness_within_and_across(faces, tmp_path, pooled_model):
    (faces / "ada" / "near.jpg").write_bytes(jpeg(picture(30), 90))  # ada/0.jpg at another quality
    (faces / "bela" / "wrong.jpg").write_bytes(jpeg(picture(31), 90))  # ada/1.jpg
    thresholds = ["--near-duplicate", 0.99, "--label-noise", 0.99]
    result = lrface(
        "check",
        faces,
        "--workers",
        1,
        "--model",
        pooled_model,
        *thresholds,
        "--report",
        tmp_path / "report.csv",
    )
    assert result.exit_code == 0, result.output
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["source"], row["other_source"]) for row in rows] == [
        ("near duplicate", "ada/near.jpg", "ada/0.jpg"),
        ("label noise", "bela/wrong.jpg", "ada/1.jpg"),
    ]
    assert float(rows[0]["detail"].split()[1]) > 0.99
    assert "images that look like another identity's" in result.stdout
