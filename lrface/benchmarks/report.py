"""Results of a verification as a table, a JSON file and a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, write_text

Rows = Sequence[Mapping[str, Any]]
"""Rows of :func:`lrface.benchmarks.verification.evaluate_verification`."""


@dataclass
class Findings:
    """What a command found.

    Attributes:
        about: what was measured, and how.
        results: the figures of each model.
    """

    about: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints; the same call gives the same bytes."""
        return {**self.about, "results": self.results}


def left_out(broken: Sequence[tuple[str, str]], listed_in: str, what: str = "") -> list[str]:
    """Lines that name the first 20 of the ``broken`` (name, reason); the file ``listed_in`` has them all."""
    if not broken:
        return []
    lines = [f"{len(broken)} {what}left out:", *(f"  {name}: {reason}" for name, reason in broken[:20])]
    return lines + ([f"  ... all are listed in {listed_in}"] if len(broken) > 20 else [])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def format_columns(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Plain text columns, the first ``left`` of them flush left and the others flush right."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def written(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([written(header), "  ".join("-" * width for width in widths), *map(written, lines)])


def size_name(row: Mapping[str, Any], side: str = "probe") -> str:
    """What the size of one side of a row is called: "native", or pixels."""
    return "native" if row.get("by_native_size") is not None else str(row[f"{side}_size"])


def _condition(row: Mapping[str, Any], side: str) -> str:
    losses = row.get(f"{side}_losses", "")
    return size_name(row, side) + (f" {losses}" if losses else "")


def native_range(part: Mapping[str, Any]) -> str:
    """What a bin of native sizes is called: "16 to 23 px"."""
    if part["smallest"] is None:
        return "unknown"
    return (
        f"{part['smallest']} to {part['largest'] - 1} px"
        if part["largest"]
        else f"{part['smallest']} px or more"
    )


def native_tables(rows: Rows) -> str:
    """Figures by the native size of the smaller face of a pair, a table for each row that has them."""
    tables = []
    for row in rows:
        if row.get("by_native_size") is None:
            continue
        header = ["smaller face", "pairs", "same person", "accuracy", "95 % interval", "EER", "AUC"]
        lines = [
            [
                native_range(part),
                str(part["pairs"]),
                str(part["same"]),
                f"{part['accuracy']:.2f}",
                f"{part['accuracy_interval'][0]:.2f} to {part['accuracy_interval'][1]:.2f}",
                _number(part["eer"], 2),
                _number(part["auc"], 4),
            ]
            for part in row["by_native_size"]
        ]
        model = f" of {row['model']}" if "model" in row else ""
        tables.append(f"{row['benchmark']}{model} by native size\n{format_columns(header, lines)}")
    return "\n\n".join(tables)


def results_table(rows: Rows) -> str:
    """Rows as one table of plain text, with a line on the pairs and images of each benchmark below.

    Rows that have a key ``model`` get it as the first column. Accuracies, TAR and EER are percentages. A false accept
    rate that no benchmark has the pairs for has no column.
    """
    if not rows:
        return "no results"
    with_model = any("model" in row for row in rows)
    rates = list(
        dict.fromkeys(rate for row in rows for rate, value in row["tar_at_far"].items() if value is not None)
    )
    header = ["model"] if with_model else []
    header += ["benchmark", "gallery x probe", "accuracy", "95 % interval"]
    header += [f"TAR@FAR={rate}" for rate in rates] + ["EER", "AUC"]
    lines = []
    for row in rows:
        line = [str(row.get("model", "-"))] if with_model else []
        low, high = row["accuracy_interval"]
        line += [
            str(row["benchmark"]),
            f"{_condition(row, 'gallery')} x {_condition(row, 'probe')}",
            f"{row['accuracy']:.2f} +- {row['accuracy_std']:.2f}",
            f"{low:.2f} to {high:.2f}",
        ]
        line += [_number(row["tar_at_far"].get(rate), 2) for rate in rates]
        line += [_number(row["eer"], 2), _number(row["auc"], 4)]
        lines.append(line)
    notes = []
    for row in rows:
        note = (
            f"{row['benchmark']}: {row['pairs']} pairs of {row['images']} images, {row['folds']} folds, "
            f"{row['down']} down and {row['up']} up, {'with' if row['flip'] else 'without'} flip fusion"
        )
        if row["unaligned"]:
            noun = "image" if row["unaligned"] == 1 else "images"
            note += f", {row['unaligned']} {noun} without a detected face"
        if note not in notes:
            notes.append(note)
    return "\n".join([format_columns(header, lines, left=2 if with_model else 1), *notes])


def matrix_tables(rows: Rows) -> str:
    """For each model and benchmark whose rows hold every gallery size against every probe size, the matrix of
    accuracies; nothing where there is none."""
    tables = []
    groups: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        if not (row.get("gallery_losses") or row.get("probe_losses") or size_name(row) == "native"):
            group = groups.setdefault((str(row.get("model", "")), str(row["benchmark"])), {})
            group[row["gallery_size"], row["probe_size"]] = row["accuracy"]
    for (model, name), cells in groups.items():
        sizes = sorted({gallery for gallery, _ in cells}, reverse=True)
        if len(sizes) < 2 or any((gallery, probe) not in cells for gallery in sizes for probe in sizes):
            continue
        lines = [[str(gallery), *(f"{cells[gallery, probe]:.2f}" for probe in sizes)] for gallery in sizes]
        title = (
            f"accuracy on {name}{f' of {model}' if model else ''}, gallery size (down) x probe size (across)"
        )
        tables.append(f"{title}\n{format_columns(['', *map(str, sizes)], lines)}")
    return "\n\n".join(tables)


def verification_text(
    rows: Rows,
    areas: Mapping[str, Mapping[str, float]],
    comparisons: Sequence[Mapping[str, Any]],
    corrupted: str = "",
) -> str:
    """Everything `lrface verify` found as plain text; ``corrupted`` is the table of corruptions, put before the
    comparisons."""
    single = len({row.get("model") for row in rows}) == 1
    shown = [{key: value for key, value in row.items() if not (single and key == "model")} for row in rows]
    parts = [results_table(shown), native_tables(shown), matrix_tables(shown)]
    lines = [
        f"area under the accuracy-resolution curve, {name}{'' if single else f', {model}'}: {area:.2f} %"
        for model, by_benchmark in areas.items()
        for name, area in by_benchmark.items()
    ]
    parts.append("\n".join(lines))
    parts.append(corrupted)
    if comparisons:
        header = [
            "compared with the first model",
            "benchmark",
            "gallery x probe",
            "difference",
            "95 % interval",
            "p",
        ]
        cells = [
            [
                str(row["second"]),
                str(row["benchmark"]),
                f"{_condition(row, 'gallery')} x {_condition(row, 'probe')}",
                f"{row['difference']:+.2f}",
                f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}",
                f"{row['p_value']:.4f}",
            ]
            for row in comparisons
        ]
        parts.append(format_columns(header, cells, left=2))
    return "\n\n".join(part for part in parts if part)


def _not_finite(value: Any, where: str) -> str | None:
    """Where a number sits in ``value`` that JSON cannot hold; None when there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return where
    children: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        children = [(f"{where}.{key}", child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        children = [(f"{where}[{index}]", child) for index, child in enumerate(value)]
    return next((found for path, child in children if (found := _not_finite(child, path))), None)


def results_json(content: Mapping[str, Any]) -> str:
    """``content`` as one JSON object. Raises LrfaceError naming the field that is NaN or infinite."""
    bad = _not_finite(content, "results")
    if bad is not None:
        raise LrfaceError(f"{bad} is not a finite number and cannot be written as JSON")
    return json.dumps(content, indent=2, ensure_ascii=False)


def write_results(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write ``content`` as JSON; the file appears whole or not at all. Makes the folder where it is
    missing.
    """
    file = Path(path)
    write_text(file, results_json(content) + "\n")
    return file


def _by_native_size(rows: Rows) -> list[dict[str, Any]]:
    """Points of a curve against native size: bins with bounds, at their middle."""
    return [
        {
            "gallery_size": (size := round(math.sqrt(max(part["smallest"], 4) * part["largest"]))),
            "probe_size": size,
            "accuracy": part["accuracy"],
            "accuracy_std": (part["accuracy_interval"][1] - part["accuracy_interval"][0]) / 3.92,
        }
        for row in rows
        for part in row.get("by_native_size") or []
        if part["largest"] is not None
    ]


def plot_results(curves: Mapping[str, Rows], path: str | Path, title: str | None = None) -> Path:
    """Accuracy against resolution, one curve a model, one panel a benchmark; error bars are one deviation.

    Args:
        curves: label -> rows. Rows with both images at one size make a solid curve; rows with the gallery at
            full size and smaller probes (``cross``) make a dashed one of the same colour. A native row gives its
            bins, at the middle of each.
        path: where the picture goes; the suffix says its kind (.png, .svg, .pdf).
        title: a line above the panels.

    Raises:
        UsageError: no rows, or a suffix that matplotlib cannot write.
        LrfaceError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise LrfaceError("plots need matplotlib: pip install matplotlib") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    names = list(dict.fromkeys(str(row["benchmark"]) for rows in curves.values() for row in rows))
    if not names:
        raise UsageError("plot: there are no results to draw")
    file = Path(path)
    figure = Figure(figsize=(6.4 * len(names), 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    kinds = canvas.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"plot {file}: the suffix must be one of {', '.join(sorted(kinds))}")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colours = [matplotlib.colormaps["tab10"](index) for index in range(10)]
    markers = "osD^vP*X"
    for panel, name in zip(panels, names, strict=True):
        sizes: set[int] = set()
        for number, (label, rows) in enumerate(curves.items()):
            own = [
                row
                for row in rows
                if row["benchmark"] == name and not (row.get("gallery_losses") or row.get("probe_losses"))
            ]
            native = _by_native_size(own)
            own = [row for row in own if size_name(row) != "native"]
            same_size = [row for row in own if row["gallery_size"] == row["probe_size"]]
            across = [row for row in own if row["gallery_size"] != row["probe_size"]]
            galleries = sorted({int(row["gallery_size"]) for row in across})
            series = [(same_size, label, "-")] + [
                (
                    [row for row in across if row["gallery_size"] == gallery],
                    f"{label}, gallery at {gallery}",
                    "--",
                )
                for gallery in galleries
            ]
            series.append(([*native], f"{label}, by native size", ":"))
            for points, text, line in series:
                if not points:
                    continue
                points = sorted(points, key=lambda row: row["probe_size"])
                sizes.update(int(row["probe_size"]) for row in points)
                panel.errorbar(
                    # curves stand a little apart, so that their error bars can be told from each other
                    [row["probe_size"] * 1.012 ** (number - (len(curves) - 1) / 2) for row in points],
                    [row["accuracy"] for row in points],
                    yerr=[row["accuracy_std"] for row in points],
                    label=text,
                    linestyle=line,
                    marker=markers[number % len(markers)],
                    markersize=5,
                    markerfacecolor="white" if line == "--" else None,
                    color=colours[number % len(colours)],
                    capsize=3,
                    linewidth=1.5,
                )
        panel.set_xscale("log")
        ticks = sorted(sizes)
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.set_xticklabels([str(size) for size in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("resolution of the test images (pixels)")
        panel.set_ylabel("verification accuracy (%)")
        panel.set_title(name)
        panel.grid(True, alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="best")
    if title:
        figure.suptitle(title)
    with atomic_file(file) as aside:
        canvas.print_figure(aside, dpi=150, format=file.suffix.lstrip(".").lower())
    return file
