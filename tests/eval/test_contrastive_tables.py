"""eval/contrastive_tables.py: every row is a recipe that builds, every printed number has its row, and the script runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_classification_recipes import write_images

from lrface import recipes

COUNTS = {"1": 24, "2": 4, "7": 3, "8": 3, "9": 8, "10": 4, "13": 8, "14": 2, "losses": 5}
SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "contrastive_tables.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("contrastive_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["contrastive_tables"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", ["1", "2", "7", "8", "9", "10", "13", "14", "losses"])
def test_rows_are_recipes_and_every_printed_number_has_its_row(script, table):
    rows = script.rows(table)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys) == COUNTS[table]
    for row in rows:
        recipe = recipes.load_recipe(row.recipe, row.overrides)
        policy = recipes.stage_policy(recipe.stages[-1])
        assert row.key == "supervised-clean" or policy.clean_share == 0
    printed = {key for column in script.columns(table, ["cifar100", "mine"]) for key in column.paper}
    assert printed <= set(keys) and (printed or table in ("10", "losses"))


def test_the_papers_numbers_stand_in_their_rows(script):
    top1, few, top5, few5, _ = script.columns("1")
    assert (top1.paper["supervised-mask90"], top1.paper["contrastive-blur37"]) == (74.12, 77.80)
    assert (few.paper["contrastive-noise50"], top5.paper["supervised-noise10"]) == (73.14, 95.49)
    assert few5.paper["contrastive-mask75"] == 95.53 and "supervised-mask75" not in few5.paper
    covid, _, area = script.columns("2", ["covid"])
    assert (covid.paper["contrastive-noise_range"], area.paper["supervised-noise_range"]) == (79.74, 0.927)
    denoised, ours = script.columns("7")
    assert (denoised.paper["contrastive-noise30"], ours.paper["contrastive-noise30"]) == (56.47, 81.30)
    assert script.columns("8")[0].paper == {
        "contrastive-mask50": 23.38,
        "contrastive-mask75": 21.89,
        "contrastive-mask90": 20.39,
    }
    assert script.columns("13")[0].paper["contrastive-blur21"] == 51.20


def test_a_tenth_of_the_labels_for_as_many_steps(script, tmp_path):
    """Of the images that probes of 10 % take, after the same teacher; in the columns of 10 %."""
    from lrface import study

    given = ["--set", "stages.1.epochs=3", "--runs", str(tmp_path)]
    options = study.study_options("", "x", {"cifar10": script.rows("1")}, given)
    rows = {row.key: row for row in options.rows}
    full, tenth = (
        recipes.load_recipe(rows[key].recipe, study.run_overrides(rows[key], 1, options))
        for key in ("supervised-mask75", "supervised10-mask75")
    )
    assert study._same_for_all_stages(full) == study._same_for_all_stages(tenth)
    assert study._what_is_learned(full, full.stages[0]) == study._what_is_learned(tenth, tenth.stages[0])
    last = tenth.stages[-1]
    assert (last.share, last.share_seed, full.stages[-1].share) == (0.1, 0, 1.0)
    assert last.degrade == full.stages[-1].degrade and last.degrade.arguments["missing"] == 0.75
    steps = recipes.stage_steps(full.stages[-1], 50_000, 128), recipes.stage_steps(last, 5_000, 128)
    assert steps == (1170, 1170)
    # In steps as they are.
    options = study.study_options("", "x", {"cifar10": script.rows("1")}, ["--steps", "7"])
    found = study.row_overrides(rows["supervised10-mask75"], options)
    assert "stages.1.steps=7" in found and "stages.1.epochs=null" in found
    own = {
        "name": "student",
        "classifier": "own head",
        "labels": 0.1,
        "test_degrade": {},
        "top1": {"mean": 5.0},
    }
    titles = {column.title: column.figure for column in script.columns("1")}
    assert titles["top-1, 10 % of the labels (%)"]({"results": [own]}) == 5.0
    assert titles["top-1 (%)"]({"results": [own]}) is None


def test_students_and_baselines_share_their_teacher(script):
    """The first stage of both is one run's."""
    from lrface.study import _same_for_all_stages, _what_is_learned

    for family in ("mask", "noise", "blur"):
        pair = [recipes.load_recipe(f"cifar10/{kind}_{family}") for kind in ("supervised", "contrastive")]
        assert _same_for_all_stages(pair[0]) == _same_for_all_stages(pair[1])
        assert _what_is_learned(pair[0], pair[0].stages[0]) == _what_is_learned(pair[1], pair[1].stages[0])
        # The same operator, whatever is learned from it.
        degrades = [recipe.stages[1].degrade for recipe in pair]
        assert degrades[0] == degrades[1]
        assert (
            pair[0].stages[1].optimiser.name == "adam" and pair[0].stages[1].optimiser.learning_rate == 1e-3
        )


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("9", "mask90"),
        ("7", "noise50"),
        ("10", "noise_range"),
    )
]


def run_script(script: Path, folder: Path, rows: list[str], *arguments: str) -> None:
    """The script on 40 drawn images below ``folder``, two steps a stage."""
    for name in ("train", "test"):
        write_images(folder / "data" / "cifar10" / f"{name}.parquet", 40)
    command = [sys.executable, str(script), *arguments, "--draws", "2", "--steps", "2", "--rows", *rows]
    for option, place in (("--data", "data"), ("--runs", "runs"), ("--results", "")):
        command += [option, str(folder / place)]
    command += ["--set", "data.batch_size=8", "trainer.device=cpu", "trainer.threads=1"]
    command += ["stages.0.schedule.warmup_steps=0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("table,key", [("1", "mask90"), *SLOW])
def test_the_script_trains_probes_and_writes(table, key, tmp_path):
    rows = [f"contrastive-{key}", *([f"supervised10-{key}"] if table == "1" else [])]
    run_script(SCRIPT, tmp_path, rows, "--table", table)
    document = json.loads((tmp_path / f"contrastive_table{table}.json").read_text())
    text = (tmp_path / f"contrastive_table{table}.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"| contrastive student, {key} |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "1" and all(cell != "-" for cell in (cells[-8:] if table == "10" else cells[3:5]))
    assert {row["key"] for row in document["rows"]} == set(rows)
    kinds = {result["classifier"] for row in document["rows"] for result in row["evaluation"]["results"]}
    assert (
        kinds
        == {"1": {"probe", "own head"}, "9": {"probe", "teacher"}, "7": {"probe"}, "10": {"probe"}}[table]
    )
    if table == "1":
        tenth = next(line for line in text.splitlines() if "10 % of the labels, mask90" in line).split("|")
        assert tenth[4].strip() == "-" and tenth[5].strip() != "-", "its own head stands with 10 %"


@pytest.mark.slow
def test_transfer_corruptions_and_losses(tmp_path):
    write_images(tmp_path / "data" / "mine" / "train.parquet", 40)
    write_images(tmp_path / "data" / "mine" / "test.parquet", 40)
    ranges = ["supervised-noise_range", "contrastive-noise_range"]
    told = "mine=mine/train.parquet,mine/test.parquet"
    run_script(SCRIPT, tmp_path, ranges, "--table", "2", "--transfer", told)
    document = json.loads((tmp_path / "contrastive_table2.json").read_text())
    for row in document["rows"]:
        (found,) = row["evaluation"]["sets"]["mine"]["results"]
        assert found["classifier"] == "probe" and found["test_degrade"]["sigma_range"] == [0.1, 0.3]
    run_script(SCRIPT, tmp_path, ["supervised-clean", "contrastive-blur_noise"], "--table", "14")
    lines = (tmp_path / "contrastive_table14.md").read_text().splitlines()
    (jpeg,) = [line for line in lines if line.startswith("| jpeg compression |")]
    assert jpeg.endswith("| 77.75 | 61.08 |") and "- |" not in jpeg and len(lines) >= 22
    run_script(SCRIPT, tmp_path, ["contrastive-noise50-mse"], "--table", "losses")
    assert "| MSE, noise50 | 1 |" in (tmp_path / "contrastive_losses_noise50.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,rows",
    [
        ("3", ["supervised10-noise50", "contrastive-noise50"]),
        ("5", ["seven_classes-supervised-mask_range", "seven_classes-contrastive-mask_range"]),
        ("6", ["contrastive-mask_range-nt_xent"]),
    ],
)
def test_figures_are_trained_probed_and_drawn(number, rows, tmp_path):
    run_script(SCRIPT.with_name("contrastive_figures.py"), tmp_path, rows, "--figure", number)
    document = json.loads((tmp_path / f"contrastive_figure{number}.json").read_text())
    (panel,) = document["panels"]["top1"]
    assert len(panel["curves"]) == {"3": 3, "5": 2, "6": 1}[number]
    assert (tmp_path / f"contrastive_figure{number}.png").stat().st_size > 10_000
