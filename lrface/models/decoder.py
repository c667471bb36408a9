"""The decoder of QualNet-LM: the final feature map back to the image, 112 x 112 for faces.

The paper fixes only its place (paper 000, appendix D and figure D.1), not its layers. This one is a plain
up-sampling network: a 3x3 convolution, then sub-pixel steps (Shi et al., CVPR 2016), four from 7 to 112 pixels,
each with a residual block in front. It has no skip connection from the encoder: what it draws can only come from
the feature map that the embedding is computed from, which is what makes its reconstruction loss a demand on
that map.
"""

from torch import Tensor, nn

from lrface.errors import UsageError
from lrface.models.blocks import PReLU, initialise


class ResidualBlock(nn.Module):
    """Conv3x3-BN-PReLU-Conv3x3-BN with an identity shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            PReLU(channels),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SubpixelDecoder(nn.Module):
    """Feature map float [n, in_channels, in_size, in_size] -> image float [n, 3, out_size, out_size], RGB, unclipped
    (about [0, 1]).

    Args:
        in_channels: channels of the encoder's final feature map.
        width: channels after the first convolution; they halve at each step.
        blocks: residual blocks before each step.
        in_size, out_size: pixels of a side, the second 2, 4, 8 ... times the first.

    Raises:
        UsageError: another ratio of the sizes.
    """

    def __init__(
        self,
        in_channels: int = 512,
        width: int = 256,
        blocks: int = 1,
        in_size: int = 7,
        out_size: int = 112,
    ):
        super().__init__()
        steps = (out_size // in_size).bit_length() - 1
        if steps < 1 or in_size * 2**steps != out_size:
            raise UsageError(
                f"decoder subpixel doubles a feature map's side some times; from {in_size} to {out_size} pixels it "
                "cannot"
            )
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            PReLU(width),
        ]
        channels = width
        for _ in range(steps):
            layers += [ResidualBlock(channels) for _ in range(blocks)]
            halved = max(8, channels // 2)
            layers += [
                nn.Conv2d(channels, 4 * halved, 3, 1, 1, bias=False),
                nn.PixelShuffle(2),
                nn.BatchNorm2d(halved),
                PReLU(halved),
            ]
            channels = halved
        self.body = nn.Sequential(*layers)
        self.image = nn.Conv2d(channels, 3, 3, 1, 1)
        initialise(self)
        assert self.image.bias is not None
        # Start from mid-grey: half of a fresh network's output would otherwise be outside [0, 1].
        nn.init.normal_(self.image.weight, std=0.01)
        nn.init.constant_(self.image.bias, 0.5)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.image(self.body(feature_map))
