"""kill -9 at random moments of real runs: every resume comes to the weights of the run that nobody killed."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from lrface.train.checkpoint import checkpoints, load_model, load_parts, load_training_state

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600
STEPS = 10
STAGES = ("1-one", "2-two")
RECIPE = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 8},
    "backbone": {"name": "ir18", "width": 8, "embedding_size": 16},
    "decoder": {"name": "subpixel", "width": 16, "blocks": 0},
    "trainer": {
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "checkpoint_every": 2,
        "log_every": 1,
        "tensorboard": False,
    },
    "stages": [
        {
            "name": "one",
            "method": {"name": "qualnet", "clip": False},
            "degrade": {"clean_share": 1.0},
            "steps": STEPS,
            "schedule": {"kind": "poly", "warmup_steps": 2},
            "ema": 0.9,
        },
        {
            "name": "two",
            "method": {"name": "qualnet", "freeze": ["decoder", "batchnorm"]},
            "load": ["encoder", "head", "decoder"],
            "steps": STEPS,
            "optimiser": {"name": "adamw", "learning_rate": 0.001},
            "accumulate": 2,
        },
    ],
}

# Importing PyTorch takes longer than such a run. This process imports it once; each run is a fork of it.
NURSERY = """
import os, sys
import lrface.cli, lrface.recipes, lrface.diagnose, torch.utils.data, lightning_fabric
for line in sys.stdin:
    arguments = line.split()
    if arguments[0] == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(arguments[1]), 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setsid()
        log = os.open(arguments.pop(0), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["lrface", *arguments]
        lrface.cli.app()
        os._exit(0)
    print(child, flush=True)
"""


class Nursery:
    """Starts runs of `lrface train` in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=folder, env=environment, **pipes)

    def _ask(self, line: str) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, run: str, *overrides: str) -> int:
        return self._ask(" ".join([f"{run}.log", "train", "tiny.yaml", f"out={run}", *overrides]))

    def wait(self, pid: int) -> int:
        """The exit code."""
        return self._ask(f"wait {pid}")

    def finish(self, run: str, *overrides: str) -> None:
        code = self.wait(self.start(run, *overrides))
        assert code == 0, (self.folder / f"{run}.log").read_text()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    for number in range(40):
        place = folder / "faces" / f"person {number // 8}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
        assert cv2.imwrite(str(place / f"{number}.png"), cv2.resize(coarse, (112, 112)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    nursery = Nursery(folder)
    yield nursery
    assert nursery.process.stdin
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture(scope="module")
def reference(nursery) -> tuple[Path, float]:
    """The run that nobody kills, and the seconds it takes."""
    started = time.monotonic()
    nursery.finish("reference")
    return nursery.folder / "reference", time.monotonic() - started


def kill_when(nursery: Nursery, pid: int, moment: Callable[[], bool]) -> bool:
    """kill -9 as soon as ``moment()``; False when the run was over before."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return nursery.wait(pid) != 0
        assert time.monotonic() < deadline
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    return nursery.wait(pid) == -signal.SIGKILL


def glob(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def moments(run: Path, seconds: float, draw: random.Random) -> dict[str, Callable[[], bool]]:
    """What a kill waits for."""
    due = time.monotonic() + draw.uniform(0.0, seconds)
    rows = draw.randrange(1, STEPS)
    stage = run / "stages" / draw.choice(STAGES)

    def after_rows() -> bool:
        metrics = stage / "metrics.csv"
        return metrics.exists() and metrics.read_bytes().count(b"\n") > rows

    skipped = draw.randrange(4)
    seen: set[str] = set()

    def saving() -> bool:
        seen.update(path.name for path in run.glob("stages/*/.step-*.tmp"))
        return len(seen) > skipped and glob(run, "stages/*/.step-*.tmp")

    return {
        "any time": lambda: time.monotonic() > due,
        "in training": after_rows,
        "in saving": saving,
        "between stages": lambda: (
            (run / "stages" / STAGES[0] / f"step-{STEPS:08d}").is_dir()
            and not glob(run, f"stages/{STAGES[1]}/step-*")
        ),
        "in deleting": lambda: glob(run, "stages/*/.step-*.deleted"),
        "in writing the model": lambda: glob(run, ".model.safetensors.*.tmp"),
    }


def assert_whole(run: Path) -> None:
    """Everything that can be seen can be used."""
    for folder in (run / "stages").glob("*-*"):
        for path in checkpoints(folder):
            assert load_training_state(path).step == int(path.name.removeprefix("step-"))
            assert load_parts(path)
            load_model(path)  # its sha256 is that of the card


def rows(run: Path, stage: str) -> list[dict[str, str]]:
    with (run / "stages" / stage / "metrics.csv").open(newline="") as file:
        return [{**row, "images_per_second": ""} for row in csv.DictReader(file)]


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(equal(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return mine == theirs


def assert_same_run(run: Path, reference: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    for stage in STAGES:
        assert rows(run, stage) == rows(reference, stage) and len(rows(run, stage)) == STEPS
        last = f"stages/{stage}/step-{STEPS:08d}"
        assert equal(load_parts(run / last), load_parts(reference / last))
        assert equal(vars(load_training_state(run / last)), vars(load_training_state(reference / last)))
    assert [path.name for path in run.rglob(".*") if path.name != ".lock"] == []  # nothing half-written


def kill_and_finish(
    nursery: Nursery, reference: tuple[Path, float], kinds: list[str], seed: int
) -> dict[str, int]:
    """Runs that are killed one, two or three times and then left alone; how often each kind of kill struck."""
    draw = random.Random(seed)
    struck = dict.fromkeys(kinds, 0)
    folder, seconds = reference
    number = 0
    while kinds:
        run = nursery.folder / f"run-{seed}-{number}"
        number += 1
        for _ in range(min(len(kinds), draw.randrange(1, 4))):
            kind = kinds[0]
            # The content of the batches does not depend on how many processes read them.
            pid = nursery.start(run.name, f"data.workers={draw.choice((0, 0, 1, 2))}", "data.cache=false")
            hit = kill_when(nursery, pid, moments(run, seconds, draw)[kind])
            if hit:
                struck[kind] += 1
                kinds.pop(0)
            assert_whole(run)
            if not hit:  # over before its moment came
                break
        nursery.finish(run.name)
        assert_same_run(run, folder)
    return struck


def test_runs_killed_three_times_come_to_the_same_weights(nursery, reference):
    kinds = ["in training", "in saving", "between stages"]
    assert kill_and_finish(nursery, reference, kinds, seed=1) == {
        "in training": 1,
        "in saving": 1,
        "between stages": 1,
    }


@pytest.mark.slow
def test_runs_killed_twenty_times_come_to_the_same_weights(nursery, reference):
    kinds = ["any time"] * 6 + ["in training"] * 4 + ["in saving"] * 4 + ["between stages"] * 2
    kinds += ["in deleting"] * 2 + ["in writing the model"] * 2
    random.Random(0).shuffle(kinds)
    started = time.monotonic()
    struck = kill_and_finish(
        nursery, reference, list(kinds), seed=int(os.environ.get("LRFACE_KILL_SEED", "2"))
    )
    print(json.dumps({**struck, "seconds": round(time.monotonic() - started)}))
    assert struck == {kind: kinds.count(kind) for kind in kinds}
