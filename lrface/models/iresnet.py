"""IR and IR-SE residual networks: the LResNet-E-IR family of the ArcFace report (arXiv 1801.07698v1, section 3.2).

"L" is the first convolution of 3x3 and stride 1 (112-pixel crops lose nothing in the stem), "IR" the improved
residual unit BN-Conv-BN-PReLU-Conv-BN, and the last letter the output setting: "E" is
BN-Dropout-FC-BN after the last convolution, "A" is global average pooling after BN-PReLU. QualNet-LM uses
LResNet50A-IR (paper 001, section 4.1).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.blocks import FaceBackbone, NormaliseInput, PReLU, initialise

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class SqueezeExcitation(nn.Module):
    """Channel weights from global pooling (Hu et al., CVPR 2018), reduction 16."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class NarrowShortcut(nn.Conv2d):
    """A strided 1x1 convolution of few channels, as picking pixels and a plain one.

    On channels_last tensors of fewer than 16 channels the strided weight gradient of oneDNN on x86 (PyTorch
    2.15) reads behind the end of its input, which kills the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Past a residual block: nothing, or a 1x1 convolution and BatchNorm where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    convolution = nn.Conv2d if inputs >= 16 else NarrowShortcut
    return nn.Sequential(convolution(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ImprovedResidual(nn.Module):
    """BN-Conv3x3-BN-PReLU-Conv3x3(stride)-BN plus shortcut (1x1 convolution and BN where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        if squeeze:
            self.residual.append(SqueezeExcitation(outputs))
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class ImprovedResNet(FaceBackbone):
    """IR-18/34/50/100 and their squeeze-and-excitation versions.

    Args:
        depth: 18, 34, 50 or 100.
        squeeze: True for IR-SE.
        output: "E" (BN-Dropout-FC-BN) or "A" (BN-PReLU-global average pooling; the embedding is then as wide
            as the last stage).
        embedding_size: width of the embedding; with output "A" it must equal the last stage's channels.
        width: channels of the first stage (64 in the report); the stages have 1, 2, 4 and 8 times this.
        dropout: share of features dropped in output "E" while training.

    Input RGB float [n, 3, 112, 112] in [0, 1]; embedding float [n, embedding_size], not normalised.

    Raises:
        UsageError: an unknown depth or output, or an embedding size that output "A" cannot give.
    """

    def __init__(
        self,
        depth: int = 50,
        squeeze: bool = False,
        output: str = "E",
        embedding_size: int = 512,
        width: int = 64,
        dropout: float = 0.4,
    ):
        super().__init__()
        if depth not in LAYERS:
            raise UsageError(f"IR networks have depth {', '.join(map(str, LAYERS))}; found {depth}")
        if output not in ("A", "E"):
            raise UsageError(f"backbone.output must be 'A' or 'E'; found {output!r}")
        channels = [width, 2 * width, 4 * width, 8 * width]
        if output == "A" and embedding_size != channels[-1]:
            raise UsageError(
                f"with output 'A' the embedding is the pooled feature map: embedding_size must be {channels[-1]}; "
                f"found {embedding_size}"
            )
        self.embedding_size = embedding_size
        self.feature_channels = channels[-1]
        self.normalise = NormaliseInput()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), PReLU(width)
        )
        units: list[nn.Module] = []
        inputs = width
        for outputs, count in zip(channels, LAYERS[depth], strict=True):
            for index in range(count):
                units.append(ImprovedResidual(inputs, outputs, 2 if index == 0 else 1, squeeze))
                inputs = outputs
        self.body = nn.Sequential(*units)
        last = channels[-1]
        if output == "E":
            self.output = nn.Sequential(
                nn.BatchNorm2d(last),
                nn.Dropout(dropout),
                nn.Flatten(),
                nn.Linear(last * 7 * 7, embedding_size),
                nn.BatchNorm1d(embedding_size),
            )
        else:
            self.output = nn.Sequential(
                nn.BatchNorm2d(last), PReLU(last), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(self.normalise(x)))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)
