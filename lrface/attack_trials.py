"""Attacks on classifiers: what `lrface attack` does. Above classifiers and benchmarks, below the command line.

An attack gets images that the classifier has right, and gives images within a distance of them that it may have wrong. What
counts is decided here: an image is lost where the classifier errs on what the attack gave, and that lies within the distance
and in [0, 1].
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrface.benchmarks.perturbation import finite, median_size
from lrface.benchmarks.report import Findings, format_columns
from lrface.degrade.adversarial import Attack as AdaSettings
from lrface.degrade.adversarial import perturb
from lrface.errors import LrfaceError, UsageError
from lrface.foolbox_attacks import ddn, import_foolbox, pgd
from lrface.models.per_example import CorruptionNetwork
from lrface.perturbation import Judge, LabelledImages, open_judge, read_labelled
from lrface.progress import Progress, progress
from lrface.registry import nearest
from lrface.robustness import resolved

NORMS = ("linf", "l2", "weights")
"""Distances: the largest change of a value, the Euclidean length of all changes, and for AdA the radius nu of the weights'
perturbation relative to their norm."""


@dataclass(frozen=True)
class Task:
    """What an attack is given.

    Attributes:
        scores: images float [n, c, h, w] in [0, 1] -> scores [n, classes] with gradients; each image by itself.
        images: float32 [n, c, h, w] in [0, 1], all of which the classifier has right.
        labels: int64 [n].
        norm, size: the distance it may go.
        seed: of the batch; random numbers come from it alone.
        steps, restarts: where an attack has them; None for its own.
        network: corruption network, for AdA.
    """

    scores: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    norm: str
    size: float
    seed: int
    steps: int | None = None
    restarts: int | None = None
    network: CorruptionNetwork | None = None


@dataclass(frozen=True)
class AttackKind:
    """An attack by name.

    Attributes:
        run: task -> images float32 [n, c, h, w].
        norms: the distances that it knows; the first is the default.
        about: what it is, for `--help` and reports.
        smallest: whether it looks for the smallest distance at which the classifier errs, of which there is then a median.
    """

    run: Callable[[Task], Tensor]
    norms: tuple[str, ...]
    about: str
    smallest: bool = False


ATTACKS: dict[str, AttackKind] = {}


def register_attack(name: str, kind: AttackKind) -> None:
    """Add an attack; raises ValueError when the name is taken."""
    if name in ATTACKS:
        raise ValueError(f"attack {name!r} is registered twice")
    ATTACKS[name] = kind


# ------------------------------------------------------------------------------------------------------- attacks


def distance(images: Tensor, others: Tensor, norm: str) -> Tensor:
    """How far each image is from its other: float32 [n]; 0 for "weights", which no image shows."""
    change = (others - images).flatten(1)
    if norm == "linf":
        return change.abs().amax(1)
    return change.norm(dim=1) if norm == "l2" else change.new_zeros(len(change))


def within(images: Tensor, others: Tensor, norm: str, size: float) -> Tensor:
    """``others`` brought to at most ``size`` from ``images``, and into [0, 1]."""
    change = others - images
    if norm == "linf":
        change = change.clamp(-size, size)
    else:
        length = change.flatten(1).norm(dim=1).clamp_min(1e-12)
        change = change * (size / length).clamp_max(1)[:, None, None, None]
    return (images + change).clamp(0, 1)


def multitargeted(task: Task) -> Tensor:
    """MultiTargeted (Gowal et al., arXiv 1910.09338): for every other class t, projected gradient ascent on z_t - z_y, from
    random starts; what fools the classifier first is kept.

    200 steps and 10 restarts, as paper 003 takes it from Gowal et al., arXiv 2010.03593. A step follows the sign of the
    gradient (linf) or its direction (l2) by size / 4, a tenth of that after half of the steps, a hundredth after three
    quarters. The last step's images are looked at, and each step's.
    """
    images, labels = task.images, task.labels
    steps, restarts = task.steps or 200, task.restarts or 10
    draws = torch.Generator().manual_seed(task.seed)
    done = images.clone()
    open_rows = torch.arange(len(images))
    with torch.no_grad():
        order = task.scores(images).argsort(1, descending=True).cpu()  # the most likely wrong class first
    for _, rank in itertools.product(range(restarts), range(order.shape[1])):
        if not len(open_rows):
            break
        target = order[open_rows, rank]
        rows = open_rows[target != labels[open_rows]]
        if not len(rows):
            continue
        found, fooled = _towards(task, rows, order[rows, rank], steps, draws)
        done[rows[fooled]] = found[fooled]
        lost = torch.zeros(len(images), dtype=torch.bool)
        lost[rows[fooled]] = True
        open_rows = open_rows[~lost[open_rows]]
    return done


def _towards(
    task: Task, rows: Tensor, target: Tensor, steps: int, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascent of z_target - z_label from one random start: images [k, c, h, w], and which of them the classifier errs on."""
    images, labels = task.images[rows], task.labels[rows]
    start = torch.rand(images.shape, generator=draws) * 2 - 1
    if task.norm == "l2":
        start = torch.randn(images.shape, generator=draws)
        start /= start.flatten(1).norm(dim=1)[:, None, None, None]
    x = within(images, images + task.size * start, task.norm, task.size)
    kept, fooled = x.clone(), torch.zeros(len(rows), dtype=torch.bool)
    for step in range(steps + 1):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            scores = task.scores(x)
            place = scores.device
            wanted = scores.gather(1, target[:, None].to(place)) - scores.gather(1, labels[:, None].to(place))
            new = (scores.argmax(1).cpu() != labels) & ~fooled
            kept[new] = x.detach()[new]
            fooled |= new
            if step == steps or bool(fooled.all()):
                break
            (gradient,) = torch.autograd.grad(wanted.sum(), x)
        rate = task.size / 4 * (1.0 if step < steps / 2 else 0.1 if step < 0.75 * steps else 0.01)
        with torch.no_grad():
            if task.norm == "linf":
                direction = gradient.sign()
            else:
                direction = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            x = within(images, x + rate * direction, task.norm, task.size)
    return kept, fooled


class _Scores(nn.Module):
    def __init__(self, scores: Callable[[Tensor], Tensor]):
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(images)


def _auto_attack() -> Any:
    """The class AutoAttack of the authors' package, or of its copy on PyPI. Raises LrfaceError without either."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        try:
            from pyautoattack import AutoAttack
        except ImportError as error:
            raise LrfaceError(
                "the attack autoattack needs the package of that name or pyautoattack, neither of which is installed: pip "
                "install 'lrface[attack]'"
            ) from error
    return AutoAttack


def auto_attack(task: Task) -> Tensor:
    """AutoAttack, standard version (Croce and Hein, ICML 2020), by its authors' package ``autoattack`` or by
    ``pyautoattack``: APGD on the cross-entropy, targeted APGD, targeted FAB, Square."""
    kind = _auto_attack()
    model = _Scores(task.scores).eval()
    with torch.no_grad():
        first = task.scores(task.images[:1])
    if first.shape[1] < 4:
        raise UsageError(
            f"the attack autoattack compares the three best classes with the right one; found {first.shape[1]} classes"
        )
    norm = {"linf": "Linf", "l2": "L2"}[task.norm]
    options: dict[str, Any] = {"norm": norm, "eps": task.size, "seed": task.seed, "device": str(first.device)}
    if kind.__module__.split(".")[0] == "autoattack":
        attack = kind(model, version="standard", verbose=False, **options)
    else:
        attack = kind(model, version="standard", **options)
        attack.verbose = False
    for part in (attack.apgd_targeted, attack.fab):
        part.n_target_classes = min(part.n_target_classes, first.shape[1] - 1)
    if task.steps is not None:
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = task.steps
        attack.square.n_queries = 50 * task.steps
    images, labels = task.images.to(first.device), task.labels.to(first.device)
    size = (
        {"bs": len(images)} if kind.__module__.split(".")[0] == "autoattack" else {"batch_size": len(images)}
    )
    found = attack.run_standard_evaluation(images, labels, **size)
    return (found[0] if isinstance(found, tuple) else found).detach().float().cpu()


def adversarial_augment(task: Task) -> Tensor:
    """AdA as an attack (paper 003, figure 1): the weights of a corruption network are perturbed within a radius."""
    if task.network is None:
        raise UsageError("the attack ada needs a corruption network: --network RUN")
    place = next(task.network.parameters()).device
    seeds = torch.arange(len(task.images)) + (task.seed << 20)
    settings = AdaSettings(radius=task.size, steps=10 if task.steps is None else task.steps)
    found = perturb(
        task.images.to(place),
        task.labels.to(place),
        task.scores,
        task.network,
        seeds,
        settings,
        similarity=None,
    )
    return found.images.cpu()


register_attack(
    "multitargeted", AttackKind(multitargeted, ("linf", "l2"), "MultiTargeted, 200 steps, 10 restarts")
)
register_attack("pgd", AttackKind(pgd, ("linf", "l2"), "PGD by foolbox, 200 steps"))
register_attack("ddn", AttackKind(ddn, ("l2",), "DDN by foolbox, 200 steps", smallest=True))
register_attack("autoattack", AttackKind(auto_attack, ("linf", "l2"), "AutoAttack, standard"))
register_attack(
    "ada", AttackKind(adversarial_augment, ("weights",), "AdA's inner maximisation, 10 steps, no SSIM limit")
)


# ----------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Trial:
    """Attacks of one distance, one after another on what those before it left: ``names`` at ``size`` in ``norm``."""

    names: tuple[str, ...]
    norm: str
    size: float

    @property
    def label(self) -> str:
        """ "autoattack+multitargeted linf 0.0078"."""
        return f"{'+'.join(self.names)} {self.norm} {self.size:.4g}"


def parse_trials(text: str) -> list[Trial]:
    """ "autoattack+multitargeted:linf=1/255,2/255" -> a trial for each size; without a norm, "ada=0.015", the attack's own.

    Raises:
        UsageError: an unknown attack or norm, or a size that is no number above 0.
    """
    head, equals, tail = text.partition("=")
    named, _, norm = head.partition(":")
    names = tuple(named.split("+"))
    for name in names:
        if name not in ATTACKS:
            raise UsageError(
                f"--attack {text}: unknown attack {name!r}{nearest(name, ATTACKS)}; there are {', '.join(ATTACKS)}"
            )
    norm = norm or ATTACKS[names[0]].norms[0]
    for name in names:
        if norm not in ATTACKS[name].norms:
            raise UsageError(
                f"--attack {text}: {name} knows {', '.join(ATTACKS[name].norms)}; found {norm!r}"
            )
    try:
        sizes = [float(Fraction(part)) for part in tail.split(",")] if equals else []
    except (ValueError, ZeroDivisionError):
        sizes = []
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise UsageError(
            f"--attack {text}: say how far it may go, numbers above 0, such as {named}:{norm}=1/255,0.01; found {tail!r}"
        )
    return [Trial(names, norm, size) for size in sizes]


class TrialRun(Findings):
    """Classifiers under attack.

    Attributes:
        about: ``origin, images, size, channels, seed, steps, restarts, network, broken``.
        results: of each model ``model, model_sha256, clean_accuracy`` and ``attacks``: ``attack, norm, size, accuracy``
            (percent of all images that no attack of the trial made wrong) and ``lost`` (images by attack); for attacks that
            look for the smallest distance also ``median``, over all images, of which those wrong when clean count as 0
            (None for infinity, where most are never fooled).
    """

    def to_text(self) -> str:
        """What is printed."""
        header = [
            "model",
            "clean",
            *(f"{t['attack']} {t['norm']} {t['size']:.4g}" for t in self.results[0]["attacks"]),
        ]
        lines = [
            [
                result["model"],
                f"{result['clean_accuracy']:.2f}",
                *(f"{t['accuracy']:.2f}" for t in result["attacks"]),
            ]
            for result in self.results
        ]
        parts = [
            f"{self.about['images']} images of {self.about['origin']}; accuracy in percent",
            format_columns(header, lines),
        ]
        for result in self.results:
            parts += [
                f"{result['model']}: median distance that {t['attack']} needs: "
                + ("infinite" if t["median"] is None else f"{t['median']:.4g} ({t['norm']})")
                for t in result["attacks"]
                if "median" in t
            ]
        if self.about["broken"]:
            parts.append(
                f"{len(self.about['broken'])} images cannot be read; the first: {self.about['broken'][0][0]}"
            )
        return "\n\n".join(parts)


def run_trials(
    models: Sequence[str],
    images: str | Path,
    trials: Sequence[Trial],
    *,
    count: int | None = 1000,
    network: str | Path | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 100,
    show_progress: bool = True,
) -> TrialRun:
    """Accuracy of classifiers under attacks.

    Args:
        models: see :func:`lrface.classifiers.open_classifier`; attacks with gradients cannot take ONNX files.
        images: see :func:`lrface.perturbation.read_labelled`.
        trials: see :func:`parse_trials`.
        count: so many images, drawn by ``seed``; None for all.
        network: for ada, a run whose network draws images (:func:`lrface.deepaugment.open_network`).
        steps, restarts: instead of each attack's own (for autoattack the steps of APGD and FAB, and 50 queries of Square a
            step): what comes of fewer is an upper bound.

    Raises:
        UsageError: unknown names, values out of range, a model that does not fit the images, or one without gradients.
        LrfaceError: images or models that are not there or cannot be read, or an attack that is not installed.
    """
    if not models or not trials:
        raise UsageError("attack: at least one model and one attack are needed")
    for option, value in (("--steps", steps), ("--restarts", restarts), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{option}: at least 1 is needed; found {value}")
    place = resolved(device)
    opened = None
    if network is not None:
        from lrface.deepaugment import open_network

        opened = open_network(network, place)[0]
    if any("ada" in trial.names for trial in trials) and opened is None:
        raise UsageError("the attack ada needs a corruption network: --network RUN")
    if any("autoattack" in trial.names for trial in trials):
        _auto_attack()
    if any({"pgd", "ddn"} & set(trial.names) for trial in trials):
        import_foolbox()
    test = read_labelled(images, count, seed, show_progress)
    run = TrialRun(
        {
            "origin": str(images),
            "images": len(test.pixels),
            "size": test.kind.side,
            "channels": test.kind.channels,
            "seed": seed,
            "steps": steps,
            "restarts": restarts,
            "network": None if network is None else str(network),
            "broken": [list(pair) for pair in sorted(test.broken.items())],
        }
    )
    names = list(dict.fromkeys(models))
    with progress(len(names) * len(trials) * len(test.pixels), "attack", enabled=show_progress) as bar:
        for name in names:
            judge = open_judge(name, test, device)
            rows = torch.arange(len(test.pixels))
            right = torch.cat([~judge.wrong(test.float(part), part) for part in rows.split(batch_size)])
            about = Task(
                judge.scores, test.float(slice(0, 0)), judge.right[:0], "", 0.0, seed, steps, restarts, opened
            )
            run.results.append(
                {
                    "model": judge.classifier.name,
                    "model_sha256": judge.classifier.sha256,
                    "clean_accuracy": round(100 * float(right.float().mean()), 4),
                    "attacks": [
                        _trial(judge, test, right, trial, about, batch_size, bar) for trial in trials
                    ],
                }
            )
    return run


def _trial(
    judge: Judge,
    test: LabelledImages,
    right: Tensor,
    trial: Trial,
    about: Task,
    batch_size: int,
    bar: Progress,
) -> dict[str, Any]:
    """One line of a model's results."""
    left = right.clone()
    least = torch.where(right, torch.inf, 0.0).double()
    smallest = all(ATTACKS[name].smallest for name in trial.names)
    lost: Mapping[str, int] = dict.fromkeys(trial.names, 0)
    bar.advance(int((~right).sum()))
    for number, rows in enumerate(right.nonzero().squeeze(1).split(batch_size)):
        for name in trial.names:
            rows_left = rows[left[rows]]
            if not len(rows_left):
                break
            seed = int(np.random.SeedSequence((about.seed, number)).generate_state(1)[0] >> 1)
            task = replace(
                about,
                images=test.float(rows_left),
                labels=judge.right[rows_left],
                norm=trial.norm,
                size=trial.size,
                seed=seed,
            )
            found = ATTACKS[name].run(task)
            if smallest:
                wrong = judge.wrong(found, rows_left)
                length = distance(task.images, found, task.norm).double()
                least[rows_left[wrong]] = torch.minimum(least[rows_left], length)[wrong]
            fooled = fools(judge, task, found, rows_left)
            left[rows_left[fooled]] = False
            lost = {**lost, name: lost[name] + int(fooled.sum())}
        bar.advance(len(rows))
    return {
        "attack": "+".join(trial.names),
        "norm": trial.norm,
        "size": trial.size,
        "accuracy": round(100 * float(left.float().mean()), 4),
        "lost": dict(lost),
        **({"median": finite(median_size(least.numpy()))} if smallest else {}),
    }


def fools(judge: Judge, task: Task, found: Tensor, rows: Tensor) -> Tensor:
    """Where the classifier errs on what an attack gave and that is where it may be: bool [n].

    Raises:
        LrfaceError: images of another shape.
    """
    if found.shape != task.images.shape:
        raise LrfaceError(f"an attack gave images of {list(found.shape)} for {list(task.images.shape)}")
    allowed = distance(task.images, found, task.norm) <= task.size * (1 + 1e-4) + 1e-6
    allowed &= (found >= 0).flatten(1).all(1) & (found <= 1).flatten(1).all(1)
    return judge.wrong(found.nan_to_num(0).clamp(0, 1), rows) & allowed
