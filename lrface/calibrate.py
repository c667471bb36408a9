"""Operating thresholds: the cosine at which a model accepts a wanted share of strangers, at each resolution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lrface.benchmarks.metrics import rate_name
from lrface.benchmarks.verification import RESOLUTIONS
from lrface.embed import open_model
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import verify_models
from lrface.files import read_json, write_json


@dataclass(frozen=True)
class Calibration:
    """Thresholds measured for one model.

    Attributes:
        file: where they were stored.
        false_accept_rate: the one wanted.
        rows: one dict a resolution: ``size, threshold`` (cosine), ``false_accept_rate`` and ``true_accept_rate``
            reached (percent) and ``impostor_pairs``.
    """

    file: str
    model: str
    benchmark: str
    false_accept_rate: float
    rows: list[dict[str, Any]]


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
    """Measure thresholds on a benchmark with both images at each size, and store them with the model.

    A model of `lrface train` gets them into its card (``thresholds``), an ONNX or torch.export file into
    NAME.thresholds.json beside it, a module:function into FILE.py.function.thresholds.json; ``load_embedder`` reads
    them, and ``compare`` takes the one measured nearest to the smaller effective resolution of the two faces.

    Args:
        options: those of :func:`lrface.evaluation.verify_models`.

    Raises:
        LrfaceError: too few pairs for the rate, or the model's folder cannot be written.
    """
    run = verify_models([model], [benchmark], resolutions, **options)
    (found,) = run.evaluations.values()
    rows = []
    for row, scores in zip(found.rows, found.scores, strict=True):
        same = found.benchmark.same
        # Rounded up, so that what is stored never accepts more than was measured.
        threshold = min(1.0, math.ceil(threshold_at(scores, same, false_accept_rate) * 1e9) / 1e9)
        rows.append(
            {
                "size": row["probe_size"],
                "threshold": threshold,
                "false_accept_rate": round(100 * float(np.mean(scores[~same] >= threshold)), 4),
                "true_accept_rate": round(100 * float(np.mean(scores[same] >= threshold)), 4),
                "impostor_pairs": int((~same).sum()),
            }
        )
    embedder = open_model(model)
    thresholds = {str(row["size"]): row["threshold"] for row in rows}
    how = {
        "benchmark": found.benchmark.name,
        "false_accept_rate": false_accept_rate,
        "impostor_pairs": int((~found.benchmark.same).sum()),
        "date": date.today().isoformat(),
    }
    file = embedder.thresholds_file
    if embedder.file.suffix == ".safetensors":
        card = read_json(file, "the card of the model")
        write_json(file, {**card, "thresholds": thresholds, "thresholds_measured": how})
    else:
        write_json(
            file,
            {"model_sha256": embedder.model_sha256, "thresholds": thresholds, "thresholds_measured": how},
        )
    return Calibration(str(file), model, found.benchmark.name, false_accept_rate, rows)


def calibration_table(calibration: Calibration) -> str:
    """The rows as plain text."""
    from lrface.benchmarks.report import format_columns

    header = ["pixels", "threshold", "FAR %", "TAR %"]
    lines = [
        [
            str(row["size"]),
            f"{row['threshold']:.4f}",
            f"{row['false_accept_rate']:.3f}",
            f"{row['true_accept_rate']:.2f}",
        ]
        for row in calibration.rows
    ]
    pairs = calibration.rows[0]["impostor_pairs"]
    return (
        f"{format_columns(header, lines)}\n{calibration.benchmark}: {pairs} pairs of different people, wanted FAR "
        f"{rate_name(calibration.false_accept_rate)}; stored in {Path(calibration.file)}"
    )
