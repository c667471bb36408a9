"""Degradations of real cameras: interface, replay, bad input, and what they do to an image."""

import sys

import pytest
import torch
from torch import Tensor

from lrface.degrade import camera
from lrface.degrade.camera import CHAIN, DEGRADATIONS, apply, degrade, sample
from lrface.degrade.corruptions.draws import Draws
from lrface.errors import LrfaceError, UsageError

try:
    import av  # noqa: F401

    NAMES = list(DEGRADATIONS)
except ImportError:
    NAMES = [name for name in DEGRADATIONS if name != "video"]


def faces(count: int, height: int = 48, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 230 + torch.rand(count, 3, height, width, generator=generator) * 25).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_replay_and_independence(name: str) -> None:
    images = faces(6)
    parameters = sample(name, 6, (48, 48), torch.Generator().manual_seed(1), (0.2, 1.0))
    assert parameters.strength.min() >= 0.2 and parameters.strength.max() <= 1
    done = apply(images, parameters)
    assert done.dtype == images.dtype and done.shape == images.shape
    assert torch.equal(done, apply(images, parameters))
    alone = type(parameters)(name, (48, 48), parameters.strength[2:3], parameters.seed[2:3])
    assert (apply(images[2:3], alone).int() - done[2:3].int()).abs().float().mean() < 0.05
    assert not torch.equal(done, images)
    floats = apply(images.float() / 255, parameters)
    assert floats.dtype == torch.float32
    assert (floats * 255 - done).abs().mean() < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_stronger_is_further_from_the_image(name: str) -> None:
    images = faces(32, 64, 64)
    distances = []
    for strength in (0.0, 0.4, 1.0):
        done = degrade(images, name, torch.full((32,), strength), seed=4)
        distances.append((done.float() - images).abs().mean().item())
    assert distances[0] < distances[1] < distances[2]
    assert distances[2] > 2


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (3, 2), (17, 41)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    done = degrade(torch.rand(3, 3, *size), name)
    assert done.shape == (3, 3, *size) and done.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name: str) -> None:
    for channels in (1, 4):
        with pytest.raises(UsageError, match="RGB"):
            degrade(torch.zeros(2, channels, 8, 8), name)
    with pytest.raises(UsageError, match="uint8, or float"):
        degrade(torch.zeros(2, 3, 8, 8, dtype=torch.int32), name)
    with pytest.raises(UsageError, match="RGB"):
        degrade(torch.zeros(3, 8, 8), name)
    for strength in ((0.5, 1.5), (-0.1, 0.5), torch.tensor([0.1, 1.1])):
        with pytest.raises(UsageError, match="between 0 and 1"):
            degrade(faces(2), name, strength)
    with pytest.raises(UsageError, match="range"):
        degrade(faces(2), name, (0.7, 0.3))
    with pytest.raises(UsageError, match="each of 2 images"):
        degrade(faces(2), name, torch.tensor([0.1]))
    with pytest.raises(UsageError, match="drawn for 2 images of 9 x 8"):
        apply(torch.zeros(2, 3, 8, 8), sample(name, 2, (9, 8), torch.Generator()))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'rain'.*turbulence"):
        degrade(faces(1), "rain")


def test_sensor_noise_has_the_variance_of_its_model() -> None:
    """In linear light the variance is signal / photons + read noise squared."""
    for strength, photons, read_noise in (
        (0.0, 5000.0, 0.001),
        (0.5, 5000 * (40 / 5000) ** 0.5, 0.001 * 30**0.5),
    ):
        for level in (0.3, 0.6):
            images = torch.full((2, 3, 200, 200), level, dtype=torch.float64)
            light = degrade(images, "sensor_noise", torch.full((2,), strength)) ** 2.2
            signal = level**2.2
            assert light.mean().item() == pytest.approx(signal, rel=0.01)
            assert light.var().item() == pytest.approx(signal / photons + read_noise**2, rel=0.04)


def test_trajectories_are_centred_paths() -> None:
    strength = torch.linspace(0, 1, 40)
    kernels = camera.trajectory_kernels(strength, 100.0, Draws(torch.arange(40)))
    size = kernels.shape[-1]
    assert size % 2 == 1 and (kernels >= 0).all()
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(40), atol=1e-5)
    places = torch.arange(size) - size // 2
    centre = (kernels.sum(2) * places).sum(1), (kernels.sum(1) * places).sum(1)
    assert torch.stack(centre).abs().max() < 0.01
    spans = []
    for kernel in kernels:
        rows, columns = kernel.sum(1).nonzero(), kernel.sum(0).nonzero()
        spans.append(max(rows.max() - rows.min(), columns.max() - columns.min()).item())
    for span, wanted in zip(spans, (3 + 17 * strength).tolist(), strict=True):
        assert wanted - 1 <= span <= wanted + 2


def test_chain_runs_all_four_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = [[] for _ in range(200)]

    def link(number: int):
        def apply_link(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
            for seed in draws.seeds.tolist():
                seen[seed].append(number)
            return levels

        return apply_link

    monkeypatch.setattr(camera, "_LINKS", tuple(link(number) for number in range(4)))
    camera.chain(torch.zeros(200, 3, 2, 2), torch.ones(200), Draws(torch.arange(200)))
    assert all(sorted(order) == [0, 1, 2, 3] for order in seen)
    assert len({tuple(order) for order in seen}) == 24


def test_video_without_pyav_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(LrfaceError, match="pip install lrface.video."):
        degrade(faces(1), "video")


def test_video_shows_blocks() -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    images = faces(4, 112, 112)
    done = degrade(images, "video", torch.ones(4)).float()
    steps = (done[..., 1:] - done[..., :-1]).abs().mean((0, 1, 2))
    inside = torch.tensor([column % 8 != 7 for column in range(111)])
    assert steps[~inside].mean() > 1.5 * steps[inside].mean()


def test_default_is_the_chain() -> None:
    images = faces(2)
    assert torch.equal(degrade(images, seed=3), degrade(images, CHAIN, seed=3))
    assert not torch.equal(degrade(images, seed=3), degrade(images, seed=4))
