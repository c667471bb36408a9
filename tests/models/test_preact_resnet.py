import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models import build_backbone
from lrface.models.blocks import parameter_count
from lrface.models.memory import recompute_activations
from lrface.models.preact_resnet import PreActivation
from lrface.train.checkpoint import load_model, make_card, save_model


@pytest.mark.parametrize(("name", "channels"), [("preact_resnet18", 32), ("preact_resnet50", 128)])
def test_shapes(name, channels):
    encoder = build_backbone(name, width=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        feature_map = encoder.features(images)
        assert feature_map.shape == (2, channels, 4, 4) and bool((feature_map >= 0).all())
        torch.testing.assert_close(encoder(images), feature_map.mean((2, 3)))
    assert (encoder.input_size, encoder.embedding_size, encoder.feature_channels) == (32, channels, channels)


def test_the_published_size():
    """PreActResNet-18 of Wong et al. (ICLR 2020) has 11,172,170 parameters with ten classes."""
    with torch.device("meta"):
        encoder = build_backbone("preact_resnet18")
    assert parameter_count(encoder) + 10 * encoder.embedding_size + 10 == 11_172_170


def convolutions(network: nn.Module) -> list[int]:
    return sorted(part.weight.numel() for part in network.modules() if isinstance(part, nn.Conv2d))


@pytest.mark.parametrize("depth", [18, 50])
def test_convolutions_are_those_of_the_resnet_but_for_the_stem(depth):
    with torch.device("meta"):
        mine = convolutions(build_backbone(f"preact_resnet{depth}"))
        theirs = convolutions(torchvision.models.get_model(f"resnet{depth}"))
    theirs.remove(3 * 64 * 49)
    theirs.append(3 * 64 * 9)
    assert mine == sorted(theirs)


@pytest.mark.parametrize("width", [None, 6])
def test_a_block_by_its_formula(width):
    torch.manual_seed(0)
    block = PreActivation(16, 24, width, 2).eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)

    def norm(x, part):
        shape = (1, -1, 1, 1)
        scale = part.weight / (part.running_var + part.eps).sqrt()
        return (x - part.running_mean.view(shape)) * scale.view(shape) + part.bias.view(shape)

    x = torch.randn(2, 16, 8, 8)
    activated = norm(x, block.activation[0]).clamp(min=0)
    expected = activated
    parts = [part for part in block.residual if not isinstance(part, nn.ReLU)]
    strides = iter([2, 1] if width is None else [1, 2, 1])
    for part in parts:
        if isinstance(part, nn.Conv2d):
            side = part.weight.shape[-1]
            expected = F.conv2d(expected, part.weight, stride=next(strides), padding=side // 2)
        else:
            expected = norm(expected, part).clamp(min=0)
    expected = expected + F.conv2d(activated, block.shortcut.weight, stride=2)
    with torch.no_grad():
        torch.testing.assert_close(block(x.clone()), expected)


def test_without_a_change_of_shape_the_input_itself_is_added():
    block = PreActivation(8, 8, None, 1).eval()
    nn.init.zeros_(block.residual[-1].weight)
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x.clone()), x)


def test_blocks_can_be_recomputed_and_narrow_ones_train_in_channels_last_order():
    torch.manual_seed(0)
    encoder = build_backbone("preact_resnet50", width=2).to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 32, 32)
    encoder(images).square().sum().backward()
    kept = encoder.stem.weight.grad.clone()
    encoder.zero_grad()
    recompute_activations(encoder)
    encoder(images).square().sum().backward()
    assert bool(kept.abs().sum() > 0)
    torch.testing.assert_close(encoder.stem.weight.grad, kept)


def test_a_model_on_disk(tmp_path):
    encoder = build_backbone("preact_resnet18", width=4).eval()
    save_model(
        tmp_path, encoder, make_card({"name": "preact_resnet18", "arguments": {"width": 4}}, encoder, {})
    )
    loaded, card = load_model(tmp_path)
    assert card["input"]["size"] == 32
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), encoder(images))


def test_what_cannot_be_built():
    with pytest.raises(UsageError, match="backbone.width must be at least 1; found 0"):
        build_backbone("preact_resnet18", width=0)
    with pytest.raises(UsageError, match="depth"):
        build_backbone("preact_resnet18", depth=50)
