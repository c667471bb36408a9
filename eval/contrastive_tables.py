"""Tables 1 (with 4), 7, 8, 9, 10 and 13 of the paper on contrastive inversion (paper 002), measured again on CIFAR-10 beside
its numbers.

    python eval/contrastive_tables.py --table 1 --data DATA --rows supervised-mask90 contrastive-mask90
    python eval/contrastive_tables.py --table 1 --data DATA --rows supervised10-mask90    # 10 % of the labels
    python eval/contrastive_tables.py --table 13 --data DATA --rows contrastive-mask90     # trains nothing more
    python eval/contrastive_tables.py --table 8 --data DATA --rows contrastive-mask90 --images 100 --draws 1

Students and end-to-end baselines start from one teacher, a classifier of clean images, which is trained once. Test images
are drawn --draws times; --images takes so many of them. The rows supervised10-* are end-to-end baselines that see 10 % of
the labels, those of the probes of 10 %, for as many steps as the others; the paper has none. Table 10 also has the stronger
degradations of Figure 4; the levels of its printed rows are not in the copy of the paper at hand.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrface.benchmarks import published_contrastive as paper
from lrface.config import read_yaml
from lrface.errors import errors_for_users
from lrface.probe import ProbeRun, run_probe
from lrface.study import Column, Evaluation, Figures, Options, Row, run_study, study_options

TRAIN, TEST = "cifar10/train.parquet", "cifar10/test.parquet"
LEVELS = {
    **{f"mask{percent}": ("mask", {"missing": percent / 100}) for percent in (50, 75, 90)},
    **{f"noise{percent}": ("noise", {"sigma": percent / 100}) for percent in (10, 30, 50)},
    "blur21": ("blur", {"kernel": 21, "sigma": 5}),
    "blur37": ("blur", {"kernel": 37, "sigma": 9}),
}
RANGES = {
    "mask_range": ("mask", {"missing": "null", "missing_range": "[0.5, 0.95]"}),
    "noise_range": ("noise", {"sigma_range": "[0.1, 0.3]"}),
}
OTHER_LEVELS = {
    "pixel_mask": ("missing", (0.1, 0.2, 0.3, 0.4, 0.96, 0.97, 0.98, 0.99)),
    "gaussian_noise": ("sigma", (0.02, 0.05, 0.07, 0.09, 0.35, 0.4, 0.45, 0.5)),
}
STAGES = {"supervised": "supervised", "supervised10": "supervised", "contrastive": "student"}
LABELS = {
    "supervised": "end-to-end",
    "supervised10": "end-to-end, 10 % of the labels",
    "contrastive": "contrastive student",
}


def rows(table: str) -> tuple[Row, ...]:
    """The rows of a table: a recipe of its kind and family, and its level."""
    levels = RANGES if table == "10" else LEVELS
    if table in ("7", "8"):
        levels = {
            key: level for key, level in LEVELS.items() if level[0] == {"7": "noise", "8": "mask"}[table]
        }
    kinds = {"1": tuple(LABELS), "10": ("supervised", "contrastive")}.get(table, ("contrastive",))
    return tuple(row(kind, key, *level) for key, level in levels.items() for kind in kinds)


def row(kind: str, key: str, family: str, arguments: dict[str, Any]) -> Row:
    """A recipe of a kind and family at a level; the last stage of supervised10 sees a tenth of the images."""
    overrides = (f"stages.{STAGES[kind]}.degrade.{name}={value}" for name, value in arguments.items())
    recipe = f"cifar10/{kind.removesuffix('10')}_{family}"
    share = 0.1 if kind == "supervised10" else 1.0
    return Row(f"{kind}-{key}", f"{LABELS[kind]}, {key}", recipe, tuple(overrides), share=share)


def evaluation(options: Options, table: str, draws: int) -> Evaluation:
    """Probes of the student and of its teacher, or the end-to-end network's own head, as the table asks."""

    def measure(folder: Path) -> Figures:
        last = read_yaml(folder / "recipe.yaml")["stages"][-1]
        degrade = {key: value for key, value in last["degrade"].items() if value is not None}
        student, teacher = f"student={folder}", f"teacher={folder / 'stages' / '1-teacher'}"
        supervised = last["name"] == "supervised"

        def probe(models: list[str], **more: Any) -> ProbeRun:
            return run_probe(
                [] if supervised else models,
                TRAIN,
                TEST,
                own_heads=[student] if supervised else [],
                root=options.data,
                seeds=draws,
                images=options.images,
                **{"degrade": json.dumps(degrade), **more},
            )

        if table == "1":
            found = probe([student], labels=[1.0, 0.1]).to_json()
            if last.get("share", 1.0) < 1:
                for result in found["results"]:
                    result["labels"] = last["share"]
            return found
        if table == "9":
            return probe([teacher, student], train_degrade="clean", classifier_of="teacher").to_json()
        if table == "13":
            return probe([student, teacher]).to_json()
        if table == "10":
            name, levels = OTHER_LEVELS[degrade["name"]]
            tests = [json.dumps({"name": degrade["name"], name: level}) for level in levels]
            return probe([student], test_degrade=tests).to_json()
        restored = probe([teacher], restore={"7": "nlm", "8": "deep_decoder"}[table]).to_json()
        return {**restored, "results": restored["results"] + probe([student]).to_json()["results"]}

    settings = {"table": table, "draws": draws, "images": options.images, "train": TRAIN, "test": TEST}
    return Evaluation(f"probe_table{table}_{options.images or 'all'}", settings, measure, {"test": settings})


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


def columns(table: str) -> tuple[Column, ...]:
    """The columns of a table."""
    ours = ("contrastive", paper.TABLE_1["contrastive"])
    few = "contrastive, 10 % of the labels"
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


TABLES = ("1", "7", "8", "9", "10", "13")

if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--table", choices=TABLES, default="1")
        parser.add_argument("--draws", type=int, default=10)
        own, arguments = parser.parse_known_args()
        options = study_options(
            __doc__,
            f"contrastive_table{own.table}",
            {"cifar10": rows(own.table)},
            arguments,
            family="contrastive",
        )
        run_study(
            f"Contrastive inversion, Table {own.table}",
            options,
            evaluation(options, own.table, own.draws),
            columns(own.table),
            paper=f"{paper.SOURCE}, Table {own.table}",
            notes=("The paper's numbers are of CLIP's ResNet-101 on ImageNet-100 at 224 pixels, 25 epochs.",),
        )
