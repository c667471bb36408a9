"""From a cosine to the probability of one person, given the resolutions of both faces.

The same cosine means more between two sharp faces than between a sharp and a blurred one. For every pair of sizes a
logistic regression (Platt, "Probabilistic outputs for support vector machines", 1999) of "same person" on the cosine is
kept with the model; between the sizes its two numbers are interpolated on a scale of doublings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrface.errors import LrfaceError, UsageError

FIELD = "probability"
"""The field of a model's card, or of the file beside it, that holds a :class:`ProbabilityTable`."""


def fit_logistic(scores: ArrayLike, same: ArrayLike) -> tuple[float, float]:
    """Slope and intercept with which ``1 / (1 + exp(-(slope * score + intercept)))`` is the probability of one person.

    Maximum likelihood with both classes weighted alike (even odds beforehand) and Platt's targets, which keep the slope
    finite where the scores separate the classes.

    Args:
        scores: float [p]; same: bool [p], both values among them.

    Raises:
        LrfaceError: only same or only different pairs.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(same, bool)
    counts = np.array([(~y).sum(), y.sum()])
    if not counts.all():
        raise LrfaceError("a probability needs pairs of the same person and pairs of different people")
    weights = 0.5 / counts[y.astype(int)]
    targets = np.where(y, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    middle, scale = float(np.average(x, weights=weights)), float(x.std()) or 1.0
    design = np.stack([(x - middle) / scale, np.ones_like(x)], axis=1)
    found = np.zeros(2)

    def loss(parameters: NDArray[np.float64]) -> float:
        logits = design @ parameters
        return float(weights @ (np.logaddexp(0, logits) - targets * logits))

    for _ in range(100):
        probability = 1 / (1 + np.exp(-np.clip(design @ found, -500, 500)))
        gradient = design.T @ (weights * (probability - targets))
        curvature = (design * (weights * probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        before, length = loss(found), 1.0
        while loss(found - length * step) > before and length > 1e-6:
            length /= 2
        found = found - length * step
        if np.abs(step).max() < 1e-9:
            break
    slope = float(found[0] / scale)
    return slope, float(found[1] - slope * middle)


def sigmoid(logits: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) in double precision, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


@dataclass(frozen=True)
class ProbabilityTable:
    """Slopes and intercepts of a model, [k, k] for k ascending sizes in pixels; gallery and probe may change places."""

    sizes: tuple[float, ...]
    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]

    @classmethod
    def from_card(cls, card: Mapping[str, Any], name: str) -> "ProbabilityTable | None":
        """The table on a card; None where there is none. Raises LrfaceError for one that is damaged."""
        content = card.get(FIELD)
        if content is None:
            return None
        try:
            sizes = tuple(float(size) for size in content["sizes"])
            slope, intercept = (np.array(content[key], np.float64) for key in ("slope", "intercept"))
            square = slope.shape == intercept.shape == (len(sizes), len(sizes))
            ascending = len(sizes) > 0 and sizes[0] > 0 and all(np.diff(sizes) > 0)
            if not (square and ascending and np.isfinite(slope).all() and np.isfinite(intercept).all()):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise LrfaceError(
                f"model {name}: the card's field {FIELD!r} must hold sizes (ascending), slope and intercept (one row and "
                f"column a size); measure it again with `lrface calibrate`"
            ) from error
        return cls(sizes, slope, intercept)

    def to_card(self) -> dict[str, Any]:
        """What :meth:`from_card` reads."""
        return {
            "sizes": list(self.sizes),
            "slope": np.round(self.slope, 6).tolist(),
            "intercept": np.round(self.intercept, 6).tolist(),
        }

    def probability(self, score: float, gallery: float, probe: float, prior: float = 0.5) -> float:
        """The probability of one person for a cosine between faces of two effective resolutions in pixels.

        Args:
            prior: how probable one person was before looking. The table is for even odds; other odds multiply.

        Raises:
            UsageError: a prior that is not between 0 and 1.
        """
        if not 0 < prior < 1:
            raise UsageError(f"prior must lie between 0 and 1; found {prior}")
        rows, columns = self._weights(gallery), self._weights(probe)
        slope, intercept = (float(rows @ table @ columns) for table in (self.slope, self.intercept))
        return float(sigmoid(slope * score + intercept + math.log(prior / (1 - prior))))

    def _weights(self, size: float) -> NDArray[np.float64]:
        """How much each measured size counts for ``size``: two neighbours on a scale of doublings, or the end."""
        positions = np.log2(self.sizes)
        unit = np.eye(len(self.sizes))
        return np.array([np.interp(math.log2(max(size, 1e-3)), positions, row) for row in unit])


def brier_score(probabilities: ArrayLike, same: ArrayLike) -> float:
    """Mean squared difference between probability and truth, both classes weighted alike: 0 is perfect, 0.25 is what
    always saying one half gets (Brier, 1950)."""
    probability, truth = np.asarray(probabilities, np.float64), np.asarray(same, bool)
    error = (probability - truth) ** 2
    return float((error[truth].mean() + error[~truth].mean()) / 2)


def reliability(probabilities: ArrayLike, same: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """What was said against what was so, in ``bins`` ranges of equal width: ``said`` (mean probability), ``true`` (share
    of same pairs, both classes weighted alike) and ``pairs`` of each that holds any."""
    probability, truth = np.asarray(probabilities, np.float64), np.asarray(same, bool)
    weights = 0.5 / np.array([(~truth).sum(), truth.sum()])[truth.astype(int)]
    place = np.minimum((probability * bins).astype(int), bins - 1)
    rows = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            total = weights[inside].sum()
            rows.append(
                {
                    "said": round(float(weights[inside] @ probability[inside] / total), 4),
                    "true": round(float(weights[inside] @ truth[inside] / total), 4),
                    "pairs": int(inside.sum()),
                    "weight": round(float(total), 6),
                }
            )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error of :func:`reliability`'s rows: the weighted mean of ``|said - true|``."""
    return float(sum(row["weight"] * abs(row["said"] - row["true"]) for row in rows))
