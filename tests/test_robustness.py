import json
import re

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface import robustness
from lrface.benchmarks.corrupted import corrupt_images
from lrface.cli import app
from lrface.corrupt import corrupt_set
from lrface.degrade.corruptions import CORRUPTIONS
from lrface.errors import LrfaceError, UsageError
from lrface.robustness import run_robustness

MODULE = """
import torch

class Nearest:
    "Scores by the distance of the mean colour to eight corners of the colour cube."
    def __init__(self, classes=None):
        if classes:
            self.classes = classes
        self.corners = torch.tensor([[r, g, b] for r in (0.2, 0.8) for g in (0.2, 0.8) for b in (0.2, 0.8)])
    def __call__(self, images):
        return -(images.mean(dim=(2, 3))[:, None] - self.corners).abs().sum(dim=2)

def nearest(): return Nearest()
def named(): return Nearest([f"c{i}" for i in (1, 0, 2, 3, 4, 5, 6, 7)])
def others(): return Nearest([f"d{i}" for i in range(8)])
def thousand(): return lambda images: torch.cat([Nearest()(images)] * 125, dim=1)
def three(): return lambda images: Nearest()(images)[:, :3]
"""


def coloured(count, side):
    """Images of eight colours, patterned, with their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 8
    corners = np.array([[r, g, b] for r in (0.2, 0.8) for g in (0.2, 0.8) for b in (0.2, 0.8)])
    patterns = np.stack([cv2.resize(rng.random((5, 5, 3)), (side, side)) for _ in range(count)]) - 0.5
    images = np.clip(
        corners[labels][:, None, None] + 0.6 * patterns + rng.normal(0, 0.12, (count, 1, 1, 3)), 0, 1
    )
    return (images * 255).round().astype(np.uint8), labels


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "colour_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    images, labels = coloured(40, 32)
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    return tmp_path


MODEL = "colour_models:nearest"


def run(models, benchmark, clean=None, **options):
    models = [models] if isinstance(models, str) else models
    return run_robustness(models, benchmark, clean, show_progress=False, device="cpu", **options)


def test_errors_by_hand(place):
    images, labels = coloured(40, 32)
    found = run(MODEL, "cifar10_c", "clean.npz", corruptions=["contrast", "shot_noise"]).to_json()
    import colour_models

    def wrong(pixels):
        scores = colour_models.nearest()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        order = scores.argsort(dim=1, descending=True).numpy()
        return (order[:, 0] != labels).mean(), (order[:, :5] != labels[:, None]).all(axis=1).mean()

    result = found["results"][0]
    assert result["clean_error"] == pytest.approx(100 * wrong(images)[0])
    assert 0 < result["clean_error"] < 60
    for row in result["corruptions"]:
        for severity in range(1, 6):
            one, five = wrong(corrupt_images(images, row["corruption"], severity, "cifar"))
            assert row["errors"][severity - 1] == pytest.approx(100 * one, abs=1e-3)
            assert row["top5_errors"][severity - 1] == pytest.approx(100 * five, abs=1e-3)
    assert result["mean_error"] == pytest.approx(
        np.mean([row["error"] for row in result["corruptions"]]), abs=1e-3
    )
    assert result["mce"] is None and any("no errors of AlexNet" in note for note in found["notes"])


def test_on_the_fly_equals_stored_and_any_batch(place):
    names = ["fog", "gaussian_noise", "spatter"]
    fly = run(MODEL, "cifar10_c", "clean.npz", corruptions=names, batch_size=7).to_json()
    assert fly["made"] == "on the fly" and json.dumps(fly) == json.dumps(
        run(MODEL, "cifar10_c", "clean.npz", corruptions=names, batch_size=40, workers=1).to_json()
    )
    corrupt_set("clean.npz", "data/cifar10_c", "cifar-c", names, show_progress=False)
    stored = run(MODEL, "cifar10_c", "clean.npz", corruptions=names).to_json()
    assert stored["made"] == "stored" and stored["results"] == fly["results"]
    assert fly["results"][0]["held_out_mean_error"] is not None
    alone = run(MODEL, "data/cifar10_c").to_json()
    assert alone["corruptions"] == ["fog", "gaussian_noise"] and alone["results"][0]["clean_error"] is None
    assert any("no clean error" in note for note in alone["notes"])
    with pytest.raises(LrfaceError, match="holds no snow at severity 1; found fog, gaussian_noise, spatter"):
        run(MODEL, "data/cifar10_c", corruptions=["snow"])


def photographs(root, classes, side=240):
    images, labels = coloured(len(classes), side)
    for index, image in enumerate(images):
        path = root / classes[labels[index]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    return root


def test_imagenet_on_the_fly_equals_stored(place):
    photographs(place / "clean", [f"c{index}" for index in range(8)])
    options = {"corruptions": ["snow", "brightness"], "severities": [3]}
    corrupt_set("clean", "stored", "imagenet-c", options["corruptions"], [3], show_progress=False)
    stored, fly = (
        run("colour_models:nearest", name, "clean", **options).to_json() for name in ("stored", "imagenet_c")
    )
    assert stored["results"] == fly["results"] and stored["benchmark"] == fly["benchmark"] == "imagenet_c"
    assert any("severities 1 to 5" in note for note in fly["notes"])
    (place / "stored/snow/3/c0/0.JPEG").write_bytes(b"broken")
    found = run("colour_models:nearest", "stored", "clean", **options).to_json()
    assert found["broken"] == [["snow at severity 3: c0/0.JPEG", found["broken"][0][1]]]
    (place / "stored/brightness/3/c1/1.JPEG").unlink()
    with pytest.raises(
        LrfaceError, match="brightness at severity 3: 7 images, 8 at first; .* lacks c1/1.JPEG"
    ):
        run("colour_models:nearest", "stored", "clean", **options)


def test_imagenet_figures_are_normalised(place):
    wnids = ["n01440764", "n01443537", "n02124075"]
    photographs(place / "clean", wnids, 225)
    found = run("colour_models:thousand", "imagenet_c", "clean").to_json()
    result = found["results"][0]
    assert found["corruptions"] == list(CORRUPTIONS) and found["notes"] == [
        "Corrupted images were compressed as JPEG of quality 85, as the published ones are."
    ]
    ce = [row["error"] / row["alexnet_error"] * 100 for row in result["corruptions"]]
    assert result["mce"] == pytest.approx(np.mean(ce), rel=1e-4) and result["mce_interval"] is not None
    relative = [
        100 * (row["error"] - result["clean_error"]) / (row["alexnet_error"] - 43.478)
        for row in result["corruptions"]
    ]
    assert result["relative_mce"] == pytest.approx(np.mean(relative), rel=1e-3)
    options = {"corruptions": ["fog"], "severities": [1]}
    some = run("colour_models:thousand", "imagenet_c", "clean", classes="imagenet200", **options).to_json()
    # of the three, goldfish and Egyptian cat are classes of Tiny-ImageNet
    assert (
        some["images"] == some["classes"] == 2 and some["predictions_among"] == "the classes of imagenet200"
    )
    assert some["results"][0]["mce"] is None and any("all 1000 classes" in note for note in some["notes"])
    (place / "list.txt").write_text("n01440764/0.JPEG\n2.png\n")
    assert (
        run("colour_models:thousand", "imagenet_c", "clean", subset="list.txt", **options).about["images"]
        == 2
    )


def test_classes_are_matched_by_name(place):
    photographs(place / "clean", [f"c{index}" for index in range(8)], 32)
    options = {"corruptions": ["fog"], "severities": [1]}
    plain = run("colour_models:nearest", "cifar10_c", "clean", **options).to_json()["results"][0]
    named = run("colour_models:named", "cifar10_c", "clean", **options).to_json()["results"][0]
    assert plain["clean_error"] + 25 <= named["clean_error"]  # two of eight classes have changed places
    for model, message in (
        ("others", "tells 8 classes apart .its first is 'd0'., clean has 8, the first 'c0'"),
        ("three", "tells 3 classes apart .its classes have no names."),
    ):
        with pytest.raises(UsageError, match=message):
            run(f"colour_models:{model}", "cifar10_c", "clean", **options)
    with pytest.raises(UsageError, match="tells 3 classes apart, labels of clean.npz run to 7"):
        run("colour_models:three", "cifar10_c", "clean.npz", **options)
    (place / "classes.txt").write_text("c0\nc3\n")
    two = run("colour_models:nearest", "cifar10_c", "clean", classes="classes.txt", **options).to_json()
    assert two["classes"] == 2 and two["results"][0]["corruptions"][0]["top5_errors"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"benchmark": "imagnet_c"}, r"neither a folder nor one of .*did you mean 'imagenet_c'"),
        ({"severities": [7]}, "whole number from 1 to 5; found 7"),
        ({"corruptions": ["snwo"]}, "unknown corruption 'snwo' .did you mean 'snow'"),
        ({"classes": "imagenet200"}, "the classes of clean.npz have no names"),
        ({"subset": "robustbench5000"}, "has none of these images; its names are like 000000"),
        ({"benchmark": "mnist_c"}, "takes images of 3 channels, the benchmark's have 1"),
        ({"models": []}, "at least one model"),
    ],
)
def test_wrong_usage_is_named(place, options, message):
    (place / "colour_models.py").write_text(
        MODULE.replace("def __init__", "input_size = None; channels = 3\n    def __init__")
    )
    with pytest.raises(UsageError, match=message):
        run(**{"models": MODEL, "benchmark": "cifar10_c", "clean": "clean.npz", **options})


def test_what_is_not_there_is_named(place):
    with pytest.raises(LrfaceError, match="CIFAR-10-C is not on this machine: put it into cifar10_c/"):
        run(MODEL, "cifar10_c")
    images, labels = coloured(4, 40)
    np.savez(place / "large.npz", images=images, labels=labels)
    with pytest.raises(LrfaceError, match="none of its images can be used.*CIFAR-10-C takes images of 32x32"):
        run(MODEL, "cifar10_c", "large.npz", corruptions=["fog"])


def test_mnist_c_is_read(place):
    (place / "colour_models.py").write_text(
        "class Grey:\n    channels = 1\n    def __call__(self, images):\n        means = images.mean(dim=(1, 2, 3))\n"
        "        return (means[:, None] - __import__('torch').tensor([0.2, 0.5, 0.8])).abs().neg()\n"
        "def grey(): return Grey()\n"
    )
    import sys

    sys.modules.pop("colour_models", None)
    images = np.stack([np.full((28, 28), level, np.uint8) for level in (51, 128, 204)])
    np.savez(place / "digits.npz", images=images, labels=np.arange(3))
    corrupt_set("digits.npz", "mnist", "mnist-c", show_progress=False)
    found = run("colour_models:grey", "mnist").to_json()
    sys.modules.pop("colour_models", None)
    result = found["results"][0]
    assert (
        found["benchmark"] == "mnist_c" and len(result["corruptions"]) == 15 and result["clean_error"] == 0.0
    )
    assert result["mean_error"] is not None and result["corruptions"][0]["severities"] == [1]


def test_the_command_line_and_its_page(place):
    arguments = [
        "robustness",
        MODEL,
        "colour_models:named",
        "--benchmark",
        "cifar10_c",
        "--clean",
        "clean.npz",
    ]
    arguments += ["--held-out", "--severities", "1,5", "--device", "cpu", "--report", "report.html", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["model"] for row in found["results"]] == [MODEL, "colour_models:named"]
    text = (place / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text
    for row in found["results"][0]["corruptions"]:
        assert f"{row['errors'][1]:.1f}</td>" in text and row["corruption"].replace("_", " ") in text
    plain = CliRunner().invoke(app, arguments[:-3] + ["--corruptions", "fog"])
    assert plain.exit_code == 0 and "fog " in plain.stdout and "mean error" in plain.stdout


def test_further_clean_images(place):
    images, labels = coloured(40, 32)
    brighter = np.clip(images.astype(int) + 60, 0, 255).astype(np.uint8)
    np.savez(place / "brighter.npz", images=brighter, labels=labels)
    found = run(
        MODEL, "cifar10_c", "clean.npz", corruptions=["contrast"], shifted=["brighter.npz", "clean.npz"]
    )
    import colour_models

    scores = colour_models.nearest()(torch.from_numpy(brighter).permute(0, 3, 1, 2).float() / 255)
    wrong = (scores.argmax(1).numpy() != labels).mean()
    result = found.to_json()["results"][0]
    assert 0 < wrong < 1 and [each["origin"] for each in result["shifted"]] == ["brighter.npz", "clean.npz"]
    assert (
        result["shifted"][0]["error"] == pytest.approx(100 * wrong) and result["shifted"][0]["images"] == 40
    )
    low, high = result["shifted"][0]["error_interval"]
    assert low < 100 * wrong < high
    assert result["shifted"][1]["error"] == result["clean_error"]
    assert "brighter.npz" in found.to_text() and "brighter.npz" in found.page()
    assert (
        "shifted"
        not in run(MODEL, "cifar10_c", "clean.npz", corruptions=["contrast"]).to_json()["results"][0]
    )
    np.savez(place / "small.npz", images=images[:, :16, :16], labels=labels)
    with pytest.raises(
        LrfaceError, match=r"small.npz: none of its images can be used; the first: .*\[16, 16, 3\]"
    ):
        run(MODEL, "cifar10_c", "clean.npz", corruptions=["contrast"], shifted=["small.npz"])


def test_further_images_of_other_classes_are_refused_before_anything_is_measured(place, monkeypatch):
    images, labels = coloured(4, 32)
    np.savez(place / "others.npz", images=images, labels=labels + 50)
    monkeypatch.setattr(robustness, "_on_the_fly", lambda *_: pytest.fail("it was measured first"))
    with pytest.raises(UsageError, match=r"others\.npz"):
        run(MODEL, "cifar10_c", "clean.npz", corruptions=["contrast"], shifted=["others.npz"])


def test_the_option_for_further_images(place):
    arguments = [
        "robustness",
        MODEL,
        "--benchmark",
        "cifar10_c",
        "--clean",
        "clean.npz",
        "--corruptions",
        "contrast",
    ]
    result = CliRunner().invoke(app, [*arguments, "--shifted", "clean.npz", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"][0]["shifted"][0]["origin"] == "clean.npz"
