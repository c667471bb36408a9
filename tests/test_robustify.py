"""`lrface robustify`: models of each kind, labels or none, steps by time, and the way on after a stop."""

import json
import shutil
import sys

import pytest
import torch
from onnx_files import write_recogniser
from small_runs import draw_pictures, last, of, same
from typer.testing import CliRunner

from lrface import cli, config, recipes, robustify
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.models.onnx_network import OnnxBackbone
from lrface.train.checkpoint import latest_checkpoint, load_model, load_training_state

pytest.importorskip("onnx2torch", reason="pip install 'lrface[onnx]'")
SMALL = [
    "data.batch_size=4",
    "decoder.width=8",
    "stages.robust.degrade.parts.0.sizes=[8, 4]",
    "trainer.device=cpu",
    "trainer.precision=float32",
    "trainer.sheet_every=0",
    "trainer.tensorboard=false",
    "trainer.threads=1",
]
UNDRAWN = """
import torch
from torch import nn

class Plain(nn.Module):
    input_size = 16

    def __init__(self):
        super().__init__()
        self.shrink = nn.AvgPool2d(16)
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(self.shrink(x).flatten(1))

class Mapped(nn.Sequential):
    input_size = 16

def plain():
    torch.manual_seed(0)
    return Plain()

def mapped():
    torch.manual_seed(0)
    return Mapped(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Flatten(),
        nn.Linear(96, 5),
    )

def text():
    return "no network"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = draw_pictures(tmp_path_factory.mktemp("robustify"))
    write_recogniser(root / "recogniser.onnx")
    flat = root / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((root / "pictures").rglob("*.png"))):
        shutil.copy(file, flat / f"{number}.png")
    (root / "robustify_networks.py").write_text(UNDRAWN)
    return root


@pytest.fixture(scope="module")
def done(place):
    """The recogniser of the ONNX file, made robust in three steps."""
    return robustify.robustify(
        str(place / "recogniser.onnx"),
        place / "pictures",
        place / "run",
        steps=3,
        overrides=SMALL,
        show_progress=False,
    )


def test_an_onnx_file_becomes_a_run_like_any_other(place, done):
    assert done.steps == {"decoder": 1, "robust": 3}
    recipe = recipes.load_recipe(done.recipe)
    assert [stage.method.name for stage in recipe.stages] == ["reconstruct", "robustify"]
    assert recipe.stages[1].method.arguments["recognition_weight"] > 0  # four people
    file = OnnxBackbone(path=str(place / "recogniser.onnx"))
    first, second = last(place / "run", "1-decoder"), last(place / "run", "2-robust")
    assert same(of(first, "encoder."), file.state_dict())  # stage 1 keeps the recogniser
    assert same(of(second, "teacher."), file.state_dict())
    assert same(of(first, "decoder."), of(second, "decoder."))
    assert not same(of(second, "encoder."), file.state_dict())
    _, card = load_model(place / "run")
    assert card["architecture"]["name"] == "onnx" and "path" not in card["architecture"]["arguments"]
    embedder = load_embedder(place / "run")
    assert (embedder.embedding_size, embedder.input_size) == (8, 16)


def test_a_fifth_of_the_weights_stays_what_it_was_in_what_is_exported_and_not_in_what_is_trained(place, done):
    exported, card = load_model(place / "run")
    folder = latest_checkpoint(place / "run" / "stages" / "2-robust")
    own = load_training_state(folder).weights
    file = OnnxBackbone(path=str(place / "recogniser.onnx")).state_dict()
    moved = 0
    for name, value in exported.state_dict().items():
        trained = own[f"encoder.{name}"]
        torch.testing.assert_close(
            value, trained.lerp(file[name], 0.2) if value.is_floating_point() else value
        )
        moved += not torch.equal(trained, file[name])
    assert moved > 4 and card["weights"] == "0.2 of the teacher's, the rest of the trained ones"


def test_a_run_that_was_stopped_goes_on_with_the_weights_it_trained(place, done, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    stage, summary = tmp_path / "run" / "stages" / "2-robust", tmp_path / "run" / "summary.json"
    arguments = (str(place / "recogniser.onnx"), place / "pictures", tmp_path / "run")
    given = {"steps": 3, "overrides": [*SMALL, "trainer.checkpoint_every=2"], "show_progress": False}
    with pytest.raises(UsageError, match="another recipe"):
        robustify.robustify(*arguments, **{**given, "steps": 4})
    assert stage.is_dir() and summary.is_file()
    robustify.robustify(*arguments, **given, restart=True)
    straight, _ = load_model(tmp_path / "run")
    assert same(straight.state_dict(), load_model(place / "run")[0].state_dict())
    shutil.rmtree(stage / "step-00000003")
    (tmp_path / "run" / "model.safetensors").unlink()
    again = robustify.robustify(*arguments, **given)
    assert again.summary["stages"][-1]["resumed_at"] == 2
    assert same(load_model(tmp_path / "run")[0].state_dict(), straight.state_dict())


def test_the_shipped_recipe_is_what_the_command_runs(place):
    shipped = recipes.load_recipe("celeba300/robustify_onnx")
    steps = [f"stages.{stage.name}.steps={stage.steps}" for stage in shipped.stages]
    steps += [
        f"stages.{stage.name}.schedule.warmup_steps={stage.schedule.warmup_steps}" for stage in shipped.stages
    ]
    backbone = {"name": "onnx", "path": str(place / "recogniser.onnx")}
    own = robustify.robust_recipe(backbone, None, place / "pictures", place / "run", True, True, steps)
    for one, other in zip(own.stages, shipped.stages, strict=True):
        one.schedule.warmup_epochs = 0.0  # the command gives steps instead
        assert one == other
    assert (own.head, own.decoder, own.data.batch_size) == (shipped.head, shipped.decoder, 64)


def test_the_run_itself_is_a_start_and_needs_no_file(place, done, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    said: list[str] = []
    again = robustify.robustify(
        str(tmp_path / "run"),
        place / "flat",
        tmp_path / "again",
        steps=1,
        overrides=SMALL,
        show_progress=False,
        say=said.append,
    )
    network, _ = load_model(tmp_path / "run")
    assert same(of(last(tmp_path / "again", "2-robust"), "teacher."), network.state_dict())
    assert any("16 faces" in line and "no labels are used" in line for line in said)
    recipe = recipes.load_recipe(again.recipe)
    assert recipe.stages[1].method.arguments["recognition_weight"] == 0
    assert not [key for key in last(tmp_path / "again", "2-robust") if key.startswith("head.")]


def test_steps_by_time_stay_when_a_run_goes_on(place, tmp_path, monkeypatch):
    timed: list[str] = []

    def seconds(recipe, stage, identities):
        timed.append(stage.name)
        return {"decoder": 0.5, "robust": 2.0}[stage.name]

    monkeypatch.setattr(robustify, "step_seconds", seconds)
    given = {"overrides": SMALL, "show_progress": False}
    model = str(place / "recogniser.onnx")
    found = robustify.robustify(model, place / "flat", tmp_path / "run", minutes=0.2, **given)
    # 12 seconds, of which 11.4 are for steps
    assert found.steps == {"decoder": 2, "robust": 5} and timed == ["decoder", "robust"]
    whole = last(tmp_path / "run", "2-robust")
    shutil.rmtree(tmp_path / "run" / "stages" / "2-robust")
    (tmp_path / "run" / "model.safetensors").unlink()
    again = robustify.robustify(model, place / "flat", tmp_path / "run", minutes=0.2, **given)
    assert again.steps == found.steps and len(timed) == 2
    assert same(whole, last(tmp_path / "run", "2-robust"))
    with pytest.raises(UsageError, match="holds a run of another recipe: .*steps: 5 -> 7"):
        robustify.robustify(model, place / "flat", tmp_path / "run", steps=7, **given)


def test_steps_are_timed_on_the_real_stages(place, tmp_path):
    backbone, weights = robustify.backbone_of(str(place / "recogniser.onnx"))
    recipe = robustify.robust_recipe(backbone, weights, place / "flat", tmp_path, False, True, SMALL)
    seconds = {stage.name: robustify.step_seconds(recipe, stage, 1) for stage in recipe.stages}
    assert set(seconds) == {"decoder", "robust"} and all(0 < value < 60 for value in seconds.values())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="give more time, or --steps"):
        robustify.plan_steps({"robust": 10.0}, 0.1)


@pytest.mark.parametrize(("function", "stages"), [("mapped", ["decoder", "robust"]), ("plain", ["robust"])])
def test_a_network_of_a_function(place, tmp_path, monkeypatch, function, stages):
    monkeypatch.chdir(place)
    said: list[str] = []
    found = robustify.robustify(
        f"robustify_networks:{function}",
        "flat",
        tmp_path / "run",
        steps=1,
        overrides=SMALL,
        show_progress=False,
        say=said.append,
    )
    assert list(found.steps) == stages
    assert ("decoder" in found.steps) or any("no reconstruction in training" in line for line in said)
    network, _ = load_model(tmp_path / "run")
    monkeypatch.syspath_prepend(str(place))
    made = getattr(sys.modules["robustify_networks"], function)().eval()
    images = torch.rand(2, 3, 16, 16)
    teacher = of(last(tmp_path / "run", f"{len(stages)}-robust"), "teacher.")
    network.load_state_dict(teacher)
    torch.testing.assert_close(network(images), made(images))


def test_what_is_no_model_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    given = {"data": place / "flat", "out": tmp_path / "run", "steps": 1, "overrides": SMALL}
    for model, kind, words in (
        ("none.onnx", LrfaceError, "no such file"),
        ("robustify_networks:text", LrfaceError, "gives str; a torch.nn.Module is needed"),
        ("robustify_networks:none", LrfaceError, "has no attribute"),
        ("nowhere", LrfaceError, "no such model"),
        ("robustify_networks:plain@colour=BGR", UsageError, "only an .onnx file takes options"),
    ):
        with pytest.raises(kind, match=words):
            robustify.robustify(model, **given)
    model = str(place / "recogniser.onnx")
    for options, words in (
        ({"steps": 0}, "--steps must be at least 1"),
        ({"minutes": 1.0}, "--minutes or --steps"),
        ({"minutes": -1.0, "steps": None}, "--minutes must be above 0"),
        ({"overrides": ["stages.robust.nothing=1"]}, "unknown key"),
    ):
        with pytest.raises(UsageError, match=words):
            robustify.robustify(model, **{**given, **options})
    assert not (tmp_path / "run").exists()


def test_the_command(place, done):
    options = [part for each in SMALL for part in ("--set", each)]
    model = str(place / "recogniser.onnx")
    called = [
        "robustify",
        model,
        "--data",
        str(place / "pictures"),
        "--out",
        str(place / "run"),
        "--steps",
        "3",
    ]
    found = CliRunner().invoke(cli.app, [*called, *options, "--json"])
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed["model"] == done.model and printed["steps"] == done.steps
    assert [stage["resumed_at"] for stage in printed["summary"]["stages"]] == [1, 3]  # all was there
    assert config.read_yaml(place / "run" / "recipe.yaml")["backbone"]["path"] == model
    assert CliRunner().invoke(cli.app, ["robustify", model]).exit_code == 2
