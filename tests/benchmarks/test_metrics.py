import numpy as np
import pytest
import sklearn.metrics
from sklearn.model_selection import KFold

from lrface.benchmarks.metrics import (
    accuracy_interval,
    area_under_curve,
    best_threshold,
    contiguous_folds,
    curve_intervals,
    equal_error_rate,
    fold_accuracy,
    fold_accuracy_insightface,
    paired_bootstrap,
    rate_name,
    resolution_area,
    roc_curve,
    stratified_folds,
    true_accept_rate,
    verification_metrics,
)
from lrface.errors import LrfaceError


def random_pairs(seed: int, pairs: int = 600, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    same = generator.random(pairs) < 0.5
    scores = np.clip(generator.normal(0.1, 0.2, pairs) + 0.35 * same, -1, 1)
    return (np.round(scores, 1) if ties else scores), same


def test_best_threshold_of_separable_scores_is_the_middle_of_the_gap():
    assert best_threshold([0.1, 0.2, 0.6, 0.9], [False, False, True, True]) == pytest.approx(0.4)


def test_best_threshold_takes_the_middle_one_of_equally_good_ones():
    # scores 0.1- 0.2+ 0.3- 0.4+ : refuse 1 -> 3 right, refuse 3 -> 3 right, refuse 2 -> 2 right
    scores, same = [0.1, 0.2, 0.3, 0.4], [False, True, False, True]
    assert best_threshold(scores, same) == pytest.approx(0.15)


def test_best_threshold_is_exhaustive():
    for seed in range(5):
        scores, same = random_pairs(seed, 80, ties=seed % 2 == 1)
        reached = np.mean((scores >= best_threshold(scores, same)) == same)
        candidates = np.concatenate((np.unique(scores), [2.0]))
        assert reached == max(np.mean((scores >= candidate) == same) for candidate in candidates)


def test_best_threshold_of_one_kind_of_pairs():
    assert best_threshold([0.1, 0.2], [True, True]) <= 0.1
    assert best_threshold([0.1, 0.2], [False, False]) > 0.2


def test_best_threshold_between_neighbouring_floats():
    low = 0.3
    high = float(np.nextafter(low, 1))
    assert low < best_threshold([low, high], [False, True]) <= high


def test_fold_accuracy_by_hand():
    # fold 0: threshold from fold 1 (gap 0.4..0.5 -> 0.45): 0.40 called different (wrong), 0.2 different: 1/2
    # fold 1: threshold from fold 0 (gap 0.2..0.4 -> 0.30): 0.5 same, 0.4 called same (wrong): 1/2
    scores = [0.4, 0.2, 0.5, 0.4]
    same = [True, False, True, False]
    result = fold_accuracy(scores, same, [0, 0, 1, 1])
    assert result.thresholds == pytest.approx([0.45, 0.3])
    assert result.accuracies == pytest.approx([0.5, 0.5])
    assert result.mean == 0.5 and result.std == 0.0


def test_the_threshold_never_sees_the_fold_it_judges():
    scores, same = random_pairs(1, 100)
    folds = contiguous_folds(100)
    before = fold_accuracy(scores, same, folds).thresholds
    changed = np.where(folds == 3, -scores, scores)
    after = fold_accuracy(changed, same, folds).thresholds
    assert after[3] == before[3]


def test_standard_deviation_is_over_folds():
    scores, same = random_pairs(2)
    result = fold_accuracy(scores, same, contiguous_folds(600))
    assert len(result.accuracies) == 10
    assert result.std == pytest.approx(np.sqrt(np.mean((result.accuracies - result.mean) ** 2)))
    assert result.std > 0


def test_insightface_variant_equals_its_formula():
    """Written out from InsightFace's verification.py: calculate_roc over KFold without shuffling."""
    scores, same = random_pairs(3)
    generator = np.random.default_rng(0)
    left = generator.normal(size=(600, 16))
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    other = generator.normal(size=(600, 16))
    other -= (other * left).sum(1, keepdims=True) * left
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    right = scores[:, None] * left + np.sqrt(1 - scores**2)[:, None] * other

    distances = np.sum(np.square(left - right), axis=1)
    thresholds = np.arange(0, 4, 0.01)
    accuracies = []
    for train, test in KFold(n_splits=10, shuffle=False).split(np.arange(600)):
        training = [np.mean((distances[train] < threshold) == same[train]) for threshold in thresholds]
        best = thresholds[int(np.argmax(training))]
        accuracies.append(np.mean((distances[test] < best) == same[test]))

    ours = fold_accuracy_insightface(np.sum(left * right, axis=1), same, contiguous_folds(600))
    assert ours.accuracies == pytest.approx(accuracies, abs=1e-12)


def test_contiguous_folds_are_those_of_scikit_learn():
    for pairs in (10, 23, 600):
        expected = np.empty(pairs, dtype=int)
        for fold, (_, test) in enumerate(KFold(n_splits=10, shuffle=False).split(np.arange(pairs))):
            expected[test] = fold
        assert contiguous_folds(pairs).tolist() == expected.tolist()
    assert contiguous_folds(3).tolist() == [0, 1, 2]


def test_stratified_folds_balance_both_kinds():
    same = np.array([True] * 57 + [False] * 43)
    folds = stratified_folds(same)
    for kind in (True, False):
        counts = np.bincount(folds[same == kind], minlength=10)
        assert counts.max() - counts.min() <= 1
    assert np.bincount(folds).min() >= 9
    assert sorted(stratified_folds([True, False, True])) == [0, 1, 2]


@pytest.mark.parametrize("ties", [False, True])
def test_curve_and_area_agree_with_scikit_learn(ties):
    for seed in range(3):
        scores, same = random_pairs(seed, ties=ties)
        false_accepts, true_accepts = roc_curve(scores, same)
        expected = sklearn.metrics.roc_curve(same, scores, drop_intermediate=False)
        assert false_accepts == pytest.approx(expected[0])
        assert true_accepts == pytest.approx(expected[1])
        assert area_under_curve(scores, same) == pytest.approx(sklearn.metrics.roc_auc_score(same, scores))


@pytest.mark.parametrize("ties", [False, True])
def test_equal_error_rate_lies_on_the_curve_of_scikit_learn(ties):
    for seed in range(3):
        scores, same = random_pairs(seed, ties=ties)
        rate = equal_error_rate(scores, same)
        false_accepts, true_accepts, _ = sklearn.metrics.roc_curve(same, scores, drop_intermediate=False)
        excess = false_accepts - (1 - true_accepts)
        # the point (rate, 1 - rate) must lie on the piece of the curve where excess changes sign
        after = np.flatnonzero(excess >= 0)[0]
        first, second = (np.array([false_accepts[i], true_accepts[i]]) for i in (after - 1, after))
        point = np.array([rate, 1 - rate])
        across = (second - first)[0] * (point - first)[1] - (second - first)[1] * (point - first)[0]
        assert across == pytest.approx(0, abs=1e-12)
        assert min(first[0], second[0]) - 1e-12 <= rate <= max(first[0], second[0]) + 1e-12


def test_equal_error_rate_by_hand():
    assert equal_error_rate([0.9, 0.8, 0.2, 0.1], [True, True, False, False]) == 0.0
    assert equal_error_rate([0.1, 0.2, 0.8, 0.9], [True, True, False, False]) == 1.0
    # one same pair of four below one different pair of four
    scores = [0.9, 0.8, 0.7, 0.3, 0.4, 0.2, 0.1, 0.0]
    assert equal_error_rate(scores, [True] * 4 + [False] * 4) == pytest.approx(0.25)


def test_true_accept_rate_by_hand():
    negatives = np.linspace(0.0, 0.9, 10)  # the largest are 0.9 and 0.8
    positives = np.array([0.95, 0.85, 0.80, 0.5])
    scores = np.concatenate((negatives, positives))
    same = np.array([False] * 10 + [True] * 4)
    # one false accept in ten is allowed, so the threshold is just above 0.8: 0.95 and 0.85 pass
    assert true_accept_rate(scores, same, 0.1) == 0.5
    assert true_accept_rate(scores, same, 0.2) == 0.75
    assert true_accept_rate(scores, same, 0.05) is None
    assert true_accept_rate(scores, np.zeros(14, dtype=bool), 0.1) is None


def test_true_accept_rate_is_the_best_point_of_the_curve():
    for seed in range(3):
        scores, same = random_pairs(seed, 4000, ties=seed == 2)
        false_accepts, true_accepts, _ = sklearn.metrics.roc_curve(same, scores, drop_intermediate=False)
        for rate in (1e-1, 1e-2, 1e-3):
            expected = true_accepts[false_accepts <= rate + 1e-12].max()
            assert true_accept_rate(scores, same, rate) == pytest.approx(expected)


def test_rates_that_the_pairs_cannot_give_are_none():
    scores, same = random_pairs(0, 200)
    assert 50 < (~same).sum() < 1000
    figures = verification_metrics(scores, same, contiguous_folds(200))
    assert figures.tar_at_far["1e-1"] is not None
    assert figures.tar_at_far["1e-3"] is None
    one_kind = verification_metrics([0.1, 0.2, 0.3], [True] * 3, [0, 1, 2])
    assert one_kind.accuracy == pytest.approx(2 / 3)  # the smallest score lies below those it is judged by
    assert one_kind.auc is None and one_kind.eer is None


def test_rate_names():
    assert [rate_name(rate) for rate in (0.1, 1e-2, 1e-3, 0.005)] == ["1e-1", "1e-2", "1e-3", "5e-3"]


def test_random_scores_are_at_chance():
    generator = np.random.default_rng(4)
    same = np.arange(4000) % 2 == 0
    figures = verification_metrics(generator.normal(size=4000) * 0.1, same, contiguous_folds(4000))
    assert figures.accuracy == pytest.approx(0.5, abs=0.03)
    assert figures.auc == pytest.approx(0.5, abs=0.03)
    assert figures.eer == pytest.approx(0.5, abs=0.03)


def test_bad_input_is_named():
    with pytest.raises(LrfaceError, match="pair 1 is nan"):
        verification_metrics([0.1, float("nan")], [True, False], [0, 1])
    with pytest.raises(LrfaceError, match="at least two folds"):
        fold_accuracy([0.1, 0.2], [True, False], [3, 3])
    with pytest.raises(LrfaceError, match="one fold number a pair"):
        fold_accuracy([0.1, 0.2], [True, False], [3])
    with pytest.raises(LrfaceError, match="both kinds"):
        roc_curve([0.1, 0.2], [True, True])
    with pytest.raises(LrfaceError, match="at least one pair"):
        best_threshold([], [])
    with pytest.raises(LrfaceError, match="shape"):
        best_threshold([0.1, 0.2], [True])
    with pytest.raises(LrfaceError, match="between 0 and 1"):
        true_accept_rate([0.1, 0.2], [True, False], 1.0)


def test_accuracy_interval_is_that_of_resampled_pairs():
    rng = np.random.default_rng(0)
    same = np.arange(600) < 400
    right = np.where(same, rng.random(600) < 0.95, rng.random(600) < 0.8)
    low, high = accuracy_interval(right, same)
    resampled = [
        np.concatenate([rng.choice(right[same], 400), rng.choice(right[~same], 200)]).mean()
        for _ in range(4000)
    ]
    assert low < right.mean() < high
    np.testing.assert_allclose([low, high], np.quantile(resampled, [0.025, 0.975]), atol=0.003)
    assert accuracy_interval(right, same) == (low, high)
    assert accuracy_interval([True] * 5, [True] * 5) == (1.0, 1.0)


def test_curve_intervals_are_those_of_resampled_pairs():
    scores, same = random_pairs(3, 300, ties=True)
    auc, eer, rates = curve_intervals(scores, same, (0.1, 1e-3), samples=2000)
    rng = np.random.default_rng(9)
    found = []
    for _ in range(1500):
        drawn = np.concatenate([rng.choice(np.flatnonzero(kind), kind.sum()) for kind in (same, ~same)])
        found.append(
            [
                sklearn.metrics.roc_auc_score(same[drawn], scores[drawn]),
                equal_error_rate(scores[drawn], same[drawn]),
                true_accept_rate(scores[drawn], same[drawn], 0.1),
            ]
        )
    expected = np.quantile(found, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose([auc, eer, rates["1e-1"]], expected, atol=0.02)
    assert rates["1e-3"] is None


def test_paired_bootstrap_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(5)
    first = rng.random(6000) < 0.9
    second = first.copy()
    second[np.flatnonzero(~first)[:60]] = True  # one point better, on 60 pairs of 6,000, worse on none
    found = paired_bootstrap(first, second)
    assert found.difference == pytest.approx(0.01)
    assert 0.007 < found.interval[0] < 0.01 < found.interval[1] < 0.013
    assert found.p_value <= 2e-4
    assert paired_bootstrap(second, first).difference == pytest.approx(-0.01)
    alike = paired_bootstrap(first, rng.permutation(first))
    assert alike.interval[0] < 0 < alike.interval[1] and alike.p_value > 0.05
    with pytest.raises(LrfaceError, match="same pairs"):
        paired_bootstrap(first, second[:5])


def test_area_under_the_resolution_curve_by_hand():
    assert resolution_area({112: 90.0, 56: 90.0, 14: 90.0}) == pytest.approx(90.0)
    # from 14 to 28 one octave with mean 75, from 28 to 112 two octaves with mean 90
    assert resolution_area({14: 70.0, 28: 80.0, 112: 100.0}) == pytest.approx((75 + 2 * 90) / 3)
    assert resolution_area({112: 99.0}) is None
