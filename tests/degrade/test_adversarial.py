"""AdA's attack against the one-example-at-a-time reference, and what paper 003 says of it."""

import copy
import statistics
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.degrade.adversarial import (
    Attack,
    ascend,
    corrupted,
    limit_similarity,
    nearest_root,
    perturb,
    perturb_against,
    project,
    radii,
    random_start,
)
from lrface.errors import UsageError
from lrface.losses.ssim import ssim
from lrface.models import build_backbone, build_corruption_network
from lrface.models.per_example import CorruptionNetwork

CLASSES = 4


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Coarse pictures whose class is a colour, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    colours = torch.tensor([[0.8, 0.3, 0.3], [0.3, 0.8, 0.3], [0.3, 0.3, 0.8], [0.7, 0.7, 0.2]])
    coarse = 0.5 * torch.rand(n, 3, 8, 8, generator=generator) + 0.5 * colours[labels][:, :, None, None]
    fine = F.interpolate(coarse, size=24, mode="bicubic") + 0.05 * torch.randn(
        n, 3, 24, 24, generator=generator
    )
    return fine.clamp(0, 1), labels


@cache
def trained(kind: str = "edsr") -> CorruptionNetwork:
    """A small corruption network after a few steps on the pictures: it draws what it is given, roughly."""
    torch.manual_seed(0)
    sizes = (
        {"name": "edsr", "blocks": 2, "features": 8, "scale": 2}
        if kind == "edsr"
        else {"name": "compressive_autoencoder", "width": 8, "code": 8, "blocks": 1}
    )
    network = build_corruption_network(sizes).train()
    images, _ = pictures(64)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(80):
        drawn, wanted = network.training_pair(images)
        optimiser.zero_grad()
        F.l1_loss(drawn, wanted).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


@cache
def classifier() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(build_backbone("cifar_resnet18", width=4), nn.Linear(32, CLASSES)).train()
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(30):
        images, labels = pictures(32, seed=step)
        optimiser.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimiser.step()
    return network.eval()


def norms(perturbation: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double().flatten(1).square().sum(1).sqrt() for name, value in perturbation.items()}


def bounds_of(network: CorruptionNetwork, radius: float) -> dict[str, float]:
    return {
        name: radius * float(value.double().square().sum().sqrt())
        for name, value in network.named_parameters()
    }


def one_at_a_time(
    network: CorruptionNetwork, start: dict[str, Tensor], images: Tensor, labels: Tensor, attack: Attack
) -> tuple[Tensor, dict[str, Tensor]]:
    """Appendix A, written out for one image after another: images and perturbations."""
    bounds = bounds_of(network, attack.radius)
    step = attack.step_size * statistics.median(bounds.values())
    model = copy.deepcopy(classifier()).to(images.dtype)
    out, kept = [], []
    for row in range(len(images)):
        one = copy.deepcopy(network).requires_grad_(True)
        beta = {name: value[row].clone() for name, value in start.items()}
        for _ in range(attack.steps):
            with torch.no_grad():
                for (name, weight), trained in zip(one.named_parameters(), network.parameters(), strict=True):
                    weight.copy_(trained + beta[name])
            loss = F.cross_entropy(model(one(images[row : row + 1])), labels[row : row + 1])
            gradients = torch.autograd.grad(loss, list(one.parameters()))
            for (name, value), gradient in zip(beta.items(), gradients, strict=True):
                value += step * gradient.sign()
                norm = value.norm()
                if norm > bounds[name]:
                    value *= bounds[name] / norm
        with torch.no_grad():
            for (name, weight), trained in zip(one.named_parameters(), network.parameters(), strict=True):
                weight.copy_(trained + beta[name])
            out.append(one(images[row : row + 1]))
        kept.append(beta)
    return torch.cat(out), {name: torch.stack([beta[name] for beta in kept]) for name in start}


@pytest.mark.parametrize("kind", ["edsr", "compressive_autoencoder"])
def test_gradients_are_those_of_one_image_at_a_time(kind):
    """In double precision: in single, rounding takes a value to the other side of a ReLU's corner now and then."""
    network, model = copy.deepcopy(trained(kind)).double(), copy.deepcopy(classifier()).double()
    images, labels = pictures(6)
    images = images.double()
    start = {
        name: value.double() for name, value in random_start(trained(kind), torch.arange(6), 0.05).items()
    }
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    loss = F.cross_entropy(model(corrupted(network, leaves, images)), labels, reduction="sum")
    together = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for row in range(6):
        one = copy.deepcopy(network).requires_grad_(True)
        with torch.no_grad():
            for name, weight in one.named_parameters():
                weight += start[name][row]
        alone = torch.autograd.grad(
            F.cross_entropy(model(one(images[row : row + 1])), labels[row : row + 1]), list(one.parameters())
        )
        largest = max(float(gradient.abs().max()) for gradient in alone)
        assert largest > 0
        for (name, _), gradient in zip(one.named_parameters(), alone, strict=True):
            torch.testing.assert_close(
                together[name][row], gradient, atol=1e-9 * largest, rtol=1e-9, msg=name
            )


def test_the_whole_attack_is_that_of_one_image_at_a_time():
    """In double precision, where no sign of a gradient depends on rounding."""
    network = copy.deepcopy(trained()).double()
    model = copy.deepcopy(classifier()).double()
    images, labels = pictures(5)
    images = images.double()
    attack = Attack(radius=0.02, steps=4)
    start = {name: value.double() for name, value in random_start(trained(), torch.arange(5), 0.02).items()}
    together = {name: value.clone() for name, value in start.items()}

    def loss(seen: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(seen), labels, reduction="none")

    ascend(network, together, images, labels, loss, attack)
    wanted, perturbation = one_at_a_time(network, start, images, labels, attack)
    for name, value in together.items():
        scale = bounds_of(network, 0.02)[name] / value[0].numel() ** 0.5
        torch.testing.assert_close(value, perturbation[name], atol=1e-4 * scale, rtol=1e-4)
    torch.testing.assert_close(corrupted(network, together, images), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 0.0075, 0.015, 0.2])
@pytest.mark.parametrize("kind", ["edsr", "compressive_autoencoder"])
def test_each_perturbation_stays_within_its_radius_on_every_layer(kind, radius):
    network = trained(kind)
    images, labels = pictures(8)
    found = perturb(
        images,
        labels,
        classifier(),
        network,
        torch.arange(8),
        Attack(radius=radius, steps=3, step_size=1.0),
        similarity=None,
        keep=True,
    )
    assert found.perturbation is not None
    bounds = bounds_of(network, radius)
    shares = []
    for name, norm in norms(found.perturbation).items():
        assert norm.shape == (8,) and bool((norm <= bounds[name] * (1 + 1e-5)).all()), name
        shares.append(norm / bounds[name] if radius else norm)
    torch.testing.assert_close(found.share.double(), torch.stack(shares, 1), atol=1e-5, rtol=0)
    if radius:  # FGSM with a large step ends on the surface
        assert float(found.share.median()) == pytest.approx(1, abs=1e-4)
    else:
        # The autoencoder's code may turn over by rounding here and there.
        assert float((found.images - network(images)).abs().mean()) < 1e-4


def test_a_layer_of_zeros_has_no_radius_and_stays():
    network = copy.deepcopy(trained())
    with torch.no_grad():
        network.gather.bias.zero_()
    images, labels = pictures(2)
    found = perturb(
        images, labels, classifier(), network, torch.arange(2), Attack(radius=0.1, steps=2), keep=True
    )
    assert found.perturbation is not None and bool(torch.isfinite(found.images).all())
    assert float(found.perturbation["gather.bias"].abs().max()) == 0
    names = [name for name, _ in network.named_parameters()]
    assert float(found.share[:, names.index("gather.bias")].abs().max()) == 0


def test_the_start_is_uniform_in_the_ball():
    network = trained()
    start = random_start(network, torch.arange(2000), 0.5)
    bounds = bounds_of(network, 0.5)
    for name in ("output.bias", "head.bias", "head.weight"):
        own = start[name]
        share = (norms({name: own})[name] / bounds[name]) ** own[0].numel()
        # The volume within its radius is uniform in [0, 1], and no direction is preferred.
        assert float(share.max()) <= 1 + 1e-4
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(share.std()) == pytest.approx(12**-0.5, abs=0.02)
        assert float(own.mean(0).norm()) < 0.1 * bounds[name]


def test_the_start_of_an_image_depends_on_its_seed_alone():
    network = trained()
    together = random_start(network, torch.tensor([5, -3, 2**62]), 0.1)
    alone = random_start(network, torch.tensor([-3]), 0.1)
    for name, value in together.items():
        torch.testing.assert_close(value[1:2], alone[name], atol=1e-7, rtol=1e-5)
        assert not torch.equal(value[0], value[1])


def test_projection():
    values = {"a": torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
    project(values, {"a": 1.0})
    torch.testing.assert_close(values["a"], torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_the_loss_rises():
    """On at least 95 % of the images, above the random start and above the clean image."""
    network, model = trained(), classifier()
    images, labels = pictures(64, seed=99)
    found = perturb(images, labels, model, network, torch.arange(64), Attack(radius=0.03))
    with torch.no_grad():
        after = F.cross_entropy(model(found.images), labels, reduction="none")
        before = F.cross_entropy(model(images), labels, reduction="none")
    assert found.losses.shape == (10, 64)
    assert float((after >= found.losses[0]).float().mean()) >= 0.95
    assert float((after >= before).float().mean()) >= 0.95
    assert float(after.mean()) > 1.2 * float(before.mean())
    start = random_start(network, torch.arange(64), 0.03)
    with torch.no_grad():
        of_start = F.cross_entropy(model(corrupted(network, start, images)), labels, reduction="none")
    torch.testing.assert_close(found.losses[0], of_start, atol=1e-4, rtol=1e-4)


def test_the_classifier_and_the_network_stay_as_they_are():
    network, model = copy.deepcopy(trained()).requires_grad_(True), copy.deepcopy(classifier())
    images, labels = pictures(4)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    perturb(images, labels, model, network, torch.arange(4), Attack(steps=2))
    assert all(value.grad is None for part in (model, network) for value in part.parameters())
    for part, kept in zip((model, network), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in part.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_are_not_seen_in_the_result():
    images, labels = pictures(7)
    runs = [
        perturb(
            images, labels, classifier(), trained(), torch.arange(7), Attack(steps=1, chunk=chunk), keep=True
        )
        for chunk in (7, 3, 1)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(runs[0].images, other.images, atol=1e-4, rtol=0)
        torch.testing.assert_close(runs[0].losses, other.losses, atol=1e-4, rtol=1e-3)
        assert other.perturbation is not None and len(other.perturbation["head.bias"]) == 7


def test_bfloat16_comes_to_much_the_same():
    images, labels = pictures(16)
    full, half = (
        perturb(
            images, labels, classifier(), trained(), torch.arange(16), Attack(radius=0.03, precision=kind)
        )
        for kind in ("float32", "bfloat16")
    )
    assert half.images.dtype == torch.float32 and half.losses.dtype == torch.float32
    assert float(half.losses[-1].mean()) == pytest.approx(float(full.losses[-1].mean()), rel=0.25)
    assert float(half.losses[-1].mean()) > 2 * float(half.losses[0].mean())


def test_any_loss_can_be_climbed():
    """Darkness: no classifier is asked."""
    images, labels = pictures(4)
    found = perturb_against(
        lambda seen, _: -seen.mean((1, 2, 3)), images, labels, trained(), torch.arange(4), Attack(radius=0.02)
    )
    assert bool((found.images.mean((1, 2, 3)) < trained()(images).mean((1, 2, 3))).all())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"radius": -0.1}, "method.radius must be at least 0; found -0.1"),
        ({"step_size": float("nan")}, "method.step_size must be at least 0"),
        ({"steps": -1}, "method.steps must be at least 0 and method.chunk at least 1; found -1 and 32"),
        ({"chunk": 0}, "method.chunk at least 1; found 10 and 0"),
        ({"precision": "half"}, "method.precision must be float32 or bfloat16; found 'half'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UsageError, match=message):
        Attack(**settings)


def test_radii_are_relative_to_the_norm_of_weights_and_biases_by_themselves():
    network = trained()
    found = radii(network, 0.015)
    assert set(found) == {name for name, _ in network.named_parameters()}
    assert found["head.weight"] == pytest.approx(0.015 * float(network.head.weight.norm()), rel=1e-6)
    assert found["head.bias"] == pytest.approx(0.015 * float(network.head.bias.norm()), rel=1e-6)


# ------------------------------------------------------------------------------------------------- line search


def damaged(n: int = 200) -> tuple[Tensor, Tensor]:
    """Pictures beside ones that have lost little or everything, each in its own way."""
    clean, _ = pictures(n, seed=1)
    generator = torch.Generator().manual_seed(2)
    amount = torch.rand(n, 1, 1, 1, generator=generator)
    noisy = clean + amount * torch.randn(clean.shape, generator=generator)
    inverted = clean + 1.2 * amount * (1 - 2 * clean)
    shifted = torch.lerp(clean, clean.roll((3, 5), (2, 3)), amount)
    kind = torch.arange(n)[:, None, None, None] % 3
    return clean, torch.where(kind == 0, noisy, torch.where(kind == 1, inverted, shifted)).clamp(0, 1)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_what_had_lost_too_much_ends_at_the_threshold(threshold):
    clean, found = damaged()
    limited, gamma, measured = limit_similarity(clean, found, threshold)
    torch.testing.assert_close(measured, ssim(clean, found), atol=1e-6, rtol=0)
    exceeded = measured < threshold
    assert 30 < int(exceeded.sum()) < 190
    away = (ssim(clean, limited) - threshold)[exceeded].abs()
    assert float((away <= 0.03).float().mean()) >= 0.9
    assert float(away.median()) < 0.005
    assert torch.equal(limited[~exceeded], found[~exceeded])  # to the bit
    assert bool((gamma[~exceeded] == 1).all()) and bool((gamma[exceeded] < 1).all())
    mix = gamma[:, None, None, None]
    torch.testing.assert_close(limited, (1 - mix) * clean + mix * found, atol=1e-6, rtol=0)


def test_one_pass_is_the_papers_fit_of_nine_places():
    """For one image after another, by NumPy: the polynomial, its roots, the one in [0, 1] nearest to 1."""
    numpy = pytest.importorskip("numpy")
    clean, found = damaged(30)
    clean, found = clean.double(), found.double()
    limited, gamma, measured = limit_similarity(clean, found, 0.4, passes=1)
    for row in range(30):
        if float(measured[row]) >= 0.4:
            continue
        places = numpy.linspace(0, 1, 9)
        values = [
            float(ssim(clean[row : row + 1], torch.lerp(clean[row : row + 1], found[row : row + 1], place)))
            - 0.4
            for place in places
        ]
        fitted = numpy.polynomial.Polynomial.fit(places, values, 2, domain=[0, 1], window=[0, 1])
        roots = [float(r.real) for r in fitted.roots() if abs(r.imag) < 1e-12 and 0 <= r.real <= 1]
        wanted = max(roots) if roots else float(fitted(1) > 0)
        assert float(gamma[row]) == pytest.approx(wanted, abs=1e-6)


def test_a_second_pass_brings_images_nearer():
    clean, found = damaged()
    once, twice = (limit_similarity(clean, found, 0.3, passes=passes) for passes in (1, 2))
    exceeded = once[2] < 0.3
    errors = [(ssim(clean, each[0]) - 0.3)[exceeded].abs().mean() for each in (once, twice)]
    assert float(errors[1]) < 0.5 * float(errors[0])


def test_roots():
    """(curve, slope, constant) -> the root in [0, 1] nearest to 1."""
    cases = [
        ((1.0, -1.0, 0.21), 0.7),  # 0.3 and 0.7
        ((1.0, -2.0, 0.75), 0.5),  # 0.5 and 1.5: the one above 1 does not count
        ((-1.0, -0.2, 0.24), 0.4),  # -0.6 and 0.4
        ((0.0, -2.0, 0.5), 0.25),  # a line
        ((0.0, 0.0, 1.0), 1.0),  # none, positive
        ((0.0, 0.0, -1.0), 0.0),  # none, negative
        ((1.0, 0.0, 1.0), 1.0),  # complex ones, positive
        ((-1.0, 0.0, -1.0), 0.0),
        ((1.0, -3.0, 2.0), 1.0),  # 1 and 2
        ((1.0, -1e9, 0.5e9), 0.5),  # nothing cancels
    ]
    coefficients = torch.tensor([case for case, _ in cases], dtype=torch.float64)
    assert nearest_root(*coefficients.unbind(1)).tolist() == pytest.approx(
        [root for _, root in cases], rel=1e-8
    )


def test_no_limit_and_equal_images():
    clean, found = damaged(6)
    limited, gamma, _ = limit_similarity(clean, found, None)
    assert limited is found and bool((gamma == 1).all())
    limited, gamma, measured = limit_similarity(clean, clean, 0.3)
    assert torch.equal(limited, clean) and measured.tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_the_limit_of_the_attack():
    images, labels = pictures(16)
    wide = Attack(radius=0.6, steps=3)
    free = perturb(images, labels, classifier(), trained(), torch.arange(16), wide, similarity=None)
    held = perturb(images, labels, classifier(), trained(), torch.arange(16), wide, similarity=0.5)
    assert torch.equal(free.similarity, held.similarity)
    exceeded = held.similarity < 0.5
    assert int(exceeded.sum()) >= 4
    assert float((ssim(images, held.images)[exceeded] - 0.5).abs().max()) < 0.03
    assert bool(((held.gamma < 1) == exceeded).all()) and bool((free.gamma == 1).all())
