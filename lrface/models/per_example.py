"""Convolutions that may have a kernel of their own for each image of a batch, and what corruption networks share."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import LrfaceError


def _bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype)[:, :, None, None]


class PerExampleConv2d(nn.Conv2d):
    """A convolution whose weight may be [n, out, in, k, k] and whose bias [n, out]: one of each for each of n images.

    Such weights come in through ``torch.func.functional_call``. All images are then convolved at once, as the groups of
    one grouped convolution: on a CPU two to five times as fast as one after another, and faster than a matrix product
    of unfolded images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 4:
            return super().forward(x)
        n, channels, height, width = x.shape
        weight = self.weight
        if x.device.type == "cpu" and self.out_channels % 8:
            # oneDNN takes half the time for 8 results of each group that it takes for 3.
            weight = F.pad(weight, (0, 0) * 3 + (0, -self.out_channels % 8))
        out = F.conv2d(
            x.reshape(1, n * channels, height, width),
            weight.reshape(-1, *weight.shape[2:]),
            None,
            self.stride,
            self.padding,
            self.dilation,
            groups=n,
        )
        return _bias(out.view(n, -1, *out.shape[2:])[:, : self.out_channels], self.bias)


class PerExampleConvTranspose2d(nn.ConvTranspose2d):
    """As :class:`PerExampleConv2d`, for a transposed convolution: weight [n, in, out, k, k]."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.weight.ndim == 4:
            return super().forward(x, output_size)
        n, channels, height, width = x.shape
        out = F.conv_transpose2d(
            x.reshape(1, n * channels, height, width),
            self.weight.reshape(-1, *self.weight.shape[2:]),
            None,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.output_padding,
            n,
            self.dilation,
        )
        return _bias(out.view(n, -1, *out.shape[2:]), self.bias)


class CorruptionNetwork(nn.Module):
    """An image-to-image network whose weights are edited to corrupt images (DeepAugment, AdA; paper 003).

    ``forward`` takes RGB float [n, 3, h, w] in [0, 1] and gives the same shape and range, close to what it was given
    while the weights are as trained. Its layers with weights are :class:`PerExampleConv2d` and
    :class:`PerExampleConvTranspose2d`, so that each image may have weights of its own (:func:`run_with`).

    Attributes:
        input_size: side of the images that it is trained on; it takes others too.
        embedding_size: 0, it draws images.
    """

    input_size: int
    embedding_size = 0
    channels = 3

    def training_pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What it draws, not clipped, and what it should draw: [n, 3, h, w] each; h and w as its ``scale`` allows."""
        raise TypeError(f"{type(self).__name__} must define training_pair()")

    def published_names(self) -> Mapping[str, str]:
        """The names that this network's tensors have in the file of the published weights."""
        raise TypeError(f"{type(self).__name__} must define published_names()")

    def check_published(self, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        """``state`` without the tensors that are constants here. Raises LrfaceError where one has another value."""
        return state


def run_with(network: CorruptionNetwork, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """``network(images)`` with other weights.

    Args:
        weights: by parameter name, of a parameter's shape, or [n, *shape] with one for each image.
        images: RGB float [n, 3, h, w] in [0, 1].

    Returns:
        [n, 3, h, w] in [0, 1].
    """
    return torch.func.functional_call(network, dict(weights), (images,))


def load_published(network: CorruptionNetwork, path: str | Path) -> None:
    """Fill ``network`` with published weights of its own kind and size.

    Args:
        path: a .safetensors file, or one of PyTorch, which is read as tensors only; names as
            :meth:`CorruptionNetwork.published_names` says, also within an entry "state_dict" or "model_state".

    Raises:
        LrfaceError: no such file, one that holds other things than tensors, or a tensor that is missing, left over or of
            another shape, by name.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own words here recommend reading the file unsafely.
        raise LrfaceError(f"{path} holds something other than tensors and is not read") from error
    except Exception as error:  # what PyTorch raises for a broken file is of any kind
        raise LrfaceError(f"{path} cannot be read as weights of a corruption network: {error}") from error
    for key in ("state_dict", "model_state"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise LrfaceError(f"{path} holds no tensors by name")
    kind, what = type(network).__name__, f"{path}"
    state = network.check_published({str(key): value for key, value in found.items()}, what)
    names, own = network.published_names(), dict(network.named_parameters())
    missing = [theirs for theirs in names.values() if theirs not in state]
    extra = sorted(state.keys() - names.values())
    if missing or extra:
        found_names = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not one of its tensors"
        raise LrfaceError(
            f"{what} does not hold this {kind} in its published form: {found_names} ({len(missing)} missing, {len(extra)} "
            "too many); are its sizes those of the file?"
        )
    for name, theirs in names.items():
        if state[theirs].shape != own[name].shape:
            raise LrfaceError(
                f"{what} does not hold this {kind}: {theirs!r} has shape {tuple(state[theirs].shape)}, "
                f"{tuple(own[name].shape)} here; are its sizes those of the file?"
            )
    with torch.no_grad():
        for name, theirs in names.items():
            own[name].copy_(state[theirs])
