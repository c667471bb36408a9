"""ResNet-18 for images of 32 pixels, as CIFAR-10 is classified with: He et al., CVPR 2016, with a 3x3 stem of stride 1
and no max-pooling, so that the last feature map has 4 x 4 pixels."""

from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.blocks import FaceBackbone, NormaliseInput, initialise
from lrface.models.iresnet import shortcut


class BasicBlock(nn.Module):
    """Conv3x3(stride)-BN-ReLU-Conv3x3-BN plus shortcut (1x1 convolution and BN where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class CifarResNet18(FaceBackbone):
    """ResNet-18 with 11 million parameters at width 64; the embedding is the pooled feature map, 8 * width values.

    Input RGB float [n, 3, 32, 32] in [0, 1]; feature map float [n, 8 * width, 4, 4]; embedding float [n, 8 * width].

    Args:
        width: channels of the first stage; the stages have 1, 2, 4 and 8 times this.

    Raises:
        UsageError: a width below 1.
    """

    input_size = 32
    feature_size = 4

    def __init__(self, width: int = 64):
        super().__init__()
        if width < 1:
            raise UsageError(f"backbone.width must be at least 1; found {width}")
        self.embedding_size = self.feature_channels = 8 * width
        self.normalise = NormaliseInput()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks.append(BasicBlock(inputs, outputs, 1 if stage == 0 else 2))
            blocks.append(BasicBlock(outputs, outputs, 1))
            inputs = outputs
        self.body = nn.Sequential(*blocks)
        self.output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(self.normalise(x)))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)
