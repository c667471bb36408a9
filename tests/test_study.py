"""Tables: rows are trained once, found done, taken from each other, evaluated once, and written with the paper's numbers."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import IREVNET, TRAINER, draw_pictures

from lrface import study
from lrface.benchmarks.image_sets import open_stored
from lrface.errors import LrfaceError
from lrface.study import Column, Evaluation, Options, Row
from lrface.train.checkpoint import load_parts

CLEAN = {
    "name": "invertible",
    "method": "classify",
    "backbone": IREVNET,
    "degrade": "clean",
    "steps": 2,
    "optimiser": {"learning_rate": 0.01},
}
QUALITY = {
    "name": "quality",
    "method": {"name": "qualnet", "quality_weight": 0.1},
    "load": [{"from": "encoder", "to": "decoder.network"}],
    "degrade": {"name": "corruptions", "set": "cifar", "names": ["contrast"]},
    "steps": 2,
    "optimiser": {"learning_rate": 0.01},
}
RECIPE = {
    "name": "tiny",
    "data": {"path": "pictures", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 4},
    "head": "softmax",
    "decoder": {"name": "irevnet_inverse", "network": IREVNET},
    "trainer": TRAINER,
    "stages": [CLEAN, QUALITY],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pictures of 4 classes and a recipe of two stages."""
    root = draw_pictures(tmp_path_factory.mktemp("study"))
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def options(place: Path, *rows: Row, **changes) -> Options:
    settings = {
        "name": "table",
        "suite": "cifar10",
        "table_rows": rows,
        "rows": rows,
        "seeds": (0,),
        "runs": place / "runs",
        "data": place,
        "results": place / "results",
    }
    return Options(**{**settings, **changes})


class Counted:
    """An evaluation that reads the trained weights, and how often it was asked."""

    def __init__(self):
        self.calls = 0

    def evaluation(self, **settings) -> Evaluation:
        def measure(folder: Path) -> dict:
            self.calls += 1
            head = load_parts(sorted((folder / "stages").glob("2-*/step-*"))[-1])["head.linear.weight"]
            return {"score": float(head.abs().sum())}

        return Evaluation("counted", settings, measure, {"test": "the head itself"})


SCORE = (Column("score", lambda figures: figures["score"], {"first": 1.5}),)


def test_rows_are_trained_measured_once_and_written_with_the_papers_numbers(place, capfd):
    recipe = str(place / "tiny.yaml")
    rows = (
        Row("first", "the first", recipe),
        Row("second", "the second", recipe, ("stages.quality.method.quality_weight=1.0",)),
        Row("third", "not asked for", recipe),
    )
    counted = Counted()
    asked = options(place, *rows, rows=rows[:2], command="python eval/table.py")
    study.run_study("A table", asked, counted.evaluation(), SCORE, paper="a paper", notes=["Beware."])
    written = json.loads((place / "results" / "table.json").read_text())
    for field in (
        "command",
        "commit",
        "config_sha256",
        "checkpoint_sha256",
        "data",
        "seconds",
        "machine",
        "date",
    ):
        assert written[field], field
    assert written["paper"] == {"source": "a paper", "score": {"first": 1.5}}
    first, second = written["rows"]
    assert [stage["images"] for stage in first["stages"]] == [16, 16] and first["training_images"] == 32
    assert written["checkpoint_sha256"] == {
        "first:0": first["checkpoint_sha256"],
        "second:0": second["checkpoint_sha256"],
    }
    # The second row's lambda is another, and so are its weights.
    assert first["evaluation"]["score"] != second["evaluation"]["score"]
    lines = (place / "results" / "table.md").read_text().splitlines()
    assert lines[2] == f"| the first | 1 | 16 + 16 | {first['evaluation']['score']:.2f} | 1.50 |"
    assert lines[4] == "| not asked for | 0 | - | - | - |"
    assert lines[-1] == "Beware."
    assert capfd.readouterr().out.splitlines() == lines

    # Stage 1 of the second run is that of the first, bit for bit, and was not trained again.
    runs = place / "runs"
    state = [
        load_parts(sorted((runs / f"{key}-seed0/stages").glob("1-*/step-*"))[-1])
        for key in ("first", "second")
    ]
    assert all((state[0][name] == state[1][name]).all() for name in state[0])
    told = json.loads((runs / "second-seed0" / "summary.json").read_text())["stages"]
    assert told[0]["resumed_at"] == 2 and "seconds" not in told[0]
    assert told[1]["seconds"] > 0

    # Once more: nothing is trained or measured; with other settings it is measured again, not trained.
    assert counted.calls == 2
    stamp = (runs / "first-seed0" / "run.json").stat().st_mtime_ns
    again = study.run_study("A table", asked, counted.evaluation(), SCORE)
    assert counted.calls == 2 and again["rows"] == written["rows"]
    study.run_study("A table", asked, counted.evaluation(images=5), SCORE)
    assert counted.calls == 4
    assert (runs / "first-seed0" / "run.json").stat().st_mtime_ns == stamp
    half = options(place, *rows, finished=True, results=place / "half")
    found = study.run_study("A table", half, counted.evaluation(images=5), SCORE)
    assert [row["key"] for row in found["rows"]] == ["first", "second"] and counted.calls == 4
    assert not (runs / "third-seed0").exists()
    changed = (Row("first", "the first", recipe, ("stages.quality.method.quality_weight=0.5",)),)
    with pytest.raises(LrfaceError, match="first-seed0: training failed"):
        study.run_study("A table", options(place, *changed), counted.evaluation(), SCORE)


def test_only_stages_that_would_come_out_the_same_are_taken(place):
    from lrface import recipes

    recipe = str(place / "tiny.yaml")
    runs = place / "others"
    study.train_run(recipe, [f"out={runs / 'donor'}", "stages.1.steps=1"], place)

    def taken(*overrides: str) -> bool:
        out = runs / "taker"
        found = study.take_stages(recipes.load_recipe(recipe, [f"out={out}", *overrides]), runs)
        names = sorted(path.name for path in (out / "stages").glob("*"))
        assert names == (["1-invertible"] if found else [])
        if found:
            assert found == runs / "donor"
            for path in sorted((out / "stages").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            (out / "stages").rmdir()
        return found is not None

    assert taken()
    assert taken("stages.1.steps=7", "trainer.log_every=1", "name=other", "backbone.width=8")
    assert not taken("seed=1")
    assert not taken("stages.0.steps=3")
    assert not taken("stages.0.optimiser.learning_rate=0.02")
    assert not taken("data.batch_size=4")
    assert not taken("trainer.precision=bfloat16")
    # A run that has begun keeps what it has; an unfinished donor gives nothing.
    (runs / "taker" / "stages").mkdir(parents=True)
    assert study.take_stages(recipes.load_recipe(recipe, [f"out={runs / 'taker'}"]), runs) is None
    (runs / "taker" / "stages").rmdir()
    (runs / "donor" / "summary.json").unlink()
    assert not taken()


def test_a_run_that_was_stopped_is_no_result(place, monkeypatch):
    recipe, out = str(place / "tiny.yaml"), place / "stopped"
    # A pre-empted training ends well, before its end.
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    with pytest.raises(LrfaceError, match="stopped before its end"):
        study.train_run(recipe, [f"out={out}"], place)


def test_schedules_for_all_rows_and_for_one(place):
    recipe = str(place / "tiny.yaml")

    def found(row: Row, **changes) -> list[str]:
        return study.row_overrides(row, options(place, row, **changes))

    plain = Row("a", "a", recipe)
    assert found(plain) == []
    assert found(plain, overrides=("seed=3",)) == ["seed=3"]
    assert found(plain, steps=5) == [
        f"stages.{n}.{what}" for n in (0, 1) for what in ("steps=5", "epochs=null")
    ]
    assert found(plain, epochs=1.5)[:2] == ["stages.0.steps=null", "stages.0.epochs=1.5"]
    double = Row("b", "b", recipe, ("head=cosface",), length=2)
    assert found(double)[:2] == ["stages.0.steps=4", "stages.0.epochs=null"]
    assert found(double)[-1] == "head=cosface"
    assert found(double, steps=5)[0] == "stages.0.steps=10"


def test_the_first_images_are_corrupted_once_and_errors_are_those_of_robustness(place):
    from lrface.robustness import run_robustness

    rng = np.random.default_rng(0)
    test = place / "cifar10"
    test.mkdir()
    images = rng.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, 24)
    np.savez(test / "test.npz", images=images, labels=labels)
    row = Row("first", "the first", str(place / "tiny.yaml"))
    study.train_run(row.recipe, ["seed=0", f"out={place / 'judged'}"], place)
    out = study.stored_set(test / "test.npz", "cifar10_c", 8, place / "runs")
    stored = open_stored(out)
    assert len(stored.conditions) == 19 * 5 and len(stored.open("fog", 5)) == 8
    assert stored.open("speckle_noise", 2).labels.tolist() == labels[:8].tolist()
    assert study.stored_set(test / "test.npz", "cifar10_c", 8, place / "runs") == out

    evaluated = run_robustness([str(place / "judged")], out, test / "test.npz", show_progress=False).results[
        0
    ]
    assert study.clean_accuracy(evaluated) == 100 - evaluated["clean_error"]
    by_hand = [100 - row["error"] for row in evaluated["corruptions"]]
    assert study.corruption_accuracy(evaluated) == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert study.accuracy_on("fog")(evaluated) in by_hand
    assert study.accuracy_on("spatter")(evaluated) is None


def test_options_of_a_script(capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["eval/x.py", "--data", "/here", "--seeds", "0", "--runs=/there", "--steps", "5"]
    )
    suites = {"cifar10": (Row("a", "A", "x"), Row("b", "B", "x")), "imagenet": (Row("c", "C", "y"),)}
    found = study.study_options("What it does.", "tableX", suites, ["--rows", "b", "--seeds", "0", "1", "0"])
    assert found.name == "tableX" and [row.key for row in found.rows] == ["b"] and found.seeds == (0, 1)
    assert found.command == "python eval/x.py --seeds 0 --steps 5"
    assert [row.key for row in found.table_rows] == ["a", "b"] and found.runs == Path("runs/qualnet/cifar10")
    found = study.study_options("", "tableX", suites, ["--suite", "imagenet", "--set", "a=1", "b=2"])
    assert found.name == "tableX_imagenet" and found.overrides == ("a=1", "b=2")
    for wrong, said in ((["--rows", "bb"], "did you mean"), (["--steps", "3", "--epochs", "1"], "not both")):
        with pytest.raises(SystemExit):
            study.study_options("", "tableX", suites, wrong)
        assert said in capsys.readouterr().err


def test_cells():
    assert study.cell([]) == study.cell([None]) == "-"
    assert study.cell([1.234]) == "1.23"
    assert study.cell([1.0, 2.0, None]) == "1.50 (1.00 to 2.00)"
