import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface.attack_trials import (
    ATTACKS,
    AttackKind,
    Task,
    Trial,
    distance,
    multitargeted,
    parse_trials,
    register_attack,
    run_trials,
    within,
)
from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_network
from lrface.train.checkpoint import make_card, save_model

CLASSES = 6
MODULE = """
import torch

class Linear(torch.nn.Module):
    "Scores that are linear in the images: how far the next class is can be written down."
    def __init__(self):
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 3 * 32 * 32, generator=draws) / 40)
    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.weight.T

def linear(): return Linear()
def few(): return lambda images: Linear()(images)[:, :3]
"""


def weight() -> torch.Tensor:
    return torch.randn(CLASSES, 3 * 32 * 32, generator=torch.Generator().manual_seed(0)) / 40


def margins(images: np.ndarray, labels: np.ndarray, norm: str) -> np.ndarray:
    """How far each image is from the nearest other class in the norm, 0 for a wrong one: float [n]."""
    scores = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5).flatten(
        1
    ).double() @ weight().double().T
    rows = torch.arange(len(images))
    label = torch.from_numpy(labels)
    apart = weight().double()[label][:, None] - weight().double()[None]
    length = apart.abs().sum(2) if norm == "linf" else apart.norm(dim=2)
    found = (scores[rows, label][:, None] - scores) / length.clamp_min(1e-9)
    found[rows, label] = float("inf")
    return found.amin(1).clamp_min(0).numpy()


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "linear_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    # Greyish, so that no bound of [0, 1] is in the way.
    images = rng.integers(100, 156, (40, 32, 32, 3), dtype=np.uint8)
    scores = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5).flatten(1) @ weight().T
    labels = scores.argmax(1).numpy()
    labels[:4] = (labels[:4] + 1) % CLASSES
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    torch.manual_seed(1)
    arguments = {"blocks": 1, "features": 4, "scale": 2}
    network = build_network("edsr", **arguments)
    save_model(tmp_path / "edsr", network, make_card({"name": "edsr", "arguments": arguments}, network, {}))
    return images, labels


def run(*trials, **options):
    listed = [trial for text in trials for trial in parse_trials(text)]
    return run_trials(
        ["linear_models:linear"],
        "images.npz",
        listed,
        show_progress=False,
        device="cpu",
        batch_size=16,
        **options,
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_multitargeted_finds_what_there_is_for_a_linear_classifier(place, norm):
    far = margins(*place, norm)
    sizes = np.quantile(far[far > 0], [0.3, 0.6, 0.9])
    text = f"multitargeted:{norm}=" + ",".join(f"{size:.6f}" for size in sizes)
    result = run(text, steps=20, restarts=1).results[0]
    assert result["clean_accuracy"] == 90.0
    for size, row in zip(sizes, result["attacks"], strict=True):
        # Between what is certainly lost and certainly kept: ascent ends within a hundredth of the boundary.
        low, high = 100 * (far > size * 1.01).mean(), 100 * (far > size * 0.97).mean()
        assert low <= row["accuracy"] <= high and row["norm"] == norm
        assert row["lost"]["multitargeted"] == round((90 - row["accuracy"]) * 0.4)
    accuracies = [row["accuracy"] for row in result["attacks"]]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]


def test_images_stay_within_their_distance():
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 8, 8, generator=draws)
    layer = torch.randn(4, 192, generator=draws)
    for norm in ("linf", "l2"):
        task = Task(
            lambda x: x.flatten(1) @ layer.T, images, torch.zeros(5, dtype=torch.long), norm, 0.05, 3, 12, 1
        )
        found = multitargeted(task)
        assert float(distance(images, found, norm).max()) <= 0.05 + 1e-6
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        assert torch.equal(found, multitargeted(task))
        far = within(images, images + 10, norm, 0.2)
        assert float(distance(images, far, norm).max()) <= 0.2 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_by_its_package(place, norm):
    pytest.importorskip("pyautoattack", reason="pip install 'lrface[attack]'")
    far = margins(*place, norm)
    size = float(np.quantile(far[far > 0], 0.5))
    result = run(f"autoattack+multitargeted:{norm}={size}", steps=10, restarts=1, count=None).results[0][
        "attacks"
    ][0]
    low, high = 100 * (far > size * 1.03).mean(), 100 * (far > size * 0.97).mean()
    assert low <= result["accuracy"] <= high and result["attack"] == "autoattack+multitargeted"
    # What the first attack of a trial took, the second was not asked about.
    assert result["lost"]["autoattack"] >= 0.9 * sum(result["lost"].values()) > 0


AUTHORS = """
import pyautoattack

class AutoAttack:
    "The authors' signatures, around the same attacks of the other package."
    def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=[], version="standard",
                 is_tf_model=False, device="cuda", log_path=None):
        self.kept = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device=device)
        self.kept.verbose = verbose
    def __getattr__(self, name):
        return getattr(self.__dict__["kept"], name)
    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        return self.kept.run_standard_evaluation(x_orig, y_orig, batch_size=bs)[0]
"""


def test_the_authors_own_package_is_taken_where_it_is_there(place, monkeypatch):
    pytest.importorskip("pyautoattack", reason="pip install 'lrface[attack]'")
    far = margins(*place, "linf")
    size = float(np.quantile(far[far > 0], 0.5))
    text = f"autoattack:linf={size}"
    other = run(text, steps=4, count=12).results
    (Path.cwd() / "autoattack").mkdir()
    (Path.cwd() / "autoattack/__init__.py").write_text(AUTHORS)
    monkeypatch.syspath_prepend(Path.cwd())
    try:
        assert run(text, steps=4, count=12).results == other
        assert "autoattack" in sys.modules
    finally:
        sys.modules.pop("autoattack", None)


def test_autoattack_needs_its_package(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(
        LrfaceError, match=r"needs the package of that name or pyautoattack.*lrface\[attack\]"
    ):
        run("autoattack=0.01")


def test_autoattack_needs_four_classes(place):
    pytest.importorskip("pyautoattack", reason="pip install 'lrface[attack]'")
    with pytest.raises(UsageError, match="found 3 classes"):
        run_trials(["linear_models:few"], "few.npz", parse_trials("autoattack=0.01"), **few(place))


def few(place):
    images, labels = place
    scores = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5).flatten(1) @ weight()[:3].T
    np.savez("few.npz", images=images, labels=scores.argmax(1).numpy())
    return {"show_progress": False, "device": "cpu"}


def test_ada_goes_as_far_as_its_radius(place):
    result = run("ada=0.001,0.3", network="edsr", steps=3).results[0]["attacks"]
    assert [row["norm"] for row in result] == ["weights", "weights"]
    assert result[0]["accuracy"] >= result[1]["accuracy"] and result[1]["lost"]["ada"] > 0
    with pytest.raises(UsageError, match="the attack ada needs a corruption network: --network RUN"):
        run("ada=0.01")


def test_what_lies_too_far_away_or_outside_of_the_image_does_not_count(place):
    kinds = {
        "far": lambda task: 1 - task.images,
        "outside": lambda task: task.images - 2 * (task.images - 0.5) - 5,
        "nothing": lambda task: task.images,
        "undefined": lambda task: task.images * float("nan"),
    }
    try:
        for name, attack in kinds.items():
            register_attack(name, AttackKind(attack, ("linf", "l2"), name))
        for name in kinds:
            row = run(f"{name}=0.01").results[0]["attacks"][0]
            assert row["accuracy"] == 90.0 and row["lost"] == {name: 0}
        assert run("far=1").results[0]["attacks"][0]["accuracy"] < 10
        with pytest.raises(ValueError, match="attack 'far' is registered twice"):
            register_attack("far", ATTACKS["far"])
    finally:
        for name in kinds:
            ATTACKS.pop(name, None)


def test_trials_as_they_are_written():
    assert parse_trials("autoattack+multitargeted:l2=0.5,1") == [
        Trial(("autoattack", "multitargeted"), "l2", 0.5),
        Trial(("autoattack", "multitargeted"), "l2", 1.0),
    ]
    assert parse_trials("ada=0.015") == [Trial(("ada",), "weights", 0.015)]
    assert parse_trials("multitargeted=8/255")[0].size == pytest.approx(8 / 255)
    for text, said in (
        ("multitarget=1", "unknown attack 'multitarget' .did you mean 'multitargeted'"),
        ("ada:l2=1", "ada knows weights; found 'l2'"),
        ("multitargeted", "say how far it may go"),
        ("multitargeted=0", "say how far it may go"),
        ("multitargeted=1/0", "say how far it may go"),
        ("multitargeted=a", "say how far it may go"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_trials(text)


def test_the_command(place):
    arguments = [
        "attack",
        "linear_models:linear",
        "--images",
        "images.npz",
        "--attack",
        "multitargeted:linf=1/255",
    ]
    arguments += [
        "--attack",
        "ada=0.01",
        "--network",
        "edsr",
        "--steps",
        "2",
        "--restarts",
        "1",
        "--count",
        "12",
    ]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 12 and [row["attack"] for row in found["results"][0]["attacks"]] == [
        "multitargeted",
        "ada",
    ]
    again = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert "multitargeted linf 0.003922" in again.stdout
