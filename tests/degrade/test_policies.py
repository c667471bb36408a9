"""Policies by name: shares, draws, replay, and what they leave alone."""

import pytest
import torch

from lrface.degrade import corruptions
from lrface.degrade.policies import POLICIES, build_policy
from lrface.degrade.policy import rows_of
from lrface.errors import UsageError

SIZE = 32
CHEAP = ["gaussian_noise", "contrast", "brightness"]
MIXED = {
    "parts": [
        {"name": "resolution", "sizes": [16, 8], "share": 1},
        {"name": "corruptions", "set": "cifar", "names": CHEAP, "share": 2},
    ],
}
CHAIN = {
    "parts": [
        {"name": "corruptions", "set": "cifar", "names": CHEAP, "clean_share": 0.5},
        {"name": "resolution", "sizes": [16, 8]},
    ],
}
EXAMPLES = {
    "clean": {"crop_padding": 4},
    "resolution": {"sizes": [16, 8]},
    "corruptions": {"set": "cifar", "names": CHEAP, "crop_padding": 4},
    "augmix": {"clean_share": 0.5, "crop_padding": 4},
    "gaussian_noise": {"sigma": [0.08, 0.38], "crop_padding": 4},
    "speckle_noise": {"crop_padding": 4},
    "pixel_mask": {"missing_range": [0.5, 0.95], "crop_padding": 4},
    "gaussian_blur": {"kernel": 5, "sigma_range": [1, 2], "crop_padding": 4},
    "mixed": {**MIXED, "crop_padding": 4},
    "chain": {**CHAIN, "crop_padding": 4},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=seeded(seed)).float() / 255


def changed(degraded: torch.Tensor, hq: torch.Tensor) -> torch.Tensor:
    return (degraded != hq).flatten(1).any(1)


def test_names():
    assert POLICIES.names() == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_seed_gives_the_same_batch_and_another_seed_another(name):
    policy, images = build_policy(name, **EXAMPLES[name]), pictures(12)
    first, second = (policy.apply(images, policy.sample(12, SIZE, seeded(5))) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(policy.apply(images, policy.sample(12, SIZE, seeded(6)))[0], first[0])
    # Drawing leaves the global generator alone, and applying draws nothing.
    before = torch.get_rng_state()
    policy.apply(images, policy.sample(12, SIZE, seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", EXAMPLES)
def test_hq_is_the_framed_original_and_the_input_stays(name):
    policy, images = build_policy(name, **EXAMPLES[name]), pictures(12)
    kept = images.clone()
    parameters = policy.sample(12, SIZE, seeded(5))
    degraded, hq = policy.apply(images, parameters)
    assert torch.equal(images, kept)
    assert torch.equal(hq, policy.frame(images, parameters))
    assert degraded.shape == hq.shape == images.shape and degraded.dtype == torch.float32
    assert float(degraded.min()) >= 0 and float(degraded.max()) <= 1 + 1e-6
    assert int(changed(degraded, hq).sum()) == (0 if name == "clean" else 6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_parts_of_a_batch_are_what_the_whole_batch_is(name):
    """What the ranks of a distributed run see together is what one process sees."""
    policy, images = build_policy(name, **EXAMPLES[name]), pictures(12)
    parameters = policy.sample(12, SIZE, seeded(9))
    degraded, hq = policy.apply(images, parameters)
    for first in (0, 4, 8):
        own = slice(first, first + 4)
        part, part_hq = policy.apply(images[own], rows_of(parameters, own))
        torch.testing.assert_close(part, degraded[own], atol=1e-6, rtol=0)
        assert torch.equal(part_hq, hq[own])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "clean"])
@pytest.mark.parametrize("n, share, clean", [(64, 0.5, 32), (10, 0.33, 3), (7, 1.0, 7), (7, 0.0, 0)])
def test_the_clean_share_is_exact(name, n, share, clean):
    arguments = {**EXAMPLES[name], "clean_share": share, "mirror": 0.0}
    if name == "chain":  # no image passes all parts as it is
        arguments["parts"] = [{**part, "clean_share": 0} for part in arguments["parts"]]
    policy = build_policy(name, **arguments)
    for seed in range(3):
        parameters = policy.sample(n, SIZE, seeded(seed))
        degraded, hq = policy.apply(pictures(n), parameters)
        assert int((~changed(degraded, hq)).sum()) == clean


def test_corruptions_and_severities_are_uniform_and_independent():
    policy = build_policy("corruptions", set="cifar", clean_share=0.25)
    parameters = policy.sample(20_000, SIZE, seeded(1))
    assert policy.names == corruptions.CORRUPTIONS and len(policy.names) == 15
    corrupted = parameters.severity > 0
    assert int(corrupted.sum()) == 15_000
    cells = (parameters.name * 5 + parameters.severity - 1)[corrupted]
    observed = torch.bincount(cells, minlength=75).double()
    assert len(observed) == 75
    chi_square = float(((observed - 200) ** 2 / 200).sum())
    assert chi_square < 119  # 74 degrees of freedom, one in a thousand
    assert len(parameters.seed.unique()) == 20_000


def test_every_image_gets_the_corruption_and_severity_it_drew():
    policy = build_policy("corruptions", set="cifar", names=CHEAP, severities=[1, 4], mirror=0.0)
    images = pictures(24)
    parameters = policy.sample(24, SIZE, seeded(2))
    degraded, hq = policy.apply(images, parameters)
    assert torch.equal(hq, images)
    assert set(parameters.severity.tolist()) == {0, 1, 4}
    for row in range(24):
        own = slice(row, row + 1)
        alone = corruptions.apply(
            images[own],
            corruptions.CorruptionParameters(
                CHEAP[int(parameters.name[row])],
                "cifar",
                (SIZE, SIZE),
                parameters.severity[own],
                parameters.seed[own],
            ),
        )
        torch.testing.assert_close(degraded[own], alone, atol=1e-6, rtol=0)


def test_all_fifteen_corruptions_of_all_sets_in_one_batch():
    for kind, size in (("imagenet", 64), ("cifar", 32), ("tiny_imagenet", 64), ("face", 112)):
        policy = build_policy("corruptions", set=kind, clean_share=0.0)
        images = pictures(45, size=size).contiguous(memory_format=torch.channels_last)
        parameters = policy.sample(45, size, seeded(3))
        parameters.name[:] = torch.arange(45) % 15
        degraded, hq = policy.apply(images, parameters)
        assert bool(torch.isfinite(degraded).all()) and int(changed(degraded, hq).sum()) >= 44


def test_mixed_shares_are_exact():
    policy = build_policy("mixed", **MIXED, clean_share=0.4)
    for seed in range(10):
        part = policy.sample(60, SIZE, seeded(seed)).part
        assert [int((part == number).sum()) for number in (-1, 0, 1)] == [24, 12, 24]
    places = sum((policy.sample(10, SIZE, seeded(seed)).part == 0).long() for seed in range(1000))
    assert bool(((places - 200).abs() < 64).all())  # binomial(1000, 1/5), five standard deviations


def test_mixed_is_each_part_on_its_images():
    policy = build_policy("mixed", **MIXED, mirror=0.0)
    images = pictures(24)
    parameters = policy.sample(24, SIZE, seeded(4))
    degraded, _ = policy.apply(images, parameters)
    for number, part in enumerate(policy.parts):
        alone = part.degrade(images, parameters.parts[number])
        chosen = parameters.part == number
        torch.testing.assert_close(degraded[chosen], alone[chosen], atol=1e-6, rtol=0)
    assert torch.equal(degraded[parameters.part < 0], images[parameters.part < 0])


def test_chain_is_one_part_after_another():
    policy = build_policy("chain", **CHAIN, clean_share=0.25, mirror=0.0)
    images = pictures(24)
    parameters = policy.sample(24, SIZE, seeded(4))
    first = policy.parts[0].degrade(images, parameters.parts[0])
    second = policy.parts[1].degrade(first, parameters.parts[1])
    expected = torch.where(parameters.clean[:, None, None, None], images, second)
    torch.testing.assert_close(policy.apply(images, parameters)[0], expected, atol=1e-6, rtol=0)
    assert int(parameters.clean.sum()) == 6
    assert int((parameters.parts[0].severity == 0).sum()) == 12 and bool(
        (parameters.parts[1].size < SIZE).all()
    )


def test_policies_can_be_nested():
    policy = build_policy("mixed", parts=[{"name": "chain", **CHAIN}, "augmix"], clean_share=0.5)
    parameters = policy.sample(16, SIZE, seeded(0))
    degraded, hq = policy.apply(pictures(16), parameters)
    assert bool((~changed(degraded, hq))[parameters.part < 0].all())
    assert int((parameters.part >= 0).sum()) == 8


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("corruption", {}, r"unknown degrade 'corruption' \(did you mean 'corruptions'\?\)"),
        ("corruptions", {"severity": 3}, r"unknown key degrade.severity .*did you mean 'severities'"),
        (
            "corruptions",
            {"set": "cifar-10"},
            "no set of corruptions is called 'cifar-10'; there are imagenet",
        ),
        ("corruptions", {"set": "mnist"}, "degrade.set 'mnist' is for grey images"),
        ("corruptions", {"names": ["rain"]}, "no corruption of the set 'face' is called 'rain'"),
        ("corruptions", {"names": "fog"}, "degrade.names must list at least one corruption; found 'fog'"),
        ("corruptions", {"names": []}, r"degrade.names must list at least one corruption; found \[\]"),
        ("corruptions", {"severities": [0, 1]}, "degrade.severities must be whole numbers, 1 to 5; found 0"),
        ("corruptions", {"severities": [True]}, "1 to 5; found True"),
        ("corruptions", {"severities": 3}, "degrade.severities must list at least one of 1 to 5; found 3"),
        ("corruptions", {"clean_share": 1.1}, "degrade.clean_share must be between 0 and 1; found 1.1"),
        ("resolution", {"sizes": 14}, "degrade.sizes must be a list; found 14"),
        ("mixed", {}, r"degrade.parts must list policies.*found \(\)"),
        ("mixed", {"parts": {"name": "augmix"}}, "degrade.parts must list policies"),
        ("mixed", {"parts": [3]}, "degrade.parts.0 must be a mapping with a name and arguments; found 3"),
        ("mixed", {"parts": ["augmix", {"name": "clean"}]}, "degrade.parts.1: a part must degrade"),
        (
            "mixed",
            {"parts": [{"name": "augmix", "mirror": 0.5}]},
            "parts.0.mirror: give degrade.mirror of the mixed",
        ),
        (
            "mixed",
            {"parts": [{"name": "augmix", "clean_share": 1}]},
            "parts.0.clean_share: give degrade.clean_share",
        ),
        (
            "mixed",
            {"parts": [{"name": "augmix", "share": -1}]},
            "parts.0.share must be a number of 0 or more; found -1",
        ),
        (
            "mixed",
            {"parts": [{"name": "augmix", "share": 0}]},
            "degrade.parts: at least one share must be above 0",
        ),
        ("mixed", {"parts": [{"name": "augmix", "deep": 2}]}, "degrade.parts.0: unknown key degrade.deep"),
        (
            "chain",
            {"parts": [{"name": "augmix", "share": 1}]},
            "parts.0.share: give degrade.share of the chain",
        ),
    ],
)
def test_what_is_wrong_is_named(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        build_policy(name, **arguments)


def test_threads_are_as_before_whatever_happens(monkeypatch):
    policy = build_policy("corruptions", set="cifar", names=CHEAP)
    before, seen = torch.get_num_threads(), []
    original = corruptions.apply

    def watched(images, parameters):
        seen.append(torch.get_num_threads())
        return original(images, parameters)

    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(corruptions, "apply", watched)
        policy.apply(pictures(8), policy.sample(8, SIZE, seeded(0)))
        assert set(seen) == {1} and torch.get_num_threads() == 2
        monkeypatch.setattr(corruptions, "apply", lambda images, parameters: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.apply(pictures(8), policy.sample(8, SIZE, seeded(0)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
