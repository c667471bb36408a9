"""One network for every resolution: which way of training gives it, on real faces. A table and a figure.

Trains each way on celeba300_112 and tests it on LFW with gallery and probe at 112, 56, 28 and 14 pixels. Suite
"scratch" trains the slim IR-18 of Table 4 from random weights (its runs are taken where they are in --runs); suite
"pretrained" starts from a recogniser on disk (--recogniser FILE.onnx), whose BatchNorm is folded into its weights, so that
there is none to freeze. Suite "casia" is "scratch" with
the paper's IR-50 and schedule on CASIA-WebFace, for a GPU.

    python eval/study_resolution.py --data DATA [--recogniser recogniser.onnx]     # 8 to 15 minutes a network on 2 cores
    python eval/study_resolution.py --data DATA --suite pretrained --recogniser recogniser.onnx
    python eval/study_resolution.py --data DATA --seeds 0 1 2 --rows naive qualnet_lm_1

The same command goes on where it stopped. Commands with other rows may run side by side, each with a --results of its
own; one with --finished writes the table of all that is there.
"""

import argparse
import functools
import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrface.errors import errors_for_users
from lrface.files import atomic_file, write_json
from lrface.models.onnx_network import OnnxBackbone
from lrface.study import (
    RESOLUTION_TESTING,
    Column,
    Evaluation,
    Figures,
    Options,
    Row,
    accuracy_at_sizes,
    cell,
    kept,
    lfw_at,
    markdown,
    run_study,
    study_options,
)
from lrface.train.checkpoint import load_model

SIZES = (112, 56, 28, 14)
PAIRS = [(size, size) for size in SIZES] + [(SIZES[0], size) for size in SIZES[1:]]
LAMBDAS = ("0.1", "0.3", "1", "3")
SPECIALISED = ("vanilla", "specialised_56", "specialised_28", "specialised_14")
"""The network that saw each size alone; together they are one line of the table, and what the others are held against."""

CHIEF = ("robustify", "taught", "contrastive", "untrained", "naive", "qualnet_lm_1", "vanilla")
"""The rows whose lines have a colour in the figure; the others are told apart below the lines."""

PRETRAINED_EPOCHS = 4
"""Of 6,276 images, as in the fine-tuning that the authors of the data measured."""

ROBUSTIFY_WITHOUT = (
    ("unmixed", "blends of faces", ("method.mixed_share=0.0",)),
    ("undrawn", "the decoder's loss", ("method.quality_weight=0.0", "load=[encoder]")),
    ("unlabelled", "labels", ("method.recognition_weight=0.0",)),
    ("unrelated", "relations to other faces", ("method.contrast_weight=0.0",)),
    ("moved", "a share of the old weights", ("method.teacher_share=0.0",)),
)
"""The parts of `lrface robustify` that are left out one at a time."""

TAUGHT_STEPS = 14 * (6276 // 64)
"""As many images as the other networks from random weights see."""

TESTING = {**RESOLUTION_TESTING, "flip": False}
"""Without the mirrored faces a row takes half as long to test; `lrface verify` adds them."""

NETWORKS = {
    "scratch": "{name: ir18, width: 16, embedding_size: 128}",
    "casia": "{name: ir50, output: A, embedding_size: 512}",
}


def rows(suite: str, recogniser: str | None = None) -> tuple[Row, ...]:
    """The ways of training; "scratch" has one more where there is a ``recogniser`` to learn from."""
    if suite == "pretrained":
        recogniser = recogniser or "FILE"
        one, two, both = "celeba300/naive_onnx", "celeba300/qualnet_lm_onnx", (f"backbone.path={recogniser}",)
        teacher, clean = f"{{name: onnx, path: {recogniser}}}", ()
        whose = own = "the recogniser"  # the first stage, of the decoder, leaves it as it is
    else:
        one, two, both = "casia/naive_r50", "casia/qualnet_lm_r50", ()
        if suite == "scratch":
            one, two = "celeba300/naive", "celeba300/qualnet_lm"
        whose, own = "the vanilla network", "its own first stage"
        teacher, clean = NETWORKS[suite], ("stages.0.method={name: classify}",)
    see = "stages.0.degrade."
    taught = ("stages.1.load=[encoder, head, {from: encoder, to: teacher}]", *clean)
    if suite == "pretrained":
        taught = ("stages.1.load=[encoder, {from: encoder, to: teacher}]",)
    start = "[encoder, decoder]" if suite == "pretrained" else "[encoder, head, decoder]"
    alone = {112: (one, (f"{see}clean_share=1.0",))}
    alone |= {s: (one, (f"{see}clean_share=0.0", f"{see}sizes=[{s}]")) for s in SIZES[1:]}
    if suite == "scratch":
        alone = {112: ("celeba300/vanilla", ())} | {s: (f"celeba300/specialised_{s}", ()) for s in SIZES[1:]}
    found = [
        Row("vanilla", "vanilla (clean only)", *alone[112]),
        *(Row(f"specialised_{s}", f"specialised at {s}", *alone[s]) for s in SIZES[1:]),
        Row("naive", "naive augmentation", one),
        *(
            Row(
                f"qualnet_lm_{value}",
                f"QualNet-LM, lambda {value}",
                two,
                (f"stages.1.method.quality_weight={value}",),
            )
            for value in LAMBDAS
        ),
        Row(
            "fitnet",
            f"FitNet distillation of {whose}",
            two,
            (f"stages.1.method={{name: distil, teacher: {teacher}, loss: fitnet}}", *taught),
        ),
        Row(
            "contrastive",
            f"contrastive student of {whose}",
            two,
            (
                f"stages.1.method={{name: contrastive, teacher: {teacher}, variant: student_teacher}}",
                "stages.1.load=[{from: encoder, to: teacher}]",
                "stages.1.optimiser={name: adam, learning_rate: 5.0e-4, weight_decay: 0.0}",
                *clean,
            ),
        ),
        Row(
            "qualnet_lm_distilled",
            f"QualNet-LM and distillation of {own}",
            two,
            (
                "stages.1.method={name: robustify, quality_weight: 1.0, recognition_weight: 1.0}",
                f"stages.1.load={start}",
            ),
        ),
        Row("continuous", "naive, any size from 14 to 111", one, (f"{see}continuous=[14, 111]",)),
        Row(
            "kernels",
            "naive, mixed kernels",
            one,
            (f"{see}down=[nearest, area, bilinear, bicubic]", f"{see}up=[nearest, bilinear, bicubic]"),
        ),
        Row("adaface", "naive, AdaFace", one, ("head={name: adaface, scale: 30, margin: 0.25}",)),
    ]
    if suite == "pretrained":
        recipe = "celeba300/robustify_onnx"
        found.append(Row("robustify", "lrface robustify", recipe))
        for key, label, parts in ROBUSTIFY_WITHOUT:
            without = tuple(f"stages.1.{part}" for part in parts)
            found.append(Row(f"robustify_{key}", f"robustify without {label}", recipe, without))
    else:
        free = ("stages.1.method.freeze=[decoder]",)
        found.append(Row("qualnet_lm_free", "QualNet-LM, lambda 1, BatchNorm free", two, free))
    if suite == "scratch" and recogniser:
        by = (f"stages.0.method.teacher.path={recogniser}", f"stages.0.steps={TAUGHT_STEPS}")
        found.append(Row("taught", "taught by a recogniser, no labels", "celeba300/distilled", by))
    ready = []
    for row in found:
        overrides = (*both, *row.overrides)
        if suite == "pretrained":  # as many images for each, and a decoder beforehand where there is one
            overrides = (*both, *short(int(row.recipe != one)), *row.overrides)
        ready.append(Row(row.key, row.label, row.recipe, overrides))
    return tuple(ready)


def short(last: int) -> tuple[str, ...]:
    """Overrides for recipes of ONNX recognisers: the stage number ``last`` for PRETRAINED_EPOCHS."""
    lengths = (f"stages.{last}.steps=null", f"stages.{last}.epochs={PRETRAINED_EPOCHS}")
    before = ("stages.0.steps=null", "stages.0.epochs=2") if last else ()
    return (*lengths, f"stages.{last}.schedule.warmup_steps=40", *before)


def accuracy(gallery: int, probe: int) -> Column:
    """Column of the table."""
    name = f"{gallery}x{probe}"
    return Column(name, lambda figures: figures["accuracy"][name]["percent"])


COLUMNS = tuple(accuracy(gallery, probe) for gallery, probe in PAIRS)


def measured(found: Sequence[dict[str, Any]]) -> Figures:
    """What is kept of the rows of a verification: by gallery and probe size, and by native size."""
    named = {
        f"{row['gallery_size']}x{row['probe_size']}": {
            "percent": row["accuracy"],
            "interval": row["accuracy_interval"],
            "tar_at_far": row["tar_at_far"],
        }
        for row in found
    }
    return {"accuracy": named, "native": [row["by_native_size"] for row in found if row["by_native_size"]]}


UNTRAINED = Row("untrained", "the recogniser as it is", "")


def table(
    rows: Sequence[Row], results: list[dict[str, Any]], untrained: Sequence[dict[str, Any]] = ()
) -> str:
    """The printed table: the specialised networks as one line, then the others, and what each lacks to them; before them
    what ``untrained`` holds, a result of the row UNTRAINED or nothing."""
    rows, results = [*([UNTRAINED] if untrained else []), *rows], [*untrained, *results]
    own: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        own.setdefault(result["key"], []).append(result["evaluation"])
    cells = []
    for column, (gallery, probe) in zip(COLUMNS, PAIRS, strict=True):
        runs = own.get(SPECIALISED[SIZES.index(gallery)], []) if gallery == probe else []
        cells.append(cell([column.figure(figures) for figures in runs]))
    seeds = {len(own.get(key, [])) for key in SPECIALISED}
    shown = [row for row in rows if row.key not in SPECIALISED[1:]]
    lines = markdown(shown, results, COLUMNS).splitlines()
    first = f"| specialised network of each size | {min(seeds)} | each | {' | '.join(cells)} |"
    lines[0] = lines[0].rstrip(" |") + " | least of specialised |"
    lines[1] += "---|"
    for number, row in enumerate(shown, start=2):
        lines[number] += f" {lacking(own, row.key)} |"
    return "\n".join([*lines[:2], first + " |", *lines[2:]]) + "\n"


def lacking(own: dict[str, list[dict[str, Any]]], key: str) -> str:
    """The smallest difference over the sizes to the network of that size alone, means over seeds, in points."""
    if not all(own.get(name) for name in (*SPECIALISED, key)):
        return "-"
    differences = []
    for size, name in zip(SIZES, SPECIALISED, strict=True):
        figure = accuracy(size, size).figure
        mine, theirs = (statistics.mean(figure(each) or 0.0 for each in own[which]) for which in (key, name))
        differences.append(mine - theirs)
    return f"{min(differences):+.2f}"


def draw(out: Path, title: str, rows: Sequence[Row], results: list[dict[str, Any]]) -> None:
    """Accuracy against pixels, both faces at one size: lines of all ways of training with the chief ones in colour, then
    each by name at each size, a dot for each seed with its 95 % interval beside the network of that size alone."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        runs.setdefault(result["key"], []).append(result["evaluation"]["accuracy"])
    shown = [row for row in rows if row.key in runs and row.key not in SPECIALISED[1:]]
    alone = {
        size: runs[key][0][f"{size}x{size}"]["percent"]
        for size, key in zip(SIZES, SPECIALISED, strict=True)
        if key in runs
    }
    colours = dict(zip(CHIEF, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]

    figure = Figure(figsize=(11, 5.5 + 0.26 * len(shown)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.5, 1 + 0.26 * len(shown)])
    figure.suptitle(title)
    axes = above.add_subplot()
    for row in sorted(shown, key=lambda row: row.key in colours):
        chief = row.key in colours
        style = (
            {"color": colours[row.key], "label": row.label} if chief else {"color": "0.75", "linewidth": 0.8}
        )
        y = [statistics.mean(run[f"{size}x{size}"]["percent"] for run in runs[row.key]) for size in SIZES]
        axes.plot(SIZES, y, marker="o", markersize=4 if chief else 2, **style)
    if alone:
        sizes, y = zip(*alone.items(), strict=True)
        axes.plot(sizes, y, "k--o", markersize=4, label="specialised network of each size")
    axes.plot([], [], color="0.75", linewidth=0.8, label="others, see below")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_xlabel("pixels of both faces")
    axes.set_ylabel("accuracy on LFW (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")

    for axes, size in zip(below.subplots(1, len(SIZES), sharey=True), SIZES, strict=True):
        for place, row in enumerate(shown):
            for run in runs[row.key]:
                at_size = run[f"{size}x{size}"]
                (low, high), colour = at_size["interval"], colours.get(row.key, "0.45")
                axes.plot([low, high], [place, place], color=colour, linewidth=1)
                axes.plot(at_size["percent"], place, marker="o", markersize=4, color=colour)
        if size in alone:
            axes.axvline(alone[size], color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{size} pixels", fontsize="medium")
        axes.set_xlabel("accuracy (%)")
        axes.grid(alpha=0.3, axis="x")
        axes.set_yticks(range(len(shown)), [row.label for row in shown], fontsize="small")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.4, -0.6)
    FigureCanvasAgg(figure)
    with atomic_file(out) as aside:
        figure.savefig(aside, dpi=120, format="png")


def study(options: Options, lfw: Path | None, recogniser: Path | None = None) -> dict[str, Any]:
    """Everything that is trained, tested, written and drawn."""
    benchmark = functools.cache(lambda: lfw_at(lfw, options.data))

    def tested(encoder: nn.Module) -> Figures:
        faces = benchmark()
        native = faces.native is not None
        return measured(
            accuracy_at_sizes(encoder, faces, SIZES, matrix=True, native=native, flip=TESTING["flip"])
        )

    def measure(folder: Path) -> Figures:
        return tested(load_model(folder)[0])

    untrained = []
    if recogniser is not None:
        key = {"sha256": hashlib.sha256(recogniser.read_bytes()).hexdigest(), "settings": TESTING}
        figures = kept(
            options.runs / "untrained.json", key, lambda: {"figures": tested(OnnxBackbone(str(recogniser)))}
        )["figures"]
        untrained = [{"key": UNTRAINED.key, "stages": [], "evaluation": figures}]
    document = run_study(
        "One network for every resolution",
        options,
        Evaluation("lfw_matrix", TESTING, measure, {"test": "LFW View 2, 6,000 pairs"}),
        COLUMNS,
        table=functools.partial(table, untrained=untrained),
    )
    title = f"One network for every resolution ({options.suite})"
    if document:
        document["untrained"] = untrained
        write_json(options.results / f"{options.name}.json", document)
        rows, results = [UNTRAINED, *options.table_rows], [*untrained, *document["rows"]]
        draw(options.results / f"{options.name}.png", title, rows, results)
    return document


if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(
            "--recogniser",
            type=Path,
            help="an .onnx file: the start of suite pretrained, a teacher in suite scratch",
        )
        parser.add_argument("--lfw", type=Path, help="LFW aligned by `lrface align`, to spare its alignment")
        own, arguments = parser.parse_known_args()
        chosen = study_options(
            __doc__,
            "study_resolution",
            {
                name: rows(name, own.recogniser and str(own.recogniser))
                for name in ("scratch", "pretrained", "casia")
            },
            arguments,
            family="study",
        )
        if chosen.suite == "pretrained" and own.recogniser is None:
            parser.error("--suite pretrained needs --recogniser FILE.onnx")
        study(chosen, own.lfw, own.recogniser if chosen.suite == "pretrained" else None)
