import pytest
import torch
from torch import nn

from lrface.errors import LrfaceError
from lrface.models.adain import AdaIn, adain, load_adain


def official(width=4, seed=0):
    """Small random weights in the layout of vgg_normalised.pth (all of VGG-19) and decoder.pth: keys are places in the
    sequences, built here layer by layer as the published description has them."""
    torch.manual_seed(seed)
    plan = [
        64,
        64,
        "pool",
        128,
        128,
        "pool",
        256,
        256,
        256,
        256,
        "pool",
        512,
        512,
        512,
        512,
        "pool",
        512,
        512,
        512,
        512,
    ]
    scale = width / 64
    layers, channels = [nn.Conv2d(3, 3, 1)], 3
    for entry in plan:
        if entry == "pool":
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            continue
        outputs = int(entry * scale)
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, outputs, 3), nn.ReLU()]
        channels = outputs
    encoder = nn.Sequential(*layers)
    layers, channels = [], int(512 * scale)
    for entry in [256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3]:
        if entry == "up":
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            continue
        outputs = 3 if entry == 3 else int(entry * scale)
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, outputs, 3)]
        layers += [] if entry == 3 else [nn.ReLU()]
        channels = outputs
    return encoder, nn.Sequential(*layers)


def test_the_formula():
    torch.manual_seed(0)
    content, style = (
        torch.randn(2, 5, 6, 7, dtype=torch.float64),
        3 * torch.rand(2, 5, 4, 9, dtype=torch.float64),
    )
    found = adain(content, style)
    for n in range(2):
        for c in range(5):
            x, y = content[n, c], style[n, c]
            wanted = y.std() * (x - x.mean()) / x.std() + y.mean()  # eq. 8
            assert torch.allclose(found[n, c], wanted, atol=1e-4)
    assert torch.allclose(found.mean((2, 3)), style.mean((2, 3)))
    # A channel without variation takes on the style's mean and stays without.
    flat = adain(torch.ones(1, 1, 3, 3), style[:1, :1].float())
    assert torch.allclose(flat, flat.mean()) and flat.mean() == pytest.approx(
        float(style[0, 0].mean()), abs=1e-5
    )


def test_the_layout_is_the_published_one():
    """The network computes what the published sequences, run as sequences, compute."""
    encoder, decoder = official()
    assert [key for key in encoder.state_dict() if key.endswith("weight")][:4] == [
        "0.weight",
        "2.weight",
        "5.weight",
        "9.weight",
    ]
    network = AdaIn(encoder.state_dict(), decoder.state_dict(), ("e", "d"))
    content, style = torch.rand(1, 3, 48, 64), torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        whole = encoder[:31]  # up to and with relu4_1
        mixed = adain(whole(content), whole(style))
        half = 0.5 * mixed + 0.5 * whole(content)
        assert torch.allclose(network(content, style), decoder(mixed).clamp(0, 1), atol=1e-6)
        assert torch.allclose(network(content, style, 0.5), decoder(half).clamp(0, 1), atol=1e-6)
    assert network(torch.rand(1, 3, 45, 50), style).shape == (1, 3, 48, 56)


def test_the_published_channels_fit():
    with torch.device("meta"):
        encoder, decoder = official(64)
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert shapes["29.weight"] == (512, 256, 3, 3) and shapes["51.weight"] == (512, 512, 3, 3)
    assert tuple(decoder.state_dict()["28.weight"].shape) == (3, 64, 3, 3)


def test_files_that_do_not_fit_are_named(tmp_path):
    encoder, decoder = (part.state_dict() for part in official())
    other = official(8)[1].state_dict()
    for first, second, message in (
        (
            {key: value for key, value in encoder.items() if key != "9.weight"},
            decoder,
            "e.pth lacks '9.weight'",
        ),
        (encoder, other, "they do not belong together"),
        (
            {**encoder, "5.weight": torch.zeros(4, 5, 3, 3)},
            decoder,
            "convolution 1 gives 4 channels, the next",
        ),
        (encoder, {**decoder, "8.bias": torch.zeros(1)}, "8.bias should have 16 values"),
    ):
        torch.save(first, tmp_path / "e.pth")
        torch.save(second, tmp_path / "d.pth")
        with pytest.raises(LrfaceError, match=message):
            load_adain(tmp_path / "e.pth", tmp_path / "d.pth")
    with pytest.raises(LrfaceError, match="no such file"):
        load_adain(tmp_path / "e.pth", tmp_path / "none.pth")
