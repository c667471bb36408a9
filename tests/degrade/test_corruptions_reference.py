"""The corruptions against imagecorruptions, the reference code of ImageNet-C, with the same random numbers where a
corruption has any and by distribution where its numbers cannot be shared."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lrface.degrade.corruptions import CORRUPTIONS, SETS, corrupt, frost, weather
from lrface.degrade.corruptions.core import KERNELS
from lrface.degrade.corruptions.draws import Draws

reference = pytest.importorskip(
    "imagecorruptions.corruptions", reason="imagecorruptions-imaug is not installed"
)

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
SIZE = 224


class Given(Draws):
    """Numbers from outside in the place of drawn ones."""

    def __init__(self, **streams: np.ndarray):
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.streams = {key: torch.from_numpy(np.asarray(value)).float() for key, value in streams.items()}

    def uniform(self, stream: str, *shape: int) -> Tensor:
        return self.streams[stream].reshape(1, *shape).clone()

    normal = uniform


def natural_images(count: int) -> list[np.ndarray]:
    """uint8 [224, 224, 3]: photographs where the sample is at hand; else images with a photograph's spectrum."""
    paths = sorted(SAMPLE.glob("*.jpg"))[::37][:count] if SAMPLE.is_dir() else []
    if paths:
        from PIL import Image

        found = []
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
            found.append(pixels[top : top + SIZE, left : left + SIZE].copy())
        return found
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE))
    frequency[0, 0] = 1
    found = []
    for _ in range(count):
        layers = np.fft.irfft2(np.fft.rfft2(random.standard_normal((4, SIZE, SIZE))) / frequency)
        colours = layers[:1] * 2 + layers[1:]
        found.append(
            (128 + 55 * colours / colours.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
        )
    return found


IMAGES = natural_images(2)


def by_reference(image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """float64 [3, h, w] levels."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = getattr(reference, name)(Image.fromarray(image), severity)
    return np.uint8(np.asarray(done)).transpose(2, 0, 1).astype(np.float64)


def by_lrface(image: np.ndarray, name: str, severity: int, draws: Draws) -> np.ndarray:
    """The kernel with given numbers, cut to whole levels as apply does."""
    levels = torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()
    constants = SETS["imagenet"].constants(name, severity, image.shape[:2])
    done = KERNELS[name](levels, constants, draws).clamp(0, 255).to(torch.uint8)
    return done[0].numpy().astype(np.float64)


def check_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours - theirs)
    assert difference.mean() <= 1.0
    assert np.percentile(difference, 99) <= 3.0


SHARED: dict[str, Callable[[int, tuple[int, int]], Draws]] = {}
"""Corruption -> its random numbers, drawn from numpy's global state as the reference draws them."""


def shared(name: str) -> Callable[[Callable[[int, tuple[int, int]], Draws]], None]:
    def keep(draw: Callable[[int, tuple[int, int]], Draws]) -> None:
        SHARED[name] = draw

    return keep


for deterministic in (
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
):
    SHARED[deterministic] = lambda severity, size: Given()


@shared("gaussian_noise")
def _(severity: int, size: tuple[int, int]) -> Draws:
    return Given(noise=np.random.normal(size=(*size, 3)).transpose(2, 0, 1))


SHARED["speckle_noise"] = SHARED["gaussian_noise"]


@shared("motion_blur")
def _(severity: int, size: tuple[int, int]) -> Draws:
    return Given(angle=[(np.random.uniform(-45, 45) + 45) / 90])


@shared("snow")
def _(severity: int, size: tuple[int, int]) -> Draws:
    from lrface.degrade.corruptions.blur import zoomed_size

    flakes = np.random.normal(size=size)
    enlargement = SETS["imagenet"].constants("snow", severity, size)[2]
    (top, height, _), (left, width, _) = (zoomed_size(side, enlargement) for side in size)
    return Given(
        flakes=flakes[top : top + height, left : left + width],
        angle=[(np.random.uniform(-135, -45) + 135) / 90],
    )


@shared("fog")
def _(severity: int, size: tuple[int, int]) -> Draws:
    side = 1 << (max(size) - 1).bit_length()
    numbers, octave = [np.zeros(1)], 1
    while octave < side:
        numbers += [np.random.uniform(-1, 1, (octave, octave)).ravel() for _ in range(3)]
        octave *= 2
    return Given(plasma=(np.concatenate(numbers) + 1) / 2)


@shared("elastic_transform")
def _(severity: int, size: tuple[int, int]) -> Draws:
    return Given(displacement=(np.stack([np.random.uniform(-1, 1, size) for _ in range(2)]) + 1) / 2)


@shared("spatter")
def _(severity: int, size: tuple[int, int]) -> Draws:
    return Given(liquid=np.random.normal(size=size))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", SHARED)
def test_equal_with_the_same_random_numbers(name: str, severity: int) -> None:
    for number, image in enumerate(IMAGES):
        for picture in (image, image[: 120 + 40 * number, 20:200]):
            picture = np.ascontiguousarray(picture)
            np.random.seed(severity)
            theirs = by_reference(picture, name, severity)
            np.random.seed(severity)
            check_equal(by_lrface(picture, name, severity, SHARED[name](severity, picture.shape[:2])), theirs)


def test_frost_is_laid_on_as_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    picture = cv2.imread(str(Path(reference.__file__).parent / "frost" / "frost1.png"))
    size = int(np.ceil(picture.shape[1] * 1.1)), int(np.ceil(picture.shape[0] * 1.1))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)[..., ::-1].copy()
    monkeypatch.setattr(weather, "textures", lambda *_: torch.from_numpy(picture)[None])
    monkeypatch.setattr(weather, "SHARES", (1.0,))
    monkeypatch.setattr(
        reference.np.random, "randint", lambda low, high=None: 0 if high is None else low + 57
    )
    crop = (57.5 / (picture.shape[0] - SIZE), 57.5 / (picture.shape[1] - SIZE))
    for severity in range(1, 6):
        theirs = by_reference(IMAGES[0], "frost", severity)
        check_equal(by_lrface(IMAGES[0], "frost", severity, Given(crop=[0.5, *crop])), theirs)


def octaves(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log2 of the mean power in each octave of spatial frequency from 1/64 to 1/2, over [..., h, w]; and the number of
    independent frequencies of one image in it."""
    height, width = images.shape[-2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    window = np.outer(np.hanning(height), np.hanning(width))
    power = np.abs(np.fft.rfft2((images - images.mean((-2, -1), keepdims=True)) * window)) ** 2
    bounds = 2.0 ** np.arange(-6, 0)
    rings = [(frequency >= low) & (frequency < high) for low, high in zip(bounds, bounds[1:], strict=False)]
    # A Hann window leaves 4/9 of the frequencies of each axis independent.
    counts = [ring.sum() * 16 / 81 for ring in rings]
    return np.array([np.log2(power[..., ring].mean()) for ring in rings]), np.array(counts)


RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur")
RANDOM += ("snow", "fog", "elastic_transform", "spatter")
# How far apart two sets of draws may lie beyond five standard errors: share of deviation, octaves (log2 of power).
# Clouds, flakes and drops cover much of an image: few draws of them are few numbers.
TOLERANCES = {"fog": (0.1, 0.3), "snow": (0.05, 0.3), "motion_blur": (0.04, 0.3), "spatter": (0.05, 0.7)}
TOLERANCES |= {"elastic_transform": (0.02, 0.15)}
DRAWS = 24


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_are_equal_in_distribution(name: str, severity: int) -> None:
    image = np.ascontiguousarray(IMAGES[0][48:176, 48:176])
    np.random.seed(0)
    theirs = np.stack([by_reference(image, name, severity) for _ in range(DRAWS)])
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(DRAWS, -1, -1, -1)
    ours = corrupt(batch, name, severity, "imagenet", seed=1).numpy().astype(np.float64)
    deviation, octave = TOLERANCES.get(name, (0.02, 0.05))
    error = 5 * np.sqrt((ours.mean((1, 2, 3)).var() + theirs.mean((1, 2, 3)).var()) / DRAWS)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.1 + error)
    assert ours.std() == pytest.approx(theirs.std(), rel=deviation)
    (found, _), (wanted, _) = octaves(ours), octaves(theirs)
    np.testing.assert_allclose(found, wanted, atol=octave + 0.1)
    # What varies from draw to draw, pixel by pixel: its size and its spectrum.
    assert ours.std(0).mean() == pytest.approx(theirs.std(0).mean(), rel=3 * deviation)
    (found, counts), (wanted, _) = octaves(ours - ours.mean(0)), octaves(theirs - theirs.mean(0))
    error = 5 * np.log2(np.e) * np.sqrt(2 / (counts * DRAWS))
    assert (np.abs(found - wanted) < octave + error).all(), (found - wanted, error)


def test_how_far_frost_is_from_the_reference() -> None:
    """Mean colour, contrast and spectrum of the textures against the reference's photographs."""
    import cv2

    for number, name in enumerate(("frost1.png", "frost2.png", "frost4.jpg", "frost5.jpg", "frost6.jpg")):
        photograph = cv2.imread(str(Path(reference.__file__).parent / "frost" / name))[..., ::-1].astype(
            float
        )
        drawn = frost._draw(number).astype(float)
        np.testing.assert_allclose(drawn.mean((0, 1)), photograph.mean((0, 1)), atol=4)
        np.testing.assert_allclose(drawn.std((0, 1)), photograph.std((0, 1)), rtol=0.25)
        crops = drawn[:315, :448].mean(2), photograph[:315, :448].mean(2)
        np.testing.assert_allclose(octaves(crops[0])[0], octaves(crops[1])[0], atol=2.5)


@pytest.mark.parametrize("severity", [1, 5])
def test_how_far_frosted_images_are_from_the_reference(severity: int) -> None:
    """Other textures, so no equality: mean within 8 levels, deviation within 8 %, octaves within a factor of 1.4."""
    draws = 40
    np.random.seed(0)
    theirs = np.stack([by_reference(IMAGES[0], "frost", severity) for _ in range(draws)])
    batch = torch.from_numpy(IMAGES[0]).permute(2, 0, 1).expand(draws, -1, -1, -1)
    ours = corrupt(batch, "frost", severity, "imagenet", seed=1).numpy().astype(np.float64)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=8)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.08)
    np.testing.assert_allclose(octaves(ours)[0], octaves(theirs)[0], atol=0.5)


def test_all_of_the_reference_is_covered() -> None:
    assert set(SHARED) | set(RANDOM) | {"frost"} >= set(CORRUPTIONS)
