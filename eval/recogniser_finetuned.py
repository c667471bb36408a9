"""A recogniser on disk made to bear low resolutions, by paper 002 and by others: LFW at 112, 56, 28 and
14 pixels, and 112 against each.

    python eval/recogniser_finetuned.py --recogniser recogniser.onnx --data DATA

Every row starts from the file's weights and trains on celeba300_112, half an hour of two cores at most. The student and
naive augmentation see as many images, QualNet-LM, whose steps also draw, half of them.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrface.benchmarks.verification import VerificationSet
from lrface.errors import errors_for_users
from lrface.models.onnx_network import OnnxBackbone
from lrface.study import (
    RESOLUTION_TESTING,
    Column,
    Evaluation,
    Figures,
    Row,
    accuracy_at_sizes,
    kept,
    lfw_at,
    markdown,
    run_study,
    study_options,
)
from lrface.train.checkpoint import load_model

SIZES = (112, 56, 28, 14)
PAIRS = [(size, size) for size in SIZES] + [(SIZES[0], size) for size in SIZES[1:]]


def rows(recogniser: Path) -> tuple[Row, ...]:
    start = (f"backbone.path={recogniser}",)
    return (
        Row("contrastive", "contrastive student, no labels (paper 002)", "celeba300/contrastive_onnx", start),
        Row("naive", "naive augmentation, CosFace", "celeba300/naive_onnx", start),
        Row("qualnet_lm", "QualNet-LM, CosFace", "celeba300/qualnet_lm_onnx", start),
    )


def evaluation(recogniser: Path, runs: Path, benchmark: Callable[[], VerificationSet]) -> Evaluation:
    """Accuracy of a run's network at every size, and of the file as it is beside it."""

    def of_network(encoder: nn.Module) -> dict[str, Any]:
        rows = accuracy_at_sizes(encoder, benchmark(), SIZES)
        return {f"{row['gallery_size']}x{row['probe_size']}": row["accuracy"] for row in rows}

    def before() -> dict[str, Any]:
        return {"figures": of_network(OnnxBackbone(str(recogniser)))}

    def measure(folder: Path) -> Figures:
        key = {
            "file_sha256": hashlib.sha256(recogniser.read_bytes()).hexdigest(),
            "testing": RESOLUTION_TESTING,
        }
        return {
            "before": kept(runs / "before.json", key, before)["figures"],
            "after": of_network(load_model(folder)[0]),
        }

    return Evaluation("lfw", RESOLUTION_TESTING, measure, {"test": "LFW View 2, 6,000 pairs"})


COLUMNS = tuple(
    Column(f"{gallery}x{probe}", lambda figures, name=f"{gallery}x{probe}": figures["after"][name])  # type: ignore[misc]
    for gallery, probe in PAIRS
)


def table(rows: Sequence[Row], results: list[dict[str, Any]]) -> str:
    """The table of all rows, with the file as it is in front."""
    lines = markdown(rows, results, COLUMNS).splitlines()
    figures = results[0]["evaluation"]["before"]
    cells = [f"{figures[column.title]:.2f}" for column in COLUMNS]
    untouched = f"| the recogniser as it is | - | 0 | {' | '.join(cells)} |"
    return "\n".join([*lines[:2], untouched, *lines[2:]]) + "\n"


if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--recogniser", type=Path, help="an .onnx file")
        parser.add_argument("--lfw", type=Path, help="LFW aligned by `lrface align`, to spare its alignment")
        own, arguments = parser.parse_known_args()
        if own.recogniser is None and not {"-h", "--help"} & set(arguments):
            parser.error("--recogniser FILE.onnx is missing")
        options = study_options(
            __doc__,
            "recogniser_finetuned",
            {"celeba300": rows(own.recogniser or Path("FILE"))},
            arguments,
            family="recogniser",
        )

        benchmark = functools.cache(lambda: lfw_at(own.lfw, options.data))
        run_study(
            "A recogniser from disk made to bear low resolutions",
            options,
            evaluation(own.recogniser, options.runs, benchmark),
            COLUMNS,
            table=table,
        )
