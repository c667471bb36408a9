"""Runs of `lrface train` on disk: listed, and compared side by side."""

import copy
import csv
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrface.benchmarks.report import format_columns
from lrface.config import parse_recipe, read_yaml, to_plain
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, is_locked, read_json
from lrface.train.checkpoint import latest_checkpoint
from lrface.train.record import RECORD
from lrface.train.validate import read_validation

SPEED_ROWS = 20
MISSING = "-"
LONGEST_CELL = 40


@dataclass
class StageReport:
    """What a stage has come to.

    step: of its newest checkpoint or its last row, whichever is later; steps: of the whole stage, None where the run
    was made by a version that did not say.
    """

    name: str
    folder: str
    step: int
    steps: int | None
    validation: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class RunReport:
    """One run.

    state: running (a process holds its lock), finished, interrupted (a signal, or a kill), failed, or broken.
    stage, step, steps: where it is, steps counted within the stage.
    images_per_second: median of the last rows of the log.
    loss: of the last row.
    validation: size in pixels -> accuracy in percent, of the last validation, or of the chosen one of a finished run.
    bytes: what the folder takes on disk.
    problem: why a run is broken or failed.
    """

    name: str
    path: str
    state: str
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    images_per_second: float | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    started: str | None = None
    ended: str | None = None
    problem: str | None = None
    stages: list[StageReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` was made by `lrface train`."""
    return (folder / "recipe.yaml").is_file() or (folder / RECORD).is_file()


def find_runs(root: str | Path) -> list[Path]:
    """Run folders at and below ``root``, by name; runs are not looked for inside of runs.

    Raises:
        LrfaceError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise LrfaceError(
            f"{root}: no such folder; runs of `lrface train` go to runs/ unless the recipe says else"
        )
    found = []
    for place, folders, _ in os.walk(root):
        if is_run(Path(place)):
            found.append(Path(place))
            folders.clear()
        # Data and environments can be large, and no run is kept where a dot hides it.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's metrics.csv; a line that a kill cut short is left out.

    Raises:
        LrfaceError: the file cannot be read.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    rows.append({key: float(value) for key, value in row.items()})
                except (TypeError, ValueError):
                    continue
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LrfaceError(f"{path} cannot be read: {error}") from error
    return [row for row in rows if "step" in row]


def folder_size(folder: Path) -> int:
    """Bytes of the files below ``folder``; one that vanishes meanwhile (an old checkpoint) is not counted."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def read_run(folder: str | Path) -> RunReport:
    """What ``folder`` tells about its run. A folder that cannot be read is a report with state "broken"."""
    folder = Path(folder)
    report = RunReport(folder.name, str(folder), "broken", bytes=folder_size(folder))
    try:
        _read_run(folder, report)
    except LrfaceError as error:
        report.state, report.problem = "broken", str(error)
    return report


def _recipe(folder: Path) -> dict[str, Any]:
    plain = read_yaml(folder / "recipe.yaml")
    if not isinstance(plain, dict):
        raise LrfaceError(f"{folder / 'recipe.yaml'} holds no recipe")
    return plain


def _resolved(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the defaults of what this version added; as it is where this version reads it no more."""
    try:
        plain: dict[str, Any] = to_plain(parse_recipe(copy.deepcopy(recipe)))
    except UsageError:
        return recipe
    return plain


def _read_run(folder: Path, report: RunReport) -> None:
    recipe = _recipe(folder)
    report.name = str(recipe.get("name", folder.name))
    record: dict[str, Any] = {}
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD, "the record of the run")
    sessions = record.get("sessions")
    session = sessions[-1] if isinstance(sessions, list) and sessions else {}
    if not isinstance(session, dict) or (record and record.get("format") != "lrface-run"):
        raise LrfaceError(f"{folder / RECORD} is no record of a run")
    planned = {entry.get("name"): entry.get("steps") for entry in _dicts(record.get("stages"))}
    for entry in _dicts(recipe.get("stages")):  # runs that have no record
        planned.setdefault(entry.get("name"), entry.get("steps"))
    found = sorted((folder / "stages").glob("[0-9]*-*"), key=lambda stage: int(stage.name.split("-")[0]))
    last_rows: list[dict[str, float]] = []
    for stage in found:
        name = stage.name.partition("-")[2]
        rows = read_metrics(stage)
        newest = latest_checkpoint(stage)
        saved = int(newest.name.removeprefix("step-")) if newest is not None else 0
        step = max(saved, int(rows[-1]["step"]) + 1 if rows else 0)
        report.stages.append(StageReport(name, str(stage), step, planned.get(name), read_validation(stage)))
        last_rows = rows or last_rows
    if report.stages:
        current = report.stages[-1]
        report.stage, report.step, report.steps = current.name, current.step, current.steps
        if current.validation:
            report.validation = _accuracies(current.validation[max(current.validation)])
    if last_rows:
        speeds = [row["images_per_second"] for row in last_rows[-SPEED_ROWS:] if "images_per_second" in row]
        report.images_per_second = statistics.median(speeds) if speeds else None
        report.loss = last_rows[-1].get("loss")
    report.started = _dicts(sessions)[0].get("started") if sessions else None
    report.ended = session.get("ended")
    report.problem = session.get("error")
    complete = (folder / "model.safetensors").is_file()
    if session.get("process") == os.getpid() and session.get("state") == "running":
        report.state = "running"  # our own: to ask for a lock that this process holds would end it
    elif is_locked(folder):
        report.state = "running"
    elif session.get("state") == "failed":
        report.state = "failed"
    elif complete and session.get("state", "finished") == "finished":
        report.state = "finished"
        report.steps = report.step if report.steps is None else report.steps
        card = read_json(folder / "model.json", "the card of the model")
        chosen = card.get("chosen")
        if isinstance(chosen, dict) and isinstance(chosen.get("validation"), dict):
            report.validation = _accuracies(chosen["validation"])
    else:
        report.state = "interrupted"


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _accuracies(row: dict[str, Any]) -> dict[str, float]:
    """A row of validation.csv -> accuracies by size, "mean" first."""
    return {
        key.removeprefix("accuracy_"): float(value)
        for key, value in row.items()
        if key.startswith("accuracy_")
    }


def list_runs(root: str | Path) -> list[RunReport]:
    """Reports of all runs at and below ``root``. Raises LrfaceError when there is no such folder."""
    return [read_run(folder) for folder in find_runs(root)]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _number(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def _validation(report: RunReport) -> str:
    return " ".join(f"{size}:{value:.1f}" for size, value in report.validation.items()) or MISSING


def runs_table(reports: Sequence[RunReport]) -> str:
    """The list for people."""
    if not reports:
        return "no runs"
    header = ["run", "recipe", "state", "stage", "step", "images/s", "loss", "validation (%)", "on disk"]
    lines = [
        [
            report.path,
            report.name,
            report.state,
            report.stage or MISSING,
            MISSING if report.step is None else f"{report.step}/{report.steps or '?'}",
            _number(report.images_per_second),
            _number(report.loss),
            _validation(report),
            _bytes(report.bytes),
        ]
        for report in reports
    ]
    problems = [f"{report.path}: {report.problem}" for report in reports if report.problem]
    return "\n".join([format_columns(header, lines, left=4), *problems])


@dataclass
class Comparison:
    """Runs side by side.

    keys: dotted keys of the recipes that differ -> the value in each run (None where it has no such key).
    results: what they came to -> the figure of each run.
    """

    runs: list[RunReport]
    keys: dict[str, list[Any]]
    results: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": [run.to_dict() for run in self.runs],
            "differences": self.keys,
            "results": self.results,
        }

    def to_text(self) -> str:
        names = _labels([run.path for run in self.runs])
        parts = []
        if self.keys:
            lines = [[key, *(_shown(value) for value in values)] for key, values in self.keys.items()]
            parts.append(format_columns(["recipe", *names], lines))
        else:
            parts.append("the recipes are the same")
        lines = [[key, *(_shown(value) for value in values)] for key, values in self.results.items()]
        parts.append(format_columns(["result", *names], lines))
        return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """A plain tree as dotted keys; items of a list of mappings (stages) go by number, other lists stay values."""
    if isinstance(value, dict) and value:
        return {
            dotted: leaf
            for key, item in value.items()
            for dotted, leaf in flat(item, f"{where}.{key}" if where else str(key)).items()
        }
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {
            dotted: leaf
            for number, item in enumerate(value)
            for dotted, leaf in flat(item, f"{where}.{number}").items()
        }
    return {where: value}


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Differing keys of the recipes, and results, of at least two runs.

    Raises:
        UsageError: fewer than two.
        LrfaceError: one of them is no run, or is broken.
    """
    if len(folders) < 2:
        raise UsageError("lrface runs compare takes two runs or more")
    reports, recipes = [], []
    for folder in map(Path, folders):
        if not is_run(folder):
            raise LrfaceError(
                f"{folder} is no run of `lrface train`: it has neither recipe.yaml nor {RECORD}"
            )
        report = read_run(folder)
        if report.state == "broken":
            raise LrfaceError(f"{folder}: {report.problem}")
        reports.append(report)
        recipes.append(flat(_resolved(_recipe(folder))))
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = {
        key: [recipe.get(key) for recipe in recipes]
        for key in keys
        if key != "out" and any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)
    }
    results: dict[str, list[Any]] = {
        "state": [run.state for run in reports],
        "stage": [run.stage for run in reports],
        "step": [run.step for run in reports],
        "loss": [run.loss for run in reports],
        "images/s": [run.images_per_second for run in reports],
    }
    for size in dict.fromkeys(size for run in reports for size in run.validation):
        results[f"validation {size} (%)"] = [run.validation.get(size) for run in reports]
    return Comparison(reports, differing, results)


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Loss and validation accuracy of all runs against the step, stages one after the other; a panel for each size.

    Raises:
        UsageError: a suffix that matplotlib cannot write.
        LrfaceError: the file cannot be written, or a log cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = Path(path)
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"loss": {}}
    ends: list[list[int]] = []
    labels = _labels([run.path for run in comparison.runs])
    for label, run in zip(labels, comparison.runs, strict=True):
        before = 0
        ends.append([])
        for stage in run.stages:
            rows = [row for row in read_metrics(Path(stage.folder)) if "loss" in row]
            points = curves["loss"].setdefault(label, ([], []))
            points[0].extend(before + row["step"] for row in rows)
            points[1].extend(row["loss"] for row in rows)
            for step, row in sorted(stage.validation.items()):
                for size, value in _accuracies(row).items():
                    name = "mean of sizes" if size == "mean" else f"{size} x {size}"
                    points = curves.setdefault(name, {}).setdefault(label, ([], []))
                    points[0].append(before + step)
                    points[1].append(value)
            # Losses of two stages are other quantities: the line breaks between them.
            curves["loss"][label][0].append(before + stage.step)
            curves["loss"][label][1].append(math.nan)
            before += stage.step
            ends[-1].append(before)
    columns = min(3, len(curves))
    rows_of_panels = -(-len(curves) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows_of_panels), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if file.suffix.lstrip(".").lower() not in canvas.get_supported_filetypes():
        known = ", ".join(sorted(canvas.get_supported_filetypes()))
        raise UsageError(f"--plot {file}: the suffix must be one of {known}")
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for panel, (title, lines) in zip(panels, curves.items(), strict=False):
        for number, label in enumerate(labels):
            steps, values = lines.get(label, ([], []))
            marker = None if title == "loss" else "o"
            panel.plot(
                steps, values, label=label, marker=marker, markersize=3.5, linewidth=1.3, color=f"C{number}"
            )
            for end in ends[number][:-1]:
                panel.axvline(end, color=f"C{number}", linewidth=0.8, linestyle=":")
        panel.set_title("training loss" if title == "loss" else f"held-out identities, {title}", fontsize=11)
        panel.set_xlabel("steps, stages one after the other")
        panel.set_ylabel("loss" if title == "loss" else "verification accuracy (%)")
        panel.grid(True, alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    with atomic_file(file) as aside:
        canvas.print_figure(aside, dpi=130, format=file.suffix.lstrip(".").lower())


def _labels(paths: Sequence[str]) -> list[str]:
    """Names of the folders, whole paths where names are alike."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
