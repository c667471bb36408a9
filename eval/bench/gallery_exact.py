"""Exact search of a gallery of a million people against faiss' IndexFlatIP called directly.

Random vectors of 512 numbers: how fast exact search is does not depend on them. lrface searches a gallery in a folder,
as `lrface gallery` makes it, from mapped files to names and verdicts; the peer searches the same vectors in its own memory
and gives row numbers. 100 probes at once, ten best of each, on 2 threads, in turns in one process; the best of five. Both
give the same people. One probe at a time is told beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from lrface.errors import LrfaceError

NAMES = ["gallery_exact"]
THREADS = 2
PEOPLE, DIMENSIONS, PROBES, BEST = 1_000_000, 512, 100, 10

CODE = """
import json, resource, sys, time
from pathlib import Path
import faiss, numpy as np
from lrface.gallery import Gallery
from lrface.gallery.faces import EnrolledFaces
from lrface.gallery.folder import FolderStore

folder, people, dimensions, probes, best, threads = Path(sys.argv[1]), *map(int, sys.argv[2:])
faiss.omp_set_num_threads(threads)
random = np.random.default_rng(0)
model = {"name": "random", "sha256": "0", "embedding_size": dimensions, "input": None, "output": None}
store = FolderStore.create(folder, {"model": model, "pooling": "mean", "flip": True, "index": "exact"})
peer = faiss.IndexFlatIP(dimensions)
with store.writing():
    for start in range(0, people, 50_000):
        count = min(50_000, people - start)
        rows = random.standard_normal((count, dimensions), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        names = [f"person {number}" for number in range(start, start + count)]
        ones = np.ones(count, np.float32)
        hashes = [number.to_bytes(32, "big") for number in range(start, start + count)]
        store.add(EnrolledFaces(names, hashes, [""] * count, rows, ones, 112 * ones))
        peer.add(rows)
        print(f"enrolled {start + count}", file=sys.stderr)
wanted = random.standard_normal((probes, dimensions), dtype=np.float32)
wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
gallery = Gallery(store, str(folder), None)
times = {}

def timed(name, search):
    started = time.perf_counter()
    found = search()
    times[name] = min(times.get(name, float("inf")), time.perf_counter() - started)
    return found

for turn in range(6):
    matches = timed("ours", lambda: gallery.search_vectors(wanted, k=best))
    scores, rows = timed("peer", lambda: peer.search(wanted, best))
    timed("ours_one", lambda: gallery.search_vectors(wanted[:1], k=best))
    timed("peer_one", lambda: peer.search(wanted[:1], best))
    if not turn:
        times.clear()  # files come from the disk, threads start
ours = np.array([[each.similarity for each in match.candidates] for match in matches])
same = [[f"person {row}" for row in each] == [one.name for one in match.candidates] for each, match in zip(rows, matches)]
print(json.dumps({**times, "difference": float(np.abs(ours - scores).max()), "same": float(np.mean(same)),
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  "gallery_bytes": gallery.info()["bytes"]}))
"""


def run(quick: bool = False) -> list[dict[str, Any]]:
    people = 50_000 if quick else PEOPLE
    threads = str(THREADS)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory(prefix="lrface-gallery-") as folder:
        numbers = [str(number) for number in (people, DIMENSIONS, PROBES, BEST, THREADS)]
        output = subprocess.check_output(
            [sys.executable, "-c", CODE, os.path.join(folder, "gallery"), *numbers], env=environment
        )
    found = json.loads(output)
    # Single precision may turn neighbours round that differ in the seventh digit; the scores may not differ.
    if found["difference"] > 1e-5 or found["same"] < 0.95:
        raise LrfaceError(f"gallery_exact: the two do not find the same people: {found}")
    return [
        {
            "name": "gallery_exact",
            "ours": round(PROBES / found["ours"], 1),
            "peer": round(PROBES / found["peer"], 1),
            "ratio": round(found["peer"] / found["ours"], 3),
            "unit": f"probes/s, ten best of {people:,} x {DIMENSIONS}, {PROBES} at once",
            "threads": THREADS,
            "one_probe_ms": round(1000 * found["ours_one"], 1),
            "peer_one_probe_ms": round(1000 * found["peer_one"], 1),
            "same_order": found["same"],
            "peak_mib_both": round(found["peak_mib"]),
            "gallery_bytes": found["gallery_bytes"],
        }
    ]
