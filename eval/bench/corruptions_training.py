"""What training with corruptions costs: images/s with the policy `corruptions` against no corruption.

Both train MobileFaceNet with CosFace by lrface's trainer: faces of 112 pixels from packed JPEG data, bfloat16
autocast, channels_last, batches of 64, 2 threads. One mirrors its images; the other mirrors them and corrupts half of
them, each by one of the 15 corruptions at one of 5 severities (set "face"), in the training process. Reading and
decoding count, as does everything else that happens between two batches of `lrface train`.

The two take turns step by step in one process, so that whatever else the machine does hits both alike; who goes first
changes from turn to turn. What is compared is the sum over the steps of each, since a step's cost depends on what is
drawn; a ratio of at least 0.85 is wanted. The row also has that ratio in processor time and of medians, the share of a
step that the corruptions take, and what each corruption costs for one face.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import torch

from lrface.config import parse_recipe
from lrface.data.convert import pack
from lrface.data.dataset import FaceDataset
from lrface.data.source import open_source
from lrface.data.synthetic import SyntheticFaces
from lrface.degrade import corruptions
from lrface.degrade.policies import one_thread
from lrface.recipes import build_method, build_trainer, image_stream, stage_settings
from lrface.train.step import TrainingStep
from lrface.train.trainer import Stage

NAMES = ["corruptions_training_cost"]
THREADS = 2
BATCH_SIZE = 64
STEPS, WARM_UP = 34, 4
QUICK_STEPS, QUICK_WARM_UP = 6, 2
POLICIES: dict[str, dict[str, Any]] = {
    "corrupted": {"name": "corruptions", "set": "face", "clean_share": 0.5},
    "clean": {"name": "clean"},
}


def write_packed(folder: Path) -> Path:
    """Drawn faces as packed data, JPEG of quality 95."""
    faces = SyntheticFaces(identities=32, images_per_identity=16)
    for index in range(len(faces)):
        place = folder / "crops" / faces.identities[int(faces.labels[index])]
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(place / f"{index:05d}.jpg"), faces.image(index)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]
        )
    pack(folder / "crops", folder / "packed", show_progress=False)
    return folder / "packed"


class Training:
    """One of the two, ready to be trained step by step."""

    def __init__(self, kind: str, data: Path, out: Path, steps: int):
        recipe = parse_recipe(
            {
                "name": kind,
                "data": {"path": str(data), "batch_size": BATCH_SIZE, "cache": False},
                "backbone": "mobilefacenet",
                "head": "cosface",
                "trainer": {"device": "cpu", "threads": THREADS, "tensorboard": False},
                "stages": [
                    {"name": kind, "method": "classify", "degrade": POLICIES[kind], "steps": steps},
                ],
            }
        )
        source = open_source(data)
        torch.manual_seed(0)
        method = build_method(recipe, recipe.stages[0], len(source.identities))
        trainer = build_trainer(recipe, False, lambda message: None)
        dataset = FaceDataset(source, 112)
        optimiser, schedule = stage_settings(recipe.stages[0])
        stream = image_stream(recipe, dataset, 0, trainer)
        stage = Stage(kind, method, steps, BATCH_SIZE, stream, out / kind, {}, optimiser, schedule)
        self.take: TrainingStep = trainer.ready(stage).take
        self.take.phase = self._phase  # type: ignore[assignment]
        self.stream: Iterator[dict[str, Any]] = stage.batches(0, steps)
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.preparing: list[float] = []

    def _phase(self, name: str) -> Any:
        return _Timed(self.preparing) if name == "prepare" else _Timed([])

    def step(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        output = self.take.gradients(next(self.stream))
        self.take.update()
        float(output.loss)
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


class _Timed:
    """Appends the seconds spent inside of it."""

    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def cost_of_each(repeats: int = 5) -> dict[str, float]:
    """Milliseconds of processor time for one face of 112 pixels by one thread, the mean over severities."""
    size = 112
    image = torch.rand(1, 3, size, size)
    found = {}
    for name in corruptions.CORRUPTIONS:
        total = 0.0
        for severity in range(1, 6):
            parameters = corruptions.sample(
                name, torch.tensor([severity]), (size, size), "face", torch.Generator().manual_seed(0)
            )
            corruptions.apply(image, parameters)
            times = []
            for _ in range(repeats):
                started = time.process_time()
                corruptions.apply(image, parameters)
                times.append(time.process_time() - started)
            total += min(times)
        found[name] = round(total / 5 * 1000, 3)
    return found


def run(quick: bool = False) -> list[dict[str, Any]]:
    """The row; ``quick`` takes a few steps only."""
    steps, warm_up = (QUICK_STEPS, QUICK_WARM_UP) if quick else (STEPS, WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        data = write_packed(Path(folder))
        both = [Training(kind, data, Path(folder), steps) for kind in POLICIES]
        corrupted, clean = both
        for number in range(steps):
            for training in both if number % 2 else reversed(both):
                training.step()
        with one_thread():
            costs = cost_of_each(1 if quick else 5)

    def speed(training: Training) -> float:
        return BATCH_SIZE * (steps - warm_up) / sum(training.wall[warm_up:])

    def ratio(name: str, summary: Any) -> float:
        return round(summary(getattr(clean, name)[warm_up:]) / summary(getattr(corrupted, name)[warm_up:]), 4)

    return [
        {
            "name": NAMES[0],
            "ours": round(speed(corrupted), 2),
            "peer": round(speed(clean), 2),
            "ratio": round(speed(corrupted) / speed(clean), 4),
            "unit": "images/s",
            "threads": THREADS,
            "steps": steps - warm_up,
            "ratio_processor_time": ratio("processor", sum),
            "ratio_medians": ratio("wall", statistics.median),
            "share_of_preparing": round(
                sum(corrupted.preparing[warm_up:]) / sum(corrupted.wall[warm_up:]), 4
            ),
            "milliseconds_a_face": costs,
        }
    ]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
