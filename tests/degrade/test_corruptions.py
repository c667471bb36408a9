"""The corruptions without the reference code: interface, bad input, replay, and what they do by their definitions."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lrface.degrade.corruptions import (
    CORRUPTIONS,
    GROUPS,
    HELD_OUT,
    MNIST_SEVERITY,
    SETS,
    apply,
    corrupt,
    mnist,
    sample,
)
from lrface.degrade.corruptions import blur as blurs
from lrface.degrade.corruptions.digital import _random_affine, pixelate
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import fast_length
from lrface.degrade.corruptions.jpeg import jpeg
from lrface.degrade.corruptions.pictures import each_picture, jpeg_picture
from lrface.errors import UsageError

# "imagenet_published" differs from "imagenet" in one corruption alone.
ALL = [
    (set, name)
    for set in SETS
    for name in SETS[set].names
    if set != "imagenet_published" or name == "elastic_transform"
]


def pictures(count: int, height: int = 40, width: int = 40, channels: int = 3) -> Tensor:
    """uint8 with smooth shapes and some texture."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    texture = torch.rand(count, channels, height, width, generator=generator)
    return (smooth * 200 + texture * 55).to(torch.uint8)


def for_set(set: str, count: int, height: int = 40, width: int = 40) -> Tensor:
    return pictures(count, height, width, SETS[set].channels)


def test_names() -> None:
    assert len(CORRUPTIONS) == 15 and len(HELD_OUT) == 4 and len(MNIST_SEVERITY) == 15
    assert [name for group in GROUPS.values() for name in group] == [*CORRUPTIONS, *HELD_OUT]
    for set in SETS.values():
        names = MNIST_SEVERITY if set.channels == 1 else (*CORRUPTIONS, *HELD_OUT)
        assert sorted(set.names) == sorted(names)
        assert all(len(constants) == 5 for constants in set.table.values())


@pytest.mark.parametrize(("set", "name"), ALL)
def test_severities_of_a_batch_and_replay(set: str, name: str) -> None:
    images = for_set(set, 7)
    severity = torch.tensor([0, 5, 3, 1, 2, 4, 0])
    parameters = sample(name, severity, (40, 40), set, torch.Generator().manual_seed(3))
    done = apply(images, parameters)
    assert done.dtype == images.dtype and done.shape == images.shape
    assert torch.equal(done[severity == 0], images[severity == 0])
    again = sample(name, severity, (40, 40), set, torch.Generator().manual_seed(3))
    assert torch.equal(apply(images, again), done)
    # What happens to an image depends on its severity and seed alone.
    for one in (1, 4):
        alone = type(parameters)(
            name, set, (40, 40), parameters.severity[one : one + 1], parameters.seed[one : one + 1]
        )
        difference = (apply(images[one : one + 1], alone).int() - done[one : one + 1].int()).abs()
        assert difference.float().mean() < 0.01
    assert not torch.equal(done[1:6], images[1:6]) or (set, name) == ("cifar", "glass_blur")


@pytest.mark.parametrize(("set", "name"), ALL)
def test_float_images(set: str, name: str) -> None:
    images = for_set(set, 5)
    whole = corrupt(images, name, torch.arange(1, 6), set, seed=2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        done = corrupt(images.float().div(255).to(dtype), name, torch.arange(1, 6), set, seed=2)
        assert done.dtype == dtype and done.min() >= 0 and done.max() <= 1
    done = corrupt(images.float() / 255, name, torch.arange(1, 6), set, seed=2)
    # Cut to whole levels (half a level on average), and float inputs are not exactly whole.
    assert (done * 255 - whole).abs().mean() < 1.1


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 1), (2, 3), (17, 60), (61, 23)])
@pytest.mark.parametrize(("set", "name"), ALL)
def test_any_size(set: str, name: str, size: tuple[int, int]) -> None:
    images = for_set(set, 5, *size)
    done = corrupt(images, name, torch.arange(1, 6), set)
    assert done.shape == images.shape
    done = corrupt(images.float() / 255, name, torch.arange(1, 6), set)
    assert done.isfinite().all() and done.min() >= 0 and done.max() <= 1


@pytest.mark.parametrize(("set", "name"), ALL)
def test_bad_input_is_named(set: str, name: str) -> None:
    images = for_set(set, 2, 8, 8)
    for severity in (6, -1):
        with pytest.raises(UsageError, match=f"1 to 5.*found {severity}"):
            corrupt(images, name, severity, set)
    for severity in (2.5, True, "3"):
        with pytest.raises(UsageError, match="whole number"):
            corrupt(images, name, severity, set)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="whole numbers"):
        corrupt(images, name, torch.tensor([1.0, 2.0]), set)
    with pytest.raises(UsageError, match="drawn for 3 images"):
        corrupt(images, name, torch.tensor([1, 2, 3]), set)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(UsageError, match="uint8, or float"):
            corrupt(images.to(dtype), name, 1, set)
    right = SETS[set].channels
    for channels in (1, 2, 3, 4):
        if channels != right:
            wrong = torch.zeros(2, channels, 8, 8)
            with pytest.raises(UsageError, match=f"{right} channels; found {channels}"):
                corrupt(wrong, name, 1, set)
    for shape in ((3, 8, 8), (8, 8)):
        with pytest.raises(UsageError, match="height, width"):
            corrupt(torch.zeros(shape), name, 1, set)
    with pytest.raises(UsageError, match="drawn for 2 images of 9 x 8"):
        apply(images, sample(name, torch.ones(2).long(), (9, 8), set, torch.Generator()))


def test_unknown_names_list_the_known() -> None:
    images = pictures(1)
    with pytest.raises(UsageError, match="'rain'.*gaussian_noise"):
        corrupt(images, "rain", 1)
    with pytest.raises(UsageError, match="'imagenet64'.*cifar"):
        corrupt(images, "fog", 1, "imagenet64")
    with pytest.raises(UsageError, match="'mnist'.*'snow'.*zigzag"):
        corrupt(images, "snow", 1, "mnist")
    with pytest.raises(UsageError, match="0 x 4"):
        sample("fog", torch.tensor([1]), (0, 4), "cifar", torch.Generator())
    assert corrupt(images[:0], "fog", 1).shape == (0, 3, 40, 40)


def test_images_are_not_overwritten() -> None:
    for set, name in ALL:
        whole = for_set(set, 2, 24, 24)
        for images in (whole, whole.float() / 255):
            kept = images.clone()
            corrupt(images, name, 3, set)
            assert torch.equal(images, kept), name


def test_draws_are_uniform_and_independent() -> None:
    draws = Draws(torch.tensor([1, 2, 3, -(2**62)]))
    uniform = draws.uniform("a", 40000).double()
    assert uniform.min() > 0 and uniform.max() < 1
    assert (uniform.mean(1) - 0.5).abs().max() < 0.008
    assert (uniform.var(1, correction=0) - 1 / 12).abs().max() < 0.002
    normal = draws.normal("a", 40000).double()
    assert normal.mean().abs() < 0.015 and (normal.std() - 1).abs() < 0.01
    assert ((normal**4).mean() - 3).abs() < 0.1
    together = torch.cat([normal, draws.normal("b", 40000).double()])
    correlation = torch.corrcoef(together) - torch.eye(8)
    assert correlation.abs().max() < 0.03
    for lag in (1, 7, 200):
        assert (normal[:, lag:] * normal[:, :-lag]).mean(1).abs().max() < 0.03
    bits = draws.bits("a", 40000)
    for bit in range(32):
        assert (((bits >> bit) & 1).double().mean(1) - 0.5).abs().max() < 0.015
    assert torch.equal(draws[1:3].normal("a", 50), draws.normal("a", 50)[1:3])


def test_shuffle_is_the_sequence_that_the_reference_runs() -> None:
    """One pixel after the other from the bottom right takes its partner's colour."""
    for height, width, reach, rounds in ((20, 31, 1, 2), (24, 18, 2, 3), (33, 26, 4, 2), (9, 9, 4, 1)):
        levels = pictures(2, height, width).float()
        draws = Draws(torch.tensor([5, 6]))
        done = blurs.shuffle_pixels(levels, reach, rounds, draws)
        for image in range(2):
            wanted = levels[image].clone().flatten(1)
            for number in range(rounds):
                partners, (rows, columns) = blurs.partners(height, width, reach, number, draws)
                assert (rows.stop - 1, columns.stop - 1) == (height - reach, width - reach)
                for row in range(rows.stop - 1, rows.start - 1, -1):
                    for column in range(columns.stop - 1, columns.start - 1, -1):
                        met = int(partners[image, row - rows.start, column - columns.start])
                        assert abs(met // width - row) <= reach and abs(met % width - column) <= reach
                        wanted[:, row * width + column] = wanted[:, met]
            assert torch.equal(done[image].flatten(1), wanted)


def test_swaps_of_mnist_are_a_sequence() -> None:
    levels = pictures(2, 28, 28, 1).float()
    draws = Draws(torch.tensor([5, 6]))
    done = mnist.swap_pixels(levels.clone(), 2, 2, draws)
    for image in range(2):
        wanted = levels[image, 0].flatten().tolist()
        for number in range(2):
            partners, (rows, columns) = blurs.partners(28, 28, 2, number, draws)
            swapped = draws.bits(f"swapped {number}", *partners.shape[1:]) < 0
            for row in range(rows.stop - 1, rows.start - 1, -1):
                for column in range(columns.stop - 1, columns.start - 1, -1):
                    at = image, row - rows.start, column - columns.start
                    if swapped[at]:
                        here, there = row * 28 + column, int(partners[at])
                        wanted[here], wanted[there] = wanted[there], wanted[here]
        assert done[image, 0].flatten().tolist() == wanted


@pytest.mark.parametrize("size", [(40, 40), (37, 51), (16, 3), (8, 4), (1, 1), (5, 64), (90, 75)])
@pytest.mark.parametrize("quality", [7, 25, 50, 80, 100])
def test_jpeg_is_libjpegs(quality: int, size: tuple[int, int]) -> None:
    images = pictures(40, *size)
    theirs = []
    for image in images:
        stored = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=quality)
        theirs.append(torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1).float())
    by_library = torch.empty_like(images)
    each_picture(images, jpeg_picture(quality), by_library)
    for ours in (jpeg(images.float(), quality), by_library):
        difference = (ours - torch.stack(theirs)).abs()
        assert difference.mean() <= 0.3
        # A coefficient rounded the other way is seen in a whole block: few blocks are few numbers.
        assert np.percentile(difference, 99 if size[0] * size[1] > 100 else 95) <= 3
    with pytest.raises(UsageError, match="1 to 100"):
        jpeg(images.float(), 0)


def test_pixelate_is_pillows() -> None:
    for side, set in ((32, "cifar"), (64, "tiny_imagenet"), (45, "imagenet"), (97, "imagenet")):
        image = pictures(1, side, side + 6)
        for severity in range(1, 6):
            ratio = SETS[set].constants("pixelate", severity, (side, side))
            photograph = Image.fromarray(image[0].permute(1, 2, 0).numpy())
            small = photograph.resize((int((side + 6) * ratio), int(side * ratio)), Image.Resampling.BOX)
            wanted = np.array(small.resize((side + 6, side), Image.Resampling.NEAREST))
            done = corrupt(image, "pixelate", severity, set)[0].permute(1, 2, 0).numpy()
            assert np.abs(done.astype(int) - wanted).max() <= 1
            by_tensors = pixelate(image.float(), ratio, Draws(torch.zeros(1).long()))
            assert np.abs(by_tensors[0].permute(1, 2, 0).numpy() - wanted).max() <= 1


def test_affine_part_of_elastic_is_opencvs() -> None:
    image = pictures(1, 64, 64).float()
    draws = Draws(torch.tensor([8]))
    done = _random_affine(image, 4.0, draws)[0].permute(1, 2, 0).numpy()
    points = np.array([[53, 53], [53, 11], [11, 11]], dtype=np.float32)
    moved = points + (draws.uniform("affine", 3, 2)[0].numpy() * 2 - 1) * 4
    matrix = cv2.getAffineTransform(points, moved.astype(np.float32))
    picture = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    wanted = cv2.warpAffine(picture, matrix, (64, 64), borderMode=cv2.BORDER_REFLECT_101)
    difference = np.abs(done - wanted)
    assert difference.mean() <= 1 and np.percentile(difference, 99) <= 3


def test_faces_are_degraded_as_photographs_seen_at_half_their_size() -> None:
    """Blurs of ImageNet-C at 224 pixels, then halved, against the set "face" at 112."""
    large = torch.nn.functional.interpolate(pictures(3, 28, 28).float(), (224, 224), mode="bicubic").clamp(
        0, 255
    )
    small = torch.nn.functional.avg_pool2d(large, 2)
    for name in ("defocus_blur", "gaussian_blur", "zoom_blur"):
        for severity in (1, 3, 5):
            halved = torch.nn.functional.avg_pool2d(corrupt(large / 255, name, severity, "imagenet"), 2)
            done = corrupt(small / 255, name, severity, "face")
            left_alone = (halved - small / 255).abs().mean()
            assert (halved - done).abs().mean() < 0.25 * left_alone, (name, severity)
    for name in SETS["face"].names:
        for severity in range(1, 6):
            same = SETS["imagenet"].constants(name, severity, (224, 224))
            found = SETS["face"].constants(name, severity, (224, 224))
            assert (
                np.allclose(np.ravel(same), np.ravel(found)) if name != "elastic_transform" else found == same
            )
    assert SETS["face"].constants("glass_blur", 5, (112, 112)) == (0.75, 2, 2)
    assert SETS["face"].constants("motion_blur", 5, (56, 224)) == (10, 7.5)


def test_canny_is_scikit_images() -> None:
    feature = pytest.importorskip("skimage.feature", reason="scikit-image is not installed")
    images = pictures(4, 28, 28, 1)
    images[0] = 0
    cv2.putText(images[0, 0].numpy(), "7", (5, 22), 0, 0.8, 255, 2)
    done = corrupt(images, "canny_edges", 1, "mnist")
    for image, edges in zip(images[:, 0], done[:, 0], strict=True):
        wanted = feature.canny(image.numpy() / 255.0) * 255
        assert (edges.numpy() != wanted).mean() < 0.02


def test_digits_are_turned_and_moved() -> None:
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is not installed")
    digit = torch.zeros(1, 1, 28, 28)
    digit[:, :, 6:22, 9:15] = 0.8
    digit[:, :, 6:10, 9:20] = 0.5
    ways = {
        "rotate": lambda sign, _: np.array(
            [[np.cos(0.4), -np.sin(0.4 * sign)], [np.sin(0.4 * sign), np.cos(0.4)]]
        ),
        "shear": lambda sign, _: np.array([[1, -np.sin(0.4 * sign)], [0, np.cos(0.4)]]),
        "scale": lambda sign, _: np.eye(2) / 0.8,
        "translate": lambda *_: np.eye(2),
    }
    for name, way in ways.items():
        done = corrupt(digit, name, 2, "mnist")[0, 0].numpy()
        candidates = []
        for sign in (-1, 1):
            for other in (-1, 1):
                matrix = np.eye(3)
                matrix[:2, :2] = way(sign, other)
                shift = (
                    2 * np.array([sign, other]) if name == "translate" else 13.5 * (1 - matrix[:2, :2].sum(1))
                )
                matrix[:2, 2] = shift
                candidates.append(transform.warp(digit[0, 0].numpy(), transform.AffineTransform(matrix)))
        assert min(np.abs(done - wanted).max() for wanted in candidates) < 0.01, name
    stripes = corrupt(digit, "stripe", 1, "mnist")
    assert torch.allclose(stripes[..., 7:21], digit[..., 7:21])
    assert torch.allclose(stripes[..., :7], 1 - digit[..., :7])


def test_lines_light_up_what_they_cross() -> None:
    black = torch.zeros(64, 1, 28, 28)
    dotted = corrupt(black, "dotted_line", 1, "mnist")
    # Two columns off, two on.
    lit = dotted.amax(2).squeeze(1) > 0.5
    assert lit.any(1).all()
    assert not lit[:, torch.arange(28) // 2 % 2 == 0].any()
    zigzag = corrupt(black, "zigzag", 1, "mnist")
    assert not zigzag[..., :2].any() and not zigzag[..., 26:].any()
    assert (zigzag.amax((1, 2, 3)) > 0.8).float().mean() > 0.9


def test_zigzag_has_the_teeth_of_its_definition() -> None:
    draws = Draws(torch.arange(30))
    done = mnist.zigzag(torch.zeros(30, 1, 28, 28), 0, draws).clamp(0, 255)
    starts, rises = (
        mnist._integers(draws, *of, 1)[:, 0].tolist() for of in (("row", 0, 27), ("rise", -5, 5))
    )
    for image, start, rise in zip(done, starts, rises, strict=True):
        angle = np.arctan(rise / 23)
        length = 23 / np.cos(angle)
        corners = [(0.0, 0.0)] + [(2.0 + 4 * n, 2.0 * (-1) ** n) for n in range(int((length - 2) // 4) + 1)]
        if length != 4 * (length // 4):
            corners.append((length, corners[-1][1] / (2 * (length - 4 * (length // 4)))))
        turned = [
            (2 + x * np.cos(angle) - y * np.sin(angle), start + x * np.sin(angle) + y * np.cos(angle))
            for x, y in corners
        ]
        wanted = np.zeros((28, 28))
        for (x0, y0), (x1, y1) in zip(turned, turned[1:], strict=False):
            for column in range(28):
                if int(np.floor(x0)) <= column < int(np.ceil(x1)):
                    height = y0 + (y1 - y0) / (x1 - x0) * (column - x0)
                    distance = np.minimum(np.abs(np.arange(28) - height), 2.3 - 1e-9)
                    wanted[:, column] += np.clip(np.log(1 - distance / 2.3) + 1, 0, 1)
            wanted = wanted.clip(0, 1)
        assert np.abs(image[0].numpy() / 255 - wanted).max() < 0.01


def test_fast_lengths_are_the_next_products() -> None:
    products = sorted(2 * 2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for least in range(1, 700):
        assert fast_length(least) == next(product for product in products if product >= least)
