"""Identification: who of a gallery is on the probe. Closed set (rank-k, mean average precision) and open set.

Scores are exact: candidates that single precision cannot tell apart from a mate are scored again in double
precision, and equal scores keep the gallery's order. A result therefore does not depend on the chunk size, the number
of threads or the matrix library. Memory is one chunk of scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lrface.errors import LrfaceError, UsageError

RANKS = (1, 5, 10, 20, 50)
DISTRACTOR = -100
"""Identity of gallery faces that are nobody on the probes (TinyFace)."""

METRICS = ("cosine", "euclidean")
POOLING = ("mean", "norm", "quality")
CHUNK_BYTES = 256 * 2**20
"""Scores held at once; the default size of a chunk follows from it."""


@dataclass(frozen=True)
class Identification:
    """What a search of every probe in the gallery gave. Fractions lie between 0 and 1.

    Attributes:
        rank: k -> share of mated probes with a face of their identity among the k best (CMC).
        mean_average_precision: over mated probes, each precision-recall curve by trapezoids.
        first_mate: int64 [p], position (from 1) of the best face of the probe's identity; 0 for a probe without one.
        best_mate: float64 [p], its score; NaN for a probe without one.
        best_other: float64 [p], the best score of another identity; -inf where the gallery has none.
        mated: how many probes have a face of their identity in the gallery.
        unmated: how many have none; they count in no rank and no precision.
    """

    rank: dict[int, float]
    mean_average_precision: float
    first_mate: NDArray[np.int64]
    best_mate: NDArray[np.float64]
    best_other: NDArray[np.float64]
    mated: int
    unmated: int


def _checked(
    features: ArrayLike, identities: ArrayLike, what: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    vectors = np.ascontiguousarray(features, dtype=np.float32)
    numbers = np.asarray(identities)
    if vectors.ndim != 2 or numbers.shape != (len(vectors),):
        raise LrfaceError(
            f"identification needs {what} features [n, d] and one identity each; found shapes "
            f"{list(vectors.shape)} and {list(numbers.shape)}"
        )
    if len(vectors) == 0:
        raise LrfaceError(f"identification needs at least one {what} face, and was given none")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise LrfaceError(
            f"the feature of {what} face {int(np.argmin(finite))} is not finite ({int((~finite).sum())} of "
            f"{len(vectors)} are not); the model is broken or overflows"
        )
    return vectors, numbers.astype(np.int64)


def average_precision(positions: Sequence[int] | NDArray[np.int64]) -> float:
    """Area under one probe's precision-recall curve by trapezoids, from the positions (from 1) of its mates.

    Between two neighbouring places of the ranked list recall grows by one mate or not at all, and precision is
    taken as the mean of its values at both (before the first place: 1). This is the average precision of TinyFace's
    evaluation (Cheng et al., Low-Resolution Face Recognition, ACCV 2018), which has it from re-identification.
    """
    places = np.sort(np.asarray(positions, dtype=np.float64))
    if len(places) == 0:
        raise LrfaceError("average precision needs at least one mate")
    hits = np.arange(1, len(places) + 1)
    before = np.divide(hits - 1, places - 1, out=np.ones(len(places)), where=places > 1)
    return float(np.mean((before + hits / places) / 2))


def identify(
    probe: ArrayLike,
    probe_identities: ArrayLike,
    gallery: ArrayLike,
    gallery_identities: ArrayLike,
    metric: str = "cosine",
    ranks: Sequence[int] = RANKS,
    chunk: int | None = None,
    advance: Callable[[int], None] = lambda probes: None,
) -> Identification:
    """Search every probe in the gallery.

    Args:
        probe, gallery: features float [p, d] and [g, d].
        probe_identities, gallery_identities: int [p] and [g]. ``DISTRACTOR`` in the gallery is nobody.
        metric: "cosine" (features of any length), or "euclidean" distance of the features as they are; scores are
            then negative squared distances.
        ranks: the k of rank-k.
        chunk: probes scored at once; by default as many as 256 MiB of scores allow.
        advance: told how many probes are done.

    Raises:
        UsageError: an unknown metric or a rank below 1.
        LrfaceError: shapes that disagree, features that are not finite, a zero vector under "cosine", no mated probe.
    """
    if metric not in METRICS:
        raise UsageError(f"metric must be {' or '.join(METRICS)}; found {metric!r}")
    if not ranks or min(ranks) < 1:
        raise UsageError(f"ranks must be whole numbers from 1; found {list(ranks)}")
    probes, probe_ids = _checked(probe, probe_identities, "probe")
    faces, gallery_ids = _checked(gallery, gallery_identities, "gallery")
    if probes.shape[1] != faces.shape[1]:
        raise LrfaceError(f"probe features have {probes.shape[1]} numbers, gallery features {faces.shape[1]}")
    if metric == "cosine":
        probes, faces = _unit(probes, "probe"), _unit(faces, "gallery")
    norms = _squared_lengths(faces)
    # Scores as the search ranks them: the dot product, less half the squared length under "euclidean" (the probe's own
    # length is the same for all).
    shift = 0.5 * norms if metric == "euclidean" else np.zeros(len(faces))
    shift_single = torch.from_numpy(shift.astype(np.float32))
    gallery_tensor = torch.from_numpy(faces).T
    longest = float(np.sqrt(norms.max()))
    # Error of a dot product of d terms in single precision, and of the shift: Higham, Accuracy and Stability, 3.1.
    unit_roundoff = 2.0**-24
    relative = (faces.shape[1] + 2) * unit_roundoff * 1.01
    order = np.argsort(gallery_ids, kind="stable")
    sorted_ids = gallery_ids[order]
    starts = np.searchsorted(sorted_ids, probe_ids, side="left")
    ends = np.searchsorted(sorted_ids, probe_ids, side="right")
    ends = np.where(probe_ids == DISTRACTOR, starts, ends)

    count = len(probes)
    first_mate = np.zeros(count, dtype=np.int64)
    best_mate = np.full(count, np.nan)
    best_other = np.full(count, -np.inf)
    precision = np.zeros(count)
    step = chunk or max(1, min(count, CHUNK_BYTES // (4 * len(faces))))
    for start in range(0, count, step):
        block = torch.from_numpy(probes[start : start + step]) @ gallery_tensor
        if metric == "euclidean":
            block -= shift_single
        for row, scores in enumerate(block.numpy(), start=start):
            own = probes[row].astype(np.float64)
            length = float(np.sqrt(own @ own))
            margin = 2 * (
                relative * length * longest + unit_roundoff * (length * longest + float(shift.max())) * 2
            )
            mates = np.sort(order[starts[row] : ends[row]])

            def exact(indices: NDArray[np.int64], own: NDArray[np.float64] = own) -> NDArray[np.float64]:
                # Summed row by row in one order, so that equal faces score equally wherever they stand.
                return (faces[indices] * own).sum(axis=1) - shift[indices]

            mate_scores = exact(mates)
            places = np.empty(len(mates), dtype=np.int64)
            for number, (mate, score) in enumerate(zip(mates, mate_scores, strict=True)):
                above = int(np.count_nonzero(scores > np.float32(score + margin)))
                near = np.flatnonzero(np.abs(scores - np.float32(score)) <= np.float32(margin * 1.01))
                # Whatever lies between the two cuts after rounding is counted once: by its exact score.
                near = near[scores[near] <= np.float32(score + margin)]
                exactly = exact(near)
                ahead = (exactly > score) | ((exactly == score) & (near < mate))
                places[number] = above + int(ahead.sum()) + 1
            if len(mates):
                first_mate[row] = places.min()
                best_mate[row] = mate_scores.max()
                precision[row] = average_precision(places)
                scores[mates] = -np.inf
            top = float(scores.max())
            if np.isfinite(top):
                close = np.flatnonzero(scores >= np.float32(top - 2 * margin))
                best_other[row] = exact(close).max()
            if metric == "euclidean":
                best_mate[row] = 2 * best_mate[row] - length * length
                best_other[row] = 2 * best_other[row] - length * length
        advance(min(step, count - start))
    mated = first_mate > 0
    if not mated.any():
        raise LrfaceError(
            "no probe has a face of its identity in the gallery; are the identities of both the same list?"
        )
    return Identification(
        rank={int(k): float(np.mean(first_mate[mated] <= k)) for k in ranks},
        mean_average_precision=float(precision[mated].mean()),
        first_mate=first_mate,
        best_mate=best_mate,
        best_other=best_other,
        mated=int(mated.sum()),
        unmated=int((~mated).sum()),
    )


def _squared_lengths(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Float64 [n], each row summed by itself in one order; in slices, since the squares take twice the room."""
    rows = max(1, 2**22 // max(1, vectors.shape[1]))
    return np.concatenate(
        [
            np.square(vectors[start : start + rows], dtype=np.float64).sum(axis=1)
            for start in range(0, len(vectors), rows)
        ]
    )


def _unit(vectors: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    lengths = np.sqrt(_squared_lengths(vectors))
    if not lengths.all():
        raise LrfaceError(
            f"the feature of {what} face {int(np.argmin(lengths))} is zero and has no direction"
        )
    return np.asarray(vectors / lengths[:, None].astype(np.float32), dtype=np.float32)


@dataclass(frozen=True)
class OpenSet:
    """Open-set identification (ISO/IEC 19795-1; as in NIST's FRVT 1:N).

    Attributes:
        threshold: float64 [t], falling.
        fpir: float64 [t], share of probes without a mate whose best candidate reaches the threshold.
        fnir: float64 [t], share of mated probes whose mate is not among the ``rank`` best or misses the threshold.
        mated, unmated: numbers of probes.
        rank: how many candidates are looked at.
    """

    threshold: NDArray[np.float64]
    fpir: NDArray[np.float64]
    fnir: NDArray[np.float64]
    mated: int
    unmated: int
    rank: int

    def fnir_at(self, fpir: float) -> float | None:
        """The smallest miss rate of a threshold whose false positive rate is at most ``fpir``; None where fewer than
        ``1 / fpir`` probes without a mate cannot show it."""
        if not 0 < fpir < 1:
            raise UsageError(f"a false positive identification rate lies between 0 and 1, got {fpir}")
        if self.unmated * fpir < 1 - 1e-9:
            return None
        return float(self.fnir[self.fpir <= fpir + 1e-12].min())


def open_set(found: Identification, rank: int = 1) -> OpenSet:
    """The open-set curve of a search in which some probes have no mate in the gallery.

    Raises:
        LrfaceError: every probe has a mate (take some identities out of the gallery, see ``without_identities``).
    """
    mated = found.first_mate > 0
    if mated.all():
        raise LrfaceError("open-set identification needs probes without a mate in the gallery; all have one")
    others = found.best_other[~mated]
    hits = np.where(found.first_mate[mated] <= rank, found.best_mate[mated], -np.inf)
    values = np.unique(np.concatenate([others, hits[np.isfinite(hits)]]))[::-1]
    above = np.nextafter(values[0], np.inf)
    thresholds = np.concatenate([[above], values])
    others, hits = np.sort(others), np.sort(hits)
    return OpenSet(
        threshold=thresholds,
        fpir=1.0 - np.searchsorted(others, thresholds, side="left") / len(others),
        fnir=np.searchsorted(hits, thresholds, side="left") / len(hits),
        mated=int(mated.sum()),
        unmated=int((~mated).sum()),
        rank=rank,
    )


def without_identities(gallery_identities: ArrayLike, share: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Which gallery faces stay when a share of the identities leaves, drawn by ``seed``: bool [g]. Distractors stay."""
    if not 0 < share < 1:
        raise UsageError(f"the share of identities that leave lies between 0 and 1, got {share}")
    numbers = np.asarray(gallery_identities)
    people = np.unique(numbers[numbers != DISTRACTOR])
    leaving = np.random.default_rng(seed).permutation(people)[: round(share * len(people))]
    return ~np.isin(numbers, leaving)


def pool_templates(
    features: ArrayLike, templates: ArrayLike, pooling: str = "mean", quality: ArrayLike | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One vector for each template (all faces of one person from one occasion).

    Args:
        features: float [n, d], as the model gives them (their lengths matter for "norm").
        templates: int [n], the template of each face.
        pooling: "mean" of unit vectors; "norm": mean of the features as they are, which weighs a face by the length of
            its feature (longer features are clearer faces); "quality": mean of unit vectors weighted by ``quality``.
        quality: float [n], at least 0, with a positive sum in every template.

    Returns:
        Unit vectors float32 [t, d] and their templates int64 [t], sorted.
    """
    if pooling not in POOLING:
        raise UsageError(f"pooling must be {', '.join(POOLING)}; found {pooling!r}")
    if (quality is not None) != (pooling == "quality"):
        raise UsageError('pooling "quality" takes a quality of each face, and no other pooling does')
    vectors, numbers = _checked(features, templates, "template")
    names, inverse = np.unique(numbers, return_inverse=True)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if pooling == "norm":
        weights = np.ones(len(vectors))
    else:
        if not lengths.all():
            raise LrfaceError(
                f"the feature of template face {int(np.argmin(lengths))} is zero and has no direction"
            )
        weights = 1.0 / lengths
        if quality is not None:
            given = np.asarray(quality, dtype=np.float64)
            if given.shape != (len(vectors),) or not np.isfinite(given).all() or given.min() < 0:
                raise LrfaceError("pooling by quality needs one finite number of at least 0 for each face")
            weights = weights * given
    pooled = np.zeros((len(names), vectors.shape[1]))
    np.add.at(pooled, inverse, vectors * weights[:, None])
    sums = np.linalg.norm(pooled, axis=1)
    if not sums.all():
        raise LrfaceError(f"template {names[int(np.argmin(sums))]}: its faces add up to zero")
    return (pooled / sums[:, None]).astype(np.float32), names
