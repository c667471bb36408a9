"""What a data set is: format, counts, sizes, encoding, colours; nothing is decoded but a sample."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lrface.data.decode import BrokenImage, ImageHeader, read_header
from lrface.data.sheet import SheetRow, draw_sheet
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError

HEADERS_AT_MOST = 20_000
"""A data set with more images than this is judged by as many, spread evenly."""

DECODED_AT_MOST = 300
"""How many images are decoded to look at colours (and at sizes, where pixels are stored)."""

ENCODINGS = {"jpeg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WebP", "tiff": "TIFF"}
HISTOGRAM_WIDTH = 40

BY_CONVENTION = {
    "bcolz": "stored as BGR by the convention of InsightFace_Pytorch (the format does not say); read as RGB",
    "memfile": "stored as BGR by the convention of AdaFace (the format does not say); read as RGB",
}
"""Colour order of formats that store bare pixels and do not say in which order."""


@dataclass
class SourceInfo:
    """What :func:`describe_source` found.

    per_identity: least, median, mean and most images of an identity that has any.
    histogram: rows [from, to, identities], images per identity in powers of two.
    sizes: rows [width, height, images], most frequent first; encodings: images of each kind ("pixels" where
        none is encoded), both over ``headers`` images, of which ``unreadable`` gave neither.
    bytes_per_image: least, mean, most; None where pixels are stored.
    colour: what the format says of colour order.
    red_over_blue: share of the coloured ones among ``decoded`` images whose middle is redder than blue, as
        skin is; None when all are grey. grey: share of images without colour.
    pairs: counts of a benchmark's pairs (pairs, same, different, folds), None for other data.
    """

    path: str
    format: str
    images: int
    identities: int
    identities_without_images: int
    per_identity: dict[str, float]
    histogram: list[list[int]]
    sizes: list[list[int]]
    encodings: dict[str, int]
    headers: int
    unreadable: int
    bytes_per_image: dict[str, float] | None
    colour: str
    decoded: int
    red_over_blue: float | None
    grey: float
    pairs: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{name:15} {text}".rstrip() for name, text in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("path", self.path), ("format", self.format), ("images", f"{self.images:,}")]
        if self.pairs is not None:
            kinds = f"{self.pairs['same']:,} same, {self.pairs['different']:,} different"
            lines.append(("pairs", f"{self.pairs['pairs']:,}: {kinds}, in {self.pairs['folds']} folds"))
        if self.identities:
            empty = self.identities_without_images
            lines.append(
                (
                    "identities",
                    f"{self.identities:,}" + (f", {empty:,} of them without an image" if empty else ""),
                )
            )
            figures = self.per_identity
            lines.append(
                (
                    "per identity",
                    f"{figures['least']:.0f} least, {figures['median']:g} median, {figures['mean']:.1f} mean, "
                    f"{figures['most']:.0f} most",
                )
            )
            most = max(count for _, _, count in self.histogram)
            for low, high, count in self.histogram:
                bar = "#" * max(1 if count else 0, round(HISTOGRAM_WIDTH * count / most))
                images = f"{low}" if low == high else f"{low}-{high}"
                lines.append(("", f"{images:>9} images: {count:>9,} {bar}"))
        else:
            lines.append(("identities", "not named by this format"))
        judged = self.headers - self.unreadable
        lines.append(("image size", _shares([(f"{w}x{h}", count) for w, h, count in self.sizes], judged)))
        lines.append(("encoding", _shares(list(self.encodings.items()), judged)))
        if self.bytes_per_image is not None:
            size = {key: f"{value / 1000:.1f}" for key, value in self.bytes_per_image.items()}
            lines.append(("kB an image", f"{size['least']} least, {size['mean']} mean, {size['most']} most"))
        if self.unreadable:
            lines.append(("unreadable", f"{self.unreadable:,} of them; `lrface data check` lists them"))
        lines.append(("colour order", self.colour))
        lines.append(("", self._colour_test()))
        everything = self.headers == self.images
        lines.append(
            (
                "judged by",
                f"{'all' if everything else f'{self.headers:,} evenly spread of the'} images' headers",
            )
        )
        return lines

    def _colour_test(self) -> str:
        if self.decoded == 0:
            return "not tested: no image can be decoded"
        grey = f"{self.grey:.0%} of {self.decoded} decoded images are grey"
        if self.red_over_blue is None:
            return f"not tested: {grey}"
        verdict = "as skin is" if self.red_over_blue >= 0.5 else "red and blue are PROBABLY SWAPPED"
        return f"tested: {self.red_over_blue:.0%} are redder than blue in the middle, {verdict}; {grey}"


def _shares(counts: list[tuple[str, int]], total: int) -> str:
    if not counts:
        return "unknown"
    if len(counts) == 1:
        return f"{counts[0][0]}, all"
    shown = ", ".join(f"{name} {count / total:.1%}" for name, count in counts[:6])
    return shown + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")


def spread(count: int, at_most: int) -> np.ndarray:
    """At most ``at_most`` different numbers of 0..count-1, evenly spread, int64, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def encoded_header(encoded: bytes) -> ImageHeader | None:
    """The header of an image file, None where there is none that can be read."""
    try:
        return read_header(encoded)
    except BrokenImage:
        return None


def describe_source(source: FaceSource, path: str, named: bool = True) -> SourceInfo:
    """Describe ``source``. ``named=False`` leaves out identities: those of a verification pack have no names.

    Headers of all images are read, or of 20,000 evenly spread; 300 are decoded to look at colours.

    Raises:
        LrfaceError: labels cannot be read.
    """
    images = len(source)
    chosen = spread(images, HEADERS_AT_MOST)
    decoded_at = set(chosen[spread(len(chosen), DECODED_AT_MOST)].tolist())
    sizes: Counter[tuple[int, int]] = Counter()
    encodings: Counter[str] = Counter()
    lengths: list[int] = []
    stored_pixels = images > 0 and _encoded(source, 0) is None
    if stored_pixels:
        chosen = spread(images, DECODED_AT_MOST)
        decoded_at = set(chosen.tolist())
    redder = grey = decoded = unreadable = 0
    for index in chosen.tolist():
        encoded = None if stored_pixels else _encoded(source, index)
        header = encoded_header(encoded) if encoded else None
        if header is not None and encoded is not None:
            encodings[ENCODINGS.get(header.format, header.format)] += 1
            sizes[(header.width, header.height)] += 1
            lengths.append(len(encoded))
        elif not stored_pixels:
            unreadable += 1
            continue
        if index not in decoded_at:
            continue
        image = readable_image(source, index)
        if image is None:
            unreadable += stored_pixels
            continue
        decoded += 1
        if stored_pixels:
            encodings["pixels"] += 1
            sizes[(image.shape[1], image.shape[0])] += 1
        height, width = image.shape[:2]
        middle = image[height // 4 : height - height // 4, width // 4 : width - width // 4]
        red, green, blue, _ = cv2.mean(middle)
        if max(red, green, blue) - min(red, green, blue) < 1.0:
            grey += 1
        else:
            redder += red > blue
    labels = source.labels
    counts = np.bincount(labels, minlength=len(source.identities)) if named else np.zeros(0, np.int64)
    present = counts[counts > 0]
    return SourceInfo(
        path=path,
        format=source.format,
        images=images,
        identities=len(counts),
        identities_without_images=int((counts == 0).sum()),
        per_identity=(
            {
                "least": int(present.min()),
                "median": float(np.median(present)),
                "mean": float(present.mean()),
                "most": int(present.max()),
            }
            if len(present)
            else {"least": 0, "median": 0.0, "mean": 0.0, "most": 0}
        ),
        histogram=_histogram(present),
        sizes=[[*size, count] for size, count in sizes.most_common()],
        encodings=dict(encodings.most_common()),
        headers=len(chosen),
        unreadable=unreadable,
        bytes_per_image=(
            {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)}
            if lengths
            else None
        ),
        colour=_colour(source.format, stored_pixels),
        decoded=decoded,
        red_over_blue=redder / (decoded - grey) if decoded > grey else None,
        grey=grey / decoded if decoded else 0.0,
    )


def _encoded(source: FaceSource, index: int) -> bytes | None:
    """The stored file; empty where it cannot be read."""
    try:
        return source.encoded(index)
    except (LrfaceError, OSError):
        return b""


def readable_image(source: FaceSource, index: int) -> np.ndarray | None:
    """Image ``index``, None where it cannot be decoded."""
    try:
        return source.image(index)
    except (LrfaceError, OSError, cv2.error):
        return None


def _colour(format_name: str, stored_pixels: bool) -> str:
    for name, statement in BY_CONVENTION.items():
        if name in format_name.lower():
            return statement
    if stored_pixels:
        return "RGB"
    return "RGB, which the image files define (JPEG, PNG, ...)"


def _histogram(counts: np.ndarray) -> list[list[int]]:
    """Rows [from, to, identities] of images per identity: 1, 2, 3-4, 5-8, 9-16, ..."""
    if not len(counts):
        return []
    bins = np.bincount(np.ceil(np.log2(counts)).astype(int))
    rows = [[2 ** (power - 1) + 1 if power else 1, 2**power, int(count)] for power, count in enumerate(bins)]
    first = next(at for at, row in enumerate(rows) if row[2])
    return rows[first:]


def draw_source(
    source: FaceSource, info: SourceInfo, out: str | Path, identities: int = 10, images: int = 10
) -> None:
    """A contact sheet of ``source`` as a PNG: a row an identity, from the one with the most images to the one
    with the fewest; the same data gives the same picture. Without named identities: images evenly spread.

    Raises:
        UsageError: ``out`` is no .png.
        LrfaceError: ``out`` cannot be written.
    """
    rows = []
    if info.identities:
        labels = source.labels
        counts = np.bincount(labels, minlength=len(source.identities))
        order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        # Ranks 1, 3, 9, ...: a few identities often hold most of the images.
        ranks = np.unique(np.geomspace(1, len(order), min(identities, len(order))).round().astype(int)) - 1
        others = np.setdiff1d(np.arange(len(order)), ranks)  # where several of them round to one
        ranks = np.sort(np.concatenate([ranks, others[: max(0, identities - len(ranks))]]))
        for label in order[ranks].tolist():
            own = np.flatnonzero(labels == label)
            shown = own[spread(len(own), images)].tolist()
            text = f"{len(own)} image{'s' if len(own) != 1 else ''}"
            if len(shown) < len(own):
                text += f", {len(shown)} shown"
            rows.append(
                SheetRow((source.identities[label], text), [[readable_image(source, i) for i in shown]])
            )
        of = f"{info.identities:,} identities, from the one with the most images to the one with the fewest"
    else:
        shown = spread(info.images, identities * images).tolist()
        for start in range(0, len(shown), images):
            part = shown[start : start + images]
            rows.append(
                SheetRow(
                    (f"images {part[0]} to {part[-1]}", f"{len(part)} shown"),
                    [[readable_image(source, i) for i in part]],
                )
            )
        of = "evenly spread"
        if info.pairs is not None:
            of += f"; {info.pairs['pairs']:,} pairs in {info.pairs['folds']} folds"
    sizes = ", ".join(f"{width}x{height}" for width, height, _ in info.sizes[:3])
    if len(info.sizes) > 3:
        sizes += ", ..."
    note = f"{info.format}: {info.images:,} images of {sizes or 'unknown size'} pixels; {of}"
    draw_sheet(out, Path(info.path).name or info.path, note, rows)
