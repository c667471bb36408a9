"""Missing pixels and blur: exact shares, the kernel written out, scaling by an argument, and replay."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from lrface.degrade import policies
from lrface.degrade.policy import rows_of
from lrface.errors import UsageError

OPERATORS = [
    {"name": "pixel_mask", "missing": 0.9},
    {"name": "pixel_mask", "missing_range": [0.5, 0.95]},
    {"name": "gaussian_blur", "kernel": 7, "sigma": 2.0},
    {"name": "gaussian_blur", "kernel": 7, "sigma_range": [0.5, 3]},
    {"name": "gaussian_noise", "sigma_range": [0.1, 0.3]},
]


def build_policy(name: str, clean_share: float = 0.0, **arguments):
    return policies.build_policy(name, clean_share=clean_share, **arguments)


def images(n: int = 6, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05


def applied(policy, x, seed: int = 0):
    parameters = policy.sample(len(x), x.shape[-1], torch.Generator().manual_seed(seed))
    degraded, hq = policy.apply(x, parameters)
    return degraded, hq, parameters


@pytest.mark.parametrize("missing", [0.5, 0.75, 0.9])
def test_exactly_the_share_is_missing_in_all_channels_alike(missing):
    degraded, hq, _ = applied(build_policy("pixel_mask", missing=missing), images())
    gone = degraded == 0
    assert torch.equal(gone[:, 0], gone[:, 1]) and torch.equal(gone[:, 0], gone[:, 2])
    assert gone[:, 0].sum((1, 2)).tolist() == [round(missing * 32 * 32)] * 6
    assert torch.equal(degraded[~gone], hq[~gone])
    assert len({tuple(mask.flatten().tolist()) for mask in gone[:, 0]}) == 6, (
        "a set of its own for each image"
    )
    # No place is preferred: over many images each pixel goes equally often.
    many, _, _ = applied(build_policy("pixel_mask", missing=missing), images(1, 8).expand(3000, -1, -1, -1))
    often = (many[:, 0] == 0).float().mean(0)
    assert (often - missing).abs().max() < 5 * (missing * (1 - missing) / 3000) ** 0.5


def test_a_range_of_shares():
    degraded, _, parameters = applied(build_policy("pixel_mask", missing_range=[0.5, 0.95]), images(400, 16))
    share = (degraded[:, 0] == 0).float().mean((1, 2))
    assert torch.allclose(share, parameters.missing, atol=0.5 / 256 + 1e-6)
    assert 0.5 <= share.min() < 0.53 and 0.92 < share.max() <= 0.95
    assert share.mean() == pytest.approx(0.725, abs=0.02)


@pytest.mark.parametrize(("kernel", "sigma", "size"), [(21, 5.0, 48), (37, 9.0, 40), (3, 0.7, 8)])
def test_blur_is_torchvisions(kernel, sigma, size):
    """Written out by another library, which mirrors edges in the same way."""
    degraded, hq, _ = applied(build_policy("gaussian_blur", kernel=kernel, sigma=sigma), images(size=size))
    torch.testing.assert_close(
        degraded, gaussian_blur(hq, [kernel, kernel], [sigma, sigma]), rtol=0, atol=2e-6
    )


def test_a_sigma_of_its_own_for_each_image():
    policy = build_policy("gaussian_blur", kernel=9, sigma_range=[1, 5])
    degraded, hq, parameters = applied(policy, images(5))
    assert len(set(parameters.sigma.tolist())) == 5
    for one, other, sigma in zip(degraded, hq, parameters.sigma.tolist(), strict=True):
        torch.testing.assert_close(one, gaussian_blur(other, [9, 9], [sigma, sigma]), rtol=0, atol=2e-6)
    many = policy.sample(2000, 32, torch.Generator().manual_seed(0)).sigma
    assert 1 <= many.min() < 1.05 and 4.95 < many.max() <= 5 and many.mean() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("kernel", "sigma", "small"), [(21, 5.0, 3), (37, 9.0, 5)])
def test_the_papers_blur_for_small_images_is_scaled_by_an_argument_alone(kernel, sigma, small):
    scaled = build_policy("gaussian_blur", kernel=kernel, sigma=sigma, reference_size=224)
    degraded, hq, _ = applied(scaled, images())
    by = sigma * 32 / 224
    torch.testing.assert_close(degraded, gaussian_blur(hq, [small, small], [by, by]), rtol=0, atol=2e-6)
    assert scaled.reach(224) == (kernel - 1) // 2
    plain = build_policy("gaussian_blur", kernel=kernel, sigma=sigma)
    assert plain.reach(32) == (kernel - 1) // 2
    with pytest.raises(UsageError, match=r"degrade.kernel: .* too many for images of 8; .*reference_size"):
        plain.sample(2, 8, torch.Generator())
    with pytest.raises(UsageError, match="blurs nothing"):
        scaled.sample(2, 4, torch.Generator())


def test_a_range_of_noise():
    parameters = build_policy("gaussian_noise", sigma_range=[0.1, 0.3], clean_share=0.5).sample(
        2000, 32, torch.Generator().manual_seed(0)
    )
    sigma = parameters.sigma[parameters.sigma > 0]
    assert len(sigma) == 1000 and 0.1 <= sigma.min() < 0.105 and 0.295 < sigma.max() <= 0.3


@pytest.mark.parametrize("settings", OPERATORS, ids=str)
def test_a_batch_is_replayed_from_its_seed_and_row_by_row(settings):
    policy = build_policy(**{"crop_padding": 2, **settings})
    x = images()
    degraded, hq, parameters = applied(policy, x, 3)
    again, same, _ = applied(policy, x, 3)
    other, _, _ = applied(policy, x, 4)
    assert torch.equal(degraded, again) and torch.equal(hq, same) and not torch.equal(degraded, other)
    assert not torch.equal(degraded, hq) and 0 <= degraded.min() and degraded.max() <= 1
    for row in range(len(x)):
        own, clean = policy.apply(x[row : row + 1], rows_of(parameters, slice(row, row + 1)))
        torch.testing.assert_close(own, degraded[row : row + 1], rtol=0, atol=2e-6)
        assert torch.equal(clean, hq[row : row + 1])
    clean = build_policy(**{**settings, "clean_share": 0.5})
    degraded, hq, _ = applied(clean, x)
    assert int((degraded != hq).flatten(1).any(1).sum()) == 3


@pytest.mark.parametrize("settings", OPERATORS, ids=str)
def test_they_fit_into_chains(settings):
    part = dict(settings)
    chain = build_policy("chain", parts=[{**part, "clean_share": 0.2}, "gaussian_noise"], clean_share=0.0)
    degraded, hq, _ = applied(chain, images())
    assert bool((degraded != hq).flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "pixel_mask"}, "exactly one of missing and missing_range"),
        ({"name": "pixel_mask", "missing": 0.5, "missing_range": [0.5, 0.9]}, "exactly one of missing"),
        ({"name": "pixel_mask", "missing": 1.0}, "degrade.missing must be above 0 and below 1"),
        ({"name": "pixel_mask", "missing": 90}, "degrade.missing must be above 0 and below 1"),
        ({"name": "pixel_mask", "missing_range": [0.5, 95]}, r"degrade.missing_range must be \[smallest"),
        ({"name": "pixel_mask", "missing_range": 0.5}, r"degrade.missing_range must be \[smallest"),
        ({"name": "gaussian_blur", "kernel": 21}, "exactly one of sigma and sigma_range"),
        ({"name": "gaussian_blur", "kernel": 20, "sigma": 5}, "degrade.kernel must be an odd number"),
        ({"name": "gaussian_blur", "kernel": 21, "sigma": 0}, "degrade.sigma must be above 0"),
        ({"name": "gaussian_blur", "sigma_range": [3, 1]}, r"degrade.sigma_range must be \[smallest"),
        (
            {"name": "gaussian_blur", "sigma": 1, "reference_size": 0},
            "degrade.reference_size must be at least 1",
        ),
        ({"name": "gaussian_noise", "sigma_range": [0.3, 0.1]}, r"degrade.sigma_range must be \[smallest"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        build_policy(**settings)
