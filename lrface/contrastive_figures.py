"""Figures 3 to 6 of the paper on contrastive inversion (paper 002), and 7 to 10, which are their top-5: from the figures of
runs to curves, and to a picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrface.ada_figures import save
from lrface.benchmarks.published_contrastive import TABLE_12
from lrface.contrastive_study import LABELS, OTHER_LEVELS, VARIANT_LABELS
from lrface.features import COLOURS
from lrface.losses.contrastive import VARIANTS

UNITS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "auc": "AUC"}
LEVELS = {
    "pixel_mask": ("missing pixels", "share of the pixels that are missing"),
    "gaussian_noise": ("Gaussian noise", "deviation of the noise"),
}
HIGHER = {name: levels[4:] for name, (_, levels) in OTHER_LEVELS.items()}
"""Those of Figure 4 among the levels of Table 10."""


@dataclass
class Point:
    """A mean with its standard error: over training seeds where there are several, else over draws of the test images;
    None where there is but one of both."""

    x: float
    mean: float
    standard_error: float | None


@dataclass
class Curve:
    """A network's points, x ascending. ``baseline``: drawn as a line over all x, as it was trained once."""

    label: str
    points: list[Point]
    baseline: bool = False


@dataclass
class Panel:
    """Curves on one operator.

    Attributes:
        title: the operator.
        x: what the axis says; ``logarithmic`` for shares.
        trained: smallest and largest level that the networks were trained with.
        paper: what the paper prints, by curve.
    """

    title: str
    x: str
    curves: list[Curve]
    logarithmic: bool = False
    trained: tuple[float, float] | None = None
    paper: dict[str, dict[float, float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def averaged(x: float, figures: Sequence[dict[str, Any]]) -> Point | None:
    """A point from the same figure of several seeds, each with ``mean`` and ``standard_error`` over draws."""
    means = [figure["mean"] for figure in figures if figure["mean"] is not None]
    if not means:
        return None
    error = figures[0]["standard_error"]
    if len(means) > 1:
        error = statistics.stdev(means) / math.sqrt(len(means))
    return Point(x, round(statistics.mean(means), 6), error)


def panels(number: str, results: Sequence[dict[str, Any]], what: str) -> list[Panel]:
    """The panels of a figure.

    Args:
        number: 3 to 6.
        results: rows of a study's document: ``key, label, evaluation``, the probes of contrastive_study.figure_evaluation.
        what: top1, top5 or auc.
    """
    return label_panels(results, what) if number == "3" else level_panels(number, results, what)


def label_panels(results: Sequence[dict[str, Any]], what: str) -> list[Panel]:
    """Figure 3: accuracy of linear probes by the share of the labels, beside end-to-end networks; a panel an operator."""
    found: dict[str, dict[str, dict[float, list[dict[str, Any]]]]] = {}
    for row in results:
        kind, _, key = row["key"].partition("-")
        for result in row["evaluation"]["results"]:
            label = "untouched teacher" if result["name"] == "teacher" else LABELS[kind]
            share = 1.0 if result["labels"] is None else result["labels"]
            found.setdefault(key, {}).setdefault(label, {}).setdefault(share, []).append(result[what])
    made = []
    for key, networks in found.items():
        curves = [
            Curve(label, points, label in (LABELS["supervised"], LABELS["supervised10"]))
            for label, by_share in networks.items()
            if (points := _points(by_share))
        ]
        made.append(Panel(key, "share of the labels", curves, logarithmic=True))
    return made


def level_panels(number: str, results: Sequence[dict[str, Any]], what: str) -> list[Panel]:
    """Figures 4, 5 and 6: accuracy by the level of the test images' degradation, a panel for each kind of it."""
    found: dict[tuple[str, float, float], dict[str, dict[float, list[dict[str, Any]]]]] = {}
    for row in results:
        block = row["evaluation"]["train_degrade"]
        name = block["name"]
        argument = OTHER_LEVELS[name][0]
        low, high = block.get(f"{argument}_range") or [block[argument]] * 2
        curves = found.setdefault((name, low, high), {})
        for result in row["evaluation"]["results"]:
            level = result["test_degrade"][argument]
            if result["name"] == "student" and (number != "4" or level in HIGHER[name]):
                curves.setdefault(curve_label(row["key"]), {}).setdefault(level, []).append(result[what])
    made = []
    for (name, low, high), networks in found.items():
        limits = " to ".join(f"{level:g}" for level in dict.fromkeys((low, high)))
        made.append(
            Panel(
                f"{LEVELS[name][0]}, trained with {limits}",
                LEVELS[name][1],
                [Curve(label, points) for label, levels in networks.items() if (points := _points(levels))],
                trained=(low, high),
                paper={"end-to-end (Table 12)": TABLE_12[name]} if number == "4" and what == "top1" else {},
            )
        )
    return made


def curve_label(key: str) -> str:
    """What a row of Figures 4 to 6 is called: by its loss where its key ends with one."""
    for variant in VARIANTS:
        if key.endswith(f"-{variant}"):
            return VARIANT_LABELS[variant]
    return LABELS[key.removeprefix("seven_classes-").partition("-")[0]]


def _points(values: dict[float, list[dict[str, Any]]]) -> list[Point]:
    return [point for x in sorted(values) if (point := averaged(x, values[x])) is not None]


def draw(path: str | Path, made: Sequence[Panel], title: str, what: str) -> None:
    """Panels side by side, with error bars of one standard error.

    Raises:
        UsageError: another ending than .png or .svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(made), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(1, len(made), squeeze=False)[0]
    names = list(dict.fromkeys(curve.label for panel in made for curve in panel.curves))
    for axes, panel in zip(cells, made, strict=True):
        for curve in panel.curves:
            colour = COLOURS[names.index(curve.label) % len(COLOURS)]
            xs = [point.x for point in curve.points]
            means = [point.mean for point in curve.points]
            errors = [point.standard_error or 0.0 for point in curve.points]
            style = "--" if curve.baseline else "-"
            axes.errorbar(
                xs,
                means,
                yerr=errors,
                label=curve.label,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.4,
                linestyle=style,
                capsize=2.5,
            )
            if curve.baseline:
                axes.axhline(means[-1], color=colour, linewidth=1.1, linestyle="--")
        every = sorted({point.x for curve in panel.curves for point in curve.points})
        if panel.logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(every, [f"{100 * x:g} %" for x in every])
        elif panel.trained is not None and every:
            low, high = panel.trained
            if low < high and low <= every[-1] and every[0] <= high:
                axes.axvspan(low, high, color="0.93", zorder=0, label="trained with")
            margin = 0.04 * (every[-1] - every[0] or 1.0)
            axes.set_xlim(every[0] - margin, every[-1] + margin)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(UNITS[what])
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=12)
    save(figure, path)
