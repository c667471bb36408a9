"""Arbitrary style transfer by adaptive instance normalisation: X. Huang and S. Belongie, "Arbitrary Style Transfer in
Real-time with Adaptive Instance Normalization", ICCV 2017.

The weights are the user's files, in the layout that the method is passed on in with PyTorch: the encoder is VGG-19 as a
sequence of layers (``vgg_normalised.pth``, of which all after relu4_1 is left out), the decoder its mirror image with
up-sampling (``decoder.pth``). Keys are the layers' places in these sequences; the
numbers of channels are read from the files.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError

EPSILON = 1e-5
"""Added to the variance, as the authors' code does."""

RELU4_1 = (0, 2, 5, 9, 12, 16, 19, 22, 25, 29)
"""Places of the encoder's convolutions up to relu4_1: a 1x1 one that normalises RGB in [0, 1], then 3x3 ones."""

_POOLS = {5, 12, 25}  # the encoder halves after the ReLU of these convolutions
DECODER = (1, 5, 8, 11, 14, 18, 21, 25, 28)
_UPS = {1, 14, 21}  # the decoder doubles after the ReLU of these


def adain(content: Tensor, style: Tensor) -> Tensor:
    """sigma(y) (x - mu(x)) / sigma(x) + mu(y) (eq. 8): each channel of the content gets the mean and standard deviation of
    the style's, over all places.

    Args:
        content: float [n, c, h, w]. style: float [n, c, h', w'], of any size.
    """

    def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
        flat = features.flatten(2)
        mean, deviation = flat.mean(2), (flat.var(2) + EPSILON).sqrt()
        return mean[..., None, None], deviation[..., None, None]

    mean, deviation = statistics(content)
    wanted_mean, wanted_deviation = statistics(style)
    return wanted_deviation * (content - mean) / deviation + wanted_mean


def _convolution(state: Mapping[str, Tensor], place: int, what: str) -> nn.Conv2d:
    try:
        weight, bias = state[f"{place}.weight"], state[f"{place}.bias"]
    except KeyError as error:
        raise LrfaceError(
            f"{what} lacks {error}: it should hold the layers of {'VGG-19' if 'encoder' in what else 'its mirror image'} by "
            "their places in a sequence (0.weight, 2.weight, ... / 1.weight, 5.weight, ...), as AdaIN's files for PyTorch do"
        ) from None
    if weight.ndim != 4 or weight.shape[2] not in (1, 3) or weight.shape[2] != weight.shape[3]:
        raise LrfaceError(
            f"{what}: {place}.weight should be a 1x1 or 3x3 convolution; found {list(weight.shape)}"
        )
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    if bias.shape != convolution.bias.shape:  # type: ignore[union-attr]
        raise LrfaceError(
            f"{what}: {place}.bias should have {weight.shape[0]} values; found {list(bias.shape)}"
        )
    convolution.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return convolution


def _check_chain(convolutions: list[nn.Conv2d], what: str) -> None:
    for number, (before, after) in enumerate(pairwise(convolutions)):
        if before.out_channels != after.in_channels:
            raise LrfaceError(
                f"{what}: convolution {number} gives {before.out_channels} channels, the next one takes {after.in_channels}"
            )


class AdaIn(nn.Module):
    """The encoder, AdaIN and the decoder.

    ``forward``: content float [n, 3, h, w] and style float [n, 3, h', w'] in [0, 1], sides of 8 pixels or more -> stylised
    content float [n, 3, 8 ceil(h / 8), 8 ceil(w / 8)] in [0, 1]; ``alpha`` from 0 (content) to 1 (style) blends features
    (eq. 14).
    """

    def __init__(self, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], names: tuple[str, str]):
        super().__init__()
        first = [_convolution(encoder, place, f"the encoder {names[0]}") for place in RELU4_1]
        last = [_convolution(decoder, place, f"the decoder {names[1]}") for place in DECODER]
        _check_chain(first, f"the encoder {names[0]}")
        _check_chain(last, f"the decoder {names[1]}")
        if first[0].in_channels != 3 or last[-1].out_channels != 3:
            raise LrfaceError(f"{names[0]} should take and {names[1]} give 3 channels")
        if last[0].in_channels != first[-1].out_channels:
            raise LrfaceError(
                f"{names[0]} gives {first[-1].out_channels} channels, {names[1]} takes {last[0].in_channels}: they do not "
                "belong together"
            )
        layers: list[nn.Module] = []
        for place, convolution in zip(RELU4_1, first, strict=True):
            if place == 0:
                layers.append(convolution)
                continue
            layers += [nn.ReflectionPad2d(1), convolution, nn.ReLU()]
            if place in _POOLS:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.encoder = nn.Sequential(*layers)
        layers = []
        for place, convolution in zip(DECODER, last, strict=True):
            layers += [nn.ReflectionPad2d(1), convolution]
            if place != DECODER[-1]:
                layers.append(nn.ReLU())
            if place in _UPS:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.decoder = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    def forward(self, content: Tensor, style: Tensor, alpha: float = 1.0) -> Tensor:
        features = self.encoder(content)
        moved = adain(features, self.encoder(style))
        return self.decoder(alpha * moved + (1 - alpha) * features).clamp(0, 1)


def load_adain(encoder: str | Path, decoder: str | Path, device: str | torch.device = "cpu") -> AdaIn:
    """The network with the tensors of two files, .pth (read as tensors alone) or .safetensors.

    Raises:
        LrfaceError: a file that is missing, of another layout, or does not belong to the other.
    """
    from lrface.models.weights import read_weights

    return AdaIn(read_weights(Path(encoder)), read_weights(Path(decoder)), (str(encoder), str(decoder))).to(
        device
    )
