"""The network for MNIST of Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
which paper 004 trains (its section 4 and appendix B.2)."""

from torch import Tensor, nn

from lrface.models.blocks import FaceBackbone, initialise


class MadryMnist(FaceBackbone):
    """Two 5x5 convolutions of 32 and 64 channels, each with ReLU and 2x2 max-pooling, and a layer of 1,024 values with ReLU.

    Input grey float [n, 1, 28, 28] in [0, 1], which is not normalised further; feature map float [n, 64, 7, 7]; embedding
    float [n, 1024]. With a head of ten classes it has 3,274,634 parameters, as published.
    """

    input_size = 28
    channels = 1
    feature_size = 7
    feature_channels = 64
    embedding_size = 1024

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.output = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 1024), nn.ReLU(inplace=True))
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)
