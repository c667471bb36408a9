"""Random resized crops: torchvision's rules, replayed from a step's seed, by any number of workers and ranks."""

import io
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from lrface.data import crop as crops
from lrface.data.crop import CROPS, RandomResizedCrop, read_crop, resize
from lrface.data.dataset import CroppedDataset, SeededBatch, batches
from lrface.data.decode import MAX_PIXELS, BrokenImage, decode
from lrface.data.source import open_source
from lrface.errors import LrfaceError, UsageError

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
CROP = RandomResizedCrop()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture: uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Eight JPEGs and a PNG of several sizes in three classes."""
    for number in range(9):
        place = tmp_path / "images" / f"class {number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        image = picture(60 + 37 * number, 300 - 21 * number, number)
        if number == 8:
            Image.fromarray(image).save(place / f"{number}.png")
        else:
            (place / f"{number}.jpg").write_bytes(jpeg(image))
    return tmp_path / "images"


# ------------------------------------------------------------------------------------------------------- the boxes


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (64, 64), (20, 300), (300, 20), (3, 2)])
@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.9), (1.0, 1.0))])
def test_the_same_numbers_give_torchvisions_box(height, width, scale, ratio, monkeypatch):
    """torchvision's get_params with its draws replaced by ours; it draws in float32."""
    own = RandomResizedCrop(scale, ratio)
    for numbers in own.draw(30, seed=height * width):
        stream = iter(numbers.ravel().tolist())
        tries = {"count": 0}

        def uniform(tensor, low, high, stream=stream, tries=tries):
            # area and ratio come first in a try; the two numbers of a place that does not exist are passed over
            if tries["count"] % 2 == 0 and tries["count"]:
                tries["skip"] = True
            value = torch.tensor([low + next(stream) * (high - low)], dtype=torch.float64)
            tries["count"] += 1
            if tries["count"] % 2 == 0:
                tries["rest"] = [next(stream), next(stream)]
            return value

        def integer(low, high, size, tries=tries):
            return torch.tensor([int(low + tries["rest"].pop(0) * (high - low))])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", integer)
            patch.setattr(
                torch, "exp", lambda value: torch.tensor(math.exp(float(value)), dtype=torch.float64)
            )
            patch.setattr(
                torch, "log", lambda value: torch.tensor([math.log(x) for x in ratio], dtype=torch.float64)
            )
            expected = TorchvisionCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
        assert own.box(height, width, numbers) == expected


@pytest.mark.parametrize("height, width", [(375, 500), (500, 250), (100, 400)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    """Kolmogorov and Smirnov's test of each side and place, 4000 draws of both."""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = np.array([TorchvisionCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    found = np.array([CROP.box(height, width, numbers) for numbers in CROP.draw(4000, 1)])
    for column in range(4):
        assert stats.ks_2samp(found[:, column], expected[:, column]).pvalue > 1e-3
    area = [values[:, 2] * values[:, 3] / (height * width) for values in (found, expected)]
    assert stats.ks_2samp(*area).pvalue > 1e-3
    inside = (found[:, 0] + found[:, 2] <= height) & (found[:, 1] + found[:, 3] <= width)
    assert inside.all() and (found >= 0).all()


def test_the_whole_image_where_nothing_is_left_to_chance():
    whole = RandomResizedCrop((1.0, 1.0), (1.0, 1.0))
    assert {whole.box(50, 50, numbers) for numbers in whole.draw(20, 0)} == {(0, 0, 50, 50)}
    assert whole.box(50, 80, whole.draw(1, 0)[0]) == (0, 15, 50, 50)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale": [0.5]}, "data.crop.scale must be two numbers in order, above 0 and at most 1"),
        ({"scale": [0, 1]}, "data.crop.scale must be two numbers"),
        ({"scale": [0.5, 1.5]}, "data.crop.scale must be two numbers"),
        ({"scale": [0.9, 0.5]}, "data.crop.scale must be two numbers"),
        ({"ratio": [1, float("inf")]}, "data.crop.ratio must be two numbers in order, above 0; found"),
        ({"ratio": "1"}, "data.crop.ratio must be two numbers"),
        ({"scal": [0.1, 1]}, r"unknown key data.crop.scal .*did you mean 'scale'"),
    ],
)
def test_values_that_make_no_sense(arguments, message):
    with pytest.raises(UsageError, match=message):
        CROPS.build("random_resized", **arguments)


# ------------------------------------------------------------------------------------------------------- decoding


def test_resizing_shrinks_by_area_and_grows_smoothly():
    assert resize(picture(30, 30), 30).shape == (30, 30, 3)
    constant = np.full((90, 20, 3), 77, np.uint8)
    assert np.array_equal(resize(constant, 40), np.full((40, 40, 3), 77, np.uint8))
    checked = np.indices((80, 80)).sum(0) % 2 * 200
    shrunk = resize(np.repeat(checked[..., None], 3, 2).astype(np.uint8), 40)
    assert np.array_equal(shrunk, np.full((40, 40, 3), 100, np.uint8))
    # One axis shrinks, the other grows: no aliasing along the first.
    stripes = np.repeat(np.tile(np.array([0, 200], np.uint8), 40)[:, None], 20, 1)
    mixed = resize(np.repeat(stripes[..., None], 3, 2), 40)
    assert np.array_equal(mixed, np.full((40, 40, 3), 100, np.uint8))


def test_a_large_jpeg_is_decoded_smaller_and_shows_the_same(folder, tmp_path, monkeypatch):
    place = tmp_path / "large" / "a"
    place.mkdir(parents=True)
    (place / "0.jpg").write_bytes(jpeg(picture(900, 1303)))
    source = open_source(place.parent)
    used = []
    monkeypatch.setattr(
        crops, "decode", lambda data, reduced: used.append(reduced) or decode(data, reduced=reduced)
    )
    for numbers in CROP.draw(25, 5):
        found = read_crop(source, 0, CROP, numbers, 100)
        top, left, tall, wide = CROP.box(900, 1303, numbers)
        expected = resize(source.image(0)[top : top + tall, left : left + wide], 100)
        # Edges move by less than a pixel of the crop that is given.
        assert np.abs(found.astype(int) - expected).mean() < 3
    assert {2, 4} <= set(used) <= {2, 4, 8}


def test_what_is_not_smaller_is_decoded_whole_to_the_bit(folder):
    source = open_source(folder)
    for index in range(len(source)):
        for numbers in CROP.draw(5, index):
            image = source.image(index)
            top, left, tall, wide = CROP.box(*image.shape[:2], numbers)
            expected = resize(image[top : top + tall, left : left + wide], 224)
            assert np.array_equal(read_crop(source, index, CROP, numbers, 224), expected)


def test_a_picture_that_its_camera_turned(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    place = tmp_path / "images" / "a"
    place.mkdir(parents=True)
    (place / "0.jpg").write_bytes(jpeg(picture(600, 900), exif=turned))
    source = open_source(place.parent)
    image = source.image(0)
    assert image.shape == (900, 600, 3)
    for numbers in CROP.draw(20, 2):
        top, left, tall, wide = CROP.box(900, 600, numbers)
        expected = resize(image[top : top + tall, left : left + wide], 48)
        assert np.abs(read_crop(source, 0, CROP, numbers, 48).astype(int) - expected).mean() < 4


def test_a_picture_too_large_to_be_decoded_whole_is_decoded_smaller():
    side = math.isqrt(MAX_PIXELS) + 200
    data = jpeg(np.zeros((side, side, 3), np.uint8))
    with pytest.raises(BrokenImage, match="more than the 16 megapixels"):
        decode(data)
    assert decode(data, reduced=2).shape == (-(-side // 2), -(-side // 2), 3)
    with pytest.raises(BrokenImage, match="more than the 1 megapixels"):
        decode(data, max_pixels=1 << 20, reduced=8)


def test_a_broken_image_is_named(folder):
    path = sorted(folder.rglob("*.jpg"))[0]
    path.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(LrfaceError, match=f"{path.name} is not a readable image"):
        read_crop(open_source(folder), 0, CROP, CROP.draw(1, 0)[0], 64)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="shared/data/imagenet_sample is not there")
def test_real_photographs(tmp_path):
    """Reduced or not, crops of real photographs are those of the picture decoded whole."""
    for number, file in enumerate(sorted(SAMPLE.glob("*.jpg"))[:25]):
        place = tmp_path / f"class {number % 5}"
        place.mkdir(exist_ok=True)
        (place / file.name).symlink_to(file)
    source = open_source(tmp_path)
    differences = []
    for index in range(len(source)):
        image = source.image(index)
        for numbers in CROP.draw(4, index):
            top, left, tall, wide = CROP.box(*image.shape[:2], numbers)
            expected = resize(image[top : top + tall, left : left + wide], 56)
            found = read_crop(source, index, CROP, numbers, 56)
            differences.append(np.abs(found.astype(int) - expected).mean())
    # Where it is reduced, edges move by half a pixel of the crop at most, which fine grass and feathers show.
    assert 0 < np.mean(differences) < 4 and max(differences) < 12


# ------------------------------------------------------------------------------------------------------ in training


def steps(folder: Path, first: int, last: int, seed: int = 7, **options: object) -> list[dict]:
    dataset = CroppedDataset(open_source(folder), 32, CROP)
    return list(batches(dataset, 4, seed, first, last, **options))  # type: ignore[arg-type]


def test_any_step_can_be_replayed_with_any_number_of_workers(folder):
    whole = steps(folder, 0, 6)
    assert all(
        batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8 for batch in whole
    )
    for again in (steps(folder, 3, 6), steps(folder, 3, 6, workers=2)):
        for one, other in zip(whole[3:], again, strict=True):
            assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    assert not torch.equal(whole[0]["image"], steps(folder, 0, 1, seed=8)[0]["image"])


def test_an_image_is_cut_anew_in_each_epoch(folder):
    source = open_source(folder)
    dataset = CroppedDataset(source, 32, CROP)
    shown = [dataset.__getitems__(SeededBatch([0], seed, 0, 1))["image"] for seed in range(6)]
    assert len({image.numpy().tobytes() for image in shown}) == 6


def test_ranks_together_see_what_one_process_sees(folder):
    (one,) = steps(folder, 2, 3)
    parts = [steps(folder, 2, 3, part=(rank, 2))[0] for rank in range(2)]
    assert torch.equal(torch.cat([part["image"] for part in parts]), one["image"])
    assert torch.equal(torch.cat([part["label"] for part in parts]), one["label"])


def test_crops_are_never_drawn_without_a_seed(folder):
    with pytest.raises(TypeError, match="a step's seed"):
        CroppedDataset(open_source(folder), 32, CROP).__getitems__([0])


def test_sources_without_files_are_cut_too():
    class Pixels:
        identities, labels, format = ["a", "b"], np.array([0, 1]), "pixels"

        def __len__(self):
            return 2

        def image(self, index):
            return picture(80, 60, index)

        def encoded(self, index):
            return None

        def sources(self):
            return ["0", "1"]

    numbers = CROP.draw(1, 0)[0]
    top, left, tall, wide = CROP.box(80, 60, numbers)
    expected = resize(picture(80, 60, 1)[top : top + tall, left : left + wide], 24)
    assert np.array_equal(read_crop(Pixels(), 1, CROP, numbers, 24), expected)
