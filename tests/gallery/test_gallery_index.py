"""Exact search against the plain matrix product; approximate indexes against exact search."""

import numpy as np
import pytest
from gallery_people import vectors

from lrface.gallery import index as index_module
from lrface.gallery.index import ApproximateIndex, TopRows, exact_top


def plain(rows, probes, k):
    scores = probes.astype(np.float64) @ rows.T.astype(np.float64)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("count", "probes", "k"), [(1, 1, 1), (5, 3, 10), (3000, 1, 10), (6000, 260, 10), (900, 7, 900)]
)
def test_the_best_of_the_plain_product(count, probes, k, monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK", 512)
    rows, wanted = vectors(count, 1), vectors(probes, 2)
    # In parts of odd lengths, as files are.
    cuts = sorted({0, count // 3, count // 2, count})
    parts = [(rows[a:b], None) for a, b in zip(cuts, cuts[1:], strict=False)]
    probe, row, score = exact_top(parts, wanted, k)
    best = plain(rows, wanted, k)
    assert np.array_equal(probe, np.repeat(np.arange(probes), best.shape[1]))
    assert np.array_equal(row.reshape(best.shape), best)
    assert np.allclose(score, (rows[row] * wanted[probe]).sum(axis=1), atol=1e-6)


def test_rows_that_are_out_are_never_found():
    rows, wanted = vectors(5000, 1), vectors(4, 2)
    counts = np.random.default_rng(0).random(5000) < 0.5
    probe, row, _ = exact_top([(rows, counts)], wanted, 20)
    assert counts[row].all() and np.array_equal(
        np.flatnonzero(counts)[plain(rows[counts], wanted, 20)].ravel(), row
    )
    assert len(exact_top([(rows, np.zeros(5000, bool))], wanted, 5)[0]) == 0
    assert len(exact_top([], wanted, 5)[0]) == 0 and len(exact_top([(rows, None)], wanted[:0], 5)[0]) == 0


def test_rising_scores_which_change_the_best_in_every_block():
    top = TopRows(1, 3)
    for block in range(50):
        top.offer(np.linspace(block, block + 0.9, 10, dtype=np.float32)[None], 10 * block)
    assert top.best[1].tolist() == [499, 498, 497]


def test_equal_scores_keep_the_first():
    top = TopRows(1, 3)
    for block in range(5):
        top.offer(np.ones((1, 4), np.float32), 4 * block)
    assert top.best[1].tolist() == [0, 1, 2]


def clusters(count, width=32, seed=0):
    """People around 60 centres, as faces lie around kinds of faces: something that an index can learn."""
    random = np.random.default_rng(seed)
    rows = vectors(60, 9, width)[random.integers(0, 60, count)] + 0.12 * random.standard_normal(
        (count, width)
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_index_finds_what_it_promises(kind, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    rows, numbers = clusters(4000), np.arange(4000) * 3 + 7
    built = ApproximateIndex.build(kind, rows, numbers, show_progress=False)
    assert built.recall >= index_module.TARGET_RECALL
    built.write(tmp_path / "index")
    read = ApproximateIndex.read(
        tmp_path / "index", {"kind": kind, "effort": built.effort, "recall": built.recall}
    )
    probes = clusters(200, seed=5)
    _, found = read.search(probes, 10)
    wanted = numbers[plain(rows, probes, 10)]
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True))
    assert hits / wanted.size >= 0.93
    # The best are taken out: the next ones come.
    _, without = read.search(probes[:1], 10, wanted[0])
    assert not set(without[0].tolist()) & set(wanted[0].tolist()) and (without >= 0).all()
    # More than there are: none is invented.
    _, many = ApproximateIndex.build(kind, rows[:50], numbers[:50], show_progress=False).search(
        probes[:1], 60
    )
    assert set(many[0].tolist()) <= {-1, *numbers[:50].tolist()}


def test_a_damaged_index_is_named(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    from lrface.errors import LrfaceError

    (tmp_path / "index-00000001.faiss").write_bytes(b"nothing of faiss")
    with pytest.raises(LrfaceError, match="index-00000001.faiss: faiss cannot read this index"):
        ApproximateIndex.read(
            tmp_path / "index-00000001.faiss", {"kind": "hnsw", "effort": 16, "recall": 1.0}
        )


def test_an_index_that_does_not_fit_on_the_disk_is_told(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    built = ApproximateIndex.build("hnsw", vectors(200), np.arange(200), show_progress=False)
    with pytest.raises(OSError, match="No space left"):
        built.write(Path("/dev/full"))
