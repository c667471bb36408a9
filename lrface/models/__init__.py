"""Networks by name: plain ``nn.Module``s, RGB [0, 1] in, normalisation inside."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lrface.errors import UsageError
from lrface.models.blocks import FaceBackbone
from lrface.models.cifar_resnet import CifarResNet18
from lrface.models.compressive_autoencoder import CompressiveAutoencoder
from lrface.models.decoder import SubpixelDecoder
from lrface.models.edsr import EDSR
from lrface.models.iresnet import LAYERS, ImprovedResNet
from lrface.models.irevnet import BLOCKS, IRevNet, IRevNetInverse
from lrface.models.library import TimmBackbone, TorchvisionBackbone
from lrface.models.madry_mnist import MadryMnist
from lrface.models.mobilefacenet import MobileFaceNet
from lrface.models.onnx_network import OnnxBackbone
from lrface.models.open_clip import OpenClipBackbone
from lrface.models.per_example import CorruptionNetwork, load_published
from lrface.models.preact_resnet import PreActivationResNet
from lrface.models.python_network import PythonBackbone
from lrface.registry import Registry

BACKBONES: Registry[FaceBackbone] = Registry("backbone")
DECODERS: Registry[nn.Module] = Registry("decoder")
CORRUPTION_NETWORKS: Registry[CorruptionNetwork] = Registry("corruption network")

BACKBONES.register("mobilefacenet", MobileFaceNet)
BACKBONES.register("cifar_resnet18", CifarResNet18)
BACKBONES.register("madry_mnist", MadryMnist)
for _depth in (18, 50):
    BACKBONES.register(f"preact_resnet{_depth}", partial(PreActivationResNet, depth=_depth))
for _depth in LAYERS:
    BACKBONES.register(f"ir{_depth}", partial(ImprovedResNet, depth=_depth))
    BACKBONES.register(f"ir_se{_depth}", partial(ImprovedResNet, depth=_depth, squeeze=True))
BACKBONES.register("torchvision", TorchvisionBackbone)
BACKBONES.register("timm", TimmBackbone)
BACKBONES.register("open_clip", OpenClipBackbone)
BACKBONES.register("onnx", OnnxBackbone)
BACKBONES.register("python", PythonBackbone)
for _model in ("resnet18", "resnet50", "resnext101_32x8d"):
    BACKBONES.register(_model, partial(TorchvisionBackbone, model=_model))
BACKBONES.register("irevnet", IRevNet)
for _depth, _blocks in BLOCKS.items():
    BACKBONES.register(
        f"irevnet{_depth}",
        partial(IRevNet, blocks=_blocks, strides=(2, 2, 2, 2), channels=(24, 96, 384, 1536), down_sampling=2),
    )
BACKBONES.register(
    "irevnet_cifar",
    partial(IRevNet, blocks=(18, 18, 18), strides=(1, 2, 2), channels=(16, 64, 256), input_size=32),
)
BACKBONES.register(
    "irevnet_face",
    partial(
        IRevNet,
        blocks=(6, 16, 28),
        strides=(2, 2, 2),
        channels=(24, 96, 384),
        down_sampling=2,
        input_size=112,
    ),
)


def _irevnet_inverse(in_channels: int, in_size: int, out_size: int, network: Any) -> IRevNetInverse:
    """The inverse of ``network``, the name of an i-RevNet or a mapping of its name and arguments."""
    named = {"name": network} if isinstance(network, str) else network
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(
            f"decoder.network must be the name of an i-RevNet, or a mapping with a name and arguments; found {network!r}"
        )
    try:
        built = build_backbone(**named)
    except UsageError as error:
        raise UsageError(f"decoder.network: {error}") from error
    if not isinstance(built, IRevNet):
        raise UsageError(
            f"decoder.network must be an i-RevNet, which has an inverse; found {named['name']!r}"
        )
    return IRevNetInverse(in_channels, in_size, out_size, built)


DECODERS.register("subpixel", SubpixelDecoder)
DECODERS.register("irevnet_inverse", _irevnet_inverse)
CORRUPTION_NETWORKS.register("edsr", EDSR)
CORRUPTION_NETWORKS.register("compressive_autoencoder", CompressiveAutoencoder)


def build_backbone(name: str, **arguments: Any) -> FaceBackbone:
    """The network ``name``: mobilefacenet, ir18, ir34, ir50, ir100, ir_se18 ... ir_se100 for faces of 112 pixels,
    cifar_resnet18, preact_resnet18 and preact_resnet50 for images of 32, and the i-RevNets of lrface.models.irevnet.

    Raises:
        UsageError: unknown name or arguments.
    """
    return BACKBONES.build(name, **arguments)


def build_network(name: str, **arguments: Any) -> FaceBackbone | CorruptionNetwork:
    """What a stage can train and a card can name: a backbone, or a corruption network.

    Raises:
        UsageError: unknown name or arguments.
    """
    if name in CORRUPTION_NETWORKS.names():
        return CORRUPTION_NETWORKS.build(name, **arguments)
    return build_backbone(name, **arguments)


def build_corruption_network(network: Any) -> CorruptionNetwork:
    """The corruption network ``network``: a name, or a mapping of a name, its arguments and, with ``weights``, a file of
    published weights (:func:`lrface.models.per_example.load_published`).

    Raises:
        UsageError: neither of them, an unknown name or arguments. LrfaceError: the file does not fit.
    """
    named = {"name": network} if isinstance(network, str) else network
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(
            f"a corruption network is a name, or a mapping with a name and arguments; found {network!r}"
        )
    arguments = dict(named)
    weights = arguments.pop("weights", None)
    built = CORRUPTION_NETWORKS.build(**arguments)
    if weights is not None:
        load_published(built, weights)
    return built


def build_decoder(name: str, in_channels: int, **arguments: Any) -> nn.Module:
    """The decoder ``name`` for a feature map of ``in_channels`` channels.

    Raises:
        UsageError: unknown name or arguments.
    """
    return DECODERS.build(name, in_channels=in_channels, **arguments)


def build_decoder_for(encoder: FaceBackbone, name: str, **arguments: Any) -> nn.Module:
    """The decoder ``name`` from the final feature map of ``encoder`` to an image as large as it takes.

    Raises:
        UsageError: unknown name or arguments, or a decoder that does not fit this encoder.
    """
    sizes = {"in_size": encoder.feature_size, "out_size": encoder.input_size}
    return build_decoder(name, encoder.feature_channels, **sizes, **arguments)
