"""Aligning LFW photographs: `lrface align` against facenet-pytorch.

The peer is what one writes with facenet-pytorch: open a photograph, ``MTCNN().detect(image, landmarks=True)`` with
default arguments, one photograph a call. Its clock starts when its networks are loaded and it neither cuts crops nor
writes anything. lrface's clock covers the whole job: starting workers, finding faces, warping, encoding, writing
shards and the report. Peer and lrface take turns; the median of each counts, and of the ratios of each turn.

align_lfw: the peer is one process with two threads. align_lfw_2cores: the peer is two processes with one thread each
that share the photographs, the best use of two cores.

Beside the rates: processor time a photograph of both, which other work on the machine disturbs less, and the peak of
memory of all processes together (pages that they share counted once).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("align_lfw", "align_lfw_2cores")


def run(
    photographs: int = 1000, rounds: int = 3, names: Sequence[str] = NAMES, quick: bool = False
) -> list[dict[str, Any]]:
    """Rows of the benchmark; ``ours`` and ``peer`` in photographs a second, the ratio is ours / peer.

    ``landmarks_within_half_pixel`` is the share of photographs whose chosen face has all five landmarks within half a
    pixel of the peer's.
    """
    if quick:
        photographs, rounds = 100, 1
    source = _photographs_of_lfw()
    paths = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*.jpg"))
    step = max(1, len(paths) // photographs)
    paths = paths[::step][:photographs]
    with tempfile.TemporaryDirectory() as folder:
        # Links to just these photographs: what `lrface align` is given.
        linked = Path(folder) / "photographs"
        for path in paths:
            (linked / path).parent.mkdir(parents=True, exist_ok=True)
            (linked / path).symlink_to(source / path)
        turns: dict[str, list[tuple[_Turn, _Turn]]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                processes = 1 if name == "align_lfw" else 2
                peer, found = _time_peer(linked, paths, processes, threads=2 // processes)
                out = Path(folder) / f"{name}-{number}"
                turns[name].append((_time_lrface(linked, out, len(paths)), peer))
        share = _agreement(out, found)
    rows = []
    for name, pairs in turns.items():
        ours, peers = zip(*pairs, strict=True)
        rows.append(
            {
                "name": name,
                "ours": statistics.median(turn.rate for turn in ours),
                "peer": statistics.median(turn.rate for turn in peers),
                "ratio": statistics.median(our.rate / peer.rate for our, peer in pairs),
                "unit": "photographs/s",
                "threads": 2,
                "photographs": len(paths),
                "rounds": rounds,
                "workers": 2,
                "cpu_ms_ours": statistics.median(turn.cpu_ms for turn in ours),
                "cpu_ms_peer": statistics.median(turn.cpu_ms for turn in peers),
                "peak_mb_ours": max(turn.peak_mb for turn in ours),
                "peak_mb_peer": max(turn.peak_mb for turn in peers),
                "landmarks_within_half_pixel": share,
            }
        )
    return rows


class _Turn(NamedTuple):
    """Photographs a second, milliseconds of processor time a photograph, and megabytes of memory at most."""

    rate: float
    cpu_ms: float
    peak_mb: float


class _Memory(threading.Thread):
    """Samples the memory of a process and all below it: proportional set sizes, which count shared pages once."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self._process = process
        self._stopped = threading.Event()
        self.samples: list[float] = []

    def run(self) -> None:
        while not self._stopped.is_set():
            self.samples.append(sum(map(_memory_of, _below(self._process))) / 1024)
            self._stopped.wait(0.25)

    def stop(self) -> float:
        """The peak in megabytes."""
        self._stopped.set()
        self.join()
        return max(self.samples)


def _memory_of(process: int) -> int:
    """Kilobytes; 0 for a process that has gone."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


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


def _processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


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


def _time_lrface(photographs: Path, out: Path, expected: int) -> _Turn:
    """The whole job, in this process and its workers."""
    from lrface.align.pipeline import align_folder

    memory = _Memory(os.getpid())
    memory.start()
    used, started = _processor_seconds(), time.perf_counter()
    summary = align_folder(photographs, out, workers=2, show_progress=False)
    seconds, used = time.perf_counter() - started, _processor_seconds() - used
    assert summary.files == expected
    return _Turn(expected / seconds, used / expected * 1000, memory.stop())


def _time_peer(
    root: Path, paths: Sequence[str], processes: int, threads: int
) -> tuple[_Turn, dict[str, list[Any]]]:
    """The peer's processes together, and the faces they find: path -> [box, score, landmarks]."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), str(root), str(threads)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(processes)
    ]
    try:
        for number, worker in enumerate(workers):
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(list(paths[number::processes])) + "\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "ready\n", "the peer did not start"
        memories = [_Memory(worker.pid) for worker in workers]
        for memory in memories:
            memory.start()
        started = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        found: dict[str, list[Any]] = {}
        seconds = 0.0
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "done\n", "the peer stopped"
            seconds = time.perf_counter() - started
        peak = sum(memory.stop() for memory in memories)
        used = 0.0
        for worker in workers:
            assert worker.stdout is not None
            used += float(worker.stdout.readline())
            found.update(json.loads(worker.stdout.readline()))
            assert worker.wait() == 0
        return _Turn(len(paths) / seconds, used / len(paths) * 1000, peak), found
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _agreement(out: Path, found: dict[str, list[Any]]) -> float:
    """Share of photographs with the same chosen face and every landmark within half a pixel."""
    import numpy as np

    from lrface.align.detect import Detection, choose_faces
    from lrface.align.pipeline import read_photo
    from lrface.data.packed import PackedSource

    packed = PackedSource(out)
    landmarks = dict(zip(packed.sources(), packed.column("landmarks"), strict=True))
    same = 0
    for path, faces in found.items():
        detections = [
            Detection(np.array(box), score, np.array(points)) for box, score, points in faces if score > 0.9
        ]
        shape = read_photo(out.parent / "photographs" / path).shape
        theirs = choose_faces(detections, shape)
        if not theirs or path not in landmarks:
            same += not theirs and path not in landmarks
            continue
        same += bool(np.abs(theirs[0].landmarks - landmarks[path]).max() <= 0.5)
    return same / len(found)


def _peer(root: Path, threads: int) -> None:
    """The loop that one writes with facenet-pytorch, in a process of its own."""
    import torch
    from facenet_pytorch import MTCNN
    from PIL import Image

    torch.set_num_threads(threads)
    paths = json.loads(sys.stdin.readline())
    detector = MTCNN()
    for path in paths[:3]:
        detector.detect(Image.open(root / path).convert("RGB"), landmarks=True)
    print("ready", flush=True)
    sys.stdin.readline()
    found = {}
    used = time.process_time()
    for path in paths:
        found[path] = detector.detect(Image.open(root / path).convert("RGB"), landmarks=True)
    used = time.process_time() - used
    print("done", flush=True)
    print(used)
    faces = {
        path: []
        if boxes is None
        else [
            [box.astype(float).tolist(), float(score), points.astype(float).tolist()]
            for box, score, points in zip(boxes, scores, landmarks, strict=True)
        ]
        for path, (boxes, scores, landmarks) in found.items()
    }
    print(json.dumps(faces), flush=True)


if __name__ == "__main__":
    _peer(Path(sys.argv[1]), int(sys.argv[2]))
