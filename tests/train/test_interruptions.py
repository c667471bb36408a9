"""Real runs that are killed, pre-empted, robbed of a data worker or out of disk space.

Each comes to the weights of the run that nobody disturbed, when the same command is run again.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        return self._ask(" ".join([f"{Path(run).name}.log", "train", "tiny.yaml", f"out={run}", *overrides]))

    def wait(self, pid: int) -> int:
        """The exit code."""
        return self._ask(f"wait {pid}")

    def log(self, run: str) -> str:
        return (self.folder / f"{Path(run).name}.log").read_text()

    def finish(self, run: str, *overrides: str) -> None:
        code = self.wait(self.start(run, *overrides))
        assert code == 0, self.log(run)


@contextmanager
def nursery_of(
    folder: Path, recipe: dict[str, Any], people: int, images: int, size: int, coarse: int
) -> Iterator[Nursery]:
    """Runs of ``recipe`` on ``images`` pictures of each of ``people``, of ``coarse`` colours a side."""
    for number in range(people * images):
        place = folder / "faces" / f"person {number // images}"
        place.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(number).integers(0, 256, (coarse, coarse, 3)).astype(np.uint8)
        assert cv2.imwrite(str(place / f"{number}.png"), cv2.resize(colours, (size, size)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    nursery = Nursery(folder)
    yield nursery
    assert nursery.process.stdin
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with nursery_of(
        tmp_path_factory.mktemp("kills"), RECIPE, people=5, images=8, size=112, coarse=6
    ) as found:
        yield found


@pytest.fixture(scope="module")
def reference(nursery) -> tuple[Path, float]:
    """The run that nobody kills, and the seconds it takes."""
    started = time.monotonic()
    nursery.finish("reference")
    return nursery.folder / "reference", time.monotonic() - started


def wait_for(pid: int, moment: Callable[[], bool]) -> bool:
    """Whether ``moment()`` came before the process was over."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0002)
    return True


def kill_when(nursery: Nursery, pid: int, moment: Callable[[], bool]) -> bool:
    """kill -9 as soon as ``moment()``; False when the run was over before."""
    if not wait_for(pid, moment):
        return nursery.wait(pid) != 0
    os.kill(pid, signal.SIGKILL)
    return nursery.wait(pid) == -signal.SIGKILL


def glob(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def has_rows(run: Path, stage: str, count: int) -> bool:
    metrics = run / "stages" / stage / "metrics.csv"
    return metrics.exists() and metrics.read_bytes().count(b"\n") > count


def moments(run: Path, seconds: float, draw: random.Random) -> dict[str, Callable[[], bool]]:
    """What a kill waits for."""
    due = time.monotonic() + draw.uniform(0.0, seconds)
    rows = draw.randrange(1, STEPS)
    stage = draw.choice(STAGES)
    skipped = draw.randrange(4)
    seen: set[str] = set()

    def saving() -> bool:
        seen.update(path.name for path in run.glob("stages/*/.step-*.tmp"))
        return len(seen) > skipped and glob(run, "stages/*/.step-*.tmp")

    return {
        "any time": lambda: time.monotonic() > due,
        "in training": lambda: has_rows(run, stage, rows),
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


LOADING = ("data.workers=1", "data.cache=false")


def test_a_signal_to_the_whole_job_is_a_pre_emption(nursery, reference):
    """A scheduler tells every process of a job, those that load data too."""
    run = nursery.folder / "pre-empted"
    pid = nursery.start(run.name, *LOADING)
    assert wait_for(pid, lambda: has_rows(run, "2-two", 3)), nursery.log(run.name)
    os.killpg(pid, signal.SIGTERM)
    assert nursery.wait(pid) == 0, nursery.log(run.name)
    done = len(rows(run, "2-two"))
    text = nursery.log(run.name)
    assert (
        f"stopped after step {done}, saved {run.name}/stages/2-two/step-{done:08d}; the same command" in text
    )
    assert "Traceback" not in text
    nursery.finish(run.name)  # and on another number of data workers
    assert_same_run(run, reference[0])


def test_a_signal_outside_of_training_ends_the_run_without_failure(nursery):
    run = nursery.folder / "decoding"
    pid = nursery.start(run.name, "data.synthetic.identities=200", "data.path=null", "data.cache=true")
    assert wait_for(pid, (run / "recipe.yaml").exists), nursery.log(run.name)
    os.kill(pid, signal.SIGTERM)
    assert nursery.wait(pid) == 0, nursery.log(run.name)
    assert "stopped between training steps; the same command goes on from there" in nursery.log(run.name)


def test_a_killed_data_worker_is_named_and_the_run_goes_on(nursery, reference):
    run = nursery.folder / "worker"
    pid = nursery.start(run.name, *LOADING)
    assert wait_for(pid, lambda: has_rows(run, "1-one", 3)), nursery.log(run.name)
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    assert nursery.wait(pid) == 1
    text = nursery.log(run.name)
    assert "error: a process that loads data died" in text and "lower data.workers" in text
    assert "Traceback" not in text and "The same command goes on from worker/stages/1-one/step-0000" in text
    nursery.finish(run.name)
    assert_same_run(run, reference[0])


def mount_disk(folder: Path, options: str) -> None:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a disk")


def test_a_folder_that_cannot_be_written_is_named(nursery):
    mount_disk(nursery.folder / "read-only", "ro,size=64k")
    try:
        assert nursery.wait(nursery.start("read-only/there")) == 1
    finally:
        subprocess.run(["umount", str(nursery.folder / "read-only")], check=True)
    text = nursery.log("there")
    assert "error: cannot write read-only/there" in text and "Read-only file system" in text
    assert "Make its folder writable or choose another place" in text and "Traceback" not in text


def test_a_full_disk_is_named_and_the_run_goes_on(nursery, reference):
    disk = nursery.folder / "small"
    mount_disk(disk, "size=5m")  # a checkpoint of the first stage takes 1.7 MB
    try:
        assert nursery.wait(nursery.start("small/full", "trainer.keep_last=9")) == 1
        text = nursery.log("full")
        assert "error: cannot write small/full/stages/1-one/" in text and "Traceback" not in text
        assert (
            "the disk is full. Nothing finished before is lost; free space and run the same command" in text
        )
        assert checkpoints(disk / "full" / "stages" / "1-one")
        assert_whole(disk / "full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        nursery.finish("small/full", "trainer.keep_last=9")
        assert_same_run(disk / "full", reference[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
