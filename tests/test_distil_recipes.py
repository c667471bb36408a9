"""Distillation as a recipe: a classifier of clean images, then the student that learns from it, in one run."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from small_runs import IREVNET, TRAINER, draw_pictures, last, of, run, same

from lrface import config, recipes
from lrface.errors import LrfaceError, UsageError
from lrface.methods import Distil
from lrface.recipes import build_method, check_loads, load_recipe
from lrface.train.checkpoint import load_model

TEACHER = {"from": "encoder", "to": "teacher"}
HEAD = {"from": "head", "to": "teacher_head"}
TINY = {
    "name": "tiny",
    "data": {"path": "pictures", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 4},
    "head": "softmax",
    "trainer": {**TRAINER, "checkpoint_every": 2, "log_every": 1},
    "stages": [
        {
            "name": "invertible",
            "method": "classify",
            "backbone": IREVNET,
            "degrade": "clean",
            "steps": 2,
            "optimiser": {"learning_rate": 0.01},
        },
        {
            "name": "student",
            "method": {"name": "distil", "teacher": IREVNET, "loss": "kd"},
            "load": [TEACHER, HEAD],
            "degrade": {"name": "corruptions", "set": "cifar", "names": ["gaussian_noise", "contrast"]},
            "steps": 6,
            "optimiser": {"learning_rate": 0.01},
        },
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data"))


def tiny(loss: str = "kd", *overrides: str) -> config.Recipe:
    raw = copy.deepcopy(TINY)
    raw["stages"][1]["method"]["loss"] = loss
    if loss != "kd":
        raw["stages"][1]["load"] = [TEACHER]
    return config.parse_recipe(raw, overrides)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(), data, out)
    return out


def test_the_classifier_of_stage_one_is_the_teacher_as_it_came(finished):
    first, second = last(finished, "1-invertible"), last(finished, "2-student")
    assert len(of(first, "encoder.")) > 50
    assert same(of(first, "encoder."), of(second, "teacher."))
    assert same(of(first, "head."), of(second, "teacher_head."))


def test_the_model_at_the_end_is_the_student_alone(finished):
    encoder, card = load_model(finished)
    assert card["architecture"] == {"name": "cifar_resnet18", "arguments": {"width": 4}}
    assert card["training"]["method"] == "distil"
    assert same(dict(encoder.state_dict()), of(last(finished, "2-student"), "encoder."))


def test_the_loss_is_in_the_log(finished):
    with (finished / "stages" / "2-student" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        assert float(row["distillation"]) > 0
        expected = float(row["recognition"]) + 2 * float(row["distillation"])
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["vid", "pkt"])
def test_a_run_that_was_stopped_comes_to_the_same_bits(loss, data, tmp_path, monkeypatch):
    """With its own parameters and their momentum, and with an average of the weights; stopped between checkpoints."""
    overrides = ["stages.1.ema=0.9", "stages.1.optimiser.name=adamw"] if loss == "vid" else []
    run(tiny(loss, *overrides), data, tmp_path / "whole")
    forward = Distil.forward
    steps = []

    def until_the_power_is_gone(self, batch):
        steps.append(1)
        if len(steps) == 4:
            raise LrfaceError("the power is gone")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Distil, "forward", until_the_power_is_gone)
        with pytest.raises(LrfaceError, match="power"):
            run(tiny(loss, *overrides), data, tmp_path / "stopped")
    said = run(tiny(loss, *overrides), data, tmp_path / "stopped")
    assert any("resumes from" in line and "step-00000002" in line for line in said)
    whole, stopped = last(tmp_path / "whole", "2-student"), last(tmp_path / "stopped", "2-student")
    assert same(whole, stopped)
    assert any(key.startswith("distillation.regressor.") for key in whole) is (loss == "vid")
    assert any(key.startswith("teacher.") for key in whole)


def test_a_teacher_from_a_model_on_disk(finished, data, tmp_path):
    """One teacher for many students."""
    recipe = tiny("sp")
    del recipe.stages[0]
    recipe.stages[0].load = [{"path": str(finished / "stages" / "1-invertible"), "to": "teacher"}]
    said = run(recipe, data, tmp_path / "run")
    assert any("teacher comes from" in line for line in said)
    assert same(
        of(last(finished, "1-invertible"), "encoder."), of(last(tmp_path / "run", "1-student"), "teacher.")
    )
    recipe.stages[0].load[0]["path"] = str(finished)
    with pytest.raises(LrfaceError, match="cifar_resnet18.* is of another architecture"):
        run(recipe, data, tmp_path / "other")


@pytest.mark.parametrize(
    "loss, overrides, message",
    [
        ("fitnet", ["stages.1.load=[]"], "stages.1.load lacks teacher, .*add {from: encoder, to: teacher}"),
        ("fitnet", ["stages.1.load=[{from: encoder, to: teacher.body}]"], "teacher.body: encoder of stage"),
        ("kd", ["stages.1.load=[{from: encoder, to: teacher}]"], "lacks teacher_head, .*{from: head, to: teacher_head}"),
        ("kd", ["stages.1.load=[{from: head, to: teacher_head}]"], "stages.1.load lacks teacher, which knows nothing"),
        ("pkt", ["stages.1.load=[{from: encoder, to: teacher}, {from: head, to: teacher_head}]"], "has no teacher_head"),
        ("vid", ["stages.0.backbone={name: cifar_resnet18, width: 4}"], "teacher: encoder of stage 'invertible' is of an"),
        ("sp", ["stages.1.accumulate=2"], r"method Distil cannot take a batch in parts \(accumulate=2\): its loss comp"),
        ("kd", ["head=cosface"], "stage 'student': the loss kd compares class probabilities"),
        ("kd", ["stages.1.method.los=kd"], r"stage 'student': unknown key method.los .*did you mean 'loss'"),
        ("kd", ["stages.1.method.encoder=x"], "method.encoder follows from the rest of the recipe"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found_before_the_first_stage(
    loss, overrides, message, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    with pytest.raises(UsageError, match=message):
        run(tiny(loss, *overrides), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_head_from_a_run_on_disk(finished, data, tmp_path):
    """kd needs the teacher's classes, which the run keeps beside the encoder; the student's here, of its own width."""
    stage = finished / "stages" / "2-student"
    recipe = tiny("kd", "stages.1.method.teacher={name: cifar_resnet18, width: 4}")
    del recipe.stages[0]
    for place, name in ((finished, "head"), (stage, "head"), (stage / "step-00000006", "head")):
        recipe.stages[0].load = [
            {"path": str(place), "to": "teacher"},
            {"path": str(place), "from": name, "to": "teacher_head"},
        ]
        out = tmp_path / f"run {place.name}"
        run(recipe, data, out)
        found, wanted = last(out, "1-student"), last(finished, "2-student")
        assert same(of(found, "teacher."), of(wanted, "encoder."))
        assert same(of(found, "teacher_head."), of(wanted, "head."))
    recipe.stages[0].load[1]["from"] = "heads"
    with pytest.raises(
        LrfaceError, match="parts.safetensors has no heads; it has head, teacher, teacher_head"
    ):
        run(recipe, data, tmp_path / "other 1")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.safetensors", "model.json"):
        (alone / name).write_bytes((finished / name).read_bytes())
    recipe.stages[0].load[1].update({"from": "head", "path": str(alone)})
    with pytest.raises(
        LrfaceError, match="model.safetensors has no head: a run of `lrface train` keeps it in its ch"
    ):
        run(recipe, data, tmp_path / "other 2")
    recipe.stages[0].load[1].update({"path": str(finished), "from": "teacher"})
    with pytest.raises(LrfaceError, match="teacher is of another architecture"):
        run(recipe, data, tmp_path / "other 3")


def test_a_teacher_of_a_library_that_names_its_file_needs_no_load(data, tmp_path):
    teacher = "{name: torchvision, model: resnet18, stem: quality, input_size: 32, weights: resnet18.pth}"
    recipe = tiny("pkt", f"stages.1.method.teacher={teacher}", "stages.1.load=[]")
    check_loads(recipe, [build_method(recipe, stage, 4) for stage in recipe.stages])
    with pytest.raises(LrfaceError, match="resnet18.pth"):
        run(recipe, data, tmp_path / "run")  # which there is none of
    recipe = tiny(
        "pkt", f"stages.1.method.teacher={teacher.replace(', weights: resnet18.pth', '')}", "stages.1.load=[]"
    )
    with pytest.raises(UsageError, match="stages.1.load lacks teacher"):
        run(recipe, data, tmp_path / "run")


# The shipped recipes.


@pytest.mark.parametrize("name", ["kd", "fitnet", "pkt", "vid", "sp"])
def test_the_shipped_recipes_differ_from_qualnet_in_the_second_method_alone(name):
    recipe, qualnet = load_recipe(f"cifar10/distil_{name}"), load_recipe("cifar10/qualnet")
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    assert [type(method).__name__ for method in methods] == ["Classify", "Distil"]
    assert methods[1].weight == methods[1].distillation.published_weight
    assert recipe.stages[1].method.arguments == {
        "teacher": config.to_plain(recipe.stages[0].backbone),
        "loss": name,
    }
    # The same seed gives the same teacher as QualNet's decoder, and both students see the same images.
    assert recipe.stages[0] == qualnet.stages[0]
    own, other = (copy.deepcopy(each.stages[1]) for each in (recipe, qualnet))
    for stage in (own, other):
        stage.name = stage.method = stage.load = None
        stage.optimiser.layers = []
    assert own == other
    assert (recipe.seed, recipe.data, recipe.backbone, recipe.head) == (
        qualnet.seed,
        qualnet.data,
        qualnet.backbone,
        qualnet.head,
    )
    smaller = load_recipe(f"cifar10/distil_{name}", ["stages.0.backbone.blocks=[1, 1, 1]"])
    assert smaller.stages[1].method.arguments["teacher"]["blocks"] == [1, 1, 1]  # said once, for both stages


def test_a_student_begins_as_with_qualnet(monkeypatch):
    """Whatever teaches it: the same seed gives the same first weights of both stages."""
    found = []
    for name in ("distil_kd", "distil_vid", "qualnet"):
        recipe = load_recipe(f"cifar10/{name}")
        torch.manual_seed(recipe.seed)
        methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
        found.append([{**of(m.state_dict(), "encoder."), **of(m.state_dict(), "head.")} for m in methods])
    for others in found[1:]:
        assert all(same(one, other) for one, other in zip(found[0], others, strict=True))
