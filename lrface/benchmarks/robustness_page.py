"""Robustness of classifiers as plain text and as one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

import lrface
from lrface.benchmarks.page import (
    COLOURS,
    ReportModel,
    document,
    escape,
    figure_html,
    heat_cell,
    how_measured,
    new_axes,
    restart_figures,
    short_names,
)
from lrface.benchmarks.report import format_columns
from lrface.errors import LrfaceError

Results = Sequence[Mapping[str, Any]]
"""``results`` of :class:`lrface.robustness.RobustnessRun`."""


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _between(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


_SUMMARY = (
    ("clean error", "clean_error"),
    ("mean error", "mean_error"),
    ("95 % interval", "mean_error_interval"),
    ("without noise", "mean_error_without_noise"),
    ("held out", "held_out_mean_error"),
    ("mCE", "mce"),
    ("95 % interval", "mce_interval"),
    ("mCE without noise", "mce_without_noise"),
    ("relative mCE", "relative_mce"),
    ("relative mCE without noise", "relative_mce_without_noise"),
)


def _summary(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the summary; columns that nobody has a figure for are left out."""
    used = [(title, key) for title, key in _SUMMARY if any(row[key] is not None for row in results)]
    lines = [
        [
            row["model"],
            *(_between(row[key]) if key.endswith("_interval") else _number(row[key]) for _, key in used),
        ]
        for row in results
    ]
    return ["model", *(title for title, _ in used)], lines


def _shifted(results: Results) -> tuple[list[str], list[list[str]]] | tuple[()]:
    """Header and lines of the errors on further clean sets; nothing without such sets."""
    rows = [(result["model"], found) for result in results for found in result.get("shifted", ())]
    if not rows:
        return ()
    lines = [
        [
            model,
            found["origin"],
            str(found["images"]),
            _number(found["error"]),
            _between(found["error_interval"]),
        ]
        for model, found in rows
    ]
    return ["model", "further images", "number", "error", "95 % interval"], lines


def _by_corruption(result: Mapping[str, Any], severities: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one model's corruptions."""
    rows = result["corruptions"]
    top5 = any(row["top5_error"] is not None for row in rows)
    alexnet = any(row["ce"] is not None for row in rows)
    header = ["corruption", *(f"severity {level}" for level in severities), "mean", "95 % interval"]
    header += (["top-5"] if top5 else []) + (["CE", "relative CE"] if alexnet else [])
    lines = []
    for row in rows:
        line = [row["corruption"].replace("_", " ") + (" (held out)" if row["held_out"] else "")]
        line += [_number(value) for value in row["errors"]]
        line += [_number(row["error"]), _between(row["error_interval"])]
        line += [_number(row["top5_error"])] if top5 else []
        line += [_number(row["ce"]), _number(row["relative_ce"])] if alexnet else []
        lines.append(line)
    return header, lines


def _about(about: Mapping[str, Any]) -> str:
    made = (
        f"stored in {about['origin']}"
        if about["made"] == "stored"
        else f"made of {about['origin']} on the fly, seed {about['seed']}"
    )
    subset = f" ({about['subset']})" if about["subset"] else ""
    return (
        f"{about['title']}: {about['images']} images{subset} of {about['classes']} classes, {made}; guesses among "
        f"{about['predictions_among']}"
    )


def robustness_text(about: Mapping[str, Any], results: Results) -> str:
    """Everything as plain text: a summary of the models, and each model's errors in percent."""
    parts = [_about(about), format_columns(*_summary(results))]
    if _shifted(results):
        parts.append(format_columns(*_shifted(results)))
    for result in results:
        parts.append(f"{result['model']}\n{format_columns(*_by_corruption(result, about['severities']))}")
    notes = list(about["notes"])
    if about["broken"]:
        notes.append(f"{len(about['broken'])} images could not be used:")
        notes += [f"  {name}: {reason}" for name, reason in about["broken"][:10]]
    parts.append("\n".join(notes))
    return "\n\n".join(part for part in parts if part)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th{'' if at else ' class=left'}>{escape(text)}</th>" for at, text in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if at else ' class=left'}>{escape(text)}</td>" for at, text in enumerate(line))
        + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _severity_curves(about: Mapping[str, Any], results: Results, group: str | None) -> str:
    """Mean error against severity, of all corruptions that count or of one group."""
    title = (
        f"{about['title']}: error against severity" if group is None else f"{group}: error against severity"
    )
    figure, axes = new_axes("severity", "top-1 error (%)", title)
    levels = about["severities"]
    for number, result in enumerate(results):
        rows = [
            row["errors"]
            for row in result["corruptions"]
            if not row["held_out"] and (group is None or row["group"] == group)
        ]
        places, values = list(levels), np.mean(rows, axis=0).tolist()
        if result["clean_error"] is not None:
            places, values = [0, *places], [result["clean_error"], *values]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(places, values, "o-", color=colour, markersize=4, label=result["model"])
    with_clean = any(result["clean_error"] is not None for result in results)
    ticks = ([0] if with_clean else []) + list(levels)
    axes.set_xticks(ticks, ["clean" if level == 0 else str(level) for level in ticks])
    axes.legend(frameon=False, fontsize=9)
    what = "the corruptions that count" if group is None else f"the corruptions of the group {group}"
    return figure_html(figure, f"Mean over {what}, at each severity.")


def _bars(about: Mapping[str, Any], results: Results) -> str:
    """Errors by corruption, a bar a model."""
    figure, axes = new_axes("top-1 error (%)", "", f"{about['title']}: error by corruption")
    names = [row["corruption"] for row in results[0]["corruptions"]]
    figure.set_size_inches(5.6, max(3.9, 0.16 * len(names) * (1 + len(results)) + 1))
    height = 0.8 / len(results)
    for number, result in enumerate(results):
        rows = result["corruptions"]
        places = np.arange(len(names)) + (number - (len(results) - 1) / 2) * height
        error = [row["error"] for row in rows]
        low = [max(0.0, row["error"] - row["error_interval"][0]) for row in rows]
        high = [max(0.0, row["error_interval"][1] - row["error"]) for row in rows]
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(places, error, height=height * 0.92, color=colour, label=result["model"])
        axes.errorbar(error, places, xerr=[low, high], fmt="none", ecolor="#333", elinewidth=0.8, capsize=1.5)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)
    return figure_html(figure, "Mean over severities; whiskers are 95 % bootstrap intervals over images.")


def _heat(result: Mapping[str, Any], severities: Sequence[int], ends: tuple[float, float]) -> str:
    """Corruption (down) against severity (across), the error in each cell."""
    low, high = ends

    def cell(value: float) -> str:
        share = 0.5 if high == low else (value - low) / (high - low)
        return heat_cell(1 - share, f"{value:.1f}")  # few errors are blue

    head = "".join(f"<th>{level}</th>" for level in severities)
    body = "".join(
        f"<tr><th class=left>{escape(row['corruption'].replace('_', ' '))}{' (held out)' if row['held_out'] else ''}</th>"
        + "".join(cell(value) for value in row["errors"])
        + "</tr>"
        for row in result["corruptions"]
    )
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th class=left>top-1 error (%)</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def robustness_page(about: Mapping[str, Any], results: Results, models: Sequence[ReportModel]) -> str:
    """The page as text.

    Args:
        about: see :class:`lrface.robustness.RobustnessRun`.
        results: of each model.
        models: how each was prepared.

    Raises:
        LrfaceError: there is nothing to show.
    """
    if not results:
        raise LrfaceError("a report needs at least one result")
    restart_figures()
    short = short_names([str(result["model"]) for result in results])
    results = [{**result, "model": short[result["model"]]} for result in results]
    title = f"Robustness on {about['title']}"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">lrface {escape(lrface.__version__)}, {made}. {escape(_about(about))}.</p>',
    ]
    groups = list(dict.fromkeys(row["group"] for row in results[0]["corruptions"] if not row["held_out"]))
    drawn = [_bars(about, results)]
    if len(about["severities"]) > 1:
        drawn += [_severity_curves(about, results, None)]
        drawn += [_severity_curves(about, results, group) for group in groups]
    parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    parts += ["<h2>Results</h2>", _table(*_summary(results))]
    if _shifted(results):
        parts.append(_table(*_shifted(results)))
    parts.append(
        "<p class=note>Errors are top-1, in percent; mean error is the mean over corruptions and severities without "
        "AlexNet. CE divides a corruption's error by AlexNet's, mCE is its mean over the 15 corruptions; the relative ones "
        "take the increase over the clean error. Intervals: 95 %, images drawn again 1,000 times.</p>"
    )
    parts += [f"<p class=note>{escape(note)}</p>" for note in about["notes"]]
    values = [value for result in results for row in result["corruptions"] for value in row["errors"]]
    ends = min(values), max(values)
    for result in results:
        parts += [
            f"<h2>{escape(result['model'])}</h2>",
            _heat(result, about["severities"], ends),
            "<h3>By corruption</h3>",
            _table(*_by_corruption(result, about["severities"])),
        ]
    if about["broken"]:
        parts.append(f"<h2>Left out</h2><p>{len(about['broken'])} images could not be used.</p>")
        parts.append(_table(["image", "reason"], about["broken"][:50]))
    parts.append(how_measured(models, short))
    return document(title, parts)
