"""The nearest vectors: exactly, block by block, or by an approximate index of faiss."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.errors import LrfaceError
from lrface.progress import progress as progress_bar

BLOCK = 8192
"""Rows scored at once: with 100 probes their cosines are 3 MB and stay in the cache."""

PROBES = 256
"""Probes scored at once."""

SPARE = 8
"""Candidates kept beyond k: single precision may join neighbours, double precision then orders them."""

TARGET_RECALL = 0.97
"""An approximate index is set to look this hard: the share of the true ten best that it finds."""


class TopRows:
    """The best rows of each probe so far: ``offer`` blocks of scores, then read ``best``."""

    def __init__(self, probes: int, k: int):
        self._k = k
        self._probe = np.zeros(0, np.int64)
        self._row = np.zeros(0, np.int64)
        self._score = np.zeros(0, np.float32)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        self._count = 0
        self._least = np.full(probes, -np.inf, np.float32)

    def offer(self, scores: NDArray[np.float32], first: int) -> None:
        """``scores`` float32 [probes, m] of the rows from ``first`` on; -inf for a row that is out."""
        near = np.flatnonzero(scores.max(axis=1) > self._least)
        if not len(near):
            return
        close = scores if len(near) == len(scores) else scores[near]
        if not np.isfinite(self._least[near]).all() and scores.shape[1] > self._k:
            kth = np.partition(close, scores.shape[1] - self._k, axis=1)[:, scores.shape[1] - self._k]
            mask = close >= np.maximum(kth, self._least[near])[:, None]
        else:
            mask = close > self._least[near, None]
        mask &= close > -np.inf
        at, column = np.nonzero(mask)
        self._waiting.append((near[at], column + first, close[at, column]))
        self._count += len(at)
        if self._count > 4 * self._k * len(self._least) or not np.isfinite(self._least).all():
            self._settle()

    def _settle(self) -> None:
        parts = [(self._probe, self._row, self._score), *self._waiting]
        probe, row, score = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((row, -score, probe))
        probe, row, score = probe[order], row[order], score[order]
        place = np.arange(len(probe)) - np.searchsorted(probe, probe, side="left")
        kept = place < self._k
        self._probe, self._row, self._score = probe[kept], row[kept], score[kept]
        full = place == self._k - 1
        self._least[probe[full]] = score[full]
        self._waiting, self._count = [], 0

    @property
    def best(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Probes, rows and scores, sorted by probe and falling score; at most k of each probe."""
        self._settle()
        return self._probe, self._row, self._score


def exact_top(
    parts: Iterable[tuple[NDArray[np.float32], NDArray[np.bool_] | None]],
    probes: NDArray[np.float32],
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` rows with the largest inner product with each probe.

    Args:
        parts: runs of rows, float32 [m, d] each and bool [m], which of them count (None: all). Rows are numbered
            through all parts. They may be mapped files: each is read once for 256 probes.
        probes: float32 [p, d].

    Returns:
        Probes int64, rows int64 and scores float32, sorted by probe and falling score.
    """
    parts = list(parts)
    found = []
    for start in range(0, len(probes), PROBES):
        few = np.ascontiguousarray(probes[start : start + PROBES])
        top = TopRows(len(few), k)
        first = 0
        for vectors, counts in parts:
            for begin in range(0, len(vectors), BLOCK):
                scores = few @ vectors[begin : begin + BLOCK].T
                if counts is not None:
                    scores[:, ~counts[begin : begin + BLOCK]] = -np.inf
                top.offer(scores, first + begin)
            first += len(vectors)
        probe, row, score = top.best
        found.append((probe + start, row, score))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    probe, row, score = (np.concatenate(each) for each in zip(*found, strict=True))
    return probe, row, score


def load_faiss() -> Any:
    """The module. Raises LrfaceError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise LrfaceError(
            "an hnsw or ivf index needs faiss: pip install 'lrface[search]', or take --index exact"
        ) from error
    return faiss


def has_faiss() -> bool:
    try:
        load_faiss()
    except LrfaceError:
        return False
    return True


class ApproximateIndex:
    """An HNSW graph or an inverted file of faiss over rows that have numbers of their own.

    ``effort`` is efSearch or nprobe; :meth:`tune` chooses it so that :data:`TARGET_RECALL` is met.
    """

    def __init__(self, kind: str, index: Any, effort: int = 0, recall: float = 0.0):
        self.kind = kind
        self.effort = effort
        self.recall = recall
        self._index = index

    @classmethod
    def build(
        cls, kind: str, vectors: NDArray[np.float32], rows: NDArray[np.int64], show_progress: bool = True
    ) -> "ApproximateIndex":
        """Index ``vectors`` float32 [n, d] of unit length under the numbers ``rows`` int64 [n], and tune it."""
        faiss = load_faiss()
        count, width = vectors.shape
        if kind == "hnsw":
            graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 80
            index = faiss.IndexIDMap(graph)
        else:
            # Four times the root of n lists, and for each at least the 39 vectors that faiss wants to learn it from.
            lists = max(1, min(int(2 ** round(np.log2(4 * np.sqrt(count)))), count // 39))
            index = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
            chosen = np.random.default_rng(0).permutation(count)[: 64 * lists]
            index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
        with progress_bar(count, f"index {kind}", unit="people", enabled=show_progress) as bar:
            for start in range(0, count, BLOCK):
                part = slice(start, start + BLOCK)
                index.add_with_ids(np.ascontiguousarray(vectors[part]), rows[part])
                bar.advance(len(rows[part]))
        built = cls(kind, index)
        built.tune(vectors, rows)
        return built

    def tune(self, vectors: NDArray[np.float32], rows: NDArray[np.int64], samples: int = 100) -> None:
        """Set ``effort`` to the smallest power of two with which the ten nearest others of ``samples`` of the vectors are
        found, and ``recall`` to the share that is."""
        chosen = np.random.default_rng(1).permutation(len(vectors))[:samples]
        chosen.sort()
        k = min(11, len(vectors))
        probe, row, score = exact_top([(vectors, None)], vectors[chosen], k)
        others = row != chosen[probe]
        probe, score = probe[others], score[others]
        worst = np.full(len(chosen), np.inf, np.float32)
        np.minimum.at(worst, probe, score)
        wanted = max(1, len(probe))
        most = 4096 if self.kind == "hnsw" else self._lists
        effort = 16 if self.kind == "hnsw" else 1
        while True:
            self.effort = min(effort, most)
            found, numbers = self.search(vectors[chosen], k)
            hits = (found >= worst[:, None] - 1e-6) & (numbers >= 0) & (numbers != rows[chosen, None])
            self.recall = round(min(1.0, float(hits.sum()) / wanted), 4)
            if self.recall >= TARGET_RECALL or effort >= most:
                return
            effort *= 2

    @property
    def _lists(self) -> int:
        return int(load_faiss().extract_index_ivf(self._index).nlist)

    def search(
        self, probes: NDArray[np.float32], k: int, without: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores float32 [p, k] and row numbers int64 [p, k], -1 where there are no more; ``without`` those rows."""
        faiss = load_faiss()
        options: dict[str, Any] = {"efSearch" if self.kind == "hnsw" else "nprobe": self.effort}
        if without is not None and len(without):
            # Held here: the selectors of faiss point at one another and at this array.
            batch = faiss.IDSelectorBatch(without)
            options["sel"] = faiss.IDSelectorNot(batch)
        if self.kind == "hnsw":
            options["efSearch"] = max(self.effort, k)
            parameters = faiss.SearchParametersHNSW(**options)
        else:
            parameters = faiss.SearchParametersIVF(**options)
        scores, rows = self._index.search(np.ascontiguousarray(probes), k, params=parameters)
        return scores, rows

    def write(self, file: Path) -> None:
        """Raises OSError where the disk is full or the place cannot be written."""
        faiss = load_faiss()
        with file.open("wb") as opened:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(opened.write))

    @classmethod
    def read(cls, file: Path, entry: dict[str, Any]) -> "ApproximateIndex":
        """Raises LrfaceError for a file that faiss cannot read."""
        faiss = load_faiss()
        try:
            index = faiss.read_index(str(file))
        except RuntimeError as error:
            raise LrfaceError(
                f"{file}: faiss cannot read this index ({str(error).splitlines()[0]})"
            ) from error
        return cls(entry["kind"], index, int(entry["effort"]), float(entry["recall"]))
