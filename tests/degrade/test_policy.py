import math

import pytest
import torch

from lrface.degrade.policy import ResolutionPolicy
from lrface.degrade.resolution import KERNELS, resample
from lrface.errors import UsageError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def faces(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 112, 112, generator=seeded(seed))


@pytest.mark.parametrize(
    "n, share, clean", [(64, 0.5, 32), (64, 0.25, 16), (7, 1.0, 7), (7, 0.0, 0), (10, 0.33, 3)]
)
def test_the_clean_share_is_exact_in_every_batch(n, share, clean):
    policy = ResolutionPolicy(clean_share=share)
    for seed in range(20):
        assert int((policy.sample(n, 112, seeded(seed)).size == 112).sum()) == clean


def test_every_place_in_the_batch_is_clean_equally_often():
    policy = ResolutionPolicy()
    clean = sum((policy.sample(16, 112, seeded(seed)).size == 112).long() for seed in range(1000))
    # binomial(1000, 1/2): 16 draws outside of 5 standard deviations (15.8) would be a bias
    assert bool(((clean - 500).abs() < 80).all())


def test_sizes_are_uniform():
    sizes = ResolutionPolicy(clean_share=0.0).sample(30_000, 112, seeded(1)).size
    observed = [int((sizes == size).sum()) for size in (56, 28, 14)]
    assert sum(observed) == 30_000
    chi_square = sum((count - 10_000) ** 2 / 10_000 for count in observed)
    assert chi_square < 13.8  # 2 degrees of freedom, one in a thousand


def test_the_continuous_policy_is_log_uniform_and_reaches_both_ends():
    policy = ResolutionPolicy(clean_share=0.0, continuous=(8, 112))
    sizes = policy.sample(60_000, 128, seeded(2)).size
    assert int(sizes.min()) == 8 and int(sizes.max()) == 112
    chi_square = 0.0
    for size in range(8, 113):
        expected = 60_000 * math.log((size + 1) / size) / math.log(113 / 8)
        chi_square += (int((sizes == size).sum()) - expected) ** 2 / expected
    assert chi_square < 154.3  # 104 degrees of freedom, one in a thousand


def test_the_continuous_policy_keeps_the_clean_share_too():
    sizes = ResolutionPolicy(clean_share=0.5, continuous=(8, 56)).sample(64, 112, seeded(3)).size
    assert int((sizes == 112).sum()) == 32 and int((sizes <= 56).sum()) == 32


def test_kernels_are_drawn_uniformly_for_each_image():
    policy = ResolutionPolicy(down=KERNELS, up=("bilinear", "bicubic"))
    parameters = policy.sample(20_000, 112, seeded(4))
    down = torch.bincount(parameters.down, minlength=4).tolist()
    assert sum((count - 5000) ** 2 / 5000 for count in down) < 16.3  # 3 degrees of freedom, one in a thousand
    assert set(parameters.up.tolist()) == {KERNELS.index("bilinear"), KERNELS.index("bicubic")}
    both = torch.stack([parameters.down, parameters.up]).unique(dim=1).shape[1]
    assert both == 8


def test_one_seed_replays_one_batch():
    policy = ResolutionPolicy(continuous=(8, 112), down=KERNELS, up=KERNELS)
    images = faces(12)
    first = policy.apply(images, policy.sample(12, 112, seeded(5)))
    again = policy.apply(images, policy.sample(12, 112, seeded(5)))
    other = policy.apply(images, policy.sample(12, 112, seeded(6)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    policy = ResolutionPolicy(continuous=(8, 112), down=KERNELS)
    policy.apply(faces(4), policy.sample(4, 112, seeded(8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_mirroring_has_its_probability():
    mirrored = ResolutionPolicy(mirror=0.25).sample(40_000, 112, seeded(9)).mirror
    assert abs(mirrored.float().mean().item() - 0.25) < 0.011  # 5 standard deviations
    assert not ResolutionPolicy(mirror=0.0).sample(1000, 112, seeded(9)).mirror.any()
    assert ResolutionPolicy(mirror=1.0).sample(1000, 112, seeded(9)).mirror.all()


def test_what_is_drawn_is_what_is_applied_to_each_image():
    policy = ResolutionPolicy(down=("nearest", "area"), up=("bilinear", "bicubic"), mirror=0.5)
    images = faces(24, seed=10)
    parameters = policy.sample(24, 112, seeded(11))
    degraded, hq = policy.apply(images, parameters)
    assert 0 < int(parameters.mirror.sum()) < 24
    for row in range(24):
        original = images[row].flip(-1) if parameters.mirror[row] else images[row]
        assert torch.equal(hq[row], original)
        down, up = KERNELS[int(parameters.down[row])], KERNELS[int(parameters.up[row])]
        expected = resample(original[None], int(parameters.size[row]), down, up)[0]
        torch.testing.assert_close(degraded[row], expected)


def test_the_input_is_not_changed():
    images = faces(8, seed=12)
    copy = images.clone()
    policy = ResolutionPolicy()
    policy.apply(images, policy.sample(8, 112, seeded(13)))
    assert torch.equal(images, copy)


def test_all_clean_gives_the_originals():
    policy = ResolutionPolicy(clean_share=1.0, mirror=0.0)
    images = faces(4)
    degraded, hq = policy.apply(images, policy.sample(4, 112, seeded(14)))
    assert torch.equal(degraded, images) and torch.equal(hq, images)
    policy = ResolutionPolicy(clean_share=1.0, sizes=(), mirror=0.0)
    assert policy.sample(4, 112, seeded(14)).size.tolist() == [112] * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clean_share": 1.5}, "degrade.clean_share must be between 0 and 1; found 1.5"),
        ({"clean_share": float("nan")}, "degrade.clean_share must be between 0 and 1; found nan"),
        ({"mirror": -0.1}, "degrade.mirror must be between 0 and 1; found -0.1"),
        ({"sizes": ()}, "degrade.sizes must list at least one"),
        ({"sizes": (14, 0)}, "degrade.sizes must list at least one resolution of 1 pixel or more"),
        ({"continuous": (112, 8)}, "degrade.continuous must be .smallest, largest."),
        ({"continuous": (8,)}, "degrade.continuous must be"),
        ({"continuous": (0, 8)}, "degrade.continuous must be"),
        ({"down": ("cubic",)}, "degrade.down must be one of nearest, area, bilinear, bicubic; found 'cubic'"),
        ({"up": ("cubic",)}, "degrade.up must be one of"),
        ({"down": ()}, "must name at least one kernel"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        ResolutionPolicy(**arguments)
