"""The recipes of noise training: each builds with the paper's numbers, trains, and goes on to the same bits after a kill."""

from pathlib import Path

import pytest
import torch
from small_runs import killed_at
from test_classification_recipes import write_images

from lrface import recipes
from lrface.methods.ant import AdversarialNoise
from lrface.recipes import build_method, check_loads, load_recipe, run_recipe
from lrface.train.checkpoint import load_model, load_parts, load_training_state

CIFAR = ["speckle", "ant1x1", "ant3x3"]
SMALL = [
    "backbone.width=4",
    "data.batch_size=10",
    "stages.clean.steps=2",
    "stages.clean.epochs=null",
    "stages.clean.schedule.warmup_steps=1",
    "stages.noise.steps=8",
    "stages.noise.epochs=null",
    "stages.noise.schedule.milestone_epochs=[1]",
    "trainer.checkpoint_every=1",
    "trainer.keep_last=10",
    "trainer.log_every=1",
    "trainer.tensorboard=false",
    "trainer.device=cpu",
    "trainer.threads=1",
]
# Four steps an epoch: a generator lives for four steps, its successor learns in the last two of them.
ANT = ["stages.noise.method.restart_epochs=1", "stages.noise.method.save_steps=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "cifar10" / "train.parquet", 40)
    return root


def run(name: str, data: Path, out: Path, *overrides: str) -> recipes.RunSummary:
    more = ANT if name.startswith("ant") else []
    recipe = load_recipe(f"cifar10/{name}", [*SMALL, *more, f"out={out}", *overrides])
    return run_recipe(recipe, data=data, show_progress=False)


def last(run: Path, step: int = 8) -> tuple[dict[str, torch.Tensor], dict]:
    folder = run / "stages" / "2-noise" / f"step-{step:08d}"
    return load_parts(folder), load_training_state(folder).extra


@pytest.mark.parametrize("name", CIFAR)
def test_a_recipe_trains_and_a_killed_run_goes_on_to_the_same_bits(name, data, tmp_path, monkeypatch):
    """Killed in the middle of a restart, where the current generator waits and its successor learns."""
    run(name, data, tmp_path / "whole")
    with killed_at(7, monkeypatch):  # the stage "clean" has fewer
        run(name, data, tmp_path / "killed")
    summary = run(name, data, tmp_path / "killed")
    assert summary.stages[1]["resumed_at"] == 7
    whole, killed = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert whole[0].keys() == killed[0].keys()
    assert all(torch.equal(whole[0][key], killed[0][key]) for key in whole[0])
    if name.startswith("ant"):
        assert torch.equal(whole[1]["states"], killed[1]["states"]) and len(whole[1]["states"]) == 5
        assert not torch.equal(
            whole[0]["generator.convolutions.0.bias"], whole[0]["successor.convolutions.0.bias"]
        )
        before = last(tmp_path / "whole", 7)[0]
        assert torch.equal(before["generator.convolutions.0.bias"], whole[0]["generator.convolutions.0.bias"])
        assert "replay_states" in (tmp_path / "whole/stages/2-noise/metrics.csv").read_text().split("\n")[0]
    encoder, _ = load_model(tmp_path / "killed")
    state = whole[0]
    assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in encoder.state_dict().items())


def test_another_seed_is_another_run(data, tmp_path):
    first, second = (
        last(Path(run("ant1x1", data, tmp_path / str(seed), f"seed={seed}", "stages.noise.steps=1").out), 1)
        for seed in range(2)
    )
    for key in ("encoder.stem.0.weight", "generator.convolutions.0.bias"):
        assert not torch.equal(first[0][key], second[0][key])


@pytest.mark.parametrize("name", ["gaussian_noise", "gaussian_noise_set", "speckle"])
def test_noise_policies_of_the_recipes(name):
    recipe = load_recipe(f"cifar10/{name}")
    policy = build_method(recipe, recipe.stages[1], 10).policy
    assert policy.clean_share == 0.5 and policy.framing.padding == 4
    assert (
        policy.sigmas
        == {
            "gaussian_noise": (0.5,),
            "gaussian_noise_set": (0.08, 0.12, 0.18, 0.26, 0.38),
            "speckle": (0.15, 0.2, 0.35, 0.45, 0.6),
        }[name]
    )


@pytest.mark.parametrize(
    "name, epsilon, kernel",
    [
        ("cifar10/ant1x1", 135 * 32 / 224, 1),
        ("cifar10/ant3x3", 10.0, 3),
        ("imagenet/ant1x1_resnet50", 135.0, 1),
        ("imagenet/ant3x3_resnet50", 70.0, 3),
        ("celeba300/ant", 67.5, 1),
    ],
)
def test_adversarial_recipes_have_the_papers_numbers(name, epsilon, kernel):
    recipe = load_recipe(name)
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    method = methods[-1]
    assert isinstance(method, AdversarialNoise)
    assert method.epsilon == pytest.approx(epsilon) and method.generator.kernel == kernel
    assert (method.generator.width, method.generator.depth) == (20, 4)
    assert method.shares == (0.5, 0.0, 0.3)
    assert method.restart_epochs == (1 if name.startswith("celeba300") else 0.33)
    if name.startswith("imagenet"):
        stage = recipe.stages[0]
        assert method.learning_rate == 1e-4 and recipe.data.batch_size == 70 and stage.epochs == 80
        assert stage.optimiser.learning_rate == 0.001 and len(stage.schedule.milestone_epochs) == 1


def test_the_imagenet_recipe_of_gaussian_noise():
    recipe = load_recipe("imagenet/gaussian_noise_resnet50")
    policy = build_method(recipe, recipe.stages[0], 10).policy
    assert policy.sigmas == (0.5,) and recipe.stages[0].optimiser.learning_rate == 0.001


def test_faces_train_and_the_other_noises_too(data, tmp_path):
    """A margin head, faces of 112 pixels; and each policy of noise once."""
    synthetic = ["data.path=null", "data.synthetic.identities=4", "data.synthetic.images_per_identity=4"]
    small = [entry for entry in SMALL if "clean" not in entry] + [
        "trainer.compile=false",
        "trainer.sheet_every=0",
    ]
    steps = [
        "stages.vanilla.steps=1",
        "stages.vanilla.epochs=null",
        "stages.noise.steps=2",
        "data.batch_size=6",
    ]
    recipe = load_recipe("celeba300/ant", [*small, *synthetic, *steps, f"out={tmp_path / 'faces'}"])
    summary = run_recipe(recipe, show_progress=False)
    assert [stage["steps"] for stage in summary.stages] == [1, 2]
    assert load_model(tmp_path / "faces")[1]["input"]["size"] == 112
    for name in ("gaussian_noise", "gaussian_noise_set"):
        run(name, data, tmp_path / name, "stages.clean.steps=1", "stages.noise.steps=1")
        assert load_model(tmp_path / name)[1]["training"]["stage"] == "noise"
