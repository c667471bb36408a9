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


class _SlopesOfRows(torch.autograd.Function):
    """PReLU of a matrix float [rows, c] with slopes [c], its gradients from kernels that a CPU does whole vectors in.

    PyTorch's own kernel for them takes 6 to 8 ns an element on a CPU, a third of a MobileFaceNet's training step.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, slopes: Tensor) -> Tensor:
        return F.prelu(rows, slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        rows, slopes = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(gradient, rows, 0)
        of_rows = torch.lerp(positive, gradient, slopes) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None
        # A product with ones sums in float32, whatever the type, and faster than sum does.
        return of_rows, (rows.new_ones(1, len(rows)) @ ((gradient - positive) * rows))[0]


class PReLU(nn.PReLU):
    """PReLU with one slope a channel, the same function and parameters as PyTorch's.

    PyTorch's CPU kernel runs an inner loop over channels alone on channels_last tensors; over whole rows of pixels
    it is several times as fast. With gradients by vectors, a step of a MobileFaceNet takes half as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.ndim == 4
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and x.is_contiguous(memory_format=torch.channels_last)
        ):
            n, c, h, w = x.shape
            slopes = self.weight.to(x.dtype).repeat(w)
            rows = x.permute(0, 2, 3, 1).reshape(n * h, w * c)
            out = _SlopesOfRows.apply(rows, slopes) if torch.is_grad_enabled() else F.prelu(rows, slopes)
            return out.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return super().forward(x)


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, the same function and parameters as PyTorch's.

    Its gradient takes a CPU ten times as long as that of the same convolution without the stride, and longer in
    bfloat16: where a CPU trains it, every position is computed and those of the stride are taken.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and isinstance(self.padding, tuple):
            whole = F.conv2d(x, self.weight, self.bias, 1, self.padding, self.dilation, self.groups)
            down, right = self.stride
            return whole[..., ::down, ::right].contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class GlobalDepthwise(nn.Conv2d):
    """A depthwise convolution whose kernel is as large as the map, the same function and parameters as PyTorch's.

    A CPU trains it as the weighted sum it is, in float32, in a hundredth of the time of the convolution's gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        whole = self.padding == (0, 0) and x.shape[-2:] == self.weight.shape[-2:]
        if x.device.type == "cpu" and torch.is_grad_enabled() and whole:
            summed = (x.float() * self.weight[:, 0].float()).sum((2, 3), keepdim=True)
            return (summed if self.bias is None else summed + self.bias[:, None, None]).to(x.dtype)
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
