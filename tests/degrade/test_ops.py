import io

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from lrface.degrade.ops import gaussian_blur, gaussian_noise, jpeg
from lrface.errors import UsageError


@pytest.fixture
def images():
    return torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
def test_blur_equals_scipy(images, sigma):
    expected = scipy.ndimage.gaussian_filter(
        images.double().numpy(),
        (0, 0, sigma, sigma),
        mode="mirror",
        radius=(0, 0, round(4 * sigma), round(4 * sigma)),
    )
    np.testing.assert_allclose(gaussian_blur(images, sigma).numpy(), expected, atol=1e-5)
    assert gaussian_blur(images, 0.0) is images


@pytest.mark.parametrize("quality", [5, 30, 90])
def test_jpeg_equals_pillow(images, quality):
    for image, found in zip(images, jpeg(images, quality), strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        expected = np.asarray(Image.open(file)).astype(np.float32)
        # Two builds of libjpeg: chroma may be enlarged with another rounding.
        assert np.abs(found.permute(1, 2, 0).numpy() * 255 - expected).mean() < 1.0


def test_noise_is_gaussian_and_belongs_to_its_seed():
    grey = torch.full((2, 3, 64, 64), 0.5)
    noisy = gaussian_noise(grey, 10.0, [7, 8])
    assert (noisy - grey).std().item() * 255 == pytest.approx(10, rel=0.03)
    assert abs((noisy - grey).mean().item() * 255) < 0.3
    torch.testing.assert_close(gaussian_noise(grey[:1], 10.0, [8])[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[1])
    assert gaussian_noise(torch.ones(1, 3, 8, 8), 50.0, [1]).max() <= 1


def test_out_of_range_is_refused(images):
    for call in (
        lambda: jpeg(images, 0),
        lambda: gaussian_blur(images, -1),
        lambda: gaussian_noise(images, -1, [1, 2]),
    ):
        with pytest.raises(UsageError):
            call()
