"""LFW at four resolutions from aligned crops, by a network in ONNX: `lrface verify` against ONNX Runtime alone.

The peer calls the network on every image and its mirror, ready as float tensors in memory, and does nothing else: no
decoding, no degradation, no protocol, no intervals. What lrface adds to that is its cost. Both take their turns in
pieces, since the speed of a machine drifts; lrface's figure includes everything else, once. Needs
``../shared/oracle/mobilefacenet_ms1m.onnx`` and aligned LFW with pairs.txt in ``$LRFACE_BENCH_LFW`` (a folder that
`lrface align` made) or ``$LRFACE_DATA``.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ["verify_lfw"]
THREADS = 2
SIZES = (112, 56, 28, 14)
PIECE = 128
ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT.parent / "shared" / "oracle" / "mobilefacenet_ms1m.onnx"
PAIRS = ROOT.parent / "shared" / "data" / "lfw" / "pairs.txt"


class _Turns:
    """The embedder's network, which after every piece of work runs the peer on as many images."""

    def __init__(self, embedder: Any):
        # One session for both: the waiting threads of a second one would slow the first down.
        self.embedder, self.session = embedder, embedder._network._session
        self.name = self.session.get_inputs()[0].name
        self.peer_seconds, self.images, self.waiting = 0.0, 0, 0
        generator = np.random.default_rng(0)
        self.ready = generator.random((PIECE, 3, 112, 112), dtype=np.float32)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        features = self.embedder.embed_tensor(images)
        self.waiting += len(images)
        while self.waiting >= PIECE:
            self.waiting -= PIECE
            started = time.perf_counter()
            step = self.embedder._network.largest_batch
            for start in range(0, PIECE, step):
                self.session.run(None, {self.name: self.ready[start : start + step]})
            self.peer_seconds += time.perf_counter() - started
            self.images += PIECE
        return features


def run(quick: bool = False) -> list[dict[str, Any]]:
    started = time.perf_counter()
    from lrface.benchmarks.verification import evaluate_verification, load_benchmark, resolution_areas
    from lrface.embed import load_embedder

    torch.set_num_threads(THREADS)
    if not ORACLE.is_file() or not PAIRS.is_file():
        raise SystemExit(f"verify_lfw needs {ORACLE} and {PAIRS}")
    embedder = load_embedder(ORACLE, colour="RGB", device="cpu", threads=THREADS)
    folder = os.environ.get("LRFACE_BENCH_LFW")
    with tempfile.TemporaryDirectory() as cache:
        benchmark = (
            load_benchmark(folder, pairs=PAIRS, cache=cache)
            if folder
            else load_benchmark("lfw", data=PAIRS.parent.parent)
        )
        setup = time.perf_counter() - started
        turns = _Turns(embedder)
        sizes = SIZES[-1:] if quick else SIZES
        started = time.perf_counter()
        with embedder.alone_on_cpu():
            found = evaluate_verification(turns, benchmark, sizes, flip=True)
        resolution_areas(found.rows)
        ours = setup + time.perf_counter() - started - turns.peer_seconds
    forwards = 2 * len(sizes) * len(benchmark.images)
    peer = turns.peer_seconds * forwards / turns.images
    accuracies = " ".join(f"{row['accuracy']:.2f}" for row in found.rows)
    print(f"verify_lfw: accuracy {accuracies}; {ours:.1f} s in all, the network alone {peer:.1f} s")
    return [
        {
            "name": "verify_lfw",
            "ours": round(ours, 1),
            "peer": round(peer, 1),
            "ratio": round(peer / ours, 3),
            "unit": "seconds, lower is better",
            "threads": THREADS,
            "accuracy": [row["accuracy"] for row in found.rows],
        }
    ]
