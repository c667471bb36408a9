"""Networks by name: plain ``nn.Module``s, RGB [0, 1] in, normalisation inside."""

from functools import partial
from typing import Any

from torch import nn

from lrface.models.blocks import FaceBackbone
from lrface.models.cifar_resnet import CifarResNet18
from lrface.models.decoder import SubpixelDecoder
from lrface.models.iresnet import LAYERS, ImprovedResNet
from lrface.models.mobilefacenet import MobileFaceNet
from lrface.registry import Registry

BACKBONES: Registry[FaceBackbone] = Registry("backbone")
DECODERS: Registry[nn.Module] = Registry("decoder")

BACKBONES.register("mobilefacenet", MobileFaceNet)
BACKBONES.register("cifar_resnet18", CifarResNet18)
for _depth in LAYERS:
    BACKBONES.register(f"ir{_depth}", partial(ImprovedResNet, depth=_depth))
    BACKBONES.register(f"ir_se{_depth}", partial(ImprovedResNet, depth=_depth, squeeze=True))
DECODERS.register("subpixel", SubpixelDecoder)


def build_backbone(name: str, **arguments: Any) -> FaceBackbone:
    """The network ``name``: mobilefacenet, ir18, ir34, ir50, ir100, ir_se18 ... ir_se100 for faces of 112 pixels,
    cifar_resnet18 for images of 32.

    Raises:
        UsageError: unknown name or arguments.
    """
    return BACKBONES.build(name, **arguments)


def build_decoder(name: str, in_channels: int, **arguments: Any) -> nn.Module:
    """The decoder ``name`` for a feature map of ``in_channels`` channels.

    Raises:
        UsageError: unknown name or arguments.
    """
    return DECODERS.build(name, in_channels=in_channels, **arguments)
