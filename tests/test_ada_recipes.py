"""AdA as a recipe: a corruption network trained on the images themselves, then the classifier that it attacks."""

import copy
from pathlib import Path

import pytest
import torch
from small_runs import TRAINER, draw_pictures, last, of, run

from lrface import config, load_embedder, recipes
from lrface.errors import LrfaceError, UsageError
from lrface.recipes import build_method, check_loads, load_recipe, stage_settings
from lrface.train.checkpoint import load_model
from lrface.train.trainer import Trainer

NETWORK = {"name": "edsr", "blocks": 1, "features": 4, "scale": 2}
LOAD = {"from": "encoder", "to": "corruption_network"}
TINY = {
    "name": "tiny",
    "data": {"path": "pictures", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 4},
    "head": "softmax",
    "trainer": {**TRAINER, "checkpoint_every": 2},
    "stages": [
        {
            "name": "network",
            "method": "restore",
            "backbone": NETWORK,
            "degrade": "clean",
            "steps": 30,
            "optimiser": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.0},
        },
        {
            "name": "ada",
            "method": {"name": "ada", "network": NETWORK, "steps": 2, "radius": 0.03},
            "load": [LOAD],
            "degrade": {"name": "augmix", "crop_padding": 4},
            "steps": 4,
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


def test_the_network_of_stage_one_attacks_in_stage_two_and_stays(finished):
    network = of(last(finished, "1-network", 30), "encoder.")
    kept = of(last(finished, "2-ada", 4), "corruption_network.")
    assert network.keys() == kept.keys() and len(network) == 12
    assert all(torch.equal(network[key], kept[key]) for key in network)
    _, first = load_model(finished / "stages" / "1-network")
    assert first["architecture"] == {"name": "edsr", "arguments": {"blocks": 1, "features": 4, "scale": 2}}
    _, card = load_model(finished)
    assert card["architecture"]["name"] == "cifar_resnet18" and card["training"]["method"] == "ada"


def test_a_network_from_a_run_of_its_own(finished, data, tmp_path):
    run(tiny(stages=TINY["stages"][:1]), data, tmp_path / "network")
    load = [{"path": str(tmp_path / "network"), "to": "corruption_network"}]
    said = run(tiny(stages=[{**TINY["stages"][1], "load": load}]), data, tmp_path / "run")
    assert any("corruption_network comes from" in line for line in said)
    alone, together = (
        of(last(path, stage, 4), "corruption_network.")
        for path, stage in ((tmp_path / "run", "1-ada"), (finished, "2-ada"))
    )
    assert all(torch.equal(alone[key], value) for key, value in together.items())


@pytest.mark.parametrize("consistency", [0.0, 12.0])
def test_a_run_that_was_stopped_comes_to_the_same_bits(consistency, finished, data, tmp_path):
    override = f"stages.ada.method.consistency={consistency}"
    whole = finished
    if consistency:
        whole = tmp_path / "whole"
        run(tiny(override), data, whole)
    half = tiny(override)
    half.stages[1].steps = 2
    run(half, data, tmp_path / "stopped")
    run(tiny(override), data, tmp_path / "stopped", accept_changes=True)
    one, other = last(whole, "2-ada", 4), last(tmp_path / "stopped", "2-ada", 4)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_batch_in_parts_sees_the_attacks_of_the_whole(data, tmp_path):
    """The attack is on the whole batch, before it is split: only BatchNorm counts by parts."""
    run(tiny("stages.ada.accumulate=2", "stages.ada.steps=2"), data, tmp_path / "run")
    recipe = tiny()
    method = build_method(recipe, recipe.stages[1], 4)
    assert method.accumulable
    torch.manual_seed(0)
    images = (torch.rand(8, 3, 32, 32) * 255).to(torch.uint8)
    ready = method.train().prepare({"image": images, "label": torch.arange(8) % 4, "seed": 3})
    from lrface.train.step import split_batch

    parts = split_batch(ready, 8, 2)
    assert all(len(part[key]) == 4 for part in parts for key in ("image", "hq", "similarity", "start"))
    assert torch.equal(torch.cat([part["image"] for part in parts]), ready["image"])


def test_fsdp_is_refused(data, tmp_path):
    recipe = tiny()
    method = build_method(recipe, recipe.stages[1], 4)
    trainer = Trainer(device="cpu", precision="float32", tensorboard=False, show_progress=False)
    trainer.spread.fsdp = True
    optimiser, schedule = stage_settings(recipe.stages[1])
    stage = recipes.Stage(
        "ada", method, 1, 8, lambda first, last: iter(()), tmp_path, {}, optimiser, schedule
    )
    with pytest.raises(
        UsageError, match="stage 'ada': method AdA computes with whole weights .*strategy=ddp"
    ):
        trainer.ready(stage)


def test_a_network_that_draws_embeds_nothing(finished):
    with pytest.raises(LrfaceError, match="is edsr, a corruption network: it draws images and embeds none"):
        load_embedder(finished / "stages" / "1-network")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["stages.ada.load=[]"],
            "stages.1.load lacks corruption_network, which knows nothing with fresh weights",
        ),
        (
            ["stages.ada.method.network={name: edsr, blocks: 1, features: 6, scale: 2}"],
            "stages.1.load: corruption_network: encoder of stage 'network' is of another architecture",
        ),
        (
            ["stages.network.method=classify"],
            "the method restore trains a corruption network, the others a backbone",
        ),
        (
            ["stages.ada.method=restore"],
            "the method restore trains a corruption network, the others a backbone",
        ),
        (
            ["validate={every: 2, identities: 2, sizes: [32], pairs: 20}"],
            "validate compares embeddings, and stage 'network' trains a network that draws images",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_stage(overrides, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    with pytest.raises(UsageError, match=message):
        run(tiny(*overrides), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["cifar10/ada", "cifar10/ada_augmix", "celeba300/ada", "celeba300/ada_resolution", "cifar10_r50/ada"],
)
def test_the_shipped_recipes_fit_together(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    assert [type(method).__name__ for method in methods] == ["Restore", "AdA"]
    assert methods[1].attack.radius == 0.015 and methods[1].similarity == 0.3


def test_the_recipes_of_the_paper():
    """Appendix A: the schedule, the networks, the attack."""
    for name in ("nominal", "augmix", "ada", "ada_augmix"):
        recipe = load_recipe(f"cifar10_r50/{name}")
        stage = recipe.stages[-1]
        assert recipe.backbone == config.Named("preact_resnet50") and recipe.data.batch_size == 256
        assert stage.epochs == 300 and stage.schedule.kind == "cosine" and stage.schedule.warmup_epochs == 5
        optimiser = stage.optimiser
        assert (optimiser.name, optimiser.learning_rate, optimiser.nesterov) == ("sgd", 0.1, True)
        assert optimiser.weight_decay == 1e-4 and optimiser.decay_norms
        assert stage.degrade.arguments["crop_padding"] == 4 and stage.degrade.arguments["mirror"] == 0.5
        if "ada" in name:
            with torch.device("meta"):
                method = build_method(recipe, stage, 10)
            assert (method.attack.steps, method.attack.step_size) == (10, 0.25)
            assert method.consistency == 0.0
            assert sum(value.numel() for value in method.corruption_network.parameters()) == 1_517_571
