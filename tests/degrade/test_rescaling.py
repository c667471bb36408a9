"""Clipping-aware rescaling against sorted corners in double precision, and its gradient against differences."""

import pytest
import torch

from lrface.degrade.rescaling import epsilon_for, rescale
from lrface.errors import UsageError

CASES = 10_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_sorting(
    x: torch.Tensor, delta: torch.Tensor, epsilon: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma float64 [n] and whether the length is in reach, by the corners in their order (arXiv 2007.07677)."""
    x, delta, epsilon = x.double().flatten(1), delta.double().flatten(1), epsilon.double()
    room = torch.where(delta > 0, 1 - x, x) * (delta != 0)
    corner = torch.where(delta != 0, room / delta.abs(), 0).square()
    order = corner.argsort(1)
    corner, room, size = corner.gather(1, order), room.gather(1, order), delta.abs().gather(1, order)
    clipped = room.square().cumsum(1)
    free = size.square().flip(1).cumsum(1).flip(1) - size.square()  # beyond each corner
    length = clipped + corner * free
    reached = length[:, -1] > epsilon.square()
    piece = torch.searchsorted(length, epsilon.square()[:, None]).clamp(max=length.shape[1] - 1)
    before = torch.where(piece > 0, clipped.gather(1, (piece - 1).clamp(min=0)), 0)
    own = size.square().flip(1).cumsum(1).flip(1).gather(1, piece)
    return ((epsilon.square()[:, None] - before) / own).squeeze(1).sqrt(), reached


def random_cases(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 3 x 8 x 8 values of several kinds, perturbations of several kinds and scales, lengths up to the whole
    diagonal."""
    generator = seeded(seed)
    shape = (n, 3, 8, 8)
    x = torch.rand(shape, generator=generator)
    kind = torch.arange(n) % 5
    x[kind == 1] = (x[kind == 1] > 0.5).float()  # black and white alone
    x[kind == 2] = x[kind == 2][:, :1, :1, :1].expand(-1, 3, 8, 8)  # one colour
    x[kind == 3] = 1.0  # white
    x[kind == 4] = torch.where(x[kind == 4] < 0.7, 0.0, x[kind == 4])  # mostly black
    delta = torch.randn(shape, generator=generator)
    kind = torch.arange(n) % 7
    delta[kind == 1] = delta[kind == 1].sign()
    delta[kind == 2] = delta[kind == 2] ** 5  # a few large values
    delta[kind == 3] = delta[kind == 3].abs()  # nothing to gain on white
    delta[kind == 4] *= torch.rand(delta[kind == 4].shape, generator=generator) < 0.1
    delta *= 10 ** (torch.rand(n, 1, 1, 1, generator=generator) * 12 - 6)
    return x, delta, torch.rand(n, generator=generator) * 12 + 1e-3


def length(images: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (images.double() - x.double()).flatten(1).norm(dim=1)


def test_ten_thousand_cases():
    x, delta, epsilon = random_cases(CASES, 0)
    result = rescale(x, delta, epsilon)
    gamma, reached = by_sorting(x, delta, epsilon)
    assert torch.equal(result.reached, reached)
    assert 3000 < int(reached.sum()) < 9000  # both kinds occur
    found = length(result.images, x)
    assert float((found - epsilon)[reached].abs().max()) < 1e-5
    torch.testing.assert_close(result.gamma[reached].double(), gamma[reached], rtol=1e-4, atol=0)
    assert float(result.images.min()) >= 0 and float(result.images.max()) <= 1
    ends = torch.where(delta > 0, 1.0, torch.where(delta < 0, 0.0, x))
    assert torch.equal(result.images[~reached], ends[~reached])
    assert bool((found[~reached] <= epsilon[~reached] + 1e-6).all())
    # What is added points where it should, and by the same factor wherever it is not clipped.
    moved = (x + result.gamma[:, None, None, None] * delta).clamp(0, 1)
    torch.testing.assert_close(result.images[reached], moved[reached])


@pytest.mark.parametrize("size, epsilon", [(32, 19.3), (112, 67.5), (224, 135.0), (224, 70.0), (224, 300.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_the_usual_sizes(size, epsilon, dtype):
    """Real images are smooth and partly saturated; large ones are begun on a sample of their values."""
    generator = seeded(1)
    coarse = torch.rand(3, 3, 7, 7, generator=generator) * 1.4 - 0.2
    x = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1).to(dtype)
    delta = torch.randn(x.shape, generator=generator).to(dtype)
    result = rescale(x, delta, epsilon)
    gamma, reached = by_sorting(x, delta, torch.full((3,), epsilon))
    assert torch.equal(result.reached, reached)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert bool(((length(result.images, x) - epsilon)[reached].abs() < tolerance).all())
    torch.testing.assert_close(result.gamma[reached].double(), gamma[reached], rtol=1e-6, atol=0)


def test_the_order_in_memory_changes_nothing():
    x, delta, epsilon = random_cases(70, 2)
    wanted = rescale(x, delta, epsilon)
    for first in (torch.channels_last, torch.contiguous_format):
        for second in (torch.channels_last, torch.contiguous_format):
            found = rescale(
                x.contiguous(memory_format=first), delta.contiguous(memory_format=second), epsilon
            )
            torch.testing.assert_close(found.images, wanted.images, rtol=0, atol=3e-6)
            assert torch.equal(found.reached, wanted.reached)
            assert found.images.is_contiguous(memory_format=first)


def test_an_image_does_not_depend_on_its_batch():
    x, delta, epsilon = random_cases(3000, 3)
    whole = rescale(x, delta, epsilon)
    for row in (0, 7, 1501, 2999):
        one = rescale(x[row : row + 1], delta[row : row + 1], epsilon[row : row + 1])
        torch.testing.assert_close(one.images[0], whole.images[row], rtol=0, atol=2e-6)


def test_special_images():
    white, zeros = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    up = torch.ones(1, 3, 4, 4)
    result = rescale(white, up, 1.0)  # nowhere to go
    assert not result.reached and torch.equal(result.images, white)
    result = rescale(torch.full_like(white, 0.5), zeros, 1.0)  # no direction
    assert not result.reached and float(result.gamma) == 0 and float(result.images.mean()) == 0.5
    result = rescale(zeros, up, 48**0.5)  # the whole diagonal, and no more
    assert result.reached and float(result.gamma) == pytest.approx(1.0)
    result = rescale(zeros, up, 7.0)
    assert not result.reached and torch.equal(result.images, white)
    empty = rescale(torch.rand(0, 3, 4, 4), torch.rand(0, 3, 4, 4), 1.0)
    assert empty.images.shape == (0, 3, 4, 4) and empty.reached.shape == (0,)


def test_the_gradient_is_that_of_differences():
    x, delta, _ = random_cases(8, 4)
    x, delta = x.double(), delta.double()
    delta /= delta.flatten(1).abs().amax(1)[:, None, None, None]
    most = length(rescale(x, delta, 100.0).images, x)
    rows = most > 1e-6
    x, delta, epsilon = x[rows][:, :, :3, :3], delta[rows][:, :, :3, :3], most[rows] * 0.3
    epsilon[::3] = 0.01  # nothing is clipped
    # Of a value at its end or of a zero the derivative is one-sided.
    x = x * 0.98 + 0.01
    delta = torch.where(delta.abs() < 1e-3, 0.1, delta).requires_grad_()
    found = rescale(x, delta, epsilon)
    clipped = ((found.images == 0) | (found.images == 1)).flatten(1).any(1) & found.reached
    assert int(clipped.sum()) > 2 and int((~clipped & found.reached).sum()) > 1
    assert torch.autograd.gradcheck(lambda d: rescale(x, d, epsilon).images, delta, eps=1e-7, atol=1e-5)
    last = delta.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    x_last = x.contiguous(memory_format=torch.channels_last)
    (wanted,) = torch.autograd.grad(found.images.square().sum(), delta)
    for own in (last, delta):
        (gradient,) = torch.autograd.grad(rescale(x_last, own, epsilon).images.square().sum(), own)
        torch.testing.assert_close(gradient, wanted)


def test_the_gradient_has_no_part_along_delta_and_none_where_nothing_is_reached():
    """A longer delta is the same perturbation."""
    x, delta, epsilon = random_cases(60, 5)
    delta.requires_grad_()
    result = rescale(x, delta, epsilon)
    random = torch.randn(x.shape, generator=seeded(6))
    (result.images * random).sum().backward()
    assert bool(torch.isfinite(delta.grad).all())
    product = (delta.grad * delta).flatten(1).sum(1)
    scale = delta.grad.flatten(1).norm(dim=1) * delta.flatten(1).norm(dim=1)
    assert bool((product.abs() <= 1e-4 * scale.clamp_min(1e-9)).all())
    assert bool((delta.grad[~result.reached] == 0).all()) and int((~result.reached).sum()) > 5
    assert int((delta.grad.flatten(1).abs().amax(1) > 0).sum()) > 20


def test_under_autocast_it_stays_in_single_precision():
    x, delta, epsilon = random_cases(50, 7)
    wanted = rescale(x, delta, epsilon)
    with torch.autocast("cpu", torch.bfloat16):
        found = rescale(x, delta, epsilon)
        half = rescale(x, delta.bfloat16(), epsilon)
    assert torch.equal(found.images, wanted.images) and half.images.dtype == torch.float32
    reached = half.reached
    assert float((length(half.images, x) - epsilon)[reached].abs().max()) < 1e-5


def test_the_same_root_mean_square_at_every_size():
    assert epsilon_for(224, 135.0) == 135.0 and epsilon_for(112, 135.0) == 67.5
    assert epsilon_for(32, 135.0) == pytest.approx(19.2857, abs=1e-4) and epsilon_for(32, 70.0) == 10.0
    for size in (32, 112):
        assert epsilon_for(size, 135.0) / (3 * size**2) ** 0.5 == pytest.approx(135 / (3 * 224**2) ** 0.5)


def test_the_papers_length_is_that_of_gaussian_noise_of_half_on_photographs():
    """Appendix B.1: 135 is what sigma 0.5 comes to on average after clipping; so images are in [0, 1]."""
    x = torch.rand(4, 3, 224, 224, generator=seeded(8)) * 0.9 + 0.05
    noise = 0.5 * torch.randn(x.shape, generator=seeded(9))
    assert float(length((x + noise).clamp(0, 1), x).mean()) == pytest.approx(135, rel=0.1)


def test_what_is_refused():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(UsageError, match=r"found \(2, 3, 4, 4\) and \(3, 4, 4\)"):
        rescale(x, x[0], 1.0)
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="epsilon must be above 0"):
            rescale(x, x, epsilon)
    with pytest.raises(UsageError, match=r"have shape \[2\]; found \(3,\)"):
        rescale(x, x, torch.ones(3))
    with pytest.raises(UsageError, match="detach the images"):
        rescale(x.requires_grad_(), x.detach(), 1.0)
