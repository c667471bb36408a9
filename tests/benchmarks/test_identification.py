import numpy as np
import pytest
import torch

from lrface.benchmarks.identification import (
    DISTRACTOR,
    average_precision,
    identify,
    open_set,
    pool_templates,
    without_identities,
)
from lrface.errors import LrfaceError, UsageError


def brute_force(probe, probe_ids, gallery, gallery_ids, metric, ranks):
    """Sort the whole gallery for every probe and walk down the list, place by place."""
    probe, gallery = probe.astype(np.float64), gallery.astype(np.float64)
    first, precisions, mates, others = [], [], [], []
    for vector, identity in zip(probe, probe_ids, strict=True):
        if metric == "euclidean":
            scores = np.array(
                [-sum((a - b) ** 2 for a, b in zip(vector, face, strict=True)) for face in gallery]
            )
        else:
            scores = np.array(
                [vector @ face / np.sqrt((vector @ vector) * (face @ face)) for face in gallery]
            )
        own = (gallery_ids == identity) & (identity != DISTRACTOR)
        others.append(scores[~own].max() if (~own).any() else -np.inf)
        if not own.any():
            first.append(0)
            mates.append(np.nan)
            continue
        mates.append(scores[own].max())
        # Rounded, so that two equal faces tie here too however their sums were ordered.
        places = sorted(range(len(gallery)), key=lambda k: (-round(scores[k], 12), k))
        found = 0
        area, old_recall, old_precision = 0.0, 0.0, 1.0
        for place, k in enumerate(places, start=1):
            if own[k]:
                found += 1
                if found == 1:
                    first.append(place)
            recall, precision = found / own.sum(), found / place
            area += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
        precisions.append(area)
    first = np.array(first)
    rank = {k: np.mean(first[first > 0] <= k) for k in ranks}
    return rank, np.mean(precisions), first, np.array(mates), np.array(others)


def example(seed, gallery=60, probes=25, people=8, dimensions=6, integer=False):
    """Faces around their identity's direction, equal faces among them, distractors, probes without a mate."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, dimensions))
    gallery_ids = np.concatenate([np.arange(people - 2), rng.integers(0, people - 2, gallery - people + 2)])
    gallery_ids[rng.random(gallery) < 0.3] = DISTRACTOR
    probe_ids = rng.integers(0, people, probes)
    faces = centres[gallery_ids % people] + rng.normal(size=(gallery, dimensions)) * 1.2
    seen = centres[probe_ids] + rng.normal(size=(probes, dimensions)) * 1.2
    if integer:  # few values: many ties
        faces, seen = np.round(faces) + 0.5, np.round(seen) + 0.5
    repeated = rng.integers(0, gallery, 20)
    faces[repeated[:10]] = faces[repeated[10:]]
    return seen.astype(np.float32), probe_ids, faces.astype(np.float32), gallery_ids


# Exact ties between different faces survive under "euclidean" only: unit vectors are rounded.
@pytest.mark.parametrize(
    ("metric", "integer"), [("cosine", False), ("euclidean", False), ("euclidean", True)]
)
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_sorting_the_whole_gallery(seed, integer, metric):
    data = example(seed, integer=integer)
    ranks = (1, 2, 5, 20)
    found = identify(*data, metric=metric, ranks=ranks)
    rank, precision, first, mates, others = brute_force(*data, metric, ranks)
    np.testing.assert_array_equal(found.first_mate, first)
    assert found.rank == pytest.approx(rank)
    assert found.mean_average_precision == pytest.approx(precision, abs=1e-12)
    np.testing.assert_allclose(found.best_mate, mates, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.best_other, others, rtol=1e-5, atol=1e-5)
    assert found.unmated == (first == 0).sum() > 0 and found.mated + found.unmated == len(first)


def test_ties_keep_the_order_of_the_gallery():
    probe, face = np.array([[1.0, 0.0]]), [1.0, 1.0]
    gallery = np.array([face, face, face, [-1.0, 0.0]])
    for mate, expected in ((0, 1), (1, 2), (2, 3), (3, 4)):
        identities = np.full(4, DISTRACTOR)
        identities[mate] = 7
        for metric in ("cosine", "euclidean"):
            assert identify(probe, [7], gallery, identities, metric).first_mate.tolist() == [expected]


def test_neither_chunks_nor_threads_change_a_bit():
    rng = np.random.default_rng(1)
    gallery = rng.normal(size=(3000, 96)).astype(np.float32)
    gallery[1500:] = gallery[:1500]  # every face twice
    identities = np.tile(np.arange(1500) // 2, 2)
    probe = gallery[:200] + rng.normal(size=(200, 96)).astype(np.float32) * 2
    threads = torch.get_num_threads()
    results = []
    try:
        for chunk, count in ((None, 1), (1, 1), (7, 2), (200, 2)):
            torch.set_num_threads(count)
            results.append(identify(probe, identities[:200], gallery, identities, "euclidean", chunk=chunk))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert other.rank == results[0].rank
        assert other.mean_average_precision == results[0].mean_average_precision
        for name in ("first_mate", "best_mate", "best_other"):
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))


def test_average_precision_by_hand():
    assert average_precision([1]) == 1.0
    assert average_precision([2]) == pytest.approx((0 + 1 / 2) / 2)
    # mates at places 1 and 4: precisions 1 and 1/3 before, 1 and 1/2 at the place
    assert average_precision([4, 1]) == pytest.approx(((1 + 1) / 2 + (1 / 3 + 1 / 2) / 2) / 2)


def test_open_set_by_hand():
    # probes 0 and 1 have mates with 0.8 and 0.5 (the second behind a stranger with 0.6), 2 and 3 have none
    gallery = np.eye(4, dtype=np.float32)
    probe = np.array(
        [[0.8, 0, 0, 0.6], [0, 0.5, 0.6, 0.6245], [0, 0, 0.7, 0.714], [0, 0, 0.2, 0.98]], np.float32
    )
    found = identify(probe, [0, 1, 8, 9], gallery, [0, 1, DISTRACTOR, 3])
    curve = open_set(found)
    assert (curve.mated, curve.unmated, curve.rank) == (2, 2, 1)
    assert curve.fpir[0] == 0 and curve.fnir[0] == 1
    at = {
        round(float(t), 3): (fp, fn)
        for t, fp, fn in zip(curve.threshold, curve.fpir, curve.fnir, strict=True)
    }
    assert at[0.8] == (
        0.5,
        0.5,
    )  # the stranger with 0.98 is above 0.8, probe 0 is found, probe 1 is not first
    assert at[0.714] == (1.0, 0.5)
    assert open_set(found, rank=3).fnir.min() == 0.0
    assert curve.fnir_at(0.5) == 0.5 and curve.fnir_at(0.1) is None
    with pytest.raises(LrfaceError, match="all have one"):
        open_set(identify(probe[:2], [0, 1], gallery, [0, 1, DISTRACTOR, 3]))


def test_identities_that_leave_are_drawn_by_seed():
    identities = np.array([3, 3, 5, 6, 9, DISTRACTOR])
    stays = without_identities(identities, 0.5, seed=4)
    assert stays[-1] and stays[0] == stays[1]
    assert len(set(identities[:-1][~stays[:-1]])) == 2
    np.testing.assert_array_equal(stays, without_identities(identities, 0.5, seed=4))
    assert any((without_identities(identities, 0.5, seed=seed) != stays).any() for seed in range(5, 15))


def test_templates_by_hand():
    features = np.array([[3.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    mean, names = pool_templates(features, [4, 4, 2])
    assert names.tolist() == [2, 4]
    np.testing.assert_allclose(mean, [[1, 0], [0.5**0.5, 0.5**0.5]], atol=1e-6)
    norm, _ = pool_templates(features, [4, 4, 2], "norm")
    np.testing.assert_allclose(norm[1], np.array([3, 1]) / 10**0.5, atol=1e-6)
    weighted, _ = pool_templates(features, [4, 4, 2], "quality", quality=[0.0, 2.0, 1.0])
    np.testing.assert_allclose(weighted[1], [0, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "manhattan"}, "metric must be"),
        ({"ranks": (0,)}, "from 1"),
        ({"probe": np.full((2, 3), np.nan)}, "probe face 0 is not finite"),
        ({"gallery": np.zeros((2, 3))}, "gallery face 0 is zero"),
        ({"gallery": np.ones((2, 4))}, "probe features have 3 numbers"),
        ({"gallery_identities": [1]}, "one identity each"),
        ({"gallery_identities": [8, 9]}, "no probe has a face"),
        ({"probe": np.ones((0, 3)), "probe_identities": []}, "at least one probe"),
    ],
)
def test_what_cannot_be_searched_is_named(change, message):
    good = {"probe": np.ones((2, 3)), "probe_identities": [1, 2], "gallery": np.ones((2, 3))}
    with pytest.raises(LrfaceError, match=message):
        identify(**{**good, "gallery_identities": [1, 2], **change})


def test_pooling_needs_what_it_weighs_by():
    with pytest.raises(UsageError, match="takes a quality"):
        pool_templates(np.ones((2, 2)), [1, 1], "quality")
    with pytest.raises(UsageError, match="pooling must be"):
        pool_templates(np.ones((2, 2)), [1, 1], "best")
    with pytest.raises(LrfaceError, match="add up to zero"):
        pool_templates(np.array([[1.0, 0.0], [-1.0, 0.0]]), [1, 1])
