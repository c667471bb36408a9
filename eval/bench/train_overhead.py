"""What lrface's trainer costs: images/s of `lrface train` against a bare PyTorch loop on the same tensors.

Both train MobileFaceNet with CosFace and naive augmentation: bfloat16 autocast, channels_last, batches of 64, 2
threads. lrface runs a whole recipe (lrface.recipes.run_recipe): its data order, log, TensorBoard, progress bar and
checks of the loss count. The bare loop finds the same batches ready in memory and only augments them, computes the
loss, its gradient and the step.

The two take turns step by step in one process, so that whatever else the machine does hits both alike: when the
trainer asks for its next batch, its step is over, and the bare loop takes one before the batch is handed out. What is
compared are medians over the steps after a warm-up.

train_overhead: decoded faces in memory. train_overhead_packed: lrface reads packed Arrow data and decodes JPEG in
the loop.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from lrface import recipes
from lrface.config import parse_recipe
from lrface.data.dataset import FaceDataset, batches
from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.policy import ResolutionPolicy
from lrface.heads import build_head
from lrface.methods.base import degrade_batch
from lrface.models import build_backbone

NAMES = ["train_overhead", "train_overhead_packed"]
THREADS = 2
BATCH_SIZE = 64
IDENTITIES = 32
IMAGES_PER_IDENTITY = 16
STEPS, WARM_UP = 45, 5
QUICK_STEPS, QUICK_WARM_UP = 8, 3
SETTINGS: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


class BareLoop:
    """The peer: what a training step needs and nothing else."""

    def __init__(self, identities: int):
        self.encoder = build_backbone("mobilefacenet").to(memory_format=torch.channels_last).train()
        self.head = build_head("cosface", self.encoder.embedding_size, identities)
        self.policy = ResolutionPolicy()
        parameters = nn.ModuleList([self.encoder, self.head]).parameters()
        settings = dict(SETTINGS)
        self.optimiser = torch.optim.SGD(parameters, lr=settings.pop("learning_rate"), fused=True, **settings)

    def step(self, batch: dict[str, Any]) -> None:
        with torch.no_grad():
            batch = degrade_batch(batch, self.policy)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(self.head(self.encoder(batch["image"]), batch["label"]), batch["label"])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()


def write_packed(faces: SyntheticFaces, root: Path) -> Path:
    """The faces as packed data, JPEG of quality 95."""
    import cv2
    import numpy as np

    from lrface.data.packed import shard_name, write_index, write_shard

    records = []
    for index in range(len(faces)):
        _, jpeg = cv2.imencode(".jpg", faces.image(index)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        label = int(faces.labels[index])
        records.append(
            {
                "image": jpeg.tobytes(),
                "label": label,
                "identity": faces.identities[label],
                "source": f"{index}.jpg",
                "face": 0,
                "landmarks": np.zeros(10),
                "box": np.array([0, 0, 112, 112]),
                "score": 1.0,
            }
        )
    root.mkdir()
    shard = write_shard(root / shard_name(0), records)
    write_index(root, image_size=(112, 112), identities=faces.identities, shards=[shard])
    return root


def recipe_of(data: dict[str, Any], out: Path, steps: int) -> Any:
    return parse_recipe(
        {
            "name": "train-overhead",
            "out": str(out),
            "data": {**data, "batch_size": BATCH_SIZE},
            "backbone": "mobilefacenet",
            "head": "cosface",
            "trainer": {"device": "cpu", "threads": THREADS},
            "stages": [
                {
                    "name": "naive",
                    "method": "classify",
                    "steps": steps,
                    "optimiser": dict(SETTINGS),
                    "schedule": {"kind": "constant"},
                }
            ],
        }
    )


def take_turns(data: dict[str, Any], out: Path, steps: int, warm_up: int) -> tuple[float, float]:
    """Median seconds of a step of lrface and of the bare loop, over the steps after the warm-up."""
    ours: list[float] = []
    bare: list[float] = []
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    peer = BareLoop(IDENTITIES)

    def timed(
        dataset: FaceDataset, batch_size: int, seed: int, first: int, last: int, *more: Any, **named: Any
    ) -> Iterator[dict[str, Any]]:
        ready = list(batches(dataset, batch_size, seed, first, last))
        started: float | None = None
        stream = batches(dataset, batch_size, seed, first, last, *more, **named)
        for same in ready:
            if started is not None:
                ours.append(time.perf_counter() - started)
            begun = time.perf_counter()
            peer.step(same)
            bare.append(time.perf_counter() - begun)
            started = time.perf_counter()
            yield next(stream)

    # The trainer's stream of batches is the one place that is met once a step.
    with mock.patch.object(recipes, "batches", timed):
        recipes.run_recipe(recipe_of(data, out, steps))
    return statistics.median(ours[warm_up:]), statistics.median(bare[warm_up:])


def run(names: list[str] | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Measure ``names`` (all by default); ``quick`` takes a few steps only."""
    steps, warm_up = (QUICK_STEPS, QUICK_WARM_UP) if quick else (STEPS, WARM_UP)
    settings = {"identities": IDENTITIES, "images_per_identity": IMAGES_PER_IDENTITY}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            out = Path(folder) / name
            if name == "train_overhead_packed":
                packed = write_packed(SyntheticFaces(**settings), Path(folder) / "packed")
                data: dict[str, Any] = {"path": str(packed), "cache": False}
            else:
                data = {"synthetic": settings, "cache": True}
            ours, bare = take_turns(data, out, steps, warm_up)
            rows.append(
                {
                    "name": name,
                    "ours": round(BATCH_SIZE / ours, 2),
                    "peer": round(BATCH_SIZE / bare, 2),
                    "ratio": round(bare / ours, 4),
                    "unit": "images/s",
                    "threads": THREADS,
                    "steps": steps - warm_up,
                }
            )
    return rows


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
