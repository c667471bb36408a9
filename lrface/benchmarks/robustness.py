"""Robustness of classifiers against corruptions: errors, CE, mCE and relative mCE from what was judged right.

D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019. E(c, s) is a classifier's top-1 error on corruption c at severity s, E(clean) that on clean images, A the same of
AlexNet:

    CE(c)          = sum_s E(c, s) / sum_s A(c, s)                            mCE = mean over the 15 corruptions
    relative CE(c) = sum_s (E(c, s) - E(clean)) / sum_s (A(c, s) - A(clean))  relative mCE = their mean
    mean error     = mean over the 15 corruptions of mean_s E(c, s)

The last is what papers on CIFAR-10-C (paper 003, AdA) call mCE, without AlexNet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks import imagenet_lists
from lrface.degrade.corruptions import CORRUPTIONS, GROUPS, HELD_OUT, MNIST_SEVERITY
from lrface.errors import LrfaceError, UsageError

SEVERITIES = (1, 2, 3, 4, 5)

ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's top-1 errors on ImageNet-C, means over the five severities: the table of Hendrycks and Dietterich's
repository (percent with one decimal in their paper), with all decimals as D. Hendrycks et al., "AugMix", ICLR 2020,
published them with its code. None were published for the four held-out corruptions, CIFAR-10-C or Tiny-ImageNet-C."""

ALEXNET_CLEAN_ERROR = 0.43478
"""The same network's error on the clean validation set: 56.522 % top-1 as torchvision documents it, 43.5 in the paper."""


@dataclass(frozen=True)
class Kind:
    """A benchmark of corrupted images.

    set: the constants that its corruptions have in lrface.
    side: of its images in pixels.
    channels: 3 or 1.
    names: its corruptions, those that count; held_out: further ones that are shown apart.
    severities: of each; MNIST-C has one, see MNIST_SEVERITY, which counts as 1 here.
    quality: JPEG quality that its images were stored with; None where they were stored without loss.
    """

    name: str
    title: str
    set: str
    side: int
    channels: int
    names: tuple[str, ...]
    held_out: tuple[str, ...]
    severities: tuple[int, ...]
    quality: int | None

    def strength(self, corruption: str, severity: int) -> int:
        """The severity that ``severity`` of this benchmark is in lrface's set."""
        return MNIST_SEVERITY[corruption] if self.name == "mnist_c" else severity


BENCHMARKS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        # The set as it was published, whose elastic transform also has an affine part.
        Kind("imagenet_c", "ImageNet-C", "imagenet_published", 224, 3, CORRUPTIONS, HELD_OUT, SEVERITIES, 85),
        Kind("cifar10_c", "CIFAR-10-C", "cifar", 32, 3, CORRUPTIONS, HELD_OUT, SEVERITIES, None),
        Kind(
            "tiny_imagenet_c",
            "Tiny-ImageNet-C",
            "tiny_imagenet",
            64,
            3,
            CORRUPTIONS,
            HELD_OUT,
            SEVERITIES,
            85,
        ),
        # No published set has faces: lrface's own constants, kept without loss.
        Kind("face_c", "Face-C", "face", 112, 3, CORRUPTIONS, HELD_OUT, SEVERITIES, None),
        Kind("mnist_c", "MNIST-C", "mnist", 28, 1, tuple(MNIST_SEVERITY), (), (1,), None),
    )
}


def group_of(corruption: str) -> str:
    """The group of a corruption: noise, blur, weather, digital, extra; "other" for those of MNIST-C alone."""
    return next((group for group, names in GROUPS.items() if corruption in names), "other")


# ------------------------------------------------------------------------------------------- classes and images


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet identifiers of ILSVRC 2012 in the order of the outputs of networks trained on it."""
    return tuple(imagenet_lists.CLASSES.split())


CLASS_LISTS = {
    "imagenet100": imagenet_lists.IMAGENET_100,
    "imagenet100b": imagenet_lists.IMAGENET_100B,
    "imagenet200": imagenet_lists.IMAGENET_200,
}


def class_subset(text: str, option: str = "--classes") -> tuple[str, ...]:
    """Classes by name: of a list in lrface, or one a line in a file.

    "imagenet200" is ImageNet-200 of paper 001 (section 4: the classes of Tiny-ImageNet), not the 200 of ImageNet-R;
    "imagenet100" is that of Tian et al., "Contrastive Multiview Coding", which paper 002 uses (its Table 15);
    "imagenet100b" are a hundred other classes (its Table 16).

    Raises:
        UsageError: neither a list nor a file, or a file without names.
    """
    if text in CLASS_LISTS:
        return tuple(CLASS_LISTS[text].split())
    return _names_in(Path(text), option, tuple(CLASS_LISTS))


IMAGE_LISTS = {"robustbench5000": imagenet_lists.ROBUSTBENCH_5000}


def image_subset(text: str) -> Callable[[str], bool]:
    """Whether an image belongs to a list, by its name in the benchmark (its path below the class folder's parent).

    "robustbench5000" are the 5,000 images of ImageNet's validation set that RobustBench scores. A file holds one name
    a line: a file name, or CLASS/FILE; its suffix does not matter.

    Raises:
        UsageError: neither a list nor a file, or a file without names.
    """
    if text in IMAGE_LISTS:
        wanted = {f"ILSVRC2012_val_{int(number):08d}" for number in IMAGE_LISTS[text].split()}
    else:
        names = _names_in(Path(text), "--subset", tuple(IMAGE_LISTS))
        wanted = {str(Path(name).with_suffix("")) for name in names}

    def chosen(name: str) -> bool:
        bare = Path(name).with_suffix("")
        return bare.name in wanted or bare.as_posix() in wanted

    return chosen


def _names_in(file: Path, option: str, known: Sequence[str]) -> tuple[str, ...]:
    if not file.is_file():
        raise UsageError(
            f"{option} {file}: neither {', '.join(known)} nor a file with one name a line; found no such file"
        )
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    names = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not names:
        raise UsageError(f"{option} {file}: holds no names; write one a line")
    return names


# ------------------------------------------------------------------------------------------------------- figures


@dataclass
class Judged:
    """What a classifier made of each image, by corruption and severity.

    Attributes:
        right: uint8 [n] for each (corruption, severity): 1 where the first guess was right, 0 where it was wrong, 255
            where there was no image (broken files).
        right5: the same for the five first guesses; None for classifiers of five classes or fewer.
        clean, clean5: the same on the clean images; None without them.
    """

    right: dict[tuple[str, int], NDArray[np.uint8]]
    right5: dict[tuple[str, int], NDArray[np.uint8]] | None = None
    clean: NDArray[np.uint8] | None = None
    clean5: NDArray[np.uint8] | None = None


MISSING = 255


def error_of(right: NDArray[np.uint8]) -> float:
    """Share of wrong ones among the images there are. Raises LrfaceError without any."""
    judged = right[right != MISSING]
    if len(judged) == 0:
        raise LrfaceError("an error needs at least one readable image")
    return float(np.mean(judged == 0))


def corruption_errors(
    errors: Mapping[str, Sequence[float]], kind: Kind, clean: float | None = None, alexnet: bool = False
) -> dict[str, Any]:
    """Figures from errors in [0, 1], as fractions.

    Args:
        errors: corruption -> top-1 error at each severity.
        kind: what was measured; it says which corruptions count.
        clean: error on clean images.
        alexnet: give CE as well: ``errors`` are those of ImageNet-C, five severities of each corruption.

    Returns:
        ``error`` (mean over severities), ``ce`` and ``relative_ce`` by corruption (None where there is no AlexNet
        error), ``mean_error, mean_error_without_noise, held_out_mean_error, by_group`` (means over the corruptions
        there are), ``mce, mce_without_noise, relative_mce, relative_mce_without_noise`` (None unless all 15, or 12
        without noise, are there).
    """
    error = {name: float(np.mean(list(values))) for name, values in errors.items()}
    ce: dict[str, float | None] = dict.fromkeys(error)
    relative: dict[str, float | None] = dict.fromkeys(error)
    for name in error if alexnet else ():
        if name in ALEXNET_ERRORS:
            ce[name] = error[name] / ALEXNET_ERRORS[name]
            if clean is not None:
                relative[name] = (error[name] - clean) / (ALEXNET_ERRORS[name] - ALEXNET_CLEAN_ERROR)

    def mean(names: Sequence[str]) -> float | None:
        return float(np.mean([error[name] for name in names])) if names else None

    def normalised(values: Mapping[str, float | None], wanted: Sequence[str]) -> float | None:
        known = [value for value in (values.get(name) for name in wanted) if value is not None]
        return float(np.mean(known)) if len(known) == len(wanted) else None

    counted = [name for name in error if name in kind.names]
    quiet = [name for name in CORRUPTIONS if group_of(name) != "noise"]
    groups = list(dict.fromkeys(group_of(name) for name in counted))
    return {
        "error": error,
        "ce": ce,
        "relative_ce": relative,
        "mean_error": mean(counted),
        "mean_error_without_noise": mean([name for name in counted if group_of(name) != "noise"]),
        "held_out_mean_error": mean([name for name in error if name in kind.held_out]),
        "by_group": {group: mean([name for name in counted if group_of(name) == group]) for group in groups},
        "mce": normalised(ce, CORRUPTIONS),
        "mce_without_noise": normalised(ce, quiet),
        "relative_mce": normalised(relative, CORRUPTIONS),
        "relative_mce_without_noise": normalised(relative, quiet),
    }


def resampled_errors(
    right: Sequence[NDArray[np.uint8]], samples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Errors [samples, k] of k conditions when the images, the same ones in all conditions, are drawn again.

    Args:
        right: k arrays uint8 [n], see :class:`Judged`.
    """
    judged = np.stack(right, axis=1)
    wrong = (judged == 0).astype(np.float32)
    there = (judged != MISSING).astype(np.float32)
    complete = bool(there.all())
    rng = np.random.default_rng(seed)
    count = len(judged)
    out = np.empty((samples, judged.shape[1]))
    for start in range(0, samples, 50):
        stop = min(start + 50, samples)
        weights = np.stack(
            [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(start, stop)]
        ).astype(np.float32)
        drawn = count if complete else np.maximum(weights @ there, 1)
        out[start:stop] = (weights @ wrong) / drawn
    return out


def robustness_figures(judged: Judged, kind: Kind, alexnet: bool, samples: int = 1000) -> dict[str, Any]:
    """What ``lrface robustness --json`` says of one model: percentages rounded to 4 digits, CE in percent of AlexNet's.

    Args:
        judged: all severities of each corruption, on the same images.
        alexnet: whether CE can be given: all classes of ImageNet-C at severities 1 to 5.
        samples: resamples of the images for the 95 % intervals.

    Returns:
        ``clean_error, clean_error_interval, clean_top5_error, mean_error`` (mCE without AlexNet), its interval,
        ``mean_error_without_noise, held_out_mean_error, by_group, mce, mce_interval, mce_without_noise, relative_mce,
        relative_mce_without_noise`` and ``corruptions``: ``corruption, group, held_out, severities, errors,
        top5_errors, error, error_interval, top5_error, alexnet_error, ce, relative_ce`` of each.
    """
    names = list(dict.fromkeys(name for name, _ in judged.right))
    keys = {name: [key for key in judged.right if key[0] == name] for name in names}
    errors = {name: [error_of(judged.right[key]) for key in keys[name]] for name in names}
    clean = None if judged.clean is None else error_of(judged.clean)
    figures = corruption_errors(errors, kind, clean, alexnet)

    drawn = resampled_errors([judged.right[key] for name in names for key in keys[name]], samples)
    ends = np.cumsum([len(keys[name]) for name in names])
    means = np.stack([part.mean(axis=1) for part in np.split(drawn, ends[:-1], axis=1)], axis=1)
    counted = [number for number, name in enumerate(names) if name in kind.names]
    mce_interval = None
    if figures["mce"] is not None:
        scale = np.array([ALEXNET_ERRORS[names[number]] for number in counted])
        mce_interval = (means[:, counted] / scale).mean(axis=1)

    rows = []
    for number, name in enumerate(names):
        top5 = None
        if judged.right5 is not None:
            top5 = [error_of(judged.right5[key]) for key in keys[name]]
        rows.append(
            {
                "corruption": name,
                "group": group_of(name),
                "held_out": name in kind.held_out,
                "severities": [severity for _, severity in keys[name]],
                "errors": [_percent(value) for value in errors[name]],
                "top5_errors": None if top5 is None else [_percent(value) for value in top5],
                "error": _percent(figures["error"][name]),
                "error_interval": _interval(means[:, number]),
                "top5_error": None if top5 is None else _percent(float(np.mean(top5))),
                "alexnet_error": _percent(ALEXNET_ERRORS.get(name)) if alexnet else None,
                "ce": _percent(figures["ce"][name]),
                "relative_ce": _percent(figures["relative_ce"][name]),
            }
        )
    clean_interval = None
    if judged.clean is not None:
        clean_interval = _interval(resampled_errors([judged.clean], samples)[:, 0])
    return {
        "clean_error": _percent(clean),
        "clean_error_interval": clean_interval,
        "clean_top5_error": None if judged.clean5 is None else _percent(error_of(judged.clean5)),
        "mean_error": _percent(figures["mean_error"]),
        "mean_error_interval": _interval(means[:, counted].mean(axis=1)) if counted else None,
        "mean_error_without_noise": _percent(figures["mean_error_without_noise"]),
        "held_out_mean_error": _percent(figures["held_out_mean_error"]),
        "by_group": {group: _percent(value) for group, value in figures["by_group"].items()},
        "mce": _percent(figures["mce"]),
        "mce_interval": None if mce_interval is None else _interval(mce_interval),
        "mce_without_noise": _percent(figures["mce_without_noise"]),
        "relative_mce": _percent(figures["relative_mce"]),
        "relative_mce_without_noise": _percent(figures["relative_mce_without_noise"]),
        "corruptions": rows,
    }


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100.0 * fraction, 4)


def _interval(values: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [round(100.0 * float(low), 4), round(100.0 * float(high), 4)]
