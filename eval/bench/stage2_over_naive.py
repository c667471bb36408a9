"""What the second stage of QualNet costs beside naive augmentation: the same encoder, head, images and optimiser.

stage2_over_naive: QualNet-LM, IR-50 with frozen BatchNorm and the frozen decoder behind it. qualnet_over_naive: QualNet50,
ResNet-50 at 224 pixels and the frozen inverse of the i-RevNet of 300 layers; on a GPU with batches of 256 and the peak of
memory, on a CPU with batches of 2. The gradient of the reconstruction goes back through the decoder. Both methods take
their steps in turns in one process; medians are compared. ``cost`` is how many times as long an image takes in stage 2,
``parts`` the milliseconds an image that its parts take when they are run by themselves. ``inverse_ms`` is the frozen inverse
forward and backward, milliseconds an image, of processor time on a CPU, in turns: with the masks of ReLU that it keeps by
itself, computing its activations again, and keeping them as autograd does.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.policies import build_policy
from lrface.degrade.policy import ResolutionPolicy
from lrface.heads import build_head
from lrface.methods.base import Method
from lrface.methods.classify import Classify
from lrface.methods.qualnet import QualNet
from lrface.models import build_backbone, build_decoder, build_decoder_for, irevnet
from lrface.models.irevnet import IRevNetInverse

NAMES = ["stage2_over_naive", "qualnet_over_naive"]
THREADS = 2
IDENTITIES = 1000
DECODER_WIDTH = 256  # of configs/casia/qualnet_lm_r50.yaml


class Step:
    """A method and the optimiser that moves it."""

    def __init__(self, method: Method, device: str):
        self.method = method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            method.param_groups(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.device = device

    def __call__(self, batch: dict[str, Any]) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            output = self.method(self.method.prepare(batch))
        self.optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimiser.step()


def seconds(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def parts(method: QualNet, batch: dict[str, Any], device: str) -> dict[str, float]:
    """Milliseconds an image: the encoder and the decoder, forward and backward, each by itself."""
    ready = method.prepare(batch)
    found: dict[str, list[float]] = {}
    for _ in range(4):
        with torch.autocast(device, torch.bfloat16):
            holder: dict[str, torch.Tensor] = {}

            def encode(holder: dict[str, torch.Tensor] = holder) -> None:
                holder["map"] = method.encoder.features(ready["image"])

            def decode(holder: dict[str, torch.Tensor] = holder) -> None:
                holder["input"] = holder["map"].detach().requires_grad_()
                holder["drawn"] = method.decoder(holder["input"])

            found.setdefault("encoder forward", []).append(seconds(encode, device))
            found.setdefault("decoder forward", []).append(seconds(decode, device))
        loss = (holder["drawn"].float() - ready["hq"]).abs().mean()
        found.setdefault("decoder backward", []).append(seconds(loss.backward, device))
        gradient = holder["input"].grad
        found.setdefault("encoder backward", []).append(
            seconds(lambda h=holder, g=gradient: h["map"].backward(g), device)
        )
    images = len(batch["label"])
    return {name: round(1000 * min(times[1:]) / images, 3) for name, times in found.items()}


def inverse_ways(network: irevnet.IRevNet, batch: int, device: str, rounds: int) -> dict[str, float]:
    """Milliseconds an image of the frozen inverse, forward and backward, with the least to keep and with the most."""
    side, before = network.feature_size, (irevnet.masks_suffice, network.recompute)
    feature_map = torch.randn(batch, network.feature_channels, side, side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    found: dict[str, list[float]] = {"masks": [], "recomputed": [], "autograd": []}
    try:
        for _ in range(rounds + 1):
            for way, times in found.items():
                irevnet.masks_suffice = before[0] if way == "masks" else lambda blocks: False
                network.recompute = way == "recomputed"
                given = feature_map.clone().requires_grad_()
                clock = time.process_time()
                passed = seconds(lambda x=given: network.inverse(x).square().sum().backward(), device)
                times.append(passed if device == "cuda" else time.process_time() - clock)
    finally:
        irevnet.masks_suffice, network.recompute = before
    return {way: round(1000 * statistics.median(times[1:]) / batch, 2) for way, times in found.items()}


def compare(
    stage2: Step, naive: Step, batch: dict[str, Any], steps: int, warm_up: int
) -> tuple[list[float], list[float]]:
    """Seconds of a step of both, in turns, and gigabytes at the peak of each (0 where nobody counts them)."""
    device = stage2.device
    times: tuple[list[float], list[float]] = ([], [])
    most = [0.0, 0.0]
    for step in range(steps):
        batch["seed"] = step
        for number, step_of in enumerate((stage2, naive)):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[number].append(seconds(lambda step_of=step_of: step_of(batch), device))
            if device == "cuda":
                most[number] = max(most[number], torch.cuda.max_memory_allocated() / 2**30)
    return [statistics.median(one[warm_up:]) for one in times], most


def row(
    name: str, found: tuple[list[float], list[float]], method: QualNet, batch: dict[str, Any], device: str
) -> dict[str, Any]:
    (ours, peer), (memory, memory_peer) = found
    batch_size = len(batch["label"])
    return {
        "name": name,
        "ours": round(batch_size / ours, 2),
        "peer": round(batch_size / peer, 2),
        "ratio": round(peer / ours, 4),
        "unit": "images/s",
        "threads": THREADS,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "batch": batch_size,
        "cost": round(ours / peer, 3),
        **({"peak_gb": round(memory, 2), "peak_gb_peer": round(memory_peer, 2)} if memory else {}),
        "parts": parts(method, batch, device),
    }


def of_faces(device: str, quick: bool) -> dict[str, Any]:
    """QualNet-LM: IR-50 at 112 pixels, with the decoder that is no inverse."""
    batch_size, steps, warm_up = (256, 30, 8) if device == "cuda" else (32, 4 if quick else 9, 2)
    faces = SyntheticFaces(8, batch_size // 8)
    images = torch.stack([torch.from_numpy(faces.image(index)) for index in range(batch_size)])
    batch = {
        "image": images.permute(0, 3, 1, 2).to(device),
        "label": torch.arange(batch_size, device=device) % IDENTITIES,
        "seed": 0,
    }

    def network() -> tuple[Any, Any]:
        encoder = build_backbone("ir50", output="A", embedding_size=512)
        return encoder, build_head("cosface", 512, IDENTITIES)

    naive = Step(Classify(*network(), ResolutionPolicy()), device)
    encoder, head = network()
    decoder = build_decoder("subpixel", encoder.feature_channels, width=DECODER_WIDTH)
    method = QualNet(encoder, head, decoder, ResolutionPolicy(), freeze=("decoder", "batchnorm"))
    found = compare(Step(method, device), naive, batch, steps, warm_up)
    return row("stage2_over_naive", found, method, batch, device)


def of_photographs(device: str, quick: bool) -> dict[str, Any]:
    """QualNet50: the papers' ResNet-50 at 224 pixels with the inverse of the i-RevNet of 300 layers, half of the images by
    the 15 corruptions of ImageNet-C, as configs/imagenet/qualnet_resnet50.yaml. On a CPU a batch of 2."""
    batch_size, steps, warm_up = (256, 24, 6) if device == "cuda" else (2, 2 if quick else 6, 1)
    classes = 1000
    coarse = torch.rand(batch_size, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic").clamp(0, 1)
    batch = {
        "image": (images * 255).byte().to(device),
        "label": torch.arange(batch_size, device=device) % classes,
        "seed": 0,
    }

    def network() -> tuple[Any, Any, Any]:
        encoder = build_backbone("resnet50", stem="quality")
        policy = build_policy("corruptions", set="imagenet", clean_share=0.5)
        return encoder, build_head("softmax", encoder.embedding_size, classes), policy

    naive = Step(Classify(*network()), device)
    encoder, head, policy = network()
    decoder = build_decoder_for(encoder, "irevnet_inverse", network="irevnet300")
    method = QualNet(encoder, head, decoder, policy, quality_weight=0.1)
    found = compare(Step(method, device), naive, batch, steps, warm_up)
    prepare = min(seconds(lambda: method.prepare(batch), device) for _ in range(2))
    result = row("qualnet_over_naive", found, method, batch, device)
    result["parts"]["corruptions"] = round(1000 * prepare / batch_size, 3)
    assert isinstance(decoder, IRevNetInverse)
    # Autograd's activations of a larger batch do not fit beside both networks.
    result["inverse_ms"] = inverse_ways(decoder.network, min(batch_size, 64), device, 1 if quick else 3)
    return result


def run(names: Sequence[str] = NAMES, quick: bool = False) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(THREADS)
    rows = []
    for name, measure in (("stage2_over_naive", of_faces), ("qualnet_over_naive", of_photographs)):
        if name in names:
            torch.manual_seed(0)
            rows.append(measure(device, quick))
    return rows
