"""Published tables, measured again: what the scripts eval/table*.py have in common.

A table is rows that are trained, an evaluation of each trained network, and columns of figures from it. A script says
which, and what the paper printed; everything else is here::

    ROWS = {"cifar10": (Row("naive", "naive augmentation", "cifar10/corruptions"),
                        Row("qualnet", "QualNet", "cifar10/qualnet", ("stages.quality.method.quality_weight=0.6",)))}
    COLUMNS = (Column("clean (%)", clean_accuracy, {"naive": 80.45, "qualnet": 82.33}),
               Column("corruptions (%)", corruption_accuracy, {"naive": 70.82, "qualnet": 72.30}))

    options = study_options(__doc__, "table6_ablation", ROWS)            # --data --runs --suite --seeds --steps ...
    run_study("QualNet Table 6", options, corruption_evaluation(options), COLUMNS, paper=SOURCE)

:func:`run_study` trains each row with each seed by `lrface train` in a process of its own, below ``options.runs`` in a
folder KEY-seedN, evaluates it, and writes eval/results/NAME.json and NAME.md after each. All of it goes on where it
stopped: a finished run is found done, a killed one goes on from its newest checkpoint, figures are kept in the run's
folder for the weights they belong to. A run whose recipe has changed since is refused by `lrface train`, which names the
difference. Where the first stages of a run are those of a run that is there already (same data, seed, networks,
schedule), they are taken from it: they would come out the same bit for bit.

Another evaluation is an :class:`Evaluation` of one's own: a name, what its figures depend on besides the weights, and a
function from the run's folder to figures. :func:`train_run`, :func:`kept`, :func:`cell` and :func:`about_the_run` are for
scripts whose tables have another form.
"""

import argparse
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lrface import config, recipes
from lrface.benchmarks.image_sets import DESCRIPTION, check_labels, open_images, prepare
from lrface.benchmarks.robustness import BENCHMARKS
from lrface.benchmarks.verification import VerificationSet, evaluate_verification, load_benchmark
from lrface.corrupt import SET_NAMES, corrupt_set
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_directory, is_locked, read_json, write_json, write_text
from lrface.registry import nearest
from lrface.robustness import run_robustness
from lrface.train.checkpoint import checkpoints, load_model
from lrface.train.record import lrface_commit
from lrface.train.validate import read_validation

RESULTS = Path(__file__).resolve().parent.parent / "eval" / "results"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of a table: a recipe and what is changed in it.

    Attributes:
        key: names the run's folder and the row in the results; rows of several tables with one key are one run.
        label: what the printed table says.
        recipe: a shipped recipe or a file.
        overrides: "dotted.key=value", as behind `lrface train`.
        length: times the schedule of every stage, for controls.
        paper: the row's key among the paper's numbers, where it is another one.
        share: of each class's images, that the last stage trains on, for as many steps as with all of them. Drawn with
            seed 0, as those of a probe are by default.
    """

    key: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    length: float = 1.0
    paper: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a trained network.

    Attributes:
        name: its figures are kept in the run's folder as evaluations/NAME.json.
        settings: all that the figures depend on besides the weights, as JSON; other settings measure again.
        measure: folder of a finished run -> figures, as JSON.
        data: what the results say of the test images.
    """

    name: str
    settings: dict[str, Any]
    measure: Callable[[Path], Figures]
    data: dict[str, Any] = field(default_factory=dict)

    def of(self, folder: Path) -> Figures:
        """Figures of the run in ``folder``, measured or kept."""
        weights = read_json(folder / "model.json", "the card of the model")["weights_sha256"]
        key = {"weights_sha256": weights, "settings": self.settings}
        return kept(
            folder / "evaluations" / f"{self.name}.json", key, lambda: {"figures": self.measure(folder)}
        )["figures"]


@dataclass(frozen=True)
class Column:
    """A column of the printed table: mean and range over seeds, and what the paper prints.

    Attributes:
        title: its heading.
        figure: a run's figures -> the number, None where it has none.
        paper: row's key (or its ``paper``) -> the paper's number.
        paper_title: heading of the paper's column, where its measure is another one.
    """

    title: str
    figure: Callable[[Figures], float | None]
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_title: str = ""


VANILLA_NAIVE_QUALNET = {
    "cifar10": (
        Row("vanilla", "vanilla (clean images only)", "cifar10/clean"),
        Row("naive", "naive augmentation", "cifar10/corruptions"),
        Row("qualnet", "QualNet", "cifar10/qualnet"),
    ),
    "imagenet": tuple(
        Row(
            f"{key}_resnext101_32x8d",
            f"ResNeXt-101: {label}",
            f"imagenet/{key}_resnet50",
            ("backbone.name=resnext101_32x8d",),
            paper=key,
        )
        for key, label in (("vanilla", "vanilla"), ("naive", "naive augmentation"), ("qualnet", "QualNet"))
    ),
}
"""Rows that QualNet's Tables 3 and B.1 share, by suite."""


@dataclass(frozen=True)
class Options:
    """What the command line of a script said; see :func:`study_options`.

    Attributes:
        name: of the result files; with the suite's behind it, for another than the first.
        table_rows: of the table.
        rows: of these, those that are trained; the printed table shows the others without figures.
        steps, epochs: of every stage; None for the recipes'.
        images: how many test images are corrupted; None for all.
        overrides: for every row, before its own.
        finished: train nothing, show the runs that are finished.
    """

    name: str
    suite: str
    table_rows: tuple[Row, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    runs: Path
    data: Path | None = None
    steps: int | None = None
    epochs: float | None = None
    images: int | None = None
    overrides: tuple[str, ...] = ()
    finished: bool = False
    results: Path = RESULTS
    command: str = ""


def study_options(
    description: str | None,
    name: str,
    suites: Mapping[str, Sequence[Row]],
    arguments: Sequence[str] | None = None,
    family: str = "qualnet",
) -> Options:
    """The options of a table script.

    Args:
        description: the script's docstring.
        name: of the result files.
        suites: the rows by suite; the first is the default.
        arguments: instead of the command line's.
        family: tables of one family share runs by the keys of their rows.

    Exits with 2, as argparse does, for what it does not know.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suite = next(iter(suites))
    parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
    parser.add_argument("--runs", type=Path, help=f"where runs are kept; default: runs/{family}/SUITE")
    parser.add_argument(
        "--suite", choices=list(suites), default=suite, help=f"which recipes; default: {suite}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", metavar="KEY", help="train only these rows")
    parser.add_argument("--steps", type=int, help="of every stage, instead of the recipes'")
    parser.add_argument("--epochs", type=float, help="of every stage, instead of the recipes'")
    parser.add_argument(
        "--images",
        type=int,
        default=None,
        help="corrupt only the first so many test images, once for all rows",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further overrides for every row: trainer.threads=1",
    )
    parser.add_argument(
        "--finished", action="store_true", help="train nothing: the table of the runs that are finished"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where NAME.json and NAME.md go")
    given = list(sys.argv[1:] if arguments is None else arguments)
    found = parser.parse_args(given)
    if found.steps is not None and found.epochs is not None:
        parser.error("give --steps or --epochs, not both")
    rows = tuple(suites[found.suite])
    keys = [row.key for row in rows]
    for key in found.rows or ():
        if key not in keys:
            parser.error(f"--rows: no row {key!r}{nearest(key, keys)}; {found.suite} has {', '.join(keys)}")
    return Options(
        name if found.suite == suite else f"{name}_{found.suite}",
        found.suite,
        rows,
        tuple(row for row in rows if found.rows is None or row.key in found.rows),
        tuple(dict.fromkeys(found.seeds)),
        found.runs or Path("runs") / family / found.suite,
        found.data,
        found.steps,
        found.epochs,
        found.images,
        tuple(found.set),
        found.finished,
        found.results,
        f"python {shlex.join([sys.argv[0], *_without_places(sys.argv[1:])])}",
    )


def _without_places(arguments: Sequence[str]) -> list[str]:
    """A command line without the options that say where things lie on this machine."""
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--data", "--runs", "--results"):
            next(words, None)
        elif not word.startswith(("--data=", "--runs=", "--results=")):
            found.append(word)
    return found


def run_study(
    title: str,
    options: Options,
    evaluation: Evaluation,
    columns: Sequence[Column],
    *,
    paper: str = "",
    notes: Sequence[str] = (),
    table: Callable[[Sequence[Row], list[dict[str, Any]]], str] | None = None,
) -> dict[str, Any]:
    """Train and evaluate every row of a table with every seed, the first seed's rows first, and write its results.

    Args:
        title: the table's, in the results.
        columns: of the printed table.
        paper: where the paper's numbers are from.
        notes: lines under the printed table.
        table: rows and results -> Markdown, in place of :func:`markdown` with ``columns``.

    Returns:
        What was written to NAME.json. Its rows: ``key, label, recipe, overrides, seed, recipe_sha256,
        checkpoint_sha256, stages, training_images`` (of all stages together), ``training_seconds, evaluation``.

    Raises:
        LrfaceError: a run failed or was stopped, and says which.
    """
    started = time.time()
    results: list[dict[str, Any]] = []
    document: dict[str, Any] = {}
    text = ""
    for seed in options.seeds:
        for row in options.rows:
            if options.finished and not _finished(
                recipes.load_recipe(row.recipe, run_overrides(row, seed, options))
            ):
                continue
            result = row_result(row, seed, options, evaluation)
            results.append(result)
            figures = (f"{c.title} {_number(c.figure(result['evaluation']))}" for c in columns)
            print(f"{row.key}, seed {seed}: {', '.join(figures)}", file=sys.stderr)
            text = (table or (lambda rows, done: markdown(rows, done, columns)))(options.table_rows, results)
            text += "".join(f"\n{note}\n" for note in notes)
            document = {
                "table": title,
                "paper": {
                    "source": paper,
                    **{c.paper_title or c.title: dict(c.paper) for c in columns if c.paper},
                },
                "command": options.command,
                "config_sha256": {f"{r['key']}:{r['seed']}": r["recipe_sha256"] for r in results},
                "checkpoint_sha256": {f"{r['key']}:{r['seed']}": r["checkpoint_sha256"] for r in results},
                "data": {"training": result["data"], **evaluation.data},
                "evaluation": evaluation.settings,
                "seeds": sorted({r["seed"] for r in results}),
                "rows": results,
                **about_the_run(started),
            }
            write_json(options.results / f"{options.name}.json", document)
            write_text(options.results / f"{options.name}.md", text)
    print(text, end="")
    return document


def row_result(row: Row, seed: int, options: Options, evaluation: Evaluation) -> dict[str, Any]:
    """One row with one seed, trained and evaluated, as it stands in the results."""
    folder = run_folder(row, seed, options)
    overrides = run_overrides(row, seed, options)
    summary = train_run(row.recipe, overrides, options.data, donors=options.runs)
    recipe = recipes.load_recipe(row.recipe, overrides)
    card = load_model(folder)[1]
    stages = [
        {"name": stage["name"], "steps": stage["steps"], "images": stage["steps"] * recipe.data.batch_size}
        for stage in summary["stages"]
    ]
    return {
        "key": row.key,
        "label": row.label,
        "recipe": row.recipe,
        "overrides": [text for text in overrides if not text.startswith("out=")],
        "seed": seed,
        "recipe_sha256": summary["recipe_sha256"],
        "checkpoint_sha256": card["weights_sha256"],
        "data": f"{recipe.data.path or 'synthetic'}, {summary['images']:,} images",
        "stages": stages,
        "training_images": sum(stage["images"] for stage in stages),
        "training_seconds": round(sum(stage.get("seconds", 0.0) for stage in summary["stages"]), 1),
        "evaluation": evaluation.of(folder),
    }


def run_folder(row: Row, seed: int, options: Options) -> Path:
    """Where the run of a row with a seed lies."""
    return options.runs / f"{row.key}-seed{seed}"


def run_overrides(row: Row, seed: int, options: Options) -> list[str]:
    """All overrides of a run."""
    return [*row_overrides(row, options), f"seed={seed}", f"out={run_folder(row, seed, options)}"]


def row_overrides(row: Row, options: Options) -> list[str]:
    """The overrides of a row without seed and place: the schedule's length, those of all rows, its own."""
    found = list(options.overrides)
    stages = recipes.load_recipe(row.recipe, options.overrides).stages
    for number, stage in enumerate(stages):
        steps = stage.steps if options.epochs is None else None
        epochs = stage.epochs if options.steps is None else None
        if options.steps is not None:
            steps = options.steps
        elif options.epochs is not None:
            epochs = options.epochs
        if row.length != 1.0 or options.steps is not None or options.epochs is not None:
            found += [
                f"stages.{number}.steps={'null' if steps is None else max(1, round(steps * row.length))}",
                f"stages.{number}.epochs={'null' if epochs is None else epochs * row.length}",
            ]
        if row.share < 1 and number == len(stages) - 1:
            found += [f"stages.{number}.share={row.share}", f"stages.{number}.share_seed=0"]
            if epochs is not None:
                found.append(f"stages.{number}.epochs={epochs * row.length / row.share}")
    return [*found, *row.overrides]


# ---------------------------------------------------------------------------------------------------- training


def train_run(
    recipe: str, overrides: Sequence[str], data: str | Path | None = None, donors: Path | None = None
) -> dict[str, Any]:
    """`lrface train` in a process of its own: it trains, goes on, or finds the run done.

    Args:
        recipe: shipped or a file.
        overrides: among them ``out=FOLDER``.
        data: root of the training data.
        donors: folder of runs, from which first stages that are the same are taken; see :func:`take_stages`.

    Returns:
        The run's summary.json.

    Raises:
        LrfaceError: the run failed, or was stopped before its end.
    """
    wanted = recipes.load_recipe(recipe, overrides)
    if wanted.out is None:
        raise UsageError(f"a run of {recipe} needs a folder: add out=DIR to its overrides")
    folder = Path(wanted.out)
    if _finished(wanted):
        return read_json(folder / "summary.json", "the summary of the run")
    if donors is not None:
        taken = take_stages(wanted, donors)
        if taken is not None:
            print(f"{folder.name}: first stages as in {taken}", file=sys.stderr)
    command = [sys.executable, "-m", "lrface.cli", "train", recipe, *overrides]
    command += [] if data is None else ["--data", str(data)]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise LrfaceError(f"{folder}: training failed (exit code {code}): {shlex.join(command)}")
    if not (folder / "summary.json").exists():
        raise LrfaceError(f"{folder}: training was stopped before its end; the same command goes on")
    return read_json(folder / "summary.json", "the summary of the run")


def _finished(recipe: config.Recipe) -> bool:
    """Whether the recipe's folder holds its finished run. `lrface train` says what is the matter with any other."""
    folder = Path(recipe.out or "")
    if not all((folder / name).exists() for name in ("recipe.yaml", "summary.json", "model.json")):
        return False
    try:
        other = config.parse_recipe(config.read_yaml(folder / "recipe.yaml"))
    except UsageError:
        return False
    stages = ([_what_is_learned(one, stage) for stage in one.stages] for one in (recipe, other))
    return _same_for_all_stages(recipe) == _same_for_all_stages(other) and next(stages) == next(stages)


def take_stages(recipe: config.Recipe, donors: Path) -> Path | None:
    """Give a run that has not begun the first stages of a finished run that had the same; returns that run.

    Same are all fields that what is learned depends on: seed, data, networks, method, what it sees, schedule,
    optimiser, precision, threads. The stage's name and that of the recipe do not matter.
    """
    assert recipe.out is not None
    folder = Path(recipe.out)
    if (folder / "stages").exists():
        return None
    best: tuple[int, Path] | None = None
    for kept_recipe in sorted(donors.glob("*/recipe.yaml")):
        donor = kept_recipe.parent
        if donor == folder or is_locked(donor):
            continue
        try:
            other = config.parse_recipe(config.read_yaml(kept_recipe))
        except UsageError:  # written by a later version, or by hand
            continue
        count = _shared_stages(recipe, other, donor)
        if count > (best[0] if best else 0):
            best = count, donor
    if best is None:
        return None
    count, donor = best
    names = [stage.name for stage in recipe.stages]
    # All or none: a stage that is there counts as done.
    with atomic_directory(folder / "stages") as aside:
        for number, source in enumerate(_stage_folders(donor)[:count], start=1):
            shutil.copytree(source, aside / f"{number}-{names[number - 1]}")
    return donor


def _stage_folders(run: Path) -> list[Path]:
    return sorted((run / "stages").glob("*-*"), key=lambda path: int(path.name.split("-")[0]))


def _shared_stages(wanted: config.Recipe, other: config.Recipe, donor: Path) -> int:
    """How many first stages of two recipes are the same and finished in ``donor``; the last of ``wanted`` never counts:
    a run has something of its own to do."""
    if _same_for_all_stages(wanted) != _same_for_all_stages(other):
        return 0
    folders = _stage_folders(donor)
    summary = donor / "summary.json"
    steps = (
        [stage["steps"] for stage in read_json(summary, "a summary")["stages"]] if summary.exists() else []
    )
    count = 0
    for ours, theirs, folder, last in zip(wanted.stages[:-1], other.stages, folders, steps, strict=False):
        if _what_is_learned(wanted, ours) != _what_is_learned(other, theirs):
            break
        found = checkpoints(folder)
        if not found or found[-1].name != f"step-{last:08d}" or read_validation(folder):
            break
        count += 1
    return count


def _same_for_all_stages(recipe: config.Recipe) -> dict[str, Any]:
    plain = config.to_plain(recipe)
    for section, fields in (("trainer", recipes.WATCHING), ("data", recipes.READING)):
        for key in fields:
            plain[section].pop(key)
    return {key: plain[key] for key in ("seed", "data", "head", "trainer", "validate", "start_from")}


def _what_is_learned(recipe: config.Recipe, stage: config.Stage) -> dict[str, Any]:
    plain = config.to_plain(stage)
    plain.pop("name")
    plain["backbone"] = config.to_plain(recipes.stage_backbone(recipe, stage))
    plain["decoder"] = config.to_plain(recipe.decoder) if stage.method.name == "qualnet" else None
    return plain


# -------------------------------------------------------------------------------------------------- evaluation


def kept(path: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier call measured and kept in ``path``, where it was for the same ``key``; else measure and keep it.

    Args:
        key: what the figures belong to, JSON: the hash of the weights, settings.
        measure: figures, JSON.
    """
    if path.exists():
        found = read_json(path, "figures measured before")
        if all(found.get(name) == value for name, value in key.items()):
            return found
    found = {**key, **measure()}
    write_json(path, found)
    return found


# By suite: the benchmark, its clean test images below the data root, the classes that count.
SUITES: dict[str, tuple[str, str, str | None]] = {
    "cifar10": ("cifar10_c", "cifar10/test.parquet", None),
    "cifar10_r50": ("cifar10_c", "cifar10/test.parquet", None),
    "imagenet200": ("imagenet_c", "imagenet/val", "imagenet200"),
    "imagenet": ("imagenet_c", "imagenet/val", None),
    "mnist": ("mnist_c", "mnist/test", None),
}


def corruption_evaluation(options: Options, held_out: bool = False, seed: int = 0) -> Evaluation:
    """Errors on clean and corrupted test images, 15 corruptions (or the 4 held-out ones) at all severities, by
    :func:`lrface.robustness.run_robustness`; its figures of one model are the evaluation's.

    Forward passes are in bfloat16. The corrupted set is the one below ``options.data``, where it is there. Else, or
    where ``options.images`` wants the first so many images only, it is made once, below ``options.runs``. Clean
    accuracy is that on all test images.
    """
    benchmark, clean, classes = SUITES[options.suite]
    kind = BENCHMARKS[benchmark]
    images = recipes.find_data(clean, options.data)
    place: str | Path = benchmark
    names = kind.held_out if held_out else kind.names
    about: dict[str, Any] = {
        "benchmark": kind.title,
        "corruptions": list(names),
        "clean": clean,
        "precision": "bfloat16",
    }
    if classes is not None:
        about["classes"] = classes
    if options.images is not None:
        place = stored_set(images, benchmark, options.images, options.runs, seed)
        description = read_json(place / DESCRIPTION, "what the set is")
        about |= {name: description[name] for name in ("constants", "images", "seed", "severities", "code")}
        about["which"] = f"the first {description['images']:,} test images"

    def measure(folder: Path) -> Figures:
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
            run = run_robustness(
                [str(folder)],
                place,
                images,
                data=options.data,
                corruptions=names,
                classes=classes,
                seed=seed,
                batch_size=250,
            )
        found = {key: value for key, value in run.results[0].items() if key != "model"}  # its place here
        return found | {"images": run.about["images"], "made": run.about["made"]}

    name = "_".join([benchmark, *(["held_out"] if held_out else []), str(options.images or "all")])
    return Evaluation(name, about, measure, {"test": about})


def stored_set(images: Path, benchmark: str, count: int, runs: Path, seed: int = 0) -> Path:
    """The first ``count`` test images, corrupted once and kept below ``runs``; returns the folder of the set."""
    kind = BENCHMARKS[benchmark]
    out = runs / "test_sets" / f"{benchmark}-{count}-seed{seed}"
    if not (out / DESCRIPTION).exists():
        source = open_images(images)
        count = min(count, len(source))
        clean = out.with_name(f"{benchmark}-{count}-clean")
        with atomic_directory(clean) as aside:
            np.save(
                aside / "images.npy", np.stack([prepare(source.read(index), kind) for index in range(count)])
            )
            np.save(aside / "labels.npy", check_labels(source)[:count])
        name = next(name for name, of in SET_NAMES.items() if of == benchmark)
        corrupt_set(clean / "images.npy", out, name, held_out=bool(kind.held_out), seed=seed)
    return out


RESOLUTION_TESTING: dict[str, Any] = {
    "flip": True,
    "down": "nearest",
    "up": "bilinear",
    "precision": "bfloat16",
}
"""How :func:`accuracy_at_sizes` tests."""


def accuracy_at_sizes(
    encoder: nn.Module,
    benchmark: VerificationSet,
    sizes: Sequence[int],
    *,
    matrix: bool = False,
    native: bool = False,
    compiled: bool = False,
    precision: str = RESOLUTION_TESTING["precision"],
    flip: bool = RESOLUTION_TESTING["flip"],
) -> list[dict[str, Any]]:
    """Rows of :func:`lrface.benchmarks.verification.evaluate_verification`: every size against itself, and the largest
    against each smaller one; with ``matrix``, all against all.

    Args:
        encoder: images float32 [n, 3, s, s] RGB in [0, 1] -> embeddings [n, d].
        native: a row with the images as they are, by how many pixels their faces had.
        compiled: run it compiled, where there is a compiler.
        precision: bfloat16, or float32, which is what `lrface verify` takes by default.
        flip: add the features of the mirrored faces.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = encoder.eval().requires_grad_(False)
    encoder = encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled and shutil.which("c++"):
        encoder.compile()

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return encoder(images.contiguous(memory_format=torch.channels_last)).float()

    return evaluate_verification(
        embed,
        benchmark,
        sizes,
        flip=flip,
        down=RESOLUTION_TESTING["down"],
        up=RESOLUTION_TESTING["up"],
        batch_size=128,
        cross=not matrix,
        matrix=matrix,
        native=native,
        device=device,
    ).rows


def lfw_at(aligned: Path | None, data: Path | None) -> VerificationSet:
    """LFW's View 2: the photographs below ``data`` (else $LRFACE_DATA), or, to spare their alignment, ``aligned``, what
    `lrface align` made of them."""
    if aligned is None:
        return load_benchmark("lfw", data=data)
    root = data or Path(os.environ["LRFACE_DATA"])
    return load_benchmark(aligned, pairs=root / "lfw" / "pairs.txt")


def clean_accuracy(figures: Figures) -> float | None:
    """Percent of the clean test images."""
    return _right(figures["clean_error"])


def corruption_accuracy(figures: Figures) -> float | None:
    """Percent, mean over the 15 corruptions and 5 severities."""
    return _right(figures["mean_error"])


def accuracy_columns(paper: Mapping[str, Sequence[float]] | None = None) -> list[Column]:
    """Accuracy on clean images and on corruptions beside the ``paper``'s, which has both for each row."""
    return [
        Column(title, figure, {key: row[number] for key, row in (paper or {}).items()})
        for number, (title, figure) in enumerate(
            (("clean (%)", clean_accuracy), ("corruptions (%)", corruption_accuracy))
        )
    ]


def error_column(options: Options, paper: Mapping[str, float]) -> Column:
    """The mean corruption error beside the paper's mCE: mCE itself on ImageNet-C with all classes, elsewhere, where
    AlexNet has no errors to divide by, the mean error over the 15 corruptions in percent."""
    if options.suite == "imagenet":
        return Column("mCE (%)", lambda figures: figures["mce"], paper)
    return Column("mean corruption error (%)", lambda figures: figures["mean_error"], paper, "mCE (%)")


def accuracy_on(corruption: str) -> Callable[[Figures], float | None]:
    """Percent on one corruption, mean over its severities."""

    def figure(figures: Figures) -> float | None:
        rows = [row for row in figures["corruptions"] if row["corruption"] == corruption]
        return _right(rows[0]["error"]) if rows else None

    return figure


def _right(error: float | None) -> float | None:
    return None if error is None else 100.0 - error


# ----------------------------------------------------------------------------------------------------- printing


def about_the_run(started: float) -> dict[str, Any]:
    """The part of a result file that every table has: commit, seconds since ``started``, machine, date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "commit": lrface_commit(),
        "seconds": round(time.time() - started, 1),
        "machine": f"{device}, {platform.machine()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cell(values: Sequence[float | None]) -> str:
    """One number, mean and range over seeds, or "-" for none."""
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return _number(there[0] if there else None)
    return f"{statistics.mean(there):.2f} ({min(there):.2f} to {max(there):.2f})"


def markdown(rows: Sequence[Row], results: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """A line for each row, with its seeds and the images it was trained with, and the paper's numbers beside."""
    printed = [column for column in columns if column.paper]
    heads = ["", "seeds", "images a stage", *(c.title for c in columns)]
    heads += [f"paper: {c.paper_title or c.title}" for c in printed]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        runs = [result for result in results if result["key"] == row.key]
        images = " + ".join(f"{stage['images']:,}" for stage in runs[0]["stages"]) if runs else "-"
        cells = [cell([column.figure(run["evaluation"]) for run in runs]) for column in columns]
        cells += [_number(column.paper.get(row.paper or row.key)) for column in printed]
        lines.append(f"| {row.label} | {len(runs)} | {images} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
