"""Figures of merit of face verification, from scores and labels alone. Pure numpy.

Everywhere below ``scores`` is float [p] (larger means more alike), ``same`` is bool [p] and ``folds`` is
int [p]. All results are fractions between 0 and 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrface.errors import LrfaceError

FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The false accept rates that :func:`verification_metrics` reports where the pairs allow."""

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_PAIRS = 200_000
"""Sets of more pairs get no bootstrap intervals: resampling them takes minutes, and their sampling error is small."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class FoldResult:
    """One accuracy and one threshold a fold: both float64 [k]; whether each pair was judged right: bool [p]."""

    accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    right: NDArray[np.bool_]

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Population standard deviation over folds, as LFW results are reported (``numpy.std``)."""
        return float(self.accuracies.std())


@dataclass(frozen=True)
class VerificationMetrics:
    """Everything that :func:`verification_metrics` measures; fractions, or None where it is not defined.

    The intervals are 95 % bootstrap intervals over pairs. Pairs that share people are not independent, so the truth
    is somewhat wider; folds, which LFW keeps apart by people, give ``accuracy_std``.
    """

    accuracy: float
    accuracy_interval: Interval
    accuracy_std: float
    accuracy_insightface: float
    threshold: float
    auc: float | None
    eer: float | None
    tar_at_far: dict[str, float | None]
    auc_interval: Interval | None
    eer_interval: Interval | None
    tar_interval: dict[str, Interval | None]
    right: NDArray[np.bool_]


def _checked(scores: ArrayLike, same: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(same)
    if values.ndim != 1 or labels.shape != values.shape:
        raise LrfaceError(
            f"verification needs one score and one label a pair: scores have shape {list(values.shape)}, "
            f"labels {list(labels.shape)}"
        )
    if len(values) == 0:
        raise LrfaceError("verification needs at least one pair, and was given none")
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise LrfaceError(
            f"the score of pair {first} is {values[first]}; every score must be a finite number"
        )
    return values, labels.astype(bool)


def best_threshold(scores: ArrayLike, same: ArrayLike) -> float:
    """The threshold that gives the best accuracy when ``score >= threshold`` means "same".

    All different decisions that a threshold can make on these scores are tried: the candidates are the
    middles between neighbouring distinct scores, and one value below and one above all scores. Where several
    are equally good the middle one of them is taken (the lower of two middle ones), which does not depend on
    the order of the pairs.
    """
    values, labels = _checked(scores, same)
    distinct, inverse = np.unique(values, return_inverse=True)
    positives = np.bincount(inverse, weights=labels, minlength=len(distinct))
    negatives = np.bincount(inverse, weights=~labels, minlength=len(distinct))
    # candidate k refuses the k smallest distinct scores: right are the negatives below and the positives
    # above
    right = np.concatenate(([0.0], np.cumsum(negatives))) + positives.sum()
    right[1:] -= np.cumsum(positives)
    middles = (distinct[:-1] + distinct[1:]) / 2
    # the middle of two neighbouring floats rounds to one of them, and must not be the lower one
    middles = np.where(middles > distinct[:-1], middles, distinct[1:])
    below, above = np.nextafter(distinct[0], -np.inf), np.nextafter(distinct[-1], np.inf)
    candidates = np.concatenate(([below], middles, [above]))
    best = np.flatnonzero(right == right.max())
    return float(candidates[best[(len(best) - 1) // 2]])


def _fold_numbers(folds: ArrayLike, pairs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    numbers = np.asarray(folds)
    if numbers.shape != (pairs,):
        raise LrfaceError(
            f"one fold number a pair is needed: {pairs} pairs, folds of shape {list(numbers.shape)}"
        )
    present = np.unique(numbers)
    if len(present) < 2:
        raise LrfaceError(
            f"a threshold is chosen on all folds but one, so at least two folds are needed; "
            f"{len(present)} found"
        )
    return numbers.astype(np.int64), present


def fold_accuracy(scores: ArrayLike, same: ArrayLike, folds: ArrayLike) -> FoldResult:
    """Accuracy of each fold under the threshold that is best on all the others (LFW's protocol, View 2).

    Source: Huang et al., Labeled Faces in the Wild, University of Massachusetts technical report 07-49.
    """
    values, labels = _checked(scores, same)
    numbers, present = _fold_numbers(folds, len(values))
    accuracies, thresholds = [], []
    right = np.empty(len(values), dtype=bool)
    for fold in present:
        test = numbers == fold
        threshold = best_threshold(values[~test], labels[~test])
        thresholds.append(threshold)
        right[test] = (values[test] >= threshold) == labels[test]
        accuracies.append(np.mean(right[test]))
    return FoldResult(np.array(accuracies), np.array(thresholds), right)


def fold_accuracy_insightface(
    similarities: ArrayLike, same: ArrayLike, folds: ArrayLike, thresholds: ArrayLike | None = None
) -> FoldResult:
    """The same with InsightFace's threshold grid: squared distance of unit vectors, ``arange(0, 4, 0.01)``.

    ``similarities`` are cosines; the squared distance of two unit vectors is ``2 - 2 * cosine``, a pair is
    called same when it is below the threshold, and of equally good thresholds the smallest is taken. Made to
    be comparable with figures of InsightFace's verification script, which this restates.
    """
    values, labels = _checked(similarities, same)
    numbers, present = _fold_numbers(folds, len(values))
    grid = np.arange(0, 4, 0.01) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    right = ((2.0 - 2.0 * values)[None, :] < grid[:, None]) == labels[None, :]
    in_fold = numbers[None, :] == present[:, None]
    right_in_fold = right.astype(np.float64) @ in_fold.T.astype(np.float64)  # [thresholds, folds]
    right_elsewhere = right_in_fold.sum(axis=1, keepdims=True) - right_in_fold
    chosen = np.argmax(right_elsewhere, axis=0)
    accuracies = right_in_fold[chosen, np.arange(len(present))] / in_fold.sum(axis=1)
    judged = right[chosen[np.searchsorted(present, numbers)], np.arange(len(values))]
    return FoldResult(accuracies, grid[chosen], judged)


def roc_curve(scores: ArrayLike, same: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False accept rates and true accept rates [t] of every threshold, from (0, 0) to (1, 1).

    Raises LrfaceError when all pairs are of one kind.
    """
    values, labels = _checked(scores, same)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        raise LrfaceError(
            f"a ROC curve needs pairs of both kinds: {positives} same and {negatives} different pairs found"
        )
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    true_accepts = np.cumsum(labels)[last] / positives
    false_accepts = np.cumsum(~labels)[last] / negatives
    return np.concatenate(([0.0], false_accepts)), np.concatenate(([0.0], true_accepts))


def area_under_curve(scores: ArrayLike, same: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a same pair outscores a different one, ties counted half."""
    false_accepts, true_accepts = roc_curve(scores, same)
    return float(np.sum(np.diff(false_accepts) * (true_accepts[1:] + true_accepts[:-1]) / 2))


def equal_error_rate(scores: ArrayLike, same: ArrayLike) -> float:
    """The rate at which false accepts equal false rejects, between the points of the ROC curve linearly."""
    false_accepts, true_accepts = roc_curve(scores, same)
    excess = false_accepts - (1.0 - true_accepts)  # grows from -1 to 1 along the curve
    after = int(np.argmax(excess >= 0))
    before = after - 1
    share = -excess[before] / (excess[after] - excess[before])
    return float(false_accepts[before] + share * (false_accepts[after] - false_accepts[before]))


def true_accept_rate(scores: ArrayLike, same: ArrayLike, false_accept_rate: float) -> float | None:
    """The largest true accept rate of any threshold whose false accept rate is at most ``false_accept_rate``.

    None where it cannot be measured: no same pairs, or fewer than ``1 / false_accept_rate`` different ones.
    """
    values, labels = _checked(scores, same)
    if not 0 < false_accept_rate < 1:
        raise LrfaceError(f"a false accept rate lies between 0 and 1, got {false_accept_rate}")
    negatives = np.sort(values[~labels])[::-1]
    positives = values[labels]
    # the small share keeps 0.001 * 3000 from being read as 2.9999
    allowed = int(np.floor(false_accept_rate * len(negatives) + 1e-9))
    if allowed < 1 or len(positives) == 0:
        return None
    return float(np.mean(positives > negatives[allowed]))


def _quantiles(values: NDArray[np.float64]) -> Interval:
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def accuracy_interval(right: ArrayLike, same: ArrayLike, samples: int = 10_000, seed: int = 0) -> Interval:
    """Bootstrap interval of the accuracy: same and different pairs are each drawn again, as many as there are.

    A resampled mean of bools is a binomial draw, so nothing is resampled pair by pair. ``right`` and ``same`` are
    bool [p].
    """
    judged, labels = np.asarray(right, dtype=bool), np.asarray(same, dtype=bool)
    rng = np.random.default_rng(seed)
    total = sum(
        rng.binomial(int(kind.sum()), float(judged[kind].mean()), samples)
        for kind in (labels, ~labels)
        if kind.any()
    )
    return _quantiles(np.asarray(total, dtype=np.float64) / len(judged))


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a second model less that of a first on the same pairs (fractions), its 95 % interval, and the share
    of resamples that contradict its sign, doubled (a two-sided p value, at least 1 / samples)."""

    difference: float
    interval: Interval
    p_value: float


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, samples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare two models pair by pair: ``first`` and ``second`` are bool [p], whether each judged a pair right.

    Pairs that both judge alike say nothing about the difference, which makes this far sharper than two separate
    intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise LrfaceError(
            f"two models are compared on the same pairs; found {list(a.shape)} and {list(b.shape)}"
        )
    better, worse = int((b & ~a).sum()), int((a & ~b).sum())
    counts = np.array([better, worse, len(a) - better - worse], dtype=np.float64)
    drawn = np.random.default_rng(seed).multinomial(len(a), counts / len(a), samples)
    differences = (drawn[:, 0] - drawn[:, 1]) / len(a)
    tails = min(float(np.mean(differences <= 0)), float(np.mean(differences >= 0)))
    return PairedDifference(
        (better - worse) / len(a), _quantiles(differences), min(1.0, max(2 * tails, 1 / samples))
    )


def curve_intervals(
    scores: ArrayLike,
    same: ArrayLike,
    false_accept_rates: tuple[float, ...] = FALSE_ACCEPT_RATES,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> tuple[Interval, Interval, dict[str, Interval | None]]:
    """95 % bootstrap intervals of AUC, EER and of the true accept rate at each false accept rate.

    Same and different pairs are each drawn again with replacement; the same draws serve all figures. A rate that
    fewer than ``1 / rate`` different pairs cannot show has None.
    """
    values, labels = _checked(scores, same)
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    rng = np.random.default_rng(seed)
    areas, errors = [], []
    rates: dict[float, list[NDArray[np.float64]]] = {
        rate: [] for rate in false_accept_rates if int(np.floor(rate * negatives + 1e-9)) >= 1
    }
    block = max(1, min(samples, 2_000_000 // len(values)))
    for start in range(0, samples, block):
        count = min(block, samples - start)
        drawn = np.zeros((count, len(values)), dtype=np.int64)
        drawn[:, labels] = rng.multinomial(positives, np.full(positives, 1 / positives), count)
        drawn[:, ~labels] = rng.multinomial(negatives, np.full(negatives, 1 / negatives), count)
        begin = np.zeros((count, 1))
        accepts = np.hstack([begin, np.cumsum(drawn * labels, axis=1)[:, last] / positives])
        false_accepts = np.hstack([begin, np.cumsum(drawn * ~labels, axis=1)[:, last] / negatives])
        areas.append((np.diff(false_accepts) * (accepts[:, 1:] + accepts[:, :-1]) / 2).sum(axis=1))
        excess = false_accepts - (1.0 - accepts)
        after = np.argmax(excess >= 0, axis=1)
        rows = np.arange(count)
        low, high = excess[rows, after - 1], excess[rows, after]
        share = -low / (high - low)
        left, right = false_accepts[rows, after - 1], false_accepts[rows, after]
        errors.append(left + share * (right - left))
        for rate, found in rates.items():
            within = (false_accepts <= rate + 1e-12).sum(axis=1) - 1
            found.append(accepts[rows, within])
    return (
        _quantiles(np.concatenate(areas)),
        _quantiles(np.concatenate(errors)),
        {
            rate_name(rate): _quantiles(np.concatenate(rates[rate])) if rate in rates else None
            for rate in false_accept_rates
        },
    )


def resolution_area(accuracies: dict[int, float]) -> float | None:
    """Area under the accuracy-resolution curve: accuracy averaged over the logarithm of the size, by trapezoids.

    ``accuracies`` maps sizes in pixels to accuracies; the result has their unit. Halving the size counts alike
    wherever it happens. None for fewer than two sizes.
    """
    sizes = sorted(accuracies)
    if len(sizes) < 2:
        return None
    places = np.log2(sizes)
    heights = np.array([accuracies[size] for size in sizes])
    return float(np.sum(np.diff(places) * (heights[1:] + heights[:-1]) / 2) / (places[-1] - places[0]))


def verification_metrics(
    scores: ArrayLike,
    same: ArrayLike,
    folds: ArrayLike,
    false_accept_rates: tuple[float, ...] = FALSE_ACCEPT_RATES,
    bootstrap: int = BOOTSTRAP_SAMPLES,
) -> VerificationMetrics:
    """All figures of one set of scored pairs.

    Args:
        scores: cosine similarities, float [p], finite.
        same: bool [p], True where both faces are of one identity.
        folds: int [p]; at least two folds.
        false_accept_rates: where the true accept rate is read. Keys of ``tar_at_far`` look like ``"1e-3"``.
        bootstrap: resamples for the intervals of AUC, EER and true accept rates; 0 leaves these out.

    Raises:
        LrfaceError: shapes that disagree, scores that are not finite, fewer than two folds.
    """
    values, labels = _checked(scores, same)
    exact = fold_accuracy(values, labels, folds)
    both_kinds = bool(labels.any()) and not bool(labels.all())
    auc_interval: Interval | None = None
    eer_interval: Interval | None = None
    tar_interval: dict[str, Interval | None] = {rate_name(rate): None for rate in false_accept_rates}
    if both_kinds and bootstrap and len(values) <= BOOTSTRAP_PAIRS:
        auc_interval, eer_interval, tar_interval = curve_intervals(
            values, labels, false_accept_rates, bootstrap
        )
    return VerificationMetrics(
        accuracy=exact.mean,
        accuracy_interval=accuracy_interval(exact.right, labels),
        accuracy_std=exact.std,
        accuracy_insightface=fold_accuracy_insightface(values, labels, folds).mean,
        threshold=float(exact.thresholds.mean()),
        auc=area_under_curve(values, labels) if both_kinds else None,
        eer=equal_error_rate(values, labels) if both_kinds else None,
        tar_at_far={rate_name(rate): true_accept_rate(values, labels, rate) for rate in false_accept_rates},
        auc_interval=auc_interval,
        eer_interval=eer_interval,
        tar_interval=tar_interval,
        right=exact.right,
    )


def rate_name(rate: float) -> str:
    """A false accept rate as a key: 0.001 is ``"1e-3"``."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def stratified_folds(same: ArrayLike, folds: int = 10) -> NDArray[np.int64]:
    """Fold numbers int64 [p] that deal same and different pairs out evenly, each in its order.

    With fewer pairs than folds each pair is a fold of its own.
    """
    labels = np.asarray(same, dtype=bool)
    count = max(1, min(folds, len(labels)))
    numbers = np.empty(len(labels), dtype=np.int64)
    positives, negatives = np.flatnonzero(labels), np.flatnonzero(~labels)
    numbers[positives] = np.arange(len(positives)) % count
    # the different pairs start where the same pairs stopped, so that no fold stays empty
    numbers[negatives] = (np.arange(len(negatives)) + len(positives)) % count
    return numbers


def contiguous_folds(pairs: int, folds: int = 10) -> NDArray[np.int64]:
    """Fold numbers int64 [p] of consecutive blocks, the first ones longer by one where it does not divide."""
    count = max(1, min(folds, pairs))
    sizes = np.full(count, pairs // count)
    sizes[: pairs % count] += 1
    return np.repeat(np.arange(count), sizes).astype(np.int64)
