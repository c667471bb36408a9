"""Figures 3 to 6 of contrastive inversion: rows that are recipes, curves from what probes give, a picture of them."""

import json

import pytest
from PIL import Image

from lrface import recipes, study
from lrface.contrastive_figures import Point, averaged, draw, panels
from lrface.contrastive_study import (
    SEEN_CLASSES,
    SHIFT,
    TRANSFER,
    figure_rows,
    of_seven_classes,
    rows,
    transfer_sets,
    variant_rows,
)
from lrface.errors import UsageError


def result(mean: float, name: str = "student", labels=1.0, error: float | None = 0.5, **degrade) -> dict:
    figure = {"mean": mean, "standard_error": error, "values": [mean]}
    return {
        "name": name,
        "labels": labels,
        "test_degrade": degrade,
        "top1": figure,
        "top5": {**figure, "mean": None},
        "auc": figure,
    }


def row(key: str, degrade: dict, *results: dict) -> dict:
    return {"key": key, "label": key, "evaluation": {"train_degrade": degrade, "results": list(results)}}


def options(tmp_path, number: str, *arguments: str) -> study.Options:
    given = ["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "data"), *arguments]
    return study.study_options("", "x", {"cifar10": figure_rows(number)}, given)


def test_rows_of_figures_are_recipes(tmp_path):
    assert [each.key for each in figure_rows("3")][:3] == [
        "supervised-mask90",
        "supervised10-mask90",
        "contrastive-mask90",
    ]
    assert [each.key for each in figure_rows("4")] == [each.key for each in rows("10")]
    assert {each.key for each in figure_rows("3")} < {each.key for each in rows("1")}
    for number in "3456":
        for each in figure_rows(number):
            recipe = recipes.load_recipe(each.recipe, each.overrides)
            assert recipes.stage_policy(recipe.stages[-1]).clean_share == 0
    variants = variant_rows("noise50")
    assert variants[0].key == "contrastive-noise50" in {each.key for each in rows("1")}
    found = [recipes.load_recipe(each.recipe, each.overrides).stages[-1].method for each in variants]
    assert [method.arguments["variant"] for method in found] == [
        "student_teacher",
        "student_student",
        "student_both",
        "nt_xent",
        "mse",
    ]
    assert [each.key for each in rows("losses", "mask75")] == [each.key for each in variant_rows("mask75")]
    with pytest.raises(UsageError, match="blur37: Figure 6 is by level"):
        figure_rows("6", ["blur37"])
    with pytest.raises(UsageError, match="Figure 4 is of networks trained on ranges"):
        figure_rows("4", ["mask90"])


def test_unseen_classes_are_left_out_of_training(tmp_path):
    given = of_seven_classes(options(tmp_path, "5"))
    for each in given.rows:
        recipe = recipes.load_recipe(each.recipe, study.run_overrides(each, 0, given))
        assert recipe.data.classes_subset == str(tmp_path / "runs" / "seven_classes.txt")
        assert recipe.out.endswith(f"{each.key}-seed0") and each.key.startswith("seven_classes-")
    assert (tmp_path / "runs" / "seven_classes.txt").read_text().split() == list(SEEN_CLASSES)
    assert set(SHIFT) | set(SEEN_CLASSES) == set("0123456789") and set(SHIFT.values()) <= set(SEEN_CLASSES)


def test_sets_of_table_2_are_those_that_are_there(tmp_path):
    given = options(tmp_path, "4")
    with pytest.raises(UsageError, match="none of its sets .*stl10/train.* --transfer NAME=TRAIN,TEST"):
        transfer_sets(given, [])
    with pytest.raises(UsageError, match="--transfer 'flowers=a': give NAME=TRAIN,TEST"):
        transfer_sets(given, ["flowers=a"])
    for place in TRANSFER["stl10"]:
        (tmp_path / "data" / place).mkdir(parents=True)
    assert transfer_sets(given, ["a=b,c"]) == {"stl10": TRANSFER["stl10"], "a": ("b", "c")}


def test_points_have_the_error_over_seeds_where_there_are_some():
    one = {"mean": 50.0, "standard_error": 0.25}
    assert averaged(0.1, [one]) == Point(0.1, 50.0, 0.25)
    assert averaged(0.1, [one, {"mean": 54.0, "standard_error": 9.0}]) == Point(0.1, 52.0, 2.0)
    assert averaged(0.1, [{"mean": None, "standard_error": None}]) is None


def test_curves_by_share_of_labels(tmp_path):
    noise = {"name": "gaussian_noise", "sigma": 0.5}
    student = [result(40.0 + 10 * share, labels=share) for share in (1.0, 0.1)]
    teacher = [result(20.0, "teacher", share) for share in (1.0, 0.1)]
    found = [
        row("contrastive-noise50", noise, *student, *teacher),
        row("supervised-noise50", noise, result(55.0, labels=None)),
        row("supervised10-noise50", noise, result(45.0, labels=0.1)),
        row("contrastive-mask90", {"name": "pixel_mask", "missing": 0.9}, *student),
    ]
    noisy, masked = panels("3", found, "top1")
    assert (noisy.title, masked.title, noisy.logarithmic) == ("noise50", "mask90", True)
    curves = {curve.label: curve for curve in noisy.curves}
    assert curves["contrastive student"].points == [Point(0.1, 41.0, 0.5), Point(1.0, 50.0, 0.5)]
    assert curves["end-to-end"].points == [Point(1.0, 55.0, 0.5)] and curves["end-to-end"].baseline
    assert curves["end-to-end, 10 % of the labels"].points == [Point(0.1, 45.0, 0.5)]
    assert [point.mean for point in curves["untouched teacher"].points] == [20.0, 20.0]
    assert panels("3", found, "top5")[0].curves == []  # with five classes or fewer there is none
    draw(tmp_path / "three.png", [noisy, masked], "labels", "top1")
    assert Image.open(tmp_path / "three.png").size[0] > 1000
    assert json.loads(json.dumps(noisy.plain()))["curves"][0]["points"][0]["x"] == 0.1


def test_curves_by_level(tmp_path):
    mask = {"name": "pixel_mask", "missing_range": [0.5, 0.95]}
    levels = [result(60 - 50 * x, name="student", **{"missing": x}) for x in (0.1, 0.96, 0.99)]
    found = [row("contrastive-mask_range", mask, *levels), row("supervised-mask_range", mask, *levels[1:])]
    (higher,) = panels("4", found, "top1")
    assert higher.title == "missing pixels, trained with 0.5 to 0.95" and higher.trained == (0.5, 0.95)
    assert [point.x for point in higher.curves[0].points] == [0.96, 0.99], (
        "Table 10's lower ones are not in it"
    )
    assert higher.paper == {"end-to-end (Table 12)": {0.96: 56.8, 0.97: 39.28, 0.98: 11.01, 0.99: 2.03}}
    losses = [
        row(f"contrastive-noise50{tail}", {"name": "gaussian_noise", "sigma": 0.5}, result(9.0, sigma=0.5))
        for tail in ("", "-mse", "-student_student")
    ]
    (one,) = panels("6", losses, "auc")
    assert [curve.label for curve in one.curves] == ["contrastive student", "MSE", "student against student"]
    assert one.title == "Gaussian noise, trained with 0.5" and one.paper == {}
    draw(tmp_path / "four.svg", [higher], "levels", "auc")
    with pytest.raises(UsageError, match="ends in .png or .svg"):
        draw(tmp_path / "four.jpg", [higher], "levels", "auc")
