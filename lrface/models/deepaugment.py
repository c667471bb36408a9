"""DeepAugment's edits (Hendrycks et al., "The Many Faces of Robustness", ICCV 2021): image-to-image networks whose weights
and signals are distorted at random, so that what they draw is a corrupted image.

The paper names kinds ("zeroing, negating, convolving, transposing, applying activation functions"); which there are, how
strong and in which layers is taken from the scripts that its authors published. Where such a script draws from 16 blocks
of EDSR and a network here has fewer, those that it has are drawn from.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.compressive_autoencoder import CompressiveAutoencoder
from lrface.models.edsr import EDSR
from lrface.models.per_example import CorruptionNetwork

Random = np.random.Generator
LAPLACIAN_4 = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
LAPLACIAN_8 = ((-1.0, -1.0, -1.0), (-1.0, 8.0, -1.0), (-1.0, -1.0, -1.0))


def _uniform(rng: Random, like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, tuple(like.shape)).astype(np.float32)).to(like)


def _convolved(weight: Tensor, kernels: Tensor) -> Tensor:
    """The kernels [out, in, k, k] of a layer as pictures, convolved with others [in, in, k, k]."""
    return F.conv2d(weight, kernels.to(weight), padding=weight.shape[-1] // 2)


def _keep_largest(weight: Tensor) -> Tensor:
    flat = weight.flatten(2)
    best = flat.argmax(2, keepdim=True)
    return torch.zeros_like(flat).scatter(2, best, flat.gather(2, best)).view_as(weight)


# ------------------------------------------------------------------------------------------------------ EDSR's weights


class _Blocks:
    """The two convolutions of each residual block of an EDSR, drawn from a range as the script does."""

    def __init__(self, network: EDSR, rng: Random):
        self.blocks, self.rng = network.blocks, rng

    def _block(self, start: int, stop: int, step: int) -> Any:
        there = [number for number in range(start, stop, step) if number < len(self.blocks)]
        return self.blocks[int(self.rng.choice(there if there else len(self.blocks)))]

    def both(self, start: int, stop: int, step: int = 1) -> tuple[nn.Conv2d, nn.Conv2d]:
        block = self._block(start, stop, step)
        return block[0], block[2]

    def either(self) -> nn.Conv2d:
        return self.both(0, 15)[int(self.rng.integers(2))]


def _edsr_flip_filters(b: _Blocks) -> None:
    for conv in b.both(0, 10, 3):
        conv.weight.copy_(conv.weight.flip(0))
        conv.bias.copy_(conv.bias.flip(0))  # type: ignore[union-attr]


def _edsr_negate(b: _Blocks) -> None:
    conv, _ = b.both(1, 10, 3)
    conv.weight.neg_()
    conv.bias.neg_()  # type: ignore[union-attr]


def _edsr_zero(b: _Blocks) -> None:
    conv, _ = b.both(0, 10, 3)
    conv.weight.zero_()
    conv.bias.zero_()  # type: ignore[union-attr]


def _edsr_negative_gelu(b: _Blocks) -> None:
    for conv in b.both(0, 10, 3):
        conv.weight.copy_(-F.gelu(conv.weight))


def _edsr_laplacian_4(b: _Blocks) -> None:
    conv, _ = b.both(0, 10, 3)
    conv.weight.mul_(torch.tensor(LAPLACIAN_4).to(conv.weight))


def _edsr_laplacian_8(b: _Blocks) -> None:
    conv, _ = b.both(0, 10, 3)
    conv.weight.mul_(torch.tensor(LAPLACIAN_8).to(conv.weight))


def _edsr_multiply(b: _Blocks) -> None:
    _, conv = b.both(0, 10, 3)
    conv.weight.mul_(1 + 2 * float(b.rng.uniform()) * _uniform(b.rng, conv.weight, 0, 2))


def _edsr_mirror(b: _Blocks) -> None:
    first, second = b.both(0, 10, 3)
    first.weight.copy_(first.weight.flip(-1))
    second.weight.neg_()


def _edsr_shift(b: _Blocks) -> None:
    conv, _ = b.both(1, 13, 4)
    kernels = torch.zeros_like(conv.weight)
    for channel in range(len(kernels)):
        row, column = b.rng.integers(3, size=2)
        kernels[:, channel, int(row), int(column)] = float(b.rng.choice((-1.0, 1.0)))
    conv.weight.copy_(_convolved(conv.weight, kernels))


def _edsr_convolve(b: _Blocks) -> None:
    conv, _ = b.both(0, 10, 3)
    kernels = (2 * _uniform(b.rng, conv.weight) * float(b.rng.uniform()) - 1) / 6
    conv.weight.copy_(_convolved(conv.weight, kernels))


def _edsr_blur(b: _Blocks) -> None:
    _, conv = b.both(1, 12, 4)
    out, channels, side, _ = conv.weight.shape
    kernels = b.rng.dirichlet([0.1] * side**2, (out, channels)).reshape(out, channels, side, side)
    conv.weight.copy_(_convolved(conv.weight, torch.from_numpy(kernels.astype(np.float32))))


def _edsr_add_noise(b: _Blocks) -> None:
    _, conv = b.both(0, 15)
    conv.weight.add_(_uniform(b.rng, conv.weight, -0.5, 0.5))


def _edsr_rotate(b: _Blocks) -> None:
    for _ in range(5):
        conv = b.either()
        turns, dims = int(b.rng.integers(1, 4)), [2, 3] if b.rng.integers(2) else [0, 1]
        conv.weight.copy_(conv.weight.rot90(turns, dims))


def _edsr_random_signs(b: _Blocks) -> None:
    for _ in range(5):
        conv, _ = b.both(0, 15)
        conv.weight.mul_(_uniform(b.rng, conv.weight).round() * 2 - 1)


def _edsr_drop_weights(b: _Blocks) -> None:
    for _ in range(5):
        conv, _ = b.both(0, 15)
        conv.weight.mul_(_uniform(b.rng, conv.weight).round())


def _edsr_negate_filters(b: _Blocks) -> None:
    for _ in range(5):
        conv, _ = b.both(0, 15)
        filters = len(conv.weight)
        chosen = np.unique(b.rng.integers(filters, size=max(1, filters // 2)))
        conv.weight[torch.from_numpy(chosen)] *= -1


def _edsr_keep_largest(b: _Blocks) -> None:
    for _ in range(5):
        conv = b.either()
        conv.weight.copy_(_keep_largest(conv.weight))


EDSR_EDITS: dict[str, Callable[[_Blocks], None]] = {
    "flip_filters": _edsr_flip_filters,
    "negate": _edsr_negate,
    "zero": _edsr_zero,
    "negative_gelu": _edsr_negative_gelu,
    "laplacian_4": _edsr_laplacian_4,
    "laplacian_8": _edsr_laplacian_8,
    "multiply": _edsr_multiply,
    "mirror": _edsr_mirror,
    "shift": _edsr_shift,
    "convolve": _edsr_convolve,
    "blur": _edsr_blur,
    "add_noise": _edsr_add_noise,
    "rotate": _edsr_rotate,
    "random_signs": _edsr_random_signs,
    "drop_weights": _edsr_drop_weights,
    "negate_filters": _edsr_negate_filters,
    "keep_largest": _edsr_keep_largest,
}
"""EDSR's 17 edits of weights, in residual blocks ("first" and "second" are a block's convolutions); a network gets
three:

flip_filters: filters and biases of both in the opposite order. negate: the first times -1. zero: the first is 0.
negative_gelu: w becomes -gelu(w) in both. laplacian_4, laplacian_8: the first times a Laplacian of 4 or 8 neighbours,
place by place. multiply: the second times 1 + 2 u U[0, 2), u from U[0, 1). mirror: kernels of the first left to
right, the second times -1. shift: kernels of the first convolved with a shift by at most a pixel, its sign drawn, for
each channel. convolve: with kernels (2 u U[0, 1) - 1) / 6. blur: those of the second with Dirichlet kernels of
concentration 0.1. add_noise: U[-0.5, 0.5) onto the second. rotate: five times kernels, or the matrix of filters and
channels, by 90, 180 or 270 degrees. random_signs: five first ones with each weight's sign drawn. drop_weights: five
with half of the weights 0. negate_filters: five with up to half of the filters times -1. keep_largest: five of
either, each kernel with its largest value alone."""


# -------------------------------------------------------------------------------------- the compressive autoencoder's


class _Middle:
    """The layers of a compressive autoencoder around its code, numbered as in the script: 8 makes the code, 9 and 10 come
    right after it, from 11 on there are the decoder's residual convolutions."""

    def __init__(self, network: CompressiveAutoencoder, rng: Random):
        decoder = [layer for block in network.decoder_blocks for layer in (block[0], block[2])]  # type: ignore[index]
        self.layers = dict(
            enumerate([network.to_code, network.from_code, network.enlarge_first, *decoder], start=8)
        )
        self.rng = rng

    def draw(self, start: int = 8, stop: int = 14) -> nn.Conv2d:
        there = [number for number in range(start, stop) if number in self.layers]
        return self.layers[int(self.rng.choice(there))]

    def filters(self, layer: nn.Conv2d, count: int) -> Tensor:
        """The first axis of ``count`` kernels drawn with repetition."""
        return torch.from_numpy(np.unique(self.rng.integers(len(layer.weight), size=count)))


def _filters_and_biases(layer: nn.Conv2d, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    layer.weight[chosen] = change(layer.weight[chosen])
    own = chosen[chosen < len(layer.bias)]  # type: ignore[arg-type]
    layer.bias[own] = change(layer.bias[own])  # type: ignore[index]


def _cae_flip_filters(m: _Middle) -> None:
    layer = m.draw(11, 16)
    layer.weight.copy_(layer.weight.flip(0))
    layer.bias.copy_(layer.bias.flip(0))  # type: ignore[union-attr]


def _cae_negate_filters(m: _Middle) -> None:
    layer = m.draw()
    _filters_and_biases(layer, m.filters(layer, 12), torch.neg)


def _cae_zero_filters(m: _Middle) -> None:
    layer = m.draw()
    _filters_and_biases(layer, m.filters(layer, 25), torch.zeros_like)


def _cae_negative_gelu(m: _Middle) -> None:
    layer = m.draw(10, 14)
    _filters_and_biases(layer, m.filters(layer, 25), lambda values: -F.gelu(values))


def _cae_multiply(m: _Middle) -> None:
    for _ in range(2):
        layer = m.draw()
        layer.weight.mul_(1 + 2 * float(m.rng.uniform()) * _uniform(m.rng, layer.weight, 0, 4))


def _cae_mask(m: _Middle) -> None:
    layer = m.draw()
    ones = _uniform(m.rng, layer.weight).round()
    layer.weight.mul_(ones if m.rng.uniform() < 0.5 else ones * 2 - 1)


def _cae_rotate(m: _Middle) -> None:
    layer = m.draw()
    layer.weight.copy_(layer.weight.rot90(int(m.rng.integers(1, 4)), [2, 3]))


def _cae_negate_some(m: _Middle) -> None:
    layer = m.draw()
    layer.weight[m.filters(layer, max(1, len(layer.weight) // 5))] *= -1


def _cae_keep_largest(m: _Middle) -> None:
    layer = m.draw()
    layer.weight.copy_(_keep_largest(layer.weight))


CAE_EDITS: dict[str, Callable[[_Middle], None]] = {
    "flip_filters": _cae_flip_filters,
    "negate_filters": _cae_negate_filters,
    "zero_filters": _cae_zero_filters,
    "negative_gelu": _cae_negative_gelu,
    "multiply": _cae_multiply,
    "mask": _cae_mask,
    "rotate": _cae_rotate,
    "negate_some": _cae_negate_some,
    "keep_largest": _cae_keep_largest,
}
"""The compressive autoencoder's 9 edits of weights, in layers around its code; a network gets one:

flip_filters: a decoder layer's filters and biases in the opposite order. negate_filters: up to 12 filters and their biases
times -1. zero_filters: up to 25 are 0. negative_gelu: up to 25 become -gelu. multiply: two layers times 1 + 2 u U[0, 4), u
from U[0, 1). mask: half of a layer's weights 0, or times -1. rotate: kernels by 90, 180 or 270 degrees. negate_some: up to a
fifth of the filters times -1, not their biases. keep_largest: each kernel with its largest value alone (written in the
script, but never drawn there: it counts one short)."""


def edits_of(network: nn.Module) -> dict[str, Callable[..., None]]:
    """The edits of a kind of network, by name.

    Raises:
        UsageError: DeepAugment has none for it.
    """
    if isinstance(network, EDSR):
        return EDSR_EDITS
    if isinstance(network, CompressiveAutoencoder):
        return CAE_EDITS
    raise UsageError(
        f"DeepAugment edits an EDSR or a compressive autoencoder; found {type(network).__name__}"
    )


@torch.no_grad()
def edited(
    network: CorruptionNetwork, rng: Random, names: Sequence[str] | None = None
) -> tuple[CorruptionNetwork, list[str]]:
    """A copy of ``network`` with some weights edited, and the names of the edits.

    Args:
        rng: what is drawn; the same generator state gives the same copy.
        names: these edits in this order; by default three of :data:`EDSR_EDITS` with repetition, or one of
            :data:`CAE_EDITS`.

    Raises:
        UsageError: another kind of network, or an unknown edit.
    """
    known = edits_of(network)
    if names is None:
        count = 3 if isinstance(network, EDSR) else 1
        names = [list(known)[int(number)] for number in rng.integers(len(known), size=count)]
    for name in names:
        if name not in known:
            raise UsageError(f"DeepAugment's edits are {', '.join(known)}; found {name!r}")
    made = copy.deepcopy(network).eval()
    place = _Blocks(made, rng) if isinstance(made, EDSR) else _Middle(made, rng)  # type: ignore[arg-type]
    for name in names:
        known[name](place)
    return made, list(names)


# ----------------------------------------------------------------------------------------------------- EDSR's signals


@torch.no_grad()
def draw_edited(network: CorruptionNetwork, images: Tensor, rngs: Sequence[Random]) -> Tensor:
    """What a network draws while its signals are distorted, for each image by draws of its own.

    EDSR's features get, before the first block, one of four with equal chance: five pairs of channels swapped, 5 % of the
    values 0, 2.5 % of them times -1, nothing; and then one of five: after the fifth block (of 16) all values negated, put
    through ReLU (one in three) or GELU, or mirrored over channels and either rows (one in three) or columns; the body
    replaced by its last layer that is none of three drawn ones (which is what skipping layers comes to in the script: its
    loop passes each the same input and keeps the last); nothing. The autoencoder's signals stay as they are.

    Args:
        images: RGB float [n, 3, h, w] in [0, 1].
        rngs: n generators.

    Returns:
        float [n, 3, h, w] in [0, 1].
    """
    if not isinstance(network, EDSR):
        return network(images)
    mean = network.get_buffer("mean")
    x = network.head(images * 255 - mean)
    before = [int(rng.integers(1, 5)) for rng in rngs]
    within = [int(rng.integers(1, 6)) for rng in rngs]
    for row, (rng, kind) in enumerate(zip(rngs, before, strict=True)):
        if kind == 1:
            for one, other in rng.integers(x.shape[1], size=(5, 2)):
                x[row, [int(one), int(other)]] = x[row, [int(other), int(one)]]
        elif kind == 2:
            x[row] *= (_uniform(rng, x[row]) + 0.45).round()
        elif kind == 3:
            x[row] *= (_uniform(rng, x[row]) + 0.475).round() * 2 - 1
    blocks = list(network.blocks)
    early = max(1, round(5 * len(blocks) / 16))
    passed = x
    for number, block in enumerate(blocks):
        passed = passed + block(passed)
        if number == early - 1:
            passed = _distorted(passed, within, rngs)
    gathered = network.gather(passed)
    for row, (rng, kind) in enumerate(zip(rngs, within, strict=True)):
        if kind == 4:
            one = x[row : row + 1]
            skipped = (
                {int(number) for number in rng.integers(2, len(blocks) + 1, size=3)}
                if len(blocks) > 1
                else set()
            )
            last = max(set(range(len(blocks) + 1)) - skipped)
            gathered[row] = (network.gather(one) if last == len(blocks) else one + blocks[last](one))[0]
    enlarged = network.output(network.enlarge(gathered + x))
    drawn = ((enlarged.float() + mean) / 255).clamp(0, 1)
    return F.avg_pool2d(drawn, network.scale)


def _distorted(signal: Tensor, kinds: Sequence[int], rngs: Sequence[Random]) -> Tensor:
    rows = []
    for row, kind, rng in zip(signal, kinds, rngs, strict=True):
        if kind == 1:
            row = -row
        elif kind == 2:
            row = F.relu(row) if rng.integers(3) == 1 else F.gelu(row)
        elif kind == 3:
            row = row.flip([0, 1] if rng.integers(3) == 1 else [0, 2])
        rows.append(row)
    return torch.stack(rows)
