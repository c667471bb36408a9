"""Face verification at several resolutions: a set of pairs, and the evaluation of an embedder on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrface.benchmarks.cache import FeatureStore, image_hashes
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.metrics import (
    accuracy_interval,
    area_under_curve,
    equal_error_rate,
    resolution_area,
    stratified_folds,
    verification_metrics,
)
from lrface.errors import LrfaceError, UsageError
from lrface.progress import progress as progress_bar

if TYPE_CHECKING:
    from lrface.data.source import FaceSource

Embed = Callable[[Tensor], Tensor]
"""float32 [n, 3, size, size], RGB in [0, 1] -> features [n, d], not necessarily of unit length."""

RESOLUTIONS = (112, 56, 28, 14)


@dataclass
class VerificationSet:
    """Aligned faces and the pairs to be judged. Each distinct image is held once.

    Attributes:
        name: what the rows of a result are called.
        images: uint8 [n, size, size, 3], RGB.
        left, right: int64 [p], indices into ``images``. In cross-resolution tests left is the gallery side.
        same: bool [p], True where both faces are of one identity.
        folds: int64 [p], at least two different numbers.
        unaligned: how many of the images are centre crops because no face was found in the photograph.
        origin: the file or folder it was read from, for messages and reports.
        native: float32 [n], how many pixels of the original image span each face (a crop's shorter side, or
            :func:`lrface.align.warp.effective_resolution`), not a number where unknown; None where it is for all.
    """

    name: str
    images: NDArray[np.uint8]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]
    unaligned: int = 0
    origin: str = ""
    native: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        where = f"benchmark {self.name}" + (f" ({self.origin})" if self.origin else "")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.shape[1] != self.images.shape[2]:
            raise LrfaceError(
                f"{where}: images must have shape [n, size, size, 3], got {list(self.images.shape)}"
            )
        if self.images.dtype != np.uint8:
            raise LrfaceError(f"{where}: images must be uint8, got {self.images.dtype}")
        self.left = np.asarray(self.left, dtype=np.int64)
        self.right = np.asarray(self.right, dtype=np.int64)
        self.same = np.asarray(self.same, dtype=bool)
        self.folds = np.asarray(self.folds, dtype=np.int64)
        shapes = {field: getattr(self, field).shape for field in ("left", "right", "same", "folds")}
        if len(set(shapes.values())) != 1 or self.left.ndim != 1:
            raise LrfaceError(
                f"{where}: left, right, same and folds need one entry a pair, got shapes {shapes}"
            )
        if len(self.left) == 0:
            raise LrfaceError(f"{where}: it has no pairs")
        for side in ("left", "right"):
            indices = getattr(self, side)
            if indices.min() < 0 or indices.max() >= len(self.images):
                raise LrfaceError(
                    f"{where}: {side} indexes images {indices.min()} to {indices.max()}, "
                    f"but there are {len(self.images)} images"
                )
        if self.native is not None and self.native.shape != (len(self.images),):
            raise LrfaceError(f"{where}: native sizes need one entry an image, got shape {self.native.shape}")

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.left)

    @property
    def size(self) -> int:
        """Width and height of the images in pixels."""
        return int(self.images.shape[1])

    @classmethod
    def from_source(
        cls,
        source: "FaceSource",
        left: ArrayLike,
        right: ArrayLike,
        same: ArrayLike,
        name: str,
        folds: ArrayLike | None = None,
    ) -> "VerificationSet":
        """Pairs of images of any :class:`~lrface.data.source.FaceSource`.

        Args:
            source: aligned faces, all of one square size; only images that a pair names are read.
            left, right: int [p], indices into the source.
            same: bool [p].
            name: name of the set.
            folds: int [p]; without it same and different pairs are dealt evenly into ten folds. (These folds
                may share identities; LFW's and CFP's own do not.)

        Raises:
            LrfaceError: an index outside the source, images of different sizes, no pairs.
        """
        left_indices = np.asarray(left, dtype=np.int64)
        right_indices = np.asarray(right, dtype=np.int64)
        labels = np.asarray(same, dtype=bool)
        used, inverse = np.unique(np.concatenate((left_indices, right_indices)), return_inverse=True)
        if len(used) == 0:
            raise LrfaceError(f"benchmark {name}: it has no pairs")
        if used[0] < 0 or used[-1] >= len(source):
            raise LrfaceError(
                f"benchmark {name}: pairs name images {used[0]} to {used[-1]}, the source has {len(source)}"
            )
        images = np.empty((0, 0, 0, 3), dtype=np.uint8)
        for position, index in enumerate(used):
            image = source.image(int(index))
            if position == 0:
                images = np.empty((len(used), *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise LrfaceError(
                    f"benchmark {name}: image {index} is {image.shape[1]}x{image.shape[0]}, image "
                    f"{used[0]} is {images.shape[2]}x{images.shape[1]}; aligned faces of one size are "
                    "needed (lrface align)"
                )
            images[position] = image
        return cls(
            name=name,
            images=images,
            left=inverse[: len(left_indices)],
            right=inverse[len(left_indices) :],
            same=labels,
            folds=stratified_folds(labels) if folds is None else np.asarray(folds, dtype=np.int64),
        )


def load_benchmark(
    benchmark: str | Path,
    data: str | Path | None = None,
    pairs: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    native: bool = False,
) -> VerificationSet:
    """Find and read a benchmark by name, or from a folder or file.

    ``benchmark`` is one of

    - a known name (``lfw``, ``agedb30``, ``cfp_fp``, ``cfp_ff``, ``calfw``, ``cplfw``, ``vgg2_fp``, ``xqlfw``,
      ``survface``), looked for in ``data``, then ``$LRFACE_DATA``, then ``~/.cache/lrface``;
    - an InsightFace verification pack, ``FILE.bin``;
    - a bcolz carray or memfile of InsightFace_Pytorch or AdaFace, ``NAME/`` with ``NAME_list.npy`` beside it;
    - a folder with ``pairs.txt`` in LFW's format beside photographs or aligned crops
      (``images/NAME/NAME_0001.jpg`` or ``NAME/NAME_0001.jpg``);
    - a folder of CFP, AgeDB, CALFW or CPLFW as their authors give it out, of photographs or of aligned crops
      (see :mod:`lrface.benchmarks.protocols`);
    - a packed directory (``lrface align SRC OUT``) with ``pairs.txt`` in it, or with ``pairs`` given.

    Photographs are aligned once; the result is kept under ``cache`` (default ``$LRFACE_CACHE``, then
    ``~/.cache/lrface``). With ``native``, a folder of pairs whose images are all at most 112 pixels wide and high is
    taken as faces that are small by themselves: each is enlarged whole, and counts as unaligned.

    Raises:
        UsageError: an unknown name, or a folder of no known layout.
        LrfaceError: a known benchmark that is not there (the message says what to put where), or broken data.
    """
    from lrface.benchmarks.carrays import load_carray
    from lrface.benchmarks.lfw import load_pairs_folder
    from lrface.benchmarks.locate import locate_benchmark
    from lrface.benchmarks.packs import load_pack
    from lrface.benchmarks.survface import VERIFICATION, find_survface, load_survface_pairs

    if Path(benchmark).name == VERIFICATION and Path(benchmark).is_dir():
        return load_survface_pairs(benchmark, show_progress)
    if str(benchmark).lower() in ("survface", "qmul-survface"):
        return load_survface_pairs(find_survface(VERIFICATION, data), show_progress)
    found = locate_benchmark(benchmark, data=data, pairs=pairs)
    if found.kind == "pack":
        return load_pack(found.path, found.name)
    if found.kind == "bcolz":
        return load_carray(found.path, found.name, show_progress)
    return load_pairs_folder(found, cache=cache, workers=workers, show_progress=show_progress, native=native)


def image_features(
    embed: Embed,
    images: NDArray[np.uint8],
    condition: Condition,
    *,
    name: str,
    flip: bool = True,
    down: str = "nearest",
    up: str = "bilinear",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    store: FeatureStore | None = None,
    hashes: NDArray[np.void] | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> NDArray[np.float32]:
    """Features float32 [n, d] of aligned faces uint8 [n, size, size, 3] under one condition, not of unit length.

    With ``flip`` the features of each image and of its mirror are summed. Known features come from ``store``
    (``hashes`` are those of the images), new ones go there.
    """
    total = len(images)
    wanted = np.arange(total)
    known = np.zeros(total, dtype=bool)
    if store is not None:
        assert hashes is not None
        known = store.known(hashes)
        wanted = np.flatnonzero(~known)
        advance(total - len(wanted))
    features: NDArray[np.float32] | None = None
    for start in range(0, len(wanted), batch_size):
        rows = wanted[start : start + batch_size]
        crops = torch.from_numpy(images[rows]).to(device)
        faces = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        # Noise is drawn by what the image shows, not by its place: the same image always gets the same.
        drawn = condition.noise or condition.corruption
        seeds = [int(np.sum(images[row], dtype=np.int64)) for row in rows] if drawn else []
        faces = condition.apply(faces, down, up, seeds)
        where = f"{name} at {condition.size or images.shape[1]} pixels"
        vectors = _checked_features(embed(faces), rows, total, where)
        if flip:
            vectors = vectors + _checked_features(embed(torch.flip(faces, dims=(3,))), rows, total, where)
        found = vectors.cpu().numpy()
        if features is None:
            features = np.empty((total, found.shape[1]), dtype=np.float32)
        features[rows] = found
        advance(len(rows))
    if store is not None and hashes is not None:
        if known.any():
            stored = store.get(hashes[known])
            if features is None:
                features = np.empty((total, stored.shape[1]), dtype=np.float32)
            features[known] = stored
        if len(wanted):
            assert features is not None
            store.put(hashes[wanted], features[wanted])
    assert features is not None
    return features


def _checked_features(vectors: Tensor, rows: NDArray[np.int64], total: int, where: str) -> Tensor:
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise LrfaceError(
            f"benchmark {where}: the model returned features of shape {list(vectors.shape)} for "
            f"{len(rows)} images; [{len(rows)}, d] is needed"
        )
    vectors = vectors.detach().float()
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        first = int(rows[int(torch.argmin(finite.to(torch.int8)))])
        raise LrfaceError(
            f"benchmark {where}: the model's features are not finite (first for image {first} of {total}); the "
            "checkpoint is broken or overflows at this precision"
        )
    return vectors


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100.0 * fraction, 4)


def _percents(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [round(100.0 * end, 4) for end in interval]


@dataclass
class Evaluation:
    """Rows of a result, and what they were computed from.

    Attributes:
        benchmark: the pairs.
        rows: one dict a combination of conditions, see :func:`evaluate_verification`.
        scores: cosines float64 [p] of each row.
        right: whether each pair was judged right under the thresholds of the folds, bool [p], of each row.
        features: unit vectors float32 [n, d] of all images, by condition.
        norms: lengths of the features before that, float64 [n], by condition: a measure of quality.
        errors: reconstruction errors of the images, float32 [n], by condition: another, where it was asked for.
    """

    benchmark: VerificationSet
    rows: list[dict[str, Any]]
    scores: list[NDArray[np.float64]]
    right: list[NDArray[np.bool_]]
    features: dict[Condition, NDArray[np.float32]]
    norms: dict[Condition, NDArray[np.float64]]
    errors: dict[Condition, NDArray[np.float32]] = field(default_factory=dict)


def evaluate_verification(
    embed: Embed,
    benchmark: VerificationSet,
    resolutions: Sequence[int] = RESOLUTIONS,
    flip: bool = True,
    down: str = "nearest",
    up: str = "bilinear",
    batch_size: int = 64,
    progress: bool = True,
    cross: bool = False,
    device: torch.device | str = "cpu",
    matrix: bool = False,
    degrade: Sequence[Condition] = (),
    store: Callable[[Condition], FeatureStore] | None = None,
    native: bool = False,
    reconstruction_errors: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Verification accuracy of an embedder with both images at each resolution, and across resolutions.

    Every image is embedded once a condition (twice with ``flip``: the features of the image and of its mirror are
    summed). Features are then scaled to unit length and pairs are scored by cosine. The threshold is chosen on all
    folds but one and applied to that one.

    Args:
        embed: float32 [n, 3, size, size] RGB in [0, 1] -> [n, d].
        benchmark: the pairs.
        resolutions: sizes in pixels. An image is brought down to the size and up again to its own.
        flip: whether features of the mirrored image are added.
        down, up: kernels, see :func:`lrface.degrade.resolution.resample`.
        batch_size: images that the model is given in one call.
        progress: whether a bar is shown on standard error.
        cross: add rows with the left image of each pair (gallery) at full size and the right one (probe) at
            each smaller resolution.
        device: where images are degraded and handed to ``embed``.
        matrix: rows for every gallery size against every probe size.
        degrade: further conditions; each gives a row with both images under it, and with ``cross`` one with the
            gallery untouched.
        store: gives the features kept from earlier calls under a condition.
        native: add a row with both images as they are, broken down by how many pixels of the original span the
            smaller face of a pair.
        reconstruction_errors: float32 [n, 3, size, size] -> [n]; measured under every condition, as a quality.

    Returns:
        Rows with ``benchmark, gallery_size, probe_size, gallery_losses, probe_losses, accuracy, accuracy_interval,
        accuracy_std, accuracy_insightface, auc, auc_interval, eer, eer_interval, tar_at_far, tar_interval,
        threshold, pairs, images, unaligned, folds, down, up, flip, by_native_size``. Accuracies, ``eer`` and
        ``tar_at_far`` are percentages, ``auc`` lies between 0 and 1, ``threshold`` is a cosine (the mean over
        folds); intervals are [low, high] at 95 %. A figure that the pairs cannot give is None. ``by_native_size``: see
        :func:`native_bins`, in the row that ``native`` asks for, else None.

    Raises:
        UsageError: a resolution that is not between 1 and the size of the images.
        LrfaceError: features that are not finite or of the wrong shape.
    """
    sizes = list(dict.fromkeys(resolutions))
    if native and benchmark.native is None:
        raise UsageError(
            f"--resolutions native: how large the faces of {benchmark.name} ({benchmark.origin}) were in their original "
            "images is not known (they are aligned crops of one size); give sizes in pixels such as 112,56,28,14"
        )
    if not sizes and not degrade and not native:
        raise UsageError("resolutions: at least one size in pixels is needed, for example 112,56,28,14")
    for size in sizes + [condition.size for condition in degrade if condition.size is not None]:
        if (
            isinstance(size, bool)
            or not isinstance(size, int | np.integer)
            or not 1 <= size <= benchmark.size
        ):
            raise UsageError(
                f"resolutions: {size!r} is not a whole number of pixels between 1 and {benchmark.size}, "
                f"the size of the images of {benchmark.name}"
            )
    if batch_size < 1:
        raise UsageError(f"batch_size: at least 1 is needed, got {batch_size}")
    full = benchmark.size
    plain = Condition()

    def at(size: int) -> Condition:
        return plain if size == full else Condition(size=int(size))

    extra = [replace(condition, size=None) if condition.size == full else condition for condition in degrade]
    combinations = ([(plain, plain)] if native else []) + [(at(size), at(size)) for size in sizes]
    if matrix:
        combinations += [(at(gallery), at(probe)) for gallery in sizes for probe in sizes if gallery != probe]
    if cross:
        combinations += [(plain, at(size)) for size in sizes if size != full]
    for condition in extra:
        combinations += [(condition, condition)] + ([(plain, condition)] if cross else [])
    combinations = list(dict.fromkeys(combinations))
    needed = list(dict.fromkeys(condition for pair in combinations for condition in pair))

    features: dict[Condition, NDArray[np.float32]] = {}
    norms: dict[Condition, NDArray[np.float64]] = {}
    hashes = None if store is None else image_hashes(benchmark.images)
    total = len(needed) * len(benchmark.images)
    with (
        progress_bar(total, f"verify {benchmark.name}", unit="images", enabled=progress) as bar,
        torch.no_grad(),
    ):
        for condition in needed:
            raw = image_features(
                embed,
                benchmark.images,
                condition,
                name=benchmark.name,
                flip=flip,
                down=down,
                up=up,
                batch_size=batch_size,
                device=device,
                store=None if store is None else store(condition),
                hashes=hashes,
                advance=bar.advance,
            )
            norms[condition] = np.linalg.norm(raw.astype(np.float64), axis=1)
            features[condition] = torch.nn.functional.normalize(torch.from_numpy(raw), dim=1).numpy()

    found = Evaluation(benchmark, [], [], [], features, norms)
    if reconstruction_errors is not None:
        with progress_bar(total, f"reconstruct {benchmark.name}", unit="images", enabled=progress) as bar:
            for condition in needed:
                found.errors[condition] = image_features(
                    lambda images: reconstruction_errors(images)[:, None],
                    benchmark.images,
                    condition,
                    name=benchmark.name,
                    flip=False,
                    down=down,
                    up=up,
                    batch_size=batch_size,
                    device=device,
                    advance=bar.advance,
                )[:, 0]
    for gallery, probe in combinations:
        left, right = features[gallery][benchmark.left], features[probe][benchmark.right]
        # float64 sums: two equal images then score exactly alike wherever they stand
        scores = np.einsum("pd,pd->p", left, right, dtype=np.float64)
        figures = verification_metrics(scores, benchmark.same, benchmark.folds)
        found.scores.append(scores)
        found.right.append(figures.right)
        found.rows.append(
            {
                "benchmark": benchmark.name,
                "gallery_size": int(gallery.size or full),
                "probe_size": int(probe.size or full),
                "gallery_losses": gallery.losses,
                "probe_losses": probe.losses,
                "accuracy": _percent(figures.accuracy),
                "accuracy_interval": _percents(figures.accuracy_interval),
                "accuracy_std": _percent(figures.accuracy_std),
                "accuracy_insightface": _percent(figures.accuracy_insightface),
                "auc": None if figures.auc is None else round(figures.auc, 6),
                "auc_interval": None
                if figures.auc_interval is None
                else [round(end, 6) for end in figures.auc_interval],
                "eer": _percent(figures.eer),
                "eer_interval": _percents(figures.eer_interval),
                "tar_at_far": {rate: _percent(value) for rate, value in figures.tar_at_far.items()},
                "tar_interval": {rate: _percents(value) for rate, value in figures.tar_interval.items()},
                "threshold": round(figures.threshold, 6),
                "pairs": len(benchmark),
                "images": len(benchmark.images),
                "unaligned": benchmark.unaligned,
                "folds": len(np.unique(benchmark.folds)),
                "down": down,
                "up": up,
                "flip": flip,
                "by_native_size": native_bins(benchmark, scores, figures.right)
                if native and gallery == probe == plain
                else None,
            }
        )
    return found


NATIVE_EDGES = (0, 12, 16, 24, 32, 48, 64, 96, 128)


def native_bins(
    benchmark: VerificationSet, scores: NDArray[np.float64], right: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Figures by the native size of a pair's smaller face: ``smallest`` (pixels, included), ``largest`` (excluded; None
    for no bound or, with ``smallest`` None too, for unknown sizes), ``pairs, same, accuracy, accuracy_interval, auc,
    eer``. Accuracy is under the thresholds that the folds of all pairs gave; bins without pairs are left out."""
    assert benchmark.native is not None
    size = np.minimum(benchmark.native[benchmark.left], benchmark.native[benchmark.right])
    edges: list[tuple[int | None, int | None]] = [*zip(NATIVE_EDGES, NATIVE_EDGES[1:], strict=False)]
    rows = []
    for smallest, largest in [*edges, (NATIVE_EDGES[-1], None), (None, None)]:
        if smallest is None:
            chosen = np.isnan(size)
        else:
            chosen = (size >= smallest) & (size < (np.inf if largest is None else largest))
        if not chosen.any():
            continue
        same = benchmark.same[chosen]
        both = bool(same.any()) and not bool(same.all())
        auc = area_under_curve(scores[chosen], same) if both else None
        rows.append(
            {
                "smallest": smallest,
                "largest": largest,
                "pairs": int(chosen.sum()),
                "same": int(same.sum()),
                "accuracy": _percent(float(right[chosen].mean())),
                "accuracy_interval": _percents(accuracy_interval(right[chosen], same)),
                "auc": None if auc is None else round(auc, 6),
                "eer": _percent(equal_error_rate(scores[chosen], same)) if both else None,
            }
        )
    return rows


def resolution_areas(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Area under the accuracy-resolution curve of each benchmark in percent, over same-size rows without other
    losses; see :func:`lrface.benchmarks.metrics.resolution_area`."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        plain = not (row["gallery_losses"] or row["probe_losses"] or row["by_native_size"])
        if row["gallery_size"] == row["probe_size"] and plain:
            curves.setdefault(row["benchmark"], {})[row["probe_size"]] = row["accuracy"]
    areas = {name: resolution_area(curve) for name, curve in curves.items()}
    return {name: round(area, 4) for name, area in areas.items() if area is not None}
