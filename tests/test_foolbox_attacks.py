"""PGD and DDN on a network whose smallest perturbations are known: a linear one."""

import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface.attack_trials import parse_trials, run_trials
from lrface.cli import app

MODULE = """
import torch

class Linear:
    "Class 1 where the mean of the image is above 0.5: the nearest wrong image is a shift of all values alike."
    def __call__(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5, torch.full_like(mean, -9.0)], dim=1) * 30

def linear(): return Linear()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    pytest.importorskip("foolbox")
    (tmp_path / "level_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    levels = np.linspace(100, 155, 24)
    images = (levels[:, None, None, None] + rng.uniform(-9, 9, (24, 32, 32, 3))).round().astype(np.uint8)
    means = images.mean(axis=(1, 2, 3)) / 255
    labels = (means > 0.5).astype(np.int64)
    labels[0] = 1  # wrong when clean
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    return np.abs(means - 0.5)


def test_pgd_and_ddn_find_what_is_known(place):
    trials = [trial for text in ("ddn=1.5", "pgd:linf=0.05", "pgd:l2=1.5") for trial in parse_trials(text)]
    run = run_trials(
        ["level_models:linear"], "clean.npz", trials, device="cpu", steps=60, show_progress=False
    )
    ddn, linf, l2 = run.results[0]["attacks"]
    root = 3072**0.5
    far = place[1:]
    # A change of every value by d moves the mean by d and is d sqrt(3072) long; nothing shorter does.
    assert ddn["accuracy"] == l2["accuracy"] == pytest.approx(100 * (far > 1.5 / root).sum() / 24)
    assert linf["accuracy"] == pytest.approx(100 * (far > 0.05).sum() / 24)
    assert 10 < ddn["accuracy"] < 90 and 10 < linf["accuracy"] < 90
    assert ddn["median"] == pytest.approx(np.median([0, *(far * root)]), rel=0.02)
    assert run.results[0]["clean_accuracy"] == pytest.approx(100 * 23 / 24, abs=1e-3)
    assert "median distance that ddn needs" in run.to_text()


def test_without_foolbox_the_extra_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    result = CliRunner().invoke(app, ["attack", "level_models:linear", "--images", "clean.npz"])
    assert result.exit_code == 1 and "pip install 'lrface[attack]'" in result.output


def test_attacks_reach_a_run_of_lrface(place, tmp_path):
    import json

    from lrface.models import build_backbone
    from lrface.train.checkpoint import make_card, save_model

    torch.manual_seed(0)
    folder = tmp_path / "run" / "stages" / "1-clean" / "step-00000001"
    encoder = build_backbone("cifar_resnet18", width=4)
    card = make_card({"name": "cifar_resnet18", "arguments": {"width": 4}}, encoder, {})
    save_model(folder, encoder, card)
    from safetensors.torch import save_file

    save_file(
        {"head.linear.weight": torch.randn(3, 32), "head.linear.bias": torch.zeros(3)},
        folder / "parts.safetensors",
    )
    save_model(tmp_path / "run", encoder, card)
    arguments = "attack run --images clean.npz --attack pgd:linf=0.3 --steps 5 --json --device cpu --count 8"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"][0]
    assert found["attacks"][0]["accuracy"] <= found["clean_accuracy"]
