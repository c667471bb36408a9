"""Suites of benchmarks: the tables of the paper with its rows beside one's own, or everything that is found on disk."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrface.benchmarks.locate import KNOWN_BENCHMARKS, known_benchmark, locate_benchmark
from lrface.benchmarks.page import short_names
from lrface.benchmarks.published import NAMES, SOURCE, TABLE_4, TABLE_4_BENCHMARKS, TABLE_5
from lrface.benchmarks.report import format_columns, matrix_tables
from lrface.benchmarks.verification import RESOLUTIONS
from lrface.embed import open_model
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import VerificationRun, check_described, verify_models
from lrface.identification_run import IdentificationRun, run_identification

SUITES = ("paper", "full")
IDENTIFICATION = {"paper": ("tinyface",), "full": ("tinyface", "survface", "ijbb", "ijbc")}


@dataclass(frozen=True)
class Cell:
    """One or more figures in percent (AgeDB-30 / CFP-FP); None where there is none. ``intervals``: 95 %, of figures that
    were measured."""

    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()

    @property
    def text(self) -> str:
        return " / ".join("-" if value is None else f"{value:.2f}" for value in self.values)

    @property
    def interval_text(self) -> str:
        return " / ".join("-" if i is None else f"{i[0]:.2f} to {i[1]:.2f}" for i in self.intervals)


@dataclass(frozen=True)
class Table:
    """A table as the paper prints it.

    Attributes:
        name: its title.
        note: what stands in the cells.
        columns: the headings of the figures.
        rows: method, where its figures come from ("paper" or "measured"), and a cell for each column.
    """

    name: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, str, list[Cell]]]

    def to_text(self) -> str:
        lines = [[method, source, *(cell.text for cell in cells)] for method, source, cells in self.rows]
        header = ["method", "figures", *self.columns]
        return f"{self.name}\n{self.note}\n{format_columns(header, lines, left=2)}"

    def to_html(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            f'<tr><td class="left">{html.escape(method)}</td><td class="left">{source}</td>'
            + "".join(
                f"<td>{cell.text}"
                + (f'<br><span class="note">{cell.interval_text}</span>' if cell.intervals else "")
                + "</td>"
                for cell in cells
            )
            + "</tr>"
            for method, source, cells in self.rows
        )
        return (
            f'<h2>{html.escape(self.name)}</h2><p class="note">{html.escape(self.note)}; below measured figures their '
            '95 % intervals.</p><div class="scroll"><table class="suite"><thead><tr><th class="left">method</th>'
            f'<th class="left">figures</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "note": self.note,
            "columns": list(self.columns),
            "rows": [
                {
                    "method": method,
                    "figures": source,
                    "cells": [
                        {"values": list(cell.values), "intervals": [i and list(i) for i in cell.intervals]}
                        for cell in cells
                    ],
                }
                for method, source, cells in self.rows
            ],
        }


@dataclass
class SuiteRun:
    """What a suite found.

    Attributes:
        suite: its name.
        tables: in the paper's layout.
        verification: every row behind them.
        identification: by benchmark.
        missing: benchmark -> where it should be and how one gets it.
    """

    suite: str
    tables: list[Table] = field(default_factory=list)
    verification: VerificationRun = field(default_factory=VerificationRun)
    identification: dict[str, IdentificationRun] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "suite": self.suite,
            "tables": [table.to_json() for table in self.tables],
            "missing": [{"benchmark": name, "message": text} for name, text in self.missing.items()],
            **self.verification.to_json(),
            "identification": {name: run.to_json() for name, run in self.identification.items()},
        }

    def to_text(self) -> str:
        parts = [table.to_text() for table in self.tables]
        parts.append(matrix_tables(self.verification.rows))
        if self.missing:
            parts.append(f"not found, so not in the tables: {', '.join(self.missing)}")
        return "\n\n".join(part for part in parts if part)

    def page(self) -> str:
        """The report as one HTML page: the tables, then everything that `lrface verify --report` and `lrface identify
        --report` show."""
        missing = (
            f'<p class="note">Not found, so not in the tables: {html.escape(", ".join(self.missing))}.</p>'
            if self.missing
            else ""
        )
        lead = "".join(table.to_html() for table in self.tables) + missing
        title, runs = f"Suite {self.suite}", list(self.identification.values())
        if self.verification.evaluations:
            return self.verification.page(
                title, lead, lambda short: [part for run in runs for part in run.sections(short)]
            )
        if not runs:
            raise LrfaceError(f"a report of suite {self.suite} needs at least one of its benchmarks")
        together = IdentificationRun(
            rows=[row for run in runs for row in run.rows],
            curves=[curve for run in runs for curve in run.curves],
            models=runs[0].models,
            notes=[note for run in runs for note in run.notes],
        )
        return together.page(title, lead)


def run_suite(
    models: Sequence[str],
    suite: str = "paper",
    resolutions: Sequence[int] = RESOLUTIONS,
    *,
    benchmarks: Sequence[str] = (),
    data: str | Path | None = None,
    say: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> SuiteRun:
    """Evaluate models on a suite.

    "paper" is AgeDB-30, CFP-FP (Table 4) and TinyFace (Table 5); "full" every known benchmark, with every gallery size
    against every probe size. Benchmarks that are not on disk are listed, and the others are run.

    Args:
        models: as :func:`lrface.embed.parse_model` takes them. A file of others must be described: nothing is assumed.
        resolutions: sizes of both images of a pair.
        benchmarks: further verification benchmarks, by name or path; these must be there.
        data: where benchmarks are looked for first.
        say: told where each missing benchmark should be.
        options: ``cache, keep_features, device, precision, batch_size, workers, show_progress`` of
            :func:`lrface.evaluation.verify_models`.

    Raises:
        UsageError: an unknown suite, or a model that says nothing about its input.
        LrfaceError: no benchmark of the suite is there and no other was asked for, or one is broken.
    """
    if suite not in SUITES:
        raise UsageError(f"--suite must be one of {', '.join(SUITES)}; found {suite!r}")
    names = list(TABLE_4_BENCHMARKS if suite == "paper" else KNOWN_BENCHMARKS)
    run = SuiteRun(suite)
    further = [name for name in dict.fromkeys(map(_one_name, benchmarks)) if name not in names]
    for name in further:
        locate_benchmark(name, data=data)
    found = [name for name in names if _there(name, lambda name: locate_benchmark(name, data=data), run, say)]
    people = [
        name for name in IDENTIFICATION[suite] if _there(name, lambda name: _find(name, data), run, say)
    ]
    if not (found or further or people):
        raise LrfaceError(
            f"no benchmark of suite {suite} was found ({', '.join(run.missing)}); put at least one where the messages "
            "above say, or name others with --benchmark"
        )
    if not (found or further):  # verify_models looks itself
        for model in dict.fromkeys(models):
            check_described(open_model(model), assume=False)
    else:
        run.verification = verify_models(
            models,
            [*found, *further],
            resolutions,
            data=data,
            matrix=suite == "full",
            assume=False,
            **options,
        )
    for name in people:
        run.identification[name] = run_identification(models, name, data=data, **options)
    run.tables = _tables(run, list(dict.fromkeys(models)), list(dict.fromkeys(resolutions)))
    return run


def _one_name(benchmark: str) -> str:
    """A known benchmark by its one name, whatever the spelling; a path as it is."""
    known = known_benchmark(benchmark)
    return benchmark if known is None or Path(benchmark).exists() else known.name


def _find(name: str, data: str | Path | None) -> Any:
    from lrface.benchmarks.ijb import find_ijb
    from lrface.benchmarks.survface import IDENTIFICATION as SURVFACE
    from lrface.benchmarks.survface import find_survface
    from lrface.benchmarks.tinyface import find_tinyface

    if name == "tinyface":
        return find_tinyface(data)
    return find_survface(SURVFACE, data) if name == "survface" else find_ijb(name, data)


def _there(name: str, find: Callable[[str], Any], run: SuiteRun, say: Callable[[str], None]) -> bool:
    try:
        find(name)
    except UsageError:
        raise
    except LrfaceError as error:
        # One set can be both a verification and an identification benchmark.
        run.missing[f"{name} (identification)" if name in run.missing else name] = str(error)
        say(str(error))
        return False
    return True


def _tables(run: SuiteRun, models: list[str], sizes: list[int]) -> list[Table]:
    short = short_names(models)
    cells = {
        (row["model"], row["benchmark"], row["probe_size"]): row
        for row in run.verification.rows
        if row["gallery_size"] == row["probe_size"]
    }
    names = list(dict.fromkeys(name for _, name, _ in cells))
    tables = []
    if set(names) & set(TABLE_4_BENCHMARKS):
        tables.append(_table_4(short, cells, sizes))
    others = [name for name in names if name not in TABLE_4_BENCHMARKS]
    if others:
        rows = [
            (
                f"{short[model]} on {name}",
                "measured",
                [_measured([cells[model, name, size]]) for size in sizes],
            )
            for name in others
            for model in models
        ]
        note = "Verification accuracy in %, both images at each size"
        tables.append(Table("Further benchmarks", note, tuple(f"{s}x{s}" for s in sizes), rows))
    tables += [_ranks(name, found, short) for name, found in run.identification.items()]
    return tables


def _measured(rows: Sequence[Mapping[str, Any] | None]) -> Cell:
    return Cell(
        tuple(None if row is None else row["accuracy"] for row in rows),
        tuple(None if row is None else tuple(row["accuracy_interval"]) for row in rows),
    )


def _table_4(
    short: Mapping[str, str], cells: Mapping[tuple[str, str, int], Mapping[str, Any]], sizes: Sequence[int]
) -> Table:
    rows = [
        (NAMES[key], "paper", [Cell(printed.get(size, (None, None))) for size in sizes])
        for key, printed in TABLE_4.items()
    ]
    rows += [
        (
            name,
            "measured",
            [_measured([cells.get((model, each, size)) for each in TABLE_4_BENCHMARKS]) for size in sizes],
        )
        for model, name in short.items()
    ]
    return Table(
        f"Table 4 of {SOURCE}",
        "Verification accuracy in %, AgeDB-30 / CFP-FP, both images at each size",
        tuple(f"{size}x{size}" for size in sizes),
        rows,
    )


def _ranks(benchmark: str, found: IdentificationRun, short: Mapping[str, str]) -> Table:
    """Table 5 for TinyFace, the same columns for other sets."""
    rows: list[tuple[str, str, list[Cell]]] = []
    if benchmark == "tinyface":
        rows += [
            (NAMES[key], "paper", [Cell((value,)) for value in r.values()]) for key, r in TABLE_5.items()
        ]
    ranks = [str(rank) for rank in TABLE_5["naive"]]
    for row in found.rows:
        if row.get("rank"):
            values = [row["rank"].get(rank) for rank in ranks]
            rows.append(
                (
                    f"{short[row['model']]}, {row['protocol']}",
                    "measured",
                    [Cell((value,), (_wilson(value, row["mated"]),)) for value in values],
                )
            )
    title = f"Table 5 of {SOURCE}" if benchmark == "tinyface" else f"Identification on {benchmark}"
    return Table(
        title,
        f"{'TinyFace' if benchmark == 'tinyface' else benchmark}, closed set: probes in % with their person among the best",
        tuple(f"Rank-{rank}" for rank in ranks),
        rows,
    )


def _wilson(percent: float | None, trials: int) -> tuple[float, float] | None:
    """The 95 % score interval of a share of ``trials`` (Wilson, 1927), in percent."""
    if percent is None:
        return None
    share, z = percent / 100, 1.959964
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return round(100 * max(0.0, middle - half), 4), round(100 * min(1.0, middle + half), 4)
