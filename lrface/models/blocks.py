"""What every network shares: input normalisation inside the model and the interface of a face backbone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormaliseInput(nn.Module):
    """RGB [n, 3, h, w] in [0, 1] -> (x - 0.5) / 0.5, the range face networks are trained on.

    Part of the network, so that whoever calls it can never normalise twice or not at all.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 - 1.0


class PReLU(nn.PReLU):
    """PReLU with one slope a channel, the same function and parameters as PyTorch's.

    PyTorch's CPU kernel runs an inner loop over channels alone on channels_last tensors; over whole rows of pixels
    it is several times as fast, which makes the training of a slim IR-18 about 1.4 times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.ndim == 4
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and x.is_contiguous(memory_format=torch.channels_last)
        ):
            n, c, h, w = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(n * h, w * c)
            out = F.prelu(rows, self.weight.to(x.dtype).repeat(w))
            return out.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return super().forward(x)


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, the same function and parameters as PyTorch's.

    Its gradient in bfloat16 takes a CPU 4 to 25 times as long as in float32: where a CPU trains under autocast it is
    computed in float32, which makes a step of a MobileFaceNet about 1.5 times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class FaceBackbone(nn.Module):
    """Base of the face networks: ``forward(x) = embed(features(x))``.

    ``features`` takes RGB float [n, 3, 112, 112] in [0, 1] and gives the final feature map
    [n, feature_channels, feature_size, feature_size] (f_theta in QualNet); ``embed`` turns that map into the embedding
    [n, embedding_size] (H in QualNet, eq. 2), not L2-normalised.

    ``channels`` is 1 for a network of grey images, which then takes [n, 1, h, w]. ``weights`` names the file that a fresh
    network starts from, where it has one: a stage then need not load it.
    """

    embedding_size: int
    feature_channels: int
    feature_size: int = 7
    input_size: int = 112
    channels: int = 3
    weights: str | None = None

    def features(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define features()")

    def embed(self, feature_map: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define embed()")

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.features(x))

    def described(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a card says it is built with again, wherever that is; ``arguments`` are those it was built with."""
        return arguments


def initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out), unit BatchNorm, Xavier linear layers; PReLU slopes stay at 0.25."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            if part.affine:
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def freeze_batchnorm(module: nn.Module) -> None:
    """Stop training the affine parameters of every BatchNorm in ``module``.

    The running statistics stay fixed only while these layers are in eval mode: see :func:`batchnorm_eval`.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for parameter in part.parameters():
                parameter.requires_grad_(False)


def batchnorm_eval(module: nn.Module) -> None:
    """Put every BatchNorm of ``module`` into eval mode, so that it uses and keeps its running statistics."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)
