"""The compressive autoencoder that DeepAugment and AdA edit to corrupt images: after Theis et al., "Lossy image
compression with compressive autoencoders" (ICLR 2017), with a binary code instead of whole numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.per_example import CorruptionNetwork, PerExampleConv2d, PerExampleConvTranspose2d


def binarise(values: Tensor, chance: bool) -> Tensor:
    """Values in [-1, 1] -> -1 or 1, with the gradient of the values themselves (straight through).

    Args:
        chance: 1 with probability (1 + value) / 2, as in training; else the nearer of the two.
    """
    with torch.no_grad():
        threshold = torch.rand_like(values) * 2 - 1 if chance else torch.zeros_like(values)
        code = torch.where(values >= threshold, 1.0, -1.0).to(values.dtype)
    # The difference is 0 exactly, and has the gradient.
    return code + (values - values.detach())


def _residual(channels: int) -> nn.Sequential:
    return nn.Sequential(
        PerExampleConv2d(channels, channels, 3, padding=1),
        nn.LeakyReLU(),
        PerExampleConv2d(channels, channels, 3, padding=1),
    )


class CompressiveAutoencoder(CorruptionNetwork):
    """Packs each 4 x 4 pixels of an image into ``code`` bits and draws the image from them.

    The published network has a code of 32 x 32 x 32 bits for a patch of 128 x 128 pixels. Its tanh at the end is clipped
    to [0, 1]. Sides that are no multiple of 4 are reflected up to one and cut off again.

    Args:
        width: channels of the first convolution, 64 in the published network; the body has twice this.
        code: bits of a place, 32 there.
        blocks: residual blocks of the encoder and of the decoder, 3 there.
        input_size: side of the images that it is trained on.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(self, width: int = 64, code: int = 32, blocks: int = 3, input_size: int = 32):
        super().__init__()
        if width < 4 or width % 4 or code < 1 or blocks < 1 or input_size < 8:
            raise UsageError(
                "compressive_autoencoder: width must be a multiple of 4, code and blocks at least 1, input_size at least "
                f"8; found {width}, {code}, {blocks}, {input_size}"
            )
        body = 2 * width
        self.input_size = input_size
        self.first = PerExampleConv2d(3, width, 5, stride=2)
        self.second = PerExampleConv2d(width, body, 5, stride=2)
        self.encoder_blocks = nn.ModuleList(_residual(body) for _ in range(blocks))
        self.to_code = PerExampleConv2d(body, code, 5, padding=2)
        self.from_code = PerExampleConv2d(code, width, 3)
        self.enlarge_first = PerExampleConvTranspose2d(width, body, 2, stride=2)
        self.decoder_blocks = nn.ModuleList(_residual(body) for _ in range(blocks))
        self.narrow = PerExampleConv2d(body, width // 2, 3)
        self.enlarge_second = PerExampleConvTranspose2d(width // 2, 4 * width, 2, stride=2)
        self.smooth = PerExampleConv2d(4 * width, width // 4, 3)
        self.output = PerExampleConv2d(width // 4, 3, 3)

    def encode(self, images: Tensor) -> Tensor:
        """RGB float [n, 3, h, w] in [0, 1], sides multiples of 4 -> values in [-1, 1], [n, code, h / 4, w / 4]."""
        x = images
        for layer in (self.first, self.second):
            x = F.leaky_relu(layer(F.pad(x, (1, 2, 1, 2))))
        for block in self.encoder_blocks:
            x = x + block(x)
        return torch.tanh(self.to_code(x))

    def decode(self, code: Tensor) -> Tensor:
        """-1 or 1, [n, code, h / 4, w / 4] -> [n, 3, h, w] in [-1, 1], an image where it is in [0, 1]."""
        x = self.enlarge_first(F.pad(F.leaky_relu(self.from_code(code)), (1, 1, 1, 1)))
        for block in self.decoder_blocks:
            x = x + block(x)
        x = self.enlarge_second(F.pad(F.leaky_relu(self.narrow(x)), (1, 1, 1, 1)))
        x = F.pad(F.leaky_relu(self.smooth(x)), (2, 2, 2, 2), mode="reflect")
        return torch.tanh(self.output(x))

    def draw(self, images: Tensor) -> Tensor:
        """RGB float [n, 3, h, w] in [0, 1] -> what is drawn from its code, not clipped. Rounded in eval mode."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 4, 0, -height % 4), mode="reflect")
        drawn = self.decode(binarise(self.encode(padded), chance=self.training))
        return drawn[..., :height, :width].to(images.dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.draw(images).clamp(0, 1)

    def training_pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw(images), images

    def published_names(self) -> Mapping[str, str]:
        """As in the network cae_32x32x32_zero_pad_bin, whose weights DeepAugment uses."""
        layers = {
            "first": "e_conv_1.1",
            "second": "e_conv_2.1",
            "to_code": "e_conv_3.0",
            "from_code": "d_up_conv_1.0",
            "enlarge_first": "d_up_conv_1.3",
            "narrow": "d_up_conv_2.0",
            "enlarge_second": "d_up_conv_2.3",
            "smooth": "d_up_conv_3.0",
            "output": "d_up_conv_3.3",
        }
        for part in ("encoder", "decoder"):
            for number in range(len(self.encoder_blocks)):
                for own, theirs in ((0, 1), (2, 4)):
                    layers[f"{part}_blocks.{number}.{own}"] = f"{part[0]}_block_{number + 1}.{theirs}"
        return {
            f"{own}.{kind}": f"{theirs}.{kind}"
            for own, theirs in layers.items()
            for kind in ("weight", "bias")
        }
