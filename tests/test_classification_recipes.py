"""The CIFAR-10 recipes on a Parquet file of small pictures: they train, resume exactly, and name their classes."""

import copy
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from small_runs import killed_at

from lrface import config, recipes
from lrface.errors import UsageError
from lrface.recipes import load_recipe, run_recipe
from lrface.train.checkpoint import load_model, load_parts, load_training_state

NAMES = ["cifar10/clean", "cifar10/corruptions", "cifar10/augmix"]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = [
    "backbone.width=4",
    "data.batch_size=10",
    "stages.0.steps=4",
    "stages.0.epochs=null",
    "stages.0.schedule.warmup_steps=1",
    "trainer.checkpoint_every=2",
    "trainer.tensorboard=false",
    "trainer.device=cpu",
    "trainer.threads=1",
]


def write_images(path: Path, n: int) -> Path:
    """``n`` PNGs of 32 x 32 in ten classes, in the columns of CIFAR-10 on the Hugging Face hub."""
    rows = []
    for number in range(n):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((32, 32)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": image, "label": pa.array([k % 10 for k in range(n)])}), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "cifar10" / "train.parquet", 40)
    return root


def run(name: str, data: Path, out: Path, *overrides: str) -> recipes.RunSummary:
    recipe = load_recipe(name, [*SMALL, f"out={out}", *overrides])
    return run_recipe(recipe, data=data, show_progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_a_killed_run_goes_on_to_the_same_bits(name, data, tmp_path, monkeypatch):
    run(name, data, tmp_path / "whole")
    with killed_at(3, monkeypatch):
        run(name, data, tmp_path / "killed")
    summary = run(name, data, tmp_path / "killed")
    assert summary.stages[0]["resumed_at"] == 2 and summary.stages[0]["steps"] == 4
    folder = Path("stages") / f"1-{name.split('/')[1]}" / "step-00000004"
    states = [load_parts(tmp_path / run / folder) for run in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(key.startswith("head.") for key in states[0])
    assert load_training_state(tmp_path / "killed" / folder).step == 4


def test_the_model_knows_its_classes_and_takes_images_of_32_pixels(data, tmp_path):
    run("cifar10/clean", data, tmp_path / "run", "stages.0.steps=1")
    encoder, card = load_model(tmp_path / "run")
    assert card["training"]["classes"] == CLASSES and card["input"]["size"] == 32
    assert card["architecture"] == {"name": "cifar_resnet18", "arguments": {"width": 4}}
    assert encoder.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 32)


def test_without_names_of_classes_the_card_has_none(data, tmp_path):
    run("cifar10/clean", data, tmp_path / "run", "stages.0.steps=1", "data.classes=null")
    assert "classes" not in load_model(tmp_path / "run")[1]["training"]


@pytest.mark.parametrize(
    "classes, message",
    [
        ("[one, two]", r"data.classes has 2 names, .*train.parquet has 10 classes"),
        ("[a, a, c, d, e, f, g, h, i, j]", "data.classes names a class twice"),
    ],
)
def test_names_that_do_not_fit_the_classes(data, tmp_path, classes, message):
    with pytest.raises(UsageError, match=message):
        run("cifar10/clean", data, tmp_path / "run", f"data.classes={classes}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_recipes(name):
    recipe = load_recipe(name)
    assert recipe.data.classes == CLASSES and recipe.head.name == "softmax"
    method = recipes.build_method(recipe, recipe.stages[0], 10)
    assert method.policy.framing.padding == 4 and method.policy.framing.mirror == 0.5
    if name == "cifar10/corruptions":
        assert (method.policy.set, method.policy.clean_share, len(method.policy.names)) == ("cifar", 0.5, 15)
    if name == "cifar10/augmix":
        policy = method.policy
        assert (policy.width, policy.depth, policy.alpha, method.weight, method.views) == (3, 0, 1, 12, 2)


RAW = {"name": "x", "data": {"path": "y"}, "stages": [{"name": "only", "method": "classify", "steps": 1}]}


def parsed(degrade, *overrides: str) -> config.Recipe:
    raw = copy.deepcopy(RAW)
    raw["stages"][0]["degrade"] = degrade
    return config.parse_recipe(raw, overrides)


def test_degrade_blocks_with_and_without_a_name():
    plain = parsed({"sizes": [14], "clean_share": 0})
    named = parsed({"name": "resolution", "sizes": [14], "clean_share": 0})
    first, second = (recipes.stage_policy(recipe.stages[0]) for recipe in (plain, named))
    assert vars(first) == vars(second) and first.sizes == (14,)
    corrupted = parsed({"name": "corruptions", "set": "cifar"}, "stages.only.degrade.clean_share=0.25")
    assert recipes.stage_policy(corrupted.stages[0]).clean_share == 0.25
    assert recipes.stage_policy(parsed("augmix").stages[0]).width == 3
    assert config.parse_recipe(config.to_plain(corrupted)) == corrupted


def test_a_wrong_degrade_block_names_the_stage():
    recipe = parsed({"name": "corruptions", "severities": [6]})
    with pytest.raises(
        UsageError, match="stage 'only': degrade.severities must be whole numbers, 1 to 5; found 6"
    ):
        recipes.build_method(recipe, recipe.stages[0], 5)
    with pytest.raises(UsageError, match=r"unknown key stages.0.degrade.size \(did you mean 'sizes'\?\)"):
        parsed({"size": [14]})
