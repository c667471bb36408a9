"""`lrface runs`: what a folder of runs tells, broken ones too."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from lrface import config, recipes, runs
from lrface.cli import app
from lrface.errors import LrfaceError
from lrface.files import is_locked

RECIPE = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 4},
    "backbone": {"name": "ir18", "width": 4, "embedding_size": 8},
    "trainer": {
        "device": "cpu", "precision": "float32", "tensorboard": False, "log_every": 1, "sheet_every": 0,
    },
    "validate": {"every": 2, "identities": 2, "sizes": [112, 14], "pairs": 24},
    "stages": [
        {"name": "one", "method": "classify", "steps": 2},
        {"name": "two", "method": "classify", "load": ["encoder"], "steps": 3},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two finished runs, a failed one, one stopped in its first stage, and things that are no runs."""
    root = tmp_path_factory.mktemp("work")
    for number in range(16):
        folder = root / "data" / "faces" / f"person {number // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (112, 112)))
    train(root, "a")
    train(root, "sub/b", "seed=1", "stages.1.optimiser.learning_rate=0.5")
    with pytest.raises(LrfaceError, match="the loss became nan|not finite"):
        train(root, "failed", "stages.0.steps=40", "stages.0.optimiser.learning_rate=1.0e+30")
    # A kill: no more than what was there at that moment, and a record that still says running.
    train(root, "killed", "stages.0.steps=2")
    killed = root / "runs" / "killed"
    for path in (killed / "stages" / "2-two", killed / "model.safetensors", killed / "model.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = json.loads((killed / "run.json").read_text())
    record["sessions"][-1] |= {"state": "running", "ended": None, "process": 1}
    (killed / "run.json").write_text(json.dumps(record))
    (root / "runs" / "notes").mkdir()
    (root / "runs" / "notes" / "todo.txt").write_text("more data")
    return root


def train(root: Path, name: str, *overrides: str) -> None:
    recipe = config.parse_recipe(copy.deepcopy(RECIPE), [*overrides, f"out={root / 'runs' / name}"])
    recipes.run_recipe(recipe, data=root / "data", show_progress=False)


def by_name(root: Path) -> dict[str, runs.RunReport]:
    found = runs.list_runs(root / "runs")
    return {str(Path(report.path).relative_to(root / "runs")): report for report in found}


def test_runs_are_listed_with_what_they_came_to(root):
    found = by_name(root)
    assert list(found) == ["a", "failed", "killed", "sub/b"]
    a = found["a"]
    assert (a.name, a.state, a.stage, a.step, a.steps) == ("tiny", "finished", "two", 3, 3)
    assert a.loss > 0 and a.images_per_second > 0 and a.started <= a.ended and a.problem is None
    assert set(a.validation) == {"mean", "112", "14"}
    assert a.validation["mean"] == pytest.approx((a.validation["112"] + a.validation["14"]) / 2)
    files = [path for path in (root / "runs" / "a").rglob("*") if path.is_file()]
    assert a.bytes == sum(path.stat().st_size for path in files)
    assert [(stage.name, stage.step, stage.steps) for stage in a.stages] == [("one", 2, 2), ("two", 3, 3)]
    failed = found["failed"]
    assert failed.state == "failed" and "of stage 'one'" in failed.problem and failed.steps == 40
    killed = found["killed"]
    assert (killed.state, killed.stage, killed.step, killed.steps) == ("interrupted", "one", 2, 2)


def test_a_lock_that_a_process_holds_means_running(root, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(root / "runs" / "killed", folder)
    assert runs.read_run(folder).state == "interrupted" and not is_locked(folder)
    code = (
        "import sys; from lrface.files import locked\n"
        "with locked(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert is_locked(folder) and runs.read_run(folder).state == "running"
        process.stdin.close()
    assert runs.read_run(folder).state == "interrupted" and not is_locked(tmp_path)


def test_a_run_of_this_process_is_running_and_keeps_its_lock(root, monkeypatch):
    seen = []
    fit = recipes.Trainer.fit

    def spy(self, stage):
        folder = root / "runs" / "own"
        seen.append(runs.read_run(folder).state)
        code = "import sys; from lrface.files import is_locked; print(is_locked(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        seen.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    train(root, "own", 'stages=[{"name": "one", "method": "classify", "steps": 1}]')
    shutil.rmtree(root / "runs" / "own")
    assert seen == ["running", "True"]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("recipe.yaml", "stages: [", "recipe.yaml is no valid YAML"),
        ("recipe.yaml", "- 1", "recipe.yaml holds no recipe"),
        ("run.json", "{half", "run.json .*cannot be read"),
        ("run.json", '{"sessions": [3]}', "run.json is no record of a run"),
        ("model.json", "{half", "model.json .*cannot be read"),
        ("stages/1-one/metrics.csv", b"\xff\xfe\x00", "metrics.csv cannot be read"),
        ("stages/1-one/validation.csv", b"\xff\xfe\x00", "validation.csv cannot be read"),
    ],
)
def test_broken_folders_are_named_and_hide_no_other(root, tmp_path, file, text, message):
    for name in ("broken", "whole"):
        shutil.copytree(root / "runs" / "a", tmp_path / name)
    path = tmp_path / "broken" / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    broken, whole = runs.list_runs(tmp_path)
    assert whole.state == "finished" and broken.state == "broken"
    with pytest.raises(LrfaceError, match=message):
        runs.compare_runs([tmp_path / "broken", tmp_path / "whole"])
    assert broken.problem in runs.runs_table([broken, whole])


def test_runs_of_versions_without_a_record_are_listed(root, tmp_path):
    shutil.copytree(root / "runs" / "a", tmp_path / "old")
    (tmp_path / "old" / "run.json").unlink()
    report = runs.read_run(tmp_path / "old")
    assert (report.state, report.step, report.steps, report.started) == ("finished", 3, 3, None)
    (tmp_path / "old" / "model.safetensors").unlink()
    assert runs.read_run(tmp_path / "old").state == "interrupted"


def test_lines_that_a_kill_cut_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,2.5\n1,2.0\n2\n")
    assert runs.read_metrics(tmp_path) == [{"step": 0.0, "loss": 2.5}, {"step": 1.0, "loss": 2.0}]
    assert runs.read_metrics(tmp_path / "nowhere") == []


def test_recipes_are_flattened_to_dotted_keys():
    plain = {"a": {"b": 1, "c": [1, 2]}, "stages": [{"name": "x", "steps": 3}], "d": {}, "e": []}
    expected = {"a.b": 1, "a.c": [1, 2], "stages.0.name": "x", "stages.0.steps": 3, "d": {}, "e": []}
    assert runs.flat(plain) == expected


def test_a_comparison_shows_what_differs(root, tmp_path):
    places = [root / "runs" / "a", root / "runs" / "sub" / "b"]
    found = runs.compare_runs(places)
    assert found.keys == {"seed": [0, 1], "stages.1.optimiser.learning_rate": [0.1, 0.5]}
    assert found.results["step"] == [3, 3] and found.results["loss"][0] != found.results["loss"][1]
    assert list(found.results)[-3:] == ["validation mean (%)", "validation 112 (%)", "validation 14 (%)"]
    text = found.to_text()
    assert "stages.1.optimiser.learning_rate" in text and "0.5" in text and "data.batch_size" not in text
    # A field that a version added is no difference to a run from before it.
    older = tmp_path / "older"
    shutil.copytree(places[0], older)
    plain = config.read_yaml(older / "recipe.yaml")
    del plain["trainer"]["sheet_every"], plain["data"]["sampling"]
    (older / "recipe.yaml").write_text(json.dumps(plain))
    assert runs.compare_runs([places[0], older]).keys == {"trainer.sheet_every": [0, 1000]}
    assert "the recipes are the same" in runs.compare_runs([places[0], places[0]]).to_text()
    picture = tmp_path / "both.png"
    runs.draw_comparison(found, picture)
    height, width, _ = cv2.imread(str(picture)).shape
    assert height > 300 and width > 1500  # four panels, three beside each other
    for colour in ((180, 119, 31), (14, 127, 255)):  # a line of each run, matplotlib's first colours in BGR
        near = np.abs(cv2.imread(str(picture)).astype(int) - colour).max(axis=2) < 12
        assert near.sum() > 200


def command(*arguments: str | Path):
    return CliRunner().invoke(app, ["runs", *map(str, arguments)])


def test_the_command(root, tmp_path):
    listed = command(root / "runs")
    assert listed.exit_code == 0
    assert all(
        text in listed.stdout for text in ("finished", "failed", "interrupted", "3/3", "mean:", "on disk")
    )
    as_json = json.loads(command(root / "runs", "--json").stdout)
    assert [run["state"] for run in as_json["runs"]] == ["finished", "failed", "interrupted", "finished"]
    places = root / "runs" / "a", root / "runs" / "sub" / "b"
    picture = tmp_path / "both.png"
    compared = json.loads(command("compare", *places, "--json", "--plot", picture).stdout)
    assert compared["differences"]["seed"] == [0, 1] and picture.is_file()
    assert "seed" in command("compare", *places).stdout
    empty = tmp_path / "empty"
    os.mkdir(empty)
    assert command(empty).stdout == "no runs\n"
    for arguments, code, message in (
        ((tmp_path / "nowhere",), 1, "no such folder"),
        (("compare", places[0]), 2, "takes two runs or more"),
        (("compare", places[0], empty), 1, "is no run of `lrface train`"),
        ((root, "--plot", picture), 2, "--plot belongs to lrface runs compare"),
        (("compare", *places, "--plot", tmp_path / "x.gifx"), 2, "the suffix must be one of"),
    ):
        result = command(*arguments)
        assert result.exit_code == code and message in result.output
