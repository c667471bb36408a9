"""eval/study_resolution.py: its rows are recipes that build, its table and figure say what was measured."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrface import config, recipes

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "study_resolution.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("study_resolution", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_resolution"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_build(script):
    rows = script.rows("scratch")
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        recipe = recipes.load_recipe(row.recipe, row.overrides)
        assert recipe.backbone.name == "ir18"
        method = recipes.build_method(recipe, recipe.stages[-1], 10)
        assert method.encoder.embedding_size == 128


def test_a_row_more_where_there_is_a_teacher(script):
    *others, taught = script.rows("scratch", "recogniser.onnx")
    assert tuple(others) == script.rows("scratch")
    recipe = recipes.load_recipe(taught.recipe, taught.overrides)
    assert recipe.stages[0].method.arguments["teacher"] == {"name": "onnx", "path": "recogniser.onnx"}
    naive = next(recipes.load_recipe(row.recipe, row.overrides) for row in others if row.key == "naive")
    assert recipe.stages[0].steps == recipes.stage_steps(naive.stages[0], 6276, naive.data.batch_size)


def test_the_networks_of_table_4_are_runs_of_the_study(script):
    known = {"vanilla": "vanilla", "naive": "naive", "qualnet_lm_1": "qualnet_lm"}
    known |= {f"specialised_{size}": f"specialised_{size}" for size in (56, 28, 14)}
    for row in script.rows("scratch"):
        if row.key in known:
            recipe, of_table = recipes.load_recipe(row.recipe, row.overrides), f"celeba300/{known[row.key]}"
            assert config.to_plain(recipe) == config.to_plain(recipes.load_recipe(of_table))


def test_suites_have_the_same_rows_but_for_what_only_one_can_have(script):
    keys = {suite: {row.key for row in script.rows(suite)} for suite in ("scratch", "pretrained", "casia")}
    assert keys["scratch"] == keys["casia"]
    assert keys["scratch"] ^ keys["pretrained"] == {
        "qualnet_lm_free",
        "robustify",
    } | {f"robustify_{key}" for key, _, _ in script.ROBUSTIFY_WITHOUT}
    for suite in ("pretrained", "casia"):
        for row in script.rows(suite):
            recipe = recipes.load_recipe(row.recipe, row.overrides)
            assert recipe.backbone.name == {"pretrained": "onnx", "casia": "ir50"}[suite]
            last = recipe.stages[-1]
            if last.method.name == "robustify":  # it has a decoder only where it draws
                draws = last.method.arguments.get("quality_weight", 0) > 0
                assert draws == (last.load == ["encoder", "decoder"]) or suite == "casia"


def result(key: str, figures: dict[int, float], seed: int = 0) -> dict:
    named = {
        f"{a}x{b}": {"percent": value - (a != b), "interval": [value - 1, value + 1], "tar_at_far": {}}
        for a in figures
        for b, value in figures.items()
    }
    return {
        "key": key,
        "seed": seed,
        "stages": [{"images": 64}],
        "evaluation": {"accuracy": named, "native": []},
    }


def results() -> list[dict]:
    base = {112: 86.0, 56: 85.0, 28: 84.0, 14: 74.0}
    return [
        result("vanilla", base),
        *(result(f"specialised_{s}", {**base, s: base[s] + 2}) for s in (56, 28, 14)),
        result("naive", {112: 85.0, 56: 86.9, 28: 85.5, 14: 75.9}),
        result("naive", {112: 86.0, 56: 86.9, 28: 85.5, 14: 75.9}, seed=1),
    ]


def test_table(script):
    rows = script.rows("scratch")
    lines = script.table(rows, results()).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["specialised network of each size"][2:6] == ["86.00", "87.00", "86.00", "76.00"]
    naive = cells["naive augmentation"]
    assert naive[2] == "85.50 (85.00 to 86.00)" and naive[5] == "75.90 (75.90 to 75.90)"
    assert naive[-1] == "-0.50"  # at 112: 85.5 against 86
    assert cells["vanilla (clean only)"][-1] == "-2.00"
    assert cells["QualNet-LM, lambda 1"][-1] == "-"
    assert not [name for name in cells if name.startswith("specialised at")]
    assert len({len(line.split("|")) for line in lines}) == 1


def test_table_with_the_recogniser_that_all_start_from(script):
    before = [{"key": "untrained", "stages": [], "evaluation": results()[0]["evaluation"]}]
    lines = script.table(script.rows("pretrained"), results(), untrained=before).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == [
        "specialised network of each size",
        "the recogniser as it is",
    ]
    assert "| 86.00 | 85.00 | 84.00 | 74.00 |" in lines[3] and lines[3].endswith("| -2.00 |")
    assert len({len(line.split("|")) for line in lines}) == 1


def test_table_of_what_is_there_so_far(script):
    rows = script.rows("scratch")
    lines = script.table(rows, results()[-1:]).splitlines()
    assert len({len(line.split("|")) for line in lines}) == 1
    assert "| specialised network of each size | 0 |" in lines[2]


def test_figure(script, tmp_path):
    script.draw(tmp_path / "figure.png", "title", script.rows("scratch"), results())
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert picture.shape[0] > 500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    script.draw(tmp_path / "one.png", "title", script.rows("scratch"), results()[-1:])
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_what_is_kept_of_a_verification(script):
    row = {
        "gallery_size": 112,
        "probe_size": 14,
        "accuracy": 77.0,
        "accuracy_interval": [76.0, 78.0],
        "tar_at_far": {"1e-3": 50.0},
        "by_native_size": None,
    }
    native = {**row, "probe_size": 112, "accuracy": 99.0, "by_native_size": [{"smallest": 0}]}
    kept = script.measured([native, row])
    assert kept["accuracy"] == {
        "112x112": {"percent": 99.0, "interval": [76.0, 78.0], "tar_at_far": {"1e-3": 50.0}},
        "112x14": {"percent": 77.0, "interval": [76.0, 78.0], "tar_at_far": {"1e-3": 50.0}},
    }
    assert kept["native"] == [[{"smallest": 0}]]
