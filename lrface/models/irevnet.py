"""i-RevNet: a classifier whose last feature map still holds the image (Jacobsen et al., "i-RevNet: Deep Invertible
Networks", ICLR 2018), its exact inverse, and training in memory that does not grow with depth.

The image is rearranged and split into two halves of the channels, which go through blocks

    (x1, x2) -> (S x2, S x1 + F(x2))        and back:        x2 = S^-1 y1,   x1 = S^-1 (y2 - F(x2))

with F a bottleneck (BN-ReLU-Conv3x3 three times, the first block without the first BN-ReLU, a quarter of the channels
inside) and S the rearrangement of 2x2 pixels into channels where the stride is 2, else nothing. F is never
inverted, so it may be anything; three convolutions a block give the networks their names.

Networks by name:

    irevnet300        blocks 6 16 72 6, strides 2 2 2 2, channels 24 96 384 1536 a half, initial down-sampling 2: the
                      bijective network of the i-RevNet paper, 3 x 224 x 224 -> 3072 x 7 x 7, and QualNet's decoder
                      (paper 000, appendix A)
    irevnet45, 78, 150, 450   Table C.3 of paper 000 gives these numbers of layers and no more; the blocks here keep
                      irevnet300's proportions: 1 2 11 1, 2 4 18 2, 3 8 36 3 and 9 24 108 9
    irevnet_cifar     blocks 18 18 18, strides 1 2 2, channels 16 64 256, no initial down-sampling, as in the code that
                      was published with the i-RevNet paper: 3 x 32 x 32, padded to 32 channels -> 512 x 8 x 8
    irevnet_face      blocks 6 16 28, strides 2 2 2, channels 24 96 384, initial down-sampling 2, chosen here:
                      3 x 112 x 112 -> 768 x 7 x 7
    irevnet           any other

The order of the channels after S is that of ``pixel_unshuffle``, not that of the published code, and BatchNorm has
PyTorch's momentum throughout; the functions that can be learned are the same. There is no dropout, which the published
code has, at 0.1, in its training on CIFAR alone. Where there are fewer image channels
than the first stage has, both halves get their share of them before the channels of zeros. The published code leaves
irevnet_cifar's second half empty; BatchNorm of F(0) then divides by a variance of zero three times over, and what is
computed again from a feature map with rounding errors, gradients too, is noise.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.blocks import FaceBackbone, NormaliseInput, initialise

BLOCKS = {45: (1, 2, 11, 1), 78: (2, 4, 18, 2), 150: (3, 8, 36, 3), 300: (6, 16, 72, 6), 450: (9, 24, 108, 9)}


class ReversibleBlock(nn.Module):
    """``(x1, x2) -> (S x2, S x1 + F(x2))`` on two halves of the channels.

    Halves float [n, inputs, h, w] -> float [n, inputs * stride**2, h / stride, w / stride].

    Args:
        inputs: channels of a half.
        stride: 1 or 2.
        first: without BatchNorm and ReLU before the first convolution.
        bottleneck: F's inner channels are those of a half that leaves the block, divided by this.
    """

    def __init__(self, inputs: int, stride: int = 1, first: bool = False, bottleneck: int = 4):
        super().__init__()
        self.stride = stride
        outputs = inputs * stride**2
        inner = max(1, outputs // bottleneck)
        before: list[nn.Module] = [] if first else [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        self.residual = nn.Sequential(
            *before,
            nn.Conv2d(inputs, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, 1, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, outputs, 3, 1, 1, bias=False),
        )

    def squeeze(self, x: Tensor) -> Tensor:
        """S."""
        return x if self.stride == 1 else F.pixel_unshuffle(x, self.stride)

    def unsqueeze(self, x: Tensor) -> Tensor:
        """S^-1."""
        return x if self.stride == 1 else F.pixel_shuffle(x, self.stride)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.squeeze(x2), self.squeeze(x1) + self.residual(x2)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """(x1, x2) of (y1, y2); running statistics stay as they are."""
        x2 = self.unsqueeze(y1)
        with self.statistics_kept():
            return self.unsqueeze(y2 - self.residual(x2)), x2

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """BatchNorm normalises as it would, by the batch in training mode, and does not count the batch."""
        norms = [
            part
            for part in self.residual
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
        ]
        for part in norms:
            part.track_running_stats = False
        try:
            yield
        finally:
            for part in norms:
                part.track_running_stats = True


def _run(blocks: Sequence[ReversibleBlock], inverse: bool, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for block in reversed(blocks) if inverse else blocks:
        x1, x2 = block.inverse(x1, x2) if inverse else block(x1, x2)
    return x1, x2


GRID = 2.0**-12
"""Below what bfloat16 resolves of any value above 0.03. float32 adds multiples of it without rounding up to 4096."""


def _to_grid(x: Tensor) -> Tensor:
    return torch.round(x.float() / GRID) * GRID


def _run_on_grid(
    blocks: Sequence[ReversibleBlock], layout: torch.memory_format, x1: Tensor, x2: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`_run` forwards under autocast, so that it can be undone to the bit.

    float32 rounds x1 + F(x2) - F(x2) in the last bit. Where F computes in bfloat16, one such bit can move a value to the
    next one that bfloat16 has, a thousand times further off, and after some dozen blocks what is computed again is
    another feature map. With multiples of :data:`GRID` nothing is rounded; F then gets what it got, in the same layout.
    """
    x1, x2 = _to_grid(x1), _to_grid(x2)
    for block in blocks:
        x2 = x2.contiguous(memory_format=layout)
        x1, x2 = block.squeeze(x2), block.squeeze(x1) + _to_grid(block.residual(x2))
    return x1, x2


class _Reversible(torch.autograd.Function):
    """:func:`_run` that keeps its result alone and computes what the backward pass needs from it, block by block.

    ``parameters`` are those of the blocks in order: autograd, and DDP's hooks, must see that they take part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[ReversibleBlock],
        inverse: bool,
        x1: Tensor,
        x2: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.inverse = blocks, inverse
        ctx.autocast = _autocast_now(x1.device.type)
        # The inverse switches autocast off.
        low = ctx.autocast is not None and ctx.autocast[2] and x1.dtype == x2.dtype == torch.float32
        ctx.layout = None
        if low and not inverse:
            flat = x1.is_contiguous() or not x1.is_contiguous(memory_format=torch.channels_last)
            ctx.layout = torch.contiguous_format if flat else torch.channels_last
        with _autocast(ctx.autocast):
            y1, y2 = (
                _run(blocks, inverse, x1, x2)
                if ctx.layout is None
                else _run_on_grid(blocks, ctx.layout, x1, x2)
            )
        # The parameters only so that autograd notices when one was changed before the backward pass.
        ctx.save_for_backward(y1, y2, *parameters)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.saved_tensors[:2]
        da, db = gradients
        found: list[tuple[Tensor | None, ...]] = []
        undo = _undo_inverse if ctx.inverse else partial(_undo_forward, layout=ctx.layout)
        with _autocast(ctx.autocast), _full_float32():
            for block in ctx.blocks if ctx.inverse else reversed(ctx.blocks):
                a, b, da, db, of_parameters = undo(block, a, b, da, db)
                found.append(of_parameters)
        in_order = found if ctx.inverse else reversed(found)
        return None, None, da, db, *(gradient for block in in_order for gradient in block)


def masks_suffice(blocks: Sequence[ReversibleBlock]) -> bool:
    """Whether the gradient of the blocks' input needs no more of an activation than whether ReLU let it pass: no weight
    is trained, and BatchNorm normalises by its running statistics."""
    return not any(
        part.training or any(parameter.requires_grad for parameter in part.parameters(recurse=False))
        for block in blocks
        for part in block.residual
    )


class _FrozenInverse(torch.autograd.Function):
    """:func:`_run` backwards through blocks of which :func:`masks_suffice`; it keeps one bit a ReLU.

    The forward pass computes what :func:`_run` does, to the bit. BatchNorm is then a scale of each channel, and the
    backward pass is a transposed convolution for each convolution, with nothing computed again.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[ReversibleBlock], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.autocast = blocks, _autocast_now(x1.device.type)
        masks: list[Tensor] = []
        ctx.layouts = []
        for block in reversed(blocks):
            y2, x2 = x2, block.unsqueeze(x1)
            value = x2
            for part in block.residual:
                value = part(value)
                if isinstance(part, nn.ReLU):
                    passed = value > 0
                    ctx.layouts.append((passed.shape, passed.stride()))
                    masks.append(_pack(passed))
            x1 = block.unsqueeze(y2 - value)
        # The network only so that autograd notices when something was changed before the backward pass.
        own = [value for block in blocks for value in (*block.parameters(), *block.buffers())]
        ctx.save_for_backward(*masks, *own)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:
        masks = list(zip(ctx.saved_tensors, ctx.layouts, strict=False))
        with _autocast(ctx.autocast), _full_float32():
            for block in ctx.blocks:
                gradient = of_y2 = block.squeeze(d1)
                for part in reversed(block.residual):
                    if isinstance(part, nn.Conv2d):
                        stride = part.stride[0]  # sides are multiples of it
                        gradient = F.conv_transpose2d(gradient, part.weight, None, stride, 1, stride - 1)
                    elif isinstance(part, nn.ReLU):
                        packed, layout = masks.pop()
                        gradient.mul_(_unpack(packed, *layout))
                    else:
                        scale = part.weight * torch.rsqrt(part.running_var + part.eps)
                        gradient.mul_(scale[:, None, None])
                d1, d2 = block.squeeze(d2 - gradient), of_y2
        return None, d1, d2


def _pack(mask: Tensor) -> Tensor:
    """A fresh bool tensor of any layout -> uint8 [ceil(elements / 8)], a bit an element in the order of memory.

    Eight bools are eight bytes, one int64. The factor moves bit 8 i to bit 56 + i, for i from 0 to 7; products that
    meet no other never carry. ``mask`` is overwritten.
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(torch.int64).mul_(0x0102040810204080) >> 56).to(torch.uint8)


def _unpack(packed: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The mask that was packed, bool; byte i of an int64 keeps bit i of the eight."""
    copies = packed.to(torch.int64).mul_(0x0101010101010101)
    bits = copies.bitwise_and_(0x8040201008040201 - 2**64).view(torch.uint8)
    return bits.ne_(0).view(torch.bool).as_strided(shape, stride)


def _autocast_now(device: str) -> tuple[str, torch.dtype, bool] | None:
    """What :func:`_autocast` takes; None on a device that has no autocast."""
    if not torch.amp.is_autocast_available(device):
        return None
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def _autocast(setting: tuple[str, torch.dtype, bool] | None) -> AbstractContextManager[Any]:
    """Autocast as it was in the forward pass, on or off. Without its cache, which would hand weights that were cast where
    no gradient was wanted to the passes that want one, and keep a copy of every block's."""
    return nullcontext() if setting is None else torch.autocast(*setting, cache_enabled=False)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions of float32 without TF32, PyTorch's default for them on NVIDIA's GPUs: ten bits of mantissa are too few
    for what is undone, see :meth:`IRevNet.inverse`."""
    cudnn: Any = torch.backends.cudnn
    # PyTorch 2.9 has a flag for each kind of operator, and does not want both ways of setting them mixed.
    place, name, full = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(place, name)
    setattr(place, name, full)
    try:
        yield
    finally:
        setattr(place, name, before)


def _residual(
    block: ReversibleBlock, x2: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """F(x2), and ``gradient`` of it carried back to x2 and to each parameter of the block."""
    parameters = list(block.parameters())
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    x2 = x2.detach().requires_grad_()
    with torch.enable_grad(), block.statistics_kept():
        value = block.residual(x2)
    of_x2, *of_wanted = torch.autograd.grad(value, [x2, *wanted], gradient.to(value.dtype))
    rest = iter(of_wanted)
    return (
        value.detach(),
        of_x2,
        tuple(next(rest) if parameter.requires_grad else None for parameter in parameters),
    )


def _undo_forward(
    block: ReversibleBlock,
    y1: Tensor,
    y2: Tensor,
    d1: Tensor,
    d2: Tensor,
    layout: torch.memory_format | None,
) -> Any:
    """From a block's outputs and their gradients to its inputs and theirs, and its parameters'. ``layout`` where the
    values are those of :func:`_run_on_grid`, through whose rounding gradients pass as they are."""
    x2 = block.unsqueeze(y1)
    if layout is not None:
        x2 = x2.contiguous(memory_format=layout)
    value, through, of_parameters = _residual(block, x2, d2)
    if layout is not None:
        value = _to_grid(value)
    return (
        block.unsqueeze(y2 - value),
        x2,
        block.unsqueeze(d2),
        block.unsqueeze(d1) + through,
        of_parameters,
    )


def _undo_inverse(block: ReversibleBlock, x1: Tensor, x2: Tensor, d1: Tensor, d2: Tensor) -> Any:
    """The same where the block ran backwards."""
    of_y2 = block.squeeze(d1)
    value, through, of_parameters = _residual(block, x2, -of_y2)
    return (
        block.squeeze(x2),
        block.squeeze(x1) + value,
        block.squeeze(d2 + through),
        of_y2,
        of_parameters,
    )


class IRevNet(FaceBackbone):
    """An i-RevNet; see this module.

    Input RGB float [n, 3, input_size, input_size] in [0, 1]; feature map float [n, 2 * channels[-1], feature_size,
    feature_size], from which :meth:`inverse` gets the image back; embedding float [n, 2 * channels[-1]], the mean over
    the pixels of ReLU(BatchNorm(feature map)).

    With ``recompute`` a training step keeps no activations of the blocks, neither forward nor through the inverse: the
    backward pass computes them again from the feature map (or image), at the cost of a second forward pass. Gradients
    are autograd's but for rounding: of a fresh irevnet300 they differ by 1e-11 of their length in float64 and by 0.01 in
    float32; under autocast what is computed again is what was computed, to the bit (:func:`_run_on_grid`). Statistics of
    BatchNorm move once a step. In a compiled network (trainer.compile) the compiler decides what is kept instead.

    The inverse of a frozen network in eval mode, with ``recompute`` or without, keeps one bit for each value of a ReLU
    and computes nothing again; its gradient differs from autograd's by 3e-6 in float32. Neither way can be
    differentiated twice.

    Args:
        blocks: how many of each stage, at least 1.
        strides: of each stage's first block, 1 or 2.
        channels: of a half in each stage; a stage has stride**2 times as many as the stage before. Where the
            image does not fill the first stage, it is padded with channels of zeros, and the network is injective
            instead of bijective.
        down_sampling: pixels of a side that are rearranged into channels before the first block; 1 for none.
        input_size: pixels of a side.
        bottleneck: see :class:`ReversibleBlock`.
        recompute: memory for time, as above.

    Raises:
        UsageError: numbers that do not fit together, naming them.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        down_sampling: int = 1,
        input_size: int = 224,
        bottleneck: int = 4,
        recompute: bool = True,
    ):
        super().__init__()
        _check(blocks, strides, channels, down_sampling, input_size, bottleneck)
        self.input_size = input_size
        self.feature_channels = self.embedding_size = 2 * channels[-1]
        self.feature_size = input_size // down_sampling // prod(strides)
        self.down_sampling = down_sampling
        self.recompute = recompute
        half = channels[0] // strides[0] ** 2
        image = 3 * down_sampling**2
        self.half_channels = half
        self.shares = -(-image // 2), image // 2
        self.normalise = NormaliseInput()
        layers: list[nn.Module] = []
        for count, stride in zip(blocks, strides, strict=True):
            for number in range(count):
                layers.append(
                    ReversibleBlock(
                        half, stride if number == 0 else 1, first=not layers, bottleneck=bottleneck
                    )
                )
                half *= stride**2 if number == 0 else 1
        self.body = nn.ModuleList(layers)
        self.output = nn.Sequential(
            nn.BatchNorm2d(self.feature_channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        initialise(self)

    def _blocks(self, inverse: bool, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        blocks: list[ReversibleBlock] = list(self.body)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            return _run(blocks, inverse, x1, x2)
        with _full_float32():
            if torch.is_grad_enabled():
                if inverse and (x1.requires_grad or x2.requires_grad) and masks_suffice(blocks):
                    return _FrozenInverse.apply(blocks, x1, x2)
                if self.recompute:
                    parameters = [parameter for block in blocks for parameter in block.parameters()]
                    return _Reversible.apply(blocks, inverse, x1, x2, *parameters)
            return _run(blocks, inverse, x1, x2)

    def features(self, x: Tensor) -> Tensor:
        x = self.normalise(x)
        if self.down_sampling > 1:
            x = F.pixel_unshuffle(x, self.down_sampling)
        halves = x.split(self.shares, dim=1)
        padded = (F.pad(part, (0, 0, 0, 0, 0, self.half_channels - part.shape[1])) for part in halves)
        return torch.cat(self._blocks(False, *padded), dim=1)

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)

    def inverse(self, feature_map: Tensor) -> Tensor:
        """The image of a feature map: ``inverse(features(x))`` is x but for rounding.

        In eval mode BatchNorm uses its running statistics both ways, and each image is a function of its own feature
        map. In training mode :meth:`features` normalises by the batch, so that only the whole batch's feature map,
        inverted in training mode, gives the batch back: the inverse then normalises by the same batch. Whoever uses
        the inverse as a decoder wants eval mode. The inverse never changes running statistics.

        Autocast is left out, and so is TF32: the inverse runs in float32 at least. In bfloat16 that of a fresh
        irevnet300 draws another image altogether: an error of 1.5 to 3.5 times the image's length, with TF32's ten bits
        of 0.3, in float32 of 0.0001 to 0.0006 (of a fresh irevnet_cifar, which is padded: 0.003). For the same reason a
        map that :meth:`features` gave under autocast is that of another image.

        Args:
            feature_map: float [n, feature_channels, h, w]; any, not only one that an image has.

        Returns:
            RGB float [n, 3, H, W] as large as the image of that feature map, not clipped: outside [0, 1] where the
            map is of no image. float32 for a map of half precision.

        Raises:
            UsageError: another number of channels.
        """
        if feature_map.ndim != 4 or feature_map.shape[1] != self.feature_channels:
            raise UsageError(
                f"the inverse takes feature maps of shape [n, {self.feature_channels}, h, w]; found "
                f"{list(feature_map.shape)}"
            )
        if feature_map.dtype in (torch.float16, torch.bfloat16):
            feature_map = feature_map.float()
        device = feature_map.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            halves = self._blocks(True, *feature_map.chunk(2, dim=1))
        x = torch.cat([part[:, :share] for part, share in zip(halves, self.shares, strict=True)], dim=1)
        if self.down_sampling > 1:
            x = F.pixel_shuffle(x, self.down_sampling)
        return (x + 1.0) / 2.0


def _check(
    blocks: Sequence[int],
    strides: Sequence[int],
    channels: Sequence[int],
    down_sampling: int,
    input_size: int,
    bottleneck: int,
) -> None:
    for name, values in (("blocks", blocks), ("strides", strides), ("channels", channels)):
        if (
            not isinstance(values, Sequence)
            or not values
            or not all(type(value) is int and value >= 1 for value in values)
        ):
            raise UsageError(
                f"backbone.{name} must list a whole number of at least 1 a stage; found {values!r}"
            )
        if len(values) != len(blocks):
            raise UsageError(
                f"backbone.{name} must have an entry for each of the {len(blocks)} stages that backbone.blocks "
                f"lists; found {list(values)}"
            )
    for name, value in (
        ("down_sampling", down_sampling),
        ("input_size", input_size),
        ("bottleneck", bottleneck),
    ):
        if value < 1:
            raise UsageError(f"backbone.{name} must be at least 1; found {value}")
    if any(stride > 2 for stride in strides):
        raise UsageError(f"backbone.strides must be 1 or 2; found {list(strides)}")
    for before, stride, now in zip(channels, strides[1:], channels[1:], strict=False):
        if now != before * stride**2:
            raise UsageError(
                f"backbone.channels: a stage of stride {stride} after {before} channels has {before * stride**2}; "
                f"found {now}"
            )
    image = 3 * down_sampling**2
    if channels[0] % strides[0] ** 2 or 2 * channels[0] // strides[0] ** 2 < image:
        raise UsageError(
            f"backbone.channels: the image has {image} channels after down-sampling by {down_sampling}; with a first "
            f"stride of {strides[0]} the first stage needs a multiple of {strides[0] ** 2}, at least "
            f"{-(-image // 2) * strides[0] ** 2}; found {channels[0]}"
        )
    if input_size % (down_sampling * prod(strides)):
        raise UsageError(
            f"backbone.input_size must be a multiple of {down_sampling * prod(strides)}, by which the network reduces "
            f"an image; found {input_size}"
        )


class IRevNetInverse(nn.Module):
    """QualNet's decoder: a 3x3 convolution and the inverse of a trained i-RevNet, which is never trained itself
    (paper 001, section 3.3; paper 000, appendix A).

    Feature map float [n, in_channels, in_size, in_size] -> image float32 [n, 3, out_size, out_size], RGB, not clipped.

    The convolution has no BatchNorm and no ReLU. Where the classifier's feature map is smaller than the i-RevNet's (a
    ResNet of 32 pixels ends at 4 x 4, irevnet_cifar at 8 x 8), it gives 4 times the channels, whose groups of four
    become 2 x 2 pixels; the papers' networks all end at 7 x 7. The i-RevNet stays in eval mode and its
    parameters take no gradient, whatever is set on the decoder as a whole.

    A fresh convolution gives maps of no image: most of what the inverse makes of them is outside [0, 1], where a
    clipped loss has no gradient. The pictures come slowly at first.

    Args:
        in_channels, in_size: of the classifier's feature map.
        out_size: pixels of a side of the images that the classifier takes.
        network: the i-RevNet; its weights come later, from where it was trained.

    Raises:
        UsageError: the i-RevNet is for images of another size, or its feature map is not 1, 2, 4 ... times as large.
    """

    def __init__(self, in_channels: int, in_size: int, out_size: int, network: IRevNet):
        super().__init__()
        if network.input_size != out_size:
            raise UsageError(
                f"decoder.network: this i-RevNet draws images of {network.input_size} x {network.input_size} pixels, "
                f"the classifier takes {out_size} x {out_size}; choose an i-RevNet for {out_size} pixels"
            )
        scale = network.feature_size // in_size
        if scale * in_size != network.feature_size or scale & (scale - 1):
            raise UsageError(
                f"decoder.network: the i-RevNet's feature map has {network.feature_size} x {network.feature_size} "
                f"pixels, the classifier's {in_size} x {in_size}; the first must be 1, 2, 4 ... times as large"
            )
        self.connector = nn.Sequential(
            nn.Conv2d(in_channels, network.feature_channels * scale**2, 3, 1, 1), nn.PixelShuffle(scale)
        )
        self.network = network
        network.requires_grad_(False)
        network.eval()
        initialise(self.connector)

    def train(self, mode: bool = True) -> "IRevNetInverse":
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.network.inverse(self.connector(feature_map))
