"""The table scripts: every row of every suite is a recipe that loads with the row's overrides, and builds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lrface import study
from lrface.errors import LrfaceError
from lrface.recipes import build_method, check_loads, load_recipe

EVAL = Path(__file__).resolve().parents[2] / "eval"
SCRIPTS = sorted(path.stem for path in EVAL.glob("*.py") if "\nSUITES = " in path.read_text())


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_scripts():
    assert {"table1_kd", "table6_ablation", "figureC1_clean_share"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_are_recipes(name, monkeypatch):
    module = script(name)
    for suite, rows in module.SUITES.items():
        assert len({row.key for row in rows}) == len(rows), f"{suite}: two rows share a run"
        options = study.study_options("", name, module.SUITES, ["--suite", suite, "--steps", "3"])
        for row in rows:
            recipe = load_recipe(row.recipe, study.row_overrides(row, options))
            assert all(stage.steps == 3 for stage in recipe.stages) or row.length != 1
            if suite != "cifar10":
                continue  # large networks; tests of their recipes build them
            try:
                check_loads(recipe, [build_method(recipe, stage, 10) for stage in recipe.stages])
            except LrfaceError as error:
                assert "VGG16" in str(error) and row.key == "qualnet_perceptual"


def test_a_key_is_one_run():
    """Tables share runs by key: the same key must mean the same recipe everywhere."""
    seen: dict[tuple[str, str], tuple[str, str, tuple[str, ...], float]] = {}
    for name in SCRIPTS:
        for suite, rows in script(name).SUITES.items():
            for row in rows:
                run = (name, row.recipe, row.overrides, row.length)
                first = seen.setdefault((suite, row.key), run)
                assert first[1:] == run[1:], f"{row.key} of {name} is another run than that of {first[0]}"
