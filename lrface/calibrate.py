"""Operating thresholds, the cosine at which a model accepts a wanted share of strangers, and the probability of one
person that a cosine means, for every pair of resolutions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrface.benchmarks.metrics import rate_name
from lrface.benchmarks.verification import RESOLUTIONS, Evaluation
from lrface.embed import open_model
from lrface.embed.probability import (
    FIELD,
    ProbabilityTable,
    brier_score,
    calibration_error,
    fit_logistic,
    reliability,
    sigmoid,
)
from lrface.embed.results import threshold_key
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import verify_models
from lrface.files import read_json, write_json


@dataclass(frozen=True)
class Calibration:
    """Thresholds measured for one model.

    Attributes:
        file: where they were stored.
        false_accept_rate: the one wanted.
        rows: one dict a pair of sizes, equal ones first: ``gallery_size, probe_size, threshold`` (cosine),
            ``false_accept_rate`` and ``true_accept_rate`` reached (percent) and ``impostor_pairs``.
        probabilities: one dict a pair of sizes: ``gallery_size, probe_size, slope, intercept``, and of folds that were
            left out of the fit ``brier`` (0.25 is what saying one half gets) and ``calibration_error``.
        reliability: what was said against what was so on those folds, all sizes together: see
            :func:`lrface.embed.probability.reliability`.
        brier, calibration_error: of all sizes together.
    """

    file: str
    model: str
    benchmark: str
    false_accept_rate: float
    rows: list[dict[str, Any]]
    probabilities: list[dict[str, Any]]
    reliability: list[dict[str, float]]
    brier: float
    calibration_error: float


def threshold_at(scores: ArrayLike, same: ArrayLike, false_accept_rate: float) -> float:
    """The smallest threshold that at most ``false_accept_rate`` of the different pairs reach (score >= threshold).

    Args:
        scores: float [p]; same: bool [p].

    Raises:
        LrfaceError: fewer than ``1 / false_accept_rate`` different pairs, which cannot show so small a rate.
    """
    if not 0 < false_accept_rate < 1:
        raise UsageError(f"a false accept rate lies between 0 and 1, got {false_accept_rate}")
    impostors = np.sort(np.asarray(scores, dtype=np.float64)[~np.asarray(same, dtype=bool)])[::-1]
    allowed = int(np.floor(false_accept_rate * len(impostors) + 1e-9))
    if allowed < 1:
        raise LrfaceError(
            f"{len(impostors)} pairs of different people cannot show a false accept rate of "
            f"{rate_name(false_accept_rate)}: at least {math.ceil(1 / false_accept_rate - 1e-9)} are needed. Take a "
            "larger rate or a benchmark with more pairs"
        )
    if allowed >= len(impostors):
        return float(impostors[-1])
    return float(np.nextafter(impostors[allowed], np.inf))


def calibrate(
    model: str,
    benchmark: str,
    false_accept_rate: float = 1e-3,
    resolutions: Sequence[int] = RESOLUTIONS,
    **options: Any,
) -> Calibration:
    """Measure thresholds and probabilities for every pair of sizes on a benchmark, and store them with the model.

    A model of `lrface train` gets them into its card (``thresholds``, ``probability``), an ONNX or torch.export file
    into NAME.thresholds.json beside it, a module:function into FILE.py.function.thresholds.json; ``load_embedder``
    reads them, and ``compare`` takes the threshold measured nearest to the effective resolutions of the two
    faces, and the probability between the sizes around both. The benchmark's people must not have been trained on:
    probabilities are told well only of pairs like those they were fitted to.

    Args:
        options: those of :func:`lrface.evaluation.verify_models`.

    Raises:
        LrfaceError: too few pairs for the rate, or the model's folder cannot be written.
    """
    run = verify_models([model], [benchmark], resolutions, matrix=True, **options)
    (found,) = run.evaluations.values()
    by_sizes = _both_ways(found)
    rows: list[dict[str, Any]] = []
    for (small, large), scores in by_sizes.items():
        same = np.resize(found.benchmark.same, len(scores))
        # Rounded up, so that what is stored never accepts more than was measured.
        threshold = min(1.0, math.ceil(threshold_at(scores, same, false_accept_rate) * 1e9) / 1e9)
        rows.append(
            {
                "gallery_size": large,
                "probe_size": small,
                "threshold": threshold,
                "false_accept_rate": round(100 * float(np.mean(scores[~same] >= threshold)), 4),
                "true_accept_rate": round(100 * float(np.mean(scores[same] >= threshold)), 4),
                "impostor_pairs": int((~same).sum()),
            }
        )
    rows.sort(
        key=lambda row: (row["gallery_size"] != row["probe_size"], -row["gallery_size"], -row["probe_size"])
    )
    table, probabilities, curve, brier = _probabilities(found, by_sizes)
    embedder = open_model(model)
    thresholds = {threshold_key(row["gallery_size"], row["probe_size"]): row["threshold"] for row in rows}
    how = {
        "benchmark": found.benchmark.name,
        "false_accept_rate": false_accept_rate,
        "impostor_pairs": int((~found.benchmark.same).sum()),
        "date": date.today().isoformat(),
    }
    measured = {"brier": brier, "calibration_error": round(calibration_error(curve), 6), **how}
    del measured["false_accept_rate"]
    kept = {
        "thresholds": thresholds,
        "thresholds_measured": how,
        FIELD: {**table.to_card(), "measured": measured},
    }
    file = embedder.thresholds_file
    if embedder.file.suffix == ".safetensors":
        card = read_json(file, "the card of the model")
        write_json(file, {**card, **kept})
    else:
        write_json(file, {"model_sha256": embedder.model_sha256, **kept})
    return Calibration(
        str(file),
        model,
        found.benchmark.name,
        false_accept_rate,
        rows,
        probabilities,
        curve,
        brier,
        round(calibration_error(curve), 6),
    )


def _both_ways(found: Evaluation) -> dict[tuple[int, int], NDArray[np.float64]]:
    """Scores by (smaller, larger) size. Which of the two faces is the gallery's says nothing: two different sizes have
    the scores of all pairs one way and then the other."""
    by_sizes = {
        (row["gallery_size"], row["probe_size"]): scores
        for row, scores in zip(found.rows, found.scores, strict=True)
    }
    sizes = sorted({size for pair in by_sizes for size in pair})
    return {
        (small, large): np.concatenate(
            [by_sizes[small, large]] + ([by_sizes[large, small]] if small != large else [])
        )
        for i, small in enumerate(sizes)
        for large in sizes[i:]
    }


def _probabilities(
    found: Evaluation, by_sizes: Mapping[tuple[int, int], NDArray[np.float64]]
) -> tuple[ProbabilityTable, list[dict[str, Any]], list[dict[str, float]], float]:
    """The table fitted to all pairs, a row for each pair of sizes, and the reliability and Brier score of all sizes
    together, both on folds left out of the fit."""
    sizes = sorted({size for pair in by_sizes for size in pair})
    slope, intercept = np.zeros((2, len(sizes), len(sizes)))
    rows, said, truth = [], [], []
    for i, small in enumerate(sizes):
        for j, large in enumerate(sizes[i:], i):
            scores = by_sizes[small, large]
            same, folds = (
                np.resize(each, len(scores)) for each in (found.benchmark.same, found.benchmark.folds)
            )
            slope[i, j], intercept[i, j] = slope[j, i], intercept[j, i] = fit_logistic(scores, same)
            left_out = np.empty(len(scores))
            for fold in np.unique(folds):
                a, b = fit_logistic(scores[folds != fold], same[folds != fold])
                left_out[folds == fold] = sigmoid(a * scores[folds == fold] + b)
            said.append(left_out)
            truth.append(same)
            rows.append(
                {
                    "gallery_size": large,
                    "probe_size": small,
                    "slope": round(float(slope[i, j]), 6),
                    "intercept": round(float(intercept[i, j]), 6),
                    "brier": round(brier_score(left_out, same), 6),
                    "calibration_error": round(calibration_error(reliability(left_out, same)), 6),
                }
            )
    everything, answers = np.concatenate(said), np.concatenate(truth)
    table = ProbabilityTable(tuple(map(float, sizes)), slope, intercept)
    return table, rows[::-1], reliability(everything, answers), round(brier_score(everything, answers), 6)


def calibration_table(calibration: Calibration) -> str:
    """The rows as plain text."""
    from lrface.benchmarks.report import format_columns

    header = ["pixels", "threshold", "FAR %", "TAR %"]
    lines = [
        [
            f"{row['gallery_size']} x {row['probe_size']}",
            f"{row['threshold']:.4f}",
            f"{row['false_accept_rate']:.3f}",
            f"{row['true_accept_rate']:.2f}",
        ]
        for row in calibration.rows
    ]
    pairs = calibration.rows[0]["impostor_pairs"]
    more = [
        [
            f"{row['gallery_size']} x {row['probe_size']}",
            f"{row['slope']:.2f}",
            f"{row['intercept']:.2f}",
            f"{row['brier']:.4f}",
            f"{row['calibration_error']:.4f}",
        ]
        for row in calibration.probabilities
    ]
    probability = format_columns(["pixels", "slope", "intercept", "Brier", "calibration error"], more)
    curve = ", ".join(f"{row['said']:.2f}: {row['true']:.2f}" for row in calibration.reliability)
    return (
        f"{format_columns(header, lines)}\n\n{probability}\n"
        f"Probabilities at even odds, on folds left out of the fit: Brier score {calibration.brier:.4f}, calibration "
        f"error {calibration.calibration_error:.4f}; said: true {curve}\n"
        f"{calibration.benchmark}: {pairs} pairs of different people, wanted FAR "
        f"{rate_name(calibration.false_accept_rate)}; stored in {Path(calibration.file)}"
    )
