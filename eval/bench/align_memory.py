"""Memory of `lrface align` over many photographs: it should not grow with their number.

LFW's photographs are aligned once (about 13,000) and then as 100,000 links to them, by two workers, while the memory of
all processes together is sampled (proportional set sizes: pages that they share are counted once). Only large faces are
looked for, which leaves the memory of the batches as it is and the time short.

align_memory: the peak over 13,000 is ``peer``, the peak over 100,000 ``ours``; a ratio of 1 is flat. What grows is the
list of files, ``list_bytes_per_photograph`` by the parent's growth between the two.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("align_memory",)

# Smallest face looked for: the pyramid then has few levels, and few candidates.
FACE = 100


def run(names: Sequence[str] = NAMES, quick: bool = False) -> list[dict[str, Any]]:
    """The row of the benchmark; ``ours`` and ``peer`` in megabytes."""
    source = _photographs_of_lfw()
    paths = sorted(path.relative_to(source) for path in source.glob("*/*.jpg"))
    few, many = (500, 2_000) if quick else (len(paths), 100_000)
    with tempfile.TemporaryDirectory() as folder:
        small = _measure(source, paths, Path(folder) / "few", few)
        large = _measure(source, paths, Path(folder) / "many", many)
    return [
        {
            "name": "align_memory",
            "ours": large["peak"],
            "peer": small["peak"],
            "ratio": small["peak"] / large["peak"],
            "unit": "MB",
            "threads": 2,
            "photographs": many,
            "photographs_peer": few,
            "parent_mb": large["parent"],
            "parent_mb_peer": small["parent"],
            "median_of_quarters_mb": large["quarters"],
            "seconds": large["seconds"],
            "list_bytes_per_photograph": (large["parent"] - small["parent"]) * 2**20 / (many - few),
        }
    ]


def _measure(source: Path, paths: Sequence[Path], folder: Path, count: int) -> dict[str, Any]:
    """Align ``count`` links in a process of their own; peaks in megabytes."""
    for number in range(count):
        # Fifty photographs a person, as in the large training sets.
        link = folder / "photographs" / f"{number // 50:05d}" / f"{number % 50:02d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source / paths[number % len(paths)])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _align(folder, count)
        finally:
            os._exit(code)
    samples: list[tuple[float, float]] = []
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(0.5):
            processes = _below(child)
            samples.append((sum(map(_memory_of, processes)) / 1024, _memory_of(child) / 1024))

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    status = os.waitpid(child, 0)[1]
    seconds = time.perf_counter() - started
    stopped.set()
    sampler.join()
    assert status == 0, f"aligning ended with status {status}"
    together = [whole for whole, _ in samples]
    quarter = max(1, len(together) // 4)
    return {
        "peak": max(together),
        "parent": max(parent for _, parent in samples),
        # Growth would show as one above the other; the first has the workers' start in it.
        "quarters": [
            round(sorted(together[start : start + quarter])[quarter // 2])
            for start in range(0, 4 * quarter, quarter)
            if start + quarter <= len(together)
        ],
        "seconds": seconds,
    }


def _align(folder: Path, count: int) -> int:
    from lrface.align.pipeline import align_folder

    summary = align_folder(
        folder / "photographs",
        folder / "out",
        workers=2,
        min_face_size=FACE,
        fallback="center",
        show_progress=sys.stderr.isatty(),
    )
    return int(summary.files != count)


def _below(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                pass  # it has ended
    return found


def _memory_of(process: int) -> int:
    """Kilobytes; 0 for a process that has gone."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


def _photographs_of_lfw() -> Path:
    from lrface.benchmarks.locate import data_roots
    from lrface.errors import LrfaceError

    places = [root / "lfw" / "images" for _, root in data_roots()]
    places.append(Path(__file__).resolve().parents[3] / "shared" / "data" / "lfw" / "images")
    for place in places:
        if place.is_dir():
            return place.resolve()
    tried = ", ".join(str(place) for place in places)
    raise LrfaceError(f"the photographs of LFW were not found (looked in {tried}); set LRFACE_DATA")
