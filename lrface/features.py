"""What networks make of clean and degraded images: Figure 2 of paper 001 and what it shows as numbers. Above embed,
classifiers and benchmarks, below the command line.

    lrface features cifar10/test.parquet --model naive=RUN --model fitnet=RUN --model qualnet=RUN --out figure2.png

The same images (HQ) and the same degraded copies of them (LQ) go through every network; the vector before the last
layer, H(f(x)) in the paper, is scaled to unit length. t-SNE places the HQ and LQ features of one network together, a
panel each. The figures are computed in the feature space, not from the picture.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.corrupted import content_seeds
from lrface.benchmarks.image_sets import ImageSet, SourceImages, batches, check_labels, prepare
from lrface.benchmarks.images import open_images as open_faces
from lrface.benchmarks.locate import KNOWN_BENCHMARKS, locate_benchmark
from lrface.benchmarks.page import short_names
from lrface.benchmarks.report import Findings
from lrface.benchmarks.robustness import BENCHMARKS, Kind
from lrface.corrupt import named_set
from lrface.degrade.resolution import check_kernel
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, write_json, write_text
from lrface.progress import progress
from lrface.registry import nearest

# Petroff, "Accessible color sequences for data visualization" (2021): ten colours that colour-blind readers tell apart.
COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#832db6",
    "#717581",
    "#a96b59",
    "#e76300",
    "#92dadd",
    "#b9ac70",
    "#94a4a2",
)
PERPLEXITY = 30.0
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(kw_only=True)
class FeatureRun(Findings):
    """Networks on the same images, clean and degraded.

    Attributes:
        about: what was compared: ``data, classes`` (names), ``images`` (of each class), ``conditions``, ``down, up``,
            ``corruption_set, size, seed, perplexity, broken``.
        results: figures of each network, see :func:`feature_figures`, with ``name, model`` and ``model_sha256``.
        labels: int64 [n], the class of each image; ``images`` its name, ``degraded`` how its LQ copy was made.
        places: name -> float64 [2 n, 2], t-SNE of the HQ features, then of the LQ ones; empty without a picture.
    """

    labels: NDArray[np.int64]
    images: list[str]
    degraded: list[str]
    places: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def to_text(self) -> str:
        """What is printed."""
        names = [result["name"] for result in self.results]
        width = max(len(name) for name in [*names, "model"])
        count = ", ".join(f"{name} {number}" for name, number in self.about["images"].items())
        lines = [
            f"{self.about['data']}: images {count}; LQ: {', '.join(self.about['conditions'])}",
            "shift: distance between an image's HQ and LQ feature over the mean distance between classes; own image: LQ",
            "features whose nearest HQ feature is that of the same image; class: that of the nearest mean of HQ features.",
            f"{'model':{width}}  {'shift':>6} {'cosine':>7} {'own image':>10} {'class HQ':>9} {'class LQ':>9} "
            f"{'silhouette HQ':>14} {'LQ':>6}",
        ]
        for result in self.results:
            shift = "-" if result["relative_shift"] is None else f"{result['relative_shift']:.3f}"
            lines.append(
                f"{result['name']:{width}}  {shift:>6} {result['cosine']:7.3f} {result['own_image']:8.1f} % "
                f"{result['nearest_mean_hq']:7.1f} % {result['nearest_mean_lq']:7.1f} % {result['silhouette_hq']:14.3f} "
                f"{result['silhouette_lq']:6.3f}"
            )
        broken = self.about["broken"]
        lines += [f"{len(broken)} images left out, the first: {': '.join(broken[0])}"] if broken else []
        return "\n".join(lines)

    def coordinates(self) -> str:
        """The points of the picture as CSV: model, image, class, quality (HQ or LQ), degraded, x, y."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["model", "image", "class", "quality", "degraded", "x", "y"])
        classes = self.about["classes"]
        for name, places in self.places.items():
            for row, (x, y) in enumerate(places):
                number, low = row % len(self.labels), row >= len(self.labels)
                writer.writerow(
                    [
                        name,
                        self.images[number],
                        classes[self.labels[number]],
                        "LQ" if low else "HQ",
                        self.degraded[number] if low else "",
                        f"{x:.4f}",
                        f"{y:.4f}",
                    ]
                )
        return text.getvalue()


def run_features(
    models: Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    *,
    classes: str | int = 4,
    images: int = 100,
    resolution: int | None = None,
    conditions: Sequence[Condition] = (),
    down: str = "bicubic",
    up: str = "bicubic",
    corruption_set: str | None = None,
    perplexity: float | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> FeatureRun:
    """Features of networks on the same clean and degraded images; see this module.

    Args:
        models: ``NAME=MODEL`` or MODEL; see :func:`lrface.embed.parse_model`, and torchvision: and timm: as in
            :func:`lrface.classifiers.open_classifier`, whose last linear layer's input is taken.
        data: images with classes (identities), see :func:`open_data`.
        out: the picture, .png, .svg or .pdf. Beside it lie the figures as .json and the points as .csv. None: figures
            alone, without t-SNE.
        classes: how many, the first that have enough images; or names with commas between.
        images: of each class, drawn by ``seed``.
        resolution: images are brought down to this side in pixels and up again.
        conditions: further ways of degrading. Each image is degraded in one way: by turns where there are several.
            Without ``resolution`` and ``conditions`` to half the side, as in the paper's figure.
        down, up: kernels; bicubic as in the paper's figure.
        corruption_set: constants of corruptions, and how images are prepared, as ``lrface corrupt --set`` names them;
            None: those for the size that the networks take (32 cifar-c, 64 tiny-imagenet-c, 224 imagenet-c, else face).
        perplexity: of t-SNE; None for 30, or less where there are too few points for it.
        seed: of the choice of images, of corruptions and of t-SNE.
        root: folder that ``data`` is looked for in.

    Raises:
        UsageError: no such class, more classes than colours, networks that take images of different sizes, a perplexity
            that the number of points does not allow, or an unknown kernel, corruption or file suffix.
        LrfaceError: too few images of a class, images or networks that cannot be read, or features that are not finite
            or all the same.
    """
    if not models:
        raise UsageError("features: at least one --model is needed")
    if images < 2:
        raise UsageError(f"--images: at least 2 of each class are needed; found {images}")
    if batch_size < 1:
        raise UsageError(f"--batch-size: at least 1 is needed; found {batch_size}")
    check_kernel(down, "--down")
    check_kernel(up, "--up")
    file = None if out is None else Path(out)
    if file is not None and file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {file}: the suffix must be one of {', '.join(SUFFIXES)}")
    named = named_set(corruption_set) if corruption_set is not None else None
    networks = open_networks(models, device, named, say)
    size = _common_size(networks)
    sizes = {kind.side: kind for kind in BENCHMARKS.values() if kind.channels == 3}
    kind = named if named is not None else sizes.get(size, BENCHMARKS["face_c"])
    if kind.channels != 3:
        raise UsageError(f"--set: {kind.title} is of grey images; networks here take RGB")
    ways = _ways(resolution, conditions, size)

    found = open_data(data, root, show_progress)
    names = _class_names(found, networks)
    chosen = choose_classes(found, names, classes, images)
    order = [
        int(index)
        for label in chosen
        for index in np.random.default_rng([seed, label]).permutation(
            np.flatnonzero(check_labels(found) == label)
        )[:images]
    ]
    threads = len(os.sched_getaffinity(0)) if workers is None else workers
    rows, pixels, broken = _read(found, order, kind, size, batch_size, threads)
    position = {label: number for number, label in enumerate(chosen)}
    labels = np.array([position[int(check_labels(found)[row])] for row in rows], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(chosen))
    for number, label in enumerate(chosen):
        if counts[number] < 2:
            raise LrfaceError(
                f"{found.origin}: {counts[number]} images of {names[label]} can be read, at least 2 are needed"
                + (f"; the first that cannot: {': '.join(broken[0])}" if broken else "")
            )
    points = 2 * len(rows)
    if file is not None:
        perplexity = _perplexity(perplexity, points)

    turn = np.concatenate([np.arange(count) for count in counts]) % len(ways)
    high = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div(255.0).contiguous()
    low = _degraded(high, pixels, turn, ways, down, up, kind.set, seed)
    run = FeatureRun(
        {
            "data": str(data),
            "classes": [names[label] for label in chosen],
            "images": {names[label]: int(counts[number]) for number, label in enumerate(chosen)},
            "conditions": [_way(condition) for condition in ways],
            "down": down,
            "up": up,
            "corruption_set": kind.set,
            "size": size,
            "seed": seed,
            "perplexity": None if file is None else perplexity,
            "broken": [list(pair) for pair in broken],
        },
        labels=labels,
        images=[found.names[row] for row in rows],
        degraded=[_way(ways[number]) for number in turn],
    )
    steps = points * len(networks)
    with progress(steps, f"features of {found.origin}", unit="images", enabled=show_progress) as bar:
        for network in networks:
            clean, degraded = (_features(network, part, batch_size, bar.advance) for part in (high, low))
            figures = feature_figures(clean, degraded, labels)
            run.results.append(
                {"name": network.name, "model": network.text, "model_sha256": network.sha256, **figures}
            )
            if file is not None:
                assert perplexity is not None
                run.places[network.name] = _places(np.concatenate([clean, degraded]), perplexity, seed)
    if file is not None:
        draw_features(run, file)
        write_json(file.with_suffix(".json"), run.to_json())
        write_text(file.with_suffix(".csv"), run.coordinates())
    return run


# -------------------------------------------------------------------------------------------------- networks, images


@dataclass
class Network:
    """One network: ``features``: float32 [n, 3, size, size] RGB in [0, 1] -> [n, d]; ``card``: what goes in."""

    name: str
    text: str
    sha256: str
    size: int
    classes: Sequence[str] | None
    features: Callable[[Tensor], Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)


def parse_named(text: str) -> tuple[str | None, str]:
    """ "naive=runs/naive" -> ("naive", "runs/naive"); a path, or options behind an @, are no name."""
    name, equals, model = text.partition("=")
    if (
        not equals
        or not name.strip()
        or not model
        or any(mark in name for mark in "@/\\")
        or Path(text).exists()
    ):
        return None, text
    return name.strip(), model.strip()


def open_networks(
    models: Sequence[str], device: str, kind: Kind | None, say: Callable[[str], None]
) -> list[Network]:
    """The networks that command lines name. Raises UsageError where two have one name."""
    from lrface.evaluation import check_described

    parsed = [parse_named(text) for text in models]
    short = short_names([model for _, model in parsed])
    names = [short[model] if name is None else name for name, model in parsed]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--model: two models are called {name!r}; name them apart: --model NAME=MODEL")
    networks = []
    for name, (_, text) in zip(names, parsed, strict=True):
        if text.startswith(("torchvision:", "timm:")):
            networks.append(_classifier(name, text, device, kind))
            continue
        if text.startswith("open_clip:"):
            from lrface.zero_shot import open_clip_network

            networks.append(open_clip_network(name, text, device))
            continue
        from lrface.embed import open_model

        embedder = open_model(text, device=device)
        check_described(embedder, say)
        said = embedder.card.get("training", {}).get("classes")
        networks.append(
            Network(
                name,
                text,
                embedder.model_sha256,
                embedder.input_size,
                said if isinstance(said, list) else None,
                embedder.embed_tensor,
                embedder.card,
            )
        )
    return networks


def _classifier(name: str, text: str, device: str, kind: Kind | None) -> Network:
    """A classifier of torchvision or timm: what goes into its last linear layer."""
    from lrface.classifiers import open_classifier

    size = 224 if kind is None else kind.side
    classifier = open_classifier(text, size, 3, device)
    network = classifier.network
    assert isinstance(network, nn.Module)
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UsageError(f"model {text}: it has no linear layer whose input could be its feature")
    taken: list[Tensor] = []
    linear[-1].register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].float().cpu()))

    def features(images: Tensor) -> Tensor:
        taken.clear()
        classifier.scores(images)
        if len(taken) != 1 or taken[0].ndim != 2:
            raise LrfaceError(
                f"model {text}: what goes into its last linear layer is not one vector an image"
            )
        return taken[0]

    return Network(name, text, classifier.sha256, size, classifier.classes, features, classifier.card)


def _common_size(networks: Sequence[Network]) -> int:
    first = networks[0]
    for other in networks[1:]:
        if other.size != first.size:
            raise UsageError(
                f"--model: {other.text} takes images of {other.size}x{other.size} pixels, {first.text} of "
                f"{first.size}x{first.size}; all models must see the same images"
            )
    return first.size


def open_data(data: str | Path, root: str | Path | None = None, show_progress: bool = True) -> ImageSet:
    """Images with classes: a path, as it stands or below ``root``, $LRFACE_DATA or ~/.cache/lrface, to what
    :func:`lrface.benchmarks.image_sets.open_images` reads, or a face benchmark by name or path, whose faces are then
    aligned.

    Raises:
        LrfaceError: nothing there that can be read. UsageError: it has no classes.
    """
    from lrface.benchmarks.image_sets import open_images
    from lrface.recipes import find_data

    if str(data) in KNOWN_BENCHMARKS and not Path(data).exists():
        faces = open_faces(data, root, aligned=True, show_progress=show_progress)
        return SourceImages(faces.name, faces.source)
    try:
        place = find_data(str(data), root)
    except LrfaceError as error:
        raise LrfaceError(
            f"{data}: no such images as it stands, below --data, $LRFACE_DATA or ~/.cache/lrface, nor a face benchmark "
            f"({', '.join(KNOWN_BENCHMARKS)})"
        ) from error
    if place.suffix == ".bin" or place.is_dir() and _is_benchmark(place):
        faces = open_faces(place, root, aligned=True, show_progress=show_progress)
        return SourceImages(faces.name, faces.source)
    return open_images(place)


def _is_benchmark(place: Path) -> bool:
    try:
        return locate_benchmark(place) is not None
    except UsageError:
        return False


def _class_names(images: ImageSet, networks: Sequence[Network]) -> list[str]:
    """Names of the classes by label: the data's own; where those are mere numbers, a network's that has as many."""
    count = int(check_labels(images).max()) + 1
    names = [str(number) for number in range(count)] if images.classes is None else list(images.classes)
    if not all(name.isdigit() and int(name) == number for number, name in enumerate(names)):
        return names
    known = next((network.classes for network in networks if network.classes), None)
    return list(known) if known is not None and len(known) == len(names) else names


def choose_classes(images: ImageSet, names: Sequence[str], classes: str | int, wanted: int) -> list[int]:
    """Labels of the classes that are shown; arguments as in :func:`run_features`.

    Raises:
        UsageError: no such class, one named twice, fewer than 2, or more than there are colours.
        LrfaceError: too few images of a class, or too few classes that have enough.
    """
    counts = np.bincount(check_labels(images), minlength=len(names))
    text = str(classes).strip()
    number = (
        int(text) if text.removeprefix("-").isdecimal() else None
    )  # a class called 4 is named with another: 4,7
    asked = [part.strip() for part in text.split(",") if part.strip()] if number is None else []
    shown = len(asked) if number is None else number
    if not 2 <= shown <= len(COLOURS):
        raise UsageError(
            f"--classes {classes}: from 2 to {len(COLOURS)} classes can be told apart by their colours; found {shown}"
        )
    if number is not None:
        enough = [label for label in range(len(names)) if counts[label] >= wanted]
        if len(enough) < number:
            most = sorted(counts.tolist(), reverse=True)[:number]
            raise LrfaceError(
                f"{images.origin}: {len(enough)} classes have {wanted} images, {number} are wanted; the largest have "
                f"{', '.join(map(str, most))}: ask for fewer with --images"
            )
        return enough[:number]
    labels = []
    for name in asked:
        if name not in names:
            raise UsageError(
                f"--classes: {images.origin} has no class {name!r}{nearest(name, names)}; it has "
                f"{', '.join(list(names)[:10])}{', ...' if len(names) > 10 else ''}"
            )
        label = list(names).index(name)
        if label in labels:
            raise UsageError(f"--classes: {name!r} is named twice")
        if counts[label] < wanted:
            raise LrfaceError(
                f"{images.origin}: class {name} has {counts[label]} images, {wanted} are wanted; ask for fewer with "
                "--images"
            )
        labels.append(label)
    return labels


def _read(
    images: ImageSet, order: Sequence[int], kind: Kind, size: int, batch_size: int, workers: int
) -> tuple[list[int], NDArray[np.uint8], list[tuple[str, str]]]:
    """The images that can be read, uint8 [m, size, size, 3], which they are, and what could not with its reason."""

    def read(index: int) -> NDArray[np.uint8]:
        image = images.read(index)
        return image if image.shape == (size, size, 3) else prepare(image, kind)

    rows: list[int] = []
    parts: list[NDArray[np.uint8]] = []
    broken: list[tuple[str, str]] = []
    for good, pixels, failed in batches(read, order, batch_size, workers):
        rows += good
        parts += [pixels] if good else []
        broken += [(images.names[index], reason) for index, reason in failed]
    if not rows:
        raise LrfaceError(
            f"{images.origin}: none of its images can be used; the first: {': '.join(broken[0])}"
        )
    together = np.concatenate(parts)
    if together.shape[1:] != (size, size, 3):
        height, width = together.shape[1:3]
        raise UsageError(
            f"the models take images of {size}x{size} pixels, those of {images.origin} are {width}x{height}; faces are "
            "brought to size by `lrface align`"
        )
    return rows, together, broken


# ---------------------------------------------------------------------------------------------------------- degrading


def _ways(resolution: int | None, conditions: Sequence[Condition], size: int) -> list[Condition]:
    ways = list(conditions)
    if resolution is not None:
        ways.insert(0, Condition(size=resolution))
    if not ways:
        ways = [Condition(size=size // 2)]
    for way in ways:
        if way.size is not None and not 1 <= way.size < size:
            raise UsageError(
                f"--resolution {way.size}: the models take images of {size} pixels; give from 1 to {size - 1}"
            )
    return ways


def _way(condition: Condition) -> str:
    """A way of degrading for people: "16 px", "fog:3", "16 px, jpeg=30"."""
    parts = [f"{condition.size} px"] if condition.size is not None else []
    return ", ".join([*parts, *([condition.losses] if condition.losses else [])])


def _degraded(
    high: Tensor,
    pixels: NDArray[np.uint8],
    turn: NDArray[np.int64],
    ways: Sequence[Condition],
    down: str,
    up: str,
    corruption_set: str,
    seed: int,
) -> Tensor:
    """float32 [n, 3, s, s]: image i degraded in the way ``turn[i]``. What becomes of an image depends on its pixels."""
    low = torch.empty_like(high)
    for number, way in enumerate(ways):
        chosen = np.flatnonzero(turn == number)
        if not len(chosen):
            continue
        salt = f"features {corruption_set} {_way(way)} {seed}"
        seeds = (content_seeds(pixels[chosen], salt) & 2**62 - 1).tolist()
        low[chosen] = way.apply(high[chosen], down, up, seeds, corruption_set)
    return low


# ------------------------------------------------------------------------------------------------ features and figures


def _features(
    network: Network, images: Tensor, batch_size: int, advance: Callable[[int], None]
) -> NDArray[np.float32]:
    """Of unit length, float32 [n, d]. Raises LrfaceError where they are not finite, or all the same."""
    parts = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        parts.append(network.features(part).detach().float().cpu())
        advance(len(part))
    found = torch.cat(parts)
    if not bool(torch.isfinite(found).all()):
        raise LrfaceError(f"model {network.text}: its features are not finite; its weights are broken")
    if bool((found == found[0]).all()):
        raise LrfaceError(f"model {network.text} gives the same feature for every image")
    return nn.functional.normalize(found, dim=1).numpy()


def feature_figures(
    high: NDArray[np.float32], low: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """What Figure 2 shows, as numbers.

    Args:
        high, low: float [n, d], features of the same images clean (HQ) and degraded (LQ), of unit length.
        labels: int64 [n], classes 0 to k - 1, each of at least 2 images.

    Returns:
        shift: mean distance between an image's HQ and LQ feature.
        between_classes: mean distance between the means of two classes' HQ features.
        relative_shift: the first over the second; None where the second is 0.
        cosine: mean, of an image's HQ and LQ feature.
        own_image: percent of LQ features whose nearest HQ feature among all is that of their own image.
        nearest_mean_hq, nearest_mean_lq: percent of features that lie nearest to the mean HQ feature of their own class,
            which is taken without the image itself.
        silhouette_hq, silhouette_lq: mean silhouette of the classes, -1 to 1 (Rousseeuw 1987).
    """
    from sklearn.metrics import silhouette_score

    first, second = high.astype(np.float64), low.astype(np.float64)
    classes = int(labels.max()) + 1
    counts = np.bincount(labels, minlength=classes)
    sums = np.stack([first[labels == label].sum(axis=0) for label in range(classes)])
    means = sums / counts[:, None]
    apart = _distances(means, means)[np.triu_indices(classes, 1)]
    shift, between = float(np.linalg.norm(first - second, axis=1).mean()), float(apart.mean())
    without = (sums[labels] - first) / (counts[labels] - 1)[:, None]

    def right(features: NDArray[np.float64]) -> float:
        distances = _distances(features, means)
        distances[np.arange(len(labels)), labels] = np.linalg.norm(features - without, axis=1)
        return float(100 * np.mean(distances.argmin(axis=1) == labels))

    own = _distances(second, first).argmin(axis=1) == np.arange(len(labels))
    figures = {
        "shift": shift,
        "between_classes": between,
        "relative_shift": shift / between if between > 0 else None,
        "cosine": float(np.sum(first * second, axis=1).mean()),
        "own_image": float(100 * np.mean(own)),
        "nearest_mean_hq": right(first),
        "nearest_mean_lq": right(second),
        "silhouette_hq": float(silhouette_score(first, labels)),
        "silhouette_lq": float(silhouette_score(second, labels)),
    }
    return {name: None if value is None else round(value, 6) for name, value in figures.items()}


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean, float64 [len(a), len(b)]."""
    from scipy.spatial.distance import cdist

    return cdist(a, b)


def _perplexity(wanted: float | None, points: int) -> float:
    """t-SNE looks at three times as many neighbours as its perplexity (van der Maaten, JMLR 2014)."""
    most = (points - 1) / 3
    if wanted is None:
        return round(min(PERPLEXITY, most), 4)
    if not 1 <= wanted <= most:
        raise UsageError(
            f"--perplexity {wanted:g}: {points} points, HQ and LQ together, allow from 1 to {most:.4g}; take more --images"
        )
    return wanted


def _places(features: NDArray[np.float32], perplexity: float, seed: int) -> NDArray[np.float64]:
    """t-SNE (van der Maaten and Hinton, JMLR 2008), float64 [n, 2], to four decimals."""
    from sklearn.manifold import TSNE

    start = "pca" if features.shape[1] > 1 else "random"
    found = TSNE(2, init=start, random_state=seed, perplexity=perplexity).fit_transform(features)
    return np.round(found.astype(np.float64), 4)


# ----------------------------------------------------------------------------------------------------------- drawing


def draw_features(run: FeatureRun, path: str | Path) -> None:
    """The picture: a panel a network, a colour a class, dots for HQ and lighter crosses for LQ features.

    Raises:
        LrfaceError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    file = Path(path)
    classes = run.about["classes"]
    columns = len(run.places) if len(run.places) <= 4 else 3
    rows = -(-len(run.places) // columns)
    spans = [np.ptp(places, axis=0) for places in run.places.values()]
    aspect = float(np.clip(max(y / x for x, y in spans), 0.6, 1.2))
    width = max(4.4 * columns, 6.0)

    def mark(colour: str, marker: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, markersize=6.5, color=colour, label=label)

    ways = run.about["conditions"]
    degraded = ", ".join(ways) if len(ways) <= 2 else f"{len(ways)} ways of degrading"
    entries = [mark(COLOURS[number], "o", name) for number, name in enumerate(classes)]
    entries += [mark("#333333", "o", "HQ (clean)"), mark("#999999", "x", f"LQ ({degraded})")]
    longest = max(len(entry.get_label()) for entry in entries)  # type: ignore[arg-type]
    fitting = max(1, min(len(entries), int(width * 9.5 / (longest + 5))))
    lines = -(-len(entries) // fitting)
    height = (width / columns * aspect + 0.75) * rows + 0.25 * lines + 0.35
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    figures: dict[str, Mapping[str, Any]] = {result["name"]: result for result in run.results}
    count = len(run.labels)
    large = max(5.0, min(24.0, 6000 / count))
    light = [_lighter(colour) for colour in COLOURS]
    for panel, (name, places) in zip(panels, run.places.items(), strict=False):
        # Points of all classes lie over each other in a drawn order, not the last class on top of all.
        order = np.random.default_rng(0).permutation(2 * count)
        for low in (True, False):
            chosen = order[(order >= count) == low]
            shown = (light if low else COLOURS)[: len(classes)]
            panel.scatter(
                *places[chosen].T,
                c=[shown[run.labels[row % count]] for row in chosen],
                marker="x" if low else "o",
                s=large * (1.5 if low else 1.0),  # to be seen below its dot where both fall together
                linewidths=0.9 if low else 0.3,
                **({} if low else {"edgecolors": "white"}),
            )
        panel.set_title(name, fontsize=12, fontweight="bold")
        panel.set_xlabel(_caption(figures[name]), fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_box_aspect(aspect)
        panel.set_aspect("equal", adjustable="datalim")
        panel.spines[:].set_color("#bbbbbb")
        panel.margins(0.04)
    for panel in panels[len(run.places) :]:
        panel.set_visible(False)
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=fitting,
        frameon=False,
        fontsize=9.5,
        handletextpad=0.2,
    )
    kind = file.suffix.lstrip(".").lower()
    dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "lrface"}), atomic_file(file) as aside:
        canvas.print_figure(aside, dpi=160, format=kind, metadata=dates.get(kind))


def _caption(figures: Mapping[str, Any]) -> str:
    shift = "-" if figures["relative_shift"] is None else f"{figures['relative_shift']:.2f}"
    return (
        f"HQ to LQ: {shift} of the distance between classes\n"
        f"nearest class mean: HQ {figures['nearest_mean_hq']:.1f} %, LQ {figures['nearest_mean_lq']:.1f} %"
    )


def _lighter(colour: str, share: float = 0.45) -> str:
    """A colour mixed with white."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)
