"""Deep Decoder: an untrained network whose weights, fitted to one measurement of an image, restore the image.

R. Heckel and P. Hand, "Deep Decoder: Concise Image Representations from Untrained Non-convolutional Networks", ICLR 2019
(arXiv 1810.03982).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError

SHARE = 0.55
"""Weights for each value of an image, at most: that of the published width of 128 on images of 224 pixels."""


def upsamplings(side: int) -> int:
    """How often the smallest input of at least 4 pixels is doubled to ``side`` pixels, 5 times at most."""
    count = 0
    while count < 5 and side % 2 == 0 and side >= 8:
        side, count = side // 2, count + 1
    return count


class DeepDecoder(nn.Module):
    """One decoder for each of n images, all fitted at once.

    B1 is fixed and drawn uniformly from [0, 0.1), as in its authors' code. A layer mixes channels (a convolution 1x1),
    doubles the size (bilinear), applies ReLU and normalises each channel over the image; the last mixes the channels to an
    image through a sigmoid. No weight is shared between images, so that each comes out as if it were fitted alone.

    Args:
        images: n.
        side: of the images in pixels, even.
        channels: k of the paper; None for the largest up to 128 (the authors' default) with at most :data:`SHARE` weights
            for each value of an image: an image is not to be reproduced with its noise.
        generator: of weights and input, on the CPU; all images get the same.

    Raises:
        UsageError: a side that cannot be halved to 4 pixels or more, or channels below 1.
    """

    input: Tensor

    def __init__(self, images: int, side: int, channels: int | None = None, *, generator: torch.Generator):
        super().__init__()
        self.layers = upsamplings(side)
        if self.layers == 0:
            raise UsageError(f"deep_decoder: images must have an even side of 8 pixels or more; found {side}")
        if channels is None:
            channels = min(128, max(3, math.floor(math.sqrt(SHARE * 3 * side * side / self.layers))))
        if channels < 1:
            raise UsageError(f"deep_decoder: channels must be at least 1; found {channels}")
        start = side >> self.layers
        self.start = start
        bound = 1 / math.sqrt(channels)  # PyTorch's for a convolution 1x1

        def same_for_all(values: Tensor) -> Tensor:
            """An image's result must not depend on the images beside it."""
            return values.expand(images, *values.shape).clone()

        def weights(outputs: int) -> nn.Parameter:
            drawn = (2 * torch.rand(outputs, channels, generator=generator) - 1) * bound
            return nn.Parameter(same_for_all(drawn))

        self.register_buffer(
            "input", same_for_all(torch.rand(channels, start * start, generator=generator) / 10)
        )
        self.mix = nn.ParameterList(weights(channels) for _ in range(self.layers))
        self.last = weights(3)
        self.scale = nn.Parameter(torch.ones(self.layers, images, channels, 1))
        self.shift = nn.Parameter(torch.zeros(self.layers, images, channels, 1))

    def forward(self) -> Tensor:
        """float32 [n, 3, side, side] in (0, 1): the images as they are now."""
        values, side = self.input, self.start
        for layer, mix in enumerate(self.mix):
            # Doubling the size after mixing, not before it: both commute, and a quarter of the work is left.
            values = torch.bmm(mix, values)
            count, channels = values.shape[:2]
            grid = values.view(count, channels, side, side)
            side *= 2
            grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
            values = F.relu(grid).view(count, channels, side * side)
            variance, mean = torch.var_mean(values, dim=2, keepdim=True, correction=0)
            values = (values - mean) * torch.rsqrt(variance + 1e-5) * self.scale[layer] + self.shift[layer]
        return torch.sigmoid(torch.bmm(self.last, values)).view(-1, 3, side, side)
