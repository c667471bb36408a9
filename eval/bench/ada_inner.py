"""AdA's inner maximisation (paper 003) on 128 images of CIFAR-10: all of a chunk at once, and one image after another.

Both search 10 steps from the same random start through the networks of a recipe: cifar10/ada on a CPU, the paper's own
sizes (cifar10_r50/ada) on a GPU. ``peer`` is the loop that one writes first: for each image a copy of the corruption
network whose weights are trained weights plus perturbation, and the gradient of the loss with respect to them.
``ours`` gives each image of a chunk its own weights in grouped convolutions, and ends with the line search besides.

``ours`` and ``peer`` are seconds; ``processor_ratio`` is the same of processor time (a busy machine does not move it as
much). ``peak_mb`` and ``peak_mb_peer``: memory on top of what the networks and images take, the largest resident size of
a process of its own on a CPU, the allocator's peak on a GPU. ``median_difference`` of the losses before the last step
tells that both do the same (a sign of a gradient next to 0 may be either).
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.data.source import open_source
from lrface.degrade.adversarial import Attack, perturb, radii, random_start
from lrface.errors import LrfaceError
from lrface.models.per_example import CorruptionNetwork
from lrface.recipes import build_method, find_data, load_recipe

NAMES = ("ada_inner",)
IMAGES, QUICK_IMAGES = 128, 32
THREADS = 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepared(count: int) -> tuple[Tensor, Tensor, nn.Module, CorruptionNetwork, Attack]:
    """Images, labels, classifier, corruption network and settings; fresh weights cost what trained ones do."""
    torch.manual_seed(0)
    recipe = load_recipe("cifar10_r50/ada" if device().type == "cuda" else "cifar10/ada")
    method = build_method(recipe, recipe.stages[-1], 10)
    classifier = nn.Sequential(method.encoder, method.head.linear).eval()  # type: ignore[union-attr]
    classifier.to(device(), memory_format=torch.channels_last)
    network: CorruptionNetwork = method.corruption_network.to(device())  # type: ignore[assignment]
    settings: Attack = method.attack  # type: ignore[assignment]
    try:
        source = open_source(find_data("cifar10/test.parquet"))
        pictures = np.stack([source.image(index) for index in range(count)])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(np.asarray(source.labels[:count])).long()
    except LrfaceError:  # without the data, pictures of noise: they take as long
        images, labels = torch.rand(count, 3, 32, 32), torch.arange(count) % 10
    attack = Attack(settings.radius, 10, settings.step_size, settings.chunk, settings.precision)
    return images.to(device()), labels.to(device()), classifier, network, attack


def one_after_another(
    images: Tensor, labels: Tensor, classifier: nn.Module, network: CorruptionNetwork, attack: Attack
) -> Tensor:
    """The losses [n] before the last step."""
    bounds = radii(network, attack.radius)
    step = attack.step_size * statistics.median(bounds.values())
    one = copy.deepcopy(network).requires_grad_(True)
    own, trained = dict(one.named_parameters()), dict(network.named_parameters())
    half = attack.precision == "bfloat16"
    last = []
    for row in range(len(images)):
        seed = torch.tensor([row], device=images.device)
        beta = {name: value[0] for name, value in random_start(network, seed, attack.radius).items()}
        image, label = images[row : row + 1], labels[row : row + 1]
        for _ in range(attack.steps):
            with torch.no_grad():
                for name, weight in own.items():
                    torch.add(trained[name], beta[name], out=weight)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(classifier(one(image)).float(), label)
            gradients = torch.autograd.grad(loss, list(own.values()))
            for (name, value), gradient in zip(beta.items(), gradients, strict=True):
                value.add_(gradient.sign(), alpha=step)
                norm = value.norm()
                value.mul_((bounds[name] / norm).clamp_max(1))
        with torch.no_grad():
            for name, weight in own.items():
                torch.add(trained[name], beta[name], out=weight)
            one(image)
        last.append(loss.detach())
    return torch.stack(last)


def child(kind: str, count: int) -> dict[str, Any]:
    """Measures one way in this process."""
    torch.set_num_threads(THREADS)
    images, labels, classifier, network, attack = prepared(count)

    def attacked(rows: int) -> Tensor:
        if kind == "peer":
            return one_after_another(images[:rows], labels[:rows], classifier, network, attack)
        seeds = torch.arange(rows, device=images.device)
        return perturb(images[:rows], labels[:rows], classifier, network, seeds, attack).losses[-1]

    gpu = images.is_cuda
    attacked(2)  # first calls load kernels
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    started, processor = time.perf_counter(), time.process_time()
    losses = attacked(count)
    if gpu:
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - started, "processor": time.process_time() - processor}
    after = (
        torch.cuda.max_memory_allocated()
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        **found,
        "peak_mb": (after - before) / 2**20,
        "losses": losses.tolist(),
        "chunk": attack.chunk,
        "device": str(images.device),
    }


def measured(kind: str, count: int) -> dict[str, Any]:
    """:func:`child` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--images", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LrfaceError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """The row; ``quick`` takes fewer images and one turn."""
    count, turns = (QUICK_IMAGES, 1) if quick else (IMAGES, 3)
    ours, peer = [], []
    for _ in range(turns):  # in turns, so that whatever else the machine does hits both alike
        ours.append(measured("ours", count))
        peer.append(measured("peer", count))

    def least(rows: list[dict[str, Any]], key: str) -> float:
        return min(row[key] for row in rows)

    difference = np.abs(np.subtract(ours[0]["losses"], peer[0]["losses"]))
    return [
        {
            "name": NAMES[0],
            "ours": round(least(ours, "seconds"), 3),
            "peer": round(least(peer, "seconds"), 3),
            "ratio": round(least(peer, "seconds") / least(ours, "seconds"), 3),
            "unit": "s",
            "threads": THREADS,
            "images": count,
            "chunk": ours[0]["chunk"],
            "device": ours[0]["device"],
            "processor_ratio": round(least(peer, "processor") / least(ours, "processor"), 3),
            "peak_mb": round(max(row["peak_mb"] for row in ours), 1),
            "peak_mb_peer": round(max(row["peak_mb"] for row in peer), 1),
            "median_difference": round(float(np.median(difference)), 6),
        }
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", choices=("ours", "peer"))
    parser.add_argument("--images", type=int, default=IMAGES)
    options = parser.parse_args()
    print(json.dumps(child(options.child, options.images) if options.child else run()))
