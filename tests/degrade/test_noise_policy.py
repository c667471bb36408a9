"""Noise policies against their formula."""

import pytest
import torch

from lrface.degrade.policies import build_policy
from lrface.errors import UsageError

SET = [0.08, 0.12, 0.18, 0.26, 0.38]


def noisy(name: str, value: float, n: int = 64, **arguments):
    """Grey images of ``value``, their noise, and the parameters."""
    policy = build_policy(name, **arguments)
    images = torch.full((n, 3, 32, 32), value)
    parameters = policy.sample(n, 32, torch.Generator().manual_seed(3))
    degraded, hq = policy.apply(images, parameters)
    return (degraded - hq)[parameters.sigma > 0], parameters


def test_gaussian_noise_is_normal_with_the_drawn_deviation():
    noise, parameters = noisy("gaussian_noise", 0.5, sigma=0.05)
    assert len(noise) == 32 and parameters.sigma.unique().tolist() == [0.0, pytest.approx(0.05)]
    scaled = noise.double() / 0.05
    assert abs(float(scaled.mean())) < 0.02 and abs(float(scaled.std()) - 1) < 0.01
    assert abs(float((scaled**4).mean()) - 3) < 0.1  # normal noise
    first, second = scaled[:, :, :, :-1].flatten(), scaled[:, :, :, 1:].flatten()
    assert abs(float((first * second).mean())) < 0.02  # pixels by themselves
    assert abs(float((scaled[:, 0] * scaled[:, 1]).mean())) < 0.02  # channels too


def test_of_a_set_each_image_has_one_sigma_and_all_are_as_frequent():
    parameters = build_policy("gaussian_noise", sigma=SET).sample(
        10_000, 32, torch.Generator().manual_seed(0)
    )
    counts = [int((parameters.sigma - sigma).abs().lt(1e-6).sum()) for sigma in SET]
    assert sum(counts) == 5000 and all(abs(count - 1000) < 120 for count in counts)
    policy = build_policy("gaussian_noise", sigma=SET, clean_share=0, mirror=0)
    parameters = policy.sample(50, 32, torch.Generator().manual_seed(1))
    degraded, hq = policy.apply(torch.full((50, 3, 32, 32), 0.5), parameters)
    found = (degraded - hq).flatten(1).std(1)
    small = parameters.sigma < 0.13  # of these nothing is clipped
    assert int(small.sum()) > 10
    torch.testing.assert_close(found[small], parameters.sigma[small], atol=0.008, rtol=0)


@pytest.mark.parametrize("value", [0.2, 0.5])
def test_speckle_is_in_proportion_to_the_image(value):
    noise, _ = noisy("speckle_noise", value, sigma=0.2)
    assert float(noise.std()) == pytest.approx(0.2 * value, rel=0.02)


def test_black_has_no_speckle_and_everything_is_clipped():
    assert not noisy("speckle_noise", 0.0)[0].any()
    noise, _ = noisy("gaussian_noise", 1.0, sigma=0.5)
    assert (
        float(noise.max()) == 0
        and float(noise.min()) >= -1
        and 0.45 < float((noise == 0).float().mean()) < 0.55
    )


def test_defaults_are_the_papers():
    assert build_policy("gaussian_noise").sigmas == (0.5,)
    assert build_policy("speckle_noise").sigmas == (0.15, 0.2, 0.35, 0.45, 0.6)
    assert build_policy("gaussian_noise").clean_share == 0.5


@pytest.mark.parametrize("sigma", [0, -0.1, [], [0.1, 0], "0.5", float("inf"), float("nan"), True, [None]])
def test_a_wrong_sigma(sigma):
    with pytest.raises(UsageError, match="degrade.sigma must"):
        build_policy("gaussian_noise", sigma=sigma)
