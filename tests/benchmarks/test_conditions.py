import pytest
import torch

from lrface.benchmarks.conditions import Condition
from lrface.degrade.ops import gaussian_blur, gaussian_noise, jpeg
from lrface.degrade.resolution import resample, resize
from lrface.errors import UsageError


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.interpolate(
        torch.rand(3, 3, 14, 14, generator=generator), (56, 56), mode="bicubic"
    ).clamp(0, 1)


def test_text_and_condition_are_the_same_thing():
    condition = Condition.parse("size=28, noise=8,blur=1.5,jpeg=30")
    assert condition == Condition(size=28, blur=1.5, noise=8.0, jpeg=30)
    assert condition.losses == "blur=1.5,noise=8,jpeg=30" and Condition(size=28).losses == ""
    assert Condition.parse(condition.losses) == Condition(blur=1.5, noise=8.0, jpeg=30)


@pytest.mark.parametrize(
    "text", ["", "jpeg", "jpeg=x", "jpeg=0", "jpeg=101", "blur=-1", "size=0", "fog=3", "jpeg=3,jpeg=4"]
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(UsageError, match="--degrade"):
        Condition.parse(text)


def test_losses_are_applied_in_the_order_of_a_camera(images):
    condition = Condition(size=14, blur=1.0, noise=5.0, jpeg=40)
    expected = resize(gaussian_blur(images, 1.0), 14, "area")
    expected = resize(jpeg(gaussian_noise(expected, 5.0, [1, 2, 3]), 40), 56, "bicubic")
    torch.testing.assert_close(condition.apply(images, "area", "bicubic", [1, 2, 3]), expected)


def test_a_resolution_alone_is_resampling(images):
    torch.testing.assert_close(
        Condition(size=14).apply(images, "nearest", "bilinear", []), resample(images, 14)
    )
    assert Condition().apply(images, "nearest", "bilinear", []) is images
    torch.testing.assert_close(Condition(size=56).apply(images, "nearest", "bilinear", []), images)
