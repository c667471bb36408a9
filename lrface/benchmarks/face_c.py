"""What the corruptions of ImageNet-C do to face verification: the accuracy of each, their mean, and what is lost."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.page import COLOURS, escape, figure_html, new_axes
from lrface.benchmarks.report import format_columns
from lrface.benchmarks.robustness import group_of
from lrface.benchmarks.verification import Evaluation
from lrface.degrade.corruptions import CORRUPTIONS, HELD_OUT

_CORRUPTED = re.compile(r"(\w+):([1-5])")


def face_c_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Tables of the corrupted rows of one model on one benchmark; none without such rows.

    Returns:
        One with both images corrupted and, where the rows are there (``--cross``), one with a clean gallery:
        ``benchmark, gallery`` ("corrupted" or "clean"), ``clean`` (accuracy without corruption; None where it was not
        measured), ``corruptions`` (``corruption, group, held_out, severities, accuracies, accuracy, drop``), ``mean,
        mean_interval, mean_without_noise, drop, relative`` over those that count, ``held_out_mean`` and ``complete``:
        whether these are all 15 at severities 1 to 5. Accuracies in percent; ``drop`` is what is lost in points,
        ``relative`` the mean in percent of ``clean``; the interval is a 95 % bootstrap over pairs.
    """
    clean = next(
        (
            row["accuracy"]
            for row in evaluation.rows
            if not (row["gallery_losses"] or row["probe_losses"] or row["by_native_size"])
            and row["gallery_size"] == row["probe_size"] == evaluation.benchmark.size
        ),
        None,
    )
    found: dict[str, dict[str, dict[int, int]]] = {"corrupted": {}, "clean": {}}
    for number, row in enumerate(evaluation.rows):
        mark = _CORRUPTED.fullmatch(row["probe_losses"])
        if mark is None or row["probe_size"] != evaluation.benchmark.size:
            continue
        if row["gallery_losses"] in (row["probe_losses"], ""):
            side = "clean" if row["gallery_losses"] == "" else "corrupted"
            found[side].setdefault(mark.group(1), {})[int(mark.group(2))] = number
    return [_table(evaluation, side, rows, clean) for side, rows in found.items() if rows]


def _table(
    evaluation: Evaluation, side: str, found: Mapping[str, Mapping[int, int]], clean: float | None
) -> dict[str, Any]:
    names = sorted(found, key=(*CORRUPTIONS, *HELD_OUT).index)
    corruptions = []
    for name in names:
        levels = sorted(found[name])
        accuracies = [evaluation.rows[found[name][level]]["accuracy"] for level in levels]
        own = float(np.mean(accuracies))
        corruptions.append(
            {
                "corruption": name,
                "group": group_of(name),
                "held_out": name in HELD_OUT,
                "severities": levels,
                "accuracies": accuracies,
                "accuracy": round(own, 4),
                "drop": None if clean is None else round(clean - own, 4),
            }
        )
    counted = [name for name in names if name not in HELD_OUT]

    def mean_of(chosen: Sequence[str]) -> float | None:
        values = [
            float(np.mean([evaluation.rows[row]["accuracy"] for row in found[name].values()]))
            for name in chosen
        ]
        return round(float(np.mean(values)), 4) if values else None

    mean = mean_of(counted)
    interval = None
    if counted:
        by_pair = np.mean(
            [
                np.mean([evaluation.right[row] for row in found[name].values()], axis=0, dtype=np.float64)
                for name in counted
            ],
            axis=0,
        )
        interval = _interval(by_pair, evaluation.benchmark.same)
    return {
        "benchmark": evaluation.benchmark.name,
        "gallery": side,
        "clean": clean,
        "corruptions": corruptions,
        "mean": mean,
        "mean_interval": interval,
        "mean_without_noise": mean_of([name for name in counted if group_of(name) != "noise"]),
        "drop": None if clean is None or mean is None else round(clean - mean, 4),
        "relative": None if not clean or mean is None else round(100 * mean / clean, 4),
        "held_out_mean": mean_of([name for name in names if name in HELD_OUT]),
        "complete": counted == list(CORRUPTIONS) and all(len(found[name]) == 5 for name in counted),
    }


def _interval(right: NDArray[np.float64], same: NDArray[np.bool_], samples: int = 1000) -> list[float]:
    """95 % bootstrap interval in percent of the mean of ``right`` float [p]: same and different pairs are each drawn
    again, as many as there are."""
    rng = np.random.default_rng(0)
    totals = np.zeros(samples)
    for kind in (same, ~same):
        values = right[kind]
        if len(values):
            totals += [values[rng.integers(len(values), size=len(values))].sum() for _ in range(samples)]
    low, high = np.quantile(totals / len(right), [0.025, 0.975])
    return [round(100 * float(low), 4), round(100 * float(high), 4)]


def _lines(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    levels = sorted({level for row in table["corruptions"] for level in row["severities"]})
    header = ["corruption", *(f"severity {level}" for level in levels), "mean", "lost"]
    lines = []
    for row in table["corruptions"]:
        at = dict(zip(row["severities"], row["accuracies"], strict=True))
        lines.append(
            [
                row["corruption"].replace("_", " ") + (" (held out)" if row["held_out"] else ""),
                *(f"{at[level]:.2f}" if level in at else "-" for level in levels),
                f"{row['accuracy']:.2f}",
                "-" if row["drop"] is None else f"{row['drop']:.2f}",
            ]
        )
    return header, lines


def _summary(table: Mapping[str, Any]) -> str:
    if table["mean"] is None:
        return f"held-out corruptions: mean {table['held_out_mean']:.2f} %"
    count = sum(not row["held_out"] for row in table["corruptions"])
    low, high = table["mean_interval"]
    parts = [f"mean over {count} corruptions {table['mean']:.2f} % ({low:.2f} to {high:.2f})"]
    if table["mean_without_noise"] is not None and table["mean_without_noise"] != table["mean"]:
        parts.append(f"without noise {table['mean_without_noise']:.2f} %")
    if table["drop"] is not None:
        parts.append(
            f"clean {table['clean']:.2f} %: {table['drop']:.2f} points are lost, {table['relative']:.2f} % of it stay"
        )
    if table["held_out_mean"] is not None:
        parts.append(f"held-out corruptions {table['held_out_mean']:.2f} %")
    return "; ".join(parts)


def _title(table: Mapping[str, Any], model: str) -> str:
    what = "both images corrupted" if table["gallery"] == "corrupted" else "gallery clean, probe corrupted"
    return f"{table['benchmark']}, {model}: {what}, accuracy in percent"


def face_c_text(tables: Sequence[Mapping[str, Any]]) -> str:
    """Tables of :attr:`lrface.evaluation.VerificationRun.face_c` as plain text."""
    return "\n\n".join(
        f"{_title(table, table['model'])}\n{format_columns(*_lines(table))}\n{_summary(table)}"
        for table in tables
    )


def face_c_sections(tables: Sequence[Mapping[str, Any]], short: Mapping[str, str]) -> list[str]:
    """The same as sections of the report page; ``short`` are the names of models there."""
    if not tables:
        return []
    parts = ["<h2>Corrupted faces</h2>"]
    drawn = []
    for name, gallery in dict.fromkeys((table["benchmark"], table["gallery"]) for table in tables):
        own = [table for table in tables if (table["benchmark"], table["gallery"]) == (name, gallery)]
        drawn.append(_bars(name, gallery, own, short))
    parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    for table in tables:
        header, lines = _lines(table)
        head = "".join(
            f"<th{'' if at else ' class=left'}>{escape(text)}</th>" for at, text in enumerate(header)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td{'' if at else ' class=left'}>{escape(text)}</td>" for at, text in enumerate(line))
            + "</tr>"
            for line in lines
        )
        parts += [
            f"<h3>{escape(_title(table, short[table['model']]))}</h3>",
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
            f"<p class=note>{escape(_summary(table))}</p>",
        ]
    return parts


def _bars(name: str, gallery: str, tables: Sequence[Mapping[str, Any]], short: Mapping[str, str]) -> str:
    figure, axes = new_axes("accuracy (%)", "", f"{name}: accuracy by corruption")
    names = [row["corruption"] for row in tables[0]["corruptions"]]
    figure.set_size_inches(5.6, max(3.9, 0.16 * len(names) * (1 + len(tables)) + 1))
    height = 0.8 / len(tables)
    lowest = 100.0
    for number, table in enumerate(tables):
        values = [row["accuracy"] for row in table["corruptions"]]
        places = np.arange(len(names)) + (number - (len(tables) - 1) / 2) * height
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(places, values, height=height * 0.92, color=colour, label=short[table["model"]])
        if table["clean"] is not None:
            axes.axvline(table["clean"], color=colour, linewidth=1, linestyle="--")
        lowest = min(lowest, *values)
    axes.set_xlim(max(0.0, 5 * np.floor(lowest / 5) - 5), 100)
    axes.set_yticks(range(len(names)), [each.replace("_", " ") for each in names], fontsize=8)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)
    what = "Both images corrupted" if gallery == "corrupted" else "Gallery clean, probe corrupted"
    return figure_html(figure, f"{what}, mean over severities; dashed: clean faces.")
