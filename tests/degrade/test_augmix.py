"""AugMix: its operations against Pillow's, its mixture against the formula, its draws."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lrface.degrade.augmix import GEOMETRIC, OPERATIONS, AugMixPolicy, apply_operations
from lrface.degrade.policy import rows_of
from lrface.errors import UsageError

HEIGHT, WIDTH = 32, 40


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """uint8 [n, 3, height, width], of different contrast."""
    random = np.random.default_rng(0)
    found = []
    for number in range(n):
        low = 20 * (number % 3)
        coarse = random.integers(low, 256 - low, (6, 6, 3)).astype(np.uint8)
        found.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def by_pillow(image: np.ndarray, name: str, level: float, negative: bool) -> np.ndarray:
    """uint8 [h, w, 3] -> the same, by the operations of AugMix's authors."""
    picture = Image.fromarray(image)
    sign = -1 if negative else 1
    height, width = image.shape[:2]

    def affine(*matrix: float) -> Image.Image:
        return picture.transform(
            (width, height), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
        )

    shear = sign * level * 0.3 / 10
    done = {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(level * 4 / 10)),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(level * 256 / 10)),
        "rotate": lambda: picture.rotate(sign * int(level * 30 / 10), resample=Image.Resampling.BILINEAR),
        "shear_x": lambda: affine(1, shear, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, shear, 1, 0),
        "translate_x": lambda: affine(1, 0, sign * int(level * width / 3 / 10), 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, sign * int(level * height / 3 / 10)),
    }[name]()
    return np.asarray(done)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name):
    images = smooth(8)
    levels = torch.tensor([0.3, 1.0, 1.7, 2.6, 3.0, 5.5, 7.8, 9.9])
    negative = torch.tensor([False, True] * 4)
    done = apply_operations(images.float(), torch.full((8,), OPERATIONS.index(name)), levels, negative)
    assert done.shape == images.shape and torch.equal(done, done.round())
    for row in range(8):
        theirs = by_pillow(
            images[row].permute(1, 2, 0).numpy(), name, float(levels[row]), bool(negative[row])
        )
        difference = np.abs(done[row].permute(1, 2, 0).numpy() - theirs.astype(np.float32))
        if name in GEOMETRIC:
            # Pillow counts in 16 bits after the point; on the very edge a pixel may be seen as in or out.
            assert np.mean(difference > 1) < 0.01, (row, difference.max())
        else:
            assert difference.max() == 0, row


def test_operations_on_what_has_nothing_to_stretch():
    flat = torch.full((2, 3, 8, 8), 77.0)
    flat[1, :, 0, 0] = 80  # two levels: too few pixels for a step of equalize
    for name in ("autocontrast", "equalize"):
        done = apply_operations(
            flat, torch.full((2,), OPERATIONS.index(name)), torch.ones(2), torch.zeros(2, dtype=torch.bool)
        )
        for row in range(2):
            theirs = by_pillow(flat[row].permute(1, 2, 0).to(torch.uint8).numpy(), name, 1.0, False)
            assert np.array_equal(done[row].permute(1, 2, 0).numpy(), theirs)


def test_each_image_has_operations_of_its_own():
    images = smooth(len(OPERATIONS) + 1).float()
    operation = torch.arange(-1, len(OPERATIONS))
    level, negative = torch.full((len(operation),), 6.0), torch.zeros(len(operation), dtype=torch.bool)
    together = apply_operations(images, operation, level, negative)
    assert torch.equal(together[0], images[0])
    for row in range(len(operation)):
        own = slice(row, row + 1)
        alone = apply_operations(images[own], operation[own], level[own], negative[own])
        torch.testing.assert_close(together[own], alone, atol=1.0, rtol=0)  # a half may be rounded either way
        assert (row == 0) or not torch.equal(alone, images[own])


def test_the_mixture_is_its_formula():
    policy = AugMixPolicy(severity=5, mirror=0.0)
    images = smooth(6).float() / 255
    parameters = policy.sample(6, WIDTH, seeded(3))
    mixed, hq = policy.apply(images, parameters)
    assert torch.equal(hq, images)
    for row in range(6):
        expected = (1 - parameters.mix[row]) * images[row]
        for chain in range(3):
            pixels = (images[row].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            for step in range(3):
                number = int(parameters.operation[row, chain, step])
                if number >= 0:
                    pixels = by_pillow(
                        pixels,
                        OPERATIONS[number],
                        float(parameters.level[row, chain, step]),
                        bool(parameters.negative[row, chain, step]),
                    )
            done = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
            expected = expected + parameters.mix[row] * parameters.weight[row, chain] * done
        # Differences of a level from resampling may be stretched by a later operation, in few pixels.
        assert float((mixed[row] - expected).abs().mean()) < 1 / 255
        assert float((mixed[row] - images[row]).abs().mean()) > 1 / 255


def test_chains_without_operations_give_the_image_back():
    policy = AugMixPolicy(mirror=0.0)
    images = smooth(5).float() / 255
    parameters = policy.sample(5, WIDTH, seeded(0))
    parameters.operation[:] = -1
    torch.testing.assert_close(policy.apply(images, parameters)[0], images, atol=1e-6, rtol=0)


def test_the_result_stays_in_range_and_hq_clean():
    policy = AugMixPolicy(severity=10, mirror=0.5, crop_padding=4)
    images = torch.randint(0, 2, (16, 3, 32, 32), generator=seeded(0)).float()
    kept = images.clone()
    for seed in range(5):
        parameters = policy.sample(16, 32, seeded(seed))
        mixed, hq = policy.apply(images, parameters)
        assert float(mixed.min()) >= 0 and float(mixed.max()) <= 1 + 1e-6
        assert torch.equal(hq, policy.frame(images, parameters)) and torch.equal(images, kept)


def test_draws():
    policy = AugMixPolicy(severity=4, clean_share=0.25)
    parameters = policy.sample(4000, 32, seeded(1))
    assert parameters.operation.shape == (4000, 3, 3)
    depth = (parameters.operation >= 0).sum(-1)
    assert all(abs(int((depth == k).sum()) - 4000) < 5 * (12000 * 2 / 9) ** 0.5 for k in (1, 2, 3))
    assert bool((parameters.operation[..., 0] >= 0).all())
    counts = torch.bincount(parameters.operation[parameters.operation >= 0], minlength=len(OPERATIONS))
    assert len(counts) == 9 and float(counts.max() / counts.min()) < 1.15
    assert 0.1 <= float(parameters.level.min()) < 0.11 and 3.99 < float(parameters.level.max()) <= 4
    torch.testing.assert_close(parameters.weight.sum(1), torch.ones(4000))
    assert abs(float(parameters.weight.mean()) - 1 / 3) < 1e-3
    assert int((parameters.mix == 0).sum()) == 1000
    used = parameters.mix[parameters.mix > 0]
    # Uniform: deviation 0.289, so the mean of 3,000 lies within five of 0.0053.
    assert abs(float(used.mean()) - 0.5) < 0.027 and float(used.min()) < 0.01 and float(used.max()) > 0.99
    assert AugMixPolicy(depth=2, width=1).sample(3, 32, seeded(0)).operation.shape == (3, 1, 2)


def test_the_same_seed_replays_and_rows_can_be_taken_apart():
    policy = AugMixPolicy(clean_share=0.5, crop_padding=4)
    images = smooth(8, 32, 32).float() / 255
    parameters = policy.sample(8, 32, seeded(7))
    mixed, hq = policy.apply(images, parameters)
    assert torch.equal(policy.apply(images, policy.sample(8, 32, seeded(7)))[0], mixed)
    assert not torch.equal(policy.apply(images, policy.sample(8, 32, seeded(8)))[0], mixed)
    part, part_hq = policy.apply(images[4:], rows_of(parameters, slice(4, 8)))
    torch.testing.assert_close(part, mixed[4:], atol=1e-2, rtol=0)
    assert torch.equal(part_hq, hq[4:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"width": 0}, "degrade.width must be at least 1 and degrade.depth at least 0; found 0 and 0"),
        ({"depth": -1}, "degrade.depth at least 0; found 3 and -1"),
        ({"severity": 0.1}, "degrade.severity must lie above 0.1 and up to 10; found 0.1"),
        ({"severity": 11}, "found 11"),
        ({"alpha": 0.0}, "degrade.alpha must be above 0; found 0.0"),
        ({"clean_share": 1.5}, "degrade.clean_share must be between 0 and 1; found 1.5"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(UsageError, match=message):
        AugMixPolicy(**arguments)
