"""Whether a training set holds people or images of a benchmark: by name, by content and by embedding.

An image of a benchmark in the training set, or another image of the same person under any name, makes the
benchmark's figures too good. By embedding, a single high cosine says little: among millions of pairs some
strangers look alike, and training sets hold images under wrong names. Two identities count as one person when
most of their images agree: at least half of all pairs (one image of each) reach the threshold, that is, the
median cosine does.
"""

import csv
import io
import math
import statistics
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrface.benchmarks.images import Images
from lrface.data.check import CheckReport, check_data
from lrface.data.info import readable_image, spread
from lrface.data.sheet import SheetRow, draw_sheet
from lrface.data.source import FaceSource
from lrface.embed import FaceEmbedder
from lrface.errors import LrfaceError, UsageError
from lrface.files import write_text
from lrface.neighbours import compute_device, embed_source
from lrface.progress import progress

FALSE_ACCEPT_RATE = 1e-5
"""Share of the benchmark's pairs of strangers whose cosine reaches the default threshold."""

SAME_PHOTOGRAPH = 0.95
"""From this cosine on two images show one photograph, cropped, scaled or encoded differently."""

AGREEING = 0.5
MAXIMUM_STRANGERS = 2_000_000
LEAST_OBSERVED = 10
"""So many pairs of strangers must lie above a threshold that is read off their scores."""

BLOCK_NUMBERS = 2**24
"""Cosines that are held at once: 64 MiB."""

MAXIMUM_CANDIDATES = 20_000_000
REASONS = {
    "name": "same name",
    "same file": "same image file",
    "same pixels": "same pixels in another file",
    "same photograph": "same photograph by embedding",
    "same person": "most images agree by embedding",
}
"""Why a training identity is taken to be in the benchmark, in the order they are reported."""

LEAK_COLUMNS = (
    "reason",
    "train_identity",
    "test_identity",
    "train_index",
    "train_source",
    "test_index",
    "test_source",
    "cosine",
    "agreeing",
)
DROP_COLUMNS = ("identity", "images", "reasons", "test_identities", "cosine", "agreeing")


@dataclass(frozen=True)
class Leak:
    """One piece of evidence: labels of the two identities, and the two images for all but a name.

    cosine: of the two images (NaN without a model). agreeing: share of the identities' image pairs that reach
    the threshold (NaN where not asked).
    """

    reason: str
    train_label: int
    test_label: int
    train_index: int = -1
    test_index: int = -1
    cosine: float = math.nan
    agreeing: float = math.nan


@dataclass
class Overlap:
    """What training set and benchmark have in common.

    threshold: cosine; ``threshold_from`` says where it comes from. Both None and empty without a model.
    names_compared: False where identities of either side have numbers or nothing for names.
    """

    train: Images = field(repr=False)
    test: Images = field(repr=False)
    leaks: list[Leak]
    threshold: float | None
    threshold_from: str
    names_compared: bool
    unreadable: tuple[int, int]
    seconds: float

    def identities(self, *reasons: str) -> list[int]:
        """Labels of training identities with a leak for one of these reasons (any, without)."""
        return sorted({leak.train_label for leak in self.leaks if not reasons or leak.reason in reasons})

    def to_dict(self) -> dict[str, Any]:
        source, other = self.train.source, self.test.source
        return {
            "train": self.train.name,
            "train_images": len(source),
            "train_identities": len(source.identities),
            "test": self.test.name,
            "test_images": len(other),
            "test_identities": len(other.identities) if self.test.named else None,
            "threshold": self.threshold,
            "threshold_from": self.threshold_from,
            "names_compared": self.names_compared,
            "unreadable": {"train": self.unreadable[0], "test": self.unreadable[1]},
            "identities": {reason: len(self.identities(reason)) for reason in REASONS},
            "drop": [source.identities[label] for label in self.identities()],
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        found = self.to_dict()
        test_identities = f" of {found['test_identities']:,} identities" if self.test.named else ""
        lines = [
            f"train   {found['train']}: {found['train_images']:,} images of {found['train_identities']:,} identities",
            f"test    {found['test']}: {found['test_images']:,} images{test_identities}",
        ]
        if any(self.unreadable):
            lines.append(
                f"        {self.unreadable[0]} and {self.unreadable[1]} images cannot be decoded and are left out"
            )
        if self.threshold is not None:
            lines.append(f"cosine  from {self.threshold:.3f} on: {self.threshold_from}")
        lines.append("")
        compared = {"name": self.names_compared}
        if self.threshold is None:
            compared |= {"same photograph": False, "same person": False}
        why = {"name": "no names on both sides", "same photograph": "no --model", "same person": "no --model"}
        for reason, title in REASONS.items():
            if compared.get(reason, True):
                lines.append(f"{len(self.identities(reason)):>7,}  training identities: {title}")
            else:
                lines.append(f"{'-':>7}  not compared, {why[reason]}: {title}")
        lines.append(
            f"{len(self.identities()):>7,}  training identities in all are probably in the benchmark"
        )
        return "\n".join(lines)

    def write_leaks(self, out: str | Path) -> None:
        """Write all evidence as CSV, whole or not at all, the surest first (see ``LEAK_COLUMNS``)."""
        train, test = self.train.source, self.test.source
        train_names, test_names = train.sources(), test.sources()
        rows = [
            [
                leak.reason,
                train.identities[leak.train_label],
                test.identities[leak.test_label] if self.test.named else "",
                *(("", "") if leak.train_index < 0 else (leak.train_index, train_names[leak.train_index])),
                *(("", "") if leak.test_index < 0 else (leak.test_index, test_names[leak.test_index])),
                _number(leak.cosine),
                _number(leak.agreeing),
            ]
            for leak in self.leaks
        ]
        _write_csv(out, LEAK_COLUMNS, rows)

    def write_drop_list(self, out: str | Path) -> None:
        """Write the training identities to leave out as CSV, whole or not at all: what ``lrface data split
        --drop`` reads (see ``DROP_COLUMNS``)."""
        train, test = self.train.source, self.test.source
        counts = np.bincount(train.labels, minlength=len(train.identities))
        rows = []
        for label in self.identities():
            leaks = [leak for leak in self.leaks if leak.train_label == label]
            people = dict.fromkeys(test.identities[leak.test_label] for leak in leaks)
            rows.append(
                [
                    train.identities[label],
                    int(counts[label]),
                    "; ".join(dict.fromkeys(leak.reason for leak in leaks)),
                    "; ".join(people) if self.test.named else "",
                    _number(_greatest(leak.cosine for leak in leaks)),
                    _number(_greatest(leak.agreeing for leak in leaks)),
                ]
            )
        _write_csv(out, DROP_COLUMNS, rows)

    def draw(self, out: str | Path, pairs: int = 16) -> None:
        """A contact sheet (PNG) of the surest ``pairs`` identity pairs: training images left, test images right.

        Raises:
            UsageError: ``out`` is no .png.
        """
        grouped: dict[tuple[int, int], list[Leak]] = {}
        for leak in self.leaks:
            grouped.setdefault((leak.train_label, leak.test_label), []).append(leak)
        rows = []
        for (train_label, test_label), leaks in list(grouped.items())[:pairs]:
            cosine, agreeing = (
                _greatest(getattr(leak, name) for leak in leaks) for name in ("cosine", "agreeing")
            )
            lines = [self.train.source.identities[train_label]]
            if self.test.named:
                lines.append(f"= {self.test.source.identities[test_label]}")
            lines.append(", ".join(dict.fromkeys(leak.reason for leak in leaks)))
            if not math.isnan(cosine):
                agree = "" if math.isnan(agreeing) else f", {agreeing:.0%} agree"
                lines.append(f"best cosine {cosine:.2f}{agree}")
            rows.append(
                SheetRow(
                    lines,
                    [
                        _some(self.train.source, train_label, [leak.train_index for leak in leaks], 6),
                        _some(self.test.source, test_label, [leak.test_index for leak in leaks], 4),
                    ],
                )
            )
        note = f"{len(self.identities()):,} training identities, {len(grouped):,} identity pairs"
        if len(grouped) > pairs:
            note += f", the surest {pairs} shown"
        if self.threshold is not None:
            note += f"; cosines from {self.threshold:.3f} on agree"
        title = f"In both {Path(self.train.name).name} and {Path(self.test.name).name}"
        draw_sheet(out, title, note, rows, ("training set", "benchmark"))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _greatest(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _write_csv(out: str | Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(out, text.getvalue())


def _some(source: FaceSource, label: int, first: Sequence[int], count: int) -> list[NDArray[np.uint8] | None]:
    """At most ``count`` images of an identity: those that the evidence names, then others evenly spread."""
    own = np.flatnonzero(source.labels == label)
    wanted = [index for index in dict.fromkeys(first) if index >= 0]
    wanted += [index for index in own[spread(len(own), count)].tolist() if index not in wanted]
    return [readable_image(source, index) for index in wanted[:count]]


def normalised_name(name: str) -> str:
    """An identity's name without case, accents, spaces and punctuation; empty for one that only numbers it.

    "Zoë_Kravitz", "zoe kravitz" and "Zoe Kravitz " are one name; "07201" is none.
    """
    letters = unicodedata.normalize("NFKD", name).casefold()
    kept = "".join(letter for letter in letters if letter.isalnum())
    return "" if kept.isdigit() else kept


def find_overlap(
    train: Images,
    test: Images,
    embedder: FaceEmbedder | None = None,
    *,
    threshold: float | None = None,
    false_accept_rate: float = FALSE_ACCEPT_RATE,
    same_photograph: float = SAME_PHOTOGRAPH,
    workers: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    show_progress: bool = True,
) -> Overlap:
    """Compare a training set with a benchmark (see the text of this module).

    Args:
        train, test: from :func:`lrface.benchmarks.images.open_images`; ``test`` aligned when there is an
            ``embedder``.
        embedder: without it only names and contents are compared.
        threshold: cosine from which on two images may show one person. By default that which
            ``false_accept_rate`` of the benchmark's own pairs of strangers reach; see :func:`calibrate`.
        same_photograph: cosine from which on two images are one photograph.
        workers: processes that decode for the comparison of contents.
        device: where cosines are computed: auto, cpu or cuda.

    Raises:
        UsageError: thresholds out of range, or no threshold and a benchmark without pairs of strangers.
    """
    for name, value in (("--threshold", threshold), ("--same-photograph", same_photograph)):
        if value is not None and not -1 <= value <= 1:
            raise UsageError(f"{name}: a cosine between -1 and 1 is expected; found {value}")
    if not 0 < false_accept_rate < 0.5:
        raise UsageError(f"--far: a rate between 0 and 0.5 is expected; found {false_accept_rate}")
    started = time.monotonic()
    leaks, names_compared = _by_name(train, test)
    contents = [
        check_data(images.source, images.name, workers, show_progress, f"read {what}")
        for images, what in ((train, "train"), (test, "test"))
    ]
    leaks += _by_content(train.source, test.source, *contents)
    threshold_from = ""
    if embedder is not None:
        vectors, others = (
            embed_source(images.source, embedder, batch_size, f"embed {what}", show_progress)
            for images, what in ((train, "train"), (test, "test"))
        )
        if threshold is None:
            threshold, threshold_from = calibrate(test, others, false_accept_rate)
        else:
            threshold_from = "given"
        leaks += _by_embedding(
            vectors,
            train.source.labels,
            others,
            test.source.labels,
            threshold,
            same_photograph,
            device,
            show_progress,
        )
    else:
        threshold = None
    unreadable = tuple(int((~content.readable).sum()) for content in contents)
    return Overlap(
        train,
        test,
        _surest_first(leaks),
        threshold,
        threshold_from,
        names_compared,
        (unreadable[0], unreadable[1]),
        time.monotonic() - started,
    )


def _surest_first(leaks: list[Leak]) -> list[Leak]:
    """Identity pairs by their best evidence: equal content, then equal names, then the share that agrees."""

    def certainty(leak: Leak) -> tuple[float, float]:
        known = {"same file": 3.0, "same pixels": 3.0, "name": 2.0}
        agreeing = 0.0 if math.isnan(leak.agreeing) else leak.agreeing
        return known.get(leak.reason, agreeing), 0.0 if math.isnan(leak.cosine) else leak.cosine

    best: dict[tuple[int, int], tuple[float, float]] = {}
    for leak in leaks:
        pair = leak.train_label, leak.test_label
        best[pair] = max(best.get(pair, (0.0, 0.0)), certainty(leak))
    reasons = list(REASONS)

    def rank(leak: Leak) -> tuple[float, ...]:
        pair = leak.train_label, leak.test_label
        sure, cosine = best[pair]
        return -sure, -cosine, *pair, reasons.index(leak.reason), leak.train_index, leak.test_index

    return sorted(leaks, key=rank)


def _by_name(train: Images, test: Images) -> tuple[list[Leak], bool]:
    sides: list[dict[str, list[int]]] = []
    for images in (train, test):
        names: dict[str, list[int]] = {}
        present = np.unique(images.source.labels).tolist() if images.named else []
        for label in present:
            name = normalised_name(images.source.identities[label])
            if name:
                names.setdefault(name, []).append(label)
        sides.append(names)
    leaks = [
        Leak("name", label, other)
        for name, labels in sides[0].items()
        for label in labels
        for other in sides[1].get(name, [])
    ]
    return leaks, bool(sides[0] and sides[1])


def _by_content(train: FaceSource, test: FaceSource, here: CheckReport, there: CheckReport) -> list[Leak]:
    """Images in both, each test image with every training identity that has it, once."""
    leaks = []
    seen: set[tuple[int, int]] = set()
    for reason, ours, theirs in (
        ("same file", here.files, there.files),
        ("same pixels", here.pixels, there.pixels),
    ):
        for index, other in _equal_rows(ours, theirs):
            if (index, other) not in seen:
                seen.add((index, other))
                leaks.append(Leak(reason, int(train.labels[index]), int(test.labels[other]), index, other))
    return leaks


def _equal_rows(ours: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Pairs (row of ours, row of theirs) of equal hashes; a row of zeros equals none."""
    kind = np.dtype([("a", np.uint64), ("b", np.uint64)])
    left, right = (np.ascontiguousarray(rows).view(kind).reshape(-1) for rows in (ours, theirs))
    common = {value.tobytes() for value in np.intersect1d(left, right)} - {bytes(16)}
    if not common:
        return []
    places: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(np.isin(right, left)).tolist():
        places.setdefault(right[row].tobytes(), []).append(row)
    return [
        (row, other)
        for row in np.flatnonzero(np.isin(left, right)).tolist()
        if left[row].tobytes() in common
        for other in places[left[row].tobytes()]
    ]


def calibrate(test: Images, vectors: NDArray[np.float32], false_accept_rate: float) -> tuple[float, str]:
    """The cosine that ``false_accept_rate`` of the benchmark's own pairs of strangers reach, and how it was found.

    Up to 2,000,000 pairs of images of two identities are drawn (those that a verification pack calls
    different, since its identities have no names). Where fewer than ten of them would lie above it, the
    threshold is that of a normal distribution with their mean and deviation.

    Raises:
        UsageError: there are fewer than 100 pairs of strangers.
    """
    if test.different is not None:
        left, right = test.different
    else:
        left, right = _strangers(test.source.labels)
    known = np.asarray(vectors.any(axis=1))
    usable = np.flatnonzero(known[left] & known[right])
    left, right = left[usable], right[usable]
    if len(left) < 100:
        raise UsageError(
            f"{test.name} has {len(left)} pairs of different people, too few to find a threshold; give --threshold"
        )
    scores = np.concatenate(
        [
            np.einsum("pd,pd->p", vectors[left[start : start + 65536]], vectors[right[start : start + 65536]])
            for start in range(0, len(left), 65536)
        ]
    )
    of = f"of {len(scores):,} pairs of strangers in {test.name}"
    above = int(false_accept_rate * len(scores))
    if above >= LEAST_OBSERVED:
        return float(np.partition(scores, -above)[-above]), f"{false_accept_rate:g} {of} reach it"
    tail = statistics.NormalDist(float(scores.mean()), float(scores.std()))
    reached = min(tail.inv_cdf(1 - false_accept_rate), 1.0)
    return reached, f"{false_accept_rate:g} would reach it by mean and deviation {of}"


def _strangers(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of images of two identities: all of them, or 2,000,000 drawn by a fixed seed."""
    count = len(labels)
    if count * (count - 1) // 2 <= MAXIMUM_STRANGERS:
        left, right = np.triu_indices(count, 1)
    else:
        random = np.random.default_rng(0)
        left, right = random.integers(0, count, (2, MAXIMUM_STRANGERS))
    different = np.flatnonzero(labels[left] != labels[right])
    return left[different].astype(np.int64), right[different].astype(np.int64)


def _by_embedding(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    others: NDArray[np.float32],
    other_labels: NDArray[np.int64],
    threshold: float,
    same_photograph: float,
    device: str,
    show_progress: bool,
) -> list[Leak]:
    """Identity pairs of which at least half of the image pairs reach the threshold, and for every test image
    the training image most like it where that is the same photograph. Exact; memory is bounded by a block and
    by the identity pairs with any image pair above the threshold."""
    # Rows of zeros are images that could not be decoded.
    counts = (
        np.bincount(labels, vectors.any(axis=1), int(labels.max()) + 1),
        np.bincount(other_labels, others.any(axis=1), int(other_labels.max()) + 1),
    )
    width = len(counts[1])
    pairs = _PairTable(threshold)
    nearest = np.full(len(others), -1, np.int64)
    nearest_cosine = np.full(len(others), -2.0, np.float32)
    place = compute_device(device)
    rows_at_once = max(1, min(len(vectors), BLOCK_NUMBERS // max(1, len(others))))
    columns = torch.from_numpy(others).to(place).T
    with (
        progress(len(vectors), "compare", enabled=show_progress) as bar,
        torch.inference_mode(),
    ):
        for start in range(0, len(vectors), rows_at_once):
            block = torch.from_numpy(vectors[start : start + rows_at_once]).to(place) @ columns
            top = block.max(dim=0)
            best = top.values.cpu().numpy()
            better = best > nearest_cosine
            nearest[better] = top.indices.cpu().numpy()[better] + start
            nearest_cosine[better] = best[better]
            reached = torch.nonzero(block >= threshold)
            cosines = block[reached[:, 0], reached[:, 1]].cpu().numpy()
            rows, hits = reached.cpu().numpy().T
            rows = rows + start
            pairs.add(labels[rows] * width + other_labels[hits], cosines, rows, hits)
            bar.advance(len(block))
    leaks = []
    agreeing = pairs.hits / (counts[0][pairs.keys // width] * counts[1][pairs.keys % width])
    for row in np.flatnonzero(agreeing >= AGREEING).tolist():
        label, other_label = divmod(int(pairs.keys[row]), width)
        leaks.append(
            Leak(
                "same person",
                label,
                other_label,
                int(pairs.rows[row]),
                int(pairs.columns[row]),
                float(pairs.cosines[row]),
                float(agreeing[row]),
            )
        )
    share = dict(zip(pairs.keys.tolist(), agreeing.tolist(), strict=True))
    for column in np.flatnonzero(nearest_cosine >= same_photograph).tolist():
        row = int(nearest[column])
        label, other_label = int(labels[row]), int(other_labels[column])
        leaks.append(
            Leak(
                "same photograph",
                label,
                other_label,
                row,
                column,
                float(nearest_cosine[column]),
                share.get(label * width + other_label, math.nan),
            )
        )
    return leaks


class _PairTable:
    """For identity pairs by key: how many image pairs reached the threshold, and the best of them."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.keys = np.zeros(0, np.int64)
        self.hits = np.zeros(0, np.int64)
        self.cosines = np.zeros(0, np.float32)
        self.rows = np.zeros(0, np.int64)
        self.columns = np.zeros(0, np.int64)

    def add(
        self,
        keys: NDArray[np.int64],
        cosines: NDArray[np.float32],
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
    ) -> None:
        """Merge image pairs above the threshold, given by the key of their identity pair.

        Raises:
            LrfaceError: more identity pairs than 20 million.
        """
        if not len(keys):
            return
        keys = np.concatenate([self.keys, keys])
        hits = np.concatenate([self.hits, np.ones(len(rows), np.int64)])
        cosines = np.concatenate([self.cosines, cosines])
        rows, columns = np.concatenate([self.rows, rows]), np.concatenate([self.columns, columns])
        order = np.lexsort((-cosines, keys))  # the best of an identity pair comes first
        first = np.flatnonzero(np.diff(keys[order], prepend=-1))
        self.keys, self.hits = keys[order][first], np.add.reduceat(hits[order], first)
        best = order[first]
        self.cosines, self.rows, self.columns = cosines[best], rows[best], columns[best]
        if len(self.keys) > MAXIMUM_CANDIDATES:
            raise LrfaceError(
                f"more than {MAXIMUM_CANDIDATES:,} pairs of identities have images whose cosine reaches "
                f"{self.threshold:.3f}; give a higher --threshold"
            )
