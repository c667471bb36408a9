"""Classifiers on corrupted images: what `lrface robustness` does. Above classifiers and benchmarks, below the command
line."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.benchmarks.corrupted import corrupt_images
from lrface.benchmarks.image_sets import (
    ImageSet,
    StoredSet,
    batches,
    check_labels,
    decode_image,
    find_benchmark,
    is_stored_set,
    open_images,
    open_stored,
    prepare,
    store_lossy,
)
from lrface.benchmarks.page import ReportModel
from lrface.benchmarks.report import Findings
from lrface.benchmarks.robustness import (
    BENCHMARKS,
    MISSING,
    SEVERITIES,
    Judged,
    Kind,
    class_subset,
    error_of,
    image_subset,
    imagenet_classes,
    resampled_errors,
    robustness_figures,
)
from lrface.benchmarks.robustness_page import robustness_page, robustness_text
from lrface.classifiers import Classifier, open_classifier
from lrface.corrupt import chosen_corruptions, chosen_severities
from lrface.data.decode import BrokenImage
from lrface.errors import LrfaceError, UsageError
from lrface.progress import progress
from lrface.registry import nearest


@dataclass
class RobustnessRun(Findings):
    """Classifiers on one benchmark.

    Attributes:
        about: what was measured: ``benchmark, title, made`` ("stored" or "on the fly"), ``origin, clean_origin, set,
            seed, severities, corruptions, images, classes, predictions_among, subset, notes, broken``.
        results: figures of each model, see :func:`lrface.benchmarks.robustness.robustness_figures`, with ``model`` and
            ``model_sha256``, and where such sets were asked for ``shifted``: ``origin, images, error, error_interval`` of
            each.
        models: how each was prepared.
    """

    models: list[ReportModel] = field(default_factory=list)

    def to_text(self) -> str:
        """What is printed."""
        return robustness_text(self.about, self.results)

    def page(self) -> str:
        """The report as one HTML page that needs nothing else."""
        return robustness_page(self.about, self.results, self.models)


def run_robustness(
    models: Sequence[str],
    benchmark: str | Path,
    clean: str | Path | None = None,
    *,
    data: str | Path | None = None,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    held_out: bool = False,
    classes: str | None = None,
    subset: str | None = None,
    shifted: Sequence[str | Path] = (),
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    show_progress: bool = True,
) -> RobustnessRun:
    """Errors of classifiers on a corrupted benchmark.

    Args:
        models: see :func:`lrface.classifiers.open_classifier`.
        benchmark: imagenet_c, cifar10_c, tiny_imagenet_c, mnist_c or face_c, or the folder of a stored set. A name is
            looked for in ``data``, $LRFACE_DATA and ~/.cache/lrface; where it is not there, its images are made from
            ``clean`` on the fly: the same that ``lrface corrupt`` writes, after the same JPEG compression.
        clean: clean images with classes, see :func:`lrface.benchmarks.image_sets.open_images`.
        corruptions, severities, held_out: which; all 15 at all severities without.
        classes: only these, see :func:`lrface.benchmarks.robustness.class_subset`; guesses are then among them.
        subset: only these images, see :func:`lrface.benchmarks.robustness.image_subset`.
        shifted: further clean images of the same classes from elsewhere, such as CIFAR-10.1, read as ``clean`` is; each
            has an error of its own.
        seed: of the corruptions made on the fly.
        workers: threads that read images; None for one a core.

    Raises:
        UsageError: unknown names, or a model that does not fit the benchmark.
        LrfaceError: images or models that are not there or cannot be read.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size: at least 1 is needed; found {batch_size}")
    if not models:
        raise UsageError("robustness: at least one model is needed")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    stored, kind = _stored(benchmark, data)
    if stored is None and clean is None:
        raise LrfaceError(
            f"{kind.title} is not on this machine: put it into {kind.name}/ below --data, $LRFACE_DATA or "
            f"~/.cache/lrface, or give clean images to corrupt: --clean PATH"
        )
    description = {} if stored is None else stored.description
    if stored is not None and not corruptions and "corruptions" in description:
        names = [name for name in description["corruptions"] if name in kind.names]
        names += [name for name in description["corruptions"] if name in kind.held_out and held_out]
    else:
        names = chosen_corruptions(kind, corruptions, held_out)
    levels = chosen_severities(
        kind, severities or (description.get("severities", ()) if kind.name != "mnist_c" else ())
    )
    clean_images = open_images(clean, data) if clean is not None else None
    others = [open_images(path, data) for path in shifted]
    if stored is not None and clean_images is None:
        clean_images = stored.clean
    conditions = [(name, level) for name in names for level in levels]
    reference = stored.open(*conditions[0]) if stored is not None else clean_images
    assert reference is not None
    wanted_classes = None if classes is None else class_subset(classes)
    wanted_images = None if subset is None else image_subset(subset)
    rows = _selected(reference, wanted_classes, wanted_images, classes or "", subset or "")

    other_rows = [_selected(images, wanted_classes, None, classes or "", "") for images in others]
    judges = []
    for text in dict.fromkeys(models):
        classifier = open_classifier(text, kind.side, kind.channels, device)
        judges.append(
            _Judge(classifier, _outputs(classifier, reference, wanted_classes), wanted_classes is not None)
        )
        for images in others if clean_images is None else (clean_images, *others):
            _outputs(classifier, images, wanted_classes)  # refused here, not after hours of corruptions
    broken: dict[str, str] = {}
    settings = _Settings(kind, seed, batch_size, workers, resolved(device), broken)
    if stored is None:
        _on_the_fly(judges, reference, rows, conditions, settings, show_progress)
    else:
        _from_stored(judges, stored, reference, rows, conditions, settings, show_progress)
        if clean_images is not None:
            clean_rows = _selected(clean_images, wanted_classes, wanted_images, classes or "", subset or "")
            _clean(judges, clean_images, clean_rows, wanted_classes, settings, show_progress)

    apart: dict[str, list[dict[str, Any]]] = {judge.classifier.name: [] for judge in judges}
    for images, chosen in zip(others, other_rows, strict=True):
        strangers = [_Judge(judge.classifier, _NOTHING, judge.restricted) for judge in judges]
        _clean(strangers, images, chosen, wanted_classes, settings, show_progress, str(images.origin))
        reason = next((why for name, why in broken.items() if name.startswith(f"{images.origin}: ")), "")
        for judge in strangers:
            apart[judge.classifier.name].append(_shifted_figures(judge, images, len(chosen), reason))

    notes = []
    alexnet = kind.name == "imagenet_c"
    if alexnet and wanted_classes is not None:
        alexnet = False
        notes.append("CE and mCE are not given: AlexNet's errors are those on all 1000 classes.")
    elif alexnet and tuple(levels) != SEVERITIES:
        alexnet = False
        notes.append("CE and mCE are not given: AlexNet's errors are means over severities 1 to 5.")
    elif not alexnet:
        notes.append(f"CE and mCE are not given: no errors of AlexNet on {kind.title} were published.")
    missing = [name for name in kind.names if name not in names]
    if missing:
        notes.append(f"Means are over {len(names)} corruptions; left out: {', '.join(missing)}.")
    if clean_images is None:
        notes.append("Without clean images (--clean) there is no clean error and no relative mCE.")
    if stored is None and kind.quality is not None:
        notes.append(
            f"Corrupted images were compressed as JPEG of quality {kind.quality}, as the published ones are."
        )
    labels = check_labels(reference)
    run = RobustnessRun(
        {
            "benchmark": kind.name,
            "title": kind.title,
            "made": "on the fly" if stored is None else "stored",
            "origin": str(clean if stored is None else stored.path),
            "clean_origin": None if clean_images is None else str(clean_images.origin),
            "set": kind.set if stored is None else None,
            "seed": seed if stored is None else None,
            "severities": levels,
            "corruptions": names,
            "images": len(rows),
            "classes": len(np.unique(labels[rows])),
            "predictions_among": "all classes of the model"
            if wanted_classes is None
            else f"the classes of {classes}",
            "subset": subset,
            "notes": notes,
            "broken": [list(pair) for pair in sorted(broken.items())],
        }
    )
    for judge in judges:
        figures = robustness_figures(judge.judged, kind, alexnet)
        classifier = judge.classifier
        if others:
            figures["shifted"] = apart[classifier.name]
        run.results.append({"model": classifier.name, "model_sha256": classifier.sha256, **figures})
        preparation = {
            "outputs": classifier.outputs,
            "images": f"{kind.side} x {kind.side} pixels, uint8 / 255",
            "described by": classifier.card.get("described_by", "its own card"),
        }
        run.models.append(ReportModel(classifier.name, classifier.sha256, classifier.card, preparation))
    return run


def _shifted_figures(judge: "_Judge", images: ImageSet, count: int, reason: str) -> dict[str, Any]:
    """What is said of a model on further clean images, in percent."""
    right = judge.judged.clean
    assert right is not None
    if (right == MISSING).all():
        raise LrfaceError(f"{images.origin}: none of its images can be used; the first: {reason}")
    low, high = np.quantile(resampled_errors([right])[:, 0], [0.025, 0.975])
    return {
        "origin": str(images.origin),
        "images": count,
        "error": round(100 * error_of(right), 4),
        "error_interval": [round(100 * float(low), 4), round(100 * float(high), 4)],
    }


def resolved(device: str) -> str:
    """ "auto" as the device it is."""
    from lrface.train.trainer import resolve_device

    return resolve_device(device)


def _stored(benchmark: str | Path, data: str | Path | None) -> tuple[StoredSet | None, Kind]:
    key = str(benchmark).lower().replace("-", "_")
    if key in BENCHMARKS and not Path(benchmark).is_dir():
        kind = BENCHMARKS[key]
        place = find_benchmark(kind, data)
        return (None if place is None else open_stored(place, kind)), kind
    path = Path(benchmark)
    if not path.is_dir():
        raise UsageError(
            f"--benchmark {benchmark}: neither a folder nor one of {', '.join(BENCHMARKS)}{nearest(key, BENCHMARKS)}"
        )
    if not is_stored_set(path) and key in BENCHMARKS:
        return None, BENCHMARKS[key]
    stored = open_stored(path)
    return stored, stored.kind


def _selected(
    images: ImageSet,
    classes: Sequence[str] | None,
    chosen: Callable[[str], bool] | None,
    classes_text: str,
    subset_text: str,
) -> NDArray[np.int64]:
    """Indices of the images that are meant. Raises UsageError when there are none."""
    labels = check_labels(images)
    keep = np.ones(len(images), dtype=bool)
    if classes is not None:
        if images.classes is None:
            raise UsageError(f"--classes {classes_text}: the classes of {images.origin} have no names")
        wanted = np.array([name in set(classes) for name in images.classes])
        keep &= wanted[labels]
        if not keep.any():
            raise UsageError(
                f"--classes {classes_text}: {images.origin} has none of these classes; it has "
                f"{', '.join(list(images.classes)[:3])}, ..."
            )
    if chosen is not None:
        keep &= np.array([chosen(name) for name in images.names])
        if not keep.any():
            raise UsageError(
                f"--subset {subset_text}: {images.origin} has none of these images; its names are like {images.names[0]}"
            )
    return np.flatnonzero(keep)


def _numbers_only(classes: Sequence[str] | None) -> bool:
    """Whether the names of classes are no more than their numbers."""
    return classes is None or all(name.isdigit() and int(name) == at for at, name in enumerate(classes))


def _outputs(
    classifier: Classifier, images: ImageSet, wanted: Sequence[str] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which output is right for each label, int64 [labels] (-1 for labels that are not meant), and the outputs that
    compete, int64 [k].

    Raises:
        UsageError: the model's classes are not the data's.
    """
    labels = check_labels(images)
    count = classifier.outputs
    names = None if _numbers_only(images.classes) else list(images.classes or [])
    if names is None:
        largest = int(labels.max())
        if largest >= count:
            raise UsageError(
                f"{classifier.name} tells {count} classes apart, labels of {images.origin} run to {largest}: these are not "
                "its classes"
            )
        return np.arange(largest + 1), np.arange(count)
    known = classifier.classes
    if known is None or not set(known) & set(names):
        ordered = imagenet_classes()
        if count == len(ordered) and set(names) <= set(ordered):
            known = list(ordered)
        elif known is None and len(names) == count:
            known = names
        else:
            told = "its classes have no names" if known is None else f"its first is {known[0]!r}"
            raise UsageError(
                f"{classifier.name} tells {count} classes apart ({told}), {images.origin} has {len(names)}, the first "
                f"{names[0]!r}: which output is which class is not known. Name them with @classes=FILE"
            )
    places = {name: at for at, name in enumerate(known)}
    meant = set(names) if wanted is None else set(names) & set(wanted)
    unknown = sorted(meant - places.keys())
    if unknown:
        raise UsageError(
            f"{classifier.name} does not know {len(unknown)} of the classes of {images.origin}, the first "
            f"{unknown[0]!r}{nearest(unknown[0], known)}; leave them out with --classes"
        )
    right = np.array([places[name] if name in meant else -1 for name in names], dtype=np.int64)
    if wanted is None:
        return right, np.arange(count)
    return right, np.array(sorted(places[name] for name in wanted if name in places), dtype=np.int64)


@dataclass
class _Settings:
    kind: Kind
    seed: int
    batch_size: int
    workers: int
    device: str
    broken: dict[str, str]


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))


class _Judge:
    """One classifier, and what it got right so far."""

    def __init__(
        self, classifier: Classifier, outputs: tuple[NDArray[np.int64], NDArray[np.int64]], restricted: bool
    ):
        self.classifier = classifier
        self.right_output, self.competing = outputs
        self.restricted = restricted
        self.judged = Judged({}, {} if len(self.competing) > 5 else None)

    def start(self, condition: tuple[str, int] | None, count: int) -> None:
        """Make room for ``count`` images of a condition; None for the clean ones."""
        one = np.full(count, MISSING, dtype=np.uint8)
        five = np.full(count, MISSING, dtype=np.uint8) if self.judged.right5 is not None else None
        if condition is None:
            self.judged.clean, self.judged.clean5 = one, five
        else:
            self.judged.right[condition] = one
            if self.judged.right5 is not None and five is not None:
                self.judged.right5[condition] = five

    def see(
        self,
        condition: tuple[str, int] | None,
        places: NDArray[np.int64],
        pixels: Tensor,
        labels: NDArray[np.int64],
    ) -> None:
        """Judge a batch: float32 [m, c, s, s]; ``places`` are theirs among the images of the condition."""
        scores = self.classifier.scores(pixels)
        right = torch.from_numpy(self.right_output[labels])
        if self.restricted:
            scores = scores[:, torch.from_numpy(self.competing)]
            right = torch.searchsorted(torch.from_numpy(self.competing), right)
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == right[:, None]
        if condition is None:
            one, five = self.judged.clean, self.judged.clean5
        else:
            one = self.judged.right[condition]
            five = None if self.judged.right5 is None else self.judged.right5[condition]
        assert one is not None
        one[places] = hits[:, 0].to(torch.uint8).numpy()
        if five is not None:
            five[places] = hits.any(dim=1).to(torch.uint8).numpy()


def _as_input(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [m, h, w, 3] or [m, h, w] -> float32 [m, c, h, w] in [0, 1]."""
    batch = torch.from_numpy(pixels)
    batch = batch[:, None] if batch.ndim == 3 else batch.permute(0, 3, 1, 2)
    return batch.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def _as_stored(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    return decode_image(store_lossy(image, quality))


def _on_the_fly(
    judges: Sequence[_Judge],
    images: ImageSet,
    rows: NDArray[np.int64],
    conditions: Sequence[tuple[str, int]],
    settings: _Settings,
    show_progress: bool,
) -> None:
    kind = settings.kind
    labels = check_labels(images)
    place_of = {int(row): place for place, row in enumerate(rows)}
    for judge in judges:
        for condition in (None, *conditions):
            judge.start(condition, len(rows))
    seen = 0
    total = len(rows) * (len(conditions) + 1)
    with (
        progress(total, f"robustness {kind.title}", unit="images", enabled=show_progress) as bar,
        ThreadPoolExecutor(max(1, settings.workers)) as pool,
    ):
        for found, pixels, failed in batches(
            lambda index: prepare(images.read(index), kind),
            rows.tolist(),
            settings.batch_size,
            settings.workers,
        ):
            settings.broken.update({images.names[index]: reason for index, reason in failed})
            bar.advance(len(failed) * (len(conditions) + 1))
            if not found:
                continue
            seen += len(found)
            places = np.array([place_of[index] for index in found])
            for judge in judges:
                judge.see(None, places, _as_input(pixels), labels[found])
            bar.advance(len(found))
            for name, level in conditions:
                strength = kind.strength(name, level)
                done = corrupt_images(pixels, name, strength, kind.set, settings.seed, settings.device)
                if kind.quality is not None:
                    done = np.stack(list(pool.map(_as_stored, done, [kind.quality] * len(done))))
                batch = _as_input(done)
                for judge in judges:
                    judge.see((name, level), places, batch, labels[found])
                bar.advance(len(found))
    if not seen:
        name, reason = next(iter(settings.broken.items()))
        raise LrfaceError(f"{images.origin}: none of its images can be used; the first: {name}: {reason}")


def _stored_image(images: ImageSet, kind: Kind) -> Callable[[int], NDArray[np.uint8]]:
    def read(index: int) -> NDArray[np.uint8]:
        image = images.read(index)
        wanted = (kind.side, kind.side, 3) if kind.channels == 3 else (kind.side, kind.side)
        if image.shape != wanted:
            raise BrokenImage(f"{kind.title} has images of {list(wanted)}; found {list(image.shape)}")
        return image

    return read


def _from_stored(
    judges: Sequence[_Judge],
    stored: StoredSet,
    reference: ImageSet,
    rows: NDArray[np.int64],
    conditions: Sequence[tuple[str, int]],
    settings: _Settings,
    show_progress: bool,
) -> None:
    kind = settings.kind
    labels = check_labels(reference)
    place_of = {int(row): place for place, row in enumerate(rows)}
    # Everything that is asked for has to be there before hours are spent on it.
    opened = {condition: stored.open(*condition) for condition in conditions[:1]}
    for condition in conditions:
        if condition not in stored.conditions:
            stored.open(*condition)
    total = len(rows) * len(conditions)
    with progress(total, f"robustness {kind.title}", unit="images", enabled=show_progress) as bar:
        for condition in conditions:
            images = opened.get(condition) or stored.open(*condition)
            where = f"{condition[0]} at severity {condition[1]}"
            _check_alike(reference, images, where)
            for judge in judges:
                judge.start(condition, len(rows))
            seen, reason = 0, ""
            for found, pixels, failed in batches(
                _stored_image(images, kind), rows.tolist(), settings.batch_size, settings.workers
            ):
                for index, why in failed:
                    settings.broken[f"{where}: {images.names[index]}"] = why
                    reason = reason or f"{images.names[index]}: {why}"
                bar.advance(len(found) + len(failed))
                if not found:
                    continue
                seen += len(found)
                places = np.array([place_of[index] for index in found])
                for judge in judges:
                    judge.see(condition, places, _as_input(pixels), labels[found])
            if not seen:
                raise LrfaceError(f"{images.origin}: none of its images can be used; the first: {reason}")


def _check_alike(reference: ImageSet, images: ImageSet, where: str) -> None:
    """Raises LrfaceError unless both hold the same images of the same classes."""
    if list(images.names) != list(reference.names):
        mine, other = set(reference.names), set(images.names)
        odd = sorted(mine ^ other)[0]
        lacks = images.origin if odd in mine else reference.origin
        raise LrfaceError(
            f"{where}: {len(images)} images, {len(reference)} at first; {lacks} lacks {odd}. Copy the set again"
        )
    if not np.array_equal(check_labels(images), check_labels(reference)):
        raise LrfaceError(f"{where}: labels of {images.origin} differ from those of {reference.origin}")


def _clean(
    judges: Sequence[_Judge],
    images: ImageSet,
    rows: NDArray[np.int64],
    wanted: Sequence[str] | None,
    settings: _Settings,
    show_progress: bool,
    what: str = "clean",
) -> None:
    """Clean errors beside a stored set; the clean images may have an order of their own."""
    kind = settings.kind
    labels = check_labels(images)
    place_of = {int(row): place for place, row in enumerate(rows)}
    for judge in judges:
        judge.right_output, judge.competing = _outputs(judge.classifier, images, wanted)
        judge.start(None, len(rows))
    with progress(len(rows), f"{what} images", unit="images", enabled=show_progress) as bar:
        for found, pixels, failed in batches(
            lambda index: prepare(images.read(index), kind),
            rows.tolist(),
            settings.batch_size,
            settings.workers,
        ):
            settings.broken.update({f"{what}: {images.names[index]}": reason for index, reason in failed})
            bar.advance(len(found) + len(failed))
            if not found:
                continue
            places = np.array([place_of[index] for index in found])
            for judge in judges:
                judge.see(None, places, _as_input(pixels), labels[found])
