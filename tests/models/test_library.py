"""Networks of torchvision and timm as backbones: the same functions as the libraries' own, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from lrface.errors import LrfaceError, UsageError
from lrface.heads import build_head
from lrface.methods import Classify
from lrface.models import build_backbone
from lrface.models.blocks import channels_last, parameter_count
from lrface.models.library import start_networks
from lrface.models.memory import recompute_activations
from lrface.train.checkpoint import fill, load_model, make_card, save_model, tensors

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
# One of each kind that torchvision has.
KINDS = {
    "resnet18": 512,
    "resnext50_32x4d": 2048,
    "regnet_y_400mf": 440,
    "shufflenet_v2_x0_5": 1024,
    "densenet121": 1024,
    "mobilenet_v2": 1280,
    "mnasnet0_5": 1280,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "swin_t": 768,
}
LARGE = {"vgg11_bn": 4096, "alexnet": 4096, "maxvit_t": 512, "swin_v2_t": 768}


def randomise(network: nn.Module) -> None:
    """BatchNorm as after training: a fresh one, and fresh layers of small scale, would hide a layer left out."""
    generator = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)


def give(encoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Fill ``encoder`` with a library's tensors, all of them and nothing else."""
    normalise = {key: value for key, value in encoder.state_dict().items() if key.startswith("normalise.")}
    fill(encoder, {encoder.own_name(key): value for key, value in state.items()} | normalise, "the library's")


def same_as_torchvision(model: str, embedding_size: int, side: int) -> None:
    network = models.get_model(model, num_classes=7).eval()
    randomise(network)
    encoder = build_backbone("torchvision", model=model, input_size=side).eval()
    prefix = f"{encoder.classifier}."
    state = {key: value for key, value in network.state_dict().items() if not key.startswith(prefix)}
    give(encoder, state)
    images = nn.functional.interpolate(IMAGES, (side, side))
    with torch.no_grad():
        feature_map = encoder.features(images)
        embedding = encoder.embed(feature_map)
        scores = network.get_submodule(encoder.classifier)(embedding)
        expected = network((images - MEAN) / STD)
    assert feature_map.shape == (2, encoder.feature_channels, encoder.feature_size, encoder.feature_size)
    assert embedding.shape == (2, encoder.embedding_size) == (2, embedding_size)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("model", KINDS)
def test_features_and_embed_are_torchvisions_own_forward_pass(model):
    same_as_torchvision(model, KINDS[model], 64)


@pytest.mark.slow
@pytest.mark.parametrize("model", LARGE)
def test_and_that_of_large_ones(model):
    same_as_torchvision(model, LARGE[model], 224 if model == "maxvit_t" else 96)


def test_squeezenets_classes_are_those_of_its_pooled_map():
    """Its classifier is a convolution before pooling and a ReLU: of the pooled map it gives the scores but for the ReLU."""
    encoder = build_backbone("torchvision", model="squeezenet1_1", input_size=64).eval()
    with torch.no_grad():
        feature_map = encoder.features(IMAGES)
        torch.testing.assert_close(encoder.embed(feature_map), feature_map.mean((2, 3)))
    assert encoder.classifier == "classifier.1"


@pytest.mark.parametrize(
    "model, side",
    [
        ("resnet10t", 64),
        ("convnext_atto", 64),
        ("mobilenetv3_small_050", 64),
        ("swin_tiny_patch4_window7_224", 96),
    ],
)
def test_timms_own_forward_pass(model, side):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'lrface[timm]'")
    sized = {"img_size": side} if "swin" in model else {}
    network = timm.create_model(model, num_classes=7, **sized).eval()
    randomise(network)
    encoder = build_backbone("timm", model=model, input_size=side).eval()
    state = {
        key: value
        for key, value in network.state_dict().items()
        if not key.startswith(f"{encoder.classifier}.")
    }
    give(encoder, state)
    images = nn.functional.interpolate(IMAGES, (side, side))
    with torch.no_grad():
        feature_map = encoder.features(images)
        scores = network.get_submodule(encoder.classifier)(encoder.embed(feature_map))
        torch.testing.assert_close(scores, network((images - MEAN) / STD))
    side_of_map = encoder.feature_size
    assert feature_map.shape == (2, encoder.feature_channels, side_of_map, side_of_map)


def test_images_are_normalised_as_timm_says_of_the_model():
    pytest.importorskip("timm", reason="timm is not installed: pip install 'lrface[timm]'")
    encoder = build_backbone("timm", model="mobilenetv3_small_050", input_size=64)
    torch.testing.assert_close(encoder.normalise(IMAGES), (IMAGES - MEAN) / STD)
    half = build_backbone("timm", model="inception_next_atto", input_size=64)
    own = half.network.pretrained_cfg
    mean, std = (torch.tensor(own[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(half.normalise(IMAGES), (IMAGES - mean) / std)


# ------------------------------------------------------------------------------------------------------- the stem


def papers_resnet(block: type[nn.Module], layers: list[int]) -> nn.Module:
    """The papers' ResNet as one would write it with torchvision: the first stage made with stride 2, no max-pooling."""
    network = models.ResNet(block, layers)
    network.inplanes = 64
    network.layer1 = network._make_layer(block, 64, layers[0], stride=2)
    network.maxpool = nn.Identity()
    return network.eval()


@pytest.mark.parametrize(
    "model, block, layers",
    [
        ("resnet18", models.resnet.BasicBlock, [2, 2, 2, 2]),
        ("resnet50", models.resnet.Bottleneck, [3, 4, 6, 3]),
    ],
)
def test_the_papers_stem(model, block, layers):
    expected = papers_resnet(block, layers)
    randomise(expected)
    encoder = build_backbone(model, input_size=64, stem="quality").eval()
    give(encoder, {key: value for key, value in expected.state_dict().items() if key[:3] != "fc."})
    expected.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), expected((IMAGES - MEAN) / STD))
    original = build_backbone(model, input_size=64)
    assert (encoder.feature_channels, encoder.feature_size) == (
        original.feature_channels,
        original.feature_size,
    )
    # ResNet-50's first shortcut has its convolution already; ResNet-18's gets one, 64 x 64, and BatchNorm.
    assert parameter_count(encoder) - parameter_count(original) == (
        64 * 64 + 128 if model == "resnet18" else 0
    )


def test_every_pixel_counts_in_the_papers_stem():
    encoder = build_backbone("resnet50", input_size=64, stem="quality").double().eval()
    stem = encoder.body[:3](encoder.normalise(IMAGES.double())).detach().requires_grad_()
    encoder.body.layer1[0](encoder.body.maxpool(stem)).pow(2).sum().backward()
    assert stem.shape[-1] == 32 and bool((stem.grad != 0).any(1).all())


@pytest.mark.parametrize("model", ["resnet10t", "resnet26", "resnet26d"])
def test_the_stem_of_timms_resnets(model):
    pytest.importorskip("timm", reason="timm is not installed: pip install 'lrface[timm]'")
    original, changed = (
        build_backbone("timm", model=model, input_size=63, stem=stem).eval()
        for stem in ("original", "quality")
    )
    assert isinstance(changed.network.maxpool, nn.Identity)
    with torch.no_grad():
        assert changed.features(IMAGES[..., :63, :63]).shape == original.features(IMAGES[..., :63, :63]).shape


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("torchvision", {"model": "resnet5"}, r"no classifier 'resnet5' \(did you mean 'resnet50'"),
        ("torchvision", {"model": "vit_b_16"}, "vit_b_16 is not a plain map of features.*resnet50"),
        ("torchvision", {"model": "vgg11", "input_size": 16}, "vgg11 does not take images of 16 x 16 pixels"),
        (
            "torchvision",
            {"model": "densenet121", "stem": "quality"},
            "quality is for ResNets with max-pooling",
        ),
        ("resnet18", {"stem": "small"}, "backbone.stem must be original or quality; found 'small'"),
        ("resnet18", {"input_size": 0}, "backbone.input_size must be at least 1; found 0"),
        ("resnet18", {"weights": True}, "backbone.weights must be of type str; found True"),
        ("resnet18", {"model": "resnet50"}, "unknown key backbone.model for backbone 'resnet18'"),
        ("timm", {"model": "resnet_50"}, "timm has no model 'resnet_50' .*did you mean"),
        ("timm", {"model": "vit_tiny_patch16_224"}, r"features of shape \['n', 197, 192\], not a map"),
        ("timm", {"model": "deit_tiny_distilled_patch16_224"}, "not one classifier but"),
    ],
)
def test_what_does_not_fit_is_named(name, arguments, message):
    if name == "timm":
        pytest.importorskip("timm", reason="timm is not installed: pip install 'lrface[timm]'")
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        build_backbone(name, **arguments)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(LrfaceError, match=r"timm, which is not installed: pip install 'lrface\[timm\]'"):
        build_backbone("timm", model="resnet10t")


# ------------------------------------------------------------------------------------------ weights from a file


def method(encoder: nn.Module, classes: int) -> Classify:
    return Classify(encoder, build_head("softmax", encoder.embedding_size, classes), None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A ResNet-18 of 7 classes in torchvision's layout, as .pth and .safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    network = models.resnet18(num_classes=7)
    randomise(network)
    # Published files of that age do not count batches.
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save(state, folder / "resnet18.pth")
    save_file(network.state_dict(), folder / "resnet18.safetensors")
    return folder / "resnet18.pth", network.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_fills_the_network_and_a_head_of_as_many_classes(file, suffix):
    path, network = file
    encoder = build_backbone("resnet18", input_size=64, weights=str(path.with_suffix(suffix)))
    whole = method(encoder, 7)
    (told,) = start_networks(whole, ())
    assert (
        f"encoder starts from {path.with_suffix(suffix)}; its classifier of 7 classes fills the head" in told
    )
    whole.eval()
    with torch.no_grad():
        scores = whole.head.linear(encoder(IMAGES))
        torch.testing.assert_close(scores, network((IMAGES - MEAN) / STD), rtol=1e-4, atol=1e-3)


def test_a_head_of_other_classes_stays_fresh_and_that_is_told(file):
    whole = method(build_backbone("resnet18", input_size=64, weights=str(file[0])), 5)
    before = whole.head.linear.weight.clone()
    (told,) = start_networks(whole, ())
    assert "its classifier is left out, the head of 5 classes is fresh" in told
    assert torch.equal(whole.head.linear.weight, before)
    assert torch.equal(whole.encoder.body.conv1.weight, file[1].conv1.weight)
    untouched = method(build_backbone("resnet18", input_size=64, weights=str(file[0])), 7)
    assert start_networks(untouched, {"encoder"}) == []


def test_the_papers_stem_starts_from_the_original_ones_file(file):
    whole = method(build_backbone("resnet18", input_size=64, stem="quality", weights=str(file[0])), 7)
    (told,) = start_networks(whole, ())
    assert "the shortcut of its stem is fresh" in told
    assert torch.equal(whole.encoder.body.layer1[0].conv1.weight, file[1].layer1[0].conv1.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("layer2.0.bn1.bias"), "1 missing, first body.layer2.0.bn1.bias"),
        (
            lambda state: state.update({"layer9.weight": torch.ones(1)}),
            "1 not of this network, first .*layer9",
        ),
        (
            lambda state: state.update({"conv1.weight": torch.ones(64, 3, 3, 3)}),
            r"1 tensors of another shape, first body.conv1.weight: \(64, 3, 3, 3\) in the file, \(64, 3, 7, 7\)",
        ),
    ],
)
def test_a_file_that_does_not_fit(file, tmp_path, change, message):
    state = dict(torch.load(file[0], weights_only=True))
    change(state)
    torch.save(state, tmp_path / "other.pth")
    encoder = build_backbone("resnet18", input_size=64, weights=str(tmp_path / "other.pth"))
    with pytest.raises(LrfaceError, match=f"other.pth, weights for torchvision's resnet18, .*{message}"):
        start_networks(method(encoder, 7), ())


def test_files_that_are_missing_or_no_tensors(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": print}, tmp_path / "code.pth")
    for name, message in (
        ("missing.pth", "no such file; lrface loads no weights from the network"),
        ("text.pth", "cannot be read as tensors alone"),
        ("code.pth", "cannot be read as tensors alone"),
    ):
        encoder = build_backbone("resnet18", input_size=64, weights=str(tmp_path / name))
        with pytest.raises(LrfaceError, match=message) as caught:
            start_networks(method(encoder, 7), ())
        assert "weights_only" not in str(caught.value)  # PyTorch's advice to run what is in the file


# ------------------------------------------------------------------------------------------------- as a backbone


def test_a_trained_model_needs_its_first_file_no_more(file, tmp_path):
    arguments = {"input_size": 64, "stem": "quality", "weights": str(tmp_path / "gone.pth")}
    encoder = build_backbone("resnet18", **arguments).eval()
    card = make_card({"name": "resnet18", "arguments": arguments}, encoder, {})
    save_model(tmp_path, encoder, card)
    loaded, card = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), encoder(IMAGES))
    assert card["embedding_size"] == 512 and card["input"]["size"] == 64
    assert json.loads((tmp_path / "model.json").read_text())["architecture"]["arguments"] == arguments
    # Mean and deviation are kept with the weights.
    assert {"normalise.scale", "normalise.shift"} <= set(tensors(encoder))


def test_activations_can_be_computed_again():
    torch.manual_seed(0)
    plain = build_backbone("resnet18", input_size=64)
    again = build_backbone("resnet18", input_size=64)
    again.load_state_dict(plain.state_dict())
    recompute_activations(again)
    for encoder in (plain, again):
        encoder(IMAGES).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), other in zip(plain.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_half_precision_and_channels_last():
    encoder = channels_last(build_backbone("resnet18", input_size=64, stem="quality"))
    with torch.autocast("cpu", torch.bfloat16):
        embedding = encoder(IMAGES.contiguous(memory_format=torch.channels_last))
    embedding.float().sum().backward()
    assert bool(torch.isfinite(encoder.body.conv1.weight.grad).all())


def test_torch_export_keeps_the_function(tmp_path):
    from lrface.exported import ExportedProgram

    encoder = build_backbone("resnet18", input_size=64, stem="quality").eval()
    program = torch.export.export(
        encoder, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=8)},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    found = ExportedProgram(tmp_path / "model.pt2", torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(next(iter(found(IMAGES).values())), encoder(IMAGES), rtol=1e-4, atol=1e-4)
