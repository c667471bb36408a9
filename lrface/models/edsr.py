"""EDSR, a super-resolution network (Lim et al., CVPR Workshops 2017), as an image-to-image network that is edited to
corrupt images (DeepAugment, Hendrycks et al., ICCV 2021; AdA, paper 003)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import LrfaceError, UsageError
from lrface.models.per_example import CorruptionNetwork, PerExampleConv2d

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K's training images, which the published networks take off their input."""


class EDSR(CorruptionNetwork):
    """Enlarges an image ``scale`` times, then averages it down to the size that it had.

    The published network draws a larger image; in DeepAugment that one is made smaller again when the set is trained on.
    Here the image goes in at its full size, and each ``scale`` x ``scale`` pixels of the drawing become one: nothing is
    lost by itself, and what a larger radius changes are colours, contrast and edges. It is trained as a
    super-resolution network: from the averaged-down image to the image.

    Layers (names as in the paper's figure 3): a convolution, ``blocks`` of convolution-ReLU-convolution with a shortcut
    around each, a convolution, a shortcut around them all, sub-pixel enlargement, a convolution. Values run from 0 to
    255 inside, the mean of DIV2K taken off, as in the published weights.

    Args:
        blocks: residual blocks, 16 in DeepAugment and paper 003.
        features: channels, 64 there.
        scale: 2, 3 or 4; DeepAugment's is 4.
        input_size: side of the images that it is trained on.

    Raises:
        UsageError: a value out of range.
    """

    mean: Tensor

    def __init__(self, blocks: int = 16, features: int = 64, scale: int = 4, input_size: int = 32):
        super().__init__()
        if blocks < 1 or features < 1 or scale not in (2, 3, 4):
            raise UsageError(
                f"edsr: blocks and features must be at least 1 and scale 2, 3 or 4; found {blocks}, {features}, {scale}"
            )
        if input_size < 2 * scale:
            raise UsageError(f"edsr: input_size must be at least {2 * scale}; found {input_size}")
        self.scale = scale
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.head = PerExampleConv2d(3, features, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                PerExampleConv2d(features, features, 3, padding=1),
                nn.ReLU(inplace=True),
                PerExampleConv2d(features, features, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.gather = PerExampleConv2d(features, features, 3, padding=1)
        factors = [2] * (scale // 2) if scale != 3 else [3]
        self.enlarge = nn.Sequential(
            *(
                nn.Sequential(
                    PerExampleConv2d(features, features * factor**2, 3, padding=1), nn.PixelShuffle(factor)
                )
                for factor in factors
            )
        )
        self.output = PerExampleConv2d(features, 3, 3, padding=1)

    def super_resolve(self, images: Tensor) -> Tensor:
        """RGB float [n, 3, h, w] in [0, 1] -> [n, 3, scale h, scale w], not clipped."""
        x = self.head(images * 255 - self.mean)
        passed = x
        for block in self.blocks:
            passed = passed + block(passed)
        enlarged = self.enlarge(self.gather(passed) + x)
        # Half precision ends here: the mean is float32.
        return (self.output(enlarged) + self.mean) / 255

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(self.super_resolve(images).clamp(0, 1), self.scale)

    def training_pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (side // self.scale * self.scale for side in images.shape[-2:])
        wanted = images[..., :height, :width]
        return self.super_resolve(F.avg_pool2d(wanted, self.scale)), wanted

    def published_names(self) -> Mapping[str, str]:
        """As in EDSR-PyTorch, the authors' port of their network."""
        layers = {"head": "head.0", "gather": f"body.{len(self.blocks)}", "output": "tail.1"}
        for number in range(len(self.blocks)):
            layers |= {f"blocks.{number}.{place}": f"body.{number}.body.{place}" for place in (0, 2)}
        layers |= {f"enlarge.{number}.0": f"tail.0.{2 * number}" for number in range(len(self.enlarge))}
        return {
            f"{own}.{kind}": f"{theirs}.{kind}"
            for own, theirs in layers.items()
            for kind in ("weight", "bias")
        }

    def check_published(self, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        mean, left = torch.tensor(MEAN) * 255, dict(state)
        for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
            for kind, wanted in (("weight", torch.eye(3).view(3, 3, 1, 1)), ("bias", sign * mean)):
                found = left.pop(f"{layer}.{kind}", wanted)
                if found.shape != wanted.shape or not torch.allclose(found.float(), wanted, atol=1e-2):
                    raise LrfaceError(
                        f"{what}: {layer}.{kind} is not the shift by DIV2K's mean colour, 0 to 255, that this network has; "
                        f"found {found.flatten().tolist()}"
                    )
        return left
