"""What the scripts of the paper on contrastive inversion share (eval/contrastive_tables.py, eval/contrastive_figures.py):
the runs that they train, and what is probed of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrface.benchmarks.published_contrastive import TABLE_14
from lrface.config import read_yaml
from lrface.errors import LrfaceError, UsageError
from lrface.files import write_text
from lrface.losses.contrastive import VARIANTS
from lrface.probe import run_probe
from lrface.recipes import find_data
from lrface.study import Evaluation, Figures, Options, Row

TRAIN, TEST = "cifar10/train.parquet", "cifar10/test.parquet"

LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"mask{percent}": ("mask", {"missing": percent / 100}) for percent in (50, 75, 90)},
    **{f"noise{percent}": ("noise", {"sigma": percent / 100}) for percent in (10, 30, 50)},
    "blur21": ("blur", {"kernel": 21, "sigma": 5}),
    "blur37": ("blur", {"kernel": 37, "sigma": 9}),
}
RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "mask_range": ("mask", {"missing": "null", "missing_range": "[0.5, 0.95]"}),
    "noise_range": ("noise", {"sigma_range": "[0.1, 0.3]"}),
}
OPERATORS = (*LEVELS, *RANGES)

# By the policy that a network was trained with: which of its arguments is the level, and other levels.
OTHER_LEVELS = {
    "pixel_mask": ("missing", (0.1, 0.2, 0.3, 0.4, 0.96, 0.97, 0.98, 0.99)),
    "gaussian_noise": ("sigma", (0.02, 0.05, 0.07, 0.09, 0.35, 0.4, 0.45, 0.5)),
}
"""Table 10's lower levels, of which the copy of the paper at hand has no names, and Figure 4's higher ones."""
SHIFT_LEVELS = {
    "pixel_mask": ("missing", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)),
    "gaussian_noise": ("sigma", (0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5)),
}
VARIANT_LEVELS = {
    "pixel_mask": ("missing", (0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)),
    "gaussian_noise": ("sigma", (0.2, 0.3, 0.35, 0.4, 0.45, 0.5)),
}

STAGES = {"supervised": "supervised", "supervised10": "supervised", "contrastive": "student"}
LABELS = {
    "supervised": "end-to-end",
    "supervised10": "end-to-end, 10 % of the labels",
    "contrastive": "contrastive student",
}
VARIANT_LABELS = {
    "student_teacher": "student against teacher",
    "student_student": "student against student",
    "student_both": "student against both",
    "nt_xent": "NT-Xent",
    "mse": "MSE",
}

SEEN_CLASSES = ("0", "1", "2", "5", "6", "7", "8")
SHIFT = {"3": "5", "4": "7", "9": "1"}
"""CIFAR-10's counterpart of Table 3: cats, deer and trucks, which no network has seen, are to be taken for dogs, horses and
cars."""

MIXTURE = (
    "{name: chain, clean_share: 0, mirror: 0.5, crop_padding: 4, parts: ["
    "{name: gaussian_blur, kernel: 21, sigma_range: [1, 5], reference_size: 224, clean_share: 0.2}, "
    "{name: gaussian_noise, sigma_range: [0.05, 0.5], clean_share: 0.2}]}"
)
"""Appendix D.8: blur and noise, each on 80 % of the images."""

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the labels, for Figure 3."""

TRANSFER = {
    "cifar100": ("cifar100/train.parquet", "cifar100/test.parquet"),
    "stl10": ("stl10/train", "stl10/test"),
}
"""Sets of Table 2, where they are looked for below the data root."""


# -------------------------------------------------------------------------------------------------------------- rows


def row(
    kind: str, key: str, family: str, arguments: Mapping[str, Any], variant: str = "student_teacher"
) -> Row:
    """A recipe of a kind and family at a level; the last stage of supervised10 sees a tenth of the images."""
    overrides = [f"stages.{STAGES[kind]}.degrade.{name}={value}" for name, value in arguments.items()]
    recipe = f"cifar10/{kind.removesuffix('10')}_{family}"
    share = 0.1 if kind == "supervised10" else 1.0
    if variant == "student_teacher":
        return Row(f"{kind}-{key}", f"{LABELS[kind]}, {key}", recipe, tuple(overrides), share=share)
    overrides.append(f"stages.student.method.variant={variant}")
    return Row(f"{kind}-{key}-{variant}", f"{VARIANT_LABELS[variant]}, {key}", recipe, tuple(overrides))


def operator_rows(kinds: Sequence[str], keys: Sequence[str]) -> tuple[Row, ...]:
    """Each kind at each of OPERATORS."""
    known = {**LEVELS, **RANGES}
    return tuple(row(kind, key, *known[key]) for key in keys for kind in kinds)


def variant_rows(operator: str) -> tuple[Row, ...]:
    """The five losses of section 4.5 on one operator. The first is the run that other tables have."""
    found = [row("contrastive", operator, *{**LEVELS, **RANGES}[operator], variant) for variant in VARIANTS]
    return (replace(found[0], label=f"{VARIANT_LABELS['student_teacher']}, {operator}"), *found[1:])


def mixture_rows() -> tuple[Row, ...]:
    """Table 14: the clean classifier, tuned on clean images, and a student of blur and noise."""
    return (
        Row(
            "supervised-clean",
            "end-to-end, clean images",
            "cifar10/supervised_noise",
            ("stages.supervised.degrade={name: clean, mirror: 0.5, crop_padding: 4}",),
        ),
        Row(
            "contrastive-blur_noise",
            "contrastive student, blur and noise",
            "cifar10/contrastive_noise",
            (f"stages.student.degrade={MIXTURE}",),
        ),
    )


def rows(table: str, operator: str = "noise50") -> tuple[Row, ...]:
    """The rows of a table of the paper, or of ``losses``, section 4.5 on ``operator``."""
    if table == "losses":
        return variant_rows(operator)
    if table == "14":
        return mixture_rows()
    if table in ("2", "10"):
        return operator_rows(("supervised", "contrastive"), tuple(RANGES))
    first = {"7": "noise", "8": "mask"}.get(table, "")
    kinds = tuple(LABELS) if table == "1" else ("contrastive",)
    return operator_rows(kinds, [key for key in LEVELS if key.startswith(first)])


def figure_rows(number: str, operators: Sequence[str] = ()) -> tuple[Row, ...]:
    """The rows of a figure of the paper.

    Args:
        operators: of Figure 3 (the paper's are mask90 and noise50) and Figure 6 (mask_range), else as in the paper.
    """
    if number == "3":
        return operator_rows(tuple(LABELS), operators or ("mask90", "noise50"))
    if number == "6":
        for key in operators:
            if key.startswith("blur"):
                raise UsageError(
                    f"--operator {key}: Figure 6 is by level, and blur has none; take a mask or noise"
                )
        return tuple(row for key in operators or ("mask_range",) for row in variant_rows(key))
    if operators:
        raise UsageError(f"--operator: Figure {number} is of networks trained on ranges; leave it out")
    found = operator_rows(("supervised", "contrastive"), tuple(RANGES))
    if number == "5":
        return tuple(replace(each, key=f"seven_classes-{each.key}") for each in found)
    return found


def of_seven_classes(options: Options) -> Options:
    """The options of Figure 5: every row is trained on :data:`SEEN_CLASSES` alone, which a file below the runs names."""
    file = options.runs / "seven_classes.txt"
    write_text(file, "".join(f"{name}\n" for name in SEEN_CLASSES))
    return replace(options, overrides=(f"data.classes_subset={file}", *options.overrides))


# ------------------------------------------------------------------------------------------------------- evaluations


class Probed:
    """A finished run of one of the rows, to be probed. Its first stage is the teacher; ``student`` is what the last one
    trained: a student, or an end-to-end network, which is judged with its own head unless a probe is asked for.

    Attributes:
        last: its last stage, as the recipe has it; ``degrade`` what that saw.
    """

    def __init__(self, folder: Path, options: Options, draws: int):
        self.folder, self.options, self.draws = folder, options, draws
        self.last: dict[str, Any] = read_yaml(folder / "recipe.yaml")["stages"][-1]
        self.degrade = {key: value for key, value in self.last["degrade"].items() if value is not None}
        self.supervised = self.last["name"] == STAGES["supervised"]

    def __call__(
        self,
        *also: str,
        head: bool = True,
        train: str | Path = TRAIN,
        test: str | Path = TEST,
        **more: Any,
    ) -> Figures:
        """Figures of the student and of what ``also`` names: "teacher", or "teacher alone" in place of the student.

        Args:
            head: judge an end-to-end network with its own head; what its head saw of the labels stands as ``labels``
                where it is less than all.
            more: of :func:`lrface.probe.run_probe`.
        """
        student, teacher = f"student={self.folder}", f"teacher={self.folder / 'stages' / '1-teacher'}"
        own = head and self.supervised
        models = [] if own else {(): [student], ("teacher alone",): [teacher]}.get(also, [student, teacher])
        found = run_probe(
            models,
            train,
            test,
            own_heads=[student] if own else [],
            root=self.options.data,
            seeds=self.draws,
            images=self.options.images,
            **{"degrade": json.dumps(self.degrade), **more},
        ).to_json()
        share = self.last.get("share", 1.0)
        if own and share < 1:
            for result in found["results"]:
                result["labels"] = share
        return found

    def levels(self, known: Mapping[str, tuple[str, Sequence[float]]]) -> list[str]:
        """Operators of the kind that the run was trained with, at other levels, for ``test_degrade``.

        Raises:
            UsageError: there are none for this kind.
        """
        if self.degrade["name"] not in known:
            raise UsageError(
                f"{self.folder}: no other levels are known for {self.degrade['name']}; there are for {', '.join(known)}"
            )
        argument, levels = known[self.degrade["name"]]
        return [json.dumps({"name": self.degrade["name"], argument: level}) for level in levels]


def evaluation(
    options: Options, table: str, draws: int, sets: Mapping[str, tuple[str, str]] | None = None
) -> Evaluation:
    """What a table of the paper asks of a run: probes of the student and of its teacher, or the end-to-end network's own
    head.

    Args:
        sets: of Table 2, by name: training and test images.
    """
    if table == "losses":
        table = "1"

    def measure(folder: Path) -> Figures:
        probe = Probed(folder, options, draws)
        if table == "1":
            return probe(labels=[1.0, 0.1])
        if table == "2":
            return {"sets": {name: transferred(probe, *places) for name, places in (sets or {}).items()}}
        if table == "9":
            return probe("teacher", train_degrade="clean", classifier_of="teacher")
        if table == "10":
            return probe(test_degrade=probe.levels(OTHER_LEVELS))
        if table == "13":
            return probe("teacher")
        if table == "14":
            return probe(test_degrade=[json.dumps(corruption(name)) for name in TABLE_14])
        restored = probe("teacher alone", restore={"7": "nlm", "8": "deep_decoder"}[table])
        return {**restored, "results": restored["results"] + probe()["results"]}

    settings = {"table": table, "draws": draws, "images": options.images, "train": TRAIN, "test": TEST}
    if table == "2":
        settings["sets"] = {name: list(places) for name, places in (sets or {}).items()}
    return Evaluation(f"probe_table{table}_{options.images or 'all'}", settings, measure, {"test": settings})


def transferred(probe: Probed, train: str, test: str) -> Figures:
    """A new linear layer for another set, on end-to-end networks too, whose own is taken away (section 4.3)."""
    return probe(head=False, train=train, test=test)


def corruption(name: str) -> dict[str, Any]:
    """One of ImageNet-C's, each image at one of the five severities."""
    return {"name": "corruptions", "set": "cifar", "names": [name], "clean_share": 0.0}


def figure_evaluation(options: Options, number: str, draws: int) -> Evaluation:
    """What a figure of the paper asks of a run; Figure 4 has what Table 10 has."""
    if number == "4":
        return evaluation(options, "10", draws)

    def measure(folder: Path) -> Figures:
        probe = Probed(folder, options, draws)
        if number == "3":
            return probe("teacher", labels=SHARES)
        if number == "5":
            relabel = ",".join(f"{old}={new}" for old, new in SHIFT.items())
            classes = str(options.runs / "seven_classes.txt")
            return probe(test_degrade=probe.levels(SHIFT_LEVELS), classes=classes, relabel=relabel)
        return probe(test_degrade=probe.levels(VARIANT_LEVELS))

    settings = {"figure": number, "draws": draws, "images": options.images, "train": TRAIN, "test": TEST}
    if number == "5":
        settings["relabel"] = SHIFT
    return Evaluation(
        f"probe_figure{number}_{options.images or 'all'}", settings, measure, {"test": settings}
    )


def transfer_sets(options: Options, given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The sets of Table 2: those of ``given``, NAME=TRAIN,TEST each, and those of :data:`TRANSFER` that are there.

    Raises:
        UsageError: one of ``given`` is written otherwise, or there is none at all.
    """
    found = {}
    for name, places in TRANSFER.items():
        try:
            for place in places:
                find_data(place, options.data)
        except LrfaceError:
            continue
        found[name] = places
    for text in given:
        name, equals, tail = text.partition("=")
        train, comma, test = tail.partition(",")
        if not (name and equals and train and comma and test):
            raise UsageError(f"--transfer {text!r}: give NAME=TRAIN,TEST: flowers=flowers/train,flowers/test")
        found[name] = train, test
    if not found:
        looked = ", ".join(place for places in TRANSFER.values() for place in places)
        raise UsageError(
            f"--table 2: none of its sets is below the data root ({looked}); give others with --transfer NAME=TRAIN,TEST"
        )
    return found
