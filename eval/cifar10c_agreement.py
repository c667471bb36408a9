"""CIFAR-10-C made by lrface against CIFAR-10-C made by the reference code: the same network's errors on both.

Trains the recipe cifar10/clean (or goes on with its run), corrupts the test images of CIFAR-10 with the 15 corruptions
at 5 severities, by lrface's set "cifar" and by the package imagecorruptions (the reference code of ImageNet-C made to run
on today's numpy), and writes the error of each corruption, its mean over severities, to
eval/results/cifar10c_agreement.json (or --out). Wanted: at most 1.5 points between the two for each corruption.

The package has ImageNet-C's constants written into its functions. They are driven with CIFAR-10-C's: the numbers
among a function's compiled constants are exchanged, its code stays as it is. CIFAR-10-C's elastic transform begins
with an affine map that the package has not; OpenCV does it here, before the package's function. CIFAR-10-C's motion
blur and that of its snow were made by ImageMagick, the package draws them by itself; so does lrface, which follows
the package.

    python eval/cifar10c_agreement.py --data DATA --runs runs/cifar10c --images 2000
"""

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from lrface import recipes
from lrface.classifiers import Classifier, open_classifier
from lrface.data.source import open_source
from lrface.degrade import corruptions
from lrface.errors import errors_for_users
from lrface.files import write_json
from lrface.progress import progress
from lrface.study import RESULTS, about_the_run, train_run
from lrface.train.checkpoint import load_model

RECIPE = "cifar10/clean"
SIZE = 32
WANTED = 1.5  # points between the two errors
# Of the reference: numbers that its functions hold, to numbers of CIFAR-10-C.
TABLE = corruptions.SETS["cifar"].table
ZOOMS = {1.11: 1.06, 1.16: 1.11, 1.21: 1.16, 1.26: 1.21, 1.31: 1.26, 0.02: 0.01, 0.03: 0.01}
# What the reference is not asked as it stands, for the results.
NOTES = {
    "motion_blur": "CIFAR-10-C was made with ImageMagick; both here follow imagecorruptions' own motion blur",
    "snow": "CIFAR-10-C was made with ImageMagick; both here follow imagecorruptions' own motion blur",
    "frost": "the reference has photographs of frost, lrface draws its own",
    "elastic_transform": "the affine map before imagecorruptions' elastic transform is made by this script with OpenCV",
}


def with_constants(
    function: Callable[..., Any], exchange: dict[Any, Any], given: Mapping[str, Any]
) -> Callable[..., Any]:
    """``function`` with other numbers among its compiled constants and other globals.

    Raises:
        ValueError: a number is not among its constants.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    missing = [old for old in exchange if not any(_same(old, constant) for constant in code.co_consts)]
    if missing:
        raise ValueError(f"{function.__name__} of imagecorruptions holds no {missing}: another version?")
    constants = tuple(
        next((new for old, new in exchange.items() if _same(old, constant)), constant)
        for constant in code.co_consts
    )
    code = code.replace(co_consts=constants)
    return FunctionType(code, {**function.__globals__, **given}, function.__name__, function.__defaults__)


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and first == second


def reference_functions() -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """The 15 corruptions of imagecorruptions with CIFAR-10-C's constants: uint8 [h, w, 3] -> uint8 [h, w, 3]."""
    module = importlib.import_module("imagecorruptions.corruptions")
    imagenet = corruptions.SETS["imagenet"].table

    def driven(name: str, exchange: dict[Any, Any], **given: Any) -> Callable[[np.ndarray, int], np.ndarray]:
        function = with_constants(getattr(module, name), exchange, given)

        def call(image: np.ndarray, severity: int) -> np.ndarray:
            with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                warnings.simplefilter("ignore")  # and it prints where its zoom is a pixel short
                return np.uint8(function(Image.fromarray(image), severity))

        return call

    found = {}
    for name in corruptions.CORRUPTIONS:
        if name == "zoom_blur":
            found[name] = driven(name, ZOOMS)
        elif name == "frost":
            weights = tuple(constants[:2] for constants in TABLE[name])
            (scale,) = {constants[2] for constants in TABLE[name]}
            # It reads a large photograph of frost from disk for each image.
            kept = SimpleNamespace(
                imread=lru_cache(cv2.imread), resize=cv2.resize, INTER_CUBIC=cv2.INTER_CUBIC
            )
            found[name] = driven(name, {tuple(c[:2] for c in imagenet[name]): weights, 1.1: scale}, cv2=kept)
        elif name == "elastic_transform":
            found[name] = _elastic(driven_at=[driven(name, _elastic_constants(s)) for s in range(1, 6)])
        else:
            # A list of numbers is compiled from a tuple of them.
            found[name] = driven(name, {tuple(imagenet[name]): tuple(TABLE[name])})
    return found


def _elastic_constants(severity: int) -> dict[Any, Any]:
    """The package's transform displaces by up to 0.005 sides before smoothing by 0.01 sides and a factor of 12.5 to 30."""
    _, strength, sigma, _ = TABLE["elastic_transform"][severity - 1]
    # CIFAR-10-C's begins with displacements of up to one pixel.
    return {0.005: 1 / SIZE, 0.01: sigma / SIZE, (12.5, 16.25, 21.25, 25.0, 30.0): (strength,) * 5}


def _elastic(
    driven_at: list[Callable[[np.ndarray, int], np.ndarray]],
) -> Callable[[np.ndarray, int], np.ndarray]:
    def call(image: np.ndarray, severity: int) -> np.ndarray:
        shift = TABLE["elastic_transform"][severity - 1][3]
        centre, third = np.float32([SIZE // 2, SIZE // 2]), SIZE // 3
        corners = np.float32([centre + third, [centre[0] + third, centre[1] - third], centre - third])
        moved = corners + np.random.uniform(-shift, shift, size=corners.shape).astype(np.float32)
        matrix = cv2.getAffineTransform(corners, moved)
        image = cv2.warpAffine(image, matrix, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT_101)
        return driven_at[severity - 1](image, severity)

    return call


def wrong(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """bool [n], which of uint8 [n, 3, 32, 32] are classified wrongly."""
    found = [
        classifier.scores(part.float().contiguous(memory_format=torch.channels_last) / 255).argmax(1) != truth
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    ]
    return torch.cat(found).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="holds cifar10/train.parquet and test.parquet; else $LRFACE_DATA"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10c"), help="where the run is kept")
    parser.add_argument("--images", type=int, default=10_000, help="the first so many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar10c_agreement.json")
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument(
        "--names", nargs="+", default=list(corruptions.CORRUPTIONS), help="some corruptions only"
    )
    arguments = parser.parse_args()
    started = time.time()
    reference = reference_functions()
    overrides = [f"seed={arguments.seed}", f"out={arguments.runs / f'clean-seed{arguments.seed}'}"]
    overrides += [] if arguments.epochs is None else [f"stages.0.epochs={arguments.epochs}"]
    summary = train_run(RECIPE, overrides, arguments.data)
    classifier = open_classifier(summary["out"], SIZE, device="cpu")
    card = load_model(summary["out"])[1]
    source = open_source(recipes.find_data("cifar10/test.parquet", arguments.data))
    count = min(arguments.images, len(source))
    pixels = np.stack([source.image(index) for index in range(count)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(source.labels[:count])
    clean = wrong(classifier, images, labels).mean() * 100
    np.random.seed(arguments.seed)  # imagecorruptions draws from the global generator
    rows = []
    with progress(len(arguments.names) * 5, "corruptions") as bar:
        for name in arguments.names:
            errors: dict[str, list[float]] = {"lrface": [], "reference": []}
            changed, seconds = [], {"lrface": 0.0, "reference": 0.0}
            for severity in range(1, 6):
                begun = time.perf_counter()
                ours = corruptions.corrupt(
                    images, name, severity, "cifar", seed=arguments.seed * 100 + severity
                )
                seconds["lrface"] += time.perf_counter() - begun
                begun = time.perf_counter()
                theirs = torch.from_numpy(np.stack([reference[name](image, severity) for image in pixels]))
                seconds["reference"] += time.perf_counter() - begun
                missed = {
                    "lrface": wrong(classifier, ours, labels),
                    "reference": wrong(classifier, theirs.permute(0, 3, 1, 2), labels),
                }
                for key, values in missed.items():
                    errors[key].append(round(float(values.mean()) * 100, 2))
                changed.append(missed["lrface"].astype(float) - missed["reference"])
                bar.advance()
            difference = float(np.mean(errors["lrface"]) - np.mean(errors["reference"]))
            # Images are drawn, not severities: the five errors of an image go together.
            deviation = float(np.mean(changed, axis=0).std(ddof=1)) * 100 / count**0.5
            rows.append(
                {
                    "corruption": name,
                    "lrface": round(float(np.mean(errors["lrface"])), 2),
                    "reference": round(float(np.mean(errors["reference"])), 2),
                    "difference": round(difference, 2),
                    "standard_error": round(deviation, 2),
                    "agrees": abs(difference) <= WANTED,
                    "by_severity": errors,
                    "seconds": {key: round(value, 2) for key, value in seconds.items()},
                    **({"note": NOTES[name]} if name in NOTES else {}),
                }
            )
            row = rows[-1]
            print(
                f"{name:18} {row['lrface']:6.2f} {row['reference']:6.2f} {row['difference']:+6.2f}",
                file=sys.stderr,
            )
    write_json(
        arguments.out,
        {
            "table": "CIFAR-10-C errors (%) of one network, corrupted by lrface and by imagecorruptions",
            "command": f"python eval/cifar10c_agreement.py --images {count} --seed {arguments.seed}"
            + (f" --epochs {arguments.epochs:g}" if arguments.epochs is not None else ""),
            "config_sha256": {RECIPE: summary["recipe_sha256"]},
            "checkpoint_sha256": {f"{RECIPE}:{arguments.seed}": card["weights_sha256"]},
            "recipe": card["recipe"],
            "data": {
                "training": "CIFAR-10, 50,000 images",
                "test": f"the first {count:,} of CIFAR-10's 10,000 test images",
            },
            "seeds": [arguments.seed],
            "wanted": WANTED,
            "clean_error": round(float(clean), 2),
            "mean_corruption_error": {
                key: round(float(np.mean([row[key] for row in rows])), 2) for key in ("lrface", "reference")
            },
            "largest_difference": max(abs(row["difference"]) for row in rows),
            "disagreeing": [row["corruption"] for row in rows if not row["agrees"]],
            "rows": rows,
            **about_the_run(started),
        },
    )


if __name__ == "__main__":
    with errors_for_users():
        main()
