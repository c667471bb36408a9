"""ImageNet-C's 15 corruptions at 5 severities: lrface's batches against imagecorruptions, one image a call.

Both corrupt the same images of ImageNet in memory, uint8 to uint8, with ImageNet-C's constants. lrface gets one batch,
the peer (imagecorruptions-imaug, the reference code made to run on today's numpy) is called in a loop, as one uses it;
its OpenCV parts use both cores too. They take turns at every corruption and severity; the total compares the sums of
seconds.

corruptions_224: 256 images of 224 x 224, the centre of the photograph. corruptions_32: the same scaled to 32 x 32, in
one batch of 256.

eval/results/corruptions.json has a row for each corruption: images/s, and milliseconds of processor time an image,
which other work on the machine disturbs less.
"""

import contextlib
import hashlib
import io
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ("corruptions_224", "corruptions_32")
THREADS = 2
RESULTS = Path(__file__).resolve().parents[1] / "results" / "corruptions.json"


def run(
    images: int = 256, names: Sequence[str] = NAMES, quick: bool = False, results: Path | None = RESULTS
) -> list[dict[str, Any]]:
    """Rows of the benchmark; ``ours`` and ``peer`` in corrupted images a second, over all corruptions together."""
    from lrface.errors import LrfaceError

    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise LrfaceError(
            f"the peer, imagecorruptions, does not load ({error}); install it with: pip install "
            "imagecorruptions-imaug"
        ) from error
    if quick:
        images = 16
    torch.set_num_threads(THREADS)
    started, load = time.perf_counter(), os.getloadavg()[0]
    paths = _photographs()[:images]
    tables = {name: _measure(paths, int(name.rpartition("_")[2])) for name in names}
    if results is not None and not quick:
        _write(results, tables, paths, time.perf_counter() - started, load)
    rows = []
    for name, table in tables.items():
        count = len(paths) * 5 * len(table)
        ours, peer = (sum(row[f"seconds_{side}"] for row in table) for side in ("ours", "peer"))
        rows.append(
            {
                "name": name,
                "ours": count / ours,
                "peer": count / peer,
                "ratio": peer / ours,
                "unit": "images/s",
                "threads": THREADS,
                "images": len(paths),
                "least_ratio": min(row["ratio"] for row in table),
                "least_ratio_of": min(table, key=lambda row: row["ratio"])["corruption"],
                "cpu_ratio": sum(r["cpu_ms_peer"] for r in table) / sum(r["cpu_ms_ours"] for r in table),
            }
        )
    return rows


def _photographs() -> list[Path]:
    from lrface.benchmarks.locate import data_roots
    from lrface.errors import LrfaceError

    places = [root / "imagenet_sample" for _, root in data_roots()]
    places.append(Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample")
    for place in places:
        if place.is_dir():
            return sorted(place.glob("*.jpg"))
    tried = ", ".join(str(place) for place in places)
    raise LrfaceError(f"the sample of ImageNet was not found (looked in {tried}); set LRFACE_DATA")


def _load(path: Path, side: int) -> np.ndarray:
    """The centre of a photograph, uint8 [side, side, 3]: cut out at 224, scaled down to less."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    crop = min(*image.size, 224)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _clock(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of processor time."""
    used, started = os.times(), time.perf_counter()
    work()
    seconds, now = time.perf_counter() - started, os.times()
    return seconds, now.user + now.system - used.user - used.system


def _measure(paths: Sequence[Path], side: int) -> list[dict[str, Any]]:
    import imagecorruptions

    from lrface.degrade.corruptions import CORRUPTIONS, corrupt

    photographs = [_load(path, side) for path in paths]
    batch = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).contiguous()
    rows = []
    for name in CORRUPTIONS:
        ours, peer = np.zeros(2), np.zeros(2)
        for severity in range(1, 6):

            def by_peer(name: str = name, severity: int = severity, some: int = len(photographs)) -> None:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    for photograph in photographs[:some]:
                        imagecorruptions.corrupt(photograph, severity, name)

            def by_lrface(name: str = name, severity: int = severity, some: int = len(batch)) -> None:
                corrupt(batch[:some], name, severity, "imagenet", seed=severity)

            # Before the clock runs: tables, textures and plans are made once, the peer compiles its loop.
            by_lrface(some=16)
            by_peer(some=2)
            # Small batches take milliseconds, in which any other work shows: of three turns the fastest counts.
            turns = [(_clock(by_lrface), _clock(by_peer)) for _ in range(3 if side <= 64 else 1)]
            ours += min(turn[0] for turn in turns)
            peer += min(turn[1] for turn in turns)
        count = 5 * len(photographs)
        rows.append(
            {
                "corruption": name,
                "side": side,
                "ours": count / ours[0],
                "peer": count / peer[0],
                "ratio": peer[0] / ours[0],
                "cpu_ms_ours": ours[1] / count * 1000,
                "cpu_ms_peer": peer[1] / count * 1000,
                "seconds_ours": ours[0],
                "seconds_peer": peer[0],
            }
        )
    return rows


def _write(
    path: Path,
    tables: dict[str, list[dict[str, Any]]],
    photographs: Sequence[Path],
    seconds: float,
    load: float,
) -> None:
    """The rows of ``tables`` in the place of those of the same sides, others stay."""
    import json
    import subprocess

    from lrface.files import write_json

    sides = {row["side"] for table in tables.values() for row in table}
    try:
        kept = [
            row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["side"] not in sides
        ]
    except (OSError, ValueError, KeyError, TypeError):
        kept = []
    rows = kept + [row for table in tables.values() for row in table]
    command = ["git", "-C", str(path.parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    report = {
        "table": "corruptions",
        "command": "make bench ONLY=" + ",".join(tables),
        "commit": commit,
        "config_sha256": None,
        "checkpoint_sha256": None,
        "data": {
            "name": "imagenet_sample",
            "images": len(photographs),
            "sha256": hashlib.sha256("\n".join(each.name for each in photographs).encode()).hexdigest(),
        },
        "seeds": [1, 2, 3, 4, 5],
        "rows": sorted(rows, key=lambda row: -row["side"]),
        "seconds": seconds,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; load before: {load:.1f}",
    }
    write_json(path, report)
