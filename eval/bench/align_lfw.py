"""Aligning LFW photographs: `lrface align` against facenet-pytorch.

The peer is what one writes with facenet-pytorch: open a photograph, ``MTCNN().detect(image, landmarks=True)`` with
default arguments, one photograph a call. Its clock starts when its networks are loaded and it neither cuts crops nor
writes anything. lrface's clock covers the whole job: starting workers, finding faces, warping, encoding, writing
shards and the report. Peer and lrface take turns; the median of each counts.

align_lfw: the peer is one process with two threads. align_lfw_2cores: the peer is two processes with one thread each
that share the photographs, the best use of two cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        ours: list[float] = []
        peers: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                processes = 1 if name == "align_lfw" else 2
                seconds, found = _time_peer(linked, paths, processes, threads=2 // processes)
                peers[name].append(len(paths) / seconds)
                out = Path(folder) / f"{name}-{number}"
                ours.append(_time_lrface(linked, out, len(paths)))
        share = _agreement(out, found)
    our_speed = statistics.median(ours)
    return [
        {
            "name": name,
            "ours": our_speed,
            "peer": statistics.median(speeds),
            "ratio": our_speed / statistics.median(speeds),
            "unit": "photographs/s",
            "threads": 2,
            "photographs": len(paths),
            "rounds": rounds,
            "workers": len(os.sched_getaffinity(0)),
            "landmarks_within_half_pixel": share,
        }
        for name, speeds in peers.items()
    ]


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


def _time_lrface(photographs: Path, out: Path, expected: int) -> float:
    """Photographs a second of the whole job, in this process and its workers."""
    from lrface.align.pipeline import align_folder

    started = time.perf_counter()
    summary = align_folder(photographs, out, show_progress=False)
    seconds = time.perf_counter() - started
    assert summary.files == expected
    return expected / seconds


def _time_peer(
    root: Path, paths: Sequence[str], processes: int, threads: int
) -> tuple[float, dict[str, list[Any]]]:
    """Seconds that the peer's processes take together, and the faces they find: path -> [box, score, landmarks]."""
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
        for worker in workers:
            assert worker.stdout is not None
            found.update(json.loads(worker.stdout.readline()))
            assert worker.wait() == 0
        return seconds, found
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
    for path in paths:
        found[path] = detector.detect(Image.open(root / path).convert("RGB"), landmarks=True)
    print("done", flush=True)
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
