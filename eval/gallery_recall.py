"""Recall and speed of a gallery's approximate indexes on embeddings of faces. Writes eval/results/gallery_recall.json.

The gallery: the first image of everybody in --faces (LFW: 5,749 people), and drawn people up to --people, one vector
each. The probes: second images of real people. Everything is an embedding of --model; the drawn people are drawn from what
the real ones look like: k-means finds 64 kinds of people among the real vectors, a drawn one is a centre (as often as real
people are near it) plus a normal deviation with the covariance that real people have around their centres, scaled to unit
length. That they crowd as real ones do is measured, not assumed: `crowding` has, for as many drawn people as real ones, the
cosine to the nearest and to the tenth nearest other (quantiles 5, 50 and 95 % over people).

    python eval/gallery_recall.py --faces lfw_packed --model mobilefacenet_ms1m.onnx     # about 10 minutes on 2 free cores
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.data.source import open_source
from lrface.embed import open_model
from lrface.errors import LrfaceError, errors_for_users
from lrface.files import write_json
from lrface.gallery.faces import EnrolledFaces
from lrface.gallery.folder import FolderStore
from lrface.gallery.index import TARGET_RECALL, exact_top
from lrface.neighbours import embed_source
from lrface.progress import progress
from lrface.train.record import lrface_commit

RESULTS = Path(__file__).resolve().parent / "results" / "gallery_recall.json"
KINDS, BEST, SEED = 64, 10, 0


def real_people(faces: str, model: str) -> tuple[NDArray[np.float32], NDArray[np.float32], Any]:
    """The first vector of everybody, the second of those who have two, and the embedder."""
    embedder = open_model(model)
    source = open_source(faces)
    vectors, labels = embed_source(source, embedder), np.asarray(source.labels)
    known = np.flatnonzero(np.linalg.norm(vectors, axis=1) > 0)
    order = known[np.argsort(labels[known], kind="stable")]
    place = np.arange(len(order)) - np.searchsorted(labels[order], labels[order], side="left")
    if (place == 1).sum() < 100:
        raise LrfaceError(f"{faces}: fewer than 100 people with two images; --faces wants all of LFW")
    return vectors[order[place == 0]], vectors[order[place == 1]], embedder


class Drawn:
    """People like the real ones."""

    def __init__(self, real: NDArray[np.float32]):
        from sklearn.cluster import KMeans

        found = KMeans(KINDS, n_init=1, random_state=SEED).fit(real)
        self.centres = found.cluster_centers_
        self.share = np.bincount(found.labels_, minlength=KINDS) / len(real)
        rest = real - self.centres[found.labels_]
        self.root = np.linalg.cholesky(rest.T @ rest / (len(real) - KINDS) + 1e-9 * np.eye(real.shape[1]))
        self.random = np.random.default_rng(SEED)

    def __call__(self, count: int) -> NDArray[np.float32]:
        kind = self.random.choice(KINDS, count, p=self.share)
        deviation = self.random.standard_normal((count, self.centres.shape[1])) @ self.root.T
        rows = self.centres[kind] + deviation
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def crowding(probes: NDArray[np.float32], rows: NDArray[np.float32], own: bool) -> dict[str, list[float]]:
    """Quantiles 5, 50, 95 % of the cosine to the nearest and tenth nearest of ``rows``, ``own`` row aside."""
    probe, _, score = exact_top([(rows, None)], probes, BEST + own)
    score = score.reshape(len(probes), -1)[:, int(own) :]
    return {
        name: [round(float(value), 3) for value in np.quantile(score[:, at], (0.05, 0.5, 0.95))]
        for name, at in (("nearest", 0), ("tenth", BEST - 1))
    }


def timed(
    store: FolderStore, probes: NDArray[np.float32], turns: int
) -> tuple[list[list[str]], float, float]:
    """Names found, seconds for 100 probes at once and for one by itself: the best of ``turns``."""
    found = [[each.name for each in one] for one in store.search(probes, BEST)]
    together, alone = [], []
    for _ in range(turns):
        started = time.perf_counter()
        store.search(probes[:100], BEST)
        together.append(time.perf_counter() - started)
        for probe in probes[:20]:
            started = time.perf_counter()
            store.search(probe[None], BEST)
            alone.append(time.perf_counter() - started)
    return found, min(together), float(np.median(alone))


def measured(store: FolderStore, kind: str, probes: NDArray[np.float32], exact: Any) -> dict[str, Any]:
    """The row of one index. ``exact``: what :func:`timed` gave without one."""
    started = time.perf_counter()
    with store.writing():
        store.set_index(kind)
        store.refresh_index()
    built = time.perf_counter() - started
    said = store.info()["search_index"]
    found, together, alone = timed(store, probes, 5)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, exact[0], strict=True))
    file = store._look().manifest["search_index"]["file"]
    return {
        "index": kind,
        "effort": said["effort"],
        "recall_on_the_gallery": said["recall"],
        "recall_at_10": round(hits / sum(map(len, exact[0])), 4),
        "same_first": round(
            float(np.mean([a[:1] == b[:1] for a, b in zip(found, exact[0], strict=True)])), 4
        ),
        "speed_up_100_at_once": round(exact[1] / together, 2),
        "speed_up_one": round(exact[2] / alone, 2),
        "ms_100_at_once": round(1000 * together, 2),
        "ms_one": round(1000 * alone, 3),
        "build_seconds": round(built, 1),
        "bytes": (store.folder / file).stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faces", required=True, help="aligned faces of many people, as `lrface align` packs them"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--people", type=int, default=1_000_000)
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="lrface-gallery-") as folder:
        real, probes, embedder = real_people(arguments.faces, arguments.model)
        drawn = Drawn(real)
        alike = {
            "real among real": crowding(real, real, True),
            "drawn among drawn": crowding(sample := drawn(len(real)), sample, True),
            "drawn among real": crowding(sample, real, False),
        }
        probes = probes[np.random.default_rng(SEED).permutation(len(probes))[: arguments.probes]]
        model = {"name": embedder.name, "sha256": embedder.model_sha256, "embedding_size": real.shape[1]}
        header = {"model": model, "pooling": "mean", "flip": False, "index": "exact"}
        store = FolderStore.create(Path(folder) / "gallery", header)
        with store.writing(), progress(arguments.people, "enrol", unit="people") as bar:
            start = 0
            while start < arguments.people:
                count = min(50_000, arguments.people - start)
                rows = real[:count] if start == 0 else np.zeros((0, real.shape[1]), np.float32)
                rows = np.concatenate([rows, drawn(count - len(rows))])
                names = [f"person {number}" for number in range(start, start + count)]
                hashes = [number.to_bytes(32, "big") for number in range(start, start + count)]
                ones = np.ones(count, np.float32)
                store.add(EnrolledFaces(names, hashes, [""] * count, rows, ones, 112 * ones))
                start += count
                bar.advance(count)
        exact = timed(store, probes, 3)
        rows = [
            {"index": "exact", "recall_at_10": 1.0, "ms_100_at_once": round(1000 * exact[1], 2)}
            | {"ms_one": round(1000 * exact[2], 3)}
        ]
        rows += [measured(store, kind, probes, exact) for kind in ("ivf", "hnsw")]
        result = {
            "table": "Approximate search in a gallery: recall of the ten best, and speed against exact search",
            "command": f"python eval/gallery_recall.py --people {arguments.people} --probes {arguments.probes}",
            "commit": lrface_commit(),
            "config_sha256": None,
            "checkpoint_sha256": embedder.model_sha256,
            "data": {
                "faces": Path(arguments.faces).name,
                "real_people": len(real),
                "people": arguments.people,
                "probes": len(probes),
                "dimensions": real.shape[1],
                "target_recall": TARGET_RECALL,
                "crowding": alike,
            },
            "seeds": [SEED],
            "rows": rows,
            "seconds": round(time.time() - started),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        }
        write_json(arguments.out, result)
        for row in rows:
            print(row)


if __name__ == "__main__":
    with errors_for_users():
        main()
