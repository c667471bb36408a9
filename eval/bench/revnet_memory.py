"""Memory of a training step of an i-RevNet at 224 pixels: activations computed again, and kept as autograd does.

Every tensor of a step (forward, loss, backward) is counted while it lives; those with as many rows as the batch are
activations and their gradients, weights and the gradients of weights are left out: both ways need the same of them. The
step runs on PyTorch's meta device, which allocates as other devices do and computes nothing, so that the figures are
exact and the same on any machine. What convolutions need inside of their kernels is not seen.

revnet_memory: the peak at depth 300, ``peer`` with autograd, ``ours`` computing again; ``growth`` is from depth 45 to
depth 300 of each. ``inverse_mb`` is the peak of the gradient through the frozen inverse at depth 300, stage 2 of QualNet,
the masks of ReLU with it; ``inverse_mb_recomputed`` computing again, ``inverse_mb_peer`` with autograd.
``seconds_ratio``: processor time of a step of irevnet_cifar, computing again over autograd. Of a fresh irevnet300 at 224
pixels: ``error_float64``, the largest of two reconstructed images; ``error_float32``, relative to their length; and
``gradient_error``, the distance of gradients computed again to autograd's in float64, relative to their length.
"""

import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrface.models import build_backbone, irevnet
from lrface.models.irevnet import BLOCKS, IRevNet

NAMES = ("revnet_memory",)
BATCH = 32
LARGE = {"strides": (2, 2, 2, 2), "channels": (24, 96, 384, 1536), "down_sampling": 2}


class Peak(TorchDispatchMode):
    """The most bytes that tensors of ``rows`` rows, and masks, took at once, each storage once from its first use on."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self.counts(leaf):
                self._count(leaf.untyped_storage())
        return out

    def counts(self, value: torch.Tensor) -> bool:
        mask = value.ndim > 0 and not value.is_floating_point()  # packed and unpacked, and what lies between
        return mask or value.ndim == 4 and value.shape[0] == self.rows

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key)


@contextmanager
def without_masks() -> Iterator[None]:
    """The inverse of a frozen network as that of any other."""
    before = irevnet.masks_suffice
    irevnet.masks_suffice = lambda blocks: False
    try:
        yield
    finally:
        irevnet.masks_suffice = before


def peak(depth: int, recompute: bool, inverse: bool = False, size: int = 224, device: str = "meta") -> int:
    """Bytes of a training step, or with ``inverse`` of the gradient of an image with respect to its feature map."""
    with torch.device(device):
        encoder = build_backbone(
            "irevnet", blocks=BLOCKS[depth], input_size=size, recompute=recompute, **LARGE
        )
        assert isinstance(encoder, IRevNet)
        encoder.train(not inverse).requires_grad_(not inverse)
        given = torch.rand(BATCH, 3, size, size)
        if inverse:
            side = encoder.feature_size
            given = torch.rand(BATCH, encoder.feature_channels, side, side, requires_grad=True)
        with Peak(BATCH) as counted:
            (encoder.inverse(given) if inverse else encoder(given)).square().mean().backward()
    return counted.most


def seconds(recompute: bool, steps: int) -> float:
    """Processor time of a step of irevnet_cifar, the median."""
    encoder = build_backbone("irevnet_cifar", recompute=recompute)
    images = torch.rand(16, 3, 32, 32)
    found = []
    for _ in range(steps + 1):
        started = time.process_time()
        encoder(images).square().mean().backward()
        found.append(time.process_time() - started)
    return statistics.median(found[1:])


def exactness(size: int = 224, bottleneck: int = 4) -> dict[str, float]:
    """How exact the inverse and the gradients of a fresh irevnet300 are, on two smooth images; BatchNorm's statistics are
    those of the images."""
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        encoder = build_backbone(
            "irevnet", blocks=BLOCKS[300], input_size=size, bottleneck=bottleneck, **LARGE
        ).to(dtype)
        assert isinstance(encoder, IRevNet)
        images = torch.nn.functional.interpolate(
            torch.rand(2, 3, 16, 16, dtype=dtype), (size, size), mode="bilinear"
        )
        for part in encoder.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 1.0
        with torch.no_grad():
            encoder.train()(images)
            error = encoder.eval().inverse(encoder.features(images)) - images
        if dtype == torch.float32:
            found["error_float32"] = (error.norm() / images.norm()).item()
            continue
        found["error_float64"] = error.abs().max().item()
        gradients = []
        for recompute in (True, False):
            encoder.train().zero_grad()
            encoder.recompute = recompute
            encoder(images).square().sum().backward()
            gradients.append([parameter.grad for parameter in encoder.parameters()])
            encoder.zero_grad(set_to_none=True)
        apart = sum((a - b).square().sum().item() for a, b in zip(*gradients, strict=True))
        found["gradient_error"] = (apart / sum(b.square().sum().item() for b in gradients[1])) ** 0.5
    return found


def run(quick: bool = False) -> list[dict[str, Any]]:
    """The row of the benchmark; ``ours`` and ``peer`` in megabytes for a batch of 32."""
    torch.set_num_threads(1)
    megabytes = {
        (depth, recompute): peak(depth, recompute) / 2**20
        for depth in (45, 300)
        for recompute in (True, False)
    }
    masks = peak(300, True, inverse=True) / 2**20
    with without_masks():
        through = {recompute: peak(300, recompute, inverse=True) / 2**20 for recompute in (True, False)}
    steps = 1 if quick else 5
    return [
        {
            "name": "revnet_memory",
            "ours": megabytes[300, True],
            "peer": megabytes[300, False],
            "ratio": megabytes[300, False] / megabytes[300, True],
            "unit": "MB",
            "threads": 1,
            "batch": BATCH,
            "growth": megabytes[300, True] / megabytes[45, True],
            "growth_peer": megabytes[300, False] / megabytes[45, False],
            "inverse_mb": masks,
            "inverse_mb_recomputed": through[True],
            "inverse_mb_peer": through[False],
            "seconds_ratio": seconds(True, steps) / seconds(False, steps),
            **(exactness(64, 64) if quick else exactness()),
        }
    ]
