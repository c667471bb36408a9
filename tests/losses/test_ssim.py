import numpy as np
import pytest
import torch

from lrface.errors import UsageError
from lrface.losses.ssim import RaySimilarity, ssim


def pictures(
    n: int = 3, height: int = 20, width: int = 17, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(n, 3, height, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean, (clean + torch.linspace(0.05, 0.5, n)[:, None, None, None] * noise).clamp(0, 1)


def reference(first: np.ndarray, second: np.ndarray) -> float:
    """The paper's formula, window by window: first and second [h, w]."""
    offsets = np.arange(11) - 5.0
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    found = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            x, y = first[top : top + 11, left : left + 11], second[top : top + 11, left : left + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_it_is_the_formula():
    clean, other = pictures()
    wanted = [
        np.mean([reference(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)])
        for x, y in zip(clean, other, strict=True)
    ]
    assert ssim(clean, other).tolist() == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < min(wanted) and max(wanted) < 0.99  # neither equal nor unrelated
    assert ssim(clean.float(), other.float()).tolist() == pytest.approx(wanted, abs=1e-5)


def test_it_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    clean, other = pictures(4, 33, 40, seed=1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    wanted = [
        metrics.structural_similarity(x.numpy(), y.numpy(), channel_axis=0, **options)
        for x, y in zip(clean, other, strict=True)
    ]
    assert ssim(clean, other).tolist() == pytest.approx(wanted, abs=1e-12)


def test_places_on_the_ray_are_no_approximation():
    clean, other = pictures(5, 32, 32, seed=2)
    gamma = torch.rand(5, 7, dtype=torch.float64)
    along = RaySimilarity(clean, other)(gamma)
    for place in range(7):
        mixed = clean + gamma[:, place, None, None, None] * (other - clean)
        torch.testing.assert_close(along[:, place], ssim(clean, mixed), atol=1e-12, rtol=0)
    torch.testing.assert_close(along[:, 3], RaySimilarity(clean, other)(gamma[:, 3]), atol=0, rtol=0)
    single = RaySimilarity(clean.float(), other.float())(gamma.float())
    torch.testing.assert_close(single.double(), along, atol=1e-5, rtol=0)


def test_equal_images_and_flat_ones():
    clean, _ = pictures()
    assert ssim(clean, clean).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert float(ssim(black, white)) == pytest.approx(1e-4 / 1.0001, rel=1e-3)  # luminance alone differs


def test_it_has_a_gradient():
    clean, other = pictures(1, 12, 12)
    other.requires_grad_()
    assert torch.autograd.gradcheck(lambda image: ssim(clean, image), (other,))


def test_what_it_cannot_compare():
    with pytest.raises(UsageError, match="two batches .* of one shape"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))
    with pytest.raises(UsageError, match="window of 11 pixels does not fit images of"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
