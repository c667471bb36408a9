"""One million faces: packed, opened again, trained on. Writes eval/results/scale_million.json.

Draws one procedural face of each of 100,000 identities and packs it ten times, each time shifted, mirrored or lit
otherwise and encoded anew (drawing a million would take an hour of two cores and test nothing more): 1,000,000 different
files of 8,192 a shard. Shards that are there are kept, so the same command goes on where it stopped. Then opens the
data in a new process, and trains on it with `lrface train` while a watcher samples memory.

    python eval/scale_million.py --work FOLDER      # 6 GB of disk; about 15 minutes on 2 free cores
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lrface.data.packed import INDEX_NAME, shard_name, write_index, write_shard
from lrface.data.synthetic import SyntheticFaces
from lrface.files import read_json, write_json
from lrface.progress import progress
from lrface.train.record import lrface_commit

RESULTS = Path(__file__).resolve().parent / "results" / "scale_million.json"
IMAGES_PER_IDENTITY = 10
SHARD_SIZE = 8192
RECIPE = {
    "name": "scale-million",
    "data": {"batch_size": 64, "cache": False},
    "backbone": {"name": "ir18", "width": 16, "embedding_size": 128},
    "head": {"name": "cosface", "scale": 30, "margin": 0.25},
    "trainer": {"device": "cpu", "compile": False, "checkpoint_every": 100_000, "tensorboard": False},
    "stages": [
        {
            "name": "naive",
            "method": "classify",
            "degrade": {"clean_share": 0.5, "sizes": [56, 28, 14]},
            "optimiser": {"learning_rate": 0.1},
            "schedule": {"kind": "constant"},
        }
    ],
}


def variant(face: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The drawn face itself (number 0), or one shifted by up to 4 pixels, lit otherwise and, every other one, mirrored."""
    if number == 0:
        return face
    rng = np.random.default_rng(seed)
    shifted = np.roll(face, rng.integers(-4, 5, 2), axis=(0, 1))
    lit = np.clip(shifted * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
    return lit[:, ::-1] if number % 2 else lit


def draw_shard(task: tuple[Path, int, int, int]) -> dict[str, Any]:
    """One shard of procedural faces as JPEG; returns its entry of the index."""
    root, number, first, last = task
    entry = root / f"{shard_name(number)}.json"
    if entry.exists():
        return read_json(entry, "entry of a shard")
    faces = SyntheticFaces((last - 1) // IMAGES_PER_IDENTITY + 1, 1)
    drawn, drawn_label = np.zeros(0), -1
    nothing = np.full(10, np.nan, np.float32)
    records = []
    for index in range(first, last):
        label, which = divmod(index, IMAGES_PER_IDENTITY)
        if label != drawn_label:
            drawn, drawn_label = faces.image(label), label
        _, encoded = cv2.imencode(
            ".jpg", variant(drawn, which, index)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90]
        )
        records.append(
            {
                "image": encoded.tobytes(),
                "label": label,
                "identity": faces.identities[label],
                "source": f"{faces.identities[label]}/{which:05d}",
                "face": 0,
                "landmarks": nothing,
                "box": nothing[:4],
                "score": np.nan,
            }
        )
    written = write_shard(root / shard_name(number), records)
    write_json(entry, written)
    return written


def pack(root: Path, images: int, workers: int) -> float:
    """Draw what is missing; returns the seconds that it took."""
    started = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    if (root / INDEX_NAME).exists():
        return 0.0
    starts = range(0, images, SHARD_SIZE)
    tasks = [(root, number, start, min(start + SHARD_SIZE, images)) for number, start in enumerate(starts)]
    shards = []
    with multiprocessing.Pool(workers) as pool, progress(images, "draw and pack") as bar:
        for entry in pool.imap(draw_shard, tasks):
            shards.append(entry)
            bar.advance(entry["rows"])
    identities = SyntheticFaces(images // IMAGES_PER_IDENTITY, IMAGES_PER_IDENTITY).identities
    write_index(root, image_size=(112, 112), identities=identities, shards=shards)
    for _, number, _, _ in tasks:
        (root / f"{shard_name(number)}.json").unlink(missing_ok=True)
    return time.monotonic() - started


OPEN = """
import json, sys, time
import lrface.data.source as source
started = time.perf_counter()
data = source.open_source(sys.argv[1])
opened = time.perf_counter() - started
first = data.image(len(data) - 1)
last_image = time.perf_counter() - started
labels = data.labels
with_labels = time.perf_counter() - started
source.check_source(data, sys.argv[1])
checked = time.perf_counter() - started
print(json.dumps({"images": len(data), "identities": len(data.identities), "opened_seconds": round(opened, 3),
    "last_image_read_seconds": round(last_image, 3), "labels_read_seconds": round(with_labels, 3),
    "checked_seconds": round(checked, 3)}))
"""


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process that are its own (anonymous), and MiB of mapped files that are in memory."""
    values = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon", "RssFile")):
            key, number = line.split(":")
            values[key] = int(number.split()[0]) / 1024
    return values.get("RssAnon", 0.0), values.get("RssFile", 0.0)


def train(root: Path, steps: int, work: Path) -> dict[str, Any]:
    """Train ``steps`` steps in a process of its own and watch its memory."""
    recipe = {**RECIPE, "out": str(work / "run"), "data": {**RECIPE["data"], "path": str(root)}}
    recipe["stages"] = [{**RECIPE["stages"][0], "steps": steps}]
    path = work / "recipe.yaml"
    write_json(path, recipe)  # JSON is YAML
    samples: list[tuple[float, float]] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "lrface.cli", "train", str(path), "--restart", "--json"],
        stdout=subprocess.PIPE,
    )

    def watch() -> None:
        while process.poll() is None:
            try:
                samples.append(memory(process.pid))
            except OSError:
                return
            time.sleep(1.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"training failed with exit code {process.returncode}")
    summary = json.loads(output)
    own = [sample[0] for sample in samples]
    # The first tenth is start-up: imports, labels, the networks, the first steps.
    steady = own[len(own) // 10 + 1 : -2]
    quarter = max(1, len(steady) // 4)
    return {
        "steps": steps,
        "batch_size": RECIPE["data"]["batch_size"],
        "images_per_second": round(summary["stages"][0]["images_per_second"], 1),
        "seconds": round(summary["stages"][0]["seconds"], 1),
        "own_memory_mib_first_quarter": round(float(np.mean(steady[:quarter])), 1),
        "own_memory_mib_last_quarter": round(float(np.mean(steady[-quarter:])), 1),
        "own_memory_mib_peak": round(max(own), 1),
        "mapped_file_mib_peak": round(max(sample[1] for sample in samples), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data and the run")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    parser.add_argument("--pack-only", action="store_true", help="stop after packing")
    arguments = parser.parse_args()
    root = arguments.work / "packed"
    seconds = pack(root, arguments.images, arguments.workers)
    if arguments.pack_only:
        return
    opened = json.loads(subprocess.check_output([sys.executable, "-c", OPEN, str(root)]))
    trained = train(root, arguments.steps, arguments.work)
    result = {
        "table": "One million procedural faces: packed, opened, trained on",
        "command": f"python eval/scale_million.py --images {arguments.images} --steps {arguments.steps}",
        "commit": lrface_commit(),
        "data": {
            "drawn_faces": arguments.images // IMAGES_PER_IDENTITY,
            "shards": len(read_json(root / INDEX_NAME, "index")["shards"]),
            "bytes": sum(path.stat().st_size for path in root.iterdir()),
            "packing_seconds": round(seconds, 1) or "packed by an earlier call",
        },
        "rows": [{"opened": opened, "trained": trained}],
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": date.today().isoformat(),
    }
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
