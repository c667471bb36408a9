"""The recipes of MNIST on real handwritten digits (scikit-learn's) in MNIST's files, and what is measured of them."""

import pytest
from digits import write_mnist

from lrface import recipes
from lrface.perturbation import GeneratorSettings, run_perturbation
from lrface.robustness import run_robustness


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    return write_mnist(root, 600, 100)


def train(place, name, steps, seed=0):
    overrides = [f"out={place / name}", f"seed={seed}", "data.batch_size=32", "trainer.device=cpu"]
    overrides += ["trainer.threads=1", "trainer.tensorboard=false"]
    for stage, count in enumerate(steps):
        overrides += [f"stages.{stage}.epochs=null", f"stages.{stage}.steps={count}"]
        overrides += [f"stages.{stage}.schedule.warmup_steps=0"]
    recipe = recipes.load_recipe(f"mnist/{name}", overrides)
    return recipes.run_recipe(recipe, data=place, show_progress=False)


def test_the_clean_network_reads_digits_and_is_judged_on_mnist_c(place):
    train(place, "clean", [40])
    run = run_robustness(
        [str(place / "clean")],
        "mnist_c",
        place / "mnist" / "test",
        corruptions=["shot_noise", "fog"],
        show_progress=False,
        device="cpu",
    )
    result = run.results[0]
    assert run.about["images"] == 100 and result["clean_error"] < 20
    assert result["mean_error"] > result["clean_error"]


@pytest.mark.parametrize("name", ["gaussian_noise", "ant1x1"])
def test_noise_training_on_grey_images(place, name):
    summary = train(place, name, [40, 6])
    assert [stage["steps"] for stage in summary.stages] == [40, 6]
    run = run_perturbation(
        [str(place / name)],
        place / "mnist" / "test",
        count=30,
        generators=1,
        generator=GeneratorSettings(steps=5, batch_size=16),
        show_progress=False,
        device="cpu",
    )
    assert run.about["channels"] == 1 and run.about["size"] == 28
    assert run.results[0]["clean_accuracy"] > 40
    assert list(run.results[0]["noises"]) == ["gaussian", "uniform", "adversarial"]


def test_the_papers_size_is_that_of_its_images(place):
    recipe = recipes.load_recipe("mnist/ant1x1")
    method = recipes.build_method(recipe, recipe.stages[1], 10)
    assert method.epsilon == 10 and method.generator.channels == 1
