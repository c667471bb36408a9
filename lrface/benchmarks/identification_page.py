"""Results of identification and of template verification: as plain text, and as one HTML page."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lrface
from lrface.benchmarks.identification import OpenSet
from lrface.benchmarks.page import (
    COLOURS,
    ReportModel,
    document,
    escape,
    figure_html,
    how_measured,
    new_axes,
    restart_figures,
    short_names,
)
from lrface.benchmarks.report import format_columns
from lrface.errors import LrfaceError

Rows = Sequence[Mapping[str, Any]]
SAME = "-"
"""What a cell holds where a row has no such figure."""


def _number(value: float | None) -> str:
    return SAME if value is None else f"{value:.2f}"


def _size(row: Mapping[str, Any]) -> str:
    size = row.get("probe_size")
    return "native" if size is None else f"{size} px"


def _entry(field: str, key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _number((row.get(field) or {}).get(key))


def _columns(rows: Rows) -> tuple[list[tuple[str, Callable[[Mapping[str, Any]], str]]], int]:
    """Headings with what a row shows below them, and how many of them are text."""
    text: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("model", lambda row: str(row["model"]))]
    text.append(("benchmark", lambda row: str(row["benchmark"])))
    text.append(("protocol", lambda row: str(row["protocol"])))
    figures: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []

    def table(field: str, title: str) -> None:
        keys = dict.fromkeys(
            key for row in rows for key, value in (row.get(field) or {}).items() if value is not None
        )
        for key in keys:
            figures.append((f"{title}{key}", _entry(field, key)))

    if any("weighting" in row for row in rows):
        text.append(("faces weighed by", lambda row: str(row.get("weighting", ""))))
        table("tar_at_far", "TAR@FAR=")
    else:
        text.append(("metric", lambda row: f"{row['metric']}{', flip' if row['flip'] else ''}"))
        text.append(("probes", _size))
        table("rank", "rank-")
        if any(row.get("mean_average_precision") is not None for row in rows):
            figures.append(("mAP", lambda row: _number(row.get("mean_average_precision"))))
        table("fnir_at_fpir", "FNIR@FPIR=")
    return text + figures, len(text)


def _notes(rows: Rows) -> list[str]:
    """What was compared, a line for each kind of row, each once."""
    notes = []
    for row in rows:
        if "weighting" in row:
            note = (
                f"{row['benchmark']}: {row['pairs']:,} pairs ({row['same']:,} of one person) of {row['templates']:,} "
                f"templates, {row['images']:,} images of {row['media']:,} media; {row['unaligned']:,} images not aligned"
            )
        else:
            pooled = f", pooled ({row['pooling']}) from {row['probe_images']:,} and {row['gallery_images']:,} images"
            distractors = f", {row['distractors']:,} of them distractors" if row["distractors"] else ""
            note = (
                f"{row['benchmark']}, {row['protocol']}: {row['probes']:,} probes ({row['mated']:,} with a mate) against "
                f"{row['gallery']:,} in the gallery ({row['gallery_identities']:,} people{distractors})"
                f"{pooled if row['pooling'] else ''}; {row['unaligned']:,} images not aligned"
            )
            if row.get("removed_share") is not None:
                note += (
                    f"; open set: {row['removed_share']:.0%} of the people left the gallery (seed {row['seed']}), "
                    f"{row['open_mated']:,} probes with and {row['open_unmated']:,} without a mate"
                )
            if row.get("open_rank") is not None:
                note += f"; a hit is a mate among the {row['open_rank']} best" if row["open_rank"] > 1 else ""
        if note not in notes:
            notes.append(note)
    return notes


def identification_text(rows: Rows, deviations: Sequence[str] = ()) -> str:
    """Rows as one table of plain text; below it what was compared, and how the set differs from the official one."""
    if not rows:
        return "no results"
    columns, left = _columns(rows)
    if len({row["model"] for row in rows}) == 1:
        columns, left = columns[1:], left - 1
    lines = [[show(row) for _, show in columns] for row in rows]
    notes = _notes(rows) + [f"not the official set: {text}" for text in deviations]
    return "\n".join([format_columns([title for title, _ in columns], lines, left=left), *notes])


def _table(rows: Rows) -> str:
    columns, left = _columns(rows)
    head = "".join(
        f"<th{' class=left' if number < left else ''}>{escape(title)}</th>"
        for number, (title, _) in enumerate(columns)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=left' if number < left else ''}>{escape(show(row))}</td>"
            for number, (_, show) in enumerate(columns)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _label(row: Mapping[str, Any], rows: Rows) -> str:
    parts = [str(row["model"])] if len({each["model"] for each in rows}) > 1 else []
    parts.append(str(row["protocol"]).removeprefix("1:N templates, "))
    if len({each.get("probe_size") for each in rows}) > 1:
        parts.append(_size(row))
    return ", ".join(parts)


def _cmc(name: str, rows: Rows, curves: Sequence[NDArray[np.float64] | None]) -> str:
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = new_axes("rank", "probes found (%)", f"{name}: cumulative matches")
    drawn = [(row, curve) for row, curve in zip(rows, curves, strict=True) if curve is not None]
    if not drawn:
        return ""
    for number, (row, curve) in enumerate(drawn):
        axes.step(
            np.arange(1, len(curve) + 1),
            100 * curve,
            where="post",
            color=COLOURS[number % len(COLOURS)],
            label=_label(row, rows),
            linewidth=1.4,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1, 5, 10, 20, 50, 100]))
    axes.set_xticklabels(["1", "5", "10", "20", "50", "100"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    return figure_html(
        figure, "Share of probes with a mate whose identity is among the so many best of the gallery (CMC)."
    )


def _open_set(name: str, rows: Rows, curves: Sequence[OpenSet | None]) -> str:
    from matplotlib.ticker import NullLocator

    drawn = [(row, curve) for row, curve in zip(rows, curves, strict=True) if curve is not None]
    if not drawn:
        return ""
    figure, axes = new_axes(
        "false positive identification rate", "false negative identification rate", f"{name}: open set"
    )
    smallest = min(1 / curve.unmated for _, curve in drawn)
    for number, (row, curve) in enumerate(drawn):
        keep = np.append(np.diff(curve.fpir) > 0, True) & (curve.fpir > 0)
        axes.step(
            curve.fpir[keep],
            np.maximum(curve.fnir[keep], 0.5 / curve.mated),
            where="post",
            color=COLOURS[number % len(COLOURS)],
            label=_label(row, rows),
            linewidth=1.4,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(smallest, 1)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    return figure_html(
        figure,
        "Mates missed against strangers raised, over all thresholds (ISO/IEC 19795-1); lower is better.",
    )


def _resolutions(name: str, rows: Rows) -> str:
    """Rank-1 against the size of the probes, where there is more than one."""
    from matplotlib.ticker import FixedLocator, NullLocator

    sized = [row for row in rows if row.get("rank") and "1" in row["rank"] and row.get("probe_size")]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sized:
        groups.setdefault(
            _label({**row, "probe_size": None}, [{**each, "probe_size": None} for each in rows]), []
        ).append(row)
    sizes = sorted({int(row["probe_size"]) for row in sized})
    if len(sizes) < 2:
        return ""
    figure, axes = new_axes(
        "resolution of the probes (pixels)", "rank-1 (%)", f"{name}: rank-1 against resolution"
    )
    for number, (label, group) in enumerate(groups.items()):
        ordered = sorted(group, key=lambda row: row["probe_size"])
        axes.plot(
            [row["probe_size"] for row in ordered],
            [row["rank"]["1"] for row in ordered],
            "o-",
            color=COLOURS[number % len(COLOURS)],
            markersize=4,
            label=label,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.set_xticklabels([str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    return figure_html(figure, "Probes at each size against the gallery as it is.")


def _accepts(name: str, rows: Rows) -> str:
    """TAR against FAR at the rates of the table."""
    figure, axes = new_axes("false accept rate", "true accept rate (%)", f"{name}: 1:1 templates")
    drawn = False
    for number, row in enumerate(rows):
        points = [(float(rate), value) for rate, value in row["tar_at_far"].items() if value is not None]
        if not points:
            continue
        drawn = True
        models = f"{row['model']}, " if len({each["model"] for each in rows}) > 1 else ""
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=COLOURS[number % len(COLOURS)],
            markersize=4,
            label=f"{models}{row['weighting']}",
        )
    if not drawn:
        return ""
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    return figure_html(figure, "True accepts at each false accept rate, over all pairs of templates.")


def identification_page(
    rows: Rows,
    matches: Sequence[NDArray[np.float64] | None],
    opened: Sequence[OpenSet | None],
    models: Sequence[ReportModel],
    deviations: Sequence[str] = (),
    title: str = "Identification",
    lead: str = "",
) -> str:
    """The page as text; ``lead`` is HTML put before the curves.

    Args:
        rows: those of :class:`lrface.identification_run.IdentificationRun`.
        matches: the CMC curve of each row, float64 [k], or None.
        opened: the open-set curve of each row, or None.
        models: how each was prepared.
        deviations: how the set differs from the official one, in words.
        title: the heading.

    Raises:
        LrfaceError: there is nothing to show.
    """
    if not rows:
        raise LrfaceError("a report needs at least one result")
    restart_figures()
    short = short_names([model.name for model in models])
    rows = [{**row, "model": short[row["model"]]} for row in rows]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = list(dict.fromkeys(str(row["benchmark"]) for row in rows))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">lrface {escape(lrface.__version__)}, {made}. Models: '
        f"{', '.join(escape(name) for name in short.values())}. Benchmarks: {', '.join(map(escape, names))}.</p>",
        lead,
        *identification_sections(rows, matches, opened, deviations),
        how_measured(models, short),
    ]
    return document(title, parts)


def identification_sections(
    rows: Rows,
    matches: Sequence[NDArray[np.float64] | None],
    opened: Sequence[OpenSet | None],
    deviations: Sequence[str] = (),
) -> list[str]:
    """What a page shows of the rows: curves, their table, what was compared; see :func:`identification_page`."""
    parts = []
    names = list(dict.fromkeys(str(row["benchmark"]) for row in rows))
    for name in names:
        chosen = [number for number, row in enumerate(rows) if row["benchmark"] == name]
        own = [rows[number] for number in chosen]
        if any("weighting" in row for row in own):
            figures = [_accepts(name, own)]
        else:
            figures = [
                _cmc(name, own, [matches[number] for number in chosen]),
                _open_set(name, own, [opened[number] for number in chosen]),
                _resolutions(name, own),
            ]
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    parts += ["<h2>Results</h2>", "<p class=note>All figures are percentages.</p>", _table(rows)]
    parts.append("<h2>What was compared</h2>")
    parts += [f"<p>{escape(note)}.</p>" for note in _notes(rows)]
    parts += [f"<p><b>Not the official set:</b> {escape(text)}.</p>" for text in deviations]
    return parts
