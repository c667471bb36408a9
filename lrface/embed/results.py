"""What comes out: :class:`Embeddings`, :class:`Comparison`, and the cosine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrface.embed.probability import ProbabilityTable
from lrface.errors import LrfaceError, UsageError

UNCALIBRATED_THRESHOLD = 0.3
"""The cosine above which two faces are called the same where neither the caller nor the card gives one.

Not calibrated for any model: a middle value for networks trained with margin losses. For one MobileFaceNet on
500 pairs of LFW photographs the best threshold was 0.26, and 0.3 decided 99.4 % of them rightly.
"""


@dataclass
class Embeddings:
    """n faces, in the order of the images they came from.

    Attributes:
        vectors: float32 [n, d], of unit length.
        box: float32 [n, 4], left, top, right, bottom in pixels of the photograph; NaN for crops.
        score: float32 [n], how sure the detector was, 0 to 1; NaN for crops.
        landmarks: float32 [n, 5, 2], x and y in pixels of the photograph; NaN for crops.
        effective_resolution: float32 [n], how many pixels the aligned face really has: those of the image that span
            it (a crop's own side, or for a photograph :func:`lrface.align.warp.effective_resolution`), or fewer
            where the pixels show that the image was enlarged or blurred (:mod:`lrface.embed.resolution`).
        source: int64 [n], position of the image in the input.
        quality: float32 [n], length of the feature before it was made a unit vector (with ``flip`` of the sum of
            both); networks trained with a margin give longer ones for clearer faces. Its scale is the model's own.
        failures: ``(position, reason)`` of every image that gave no face.
        reconstruction_error: float32 [n], mean absolute difference between the aligned face and what the model's
            decoder draws of its final feature map, 0 to 1; None unless the embedder was loaded with
            ``quality="reconstruction"``.
    """

    vectors: np.ndarray
    box: np.ndarray
    score: np.ndarray
    landmarks: np.ndarray
    effective_resolution: np.ndarray
    source: np.ndarray
    quality: np.ndarray
    failures: list[tuple[int, str]] = field(default_factory=list)
    reconstruction_error: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, chosen: np.ndarray) -> "Embeddings":
        """Some of the faces, as indices int64 [k] or a mask bool [n]; failures are left out."""
        errors = self.reconstruction_error
        return Embeddings(
            self.vectors[chosen],
            self.box[chosen],
            self.score[chosen],
            self.landmarks[chosen],
            self.effective_resolution[chosen],
            self.source[chosen],
            self.quality[chosen],
            [],
            None if errors is None else errors[chosen],
        )


def _joined(parts: Sequence[Embeddings], width: int, reconstruction: bool = False) -> Embeddings:
    empty = Embeddings(
        np.zeros((0, width), np.float32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros((0, 5, 2), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.float32),
    )
    parts = [empty, *parts]
    errors = [part.reconstruction_error for part in parts if part.reconstruction_error is not None]
    return Embeddings(
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.box for part in parts]),
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.landmarks for part in parts]),
        np.concatenate([part.effective_resolution for part in parts]),
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.quality for part in parts]),
        [failure for part in parts for failure in part.failures],
        np.concatenate([np.zeros(0, np.float32), *errors]) if reconstruction else None,
    )


def similarity(a: "np.ndarray | Embeddings", b: "np.ndarray | Embeddings") -> np.ndarray:
    """Cosine of every pair: [n, d] and [m, d] (or one vector [d]) -> float32 [n, m], between -1 and 1.

    Raises UsageError for widths that differ, or a vector without direction (all zero or not finite).
    """
    left, right = (
        np.atleast_2d(np.asarray(each.vectors if isinstance(each, Embeddings) else each, dtype=np.float32))
        for each in (a, b)
    )
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise UsageError(
            f"similarity takes vectors of one width, [n, d] and [m, d]; found {list(left.shape)} and "
            f"{list(right.shape)}"
        )
    units = []
    for vectors in (left, right):
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norm) & (norm > 0)).all():
            raise UsageError(
                "similarity takes vectors with a direction; found one that is zero or not finite"
            )
        units.append(vectors / norm)
    return np.clip(units[0] @ units[1].T, -1.0, 1.0)


@dataclass(frozen=True)
class Comparison:
    """Whether two images show one person.

    Attributes:
        similarity: cosine, -1 to 1.
        verdict: True for the same person: ``similarity >= threshold``.
        threshold: the cosine it was held against.
        threshold_from: "given" (by the caller), "card" (measured for this model) or "default" (neither).
        effective_resolutions: of the two faces, in pixels.
        probability: that it is one person, given the cosine and both effective resolutions, 0 to 1; None for a model
            that was not calibrated (`lrface calibrate`): nothing is made up.
        prior: how probable one person was taken to be beforehand.
        qualities: of the two faces, see :class:`Embeddings`.
    """

    similarity: float
    verdict: bool
    threshold: float
    threshold_from: str
    effective_resolutions: tuple[float, float]
    probability: float | None = None
    prior: float = 0.5
    qualities: tuple[float, float] = (math.nan, math.nan)

    @property
    def calibrated(self) -> bool:
        """Whether the threshold was chosen for this model; the default is not."""
        return self.threshold_from != "default"

    @property
    def statement(self) -> str:
        """The verdict in a sentence, with what it rests on."""
        origin = {
            "given": "the threshold given",
            "card": "the threshold on the model's card",
            "default": "an uncalibrated default threshold: this model's card has none, so measure it with "
            "`lrface calibrate` or give your own",
        }[self.threshold_from]
        who, sign = ("same person", ">=") if self.verdict else ("different people", "<")
        first, second = (f"{size:.0f}" for size in self.effective_resolutions)
        chance = (
            "no calibrated probability"
            if self.probability is None
            else f"probability of one person {self.probability:.4f} at prior {self.prior:g}"
        )
        return (
            f"{who}: similarity {self.similarity:.3f} {sign} {self.threshold:.3f} ({origin}); {chance}; effective "
            f"resolutions {first} and {second} pixels"
        )


def threshold_key(larger: int, smaller: int) -> str:
    """What two sizes are called in a card's ``thresholds``, which :func:`card_threshold` reads."""
    return str(larger) if larger == smaller else f"{larger}x{smaller}"


def card_threshold(card: Mapping[str, Any], resolutions: tuple[float, float], name: str) -> float | None:
    """The card's threshold measured nearest to the resolutions of two faces, on a scale of doublings; None where it has
    none.

    ``thresholds`` maps sizes to cosines: "28" for two faces of 28 pixels, "112x28" for one of 112 and one of 28. A card
    without pairs of different sizes says what it has nearest to the smaller face.
    """
    thresholds = card.get("thresholds")
    if not thresholds:
        return None
    table: dict[tuple[float, float], float] = {}
    try:
        for key, value in thresholds.items():
            sizes = sorted(float(size) for size in key.split("x"))
            table[sizes[0], {1: sizes[0], 2: sizes[-1]}[len(sizes)]] = float(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LrfaceError(
            f"model {name}: the card's field 'thresholds' must map resolutions to cosines, as in "
            f'{{"112": 0.28, "112x14": 0.31}}; found {thresholds!r}'
        ) from error
    if any(min(sizes) <= 0 or not -1 <= value <= 1 for sizes, value in table.items()):
        raise LrfaceError(
            f"model {name}: the card's field 'thresholds' must hold positive resolutions and cosines between "
            f"-1 and 1; found {thresholds!r}"
        )
    wanted = sorted(resolutions)
    if all(small == large for small, large in table):
        wanted = [wanted[0]] * 2

    def far(sizes: tuple[float, float]) -> tuple[float, float]:
        away = sum(abs(math.log(one / other)) for one, other in zip(sizes, wanted, strict=True))
        return round(away, 9), -math.prod(sizes)

    return table[min(table, key=far)]


def decide(
    card: Mapping[str, Any],
    name: str,
    cosine: float,
    resolutions: tuple[float, float],
    threshold: float | None = None,
    prior: float = 0.5,
    qualities: tuple[float, float] = (math.nan, math.nan),
) -> Comparison:
    """The :class:`Comparison` of two faces of which only the cosine and the effective resolutions are needed.

    Raises:
        UsageError: a threshold that is no cosine, or a prior that is not between 0 and 1.
        LrfaceError: a card whose thresholds or probabilities are damaged.
    """
    if threshold is not None and not -1 <= threshold <= 1:
        raise UsageError(f"threshold is a cosine, between -1 and 1; found {threshold}")
    if not 0 < prior < 1:
        raise UsageError(f"prior must lie between 0 and 1; found {prior}")
    origin = "given"
    if threshold is None:
        threshold, origin = card_threshold(card, resolutions, name), "card"
    if threshold is None:
        threshold, origin = UNCALIBRATED_THRESHOLD, "default"
    table = ProbabilityTable.from_card(card, name)
    probability = None if table is None else table.probability(cosine, *resolutions, prior)
    return Comparison(
        cosine, cosine >= threshold, threshold, origin, resolutions, probability, prior, qualities
    )
