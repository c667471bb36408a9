"""Verification accuracy on held-out training identities while training goes on.

A checkpoint may be chosen by it: the people are neither trained on nor part of a benchmark.
"""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.benchmarks.metrics import fold_accuracy, stratified_folds
from lrface.data.dataset import fit_image
from lrface.data.source import FaceSource
from lrface.data.split import choose_held_out
from lrface.data.subset import IdentitySubset
from lrface.degrade.resolution import resample
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file
from lrface.methods.base import Method
from lrface.train.checkpoint import checkpoints, latest_checkpoint
from lrface.train.log import MetricsLog
from lrface.train.observe import Observer, can_draw

VALIDATION = "validation.csv"
CHOICES = ("last", "best")
FOLDS = 10
LEAST_PAIRS = 2 * FOLDS
"""Each fold needs a pair of either kind."""


@dataclass(frozen=True)
class ValidationSettings:
    """What is held out and how it is measured.

    every: steps between validations; there is always one at the end of a stage.
    identities: held out from training: a number of them, or a share below 1, of those with two images or more.
    sizes: resolutions in pixels; both images of a pair are brought down to a size and up again (nearest, bilinear).
    pairs: at most so many in all, half of the same person; fewer where the held-out faces do not give them.
    choose: which checkpoint a stage ends with: "last", or "best" by the accuracy averaged over ``sizes`` (the
        earliest of equally good ones).
    seed: of who is held out and of the pairs; apart from the recipe's, so that runs of several seeds are alike in it.
    batch_size: images embedded at once.

    Raises:
        UsageError: a value out of range.
    """

    every: int = 1000
    identities: int | float = 50
    sizes: Sequence[int] = (112, 56, 28, 14)
    pairs: int = 2000
    choose: str = "last"
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self) -> None:
        for field, least in (("every", 1), ("pairs", LEAST_PAIRS), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, field)
            if value < least:
                raise UsageError(f"validate.{field} must be at least {least}; found {value}")
        whole = self.identities == int(self.identities) if abs(self.identities) < 1e18 else False
        if not self.identities > 0 or (self.identities >= 1 and not whole):
            raise UsageError(
                "validate.identities must be a share below 1 such as 0.05 or a whole number such as 50; found "
                f"{self.identities}"
            )
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) != len(self.sizes):
            raise UsageError(
                f"validate.sizes must list different resolutions of 1 pixel or more; found {list(self.sizes)}"
            )
        if self.choose not in CHOICES:
            raise UsageError(f"validate.choose must be last or best; found {self.choose!r}")

    def check_input_size(self, size: int) -> None:
        """Raises UsageError for a resolution above the network's input."""
        if max(self.sizes) > size:
            raise UsageError(
                f"validate.sizes: {max(self.sizes)} is above the input of the network, {size} pixels"
            )


def hold_out(
    source: FaceSource, settings: ValidationSettings, name: str
) -> tuple[IdentitySubset, IdentitySubset]:
    """``source`` in two: what is trained on, and the identities held out. The same data and seed give the same people.

    Raises:
        UsageError: fewer than two identities would be left on either side.
    """
    sizes = np.bincount(source.labels, minlength=len(source.identities))
    eligible = np.flatnonzero(sizes >= 2).tolist()
    try:
        places = choose_held_out(
            [source.identities[label] for label in eligible], settings.identities, settings.seed
        )
    except UsageError as error:
        raise UsageError(
            f"validate.identities={settings.identities:g}: {name} has {len(eligible)} identities with two images or "
            "more; at least 2 must be held out and 2 stay"
        ) from error
    chosen = [eligible[place] for place in places]
    rest = np.setdiff1d(np.arange(len(sizes)), chosen).tolist()
    return IdentitySubset(source, rest), IdentitySubset(source, chosen)


def draw_pairs(
    labels: NDArray[np.int64], pairs: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Pairs of different images, as many of one person as of two: left and right int64 [p], same bool [p].

    Pairs of one person go round the people, so that no large identity outweighs the others; no pair comes twice.

    Args:
        labels: int [n].
        pairs: at most so many.

    Raises:
        LrfaceError: fewer than 10 pairs of either kind can be made.
    """
    random = np.random.default_rng(seed)
    half = pairs // 2
    rounds: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        possible = len(own) * (len(own) - 1) // 2
        numbers = random.choice(possible, size=min(possible, half), replace=False)
        # Pair number k of images i < j is k = j (j - 1) / 2 + i.
        right = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) // 2).astype(np.int64)
        left = numbers - right * (right - 1) // 2
        rounds.append(np.stack([np.arange(len(numbers)), own[left], own[right]], axis=1))
    found = np.concatenate(rounds)
    found = found[random.permutation(len(found))]
    positives = found[np.argsort(found[:, 0], kind="stable")][:half, 1:]

    count = np.unique(labels, return_counts=True)[1]
    n = len(labels)
    possible = (n * n - int((count.astype(np.int64) ** 2).sum())) // 2
    wanted = min(len(positives), possible)
    keys = np.empty(0, dtype=np.int64)
    if possible < 4 * wanted:  # few: all of them, shuffled
        one, other = np.triu_indices(n, 1)
        different = labels[one] != labels[other]
        keys = random.permutation(one[different] * n + other[different])
    while len(keys) < wanted:
        drawn = np.sort(random.integers(0, n, (2 * wanted, 2)), axis=1)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
        keys = np.concatenate([keys, drawn[:, 0] * n + drawn[:, 1]])
        keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
    negatives = np.stack([keys // n, keys % n], axis=1)[:wanted]
    positives = positives[:wanted]
    if wanted < FOLDS:
        raise LrfaceError(
            f"validate: the held-out faces give only {wanted} pairs of either kind, {FOLDS} are needed; raise "
            "validate.identities"
        )
    both = np.concatenate([positives, negatives])
    return both[:, 0], both[:, 1], np.arange(len(both)) < wanted


class HeldOut:
    """Held-out faces in memory and the pairs of them.

    Args:
        source: the held-out identities.
        settings: pairs and their seed.
        size: side of the network's input in pixels.
        say: is told how many images could not be read; pairs of them are left out.

    Attributes:
        images: uint8 [m, size, size, 3], RGB, those that a pair names.
        left, right: int64 [p], indices into ``images``.
        same: bool [p].

    Raises:
        LrfaceError: fewer than 10 pairs of either kind.
    """

    def __init__(
        self,
        source: FaceSource,
        settings: ValidationSettings,
        size: int,
        say: Callable[[str], None] = lambda message: None,
    ):
        left, right, same = draw_pairs(source.labels, settings.pairs, settings.seed)
        used, inverse = np.unique(np.concatenate([left, right]), return_inverse=True)
        images = np.zeros((len(used), size, size, 3), dtype=np.uint8)
        broken = np.zeros(len(used), dtype=bool)
        first: LrfaceError | None = None
        for row, index in enumerate(used.tolist()):
            try:
                images[row] = fit_image(source.image(index), size)
            except LrfaceError as error:
                broken[row] = True
                first = first or error
        left, right = inverse[: len(left)], inverse[len(left) :]
        if first is not None:
            say(
                f"validate: {int(broken.sum())} of {len(used)} held-out faces cannot be read, the first: {first}"
            )
            whole = ~(broken[left] | broken[right])
            left, right, same = left[whole], right[whole], same[whole]
        least = min(int(same.sum()), int((~same).sum()))
        if least < FOLDS:
            raise LrfaceError(
                f"validate: only {least} pairs of either kind are left, {FOLDS} are needed; raise validate.identities"
            )
        self.images = images
        self.left, self.right, self.same = left, right, same
        self.folds = stratified_folds(same, FOLDS)

    @torch.no_grad()
    def accuracies(
        self,
        encoder: nn.Module,
        sizes: Sequence[int],
        batch_size: int,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[int, float]:
        """Verification accuracy in percent at each size: cosine of features, thresholds by cross-validation in ten folds.

        ``encoder`` must be in eval mode; features of mirrored images are not added, as embedding everything once is
        enough to compare steps.
        """
        features: dict[int, list[Tensor]] = {size: [] for size in sizes}
        for start in range(0, len(self.images), batch_size):
            crops = torch.from_numpy(self.images[start : start + batch_size]).to(device)
            faces = crops.permute(0, 3, 1, 2).float().div_(255.0)
            for size in sizes:
                seen = resample(faces, size)
                with autocast():
                    vectors = encoder(seen)
                features[size].append(F.normalize(vectors.float(), dim=1).cpu())
        found = {}
        for size, parts in features.items():
            vectors = torch.cat(parts).numpy()
            scores = np.einsum(
                "pd,pd->p", vectors[self.left], vectors[self.right], dtype=np.float64, casting="safe"
            )
            if not np.isfinite(scores).all():
                raise LrfaceError(
                    f"validate: features at {size} pixels are not finite; lower optimiser.learning_rate or set "
                    "trainer.precision=float32"
                )
            found[size] = 100.0 * fold_accuracy(scores, self.same, self.folds).mean
        return found


class Validation(Observer):
    """Writes ``validation.csv`` (percent), TensorBoard and, where matplotlib is, ``validation.png`` into the stage's
    folder.

    Args:
        settings: how often and at which sizes.
        faces: gives the held-out faces; called before the first validation.
        steps: of the whole stage.
        name: of the stage, for the picture.
        device, autocast: where and in which precision features are computed: those of training.
        tensorboard: also write TensorBoard events.
        main: False in the further processes of a distributed run: they compute and write nothing.
        listeners: told (step, values) of every validation.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        faces: Callable[[], HeldOut],
        steps: int,
        name: str = "",
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tensorboard: bool = False,
        main: bool = True,
        listeners: Sequence[Callable[[int, dict[str, float]], None]] = (),
    ):
        self.settings = settings
        self.faces = faces
        self.steps = steps
        self.name = name
        self.device = device
        self.autocast = autocast
        self.tensorboard = tensorboard
        self.main = main
        self.listeners = listeners
        self.rows: dict[int, dict[str, float]] = {}
        self._candidates: set[int] = set()
        self._log: MetricsLog | None = None
        self._folder: Path | None = None
        self._drawn = False

    def begin(self, step: int, method: Method, folder: Path) -> None:
        self._folder = folder
        if self.main:
            # Of what is about to be done again nothing stays; the validation of the checkpoint itself does.
            self._log = MetricsLog(folder, step + 1, self.tensorboard, "validation")
        self.rows = {done: row for done, row in read_validation(folder).items() if done <= step}
        self._candidates = set(self.rows) & _saved_steps(folder)

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.steps

    def after_step(self, step: int, method: Method) -> bool:
        method.encoder.eval()
        held_out = self.faces()
        by_size = held_out.accuracies(
            method.encoder, self.settings.sizes, self.settings.batch_size, self.device, self.autocast
        )
        values = {"accuracy_mean": round(float(np.mean(list(by_size.values()))), 6)}
        values |= {f"accuracy_{size}": round(value, 6) for size, value in by_size.items()}
        self.rows[step] = values
        self._candidates.add(step)
        self._drawn = False
        if self._log is not None:
            self._log.write(step, values)
        for listener in self.listeners:
            listener(step, values)
        return self.settings.choose == "best" and best_step(self.rows, self._candidates) == step

    def kept(self) -> Collection[int]:
        best = best_step(self.rows, self._candidates)
        return () if self.settings.choose == "last" or best is None else (best,)

    def saved(self, step: int, checkpoint: Path) -> None:
        if self.main and not self._drawn and self.rows and can_draw():
            assert self._folder is not None
            chosen = best_step(self.rows, self._candidates) if self.settings.choose == "best" else None
            draw_validation(self._folder / "validation.png", self.rows, self.name, chosen)
            self._drawn = True

    def end(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def best_step(rows: Mapping[int, Mapping[str, float]], among: Collection[int]) -> int | None:
    """The earliest of the steps ``among`` with the highest mean accuracy; None without any."""
    known = sorted(step for step in rows if step in among)
    return max(known, key=lambda step: (rows[step]["accuracy_mean"], -step), default=None)


def read_validation(folder: Path) -> dict[int, dict[str, float]]:
    """What a stage's validation.csv holds: step -> accuracies in percent. A line that a kill cut short is left out.

    Raises:
        LrfaceError: the file cannot be read.
    """
    rows: dict[int, dict[str, float]] = {}
    path = folder / VALIDATION
    if not path.is_file():
        return rows
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    # A cut line lacks its last fields, which then are None.
                    values = {key: float(value) for key, value in row.items() if key != "step"}
                    step = int(row["step"])
                except (TypeError, ValueError, KeyError):
                    continue
                if "accuracy_mean" in values:
                    rows[step] = values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LrfaceError(f"{path} cannot be read: {error}") from error
    return rows


def _saved_steps(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in checkpoints(folder)}


def chosen_checkpoint(folder: Path, choose: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a finished stage ends with, and how it was chosen, for the card.

    Args:
        folder: the stage's.
        choose: "last", or "best" on held-out training identities.

    Raises:
        LrfaceError: there is no checkpoint, or for "best" no validated one.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        raise LrfaceError(f"{folder} holds no checkpoint")
    rows = read_validation(folder)
    step = int(newest.name.removeprefix("step-"))
    if choose == "best":
        best = best_step(rows, _saved_steps(folder))
        if best is None:
            raise LrfaceError(
                f"{folder}: validate.choose is best, but no checkpoint there was validated; set validate.choose=last"
            )
        step = best
    how: dict[str, Any] = {
        "step": step,
        "by": "accuracy on held-out training identities" if choose == "best" else "last",
    }
    if step in rows:
        how["validation"] = rows[step]
    return folder / f"step-{step:08d}", how


def draw_validation(
    path: Path, rows: Mapping[int, Mapping[str, float]], name: str, chosen: int | None = None
) -> None:
    """Accuracy against step, one line a size, to ``path`` (PNG); the step ``chosen`` is marked.

    Raises:
        LrfaceError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = sorted(rows)
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    for key in rows[steps[-1]]:
        size = key.removeprefix("accuracy_")
        average = size == "mean"
        panel.plot(
            steps,
            [rows[step].get(key, float("nan")) for step in steps],
            label="mean" if average else f"{size} x {size}",
            color="black" if average else None,
            linestyle="--" if average else "-",
            marker="o",
            markersize=3.5,
        )
    if chosen is not None:
        panel.axvline(chosen, color="grey", linewidth=1, linestyle=":")
        panel.annotate(
            f" best: {chosen}", (chosen, 0.02), xycoords=("data", "axes fraction"), color="grey", fontsize=9
        )
    panel.set_xlabel("training steps")
    panel.set_ylabel("verification accuracy (%)")
    panel.set_title(f"held-out identities{', stage ' + name if name else ''}", fontsize=11)
    panel.grid(True, alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    with atomic_file(path) as aside:
        canvas.print_figure(aside, dpi=120, format="png")
