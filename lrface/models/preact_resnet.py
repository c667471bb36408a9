"""Pre-activation ResNet-18 and ResNet-50 for images of 32 pixels: He et al., "Identity Mappings in Deep Residual
Networks", ECCV 2016, with a 3x3 stem of stride 1, as Wong et al. (ICLR 2020) and paper 003 (appendix A) train them on
CIFAR-10. BatchNorm and ReLU come before each convolution and once more after the last block; the stem has neither."""

from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.blocks import FaceBackbone, NormaliseInput, initialise
from lrface.models.iresnet import NarrowShortcut

LAYERS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
EXPANSION = {18: 1, 50: 4}


class PreActivation(nn.Module):
    """BN-ReLU, then convolutions with BN-ReLU between them, plus shortcut; where the shape changes, the shortcut is a 1x1
    convolution of the activated input.

    Args:
        inputs, outputs: channels in and out.
        width: of the convolutions between them; without it there are two of 3x3, with it 1x1, 3x3 and 1x1.
        stride: of the first 3x3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, width: int | None, stride: int):
        super().__init__()
        shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        if width is not None:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        layers: list[nn.Module] = []
        for number, (before, after, kernel, step) in enumerate(shapes):
            if number:
                layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
            layers.append(nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
        self.residual = nn.Sequential(*layers)
        convolution = nn.Conv2d if inputs >= 16 else NarrowShortcut
        changes = stride != 1 or inputs != outputs
        self.shortcut = convolution(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


class PreActivationResNet(FaceBackbone):
    """At width 64 and with ten classes 11,172,170 parameters (depth 18) and 23,513,162 (depth 50).

    Input RGB float [n, 3, 32, 32] in [0, 1]; feature map float [n, 8 * width * e, 4, 4], e = 1 for depth 18 and 4 for 50;
    the embedding is the pooled feature map.

    Args:
        depth: 18 (two 3x3 convolutions a block) or 50 (bottlenecks).
        width: channels of the first stage's 3x3 convolutions; those of the others are 2, 4 and 8 times as many.

    Raises:
        UsageError: another depth, or a width below 1.
    """

    input_size = 32
    feature_size = 4

    def __init__(self, depth: int = 18, width: int = 64):
        super().__init__()
        if depth not in LAYERS:
            raise UsageError(f"backbone.depth must be one of {', '.join(map(str, LAYERS))}; found {depth}")
        if width < 1:
            raise UsageError(f"backbone.width must be at least 1; found {width}")
        expansion = EXPANSION[depth]
        self.embedding_size = self.feature_channels = 8 * width * expansion
        self.normalise = NormaliseInput()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(LAYERS[depth]):
            middle = width * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                outputs = middle * expansion
                blocks.append(PreActivation(inputs, outputs, middle if expansion > 1 else None, stride))
                inputs = outputs
        self.body = nn.Sequential(*blocks)
        self.last = nn.BatchNorm2d(inputs)
        self.output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.body(self.stem(self.normalise(x)))))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)
