"""The decoder of QualNet-LM: the final feature map back to the 112 x 112 image.

The paper fixes only its place (paper 000, appendix D and figure D.1), not its layers. This one is a plain
up-sampling network: a 3x3 convolution, then four sub-pixel steps (Shi et al., CVPR 2016) from 7 to 112 pixels,
each with a residual block in front. It has no skip connection from the encoder: what it draws can only come from
the feature map that the embedding is computed from, which is what makes its reconstruction loss a demand on
that map.
"""

from torch import Tensor, nn

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
    """Feature map float [n, in_channels, 7, 7] -> image float [n, 3, 112, 112], RGB, unclipped (about [0, 1]).

    Args:
        in_channels: channels of the encoder's final feature map.
        width: channels after the first convolution; they halve at each of the four steps.
        blocks: residual blocks before each step.
    """

    def __init__(self, in_channels: int = 512, width: int = 256, blocks: int = 1):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            PReLU(width),
        ]
        channels = width
        for _ in range(4):
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
