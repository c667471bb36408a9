import numpy as np
import pytest
import torch

from lrface.ada_figures import (
    Corrupted,
    corrupted_by_radius,
    draw_accuracy,
    draw_reconstruction,
    draw_similarity,
    kernel_density,
    reconstruct,
    reconstruct_corruptions,
    reconstruction_figures,
)
from lrface.attack_trials import TrialRun
from lrface.errors import UsageError
from lrface.losses.ssim import ssim
from lrface.models import build_network
from lrface.models.per_example import run_with
from lrface.perturbation import open_judge, read_labelled

MODULE = """
import torch

class Colours:
    "The logits are linear in the mean colour."
    def __call__(self, images):
        weight = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [1.0, 1.0, 1.0], [-2.0, 1.0, 1.0], [1.0, -2.0, 1.0]])
        return images.mean((2, 3)) @ weight.T

def colours(): return Colours()
"""


@pytest.fixture
def images(tmp_path, monkeypatch):
    (tmp_path / "colour_logits.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez("images.npz", images=small.repeat(4, 1).repeat(4, 2), labels=np.arange(12) % 6)
    return read_labelled("images.npz", show_progress=False)


def network():
    torch.manual_seed(0)
    return build_network("edsr", blocks=1, features=4, scale=2).eval().requires_grad_(False)


def is_picture(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5000


def test_larger_radii_change_more(images, tmp_path):
    judge = open_judge("colour_logits:colours", images, "cpu")
    found = corrupted_by_radius(
        judge, images, network(), (0.001, 0.05), steps=2, batch_size=5, show_progress=False
    )
    assert list(found) == [0.001, 0.05] and found[0.05].images.shape == (12, 3, 32, 32)
    clean = images.float(slice(0, 12))
    for each in found.values():
        np.testing.assert_allclose(each.similarity, ssim(clean, each.images).numpy(), atol=1e-5)
        np.testing.assert_array_equal(each.wrong, judge.wrong(each.images, torch.arange(12)).numpy())
    unperturbed = network()(clean)
    moved = [(found[radius].images - unperturbed).abs().mean() for radius in found]
    assert 0 < float(moved[0]) < float(moved[1])
    again = corrupted_by_radius(
        judge, images, network(), (0.05,), steps=2, batch_size=12, show_progress=False
    )
    torch.testing.assert_close(again[0.05].images, found[0.05].images, atol=1e-4, rtol=0)
    draw_similarity(tmp_path / "one.png", images, found, "AdA")
    assert is_picture(tmp_path / "one.png")


def test_a_density_has_an_area_of_one():
    rng = np.random.default_rng(0)
    places = np.linspace(-6, 6, 4001)
    density = kernel_density(rng.normal(size=500), places)
    assert float(np.trapezoid(density, places)) == pytest.approx(1, abs=1e-3)
    assert places[density.argmax()] == pytest.approx(0, abs=0.5)
    bounded = kernel_density(np.minimum(rng.normal(size=500), 1), places, highest=1)
    assert (
        float(np.trapezoid(bounded, places)) == pytest.approx(1, abs=2e-3) and not bounded[places > 1].any()
    )
    assert float(kernel_density(np.ones(3), np.array([1.0]))[0]) == pytest.approx(
        1 / (0.002 * np.sqrt(2 * np.pi))
    )


def test_reconstruction_is_adam_on_each_image_by_itself(images):
    """Against one image after another, with the formula written out."""
    own = network()
    clean = images.float(slice(0, 2))
    wanted = (clean * 0.6 + 0.1).clamp(0, 1)
    before, after = reconstruct(own, clean, wanted, steps=6)
    for row in range(2):
        weights = {name: value.clone().requires_grad_() for name, value in own.named_parameters()}
        start = {name: value.detach().clone() for name, value in weights.items()}
        adam = torch.optim.Adam(list(weights.values()), 1e-3)
        one, target = clean[row : row + 1], wanted[row : row + 1]
        first = float(ssim(run_with(own, weights, one), target).detach())
        for _ in range(6):
            penalty = sum((weights[name] - start[name]).square().sum() for name in weights)
            loss = -ssim(run_with(own, weights, one), target).sum() + 1e-5 * penalty
            adam.zero_grad()
            loss.backward()
            adam.step()
        last = float(ssim(run_with(own, weights, one), target).detach())
        assert float(before[row]) == pytest.approx(first, abs=1e-5)
        assert float(after[row]) == pytest.approx(last, abs=1e-3) and last > first


def test_reconstruction_by_corruption(images, tmp_path):
    names = ["contrast", "gaussian_noise"]
    found = reconstruct_corruptions(network(), images, names, steps=2, batch_size=7, show_progress=False)
    assert list(found) == names and len(found["contrast"].after) == 12
    assert float((found["contrast"].after - found["contrast"].before).mean()) > 0
    figures = reconstruction_figures(found)
    assert figures["corruptions"]["contrast"]["mean"] == round(float(found["contrast"].after.mean()), 4)
    every = np.concatenate([each.after for each in found.values()])
    assert figures["deviation"] == round(float(every.std()), 4)
    draw_reconstruction(tmp_path / "three.png", {"EDSR": found, "CAE": found}, "both")
    assert is_picture(tmp_path / "three.png")
    with pytest.raises(UsageError, match="a picture ends in .png or .svg"):
        draw_reconstruction(tmp_path / "three.jpg", {"EDSR": found}, "one")


def test_severities_take_turns(images):
    """With one severity and with another, only the images whose turn it is differ."""
    own = network()
    every = reconstruct_corruptions(own, images, ["contrast"], (1, 5), steps=0, show_progress=False)[
        "contrast"
    ]
    weak = reconstruct_corruptions(own, images, ["contrast"], (1,), steps=0, show_progress=False)["contrast"]
    same = np.isclose(every.before, weak.before, atol=1e-6)
    assert same[0::2].all() and not same[1::2].any()


def test_accuracy_by_radius(tmp_path):
    trials = [
        {"attack": "ada", "norm": "weights", "size": size, "accuracy": 60 - size} for size in (0.01, 0.02)
    ]
    run = TrialRun({}, [{"model": "runs/a", "clean_accuracy": 80.0, "attacks": trials}])
    draw_accuracy(tmp_path / "two.png", run, {"runs/a": "nominal"}, "under AdA")
    assert is_picture(tmp_path / "two.png")
    draw_accuracy(tmp_path / "two.svg", run, {"runs/a": "nominal"}, "under AdA")
    assert "<svg" in (tmp_path / "two.svg").read_text()


def test_a_density_for_each_radius_is_named(images, tmp_path):
    found = {
        radius: Corrupted(images.float(slice(0, 12)), np.linspace(0.5, 1, 12), np.zeros(12, bool))
        for radius in (0.01, 0.015)
    }
    draw_similarity(tmp_path / "one.svg", images, found, "AdA", pairs=2)
    assert (tmp_path / "one.svg").stat().st_size > 10_000
