import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lrface.benchmarks.conditions import Condition, parse_corruptions
from lrface.benchmarks.corrupted import corrupt_images
from lrface.benchmarks.face_c import face_c_tables, face_c_text
from lrface.benchmarks.packs import write_pack
from lrface.benchmarks.verification import VerificationSet, evaluate_verification, image_features
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.degrade.corruptions import CORRUPTIONS, HELD_OUT
from lrface.errors import UsageError
from lrface.evaluation import verify_models


@pytest.fixture(scope="module")
def drawn():
    faces = SyntheticFaces(12, 3)
    return VerificationSet.from_source(faces, *verification_pairs(faces, 40), "drawn")


def embed(images):
    return (images[:, :, ::8, ::8] - 0.5).flatten(1)


def test_text_becomes_conditions():
    assert parse_corruptions(["fog:3"]) == [Condition(corruption="fog", severity=3)]
    assert [c.severity for c in parse_corruptions(["snow"])] == [1, 2, 3, 4, 5]
    found = parse_corruptions(["all:2", "held-out:2", "fog:2"])
    assert [c.corruption for c in found] == [*CORRUPTIONS, *HELD_OUT] and {c.severity for c in found} == {2}
    assert len(parse_corruptions(["all"])) == 75 and found[0].losses == "gaussian_noise:2"
    for text, message in (
        ("fgo", "unknown corruption 'fgo' .did you mean 'fog'"),
        ("fog:6", "whole number from 1 to 5; found 6"),
        ("fog:x", "found 'x'"),
        ("fog:", "found ''"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_corruptions([text])


def test_features_are_those_of_corrupted_faces_in_any_batch(drawn):
    condition = Condition(corruption="contrast", severity=4)
    found = image_features(embed, drawn.images, condition, name="drawn", flip=False, batch_size=5)
    corrupted = corrupt_images(drawn.images, "contrast", 4, "face").astype(np.float32) / 255
    expected = (corrupted[:, ::8, ::8].transpose(0, 3, 1, 2) - 0.5).reshape(len(found), -1)
    assert np.abs(found - expected).max() < 1.01 / 255  # stored images are cut to whole levels
    for name in ("gaussian_noise", "snow"):
        condition = Condition(corruption=name, severity=3)
        one, many = (
            image_features(embed, drawn.images, condition, name="drawn", flip=False, batch_size=size)
            for size in (1, 9)
        )
        np.testing.assert_allclose(one, many, atol=1e-6)


def test_the_table_by_hand(drawn):
    degrade = parse_corruptions(["fog:1", "fog:5", "gaussian_noise:3", "spatter:2"])
    found = evaluate_verification(embed, drawn, (112, 28), progress=False, degrade=degrade, cross=True)
    both, probe = face_c_tables(found)
    accuracy = {
        (row["gallery_losses"], row["probe_losses"]): row["accuracy"]
        for row in found.rows
        if row["probe_size"] == 112
    }
    assert (
        both["gallery"] == "corrupted" and probe["gallery"] == "clean" and both["clean"] == accuracy["", ""]
    )
    rows = {row["corruption"]: row for row in both["corruptions"]}
    assert list(rows) == ["gaussian_noise", "fog", "spatter"] and rows["spatter"]["held_out"]
    fog = (accuracy["fog:1", "fog:1"] + accuracy["fog:5", "fog:5"]) / 2
    noise = accuracy["gaussian_noise:3", "gaussian_noise:3"]
    assert rows["fog"]["accuracies"] == [accuracy["fog:1", "fog:1"], accuracy["fog:5", "fog:5"]]
    assert rows["fog"]["accuracy"] == pytest.approx(fog) and rows["fog"]["drop"] == pytest.approx(
        both["clean"] - fog
    )
    assert both["mean"] == pytest.approx((fog + noise) / 2) and both["mean_without_noise"] == pytest.approx(
        fog
    )
    assert both["drop"] == pytest.approx(both["clean"] - both["mean"], abs=1e-3)
    assert both["relative"] == pytest.approx(100 * both["mean"] / both["clean"], abs=1e-3)
    assert both["mean_interval"][0] <= both["mean"] <= both["mean_interval"][1] and not both["complete"]
    expected = (accuracy["", "fog:1"] + accuracy["", "fog:5"]) / 2
    assert probe["corruptions"][1]["accuracy"] == pytest.approx(expected)
    text = face_c_text([{"model": "m", **both}])
    assert "spatter (held out)" in text and f"{both['mean']:.2f} %" in text
    plain = evaluate_verification(embed, drawn, (112,), progress=False)
    assert face_c_tables(plain) == []


def test_verify_prints_and_keeps_corrupted_faces(drawn, pooled_model, tmp_path, monkeypatch):
    import cv2

    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    images = [
        cv2.imencode(".png", drawn.images[index][..., ::-1])[1].tobytes()
        for pair in zip(drawn.left, drawn.right, strict=True)
        for index in pair
    ]
    write_pack(tmp_path / "drawn.bin", images, drawn.same)
    arguments = [
        "verify",
        "--model",
        str(pooled_model),
        "--benchmark",
        str(tmp_path / "drawn.bin"),
        "--resolutions",
        "112",
    ]
    arguments += ["--corruption", "contrast:2", "--corruption", "pixelate"]
    done = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "112 contrast:2 x 112 contrast:2" in done.stdout and "mean over 2 corruptions" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Corrupted faces" in page and "both images corrupted" in page
    done = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(done.stdout)
    assert [row["probe_losses"] for row in found["results"]] == [
        "",
        "contrast:2",
        *(f"pixelate:{severity}" for severity in range(1, 6)),
    ]
    assert found["face_c"][0]["corruptions"][1]["severities"] == [1, 2, 3, 4, 5]
    fresh = verify_models(
        [str(pooled_model)],
        [str(tmp_path / "drawn.bin")],
        (112,),
        degrade=parse_corruptions(["contrast:2", "pixelate"]),
        keep_features=False,
        show_progress=False,
    )
    assert fresh.face_c == found["face_c"]  # what was kept is what is computed
    assert CliRunner().invoke(app, [*arguments[:-1], "pixlate"]).exit_code == 2
