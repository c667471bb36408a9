import pytest
import torch

from lrface.errors import UsageError
from lrface.losses import quality_loss


def images(seed: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(2, 3, 4, 4, generator=generator)


def test_is_the_mean_absolute_difference_to_the_clean_image():
    reconstruction, hq = images(0, -0.5, 1.5), images(1)
    clipped = total = 0.0
    for mine, wanted in zip(reconstruction.flatten().tolist(), hq.flatten().tolist(), strict=True):
        clipped += abs(min(1.0, max(0.0, mine)) - wanted)
        total += abs(mine - wanted)
    assert quality_loss(reconstruction, hq).item() == pytest.approx(clipped / 96, rel=1e-5)
    assert quality_loss(reconstruction, hq, clip=False).item() == pytest.approx(total / 96, rel=1e-5)
    assert clipped < total  # some pixels were outside


def test_does_not_depend_on_image_size_or_batch_size():
    one = quality_loss(torch.full((1, 3, 8, 8), 0.25), torch.zeros(1, 3, 8, 8))
    many = quality_loss(torch.full((5, 3, 32, 32), 0.25), torch.zeros(5, 3, 32, 32))
    assert one.item() == pytest.approx(0.25) and many.item() == pytest.approx(0.25)


def test_a_clipped_pixel_has_no_gradient():
    reconstruction = images(2, -0.5, 1.5).requires_grad_()
    quality_loss(reconstruction, images(3)).backward()
    outside = (reconstruction.detach() < 0) | (reconstruction.detach() > 1)
    assert 0 < int(outside.sum()) < outside.numel()
    assert bool((reconstruction.grad[outside] == 0).all())
    assert torch.allclose(reconstruction.grad[~outside].abs(), torch.tensor(1 / 96))


def test_without_clipping_every_pixel_has_a_gradient():
    reconstruction = images(2, -0.5, 1.5).requires_grad_()
    quality_loss(reconstruction, images(3), clip=False).backward()
    assert torch.allclose(reconstruction.grad.abs(), torch.tensor(1 / 96))


@pytest.mark.parametrize("clip", [True, False])
def test_gradient(clip):
    reconstruction = images(4, -0.5, 1.5).double().requires_grad_()
    hq = images(5).double()
    assert torch.autograd.gradcheck(lambda x: quality_loss(x, hq, clip), (reconstruction,))


def test_half_precision_is_averaged_in_float32():
    loss = quality_loss(
        torch.full((1, 3, 64, 64), 0.5, dtype=torch.bfloat16), torch.full((1, 3, 64, 64), 0.25)
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.25)


def test_shapes_that_differ_are_refused():
    with pytest.raises(UsageError, match=r"\(2, 3, 4, 4\) and the clean image \(2, 3, 8, 8\)"):
        quality_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
