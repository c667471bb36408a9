import pytest
import torch
from torch import nn

from lrface.errors import UsageError
from lrface.models import BACKBONES, build_backbone, build_decoder
from lrface.models.blocks import NormaliseInput, batchnorm_eval, freeze_batchnorm, parameter_count
from lrface.models.iresnet import NarrowShortcut

IR_NAMES = [f"ir{kind}{depth}" for kind in ("", "_se") for depth in (18, 34, 50, 100)]


def small(name: str) -> dict:
    return {"embedding_size": 24} if name == "mobilefacenet" else {"embedding_size": 24, "width": 4}


def test_every_network_of_the_family_is_there():
    others = [name for name in BACKBONES.names() if not name.startswith("irevnet")]
    small_images = ["cifar_resnet18", "madry_mnist", "preact_resnet18", "preact_resnet50"]
    library = ["torchvision", "timm", "open_clip", "resnet18", "resnet50", "resnext101_32x8d"]
    assert others == sorted(["mobilefacenet", *small_images, *library, *IR_NAMES, "onnx", "python"])


@pytest.mark.parametrize("name", ["mobilefacenet", *IR_NAMES])
def test_shapes(name):
    encoder = build_backbone(name, **small(name)).eval()
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        feature_map = encoder.features(images)
        embedding = encoder(images)
        assert torch.equal(embedding, encoder.embed(feature_map))
    assert feature_map.shape == (2, encoder.feature_channels, 7, 7)
    assert encoder.feature_channels == (512 if name == "mobilefacenet" else 32)
    assert embedding.shape == (2, 24) and embedding.dtype == torch.float32
    assert encoder.embedding_size == 24 and encoder.input_size == 112


def count(name: str, **arguments) -> int:
    with torch.device("meta"):
        return parameter_count(build_backbone(name, **arguments))


def by_hand_ir(layers: tuple[int, ...], width: int = 64, embedding: int = 512) -> int:
    """Parameters of an IR network with output E, added up from its description."""
    total = 3 * width * 9 + 2 * width + width  # convolution, BatchNorm, PReLU
    inputs = width
    for stage, units in enumerate(layers):
        outputs = width * 2**stage
        for unit in range(units):
            # BN - conv - BN - PReLU - conv - BN
            total += (
                2 * inputs
                + 9 * inputs * outputs
                + 2 * outputs
                + outputs
                + 9 * outputs * outputs
                + 2 * outputs
            )
            if unit == 0:
                total += inputs * outputs + 2 * outputs  # every stage begins with a stride
            inputs = outputs
    return total + 2 * inputs + (49 * inputs * embedding + embedding) + 2 * embedding


@pytest.mark.parametrize(
    "name, layers, published",
    # The published figures are those of the ArcFace authors' networks, in millions of parameters.
    [
        ("ir18", (2, 2, 2, 2), 24.0),
        ("ir34", (3, 4, 6, 3), 34.1),
        ("ir50", (3, 4, 14, 3), 43.6),
        ("ir100", (3, 13, 30, 3), 65.2),
    ],
)
def test_parameters_of_ir(name, layers, published):
    assert count(name) == by_hand_ir(layers)
    assert count(name) / 1e6 == pytest.approx(published, abs=0.1)


def test_parameters_of_mobilefacenet_are_the_published_million():
    # Table 1 of the paper, layer by layer: convolution, BatchNorm, PReLU.
    def layer(inputs, outputs, kernel, groups=1, activation=True):
        return inputs // groups * outputs * kernel**2 + (3 if activation else 2) * outputs

    total = layer(3, 64, 3) + layer(64, 64, 3, 64)
    inputs = 64
    for expansion, outputs, repeats in ((2, 64, 5), (4, 128, 1), (2, 128, 6), (4, 128, 1), (2, 128, 2)):
        for _ in range(repeats):
            hidden = expansion * inputs
            total += layer(inputs, hidden, 1) + layer(hidden, hidden, 3, hidden)
            total += layer(hidden, outputs, 1, activation=False)
            inputs = outputs
    total += layer(128, 512, 1) + layer(512, 512, 7, 512, activation=False) + 512 * 128 + 2 * 128
    assert count("mobilefacenet") == total
    assert total / 1e6 == pytest.approx(0.99, abs=0.015)


def test_squeeze_and_excitation_adds_its_gates():
    gates = sum(
        units * 2 * c * (c // 16) for units, c in zip((3, 4, 14, 3), (64, 128, 256, 512), strict=True)
    )
    assert count("ir_se50") - count("ir50") == gates


def test_output_a_pools_instead_of_a_linear_layer():
    # Between the two lie the linear layer of E and its BatchNorms, 12.8 million parameters.
    difference = count("ir50") - count("ir50", output="A")
    assert difference == 49 * 512 * 512 + 512 + 2 * 512 - 512
    encoder = build_backbone("ir18", output="A", width=4, embedding_size=32).eval()
    assert not any(isinstance(part, (nn.Linear, nn.Dropout)) for part in encoder.modules())
    feature_map = torch.randn(2, 32, 7, 7)
    with torch.no_grad():
        # A fresh network in eval mode: BatchNorm divides by sqrt(1 + 1e-5), PReLU has slope 1/4.
        scaled = feature_map / (1 + 1e-5) ** 0.5
        expected = torch.where(scaled > 0, scaled, 0.25 * scaled).mean(dim=(2, 3))
        torch.testing.assert_close(encoder.embed(feature_map), expected)


def test_output_a_refuses_another_width():
    with pytest.raises(UsageError, match="embedding_size must be 32; found 512"):
        build_backbone("ir18", output="A", width=4)


def test_dropout_acts_only_while_training():
    encoder = build_backbone("ir18", width=4, embedding_size=16, dropout=0.9).eval()
    feature_map = torch.randn(4, 32, 7, 7)
    with torch.no_grad():
        assert torch.equal(encoder.embed(feature_map), encoder.embed(feature_map))
        encoder.train()
        assert not torch.equal(encoder.embed(feature_map), encoder.embed(feature_map))


@pytest.mark.parametrize("name", ["mobilefacenet", "ir18"])
def test_normalisation_is_inside(name):
    encoder = build_backbone(name, **small(name)).eval()
    seen = []
    first = encoder.body if name == "mobilefacenet" else encoder.stem
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        encoder(images)
    torch.testing.assert_close(seen[0], (images - 0.5) / 0.5)
    assert NormaliseInput()(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["mobilefacenet", "ir18", "ir_se18"])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    encoder = build_backbone(name, **small(name))
    encoder(torch.rand(2, 3, 112, 112)).pow(2).sum().backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None] == []


def test_wrong_names_and_arguments_name_the_nearest():
    with pytest.raises(UsageError, match="unknown backbone 'ir55'.*known: .*mobilefacenet"):
        build_backbone("ir55")
    with pytest.raises(UsageError, match="did you mean 'mobilefacenet'"):
        build_backbone("mobilfacenet")
    with pytest.raises(UsageError, match="unknown key backbone.widht .*did you mean 'width'"):
        build_backbone("ir50", widht=32)
    with pytest.raises(UsageError, match="unknown key backbone.depth"):
        build_backbone("ir50", depth=100)
    with pytest.raises(UsageError, match="backbone.output must be 'A' or 'E'; found 'F'"):
        build_backbone("ir50", output="F")
    with pytest.raises(UsageError, match="backbone.width must be of type int; found '64px'"):
        build_backbone("ir50", width="64px")


@pytest.mark.parametrize("width, blocks", [(16, 0), (32, 2)])
def test_decoder_draws_112_pixels_from_the_feature_map(width, blocks):
    decoder = build_decoder("subpixel", 24, width=width, blocks=blocks)
    image = decoder(torch.randn(2, 24, 7, 7))
    assert image.shape == (2, 3, 112, 112)
    # A fresh decoder starts from mid-grey, inside [0, 1], where clipping leaves a gradient.
    inside = (image > 0) & (image < 1)
    assert inside.float().mean() > 0.95


def test_decoder_draws_images_of_other_sizes():
    decoder = build_decoder("subpixel", 24, width=16, in_size=4, out_size=32)
    assert decoder(torch.randn(2, 24, 4, 4)).shape == (2, 3, 32, 32)
    for sizes in ((4, 4), (7, 100), (8, 4)):
        with pytest.raises(UsageError, match=f"from {sizes[0]} to {sizes[1]} pixels it cannot"):
            build_decoder("subpixel", 24, in_size=sizes[0], out_size=sizes[1])


def test_decoder_sees_nothing_but_the_feature_map():
    decoder = build_decoder("subpixel", 24, width=16).eval()
    with torch.no_grad():
        one, other = decoder(torch.randn(1, 24, 7, 7)), decoder(torch.randn(1, 24, 7, 7))
    assert not torch.equal(one, other)
    with pytest.raises(UsageError, match="unknown key decoder.widht .*did you mean 'width'"):
        build_decoder("subpixel", 24, widht=16)
    with pytest.raises(UsageError, match="unknown decoder 'subpixle' .did you mean 'subpixel'"):
        build_decoder("subpixle", 24)


def test_frozen_batchnorm_keeps_parameters_and_statistics():
    encoder = build_backbone("ir18", width=4, embedding_size=16, dropout=0.0)
    freeze_batchnorm(encoder)
    encoder.train()
    batchnorm_eval(encoder)
    kept = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder(torch.rand(2, 3, 112, 112)).sum().backward()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, kept[key]), key
    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 20
    for part in norms:
        assert part.weight.grad is None and part.bias.grad is None
    assert encoder.stem[0].weight.grad is not None


def test_narrow_shortcuts_are_strided_convolutions():
    torch.manual_seed(0)
    narrow = NarrowShortcut(8, 12, 1, 2, bias=False)
    plain = nn.Conv2d(8, 12, 1, 2, bias=False)
    plain.load_state_dict(narrow.state_dict())
    images = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(narrow(images), plain(images))


def test_a_narrow_network_trains_in_channels_last_order():
    # PyTorch's own strided 1x1 convolution ends the process here: see NarrowShortcut.
    encoder = build_backbone("ir18", width=4, embedding_size=8).to(memory_format=torch.channels_last)
    for _ in range(3):
        encoder(torch.rand(6, 3, 112, 112)).sum().backward()
    assert bool(torch.isfinite(encoder.stem[0].weight.grad).all())
