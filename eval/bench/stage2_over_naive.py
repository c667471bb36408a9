"""What QualNet-LM's second stage costs beside naive augmentation: the same IR-50, head, images and optimiser.

Stage 2 runs the encoder with frozen BatchNorm and the frozen decoder behind it, and the gradient of the reconstruction
goes back through the decoder. Both methods take their steps in turns in one process; medians are compared. ``cost`` is how
many times as long an image takes in stage 2, ``parts`` the milliseconds an image that its parts take when they are run
by themselves.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.policy import ResolutionPolicy
from lrface.heads import build_head
from lrface.methods.base import Method
from lrface.methods.classify import Classify
from lrface.methods.qualnet import QualNet
from lrface.models import build_backbone, build_decoder

NAMES = ["stage2_over_naive"]
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


def run(quick: bool = False) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size, steps, warm_up = (256, 30, 8) if device == "cuda" else (32, 4 if quick else 9, 2)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
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
    stage2 = Step(method, device)
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(steps):
        batch["seed"] = step
        for one, step_of in zip(times, (stage2, naive), strict=True):
            one.append(seconds(lambda step_of=step_of: step_of(batch), device))
    ours, peer = (statistics.median(one[warm_up:]) for one in times)
    return [
        {
            "name": "stage2_over_naive",
            "ours": round(batch_size / ours, 2),
            "peer": round(batch_size / peer, 2),
            "ratio": round(peer / ours, 4),
            "unit": "images/s",
            "threads": THREADS,
            "device": device,
            "cost": round(ours / peer, 3),
            "parts": parts(method, batch, device),
        }
    ]
