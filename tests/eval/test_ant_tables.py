"""eval/ant_tables.py: every row of every table is a recipe that builds, every column finds its figure."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lrface import recipes
from lrface.benchmarks import published
from lrface.benchmarks.perturbation import size_figures
from lrface.benchmarks.robustness import BENCHMARKS, Judged, robustness_figures

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "ant_tables.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ant_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ant_tables"] = module
    spec.loader.exec_module(module)
    return module


SUITES = [("11", "mnist"), ("12", "mnist")] + [
    (table, suite) for table in ("2", "3", "4", "5", "15", "16") for suite in ("cifar10", "imagenet")
]


@pytest.mark.parametrize("table,suite", SUITES)
def test_rows_are_recipes_and_the_papers_rows_are_among_them(script, table, suite):
    rows = script.rows(table, suite)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    methods = {}
    for row in rows:
        recipe = recipes.load_recipe(row.recipe, row.overrides)
        if suite != "imagenet":
            methods[row.key] = recipes.build_method(recipe, recipe.stages[-1], 10)
    if table == "16" and methods:
        depths = [methods[key].generator.depth for key in keys if key != "vanilla"]
        assert depths == [1, 2, 3, 4, 5]
    printed = {key for column in script.columns(table) for key in column.paper}
    missing = {key for key in printed if "stylised" not in key} - set(keys)
    assert table == "2" or not missing


def judged(kind):
    rng = np.random.default_rng(0)
    right = {
        (name, level): rng.integers(0, 2, 40).astype(np.uint8)
        for name in kind.names
        for level in kind.severities
    }
    return Judged(
        right, {key: np.maximum(value, 1) for key, value in right.items()}, right[next(iter(right))]
    )


def test_columns_find_their_figures(script):
    cifar = robustness_figures(judged(BENCHMARKS["cifar10_c"]), BENCHMARKS["cifar10_c"], False, samples=5)
    mnist = robustness_figures(judged(BENCHMARKS["mnist_c"]), BENCHMARKS["mnist_c"], False, samples=5)
    sizes = {
        "clean_accuracy": 80.0,
        "noises": {
            name: size_figures([np.array([0.0, 2.0, 3.0])] * 2, 12)
            for name in ("gaussian", "uniform", "adversarial")
        },
    }
    attacks = {
        "clean_accuracy": 80.0,
        "attacks": [{"accuracy": 40.0, "median": 0.1}, {"accuracy": 20.0}],
    }
    figures = {
        **dict.fromkeys(("4", "15", "16"), cifar),
        "11": mnist,
        **dict.fromkeys(("2", "3"), sizes),
        **dict.fromkeys(("5", "12"), attacks),
    }
    assert set(figures) == set(script.EVALUATIONS)
    for table, found in figures.items():
        values = [column.figure(found) for column in script.columns(table)]
        assert all(value is not None and 0 <= value <= 100 for value in values), table
    four = [column.figure(cifar) for column in script.columns("4")]
    quiet = [row["error"] for row in cifar["corruptions"] if row["group"] != "noise"]
    assert four[3] == pytest.approx(100 - np.mean(quiet), abs=1e-3)
    assert four[2] == four[4] == 100  # all of the five best guesses were called right


def test_the_papers_numbers_are_consistent():
    for row in published.NOISE_TABLE_11.values():
        assert len(row) == 2 + len(published.NOISE_TABLE_11_CORRUPTIONS)
        # The mean is that of the clean images and the 15 corruptions, each rounded to a percent (0.6 at most).
        assert np.mean([row[0], *row[2:]]) == pytest.approx(row[1], abs=0.9)
    assert set(published.NOISE_TABLE_11_CORRUPTIONS) == set(BENCHMARKS["mnist_c"].names)


@pytest.mark.slow
def test_a_table_of_digits_from_nothing(tmp_path):
    from digits import write_mnist

    root = write_mnist(tmp_path, 600, 100)
    command = [
        sys.executable,
        str(SCRIPT),
        "--table",
        "11",
        "--data",
        str(root),
        "--runs",
        str(tmp_path / "runs"),
    ]
    command += [
        "--results",
        str(tmp_path / "results"),
        "--steps",
        "4",
        "--images",
        "20",
        "--rows",
        "vanilla",
        "ant1x1",
    ]
    command += [
        "--set",
        "data.batch_size=32",
        "trainer.device=cpu",
        "trainer.threads=1",
        "stages.0.schedule.warmup_steps=0",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "results" / "ant_table11.json").read_text())
    assert [row["key"] for row in found["rows"]] == ["vanilla", "ant1x1"]
    assert "86.90" in (tmp_path / "results" / "ant_table11.md").read_text()
