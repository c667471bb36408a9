import pytest
import torch

from lrface.errors import UsageError
from lrface.models import build_backbone
from lrface.models.blocks import parameter_count
from lrface.train.checkpoint import load_model, make_card, save_model


def test_shapes():
    encoder = build_backbone("cifar_resnet18", width=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        feature_map = encoder.features(images)
        assert feature_map.shape == (2, 32, 4, 4) and bool((feature_map >= 0).all())
        torch.testing.assert_close(encoder(images), feature_map.mean((2, 3)))
    assert (encoder.input_size, encoder.embedding_size, encoder.feature_channels) == (32, 32, 32)
    assert encoder.feature_size == 4


def test_the_size_of_the_usual_network():
    """ResNet-18 of 3x3 stem: 11,173,962 parameters with ten classes, 5,130 of which are the classifier's."""
    with torch.device("meta"):
        assert parameter_count(build_backbone("cifar_resnet18")) == 11_173_962 - 5_130


def test_nothing_is_lost_in_the_stem():
    encoder = build_backbone("cifar_resnet18", width=4).eval()
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert encoder.stem(encoder.normalise(images)).shape == (1, 4, 32, 32)
    encoder(images).sum().backward()
    assert bool((images.grad != 0).any(1).all())


def test_a_narrow_one_trains_in_channels_last_order():
    encoder = build_backbone("cifar_resnet18", width=4).to(memory_format=torch.channels_last)
    for _ in range(2):
        encoder(torch.rand(6, 3, 32, 32)).sum().backward()
    assert bool(torch.isfinite(encoder.stem[0].weight.grad).all())


def test_a_model_on_disk_knows_its_input_size(tmp_path):
    encoder = build_backbone("cifar_resnet18", width=4).eval()
    card = make_card({"name": "cifar_resnet18", "arguments": {"width": 4}}, encoder, {})
    save_model(tmp_path, encoder, card)
    loaded, card = load_model(tmp_path)
    assert card["input"]["size"] == 32 and card["embedding_size"] == 32
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), encoder(images))


def test_a_width_of_nothing():
    with pytest.raises(UsageError, match="backbone.width must be at least 1; found 0"):
        build_backbone("cifar_resnet18", width=0)
