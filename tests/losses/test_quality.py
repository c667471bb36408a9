import copy
import math
from pathlib import Path

import pytest
import torch
import torchvision

from lrface.errors import LrfaceError, UsageError
from lrface.losses import build_quality, quality_loss


def images(seed: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(2, 3, 4, 4, generator=generator)


def test_is_the_mean_absolute_difference_to_the_clean_image():
    reconstruction, hq = images(0, -0.5, 1.5), images(1)
    clipped = total = 0.0
    for mine, wanted in zip(reconstruction.flatten().tolist(), hq.flatten().tolist(), strict=True):
        clipped += abs(min(1.0, max(0.0, mine)) - wanted)
        total += abs(mine - wanted)
    assert quality_loss(reconstruction, hq).item() == pytest.approx(clipped / 96, rel=1e-5)
    assert quality_loss(reconstruction, hq, clip=False).item() == pytest.approx(total / 96, rel=1e-5)
    assert clipped < total  # some pixels were outside


def test_does_not_depend_on_image_size_or_batch_size():
    one = quality_loss(torch.full((1, 3, 8, 8), 0.25), torch.zeros(1, 3, 8, 8))
    many = quality_loss(torch.full((5, 3, 32, 32), 0.25), torch.zeros(5, 3, 32, 32))
    assert one.item() == pytest.approx(0.25) and many.item() == pytest.approx(0.25)


def test_a_clipped_pixel_has_no_gradient():
    reconstruction = images(2, -0.5, 1.5).requires_grad_()
    quality_loss(reconstruction, images(3)).backward()
    outside = (reconstruction.detach() < 0) | (reconstruction.detach() > 1)
    assert 0 < int(outside.sum()) < outside.numel()
    assert bool((reconstruction.grad[outside] == 0).all())
    assert torch.allclose(reconstruction.grad[~outside].abs(), torch.tensor(1 / 96))


def test_without_clipping_every_pixel_has_a_gradient():
    reconstruction = images(2, -0.5, 1.5).requires_grad_()
    quality_loss(reconstruction, images(3), clip=False).backward()
    assert torch.allclose(reconstruction.grad.abs(), torch.tensor(1 / 96))


@pytest.mark.parametrize("clip", [True, False])
def test_gradient(clip):
    reconstruction = images(4, -0.5, 1.5).double().requires_grad_()
    hq = images(5).double()
    assert torch.autograd.gradcheck(lambda x: quality_loss(x, hq, clip), (reconstruction,))


def test_half_precision_is_averaged_in_float32():
    loss = quality_loss(
        torch.full((1, 3, 64, 64), 0.5, dtype=torch.bfloat16), torch.full((1, 3, 64, 64), 0.25)
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.25)


def test_shapes_that_differ_are_refused():
    with pytest.raises(UsageError, match=r"\(2, 3, 4, 4\) and the clean image \(2, 3, 8, 8\)"):
        quality_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


# The other losses of Table C.1.


def test_l2_is_the_mean_squared_difference():
    reconstruction, hq = images(0, -0.5, 1.5), images(1)
    clipped = total = 0.0
    for mine, wanted in zip(reconstruction.flatten().tolist(), hq.flatten().tolist(), strict=True):
        clipped += (min(1.0, max(0.0, mine)) - wanted) ** 2
        total += (mine - wanted) ** 2
    loss = build_quality("l2")
    assert loss(reconstruction, hq).item() == pytest.approx(clipped / 96, rel=1e-5)
    assert loss(reconstruction, hq, clip=False).item() == pytest.approx(total / 96, rel=1e-5)


def test_l1_by_name_is_the_loss_of_the_paper():
    reconstruction, hq = images(0, -0.5, 1.5), images(1)
    for clip in (True, False):
        assert torch.equal(
            build_quality("l1")(reconstruction, hq, clip), quality_loss(reconstruction, hq, clip)
        )


@pytest.mark.parametrize("clip", [True, False])
def test_the_likelihood_is_that_of_a_gaussian_a_pixel(clip):
    loss = build_quality({"name": "likelihood", "minimum": 0.2})
    torch.manual_seed(0)
    for part in (loss.mean, loss.log_deviation):
        torch.nn.init.normal_(part.weight, std=0.3)
        torch.nn.init.normal_(part.bias, mean=-1.0, std=0.5)
    reconstruction, hq = images(6, -0.5, 1.5), images(7)
    with torch.no_grad():
        mean, deviation = loss.mean(reconstruction), loss.log_deviation(reconstruction).exp()
    expected, bounded = 0.0, 0
    for mu, sigma, x in zip(mean.flatten(), deviation.flatten(), hq.flatten(), strict=True):
        mu, sigma = mu.item(), sigma.item()
        mu = min(1.0, max(0.0, mu)) if clip else mu
        bounded += sigma < 0.2
        sigma = max(0.2, sigma)
        density = math.exp(-((x.item() - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        expected -= math.log(density) / 96
    assert 0 < bounded < 96
    assert loss(reconstruction, hq, clip).item() == pytest.approx(expected, rel=1e-4)


def test_a_fresh_likelihood_is_half_the_squared_difference_and_has_two_convolutions():
    loss = build_quality("likelihood")
    reconstruction, hq = images(0), images(1)
    expected = (reconstruction - hq).square().mean().item() / 2 + 0.5 * math.log(2 * math.pi)
    assert loss(reconstruction, hq).item() == pytest.approx(expected, rel=1e-5)
    assert sorted((tuple(value.shape), value.requires_grad) for value in loss.parameters()) == [
        ((3,), True),
        ((3,), True),
        ((3, 3, 3, 3), True),
        ((3, 3, 3, 3), True),
    ]


@pytest.mark.parametrize("name", ["l2", "likelihood"])
@pytest.mark.parametrize("clip", [True, False])
def test_gradients_of_the_others(name, clip):
    torch.manual_seed(0)
    loss = build_quality(name).double()
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reconstruction, hq = images(4, -0.5, 1.5).double().requires_grad_(), images(5).double()
    parameters = list(loss.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: loss(x, hq, clip), (reconstruction, *parameters))


@pytest.mark.parametrize("name", ["l1", "l2", "likelihood"])
def test_low_precision_and_shapes_of_the_others(name):
    loss = build_quality(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(images(0).bfloat16(), images(1)).dtype == torch.float32
    with pytest.raises(UsageError, match=r"\(2, 3, 4, 4\) and the clean image \(2, 3, 8, 8\)"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """torchvision's VGG16 without its classifier, of random weights: the layout is what matters here."""
    torch.manual_seed(0)
    network = torchvision.models.vgg16(weights=None)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({k: v for k, v in network.state_dict().items() if k.startswith("features.")}, path)
    return network.features.eval(), path


def test_the_perceptual_loss_compares_features_of_vgg16(vgg16):
    network, path = vgg16
    loss = build_quality({"name": "perceptual", "weights": str(path)})
    reconstruction, hq = images(0, -0.5, 1.5), images(1)
    mean, deviation = (
        torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )

    def features(x):  # up to relu3_3, the sixteenth layer of torchvision's network
        return network[:16]((x - mean) / deviation)

    with torch.no_grad():
        for clip in (True, False):
            seen = reconstruction.clamp(0, 1) if clip else reconstruction
            expected = ((features(seen) - features(hq)) ** 2).mean().item()
            assert expected > 0
            assert loss(reconstruction, hq, clip).item() == pytest.approx(expected, rel=1e-4)
    reconstruction.requires_grad_()
    loss(reconstruction, hq, False).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_the_perceptual_loss_reads_safetensors_too(vgg16, tmp_path):
    from safetensors.torch import save_file

    save_file(torch.load(vgg16[1], weights_only=True), tmp_path / "vgg16.safetensors")
    losses = [
        build_quality({"name": "perceptual", "weights": str(path)})
        for path in (vgg16[1], tmp_path / "vgg16.safetensors")
    ]
    assert losses[0](images(0), images(1)).item() == losses[1](images(0), images(1)).item()


def test_weights_of_vgg16_are_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for quality in ("perceptual", {"name": "perceptual", "weights": str(tmp_path / "mine.pth")}):
        with pytest.raises(
            LrfaceError, match=r"\.pth: no such file; the perceptual loss needs VGG16.*quality.weights"
        ):
            build_quality(quality)
    assert list(tmp_path.iterdir()) == []


def test_other_files_than_vgg16(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(LrfaceError, match=r"is not torchvision's VGG16: features.0.weight must be of shape"):
        build_quality({"name": "perceptual", "weights": str(path)})
    path.write_bytes(b"no weights at all")
    with pytest.raises(LrfaceError, match="other.pth cannot be read"):
        build_quality({"name": "perceptual", "weights": str(path)})
    torch.save({"features.0.weight": Path("x")}, path)
    with pytest.raises(LrfaceError, match="it is broken or holds something other than tensors"):
        build_quality({"name": "perceptual", "weights": str(path)})


@pytest.mark.parametrize(
    "quality, message",
    [
        ("l3", "unknown quality 'l3' .did you mean 'l"),
        ({"name": "l1", "minimum": 1.0}, "unknown key quality.minimum"),
        ({"minimum": 1.0}, "quality must be a name, or a mapping"),
        ({"name": "likelihood", "minimum": 0.0}, "quality.minimum must be above 0; found 0"),
    ],
)
def test_unknown_losses(quality, message):
    with pytest.raises(UsageError, match=message):
        build_quality(quality)


def discriminator_and_images():
    torch.manual_seed(0)
    loss = build_quality({"name": "adversarial", "width": 4, "depth": 2, "learning_rate": 0.01})
    return loss.double(), images(0, -0.5, 1.5).double(), images(1).double()


@pytest.mark.parametrize("clip", [True, False])
def test_the_adversarial_loss_is_what_the_discriminator_misses(clip):
    loss, reconstruction, hq = discriminator_and_images()
    seen = reconstruction.clamp(0, 1) if clip else reconstruction
    with torch.no_grad():
        probability = torch.sigmoid(loss.discriminator(2 * seen - 1))
    assert probability.shape == (2, 1, 1, 1)
    assert loss(reconstruction, hq, clip).item() == pytest.approx(-probability.log().mean().item())
    reconstruction.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, hq, clip), (reconstruction,))
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_the_discriminator_learns_by_adam():
    loss, reconstruction, hq = discriminator_and_images()
    other = copy.deepcopy(loss.discriminator).requires_grad_(True)
    adam = torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.5, 0.999))
    before = loss(reconstruction, hq).item()
    for _ in range(4):
        real, drawn = (torch.sigmoid(other(2 * x - 1)) for x in (hq, reconstruction.clamp(0, 1)))
        adam.zero_grad()
        (-real.log().mean() - (1 - drawn).log().mean()).backward()
        adam.step()
        loss.learn(reconstruction, hq)
    for mine, wanted in zip(loss.discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)
    assert loss(reconstruction, hq).item() > before  # it tells them apart better now


def test_the_state_of_the_discriminator_resumes_exactly():
    loss, reconstruction, hq = discriminator_and_images()
    loss.learn(reconstruction, hq)
    resumed = build_quality({"name": "adversarial", "width": 4, "depth": 2, "learning_rate": 0.01}).double()
    resumed.load_state_dict(loss.state_dict())
    for each in (loss, resumed):
        each.learn(reconstruction, hq)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loss.state_dict().items())


def test_images_smaller_than_a_patch():
    loss = build_quality({"name": "adversarial", "width": 4, "depth": 3})
    with pytest.raises(UsageError, match="quality.depth 3 needs images of at least 8 pixels; found 4 x 4"):
        loss(images(0), images(1))
    with pytest.raises(UsageError, match="quality.learning_rate must be above 0"):
        build_quality({"name": "adversarial", "learning_rate": 0.0})
