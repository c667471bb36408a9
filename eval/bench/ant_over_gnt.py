"""What a step of Adversarial Noise Training costs beside one of Gaussian noise training: at most 1.6 times is wanted.

The same slim ResNet-18 for 32 pixels, head, images, optimiser and precision; lrface's trainer takes whole steps of each,
degradation included, in turns, and who goes first changes. An ANT step adds a step of the generator on the half of the batch
that gets noise: forward through the classifier and back to its input. ``cost`` is ANT's time by GNT's, of medians.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lrface.config import parse_recipe
from lrface.data.dataset import CachedDataset
from lrface.data.synthetic import SyntheticFaces
from lrface.recipes import build_method, build_trainer, image_stream, stage_settings
from lrface.train.step import TrainingStep
from lrface.train.trainer import Stage

NAMES = ["ant_over_gnt"]
THREADS = 2
BATCH, WIDTH, CLASSES = 128, 16, 10
STEPS, WARM_UP = 44, 8
CLEAN = {"name": "clean", "crop_padding": 4}
KINDS: dict[str, dict[str, Any]] = {
    "ant": {
        "method": {"name": "ant", "restart_steps": 16, "save_steps": 1, "replay_size": 16},
        "degrade": CLEAN,
    },
    "gnt": {"method": "classify", "degrade": {"name": "gaussian_noise", "sigma": 0.5, "crop_padding": 4}},
}


class Training:
    """One of the two, ready to be trained step by step."""

    def __init__(self, kind: str, dataset: CachedDataset, out: Path, steps: int):
        recipe = parse_recipe(
            {
                "name": kind,
                "data": {"path": "held in memory", "batch_size": BATCH},
                "backbone": {"name": "cifar_resnet18", "width": WIDTH},
                "head": "softmax",
                "trainer": {"threads": THREADS, "tensorboard": False},
                "stages": [
                    {"name": kind, "steps": steps, "optimiser": {"learning_rate": 0.01}, **KINDS[kind]}
                ],
            }
        )
        torch.manual_seed(0)
        method = build_method(recipe, recipe.stages[0], CLASSES)
        trainer = build_trainer(recipe, False, lambda message: None)
        stream = image_stream(recipe, dataset, 0, trainer)
        stage = Stage(kind, method, steps, BATCH, stream, out / kind, {}, *stage_settings(recipe.stages[0]))
        self.take: TrainingStep = trainer.ready(stage).take
        self.device = trainer.device
        self.stream: Iterator[dict[str, Any]] = stage.batches(0, steps)
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.logs: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        output = self.take.gradients(next(self.stream))
        self.take.update()
        float(output.loss)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)
        self.logs = output.logs


def run(quick: bool = False) -> list[dict[str, Any]]:
    steps, warm_up = (8, 2) if quick else (STEPS, WARM_UP)
    dataset = CachedDataset(SyntheticFaces(CLASSES, 2 * BATCH // CLASSES), 32, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        both = [Training(kind, dataset, Path(folder), steps) for kind in KINDS]
        for number in range(steps):
            for training in both if number % 2 else reversed(both):
                training.step()
    ant, gnt = (statistics.median(training.wall[warm_up:]) for training in both)
    processor = [statistics.median(training.processor[warm_up:]) for training in both]
    return [
        {
            "name": NAMES[0],
            "ours": round(BATCH / ant, 1),
            "peer": round(BATCH / gnt, 1),
            "ratio": round(gnt / ant, 4),
            "unit": "images/s",
            "threads": THREADS,
            "device": both[0].device,
            "cost": round(ant / gnt, 3),
            "cost_processor_time": round(processor[0] / processor[1], 3),
            "replay_states": int(both[0].logs["replay_states"]),
            "replay_mib": round(float(both[0].logs["replay_mib"]), 3),
        }
    ]
