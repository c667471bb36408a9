import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lrface import recipes
from lrface.cli import app
from lrface.models.noise import NoiseGenerator
from lrface.noise_pictures import generators_of_run, grey_density, noise_picture


def test_the_density_of_gaussian_noise_is_the_normal_one():
    for channels, sigma in ((1, 1.0), (3, np.sqrt(0.299**2 + 0.587**2 + 0.114**2))):
        middles, density = grey_density(NoiseGenerator(channels), channels)  # a fresh one gives what goes in
        wanted = np.exp(-((middles / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
        assert np.abs(density - wanted).max() < 0.02
        assert density.sum() * (middles[1] - middles[0]) == pytest.approx(1, abs=1e-3)


def test_samples_are_around_grey():
    found = noise_picture(None, 3, 40)
    assert found.shape == (40, 40, 3) and abs(found.mean() - 127.5) < 2
    assert found.std() == pytest.approx(255 / 6, rel=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ant")
    (folder / "recipe.yaml").write_text("""
name: noise
data: {synthetic: {identities: 3, images_per_identity: 4}, batch_size: 6}
backbone: {name: cifar_resnet18, width: 4}
head: softmax
trainer: {device: cpu, sheet_every: 0, tensorboard: false, threads: 1}
stages:
  - name: noise
    method: {name: ant, restart_steps: 3, save_steps: 100, learning_rate: 0.1, generator: {name: noise3x3, depth: 3}}
    degrade: {name: clean}
    steps: 8
""")
    recipe = recipes.load_recipe(str(folder / "recipe.yaml"), [f"out={folder / 'run'}"])
    recipes.run_recipe(recipe, show_progress=False)
    return folder / "run"


def test_what_a_run_learned_is_drawn(trained, tmp_path):
    generators, facts = generators_of_run(trained)
    assert (
        list(generators)[-1] == "current" and facts["step"] == 8 and facts["kept"] == len(generators) - 1 > 1
    )
    kernels = {made.kernel for made in generators.values()}
    assert kernels == {3}
    states = [made.state() for made in generators.values()]
    assert not any((states[0] == other).all() for other in states[1:])
    result = CliRunner().invoke(app, ["noise", str(trained), "--out", str(tmp_path / "made"), "--json"])
    assert result.exit_code == 0, result.output
    for file in json.loads(result.stdout)["files"]:
        assert Image.open(file).size[0] > 400


def test_a_run_without_noise_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["noise", str(tmp_path), "--out", str(tmp_path / "made")])
    assert result.exit_code == 1 and "no run of `lrface train`" in result.output


def test_pictures_of_the_boundary(tmp_path, monkeypatch):
    (tmp_path / "red_models.py").write_text(
        "import torch\n"
        "def red():\n"
        "    def scores(images):\n"
        "        mean = images[:, 0].mean(dim=(1, 2))\n"
        "        return torch.stack([0.45 - mean, mean - 0.45], dim=1) * 20\n"
        "    return scores\n"
    )
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(60, 150, (12, 32, 32, 3)).astype(np.uint8)
    images[6:, :, :, 0] += 30
    np.savez(tmp_path / "clean.npz", images=images, labels=[0] * 6 + [1] * 6)
    arguments = (
        "perturbation red_models:red --images clean.npz --generators 1 --steps 5 --pictures made --device cpu"
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert {"densities-1.png", "noise-1.png"} <= set(made)
