"""Table 4 of the QualNet paper on the data at hand: one network for every resolution against specialised ones.

Trains the recipes configs/celeba300/*.yaml on celeba300_112 from scratch, tests them on LFW at 112, 56, 28 and
14 pixels, and writes eval/results/table4_resolution.json and .md. Every run and every test is kept: the same
command goes on where it stopped.

    python eval/table4_resolution.py --data DATA --runs runs/table4
    python eval/table4_resolution.py --ablation ...     # why: schedule, lambda, BatchNorm, optimiser, one at a time
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lrface import recipes
from lrface.benchmarks.published import NAMES, TABLE_4
from lrface.benchmarks.verification import VerificationSet
from lrface.errors import errors_for_users
from lrface.files import write_json, write_text
from lrface.study import (
    RESOLUTION_TESTING,
    RESULTS,
    about_the_run,
    accuracy_at_sizes,
    cell,
    kept,
    lfw_at,
    train_run,
)
from lrface.train.checkpoint import load_model

SIZES = (112, 56, 28, 14)
PLAN = (
    "vanilla:0",
    "specialised_56:0",
    "specialised_28:0",
    "specialised_14:0",
    "naive:0",
    "qualnet_lm:0",
    "naive:1",
    "qualnet_lm:1",
)
# One thing changed at a time; the recipes say what in their descriptions.
ABLATION = (
    "naive:0",
    "naive:1",
    "qualnet_lm:0",
    "qualnet_lm:1",
    "ablation/naive_adamw:0",
    "ablation/qualnet_lm_adamw:0",
    "ablation/naive_double:0",
    "ablation/two_stages:0",
    "ablation/qualnet_lm_double:0",
)


def shipped_name(recipe: str) -> str:
    """The shipped recipe that an entry of the plan names: "naive" or "ablation/naive_double"."""
    return f"celeba300_{recipe}" if recipe.startswith("ablation/") else f"celeba300/{recipe}"


def test(folder: Path, benchmark: VerificationSet) -> list[dict[str, Any]]:
    """Accuracy at each size, kept in the run's folder for the weights it belongs to."""
    encoder, card = load_model(folder)

    def measure() -> dict[str, Any]:
        return {"rows": accuracy_at_sizes(encoder, benchmark, SIZES, compiled=True)}

    key = {"weights_sha256": card["weights_sha256"], "testing": RESOLUTION_TESTING}
    return kept(folder / "lfw.json", key, measure)["rows"]


def same_size(rows: list[dict[str, Any]], size: int) -> float:
    return next(row["accuracy"] for row in rows if row["gallery_size"] == row["probe_size"] == size)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with the paper's rows beside."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)

    def cells(recipe: str, sizes: tuple[int, ...] = SIZES) -> list[str]:
        runs = by_recipe.get(recipe, [])
        return [
            cell([run["accuracy"][str(size)] for run in runs]) if size in sizes else "-" for size in SIZES
        ]

    specialised = ["vanilla", "specialised_56", "specialised_28", "specialised_14"]
    target = [
        cell([run["accuracy"][str(size)] for run in by_recipe.get(recipe, [])])
        for recipe, size in zip(specialised, SIZES, strict=True)
    ]
    lines = [
        "| LFW accuracy (%), trained on CelebA-300 | seeds | " + " | ".join(f"{s}x{s}" for s in SIZES) + " |",
        "|---" * 6 + "|",
        "| specialised network of each size | 1 | " + " | ".join(target) + " |",
    ]
    names = {"vanilla": "vanilla (clean only)", "naive": "naive augmentation", "qualnet_lm": "QualNet-LM"}
    others = [recipe for recipe in by_recipe if recipe not in names and recipe not in specialised]
    for recipe in [*names, *others]:
        if recipe in by_recipe:
            name = names.get(recipe, recipe)
            lines.append(f"| {name} | {len(by_recipe[recipe])} | " + " | ".join(cells(recipe)) + " |")
    lines += [
        "",
        "| Paper, Table 4: AgeDB-30 / CFP-FP, IR-50 on CASIA | "
        + " | ".join(f"{s}x{s}" for s in SIZES)
        + " |",
        "|---" * 5 + "|",
    ]
    for key, name in NAMES.items():
        lines.append(
            f"| {name} | " + " | ".join("{:.2f} / {:.2f}".format(*TABLE_4[key][s]) for s in SIZES) + " |"
        )
    return "\n".join(lines) + "\n"


def ablation_markdown(rows: list[dict[str, Any]], descriptions: dict[str, str]) -> str:
    """One line for each recipe, in the plan's order, with what it is and how many images it was trained with."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    lines = [
        "| recipe | what it is | images | seeds | " + " | ".join(f"{s}x{s}" for s in SIZES) + " | mean |",
        "|---" * 9 + "|",
    ]
    for recipe, runs in by_recipe.items():
        cells = [cell([run["accuracy"][str(size)] for run in runs]) for size in SIZES]
        mean = statistics.mean(run["accuracy"][str(size)] for run in runs for size in SIZES)
        lines.append(
            f"| {recipe.removeprefix('ablation/')} | {descriptions[recipe]} | {runs[0]['training_images']:,} "
            f"| {len(runs)} | " + " | ".join(cells) + f" | {mean:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="holds celeba300_112 and lfw; else $LRFACE_DATA")
    parser.add_argument("--runs", type=Path, default=Path("runs/table4"), help="where runs are kept")
    parser.add_argument("--lfw", type=Path, help="LFW aligned by `lrface align`, to spare its alignment")
    parser.add_argument("--ablation", action="store_true", help="the ablation instead of the table")
    parser.add_argument("--plan", nargs="+", metavar="RECIPE:SEED", help="what to train")
    arguments = parser.parse_args()
    plan = arguments.plan or list(ABLATION if arguments.ablation else PLAN)
    name = "table4_ablation" if arguments.ablation else "table4_resolution"
    started = time.time()
    benchmark: VerificationSet | None = None
    rows = []
    for entry in plan:
        recipe, seed = entry.split(":")
        folder = arguments.runs / f"{recipe.replace('/', '-')}-seed{seed}"
        summary = train_run(shipped_name(recipe), [f"seed={seed}", f"out={folder}"], arguments.data)
        if benchmark is None:
            benchmark = lfw_at(arguments.lfw, arguments.data)
        tested = test(folder, benchmark)
        trained = [stage for stage in summary["stages"] if "seconds" in stage]
        rows.append(
            {
                "recipe": recipe,
                "seed": int(seed),
                "accuracy": {str(size): same_size(tested, size) for size in SIZES},
                "verification": tested,
                "recipe_sha256": summary["recipe_sha256"],
                "checkpoint_sha256": summary["weights_sha256"],
                "training_images": sum(stage["steps"] for stage in summary["stages"])
                * recipes.load_recipe(shipped_name(recipe)).data.batch_size,
                "training_seconds": round(sum(stage["seconds"] for stage in trained), 1),
            }
        )
        print(f"{entry}: " + ", ".join(f"{s}: {same_size(tested, s):.2f}" for s in SIZES), file=sys.stderr)
        shipped = recipes.shipped_recipes()
        write_json(
            RESULTS / f"{name}.json",
            {
                "table": "QualNet Table 4 on CelebA-300 and LFW"
                + (", ablation" if arguments.ablation else ""),
                "command": "python eval/table4_resolution.py "
                + ("--ablation " if arguments.ablation else "")
                + "--plan "
                + " ".join(plan),
                "config_sha256": {row["recipe"]: row["recipe_sha256"] for row in rows},
                "checkpoint_sha256": {
                    f"{row['recipe']}:{row['seed']}": row["checkpoint_sha256"] for row in rows
                },
                "recipes": {row["recipe"]: shipped[shipped_name(row["recipe"])].read_text() for row in rows},
                "data": {
                    "training": "celeba300_112",
                    "test": "LFW View 2, 6,000 pairs",
                    "unaligned": benchmark.unaligned,
                },
                "testing": RESOLUTION_TESTING,
                "seeds": sorted({row["seed"] for row in rows}),
                "rows": rows,
                "paper": TABLE_4,
                **about_the_run(started),
            },
        )
        if arguments.ablation:
            table = ablation_markdown(
                rows,
                {row["recipe"]: recipes.load_recipe(shipped_name(row["recipe"])).description for row in rows},
            )
        else:
            table = markdown(rows)
        write_text(RESULTS / f"{name}.md", table)
    print(table, end="")


if __name__ == "__main__":
    with errors_for_users():
        main()
