import cv2
import numpy as np
import pytest
import torch

from lrface.degrade.resolution import KERNELS, resample, resize
from lrface.errors import UsageError


def picture(seed: int = 0, side: int = 112) -> np.ndarray:
    """Smooth shapes with noise on them: uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 7, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.int64)
    return (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def to_image(tensor: torch.Tensor) -> np.ndarray:
    return (tensor[0].permute(1, 2, 0) * 255).round().byte().numpy()


@pytest.mark.parametrize("size", [56, 28, 14, 8, 7])
def test_nearest_down_and_up_is_opencv_at_the_sizes_of_the_paper(size):
    image = picture()
    small = to_image(resize(to_tensor(image), size, "nearest"))
    assert np.array_equal(small, cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST))
    again = to_image(resample(to_tensor(image), size, "nearest", "nearest"))
    assert np.array_equal(again, cv2.resize(small, (112, 112), interpolation=cv2.INTER_NEAREST))


@pytest.mark.parametrize("size", range(1, 112))
def test_nearest_is_opencv_at_every_size(size):
    columns = np.arange(112, dtype=np.uint8)[None, :, None].repeat(112, 0).repeat(3, 2)
    picked = to_image(resize(to_tensor(columns), size, "nearest"))[0, :, 0].astype(int)
    opencv = cv2.resize(columns, (size, size), interpolation=cv2.INTER_NEAREST)[0, :, 0].astype(int)
    exact = np.arange(size) * 112 // size
    # Where i * 112 / size is a whole number both libraries' rounding may land on the pixel before it.
    whole = np.arange(size) * 112 % size == 0
    assert np.array_equal(picked[~whole], exact[~whole]) and np.array_equal(opencv[~whole], exact[~whole])
    assert set((exact - picked)[whole]) <= {0, 1}
    if 112 % size == 0:
        assert np.array_equal(picked, exact) and np.array_equal(opencv, exact)


def test_nearest_picks_the_pixel_at_the_floor():
    image = to_tensor(picture())
    assert torch.equal(resize(image, 14, "nearest"), image[..., ::8, ::8])


@pytest.mark.parametrize("size", [56, 28, 14])
def test_area_is_the_mean_of_blocks(size):
    image = to_tensor(picture(1))
    block = 112 // size
    expected = image.reshape(1, 3, size, block, size, block).mean(dim=(3, 5))
    torch.testing.assert_close(resize(image, size, "area"), expected)


def test_bilinear_up_is_opencv():
    small = picture(2, 28)
    large = to_image(resize(to_tensor(small), 112, "bilinear")).astype(int)
    expected = cv2.resize(small, (112, 112), interpolation=cv2.INTER_LINEAR).astype(int)
    assert np.abs(large - expected).max() <= 1


def test_bilinear_down_is_antialiased():
    stripes = torch.zeros(1, 1, 112, 112)
    stripes[..., ::2] = 1.0
    inner = resize(stripes, 28, "bilinear")[..., 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("down", KERNELS)
@pytest.mark.parametrize("up", KERNELS)
def test_shape_range_and_mean_are_kept(down, up):
    image = to_tensor(picture(3))
    out = resample(image, 20, down, up)
    assert out.shape == image.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1
    assert abs(out.mean() - image.mean()) < 0.02
    constant = torch.full((1, 3, 112, 112), 0.3)
    torch.testing.assert_close(resample(constant, 20, down, up), constant)


def test_bicubic_overshoot_is_clipped():
    edge = torch.zeros(1, 1, 112, 112)
    edge[..., 56:] = 1.0
    out = resample(edge, 28, "bicubic", "bicubic")
    assert out.min() == 0 and out.max() == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_full_size_and_above_change_nothing(kernel):
    image = to_tensor(picture(4))
    assert torch.equal(resample(image, 112, kernel, kernel), image)
    assert torch.equal(resample(image, 200, kernel, kernel), image)
    assert torch.equal(resize(image, 112, kernel), image)


def test_nearest_twice_is_nearest_once():
    once = resample(to_tensor(picture(5)), 28, "nearest", "nearest")
    assert torch.equal(resample(once, 28, "nearest", "nearest"), once)


def test_images_of_a_batch_do_not_mix():
    pair = torch.cat([to_tensor(picture(6)), to_tensor(picture(7))])
    out = resample(pair, 14)
    assert torch.equal(out[:1], resample(pair[:1], 14)) and torch.equal(out[1:], resample(pair[1:], 14))


def test_what_is_wrong_is_named():
    image = torch.zeros(1, 3, 112, 112)
    with pytest.raises(
        UsageError, match="down must be one of nearest, area, bilinear, bicubic; found 'cubic'"
    ):
        resample(image, 14, "cubic")
    with pytest.raises(UsageError, match="up must be one of .*; found 'lanczos'"):
        resample(image, 14, "nearest", "lanczos")
    with pytest.raises(UsageError, match="kernel must be one of .*; found 'box'"):
        resize(image, 14, "box")
    with pytest.raises(UsageError, match="at least 1 pixel; found 0"):
        resample(image, 0)
    with pytest.raises(UsageError, match="square images; found 112 x 96"):
        resample(torch.zeros(1, 3, 112, 96), 14)
