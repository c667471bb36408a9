"""MobileFaceNet as published (Chen et al., "MobileFaceNets", CCBR 2018, table 1)."""

from torch import Tensor, nn

from lrface.models.blocks import (
    FaceBackbone,
    GlobalDepthwise,
    NormaliseInput,
    PReLU,
    StridedDepthwise,
    initialise,
)


def convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    padding: int | None = None,
    activation: bool = True,
) -> nn.Sequential:
    """Conv-BN, with PReLU behind it unless the layer is linear."""
    padding = kernel // 2 if padding is None else padding
    kind = nn.Conv2d
    if groups > 1 and stride > 1:
        kind = StridedDepthwise
    elif groups > 1 and padding == 0:
        kind = GlobalDepthwise
    layers: list[nn.Module] = [
        kind(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation:
        layers.append(PReLU(outputs))
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            convolution(inputs, hidden, 1),
            convolution(hidden, hidden, 3, stride, groups=hidden),
            convolution(hidden, outputs, 1, activation=False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileFaceNet(FaceBackbone):
    """One million parameters; the feature map is the 512 x 7 x 7 output of the last 1x1 convolution.

    Input RGB float [n, 3, 112, 112] in [0, 1]; embedding float [n, embedding_size], not normalised.

    Args:
        embedding_size: width of the embedding, 128 in the paper.
    """

    # expansion t, channels c, repeats n, stride s: table 1 of the paper
    SETTING = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))

    def __init__(self, embedding_size: int = 128):
        super().__init__()
        self.embedding_size = embedding_size
        self.feature_channels = 512
        self.normalise = NormaliseInput()
        layers: list[nn.Module] = [convolution(3, 64, 3, 2), convolution(64, 64, 3, groups=64)]
        inputs = 64
        for expansion, outputs, repeats, stride in self.SETTING:
            for index in range(repeats):
                layers.append(Bottleneck(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        layers.append(convolution(inputs, self.feature_channels, 1))
        self.body = nn.Sequential(*layers)
        self.output = nn.Sequential(
            convolution(512, 512, 7, groups=512, padding=0, activation=False),
            nn.Conv2d(512, embedding_size, 1, bias=False),
            nn.Flatten(),
            nn.BatchNorm1d(embedding_size),
        )
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.normalise(x))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)
