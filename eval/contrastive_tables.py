"""Tables 1 (with 4), 2 (with 5 and 6), 7, 8, 9, 10, 13 and 14 of the paper on contrastive inversion (paper 002) and its five
losses (section 4.5), measured again on CIFAR-10 beside its numbers.

    python eval/contrastive_tables.py --table 1 --data DATA --rows supervised-mask90 contrastive-mask90
    python eval/contrastive_tables.py --table 1 --data DATA --rows supervised10-mask90    # 10 % of the labels
    python eval/contrastive_tables.py --table 13 --data DATA --rows contrastive-mask90     # trains nothing more
    python eval/contrastive_tables.py --table losses --operator mask90 --data DATA
    python eval/contrastive_tables.py --table 2 --data DATA --transfer flowers=flowers/train,flowers/test
    python eval/contrastive_tables.py --table 8 --data DATA --rows contrastive-mask90 --images 100 --draws 1

Students and end-to-end baselines start from one teacher, a classifier of clean images, which is trained once. Test images
are drawn --draws times; --images takes so many of them. The rows supervised10-* are end-to-end baselines that see 10 % of
the labels, those of the probes of 10 %, for as many steps as the others; the paper has none. Table 2 takes CIFAR-100
(cifar100/{train,test}.parquet) and STL-10 (stl10/{train,test}) where they are, and any other set. Table 10 also has the
stronger degradations of Figure 4; the levels of its printed rows are not in the copy of the paper at hand. In Table 14 each
image has one of the five severities, drawn.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrface.benchmarks import published_contrastive as paper
from lrface.contrastive_figures import UNITS
from lrface.contrastive_study import OPERATORS, OTHER_LEVELS, evaluation, rows, transfer_sets
from lrface.errors import errors_for_users
from lrface.study import Column, Figures, Row, cell, run_study, study_options


def figure(
    what: str,
    name: str = "student",
    labels: float | None = 1.0,
    classifier: str | None = None,
    level: float | None = None,
) -> Callable[[Figures], float | None]:
    """The mean of a figure of one network; an own head stands where the labels that it saw are asked for."""

    def found(figures: Figures) -> float | None:
        for result in figures["results"]:
            kind = result["classifier"] in ((classifier,) if classifier else ("own head", "probe"))
            same = result["labels"] == labels or (result["labels"] is None and labels == 1.0)
            here = level is None or level in result["test_degrade"].values()
            if result["name"] == name and kind and same and here:
                return result[what]["mean"]
        return None

    return found


def printed(*parts: tuple[str, tuple[float, ...]], first: str = "") -> dict[str, float]:
    """Numbers by row: those of a kind in the order of OPERATORS, or of the operators that begin with ``first``."""
    keys = [key for key in paper.OPERATORS if key.startswith(first)]
    return {f"{kind}-{key}": value for kind, values in parts for key, value in zip(keys, values, strict=True)}


def on_set(what: str, name: str) -> Callable[[Figures], float | None]:
    """The mean of a figure on one of the sets of Table 2."""
    return lambda figures: figure(what)(figures["sets"][name]) if name in figures["sets"] else None


def on_corruption(name: str) -> Callable[[Figures], float | None]:
    """Top-1 under one corruption of Table 14."""

    def found(figures: Figures) -> float | None:
        own = [result for result in figures["results"] if result["test_degrade"]["names"] == [name]]
        return own[0]["top1"]["mean"] if own else None

    return found


def columns(table: str, sets: Sequence[str] = ()) -> tuple[Column, ...]:
    """The columns of a table; of Table 2 for these sets."""
    ours = ("contrastive", paper.TABLE_1["contrastive"])
    few = "contrastive, 10 % of the labels"
    if table == "losses":
        return (
            Column("top-1 (%)", figure("top1")),
            Column("top-1, 10 % of the labels (%)", figure("top1", labels=0.1)),
            Column("top-5 (%)", figure("top5")),
            Column("AUC", figure("auc")),
        )
    if table == "2":
        return tuple(
            Column(
                f"{name}, {UNITS[what]}",
                on_set(what, name),
                {key: found[name] for key, found in printed.items() if name in found},
            )
            for what, printed in (("top1", paper.TABLE_2), ("top5", paper.TABLE_5), ("auc", paper.TABLE_6))
            for name in sets
        )
    if table == "14":
        return tuple(
            Column(
                name.replace("_", " "),
                on_corruption(name),
                dict(zip(("supervised-clean", "contrastive-blur_noise"), found, strict=True)),
            )
            for name, found in paper.TABLE_14.items()
        )
    if table == "1":
        both = [
            printed(("supervised", each["supervised"]), ("contrastive", each["contrastive"]))
            for each in (paper.TABLE_1, paper.TABLE_4)
        ]
        tens = [printed(("contrastive", each[few])) for each in (paper.TABLE_1, paper.TABLE_4)]
        return (
            Column("top-1 (%)", figure("top1"), both[0]),
            Column("top-1, 10 % of the labels (%)", figure("top1", labels=0.1), tens[0]),
            Column("top-5 (%)", figure("top5"), both[1]),
            Column("top-5, 10 % of the labels (%)", figure("top5", labels=0.1), tens[1]),
            Column("AUC", figure("auc")),
        )
    if table == "9":
        clean = printed(("contrastive", paper.TABLE_9))
        return (
            Column("clean teacher's classifier (%)", figure("top1", classifier="teacher"), clean),
            Column("student's own clean probe (%)", figure("top1")),
        )
    if table == "13":
        return (
            Column(
                "untouched teacher (%)", figure("top1", "teacher"), printed(("contrastive", paper.TABLE_13))
            ),
            Column("student (%)", figure("top1"), printed(ours)),
        )
    if table == "10":
        return tuple(
            Column(f"{name} {level:g} (%)", figure("top1", level=level))
            for name, levels in OTHER_LEVELS.values()
            for level in levels
        )
    first, restored, title = {
        "7": ("noise", paper.TABLE_7, "Non-Local Means"),
        "8": ("mask", paper.TABLE_8, "Deep Decoder"),
    }[table]
    mine = {key: value for key, value in printed(ours).items() if key.startswith(f"contrastive-{first}")}
    return (
        Column(
            f"{title}, clean classifier (%)",
            figure("top1", "teacher"),
            printed(("contrastive", restored), first=first),
        ),
        Column("student (%)", figure("top1"), mine),
    )


def by_corruption(rows: Sequence[Row], results: list[dict[str, Any]]) -> str:
    """Table 14 as the paper has it, a line for each corruption: top-1 in percent."""
    heads = ["", *(row.label for row in rows), *(f"paper: {row.label}" for row in rows)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    means: list[list[float]] = [[] for _ in rows]
    for column in columns("14"):
        cells = []
        for row, mean in zip(rows, means, strict=True):
            values = [column.figure(run["evaluation"]) for run in results if run["key"] == row.key]
            mean += [value for value in values if value is not None]
            cells.append(cell(values))
        cells += [cell([column.paper[row.key]]) for row in rows]
        lines.append(f"| {column.title} | " + " | ".join(cells) + " |")
    printed = [[pair[number] for pair in paper.TABLE_14.values()] for number in range(len(rows))]
    cells = [cell([sum(values) / len(values)] if values else []) for values in (*means, *printed)]
    lines.append("| mean | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TABLES = ("1", "2", "7", "8", "9", "10", "13", "14", "losses")
NOTES: Mapping[str, str] = {
    "14": "Here: CIFAR-10 with the corruptions of CIFAR-10-C at a drawn severity. In the paper: ImageNet-100-C.",
    "losses": "The paper shows its losses as curves alone (Figure 6).",
}

if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--table", choices=TABLES, default="1")
        parser.add_argument("--draws", type=int, default=10)
        parser.add_argument("--operator", choices=OPERATORS, default="noise50")
        parser.add_argument("--transfer", action="append", default=[], metavar="NAME=TRAIN,TEST")
        own, arguments = parser.parse_known_args()
        options = study_options(
            __doc__,
            f"contrastive_{own.table}_{own.operator}"
            if own.table == "losses"
            else f"contrastive_table{own.table}",
            {"cifar10": rows(own.table, own.operator)},
            arguments,
            family="contrastive",
        )
        sets = transfer_sets(options, own.transfer) if own.table == "2" else {}
        run_study(
            "Contrastive inversion, "
            + (f"losses on {own.operator}" if own.table == "losses" else f"Table {own.table}"),
            options,
            evaluation(options, own.table, own.draws, sets),
            columns(own.table, tuple(sets)),
            paper=f"{paper.SOURCE}, {'section 4.5' if own.table == 'losses' else f'Table {own.table}'}",
            notes=(
                "The paper's numbers are of CLIP's ResNet-101 on ImageNet-100 at 224 pixels, 25 epochs.",
                *([NOTES[own.table]] if own.table in NOTES else []),
            ),
            table=by_corruption if own.table == "14" else None,
        )
