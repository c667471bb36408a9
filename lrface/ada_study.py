"""What the scripts of the AdA paper's tables share (eval/ada_table*.py): the rows, the table by corruption, attacks."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrface import recipes
from lrface.attack_trials import parse_trials, run_trials
from lrface.benchmarks.published_ada import NAMES, TABLE_3_NAMES
from lrface.errors import LrfaceError
from lrface.perturbation import open_judge, read_labelled
from lrface.study import Evaluation, Figures, Options, Row, study_options

TRIALS = ("autoattack+multitargeted:l2=0.5,1", "autoattack+multitargeted:linf=1/255,2/255,4/255")
"""Table 2's attacks: AutoAttack, and MultiTargeted on what it leaves."""

_CLEAN, _LAST = (
    "cifar10/train.parquet",
    {"nominal": "clean", "augmix": "augmix", "deepaugment": "deepaugment"},
)


@dataclass(frozen=True)
class AdaOptions:
    """What the command line of a script of this paper's tables said besides :class:`lrface.study.Options`.

    Attributes:
        start: a run whose encoder and head every row starts from; None for fresh ones.
        deepaugment: the set of `lrface deepaugment` in the small suite.
        attacked: how many test images are attacked.
        attack_steps, restarts: of the attacks; None for their own.
    """

    options: Options
    start: str | None
    deepaugment: str
    attacked: int
    attack_steps: int | None
    restarts: int | None


def ada_options(
    description: str | None, name: str, keys: Sequence[str], arguments: Sequence[str] | None = None
) -> AdaOptions:
    """The options of a table script, its rows among them.

    Args:
        keys: the table's rows, of :data:`lrface.benchmarks.published_ada.NAMES`.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--start", help="a run that every row starts from, with its head, at half the learning rate"
    )
    parser.add_argument(
        "--deepaugment", default="cifar10/deepaugment10", help="the DeepAugment set of the small suite"
    )
    parser.add_argument("--attacked", type=int, default=1000, help="test images that are attacked (Table 2)")
    parser.add_argument("--attack-steps", type=int, help="of the attacks, instead of their own")
    parser.add_argument("--restarts", type=int, help="of MultiTargeted, instead of 10")
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = parser.parse_known_args(given)
    small = [row for row in small_rows(own.deepaugment, own.start) if (row.paper or row.key) in keys]
    suites = {"cifar10": small, "cifar10_r50": [row for row in paper_rows() if row.key in keys]}
    text = f"{description}\n\nbesides what follows:\n{parser.format_help()}"
    found = study_options(text, name, suites, rest, family="ada")
    return AdaOptions(found, own.start, own.deepaugment, own.attacked, own.attack_steps, own.restarts)


def small_rows(deepaugment: str, start: str | None) -> list[Row]:
    """The combinations of paper 003 in the small recipes: AugMix without its Jensen-Shannon loss, as in the paper's rows, so
    that each row sees the same number of images. DeepAugment's rows stand beside the paper's of 10 copies."""
    joined = f"data.path=[{_CLEAN},{deepaugment}]"
    plain = "stages.augmix.method={name: classify}"
    rows = [
        Row("nominal", NAMES["nominal"], "cifar10/clean"),
        Row("augmix", NAMES["augmix"], "cifar10/augmix", (plain,)),
        Row("deepaugment", NAMES["deepaugment"], "cifar10/deepaugment", (joined,), paper="deepaugment10"),
        Row(
            "deepaugment_augmix",
            NAMES["deepaugment_augmix"],
            "cifar10/deepaugment_augmix",
            (joined, plain),
            paper="deepaugment10_augmix",
        ),
        Row("ada", NAMES["ada"], "cifar10/ada"),
        Row("ada_augmix", NAMES["ada_augmix"], "cifar10/ada_augmix", ("stages.ada.method.consistency=0",)),
        Row(
            "ada_deepaugment_augmix",
            NAMES["ada_deepaugment_augmix"],
            "cifar10/ada_augmix",
            (joined, "stages.ada.method.consistency=0"),
            paper="ada_deepaugment10_augmix",
        ),
    ]
    return rows if start is None else [_started(row, start) for row in rows]


def _started(row: Row, start: str) -> Row:
    """The row with its classifier from a run, at half the rate and with a warm-up of 20 steps."""
    stage = recipes.load_recipe(row.recipe, row.overrides).stages[-1]
    before = ["{from: encoder, to: corruption_network}"] if stage.method.name == "ada" else []
    parts = [*before, f"{{path: {start}, to: encoder}}", f"{{path: {start}, from: head, to: head}}"]
    place = f"stages.{stage.name}"
    more = (
        f"{place}.load=[{', '.join(parts)}]",
        f"{place}.optimiser.learning_rate={stage.optimiser.learning_rate / 2}",
        f"{place}.schedule.warmup_steps=20",
    )
    return replace(row, overrides=(*row.overrides, *more))


def paper_rows() -> list[Row]:
    """The rows of Tables 1 and 2 in the paper's own setting, for a GPU."""
    once = (f"data.path=[{_CLEAN},cifar10/deepaugment]",)
    return [
        Row(
            key,
            label,
            f"cifar10_r50/{key.replace('10', '')}",
            once if "deepaugment" in key and "10" not in key else (),
        )
        for key, label in NAMES.items()
    ]


def error_on(corruption: str) -> Callable[[Figures], float | None]:
    """Error in percent on one corruption, mean over its severities."""

    def figure(figures: Figures) -> float | None:
        return next((row["error"] for row in figures["corruptions"] if row["corruption"] == corruption), None)

    return figure


def corruption_table(
    corruptions: Sequence[str],
    paper: Mapping[str, tuple[float | None, float, tuple[float, ...]]],
    others: Sequence[str] = (),
) -> Callable[[Sequence[Row], list[dict[str, Any]]], str]:
    """A table with a line for each row, measured (mean over seeds), and one for what the paper prints of it.

    Args:
        corruptions: its columns, after clean error and mCE (mean error).
        paper: by row key: clean error (None where it is not printed), mCE, errors of the first columns.
        others: rows of Table 3 that are not measured.
    """

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    def printed(label: str, key: str) -> str:
        clean, mce, errors = paper[key]
        cells = [*(number(value) for value in errors), *["-"] * (len(corruptions) - len(errors))]
        return f"| {label} | | {number(clean)} | {mce:.2f} | " + " | ".join(cells) + " |"

    def table(rows: Sequence[Row], results: list[dict[str, Any]]) -> str:
        heads = [
            "errors in percent",
            "images",
            "clean",
            "mCE",
            *(name.replace("_", " ") for name in corruptions),
        ]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows:
            runs = [result for result in results if result["key"] == row.key]
            if runs:
                found = [run["evaluation"] for run in runs]

                def mean(
                    figure: Callable[[Figures], float | None], found: list[Figures] = found
                ) -> float | None:
                    values = [value for value in map(figure, found) if value is not None]
                    return sum(values) / len(values) if values else None

                mce = mean(lambda figures: figures["mean_error"])
                cells = [number(mean(error_on(name))) for name in corruptions]
                clean = number(mean(lambda figures: figures["clean_error"]))
                shown = "-" if mce is None else f"{mce:.2f}"
                last = runs[0]["stages"][-1]["images"]
                lines.append(f"| {row.label} | {last:,} | {clean} | {shown} | " + " | ".join(cells) + " |")
            else:
                lines.append(f"| {row.label}, not run |" + " - |" * (len(heads) - 1))
            if (row.paper or row.key) in paper:
                lines.append(
                    printed(f"{NAMES.get(row.paper or row.key, row.label)}, paper", row.paper or row.key)
                )
        lines += [printed(f"{TABLE_3_NAMES[key]}, paper", key) for key in others]
        return "\n".join(lines) + "\n"

    return table


def attack_evaluation(found: AdaOptions, trials: Sequence[str] = TRIALS) -> Evaluation:
    """Clean accuracy on all test images and on CIFAR-10.1 (cifar10.1/ below the data root, where it is), and accuracy under
    attacks on some test images."""
    options = found.options
    test = recipes.find_data("cifar10/test.parquet", options.data)
    try:
        shifted: Path | None = recipes.find_data("cifar10.1/cifar10.1_v6_data.npy", options.data)
    except LrfaceError:
        shifted = None
    settings = {
        "trials": list(trials),
        "attacked": found.attacked,
        "steps": found.attack_steps,
        "restarts": found.restarts,
        "cifar10_1": None if shifted is None else shifted.name,
    }

    def measure(folder: Path) -> Figures:
        listed = [trial for text in trials for trial in parse_trials(text)]
        run = run_trials(
            [str(folder)],
            test,
            listed,
            count=found.attacked,
            steps=found.attack_steps,
            restarts=found.restarts,
        )
        attacks = {f"{row['norm']} {row['size']:.6g}": row["accuracy"] for row in run.results[0]["attacks"]}
        return {
            "clean_accuracy": accuracy(str(folder), test),
            "cifar10_1": None if shifted is None else accuracy(str(folder), shifted),
            "attacked_clean": run.results[0]["clean_accuracy"],
            "attacks": attacks,
        }

    name = f"attacks_{found.attacked}_{found.attack_steps or 'own'}_{found.restarts or 'own'}"
    return Evaluation(name, settings, measure, {"test": settings})


def accuracy(model: str, images: str | Path, device: str = "auto") -> float:
    """Percent of images with classes that a classifier has right."""
    import torch

    test = read_labelled(images, None, show_progress=False)
    judge = open_judge(model, test, device)
    wrong = [judge.wrong(test.float(rows), rows) for rows in torch.arange(len(test.pixels)).split(250)]
    return round(100 * float(1 - torch.cat(wrong).float().mean()), 4)
