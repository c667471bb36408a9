import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lrface.errors import LrfaceError, UsageError
from lrface.models import (
    BACKBONES,
    CORRUPTION_NETWORKS,
    build_backbone,
    build_corruption_network,
    build_network,
)
from lrface.models.compressive_autoencoder import CompressiveAutoencoder, binarise
from lrface.models.edsr import EDSR, MEAN
from lrface.models.per_example import PerExampleConv2d, PerExampleConvTranspose2d, run_with

SMALL = {
    "edsr x2": {"name": "edsr", "blocks": 2, "features": 5, "scale": 2},
    "edsr x3": {"name": "edsr", "blocks": 1, "features": 4, "scale": 3},
    "edsr x4": {"name": "edsr", "blocks": 1, "features": 4, "scale": 4},
    "cae": {"name": "compressive_autoencoder", "width": 8, "code": 4, "blocks": 2},
}


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return build_corruption_network(SMALL[kind]).eval()


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (19, 26)])
def test_an_image_comes_out_as_large_as_it_went_in(kind, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = small(kind)(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert float(out.min()) >= 0 and float(out.max()) <= 1


@pytest.mark.parametrize("kind", SMALL)
def test_weights_of_their_own_for_each_image_are_those_of_one_network_each(kind):
    network = small(kind).double()
    images = torch.rand(3, 3, 16, 20, dtype=torch.float64)
    own = {
        name: (value.detach() + 0.1 * torch.randn(3, *value.shape, dtype=torch.float64)).requires_grad_()
        for name, value in network.named_parameters()
    }
    out = run_with(network, own, images)
    upper = torch.randn_like(out)
    gradients = dict(zip(own, torch.autograd.grad(out, list(own.values()), upper), strict=True))
    for row in range(3):
        one = copy.deepcopy(network)
        one.load_state_dict({name: value[row].detach() for name, value in own.items()})
        alone = one(images[row : row + 1])
        torch.testing.assert_close(out[row : row + 1], alone, atol=1e-12, rtol=0)
        wanted = torch.autograd.grad(alone, list(one.parameters()), upper[row : row + 1])
        for (name, _), gradient in zip(one.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(gradients[name][row], gradient, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 0)])
def test_convolutions_alone(stride, padding):
    for layer, one in (
        (PerExampleConv2d(3, 5, 3, stride, padding), nn.Conv2d(3, 5, 3, stride, padding)),
        (PerExampleConvTranspose2d(3, 5, 3, stride, padding), nn.ConvTranspose2d(3, 5, 3, stride, padding)),
    ):
        one.load_state_dict(layer.state_dict())
        images = torch.rand(2, 3, 9, 9)
        assert torch.equal(layer(images), one(images))
        weights = {name: value.detach().expand(2, *value.shape) for name, value in layer.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(layer, weights, (images,)), one(images), atol=1e-6, rtol=0
        )


def test_edsr_is_its_layers():
    """Figure 3 of the paper written out, and what comes after it here."""
    network = small("edsr x2")
    images = torch.rand(2, 3, 12, 12)
    mean = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
    with torch.no_grad():
        x = network.head(images * 255 - mean)
        y = x
        for block in network.blocks:
            y = y + block[2](F.relu(block[0](y)))
        y = network.gather(y) + x
        y = network.output(F.pixel_shuffle(network.enlarge[0][0](y), 2))
        enlarged = (y + mean) / 255
        torch.testing.assert_close(network.super_resolve(images), enlarged, atol=1e-6, rtol=0)
        smaller = F.interpolate(enlarged.clamp(0, 1), scale_factor=0.5, mode="area")
        torch.testing.assert_close(network(images), smaller, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", SMALL)
def test_what_it_is_trained_on(kind):
    network = small(kind).train()
    images = torch.rand(2, 3, 26, 25)
    drawn, wanted = network.training_pair(images)
    scale = getattr(network, "scale", 1)
    height, width = 26 // scale * scale, 25 // scale * scale
    assert torch.equal(wanted, images[..., :height, :width]) and drawn.shape == wanted.shape
    drawn.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in network.parameters())


def test_the_code_is_binary_with_the_gradient_of_its_values():
    values = torch.linspace(-1, 1, 20001).requires_grad_()
    torch.manual_seed(0)
    for chance in (False, True):
        code = binarise(values, chance)
        assert set(code.detach().unique().tolist()) == {-1.0, 1.0}
        (gradient,) = torch.autograd.grad(code.sum(), values)
        assert torch.equal(gradient, torch.ones_like(values))
    assert torch.equal(binarise(values, False).detach(), torch.where(values >= 0, 1.0, -1.0))
    near = binarise(values, True).detach()[15000:15500]  # values from 0.5 to 0.55
    assert float(near.mean()) == pytest.approx(0.525, abs=0.08)


def test_the_autoencoder_draws_the_same_image_twice_when_it_is_not_trained():
    network = small("cae")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_published_sizes():
    """1,517,571 parameters: EDSR of 16 blocks, 64 features, scale 4, as published, without its two fixed shifts."""
    with torch.device("meta"):
        assert sum(value.numel() for value in EDSR().parameters()) == 1_517_571
        names = set(EDSR().published_names().values())
        cae = CompressiveAutoencoder()
    assert {
        "head.0.weight",
        "body.15.body.2.bias",
        "body.16.weight",
        "tail.0.2.weight",
        "tail.1.bias",
    } <= names
    assert not any(name.startswith("body.17") for name in names)
    shapes = {cae.published_names()[name]: tuple(value.shape) for name, value in cae.named_parameters()}
    assert shapes["e_conv_1.1.weight"] == (64, 3, 5, 5) and shapes["e_conv_3.0.weight"] == (32, 128, 5, 5)
    assert shapes["d_up_conv_1.3.weight"] == (64, 128, 2, 2) and shapes["d_up_conv_2.3.bias"] == (256,)
    assert shapes["d_block_3.4.weight"] == (128, 128, 3, 3) and shapes["d_up_conv_3.3.weight"] == (
        3,
        16,
        3,
        3,
    )


def as_published(kind: str) -> dict[str, torch.Tensor]:
    network = build_corruption_network(SMALL[kind])
    names = network.published_names()
    state = {names[name]: torch.randn_like(value) for name, value in network.named_parameters()}
    if kind != "cae":
        for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
            state[f"{layer}.weight"] = torch.eye(3).view(3, 3, 1, 1)
            state[f"{layer}.bias"] = sign * 255 * torch.tensor(MEAN)
    return state


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("form", ["pt", "safetensors", "nested"])
def test_weights_of_a_users_file(kind, form, tmp_path):
    state = as_published(kind)
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if form == "nested" else state, path)
    network = build_corruption_network({**SMALL[kind], "weights": str(path)})
    names = network.published_names()
    for name, value in network.named_parameters():
        assert torch.equal(value, state[names[name]])
    assert "weights" not in SMALL[kind]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("tail.1.bias"), r"'tail.1.bias' is missing \(1 missing, 0 too many\)"),
        (lambda s: s.update({"body.7.weight": torch.zeros(1)}), "'body.7.weight' is not one of its tensors"),
        (
            lambda s: s.update({"head.0.weight": torch.zeros(9, 3, 3, 3)}),
            r"'head.0.weight' has shape \(9, 3, 3, 3\)",
        ),
        (
            lambda s: s.update({"sub_mean.bias": torch.zeros(3)}),
            "sub_mean.bias is not the shift by DIV2K's mean",
        ),
        (lambda s: s.update({"head.0.weight": 3}), "holds no tensors by name"),
    ],
)
def test_a_file_that_does_not_fit_is_told(change, message, tmp_path):
    state = as_published("edsr x2")
    change(state)
    path = tmp_path / "net.pt"
    torch.save(state, path)
    with pytest.raises(LrfaceError, match=message) as caught:
        build_corruption_network({**SMALL["edsr x2"], "weights": str(path)})
    assert str(path) in str(caught.value)


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(LrfaceError, match="nothing.pt cannot be read"):
        build_corruption_network({"name": "edsr", "weights": str(tmp_path / "nothing.pt")})
    torch.save({"head.0.weight": nn.ReLU()}, tmp_path / "code.pt")
    with pytest.raises(LrfaceError, match="holds something other than tensors and is not read"):
        build_corruption_network({"name": "edsr", "weights": str(tmp_path / "code.pt")})
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"broken")
        with pytest.raises(LrfaceError, match=name):
            build_corruption_network({"name": "edsr", "weights": str(tmp_path / name)})


@pytest.mark.parametrize(
    "network, message",
    [
        ("esdr", "unknown corruption network 'esdr' .did you mean 'edsr'"),
        (
            {"name": "edsr", "blocks": 0},
            "edsr: blocks and features must be at least 1 and scale 2, 3 or 4; found 0",
        ),
        ({"name": "edsr", "scale": 5}, "scale 2, 3 or 4; found 16, 64, 5"),
        ({"name": "edsr", "input_size": 4}, "edsr: input_size must be at least 8; found 4"),
        ({"name": "compressive_autoencoder", "width": 6}, "width must be a multiple of 4"),
        ({"name": "edsr", "block": 3}, "unknown key .*block.*did you mean 'blocks'"),
        (3, "a corruption network is a name, or a mapping with a name and arguments; found 3"),
    ],
)
def test_what_cannot_be_built(network, message):
    with pytest.raises(UsageError, match=message):
        build_corruption_network(network)


def test_a_card_names_either_kind():
    assert isinstance(build_network("edsr", blocks=1, features=4), EDSR)
    assert type(build_network("cifar_resnet18", width=4)) is type(build_backbone("cifar_resnet18", width=4))
    assert not set(CORRUPTION_NETWORKS.names()) & set(BACKBONES.names())
