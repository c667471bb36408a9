"""Held-out identities: one data set into two packed ones that share nobody."""

import csv
import io
import math
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lrface.data.decode import BrokenImage, read_header
from lrface.data.packed import PackedSource, PackedWriter, alignment_columns
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_directory
from lrface.progress import progress

LEAST_IDENTITIES = 2
"""Of each part: training and verification both need two people."""


@dataclass
class SplitSummary:
    """What :func:`split_source` wrote."""

    train: str
    train_images: int
    train_identities: int
    held_out: str
    held_out_images: int
    held_out_identities: int
    dropped_images: int
    dropped_identities: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.train}: {self.train_images:,} images of {self.train_identities:,} identities",
            f"{self.held_out}: {self.held_out_images:,} images of {self.held_out_identities:,} identities, "
            f"held out (seed {self.seed})",
        ]
        if self.dropped_identities:
            lines.append(
                f"left out: {self.dropped_images:,} images of {self.dropped_identities:,} identities"
            )
        return "\n".join(lines)


def parse_held_out(text: str) -> float:
    """ "0.1" (a share, below 1) or "30" (identities). Raises UsageError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value) or (value >= 1 and value != int(value)):
        raise UsageError(
            f"--held-out takes a share such as 0.1 or a whole number of identities such as 30; found {text!r}"
        )
    return value


def read_drop_list(path: str | Path) -> list[str]:
    """Names of identities: the column ``identity`` of a CSV file (``lrface data overlap --out``), or one a line.

    Raises:
        LrfaceError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LrfaceError(f"{path}: cannot be read as a list of identities: {error}") from error
    lines = text.splitlines()
    if lines and "identity" in next(csv.reader([lines[0]]), []):
        return [row["identity"] for row in csv.DictReader(io.StringIO(text)) if row["identity"]]
    return [line.strip() for line in lines if line.strip()]


def choose_held_out(names: list[str], held_out: float, seed: int) -> list[int]:
    """Which of ``names`` are held out: a share below 1 or a number of them, in ascending order.

    The choice follows the sorted names, so that the same people are held out whatever format the data is in.

    Raises:
        UsageError: fewer than two identities would be left on either side.
    """
    count = round(held_out * len(names)) if held_out < 1 else int(held_out)
    if count < LEAST_IDENTITIES or len(names) - count < LEAST_IDENTITIES:
        raise UsageError(
            f"--held-out {held_out:g} holds out {count} of {len(names)} identities; each part needs at least "
            f"{LEAST_IDENTITIES}"
        )
    by_name = sorted(range(len(names)), key=lambda label: (names[label], label))
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(by_name[place] for place in chosen.tolist())


def split_source(
    source: FaceSource,
    name: str,
    out_train: str | Path,
    out_held_out: str | Path,
    held_out: float,
    seed: int = 0,
    drop: Collection[str] = (),
    show_progress: bool = True,
) -> SplitSummary:
    """Write ``source`` as two packed data sets that share no identity.

    Image files are copied byte by byte in their order (stored pixels become PNG, which loses nothing); every
    image goes to one side, but for those of identities named in ``drop``. Labels are numbered anew without
    gaps, names stay. The same source, seed and list give the same bytes. Memory is bounded by one shard a side.

    Raises:
        UsageError: an output that exists, the same output twice, or too few identities for two parts.
        LrfaceError: a name in ``drop`` that the data does not have; an image file that cannot be read (one
            that reads and does not decode is copied as it is).
    """
    outs = Path(out_train), Path(out_held_out)
    if outs[0].resolve() == outs[1].resolve():
        raise UsageError(f"{outs[0]}: both parts cannot go to the same place")
    for out in outs:
        if out.exists():
            raise UsageError(f"{out} exists; give another place or remove it")
    labels = source.labels
    present = np.unique(labels).tolist()
    unknown = sorted(set(drop) - {source.identities[label] for label in present})
    if unknown:
        raise LrfaceError(
            f"{len(unknown)} of the identities to drop are not in {name}, the first: {', '.join(unknown[:5])}; is the "
            "list of another data set?"
        )
    kept = [label for label in present if source.identities[label] not in set(drop)]
    chosen = {
        kept[at] for at in choose_held_out([source.identities[label] for label in kept], held_out, seed)
    }
    members = [label for label in kept if label not in chosen], sorted(chosen)
    # For every label of the source its side (-1: left out) and its new label.
    side = np.full(len(source.identities), -1, np.int64)
    new_label = np.zeros(len(source.identities), np.int64)
    for number, part in enumerate(members):
        side[part] = number
        new_label[part] = np.arange(len(part))
    details = alignment_columns(source)
    paths = source.sources()
    size = _image_size(source)
    with ExitStack() as stack:
        writers = [PackedWriter(stack.enter_context(atomic_directory(out))) for out in outs]
        with progress(len(source), "split", enabled=show_progress) as bar:
            for index, label in enumerate(labels.tolist()):
                if side[label] >= 0:
                    writers[side[label]].add(
                        {
                            "image": _image_file(source, index),
                            "label": int(new_label[label]),
                            "identity": source.identities[label],
                            "source": paths[index],
                            **details(index),
                        }
                    )
                bar.advance()
        for writer, part, kind in zip(writers, members, ("train", "held out"), strict=True):
            writer.finish(
                size,
                [source.identities[label] for label in part],
                {
                    "split": {
                        "source": name,
                        "part": kind,
                        "held_out": held_out,
                        "seed": seed,
                        "dropped": len(present) - len(kept),
                    }
                },
            )
    images = [writer.images for writer in writers]
    return SplitSummary(
        train=str(outs[0]),
        train_images=images[0],
        train_identities=len(members[0]),
        held_out=str(outs[1]),
        held_out_images=images[1],
        held_out_identities=len(members[1]),
        dropped_images=len(source) - sum(images),
        dropped_identities=len(present) - len(kept),
        seed=seed,
    )


def _image_file(source: FaceSource, index: int) -> bytes:
    encoded = source.encoded(index)
    if encoded is not None:
        return encoded
    return cv2.imencode(".png", cv2.cvtColor(source.image(index), cv2.COLOR_RGB2BGR))[1].tobytes()


def _image_size(source: FaceSource) -> tuple[int, int]:
    """Height and width for the index: the source's own where it is packed, else the first readable image's."""
    if isinstance(source, PackedSource):
        return source.image_shape
    for index in range(len(source)):
        encoded = source.encoded(index)
        if encoded is None:
            height, width = source.image(index).shape[:2]
            return height, width
        try:
            header = read_header(encoded)
        except BrokenImage:
            continue
        return header.height, header.width
    raise LrfaceError("no image can be read; `lrface data check` lists what is wrong")
