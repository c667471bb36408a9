"""Probabilities of one person: fitted, kept with the model, between sizes, and told by compare."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lrface.embed.probability import (
    ProbabilityTable,
    brier_score,
    calibration_error,
    fit_logistic,
    reliability,
    sigmoid,
)
from lrface.embed.results import decide
from lrface.errors import LrfaceError, UsageError


def pairs(count: int, slope: float, intercept: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose probability of one person is exactly a logistic function of them."""
    generator = np.random.default_rng(seed)
    scores = generator.uniform(-0.3, 0.9, count)
    return scores, generator.random(count) < sigmoid(slope * scores + intercept)


def test_the_fit_is_that_of_scikit_learn():
    scores, same = pairs(2000, 9.0, -3.0)
    slope, intercept = fit_logistic(scores, same)
    peer = LogisticRegression(C=1e12, tol=1e-10, class_weight="balanced").fit(scores[:, None], same)
    # Platt's targets differ by one in a thousand
    assert slope == pytest.approx(float(peer.coef_[0, 0]), rel=0.02)
    assert intercept == pytest.approx(float(peer.intercept_[0]), rel=0.02)


def test_both_classes_count_alike():
    scores, same = pairs(20_000, 8.0, -2.0)
    chosen = np.flatnonzero(same | (np.random.default_rng(2).random(len(same)) < 0.1))
    both, scarce = fit_logistic(scores, same), fit_logistic(scores[chosen], same[chosen])
    np.testing.assert_allclose(both, scarce, rtol=0.06, atol=0.1)


def test_separated_scores_stay_finite():
    slope, intercept = fit_logistic([0.1, 0.2, 0.7, 0.8], [False, False, True, True])
    assert math.isfinite(slope) and math.isfinite(intercept) and slope > 0
    assert 0 < sigmoid(slope * 0.1 + intercept) < 0.5 < sigmoid(slope * 0.8 + intercept) < 1
    with pytest.raises(LrfaceError, match="pairs of different people"):
        fit_logistic([0.1, 0.2], [True, True])


def test_scores_of_a_probability_by_hand():
    assert brier_score([0.9, 0.6, 0.2], [True, False, False]) == pytest.approx((0.01 + (0.36 + 0.04) / 2) / 2)
    assert brier_score([0.5] * 4, [True, False, False, False]) == pytest.approx(0.25)
    rows = reliability([0.05, 0.05, 0.95, 1.0], [False, True, True, True], 10)
    assert [(row["pairs"], row["said"]) for row in rows] == [(2, 0.05), (2, 0.975)]
    # weights: the one different pair a half, the three same pairs a sixth each
    assert [row["true"] for row in rows] == [0.25, 1.0]
    assert calibration_error(rows) == pytest.approx(2 / 3 * 0.2 + 1 / 3 * 0.025, abs=1e-4)
    scores, same = pairs(40_000, 9.0, -3.0)
    slope, intercept = fit_logistic(scores, same)
    assert calibration_error(reliability(sigmoid(slope * scores + intercept), same)) < 0.02


CARD = {
    "probability": {
        "sizes": [14, 28, 112],
        "slope": [[4, 6, 8], [6, 10, 12], [8, 12, 20]],
        "intercept": [[-1, -2, -3], [-2, -4, -5], [-3, -5, -6]],
    }
}


@pytest.mark.parametrize(
    ("gallery", "probe", "logit"),
    [
        (112, 112, 20 * 0.4 - 6),
        (112, 14, 8 * 0.4 - 3),
        (14, 112, 8 * 0.4 - 3),
        (400, 5, 8 * 0.4 - 3),  # beyond what was measured: the nearest
        (56, 112, 16 * 0.4 - 5.5),  # one doubling below 112, one above 28
        (56, 56, (10 + 12 + 12 + 20) / 4 * 0.4 - (4 + 5 + 5 + 6) / 4),
        (28 * 2**0.5, 28, (10 * 0.75 + 12 * 0.25) * 0.4 - (4 * 0.75 + 5 * 0.25)),
    ],
)
def test_between_the_sizes_measured(gallery, probe, logit):
    table = ProbabilityTable.from_card(CARD, "m")
    assert table.probability(0.4, gallery, probe) == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)
    odds = math.exp(logit) * 0.01 / 0.99
    assert table.probability(0.4, gallery, probe, prior=0.01) == pytest.approx(odds / (1 + odds), abs=1e-12)


def test_cards_and_priors_that_cannot_be_used():
    assert ProbabilityTable.from_card({}, "m") is None
    good = CARD["probability"]
    for change in (
        {"sizes": [28, 14, 112]},
        {"slope": [[1.0]]},
        {"intercept": None},
        {"sizes": []},
        {"slope": "x"},
    ):
        with pytest.raises(LrfaceError, match="model m: .*'probability'.*lrface calibrate"):
            ProbabilityTable.from_card({"probability": {**good, **change}}, "m")
    table = ProbabilityTable.from_card(CARD, "m")
    again = ProbabilityTable.from_card({"probability": table.to_card()}, "m")
    np.testing.assert_array_equal(again.slope, table.slope)
    for prior in (0, 1, -0.5, math.nan):
        with pytest.raises(UsageError, match="prior"):
            table.probability(0.4, 112, 112, prior=prior)


def test_a_decision_says_what_it_knows():
    known = decide(CARD, "m", 0.4, (112.0, 14.0), threshold=0.3, prior=0.5)
    assert known.probability == pytest.approx(1 / (1 + math.exp(-0.2))) and known.verdict
    assert "probability of one person 0.5498" in known.statement and "112 and 14 pixels" in known.statement
    unknown = decide({}, "m", 0.4, (112.0, 14.0))
    assert unknown.probability is None and "no calibrated probability" in unknown.statement
    with pytest.raises(UsageError, match="prior"):
        decide({}, "m", 0.4, (112.0, 14.0), prior=2)
