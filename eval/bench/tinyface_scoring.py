"""TinyFace-size identification: exact rank-k and mean average precision against a plain full-matrix argsort.

Random features of 512 numbers. lrface searches 3,728 probes in 4,443 + 153,428 gallery faces, in a process of its own
whose peak memory is read. The peer computes the whole matrix of distances with numpy, sorts every row and walks down
it, for the largest number of probes whose matrix fits into 2 GB; both are given in probes a second, on 2 threads.
"""

import json
import subprocess
import sys
from typing import Any

NAMES = ["tinyface_scoring"]
THREADS = 2
PROBES, MATCHES, DISTRACTORS, DIMENSIONS = 3728, 4443, 153_428, 512
PEER_PROBES = 1500  # 1,500 x 157,871 single-precision distances are 0.95 GB, and their order 1.9 GB

SETUP = f"""
import json, resource, sys, time
import numpy as np, torch
torch.set_num_threads({THREADS})
probes = int(sys.argv[1])
rng = np.random.default_rng(0)
identities = rng.integers(0, 2569, {MATCHES})
identities[:2569] = np.arange(2569)
centres = rng.standard_normal((2569, {DIMENSIONS}), dtype=np.float32)
gallery = rng.standard_normal(({MATCHES} + {DISTRACTORS}, {DIMENSIONS}), dtype=np.float32) * 1.5
gallery[:{MATCHES}] += centres[identities]
gallery_ids = np.concatenate([identities, np.full({DISTRACTORS}, -100)])
probe_ids = rng.integers(0, 2569, {PROBES})[:probes]
probe = rng.standard_normal(({PROBES}, {DIMENSIONS}), dtype=np.float32)[:probes] * 1.5 + centres[probe_ids]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
"""
OURS = """
from lrface.benchmarks.identification import identify
started = time.perf_counter()
found = identify(probe, probe_ids, gallery, gallery_ids, "euclidean")
rank, precision = found.rank[20], found.mean_average_precision
"""
PEER = """
squares = (gallery**2).sum(1)
distances = squares[None, :] - 2 * probe @ gallery.T
order = np.argsort(distances, axis=1, kind="stable")
del distances
hits, precisions = 0, []
for row, identity in zip(order, probe_ids):
    places = np.flatnonzero(gallery_ids[row] == identity) + 1
    hits += places[0] <= 20
    found = np.arange(1, len(places) + 1)
    before_it = np.where(places > 1, (found - 1) / np.maximum(places - 1, 1), 1.0)
    precisions.append(np.mean((before_it + found / places) / 2))
rank, precision = hits / len(probe), float(np.mean(precisions))
"""
REPORT = """
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_mib": peak / 1024, "rank": float(rank), "precision": float(precision)}))
"""


def measured(code: str, probes: int) -> dict[str, float]:
    command = [sys.executable, "-c", SETUP + code + REPORT, str(probes)]
    return json.loads(subprocess.check_output(command))


def run(quick: bool = False) -> list[dict[str, Any]]:
    peer_probes = 200 if quick else PEER_PROBES
    same = measured(OURS, peer_probes)
    peer = measured(PEER, peer_probes)
    ours = measured(OURS, PROBES)
    # The peer's single-precision distances put neighbours that rounding joins in another order.
    if abs(same["rank"] - peer["rank"]) > 1e-3 or abs(same["precision"] - peer["precision"]) > 1e-5:
        raise SystemExit(f"tinyface_scoring: lrface gives {same}, the plain argsort {peer}")
    return [
        {
            "name": "tinyface_scoring",
            "ours": round(PROBES / ours["seconds"], 1),
            "peer": round(peer_probes / peer["seconds"], 1),
            "ratio": round(PROBES / ours["seconds"] / (peer_probes / peer["seconds"]), 2),
            "unit": f"probes/s against {MATCHES + DISTRACTORS:,} faces of {DIMENSIONS} numbers",
            "threads": THREADS,
            "seconds": round(ours["seconds"], 1),
            "peak_mib": round(ours["peak_mib"]),
            "peer_peak_mib": round(peer["peak_mib"]),
            "peer_probes": peer_probes,
        }
    ]
