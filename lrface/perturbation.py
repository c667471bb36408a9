"""How much noise classifiers bear: what `lrface perturbation` does. Above classifiers and benchmarks, below the command
line.

Gaussian and uniform noise need nothing but the classifier; adversarial noise comes from generators that are trained against
it (paper 004, sections 3.2.1 and 4.3, Tables 2 and 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrface.benchmarks.image_sets import ImageSet, batches, check_labels, open_images, prepare
from lrface.benchmarks.perturbation import finite, lengths, median_size, size_figures, smallest_gamma
from lrface.benchmarks.report import Findings
from lrface.benchmarks.robustness import BENCHMARKS, Kind
from lrface.classifiers import Classifier, open_classifier
from lrface.data.decode import BrokenImage
from lrface.degrade.rescaling import rescale
from lrface.errors import LrfaceError, UsageError
from lrface.models.noise import NOISE_GENERATORS, NoiseGenerator
from lrface.progress import Progress, progress
from lrface.registry import nearest
from lrface.robustness import _outputs, resolved

NOISES = ("gaussian", "uniform", "adversarial")
_BY_SIDE = {(32, 3): "cifar10_c", (64, 3): "tiny_imagenet_c", (112, 3): "face_c", (28, 1): "mnist_c"}


@dataclass
class LabelledImages:
    """Images in memory, as a classifier takes them.

    Attributes:
        set: where they come from.
        kind: how they were prepared.
        pixels: uint8 [n, c, s, s].
        labels: int64 [n].
        names: of each.
        broken: what could not be read, with its reason.
    """

    set: ImageSet
    kind: Kind
    pixels: Tensor
    labels: NDArray[np.int64]
    names: list[str]
    broken: dict[str, str]

    def float(self, rows: Tensor | slice) -> Tensor:
        """float32 [k, c, s, s] in [0, 1]."""
        return self.pixels[rows].float().div_(255)


def read_labelled(
    path: str | Path, count: int | None = None, seed: int = 0, show_progress: bool = True
) -> LabelledImages:
    """Images with classes, see :func:`lrface.benchmarks.image_sets.open_images`.

    Images of 28 (grey), 32, 64 and 112 pixels are taken as they are; all others as ImageNet's are: the shorter side brought
    to 256 pixels, the middle 224 cut out.

    Args:
        count: so many, drawn from all of them by ``seed``; None for all.

    Raises:
        UsageError: a count below 1. LrfaceError: nothing that can be read.
    """
    if count is not None and count < 1:
        raise UsageError(f"--count: at least 1 is needed, or 0 for all; found {count}")
    images = open_images(path)
    labels = check_labels(images)
    rows = np.arange(len(images))
    if count is not None and count < len(images):
        rows = np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False))
    kind: Kind | None = None

    def read(index: int) -> NDArray[np.uint8]:
        image = images.read(index)
        return prepare(image, kind or _kind_of(image))

    pixels: list[NDArray[np.uint8]] = []
    used: list[int] = []
    broken: dict[str, str] = {}
    for index in rows.tolist():
        try:
            kind = _kind_of(images.read(index))
            break
        except (BrokenImage, LrfaceError):
            continue
    with progress(len(rows), "reading", enabled=show_progress) as bar:
        for good, found, failed in batches(read, rows.tolist(), 256, 2):
            broken.update({images.names[index]: reason for index, reason in failed})
            if good:
                used += good
                pixels.append(found)
            bar.advance(len(good) + len(failed))
    if kind is None or not used:
        name, reason = next(iter(broken.items()), ("", "it holds none"))
        raise LrfaceError(f"{path}: none of its images can be used; the first: {name}: {reason}")
    array = np.concatenate(pixels)
    array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return LabelledImages(
        images,
        kind,
        torch.from_numpy(np.ascontiguousarray(array)),
        labels[used],
        [images.names[index] for index in used],
        broken,
    )


def _kind_of(image: NDArray[np.uint8]) -> Kind:
    grey = image.ndim == 2 or bool((image[..., :1] == image).all()) and image.shape[0] == 28
    side = image.shape[0] if image.shape[0] == image.shape[1] else 0
    return BENCHMARKS[_BY_SIDE.get((side, 1 if grey and side == 28 else 3), "imagenet_c")]


@dataclass
class Judge:
    """A classifier on some images.

    right: which output is right for each image, int64 [n].
    """

    classifier: Classifier
    right: Tensor

    def wrong(self, images: Tensor, rows: Tensor) -> Tensor:
        """Whether it errs on images float [k, c, s, s], which are ``rows`` of all: bool [k]."""
        return self.classifier.scores(images).argmax(1) != self.right[rows]

    def scores(self, images: Tensor) -> Tensor:
        """Scores with gradients, on the network's device. Raises UsageError where it has none."""
        found = self.classifier.network(images)
        if images.requires_grad and not found.requires_grad:
            raise UsageError(
                f"{self.classifier.name} gives no gradients (an ONNX file cannot): adversarial noise and attacks need them"
            )
        return found.float()


def open_judge(model: str, images: LabelledImages, device: str) -> Judge:
    """Raises UsageError: a model without classes, for images of another size, or of other classes."""
    classifier = open_classifier(model, images.kind.side, images.kind.channels, device)
    right, _ = _outputs(classifier, images.set, None)
    return Judge(classifier, torch.from_numpy(right[images.labels]))


@dataclass(frozen=True)
class GeneratorSettings:
    """How a noise generator is trained against a classifier (paper 004, eq. 2 and appendix B).

    Attributes:
        name: noise1x1 or noise3x3 (lrface.models.noise).
        epsilon: L2 length of its noise on the images while it learns; None for the classifier's median for Gaussian noise,
            where it errs on half of the images: there the loss tells good noise from bad.
        steps, batch_size, learning_rate: of Adam. The paper's rate is 1e-4, "until convergence".
        depth: convolutions.
    """

    name: str = "noise1x1"
    epsilon: float | None = None
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    depth: int = 4

    def __post_init__(self) -> None:
        if self.name not in NOISE_GENERATORS.names():
            known = NOISE_GENERATORS.names()
            raise UsageError(
                f"--generator: unknown {self.name!r}{nearest(self.name, known)}; there are {', '.join(known)}"
            )
        for option, value in (("--steps", self.steps), ("--depth", self.depth)):
            if value < 1:
                raise UsageError(f"{option}: at least 1 is needed; found {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate must be above 0; found {self.learning_rate}")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise UsageError(f"--epsilon must be above 0; found {self.epsilon}")


def train_generator(
    judge: Judge,
    images: LabelledImages,
    settings: GeneratorSettings,
    epsilon: float,
    seed: int,
    device: str = "cpu",
    bar: Progress | None = None,
) -> tuple[NoiseGenerator, list[float]]:
    """A fresh generator, trained to raise the classifier's cross-entropy (eq. 2); the classifier stays as it is.

    Returns:
        The generator and the loss of each step.
    """
    channels = int(images.pixels.shape[1])
    generator = NOISE_GENERATORS.build(settings.name, channels=channels, depth=settings.depth, seed=seed)
    generator.to(device)
    adam = torch.optim.Adam(generator.parameters(), settings.learning_rate)
    draws = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(settings.steps):
        rows = torch.randint(len(images.pixels), (settings.batch_size,), generator=draws)
        clean = images.float(rows)
        normal = torch.randn(clean.shape, generator=draws)
        noisy = rescale(clean.to(device), generator(normal.to(device)), epsilon).images
        scores = judge.scores(noisy)
        loss = F.cross_entropy(scores, judge.right[rows].to(scores.device))
        adam.zero_grad(set_to_none=True)
        (-loss).backward()
        adam.step()
        losses.append(float(loss.detach()))
        if bar is not None:
            bar.advance(settings.batch_size, loss=f"{losses[-1]:.3f}")
    return generator.eval().requires_grad_(False), losses


Sampler = Callable[[Tensor, int], Tensor]
"""Shape-giving images float [k, c, s, s] and the number of the first -> noise of the same shape."""


def sampler(noise: str, seed: int, generator: NoiseGenerator | None = None) -> Sampler:
    """Noise that depends on the seed and the image's number alone, not on its batch."""

    def draw(images: Tensor, first: int) -> Tensor:
        drawn = []
        for number in range(first, first + len(images)):
            own = torch.Generator().manual_seed((seed << 32) + number)
            if noise == "uniform":
                drawn.append(torch.rand(images.shape[1:], generator=own).mul_(2).sub_(1))
            else:
                drawn.append(torch.randn(images.shape[1:], generator=own))
        normal = torch.stack(drawn)
        if generator is None:
            return normal
        with torch.no_grad():
            return generator(normal.to(next(generator.parameters()).device)).cpu()

    return draw


@dataclass
class Smallest:
    """The smallest perturbations of images: float64 [n] each."""

    gamma: NDArray[np.float64]
    size: NDArray[np.float64]


def smallest_sizes(
    judge: Judge, images: LabelledImages, draw: Sampler, batch_size: int, bar: Progress | None = None
) -> Smallest:
    """The smallest size of each image along the noise that ``draw`` gives it."""
    gammas, sizes = [], []
    for first in range(0, len(images.pixels), batch_size):
        clean = images.float(slice(first, first + batch_size))
        gamma, noise = smallest_gamma(
            lambda perturbed, rows, first=first: judge.wrong(perturbed, rows + first),  # type: ignore[misc]
            clean,
            draw(clean, first),
        )
        gammas.append(gamma.numpy())
        sizes.append(lengths(clean, noise, gamma).numpy())
        if bar is not None:
            bar.advance(len(clean))
    return Smallest(np.concatenate(gammas), np.concatenate(sizes))


class PerturbationRun(Findings):
    """Classifiers under noise.

    Attributes:
        about: ``origin, images, prepared_as, size, channels, seeds, generator, broken``.
        results: of each model ``model, model_sha256, clean_accuracy`` and ``noises``: by name what
            :func:`lrface.benchmarks.perturbation.size_figures` gives, for adversarial noise also ``epsilon`` and ``losses``
            (mean cross-entropy of the first and of the last tenth of the steps, for each generator). Infinity is None.
    """

    def to_text(self) -> str:
        """What is printed."""
        about = self.about
        side, channels = about["size"], about["channels"]
        lines = [
            f"{about['images']} images of {about['origin']}, {channels} x {side} x {side}",
            "median size (L2 over all values in [0, 1]) at which the classifier errs, paper 004, eq. 4; images that are "
            "wrong when clean count as 0, those that nothing changes as infinite",
        ]
        if about["broken"]:
            lines.append(f"{len(about['broken'])} images cannot be read; the first: {about['broken'][0][0]}")
        for result in self.results:
            lines.append(f"\n{result['model']}   clean {result['clean_accuracy']:.2f} %")
            lines.append(
                f"  {'noise':12} {'median':>9} {'+-':>7} {'of correct':>11} {'rms':>8} {'never':>7}   seeds"
            )
            for name, figures in result["noises"].items():
                spread = "" if figures["deviation"] is None else f"{figures['deviation']:.2f}"
                lines.append(
                    f"  {name:12} {_shown(figures['median'], 2):>9} {spread:>7} "
                    f"{_shown(figures['median_of_correct'], 2):>11} {_shown(figures['rms'], 4):>8} "
                    f"{100 * figures['unreached']:>6.1f}%   "
                    + ", ".join(_shown(value, 2) for value in figures["medians"])
                )
        return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"


def chosen_noises(names: Sequence[str]) -> list[str]:
    """Which kinds of noise, in the order of the paper's tables. Raises UsageError naming the nearest known one."""
    for name in names:
        if name not in NOISES:
            raise UsageError(
                f"--noise: unknown {name!r}{nearest(name, NOISES)}; there are {', '.join(NOISES)}"
            )
    return [name for name in NOISES if not names or name in names]


def run_perturbation(
    models: Sequence[str],
    images: str | Path,
    *,
    noises: Sequence[str] = (),
    count: int | None = 1000,
    seeds: int = 1,
    generators: int = 4,
    generator: GeneratorSettings | None = None,
    train_images: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 256,
    pictures: str | Path | None = None,
    show_progress: bool = True,
) -> PerturbationRun:
    """epsilon* of classifiers for Gaussian, uniform and adversarial noise.

    Args:
        models: see :func:`lrface.classifiers.open_classifier`.
        images: what is measured, see :func:`read_labelled`.
        count: how many of them, drawn by ``seed``; None for all.
        seeds: draws of Gaussian and uniform noise. generators: fresh generators, each from a seed of its own.
        generator: how they are trained.
        train_images: what they are trained on; the measured images themselves without (a generator has some thousand
            parameters and sees no image but through the loss).
        pictures: a folder for pictures, see :func:`lrface.noise_pictures.draw_boundary`.

    Raises:
        UsageError: unknown names, values out of range, a model that does not fit the images, or one without gradients.
        LrfaceError: images or models that are not there or cannot be read.
    """
    if not models:
        raise UsageError("perturbation: at least one model is needed")
    for option, value in (("--seeds", seeds), ("--generators", generators), ("--batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"{option}: at least 1 is needed; found {value}")
    if pictures is not None and Path(pictures).exists() and not Path(pictures).is_dir():
        raise UsageError(f"--pictures {pictures}: a folder is needed, and this is a file")
    wanted = chosen_noises(noises)
    settings = generator or GeneratorSettings()
    place = resolved(device)
    test = read_labelled(images, count, seed, show_progress)
    judges = [open_judge(model, test, device) for model in dict.fromkeys(models)]
    train = test if train_images is None else read_labelled(train_images, None, seed, show_progress)
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise UsageError(
            f"--train-images {train_images}: images of {list(train.pixels.shape[1:])}, those of {images} "
            f"{list(test.pixels.shape[1:])}"
        )
    run = PerturbationRun(
        {
            "origin": str(images),
            "images": len(test.pixels),
            "prepared_as": test.kind.name,
            "size": test.kind.side,
            "channels": test.kind.channels,
            "seed": seed,
            "seeds": seeds,
            "generators": generators if "adversarial" in wanted else 0,
            "generator": vars(settings) if "adversarial" in wanted else None,
            "trained_on": str(images if train_images is None else train_images),
            "broken": [list(pair) for pair in sorted(test.broken.items())],
        }
    )
    values = int(test.pixels[0].numel())
    drawn: list[dict[str, tuple[Sampler, Smallest]]] = []
    learned: list[list[NoiseGenerator]] = []
    passes = sum(generators if name == "adversarial" else seeds for name in wanted)
    extra = generators * settings.steps * settings.batch_size if "adversarial" in wanted else 0
    gaussian_first = "adversarial" in wanted and settings.epsilon is None and "gaussian" not in wanted
    total = len(judges) * ((passes + gaussian_first) * len(test.pixels) + extra)
    with progress(total, "perturbation", enabled=show_progress) as bar:
        for judge in judges:
            result: dict[str, Any] = {
                "model": judge.classifier.name,
                "model_sha256": judge.classifier.sha256,
                "noises": {},
            }
            shown: dict[str, tuple[Sampler, Smallest]] = {}
            own: list[NoiseGenerator] = []
            gaussian: float | None = None
            found: list[NDArray[np.float64]] = []
            for name in wanted:
                found = []
                more: dict[str, Any] = {}
                if name != "adversarial":
                    for number in range(seeds):
                        draw = sampler(name, seed + number)
                        smallest = smallest_sizes(judge, test, draw, batch_size, bar)
                        shown.setdefault(name, (draw, smallest))
                        found.append(smallest.size)
                    if name == "gaussian":
                        gaussian = _learning_size(found[0], values)
                else:
                    if settings.epsilon is None and gaussian is None:
                        draw = sampler("gaussian", seed)
                        gaussian = _learning_size(
                            smallest_sizes(judge, test, draw, batch_size, bar).size, values
                        )
                    epsilon = settings.epsilon or gaussian
                    assert epsilon is not None
                    learning = judge if train is test else open_judge(judge.classifier.name, train, device)
                    more = {"epsilon": finite(epsilon), "losses": []}
                    for number in range(generators):
                        made, losses = train_generator(
                            learning, train, settings, epsilon, seed + number, place, bar
                        )
                        tenth = max(1, len(losses) // 10)
                        more["losses"].append(
                            [
                                round(float(np.mean(losses[:tenth])), 4),
                                round(float(np.mean(losses[-tenth:])), 4),
                            ]
                        )
                        draw = sampler("gaussian", seed + number, made)
                        smallest = smallest_sizes(judge, test, draw, batch_size, bar)
                        shown.setdefault(name, (draw, smallest))
                        own.append(made)
                        found.append(smallest.size)
                result["noises"][name] = {**size_figures(found, values), **more}
            result["clean_accuracy"] = round(100 * float(np.mean(found[0] > 0)), 4)
            run.results.append(result)
            drawn.append(shown)
            learned.append(own)
    if pictures is not None:
        from lrface.noise_pictures import draw_run

        draw_run(Path(pictures), run, test, judges, drawn, learned)
    return run


def _learning_size(sizes: NDArray[np.float64], values: int) -> float:
    """Where a classifier errs on half of the images that it gets right; a root mean square of 0.5 where that is nowhere."""
    found = median_size(sizes[sizes > 0]) if (sizes > 0).any() else 0.0
    return found if 0 < found < float("inf") else 0.5 * values**0.5
