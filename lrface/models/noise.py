"""Noise generators: small networks that turn normal noise into noise of another distribution (paper 004, appendix A).

noise1x1   convolutions of one pixel: every pixel's noise is drawn by itself, from one distribution (Table 6)
noise3x3   the second convolution sees 3 x 3 pixels: noise that is correlated within them (Table 7)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.registry import Registry


class NoiseGenerator(nn.Module):
    """``depth`` convolutions with ReLU between them, and what goes in added to what comes out.

    ``forward``: float [n, channels, h, w], standard normal -> noise of the same shape; of any length, since it is scaled
    afterwards (lrface.degrade.rescaling). A fresh generator's last convolution is zero, so that it gives out the normal
    noise that went in; the others are PyTorch's own start, from ``seed``.

    Args:
        channels: of the images, 3 for colour.
        width: channels between the convolutions, 20 in the paper.
        depth: convolutions, 4 in the paper; 12, 143, 563, 983 and 1,403 parameters at depths 1 to 5 (Table 16).
        kernel: 1 or 3, the side of the second convolution's kernel (of the only one at depth 1).
        seed: of the start.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(self, channels: int = 3, width: int = 20, depth: int = 4, kernel: int = 1, seed: int = 0):
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("depth", depth)):
            if value < 1:
                raise UsageError(f"generator.{name} must be at least 1; found {value}")
        if kernel not in (1, 3):
            raise UsageError(f"generator.kernel must be 1 or 3; found {kernel}")
        self.channels, self.width, self.depth, self.kernel = channels, width, depth, kernel
        counts = [channels, *[width] * (depth - 1), channels]
        wide = min(1, depth - 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(counts[level], counts[level + 1], kernel if level == wide else 1, padding="same")
            for level in range(depth)
        )
        self.reset(seed)

    def _layers(self) -> list[nn.Conv2d]:
        return [layer for layer in self.convolutions if isinstance(layer, nn.Conv2d)]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start again: the same weights for the same seed, on any device."""
        generator = torch.Generator().manual_seed(seed)
        layers = self._layers()
        for convolution in layers[:-1]:
            # PyTorch's own: weights and bias uniform up to one over the root of the inputs.
            bound = convolution.weight[0].numel() ** -0.5
            for tensor in convolution.parameters():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn.mul_(2).sub_(1).mul_(bound))
        for tensor in layers[-1].parameters():
            tensor.zero_()

    def forward(self, normal: Tensor) -> Tensor:
        x = normal
        for level, convolution in enumerate(self._layers()):
            x = convolution(x if level == 0 else F.relu(x))
        return normal + x

    def state(self) -> Tensor:
        """All parameters one after another, float32 [parameters]: a copy."""
        return torch.cat([parameter.detach().float().flatten() for parameter in self.parameters()])

    @torch.no_grad()
    def load(self, state: Tensor) -> None:
        """Take on the parameters that :meth:`state` gave."""
        for parameter, values in zip(self.parameters(), self._split(state), strict=True):
            parameter.copy_(values.view_as(parameter))

    def noise_of(self, states: Tensor, normal: Tensor) -> Tensor:
        """Noise of another generator for each image.

        Args:
            states: float32 [n, parameters], of :meth:`state`.
            normal: as for ``forward``, [n, channels, h, w].
        """
        n, _, height, width = normal.shape
        x = normal.reshape(1, -1, height, width)
        tensors = self._split(states)
        for level, convolution in enumerate(self._layers()):
            weight, bias = tensors[2 * level], tensors[2 * level + 1]
            x = x if level == 0 else F.relu(x)
            weight = weight.reshape(-1, *convolution.weight.shape[1:])
            x = F.conv2d(x, weight, bias.reshape(-1), padding="same", groups=n)
        return normal + x.view(normal.shape)

    def _split(self, states: Tensor) -> list[Tensor]:
        return list(states.split([parameter.numel() for parameter in self.parameters()], dim=-1))


NOISE_GENERATORS: Registry[NoiseGenerator] = Registry("generator")
NOISE_GENERATORS.register("noise1x1", partial(NoiseGenerator, kernel=1))
NOISE_GENERATORS.register("noise3x3", partial(NoiseGenerator, kernel=3))


def build_noise_generator(generator: Any, channels: int) -> NoiseGenerator:
    """The generator of this name, or of a mapping with a name and arguments, for images of ``channels`` channels.

    Raises:
        UsageError: unknown name or arguments.
    """
    named = {"name": generator} if isinstance(generator, str) else generator
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(
            f"method.generator must be a name, or a mapping with a name and arguments; found {generator!r}"
        )
    for key, source in (("channels", "the backbone"), ("seed", "the seed of the run")):
        if key in named:
            raise UsageError(f"method.generator.{key} follows from {source}; remove it")
    return NOISE_GENERATORS.build(**{**named, "channels": channels})
