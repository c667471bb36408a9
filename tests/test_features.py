"""Features of clean and degraded images: the picture of Figure 2, and its figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

from lrface.benchmarks.conditions import Condition, parse_corruptions
from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.features import choose_classes, feature_figures, parse_named, run_features
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model

MODULE = '''
import torch

class Colours:
    """Means of eight by eight pixels: what shrinking to half the size hardly changes, and detail what it does."""
    input_size = 32
    def __init__(self, detail=0.0):
        self.detail = detail
    def __call__(self, images):
        means = torch.nn.functional.avg_pool2d(images - 0.5, 8).flatten(1)
        fine = (images[:, :, ::2, ::2] - images[:, :, 1::2, 1::2]).abs().mean(dim=(2, 3))
        return torch.cat([means, self.detail * fine], dim=1)

class Large(Colours):
    input_size = 64

def coarse(): return Colours()
def fine(): return Colours(30.0)
def large(): return Large()
def constant(): return Fixed(1.0)
def broken(): return Fixed(float("nan"))

class Fixed(Colours):
    def __init__(self, value):
        self.value = value
    def __call__(self, images):
        return torch.full((len(images), 4), self.value)
'''
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40), "yellow": (220, 210, 50)}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Four classes of twelve images of 32 pixels, of which one cannot be read; yellow has four alone."""
    (tmp_path / "feature_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = tmp_path / "data" / "colours" / name
        folder.mkdir(parents=True)
        for number in range(4 if name == "yellow" else 12):
            noise = rng.normal(0, 30, (32, 32, 3)) + rng.normal(0, 25, 3)
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return tmp_path


COARSE, FINE = "coarse=feature_models:coarse", "fine=feature_models:fine"


def run(models=(COARSE, FINE), data="colours", out=None, **options):
    given = {"classes": 3, "images": 10, "show_progress": False, "device": "cpu", **options}
    return run_features(models, data, out, **given)


def test_the_figures_by_their_definitions():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    centres = rng.normal(size=(3, 5))
    high = centres[labels] + 0.4 * rng.normal(size=(8, 5))
    low = high + 0.6 * rng.normal(size=(8, 5))
    high, low = ((x / np.linalg.norm(x, axis=1)[:, None]).astype(np.float32) for x in (high, low))
    found = feature_figures(high, low, labels)

    def distance(a, b):
        return float(np.sqrt(np.sum((np.asarray(a, float) - np.asarray(b, float)) ** 2)))

    means = [np.mean([high[i] for i in range(8) if labels[i] == k], axis=0) for k in range(3)]
    shift = sum(distance(high[i], low[i]) for i in range(8)) / 8
    between = (distance(means[0], means[1]) + distance(means[0], means[2]) + distance(means[1], means[2])) / 3
    assert found["shift"] == pytest.approx(shift, abs=1e-5)
    assert found["between_classes"] == pytest.approx(between, abs=1e-5)
    assert found["relative_shift"] == pytest.approx(shift / between, abs=1e-5)
    assert found["cosine"] == pytest.approx(np.mean(np.sum(high * low, axis=1)), abs=1e-5)
    for key, features in (("nearest_mean_hq", high), ("nearest_mean_lq", low)):
        right = 0
        for i in range(8):
            others = [[high[j] for j in range(8) if labels[j] == k and j != i] for k in range(3)]
            distances = [distance(features[i], np.mean(other, axis=0)) for other in others]
            right += int(np.argmin(distances)) == labels[i]
        assert found[key] == pytest.approx(100 * right / 8)
    own = sum(int(np.argmin([distance(low[i], high[j]) for j in range(8)])) == i for i in range(8))
    assert found["own_image"] == pytest.approx(100 * own / 8)
    for key, features in (("silhouette_hq", high), ("silhouette_lq", low)):
        values = []
        for i in range(8):
            to = [
                np.mean([distance(features[i], features[j]) for j in range(8) if labels[j] == k and j != i])
                for k in range(3)
            ]
            a, b = to[labels[i]], min(to[k] for k in range(3) if k != labels[i])
            values.append((b - a) / max(a, b))
        assert found[key] == pytest.approx(np.mean(values), abs=1e-5)
    assert 0 < found["own_image"] < 100 and 0 < found["nearest_mean_lq"] < 100


def test_features_that_do_not_move():
    high = np.eye(6, dtype=np.float32)
    found = feature_figures(high, high, np.array([0, 0, 0, 1, 1, 1]))
    assert found["shift"] == found["relative_shift"] == 0 and found["cosine"] == 1
    assert found["own_image"] == 100 and found["silhouette_hq"] == found["silhouette_lq"]
    same = np.ones((4, 1), np.float32)
    assert feature_figures(same, same, np.array([0, 0, 1, 1]))["relative_shift"] is None


def test_what_the_figures_say_of_two_networks(place):
    coarse, fine = run().results
    # Means of blocks know nothing of the detail that is lost; the other network looks at nothing so much.
    assert coarse["relative_shift"] < 0.5 * fine["relative_shift"]
    assert coarse["nearest_mean_hq"] >= 90 and coarse["nearest_mean_lq"] >= 90
    assert coarse["own_image"] > fine["own_image"]
    assert coarse["silhouette_lq"] > fine["silhouette_lq"]


def test_the_command_writes_picture_figures_and_points(place):
    arguments = [
        "features",
        "colours",
        "--model",
        COARSE,
        "--model",
        FINE,
        "--classes",
        "3",
        "--images",
        "10",
    ]
    arguments += ["--device", "cpu", "--json"]
    first, second, bare = (
        CliRunner().invoke(app, [*arguments, *more])
        for more in (["--out", "one/figure.png"], ["--out", "two/figure.svg"], [])
    )
    assert first.exit_code == second.exit_code == bare.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    assert first.stdout == second.stdout
    assert Path("one/figure.json").read_bytes() == Path("two/figure.json").read_bytes()
    assert Path("one/figure.csv").read_bytes() == Path("two/figure.csv").read_bytes()
    assert json.loads(Path("one/figure.json").read_text()) == found
    assert json.loads(bare.stdout) == {**found, "perplexity": None}  # the picture changes no figure
    assert found["classes"] == ["blue", "green", "red"] and found["conditions"] == ["16 px"]
    assert [result["name"] for result in found["results"]] == ["coarse", "fine"]
    assert found["perplexity"] == pytest.approx(59 / 3, abs=1e-3)
    with Image.open("one/figure.png") as picture:
        assert picture.width > 1200 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    drawn = Path("two/figure.svg").read_text()
    assert drawn.count("<use") >= 120 and "Date" not in drawn
    rows = list(csv.DictReader(Path("one/figure.csv").open()))
    assert len(rows) == 2 * 2 * 30
    assert {row["quality"] for row in rows} == {"HQ", "LQ"}
    assert {row["degraded"] for row in rows if row["quality"] == "LQ"} == {"16 px"}
    pairs = [(row["image"], row["class"]) for row in rows]
    assert pairs[:30] == pairs[30:60] == pairs[60:90]  # the same images for every model, HQ and LQ
    assert all(image.split("/")[0] == name for image, name in pairs)
    text = CliRunner().invoke(app, arguments[:-1])
    assert "coarse" in text.stdout and "nearest mean" in text.stdout and "blue 10" in text.stdout


def test_the_same_seed_is_the_same_and_another_is_not(place):
    conditions = parse_corruptions(["gaussian_noise:3", "fog:2"])
    runs = [run(images=6, seed=seed, conditions=conditions) for seed in (0, 0, 1)]
    figures = [found.to_json()["results"] for found in runs]
    assert figures[0] == figures[1] != figures[2]
    assert runs[0].images == runs[1].images != runs[2].images


def test_each_image_gets_one_way_of_degrading(place):
    """And is degraded alike whatever else is asked for: by its pixels and the seed."""
    conditions = [*parse_corruptions(["contrast:5", "gaussian_noise:2"]), Condition(jpeg=30)]
    found = run(resolution=8, conditions=conditions, images=8)
    assert found.about["conditions"] == ["8 px", "contrast:5", "gaussian_noise:2", "jpeg=30"]
    assert found.degraded == found.about["conditions"] * 6
    assert found.about["corruption_set"] == "cifar"
    assert run(resolution=8, images=8, corruption_set="face").about["corruption_set"] == "face"
    shifts = [run(images=8, conditions=[each]).results[1]["shift"] for each in conditions]
    assert len({round(shift, 4) for shift in shifts}) == 3


def test_networks_of_lrface_and_of_torchvision(place):
    torch.manual_seed(0)
    encoder = build_backbone("cifar_resnet18", width=4)
    card = make_card(
        {"name": "cifar_resnet18", "arguments": {"width": 4}}, encoder, {"classes": ["sky", "grass", "brick"]}
    )
    save_model(place / "run", encoder, card)
    pictures = np.zeros((9, 32, 32, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    np.savez(place / "numbered.npz", images=pictures, labels=np.arange(9) % 3)
    found = run([f"ours={place / 'run'}", COARSE], str(place / "numbered.npz"), images=3)
    assert found.about["classes"] == ["sky", "grass", "brick"]  # the data has numbers alone, the model names
    named = run([COARSE], str(place / "numbered.npz"), images=2, classes="2,0")
    assert named.about["classes"] == ["2", "0"]

    network = torchvision.models.resnet18(num_classes=7)
    torch.save(network.state_dict(), place / "resnet.pth")
    text = f"torchvision:resnet18@weights={place / 'resnet.pth'},mean=0.5,std=0.5"
    folder = place / "photographs"
    for label in range(2):
        (folder / f"c{label}").mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (240, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"c{label}" / f"{number}.png")
    from lrface.features import open_networks

    opened = open_networks([text], "cpu", None, print)[0]
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(network.eval().children())[:-1])(x * 2 - 1).flatten(1)
    torch.testing.assert_close(opened.features(x), expected, rtol=1e-3, atol=1e-4)
    found = run([text], str(folder), classes=2, images=2)
    assert (found.about["size"], found.about["corruption_set"]) == (224, "imagenet_published")


def test_faces_by_identity(tmp_path, pooled_model, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("anna", "berta", "clara"):
        (tmp_path / name).mkdir()
        base = rng.integers(0, 256, (7, 7, 3))
        for number in range(3):
            coarse = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((112, 112)).save(tmp_path / name / f"{number}.png")
    text = f"{pooled_model}@colour=RGB"
    found = run([text], str(tmp_path), images=3, resolution=14, down="nearest", up="bilinear")
    assert found.about["size"] == 112 and found.about["corruption_set"] == "face"
    assert found.results[0]["name"] == pooled_model.name + "@colour=RGB"
    assert found.results[0]["nearest_mean_lq"] == 100 and found.results[0]["own_image"] > 50


def test_one_image_that_cannot_be_read_ends_nothing(place):
    (place / "data" / "colours" / "red" / "03.png").write_bytes(b"no picture")
    found = run(images=12)
    assert found.about["images"] == {"blue": 12, "green": 12, "red": 11}
    assert [name for name, _ in found.about["broken"]] == ["red/03.png"]
    assert "1 images left out" in found.to_text()
    for file in (place / "data" / "colours" / "red").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(LrfaceError, match="0 images of red can be read, at least 2 are needed; the first"):
        run(images=12)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"images": 13}, LrfaceError, "0 classes have 13 images, 3 are wanted; the largest have 12, 12, 12"),
        ({"classes": "red,yellow"}, LrfaceError, "class yellow has 4 images, 10 are wanted; .*--images"),
        ({"classes": "red,bleu"}, UsageError, "no class 'bleu' .did you mean 'blue'"),
        ({"classes": "red,red"}, UsageError, "'red' is named twice"),
        ({"classes": 1}, UsageError, "from 2 to 10 classes can be told apart by their colours; found 1"),
        ({"classes": 11}, UsageError, "from 2 to 10 classes"),
        ({"images": 1}, UsageError, "--images: at least 2 of each class are needed; found 1"),
        (
            {"resolution": 32},
            UsageError,
            "--resolution 32: the models take images of 32 pixels; give from 1 to 31",
        ),
        (
            {"down": "cubic"},
            UsageError,
            "--down must be one of nearest, area, bilinear, bicubic; found 'cubic'",
        ),
        ({"corruption_set": "cifar"}, UsageError, "unknown set 'cifar'"),
        ({"corruption_set": "mnist-c"}, UsageError, "MNIST-C is of grey images"),
        ({"out": "figure.gif"}, UsageError, "the suffix must be one of .png, .svg, .pdf"),
        (
            {"out": "figure.png", "perplexity": 20.0},
            UsageError,
            "--perplexity 20: 60 points, HQ and LQ together, allow from 1 to 19.67",
        ),
        ({"models": []}, UsageError, "at least one --model"),
        (
            {"models": [COARSE, "feature_models:large"]},
            UsageError,
            "feature_models:large takes images of 64x64 pixels, feature_models:coarse of 32x32; all models must",
        ),
        ({"models": ["feature_models:large"]}, LrfaceError, "none of its images can be used.*64x64.*32, 32"),
        ({"models": [COARSE, COARSE]}, UsageError, "two models are called 'coarse'"),
        ({"models": ["feature_models:constant"]}, LrfaceError, "gives the same feature for every image"),
        ({"models": ["feature_models:broken"]}, LrfaceError, "its features are not finite"),
        ({"data": "colors"}, LrfaceError, "colors: no such images as it stands, below --data.*lfw"),
    ],
)
def test_errors_name_what_is_wrong(place, options, kind, message):
    with pytest.raises(kind, match=message):
        run(**options)
    assert not Path("figure.png").exists()


def test_faces_of_another_size(place):
    (place / "face_models.py").write_text(MODULE.replace("input_size = 32", "input_size = 112"))
    with pytest.raises(
        UsageError, match="take images of 112x112 pixels, those of .*colours are 32x32; faces are"
    ):
        run(["face_models:coarse"])


def test_an_unknown_corruption_at_the_command_line(place):
    arguments = ["features", "colours", "--model", COARSE, "--corruption", "fogg:3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "unknown corruption 'fogg' (did you mean 'fog'" in done.stderr
    done = CliRunner().invoke(app, [*arguments[:-1], "fog:7"])
    assert done.exit_code == 2 and "a severity is a whole number from 1 to 5" in done.stderr


@pytest.mark.parametrize(
    "text, expected",
    [
        ("naive=runs/naive", ("naive", "runs/naive")),
        ("QualNet 0.1 = runs/q", ("QualNet 0.1", "runs/q")),
        ("runs/a=b", (None, "runs/a=b")),
        ("timm:resnet18@weights=FILE,mean=0.5", (None, "timm:resnet18@weights=FILE,mean=0.5")),
        ("mine=f.onnx@colour=BGR", ("mine", "f.onnx@colour=BGR")),
        ("model.onnx", (None, "model.onnx")),
        ("=runs/a", (None, "=runs/a")),
    ],
)
def test_names_of_models(text, expected):
    assert parse_named(text) == expected


def test_the_first_classes_with_enough_images():
    class Counted:
        names, classes, origin = ["x"] * 9, list("abcd"), "here"
        labels = np.array([0, 1, 1, 2, 3, 3, 2, 3, 1])

        def __len__(self):
            return 9

    assert choose_classes(Counted(), list("abcd"), 2, 2) == [1, 2]
    assert choose_classes(Counted(), list("abcd"), 2, 3) == [1, 3]
    assert choose_classes(Counted(), list("abcd"), "d, b", 2) == [3, 1]


def test_cifar10_as_it_is(shared, monkeypatch, place):
    monkeypatch.setenv("LRFACE_DATA", str(shared / "data"))
    found = run([COARSE], "cifar10/test.parquet", classes=4, images=20)
    assert found.about["images"] == {str(number): 20 for number in range(4)}
    assert found.results[0]["cosine"] > 0.9
