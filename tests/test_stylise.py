"""Whole runs of `lrface stylise` with small random weights in the official layout, and training on what it made."""

import json

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface.cli import app
from lrface.data.source import open_source
from lrface.data.stylised import StylisedSource, stylised_name
from lrface.errors import LrfaceError, UsageError


def weights(folder):
    """vgg_normalised.pth and decoder.pth of a width of 2, random."""
    torch.manual_seed(0)
    counts = [
        (0, 3, 3),
        (2, 3, 2),
        (5, 2, 2),
        (9, 2, 4),
        (12, 4, 4),
        (16, 4, 8),
        (19, 8, 8),
        (22, 8, 8),
        (25, 8, 8),
    ]
    encoder = {}
    for place, inputs, outputs in [*counts, (29, 8, 16)]:
        side = 1 if place == 0 else 3
        encoder[f"{place}.weight"] = (
            torch.randn(outputs, inputs, side, side) * (2 / (inputs * side * side)) ** 0.5
        )
        encoder[f"{place}.bias"] = torch.zeros(outputs)
    decoder = {}
    counts = [
        (1, 16, 8),
        (5, 8, 8),
        (8, 8, 8),
        (11, 8, 8),
        (14, 8, 4),
        (18, 4, 4),
        (21, 4, 2),
        (25, 2, 2),
        (28, 2, 3),
    ]
    for place, inputs, outputs in counts:
        decoder[f"{place}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2 / (inputs * 9)) ** 0.5
        decoder[f"{place}.bias"] = torch.full((outputs,), 0.2)
    torch.save(encoder, folder / "vgg_normalised.pth")
    torch.save({"state_dict": decoder}, folder / "decoder.pth")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    weights(tmp_path)
    rng = np.random.default_rng(0)
    for person in "ab":
        for number, suffix in enumerate((".jpg", ".png", ".png", ".JPG")):
            file = tmp_path / "photos" / person / f"{number}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            side = (40, 32) if number == 1 else (32, 32)
            image = cv2.resize(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), side[::-1])
            file.write_bytes(cv2.imencode(file.suffix.lower(), image)[1].tobytes())
    for number in range(3):
        file = tmp_path / "styles" / "school" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), cv2.resize(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8), (70, 50)))
    return tmp_path


COMMAND = "stylise photos --styles styles --encoder vgg_normalised.pth --decoder decoder.pth --out made --size 48 --json"


def run(extra=""):
    result = CliRunner().invoke(app, [*COMMAND.split(), *extra.split(), "--device", "cpu"])
    return result, json.loads(result.stdout) if result.exit_code == 0 else result.output


def test_one_image_for_each_under_its_name_and_again_from_where_it_stopped(place):
    (place / "photos" / "a" / "9.jpg").write_bytes(b"no image")
    (place / "styles" / "broken.png").write_bytes(b"no image")
    result, found = run()
    assert result.exit_code == 0, result.output
    assert found["images"] == 9 and found["styles"] == 4 and found["written"] == 8
    assert any("a/9.jpg" in name for name, _ in found["broken"])
    originals = sorted(path.relative_to(place / "photos") for path in (place / "photos").rglob("*.*"))
    made = {path.relative_to(place / "made") for path in (place / "made").rglob("*.*")}
    assert {path for path in originals if path.name != "9.jpg"} <= made
    before = {}
    for path in originals:
        if path.name == "9.jpg":
            continue
        own, other = cv2.imread(str(place / "photos" / path)), cv2.imread(str(place / "made" / path))
        assert own.shape == other.shape and np.abs(own.astype(int) - other).mean() > 3
        before[path] = (place / "made" / path).read_bytes()
    gone = originals[2]
    (place / "made" / gone).unlink()
    result, found = run()
    assert found["written"] == 1 and found["existing"] == 7
    assert all((place / "made" / path).read_bytes() == data for path, data in before.items())
    result, found = run("--alpha 0.5")
    assert result.exit_code == 2 and "made with another alpha" in found


def test_alpha_0_is_the_photograph_as_the_decoder_draws_it_whatever_the_style(place):
    run("--alpha 0 --out one")
    (place / "styles" / "school" / "0.png").unlink()
    run("--alpha 0 --out two")
    files = sorted((place / "one").rglob("*.png"))
    assert files and all(
        file.read_bytes() == (place / "two" / file.relative_to(place / "one")).read_bytes() for file in files
    )


def test_wrong_usage_is_named(place):
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("x")
    for extra, code, message in (
        ("--styles empty", 1, "no pictures in it"),
        ("--alpha 2", 2, "--alpha must be between 0 and 1"),
        ("--out full", 2, "holds no stylised images"),
        ("--encoder decoder.pth", 1, "lacks '0.weight'"),
    ):
        result, found = run(extra)
        assert result.exit_code == code and message in found, found


FIRST = "{name: first, method: classify, steps: 1}"
NOISE = (
    "{name: noise, steps: 3, degrade: {name: clean}, method: {name: ant, clean_share: 0.25, current_share: 0.25, "
    "stylised_share: 0.25, restart_steps: 2, save_steps: 1}}"
)


def test_training_gets_each_image_with_its_stylised_version(place):
    from lrface import recipes
    from lrface.data.dataset import fit_image

    run()
    source = open_source("photos")
    stylised = StylisedSource(source, "made")
    assert stylised.sources() == [f"made/{name}" for name in source.sources()]
    text = """
name: stylised
data: {path: photos, batch_size: 4, stylised: made}
backbone: {name: cifar_resnet18, width: 4}
head: softmax
trainer: {device: cpu, sheet_every: 0, tensorboard: false, threads: 1}
stages:
  - name: noise
    method: {name: ant, clean_share: 0.25, current_share: 0.25, stylised_share: 0.25, restart_steps: 2, save_steps: 1}
    degrade: {name: clean}
    steps: 3
"""
    (place / "recipe.yaml").write_text(text)
    recipe = recipes.load_recipe("recipe.yaml", ["out=out"])
    method = recipes.build_method(recipe, recipe.stages[0], 2)
    for cache in (True, False):
        recipe.data.cache = cache
        batch = recipes.TrainingImages(recipe, source, [method], False).of(method).__getitems__([5, 0, 3])
        for row, index in enumerate((5, 0, 3)):
            for key, own in (("image", source), ("stylised", stylised)):
                pixels = fit_image(own.image(index), 32)
                assert (batch[key][row].permute(1, 2, 0).numpy() == pixels).all()
    # A stage before it that takes none comes first, and gets none.
    recipe = recipes.load_recipe(
        "recipe.yaml", [f"stages=[{{name: first, method: classify, steps: 1}}, {NOISE}]", "out=out"]
    )
    assert [stage["steps"] for stage in recipes.run_recipe(recipe, show_progress=False).stages] == [1, 3]
    # A method that takes no stylised images does not get any.
    plain = recipes.load_recipe("recipe.yaml", ["stages.0.method=classify"])
    classify = recipes.build_method(plain, plain.stages[0], 2)
    pictures = recipes.TrainingImages(recipe, source, [classify, method], False)
    assert "stylised" not in pictures.of(classify).__getitems__([0])
    assert "stylised" in pictures.of(method).__getitems__([0])
    without = recipes.load_recipe("recipe.yaml", ["data.stylised=null"])
    with pytest.raises(UsageError, match="name their folder in data.stylised"):
        recipes.TrainingImages(without, source, [method], False)
    (place / "made" / "b" / "2.png").unlink()
    with pytest.raises(
        LrfaceError, match="lacks the stylised versions of 1 of 8 images, the first is b/2.png"
    ):
        recipes.TrainingImages(recipe, source, [method], False)


def test_names_without_a_suffix_and_names_that_climb():
    assert stylised_name("a/b.JPG") == "a/b.JPG" and stylised_name("000012") == "000012.png"
    assert stylised_name("/etc/x.png") == "etc/x.png" and stylised_name("../../x.png") == "x.png"
    assert stylised_name("v1.2/7") == "v1.2/7.png"


def test_a_folder_that_is_not_there_is_named_before_the_first_stage_runs(place):
    (place / "late.yaml").write_text("""
name: late
data: {path: photos, batch_size: 4, stylised: nowhere}
backbone: {name: cifar_resnet18, width: 2}
head: softmax
trainer: {tensorboard: false, sheet_every: 0, device: cpu}
stages:
  - {name: clean, method: classify, degrade: {name: clean}, steps: 1}
  - name: noise
    method: {name: ant, clean_share: 0.25, stylised_share: 0.25, restart_steps: 2}
    degrade: {name: clean}
    steps: 1
""")
    result = CliRunner().invoke(app, ["train", "late.yaml"])
    assert result.exit_code == 1 and "'nowhere' was not found" in result.output, result.output
    assert "stage clean" not in result.output


def test_crops_are_alike_for_an_image_and_its_stylised_version(place):
    """The stylised folder holds the photographs themselves: then both must be cut alike in each batch."""
    from lrface import recipes
    from lrface.data.dataset import batches

    (place / "recipe.yaml").write_text("""
name: crops
data: {path: photos, batch_size: 4, stylised: photos, crop: random_resized, cache: false}
backbone: {name: cifar_resnet18, width: 4}
head: softmax
stages:
  - name: noise
    method: {name: ant, clean_share: 0.25, stylised_share: 0.25, restart_steps: 2}
    degrade: {name: clean}
    steps: 3
""")
    recipe = recipes.load_recipe("recipe.yaml")
    method = recipes.build_method(recipe, recipe.stages[0], 2)
    dataset = recipes.TrainingImages(recipe, open_source("photos"), [method], False).of(method)
    seen = [batch["image"] for batch in batches(dataset, 4, 0, 0, 4)]
    for number, batch in enumerate(batches(dataset, 4, 0, 0, 4)):
        assert torch.equal(batch["image"], batch["stylised"]) and torch.equal(batch["image"], seen[number])
    assert not torch.equal(seen[0], seen[2])
