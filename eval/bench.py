"""Measures lrface against the tools it replaces, side by side in one run each: `make bench`.

Runs the scripts in eval/bench/ and merges their figures into eval/results/bench.json, a list of
``{name, ours, peer, ratio, unit, threads, commit, date}``; a ratio above 1 means that lrface is better. Figures of
other names stay as they are.

A script has ``NAMES``, the figures it measures, and ``run(**options) -> list[dict]``, which gives a dict with name,
ours, peer, ratio, unit and threads for each. Where ``run`` has parameters of these names, it is told ``names`` (the
figures asked for) and ``quick`` (a short look is enough).
"""

import argparse
import importlib.util
import inspect
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from lrface.errors import LrfaceError
from lrface.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "eval" / "bench"
RESULTS = ROOT / "eval" / "results" / "bench.json"
FIELDS = ("name", "ours", "peer", "ratio", "unit", "threads")


def load_script(path: Path) -> ModuleType:
    """The script as a module, found by its path."""
    spec = importlib.util.spec_from_file_location(f"lrface_bench_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what the script defines can then be pickled for its worker processes
    spec.loader.exec_module(module)
    return module


def find_figures(folder: Path = SCRIPTS) -> dict[str, ModuleType]:
    """Every figure's name and the script that measures it."""
    found: dict[str, ModuleType] = {}
    for path in sorted(folder.glob("*.py")):
        script = load_script(path)
        for name in script.NAMES:
            if name in found:
                raise LrfaceError(f"figure {name!r} is measured by {found[name].__file__} and by {path}")
            found[name] = script
    return found


def measure(script: ModuleType, names: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """The rows of ``names``. Raises LrfaceError when one is missing or incomplete."""
    offered = inspect.signature(script.run).parameters
    options = {"names": list(names), "quick": quick}
    rows = script.run(**{key: value for key, value in options.items() if key in offered})
    by_name = {row.get("name"): row for row in rows}
    for name in names:
        row = by_name.get(name)
        if row is None:
            raise LrfaceError(f"{script.__file__} gave no figure {name!r}")
        missing = [field for field in FIELDS if field not in row]
        if missing:
            raise LrfaceError(f"{script.__file__}: figure {name!r} lacks {', '.join(missing)}")
        for field in ("ours", "peer", "ratio"):
            if not math.isfinite(row[field]) or row[field] <= 0:
                raise LrfaceError(f"{script.__file__}: {field} of {name!r} is {row[field]}, not above 0")
    return [by_name[name] for name in names]


def merge(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put ``rows`` in the place of those of the same names, new names at the end."""
    try:
        known = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = {}
    except (ValueError, TypeError, KeyError) as error:
        raise LrfaceError(f"{path} is no list of figures ({error}); move it away and run again") from error
    known.update({row["name"]: row for row in rows})
    write_json(path, list(known.values()))


def commit() -> str:
    """The commit measured, with "-dirty" behind it where files of it are changed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    cells = [("figure", "lrface", "peer", "ratio", "unit", "threads")]
    cells += [
        (r["name"], f"{r['ours']:.4g}", f"{r['peer']:.4g}", f"{r['ratio']:.3f}", r["unit"], str(r["threads"]))
        for r in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure lrface against the tools it replaces."
    )
    parser.add_argument("--only", metavar="NAME", help="measure one figure")
    parser.add_argument(
        "--quick", action="store_true", help="a short look: rough figures, nothing is written"
    )
    options = parser.parse_args(arguments)
    figures = find_figures()
    if options.only is not None and options.only not in figures:
        print(f"error: no figure {options.only!r}; there are: {', '.join(figures)}", file=sys.stderr)
        return 2
    wanted = [options.only] if options.only is not None else list(figures)
    scripts = list(dict.fromkeys(figures[name] for name in wanted))
    measured: list[dict[str, Any]] = []
    failed = False
    for script in scripts:
        names = [name for name in wanted if figures[name] is script]
        print(f"measuring {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            rows = measure(script, names, options.quick)
            if not options.quick:
                stamp = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
                rows = [{**row, **stamp} for row in rows]
                merge(RESULTS, rows)
        except LrfaceError as error:
            print(f"error: {', '.join(names)}: {error}", file=sys.stderr)
            failed = True
            continue
        measured += rows
    if measured:
        print(table(measured))
        if not options.quick:
            print(f"written to {RESULTS}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
