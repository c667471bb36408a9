"""The tables of the AdA paper: every row builds, and a small one is trained, attacked and printed."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lrface import config, recipes
from lrface.ada_study import accuracy, ada_options, attack_evaluation, corruption_table, small_rows
from lrface.benchmarks.published_ada import NAMES, TABLE_1, TABLE_2, TABLE_3, TABLE_3_CORRUPTIONS
from lrface.classifiers import open_classifier
from lrface.study import Column, Row, row_overrides, run_study

EVAL = Path(__file__).resolve().parents[1] / "eval"


@pytest.mark.parametrize("suite", ["cifar10", "cifar10_r50"])
@pytest.mark.parametrize("start", [None, "runs/clean"])
def test_every_row_is_a_recipe_that_builds(suite, start, monkeypatch):
    arguments = ["--suite", suite, "--steps", "7", *([] if start is None else ["--start", start])]
    found = ada_options("", "ada_table1", list(NAMES), arguments)
    assert len(found.options.rows) == (7 if suite == "cifar10" else 10)
    for row in found.options.rows:
        assert (row.paper or row.key) in TABLE_1 and (row.paper or row.key) in TABLE_2
        recipe = recipes.load_recipe(row.recipe, row_overrides(row, found.options))
        joined = "deepaugment" in row.key
        assert isinstance(recipe.data.path, list) == joined
        if joined and suite == "cifar10_r50":
            assert recipe.data.path[1] == f"cifar10/deepaugment{'10' if '10' in row.key else ''}"
        last = recipe.stages[-1]
        assert last.method.name == ("ada" if "ada_" in row.key or row.key == "ada" else "classify")
        assert last.degrade.name == ("augmix" if "augmix" in row.key else "clean") and last.steps == 7
        if suite == "cifar10_r50":
            assert recipe.backbone.name == "preact_resnet50" and recipe.data.batch_size == 256
        if start is not None and suite == "cifar10":
            assert {"path": start, "from": "head", "to": "head"} in last.load
            assert last.optimiser.learning_rate == 0.05
        with torch.device("meta"):
            recipes.build_method(recipe, recipe.stages[0], 10)


def test_rows_show_a_classifier_the_same_number_of_images():
    stages = [recipes.load_recipe(row.recipe, row.overrides).stages[-1] for row in small_rows("set", None)]
    images = {stage.steps or round(stage.epochs * (50000 // 128)) for stage in stages}
    assert len(images) == 1


def test_the_table_by_corruption():
    rows = [Row("ada", "AdA", ""), Row("augmix", "AugMix", "")]
    evaluation = {
        "clean_error": 20.0,
        "mean_error": 30.0,
        "corruptions": [
            {"corruption": name, "error": 30.0 + at} for at, name in enumerate(TABLE_3_CORRUPTIONS)
        ],
    }
    other = {**evaluation, "clean_error": 22.0}
    results = [
        {"key": "ada", "evaluation": each, "stages": [{"images": 5}, {"images": 64000}]}
        for each in (evaluation, other)
    ]
    text = corruption_table(TABLE_3_CORRUPTIONS, TABLE_3, ["pat_self"])(rows, results)
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 20
    assert lines[2].startswith("| AdA | 64,000 | 21.0 | 30.00 | 30.0 | 31.0 |") and lines[2].endswith(
        "| 44.0 |"
    )
    assert lines[3].startswith("| AdA, paper | | 3.8 | 12.49 | 25.8 |") and lines[3].count("|") == 20
    assert lines[4].startswith("| AugMix, not run | - |") and lines[4].count("|") == 20
    assert lines[5].startswith("| PAT-self (Laidlaw et al.), paper | | 17.6 | 23.54 |")
    first = {key: (None, mce, errors) for key, (mce, errors) in TABLE_1.items()}
    line = corruption_table(TABLE_3_CORRUPTIONS, first)(rows, []).splitlines()[3]
    assert (
        line.startswith("| AdA, paper | | - | 12.49 |")
        and line.endswith("| - | - | - |")
        and line.count("|") == 20
    )


RECIPE = {
    "name": "tiny",
    "data": {"path": "cifar10/train", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 2},
    "head": "softmax",
    "trainer": {"device": "cpu", "tensorboard": False, "sheet_every": 0, "threads": 1},
    "stages": [{"name": "only", "method": "classify", "degrade": "clean", "steps": 2}],
}


def test_a_row_is_trained_attacked_and_printed(tmp_path, monkeypatch):
    """CIFAR-10.1 is measured where it is there."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (32, 32)) for _ in range(20)]
    (tmp_path / "cifar10.1").mkdir()
    np.save("cifar10.1/cifar10.1_v6_data.npy", np.stack([pictures[k % 20] for k in range(2000)]))
    np.save("cifar10.1/cifar10.1_v6_labels.npy", np.arange(2000) % 10)
    for number, picture in enumerate(pictures):
        folder = tmp_path / f"cifar10/train/{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"{number}.png"), picture)
    files = [{"bytes": cv2.imencode(".png", picture)[1].tobytes(), "path": None} for picture in pictures]
    pq.write_table(pa.table({"image": files, "label": [k % 10 for k in range(20)]}), "cifar10/test.parquet")
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    arguments = [
        "--data",
        ".",
        "--attacked",
        "6",
        "--attack-steps",
        "2",
        "--restarts",
        "1",
        "--results",
        "results",
    ]
    found = ada_options("", "ada_table2", list(NAMES), arguments)
    row = Row("nominal", "nominal", "tiny.yaml")
    options = type(found.options)(**{**vars(found.options), "rows": (row,), "table_rows": (row,)})
    run = "runs/ada/cifar10/nominal-seed0"
    recipes.run_recipe(recipes.load_recipe("tiny.yaml", ["seed=0", f"out={run}"]), show_progress=False)
    evaluation = attack_evaluation(found, ("multitargeted:linf=1/255",))
    columns = [
        Column("clean (%)", lambda figures: figures["clean_accuracy"], {"nominal": TABLE_2["nominal"][0]}),
        Column("CIFAR-10.1", lambda figures: figures["cifar10_1"]),
        Column("linf 1/255", lambda figures: figures["attacks"]["linf 0.00392157"]),
    ]
    document = run_study("tiny", options, evaluation, columns)
    figures = document["rows"][0]["evaluation"]
    classifier = open_classifier(run, 32)
    images = torch.from_numpy(np.stack(pictures)[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    right = (classifier.scores(images).argmax(1) == torch.arange(20) % 10).float().mean()
    assert figures["clean_accuracy"] == pytest.approx(100 * float(right))
    assert figures["cifar10_1"] == accuracy(run, "cifar10.1") and figures["attacks"]["linf 0.00392157"] <= 100
    assert "| nominal | 1 |" in Path("results/ada_table2.md").read_text()
    assert json.loads(Path("results/ada_table2.json").read_text())["evaluation"]["attacked"] == 6


@pytest.mark.parametrize("name", ["ada_table1", "ada_table2", "ada_table3"])
def test_the_scripts_know_their_columns(name, monkeypatch):
    """Everything but the training: the script runs with a study that only looks at what it is given."""
    seen = {}

    def study(title, options, evaluation, columns, **more):
        figures = {
            "clean_error": 1.0,
            "mean_error": 2.0,
            "clean_accuracy": 3.0,
            "cifar10_1": None,
            "corruptions": [],
            "attacks": dict.fromkeys(
                (
                    f"{trial.norm} {trial.size:.6g}"
                    for text in evaluation.settings.get("trials", ())
                    for trial in parse(text)
                ),
                5.0,
            ),
        }
        seen.update({column.title: column.figure(figures) for column in columns}, rows=len(options.rows))

    from lrface.attack_trials import parse_trials as parse

    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (data / "cifar10" / "test.parquet").exists():
        pytest.skip("needs ../shared/data")
    monkeypatch.setattr("lrface.study.run_study", study)
    monkeypatch.setattr(sys, "argv", [name, "--data", str(data)])
    spec = importlib.util.spec_from_file_location("__main__", EVAL / f"{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert seen["rows"] == (2 if name == "ada_table3" else 7)
    if name == "ada_table2":
        assert seen["linf 4/255"] == seen["l2 1.0"] == 5.0 and seen["CIFAR-10.1"] is None
    else:
        assert seen["mCE"] == 2.0 and seen["jpeg_compression"] is None


def test_shipped_deepaugment_recipes_name_two_sets():
    for name in ("deepaugment", "deepaugment_augmix"):
        recipe = recipes.load_recipe(f"cifar10/{name}")
        assert recipe.data.path == ["cifar10/train.parquet", "cifar10/deepaugment10"]
        assert config.parse_recipe(config.to_plain(recipe)) == recipe
