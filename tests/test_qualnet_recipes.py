"""Recipes whose stages train different networks: QualNet's i-RevNet, then the classifier that its inverse teaches."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import IREVNET, TRAINER, draw_pictures, last, of, run
from typer.testing import CliRunner

from lrface import config, recipes
from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.recipes import build_method, check_loads, load_recipe, run_recipe
from lrface.train.checkpoint import load_decoder, load_model

LOAD = {"from": "encoder", "to": "decoder.network"}
CORRUPTED = {"name": "corruptions", "set": "cifar", "names": ["gaussian_noise", "contrast"]}
TINY = {
    "name": "tiny",
    "data": {"path": "pictures", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 4},
    "head": "softmax",
    "decoder": {"name": "irevnet_inverse", "network": copy.deepcopy(IREVNET)},
    "trainer": TRAINER,
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
            "name": "quality",
            "method": {"name": "qualnet", "quality_weight": 0.1},
            "load": [LOAD],
            "degrade": CORRUPTED,
            "steps": 2,
            "optimiser": {"learning_rate": 0.01},
        },
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data"))


def tiny(*overrides: str, **changes) -> config.Recipe:
    return config.parse_recipe(copy.deepcopy({**TINY, **changes}), overrides)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(), data, out)
    return out


def test_the_inverse_of_stage_one_teaches_stage_two(finished):
    network = of(last(finished, "1-invertible"), "encoder.")
    kept = of(last(finished, "2-quality"), "decoder.network.")
    assert network.keys() == kept.keys() and len(network) > 50
    assert all(torch.equal(network[key], kept[key]) for key in network)  # as it came, after two steps
    first, second = (
        load_model(finished / "stages" / stage / "step-00000002")[1]
        for stage in ("1-invertible", "2-quality")
    )
    assert first["architecture"]["name"] == "irevnet" and first["embedding_size"] == 128
    assert second["architecture"] == {"name": "cifar_resnet18", "arguments": {"width": 4}}


def test_the_model_at_the_end_is_the_classifier_alone(finished):
    encoder, card = load_model(finished)
    assert card["architecture"]["name"] == "cifar_resnet18" and card["training"]["stage"] == "quality"
    state = of(last(finished, "2-quality"), "encoder.")
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    decoder = load_decoder(finished / "model.safetensors", card, encoder)
    with torch.no_grad():
        assert decoder(encoder.features(torch.rand(2, 3, 32, 32))).shape == (2, 3, 32, 32)


def test_a_run_that_was_stopped_between_the_stages_comes_to_the_same_bits(
    finished, data, tmp_path, monkeypatch
):
    fit = recipes.Trainer.fit

    def only_the_first(self, stage):
        if stage.name == "quality":
            raise LrfaceError("the power is gone")
        return fit(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.Trainer, "fit", only_the_first)
        with pytest.raises(LrfaceError, match="power"):
            run(tiny(), data, tmp_path / "run")
    said = run(tiny(), data, tmp_path / "run")
    assert "stage invertible: complete (2 steps)" in said
    whole, stopped = last(finished, "2-quality"), last(tmp_path / "run", "2-quality")
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


@pytest.mark.parametrize(
    "quality", ["l2", "likelihood", {"name": "adversarial", "width": 4, "depth": 2}], ids=str
)
def test_other_quality_losses_in_training_and_after_a_stop(quality, data, tmp_path):
    """Their own networks and optimisers, too, go on where they were."""
    recipe = tiny()
    recipe.stages[1].method.arguments["quality"] = quality
    run(copy.deepcopy(recipe), data, tmp_path / "whole")
    half = copy.deepcopy(recipe)
    half.stages[1].steps = 1
    run(half, data, tmp_path / "stopped")
    recipe.out = str(tmp_path / "stopped")
    run_recipe(recipe, data=data, show_progress=False, accept_changes=True)
    whole, stopped = last(tmp_path / "whole", "2-quality"), last(tmp_path / "stopped", "2-quality")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert any(key.startswith("quality_loss.") for key in whole) is (quality != "l2")


def test_an_inverse_from_a_model_on_disk(finished, data, tmp_path):
    """One i-RevNet for many classifiers: no further training of it is needed (paper 000, appendix A)."""
    stage = {
        **TINY["stages"][1],
        "load": [{"path": str(finished / "stages" / "1-invertible"), "to": "decoder.network"}],
    }
    said = run(tiny(stages=[stage]), data, tmp_path / "run")
    assert any("decoder.network comes from" in line for line in said)
    kept = of(last(tmp_path / "run", "1-quality"), "decoder.network.")
    network = of(last(finished, "1-invertible"), "encoder.")
    assert all(torch.equal(network[key], kept[key]) for key in network)
    stage["load"] = [{"path": str(finished), "to": "decoder.network"}]
    with pytest.raises(LrfaceError, match="load .*cifar_resnet18.* is of another architecture"):
        run(tiny(stages=[stage]), data, tmp_path / "other")


def test_the_starred_version_starts_from_a_classifier_trained_clean(data, tmp_path, monkeypatch):
    """Against the same frozen inverse, which goes along (paper 001, section 4.1, footnote 2)."""
    starts = {}
    fit = recipes.Trainer.fit

    def spy(self, stage):
        starts[stage.name] = copy.deepcopy(stage.method.state_dict())
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    first, second = TINY["stages"]
    clean = {**second, "name": "clean", "degrade": "clean"}
    tuned = {**second, "name": "tuned", "load": ["encoder", "head", "decoder"]}
    run(tiny(stages=[first, clean, tuned]), data, tmp_path / "run")
    taught = last(tmp_path / "run", "2-clean")
    assert all(torch.equal(starts["tuned"][key], taught[key]) for key in taught)
    moved = [key for key in taught if not torch.equal(starts["clean"][key], taught[key])]
    assert any(key.startswith("encoder.") for key in moved) and any("connector" in key for key in moved)
    assert not any(key.startswith("decoder.network.") for key in moved)


def test_start_from_such_a_classifier_on_disk(finished, data, tmp_path, monkeypatch):
    def spy(self, stage):
        model, _ = load_model(finished)
        own = stage.method.encoder.state_dict()
        assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
        raise LrfaceError("seen enough")

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    stage = {
        **TINY["stages"][1],
        "load": [{"path": str(finished / "stages" / "1-invertible"), "to": "decoder.network"}],
    }
    with pytest.raises(LrfaceError, match="seen enough"):
        run(tiny(f"start_from={finished}", stages=[stage]), data, tmp_path / "run")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["decoder.network.input_size=64"],
            "draws images of 64 x 64 pixels, the classifier takes 32 x 32; choose an i-RevNet for 32 pixels",
        ),
        (
            ["stages.0.backbone.input_size=64"],
            r"stages.1: its backbone takes images of 32 x 32 pixels, that of stage 'invertible' 64 x 64",
        ),
        (
            ["stages.0.backbone.blocks=[1, 2, 1]"],
            "stages.1.load: decoder.network: encoder of stage 'invertible' is of another architecture: .*not of this",
        ),
        (
            ["stages.1.load=[decoder]"],
            r"stages.1.load: stage 'invertible' \(method classify\) has no decoder",
        ),
        (
            ["stages.1.load=[{from: encoder, to: decoder.net}]"],
            r"stages.1.load: stage 'quality' \(method qualnet\) has no decoder.net",
        ),
        (
            ["stages.1.load=[{from: encode, to: decoder}]"],
            r"stage 'invertible' \(method classify\) has no encode \(did you mean 'encoder'\?\); it has encoder, head",
        ),
        (
            ["stages.1.load=[{path: nowhere, to: decodr.network}]"],
            r"\(method qualnet\) has no decodr.network \(did you mean 'decoder'\?\); it has encoder, head, decoder",
        ),
        (
            ["stages.1.load=[]"],
            r"stages.1.load lacks decoder.network, .*add \{from: encoder, to: decoder.network\}",
        ),
        (["stages.1.load=[encoder]"], "stages.1.load: encoder: encoder of stage 'invertible' is of another"),
        (["decoder.in_size=8"], "decoder.in_size follows from the rest of the recipe"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_stage(overrides, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    with pytest.raises(UsageError, match=message):
        run(tiny(*overrides), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "load, message",
    [
        (
            "[{from: encoder}]",
            r"stages.1.load.0 must be a part, or a mapping such as \{from: encoder, to: dec",
        ),
        ("[{from: encoder, path: x}]", "stages.1.load.0 must be a part, or a mapping"),
        ("[{from: encoder, to: 3}]", "stages.1.load.0 takes names; found 3"),
    ],
)
def test_a_wrong_load(load, message):
    with pytest.raises(UsageError, match=message):
        tiny(f"stages.1.load={load}")


def test_the_first_stage_loads_from_models_on_disk_only():
    with pytest.raises(UsageError, match="stages.0.load: the first stage has none before it"):
        tiny(stages=[TINY["stages"][1]])


def test_the_shipped_recipe():
    recipe = load_recipe("cifar10/qualnet")
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    assert [type(method).__name__ for method in methods] == ["Classify", "QualNet"]
    assert methods[1].quality_weight == 0.1 and methods[1].clip and methods[1].frozen == ()
    assert methods[1].policy.clean_share == 0.5 and len(methods[1].policy.names) == 15
    assert config.parse_recipe(config.to_plain(recipe)) == recipe
    smaller = load_recipe(
        "cifar10/qualnet", ["decoder.network.blocks=[1, 1, 1]"]
    )  # said once, for both stages
    assert smaller.stages[0].backbone.arguments["blocks"] == [1, 1, 1]


def test_the_shipped_recipe_of_the_starred_version():
    recipe = load_recipe("cifar10/qualnet_finetuned")
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    assert [type(method).__name__ for method in methods] == ["Classify", "QualNet", "QualNet"]
    shares = [getattr(method.policy, "clean_share", None) for method in methods]
    assert shares == [None, None, 0.5]  # the first two see clean images only
    assert recipe.stages[1].load == [LOAD] and recipe.stages[2].load == ["encoder", "head", "decoder"]


def test_faces_of_stage_one_by_an_irevnet_with_a_margin(tmp_path):
    """The shipped recipe, two steps a stage: 112 pixels end at 7 x 7, CosFace on either network."""
    for number in range(8):
        folder = tmp_path / "faces" / f"person {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((112, 112)).save(folder / f"{number}.png")
    steps = [f"stages.{stage}.{key}" for stage in (0, 1) for key in ("epochs=null", "steps=2")]
    warm = [f"stages.{stage}.schedule.warmup_steps=0" for stage in (0, 1)]
    plain = ["data.path=faces", "data.batch_size=4", "trainer.compile=false", "trainer.device=cpu"]
    plain += ["trainer.tensorboard=false", "trainer.sheet_every=0", "trainer.threads=1"]
    recipe = load_recipe("celeba300/qualnet_irevnet", [*steps, *warm, *plain])
    first, second = (build_method(recipe, stage, 4) for stage in recipe.stages)
    assert (first.encoder.feature_size, first.encoder.feature_channels) == (7, 768)
    assert first.head.weight.shape == (4, 768) and second.head.weight.shape == (4, 128)
    assert second.quality_weight == 0.1 and second.clip and second.frozen == ()
    run(recipe, tmp_path, tmp_path / "run")
    network = of(last(tmp_path / "run", "1-invertible"), "encoder.")
    kept = of(last(tmp_path / "run", "2-resolution-agnostic"), "decoder.network.")
    assert network.keys() == kept.keys()
    assert all(torch.equal(network[key], kept[key]) for key in network)
    encoder, card = load_model(tmp_path / "run")
    assert card["architecture"]["name"] == "ir18" and card["embedding_size"] == 128
    decoder = load_decoder(tmp_path / "run" / "model.safetensors", card, encoder)
    with torch.no_grad():
        assert decoder(encoder.features(torch.rand(2, 3, 112, 112))).shape == (2, 3, 112, 112)


def test_a_check_sees_whether_stages_fit(tmp_path):
    """Before any data is there."""
    arguments = ["train", "cifar10/qualnet", "--check"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for override, message in (
        (
            "stages.0.backbone={name: irevnet_cifar}",
            "stages.1.load: decoder.network: encoder of stage 'invertible' is of",
        ),
        (
            "decoder.network={name: irevnet_face}",
            "draws images of 112 x 112 pixels, the classifier takes 32 x 32; choose",
        ),
    ):
        done = CliRunner().invoke(app, [*arguments, override])
        assert done.exit_code == 2 and message in done.stderr
