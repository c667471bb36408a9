import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface.benchmarks.perturbation import lengths, median_size, size_figures, smallest_gamma
from lrface.cli import app
from lrface.errors import UsageError
from lrface.perturbation import (
    GeneratorSettings,
    open_judge,
    read_labelled,
    run_perturbation,
    sampler,
    smallest_sizes,
    train_generator,
)

MODULE = """
import torch

class Brightness:
    "Two classes: dark and bright; and a third that is never the answer. input_size 32."
    def __call__(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5, torch.full_like(mean, -9.0)], dim=1) * 20

class Red:
    "Two classes by the mean of the red channel alone: noise in the others does nothing."
    def __call__(self, images):
        mean = images[:, 0].mean(dim=(1, 2))
        return torch.stack([0.5 - mean, mean - 0.5, torch.full_like(mean, -9.0)], dim=1) * 20

def brightness(): return Brightness()
def red(): return Red()
def stone(): return lambda images: torch.eye(3)[[0]].repeat(len(images), 1)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "brightness_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    levels = np.where(labels == 1, 150, 105)[:, None, None, None] + rng.integers(-20, 20, (40, 32, 32, 3))
    np.savez(tmp_path / "clean.npz", images=levels.astype(np.uint8), labels=np.append(labels[:-1], 0))
    return tmp_path


def test_the_line_search_finds_the_first_place_where_the_classifier_errs():
    torch.manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(6, 3, 4, 4)
    direction = torch.randn(6, 3, 4, 4)
    limits = torch.tensor([0.05, 0.1, 0.3, 2.0, 0.0, 1e9])  # of the perturbed image's distance
    limits[4] = -1.0

    def wrong(perturbed, rows):
        return (perturbed - images[rows]).flatten(1).norm(dim=1) > limits[rows]

    gamma, noise = smallest_gamma(wrong, images, 7.0 * direction)
    assert torch.allclose(noise.flatten(1).square().mean(1), torch.ones(6))
    sizes = lengths(images, noise, gamma)
    for size, limit in zip(sizes[:4].tolist(), limits[:4].tolist(), strict=True):
        assert limit < size <= limit * 1.002
    assert gamma[4] == 0 and sizes[4] == 0
    assert math.isinf(gamma[5]) and math.isinf(sizes[5])

    # Wrong in a band only: the search begins at the image and ends where the band does.
    def band(perturbed, rows):
        length = (perturbed - images[rows]).flatten(1).norm(dim=1)
        return ((length > 0.5) & (length < 0.9)) | (length > 1.8)

    banded = lengths(images, *reversed(smallest_gamma(band, images, direction)))
    assert bool(((banded > 0.5) & (banded < 0.502)).all())


def test_medians_count_infinity_and_images_that_are_wrong_from_the_start():
    inf = math.inf
    assert median_size(np.array([0.0, 3.0, 1.0])) == 1.0
    assert median_size(np.array([0.0, 3.0, 1.0, 2.0])) == 1.5
    assert median_size(np.array([inf, 3.0, inf])) == inf and median_size(np.array([1.0, inf])) == inf
    figures = size_figures([np.array([0.0, 2.0, 4.0]), np.array([0.0, 6.0, 8.0])], 4)
    assert figures["median"] == 4.0 and figures["deviation"] == pytest.approx(
        np.std([2, 6], ddof=1), abs=1e-4
    )
    assert figures["medians"] == [2.0, 6.0] and figures["median_of_correct"] == 5.0 and figures["rms"] == 2.0
    figures = size_figures([np.array([inf, inf, 4.0]), np.array([1.0, 6.0, 8.0])], 4)
    assert figures["median"] is None and figures["deviation"] is None and figures["unreached"] == 0.3333


def run(model, images="clean.npz", **options):
    return run_perturbation([model], images, device="cpu", show_progress=False, **options)


def test_sizes_do_not_depend_on_the_batch_and_are_those_of_a_plain_search(place):
    images = read_labelled("clean.npz", show_progress=False)
    judge = open_judge("brightness_models:red", images, "cpu")
    draw = sampler("gaussian", 5)
    found = smallest_sizes(judge, images, draw, 7)
    assert np.array_equal(found.size, smallest_sizes(judge, images, draw, 40).size)
    assert found.size[-1] == 0 and (found.size[:-1] > 0).all()
    # One image by hand: the first of 4,000 lengths at which it is wrong.
    clean = images.float(slice(3, 4))
    noise = draw(clean, 3)
    noise = noise / noise.square().mean().sqrt()
    for gamma in torch.linspace(0, 40, 4000).tolist():
        moved = (clean + gamma * noise).clamp(0, 1)
        if bool(judge.wrong(moved, torch.tensor([3]))):
            break
    else:
        moved = clean + math.inf
    assert found.size[3] == pytest.approx(float((moved - clean).norm()), rel=0.02)


def test_adversarial_noise_is_stronger_where_there_is_something_to_learn(place):
    settings = GeneratorSettings(steps=60, learning_rate=1e-2, batch_size=16)
    images = np.load("clean.npz")["images"][::2]  # the dark ones, and one that is not
    np.savez("dark.npz", images=np.append(images, [255 - images[0]], 0), labels=[0] * len(images) + [1])
    found = run("brightness_models:red", "dark.npz", generators=2, generator=settings).to_json()
    noises = found["results"][0]["noises"]
    assert found["results"][0]["clean_accuracy"] == 100
    assert list(noises) == ["gaussian", "uniform", "adversarial"]
    # Moving the red channel alone, and all of its pixels one way, needs a fraction of what zero-mean noise needs.
    assert noises["adversarial"]["median"] < 0.5 * (noises["gaussian"]["median"] or math.inf)
    assert all(last > first for first, last in noises["adversarial"]["losses"])
    assert len(noises["adversarial"]["medians"]) == 2 and noises["adversarial"]["deviation"] is not None
    again = run("brightness_models:red", "dark.npz", generators=2, generator=settings).to_json()
    assert json.dumps(again) == json.dumps(found)


def test_the_classifier_stays_as_it_is_and_the_generator_learns(place):
    images = read_labelled("clean.npz", show_progress=False)
    judge = open_judge("brightness_models:red", images, "cpu")
    settings = GeneratorSettings(steps=3)
    generator, losses = train_generator(judge, images, settings, 5.0, seed=1)
    fresh, _ = train_generator(judge, images, GeneratorSettings(steps=1, learning_rate=1e-30), 5.0, seed=1)
    assert len(losses) == 3 and not torch.equal(generator.state(), fresh.state())
    assert torch.equal(generator.state(), train_generator(judge, images, settings, 5.0, seed=1)[0].state())


def test_what_is_infinite_is_said(place):
    result = CliRunner().invoke(
        app, "perturbation brightness_models:stone --images clean.npz --noise gaussian --device cpu".split()
    )
    assert result.exit_code == 0, result.output
    # Class 0 is always the answer: right for half of the images whatever the noise, wrong for the others from the start.
    line = next(line for line in result.stdout.splitlines() if "gaussian" in line)
    assert "52.5%" in line and " inf " in line


def test_wrong_usage_is_named(place):
    for model, options, message in (
        ("brightness_models:red", {"noises": ["gausian"]}, "unknown 'gausian'.*gaussian"),
        ("brightness_models:red", {"count": 0}, "--count: at least 1"),
        ("brightness_models:red", {"generators": 0}, "--generators: at least 1"),
        ("brightness_models:red", {"pictures": "clean.npz"}, "--pictures clean.npz: a folder is needed"),
        ("brightness_models:stone", {"noises": ["adversarial"]}, "gives no gradients"),
    ):
        with pytest.raises(UsageError, match=message):
            run(model, **options)
    with pytest.raises(UsageError, match="--generator: unknown 'noise2x2'"):
        GeneratorSettings(name="noise2x2")


def test_the_command_prints_one_object(place):
    arguments = (
        "perturbation brightness_models:red --images clean.npz --noise gaussian,uniform --count 20 --json"
    )
    result = CliRunner().invoke(app, [*arguments.split(), "--seeds", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 20 and len(found["results"][0]["noises"]["uniform"]["medians"]) == 2
