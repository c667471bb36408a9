"""IJB-B and IJB-C as InsightFace gives them out: templates of photographs and video frames.

Layout, confirmed in several public evaluations that read it (InsightFace's recognition/_evaluation_/ijb, CVLface, and
re-implementations): ``IJBC/loose_crop/1.jpg ...`` and ``IJBC/meta`` with

- ``ijbc_face_tid_mid.txt``: ``1.jpg 1 69544`` (image, template, media), one line an image;
- ``ijbc_name_5pts_score.txt``: ``1.jpg 46.060 62.026 87.785 60.323 68.851 77.656 52.162 99.875 86.450 98.648 0.999``
  (image, x and y of five points in the loose crop, the detector's score), the same images in the same order;
- ``ijbc_template_pair_label.txt``: ``1 11065 1`` (template, template, 1 for one person);
- 1:N: ``ijbc_1N_gallery_G1.csv``, ``ijbc_1N_gallery_G2.csv``, ``ijbc_1N_probe_mixed.csv`` of the IJB protocol, a line
  of names and then TEMPLATE_ID, SUBJECT_ID and more a line. IJB-B's galleries are called S1 and S2.

Official counts (stated by those evaluations' outputs and the papers): IJB-B 227,630 images, 12,115 templates, 8,010,270
pairs; IJB-C 469,375 images, 23,124 templates, 15,658,489 pairs.

Templates are pooled in two steps, as is standard (Whitelam et al., IJB-B, CVPRW 2017; Crosswhite et al., FG 2017): the
mean of the features of one media, so that a long video counts as much as a photograph; then the sum over media, scaled
to unit length. A face may weigh by the length of its feature (features as they are, or unit vectors) and by the
detector's score; InsightFace's N1D1F1 is both, with flip fusion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.faces import CROP_SIZE, Faces, FileFaces
from lrface.benchmarks.locate import data_roots
from lrface.benchmarks.metrics import FALSE_ACCEPT_RATES, rate_name
from lrface.errors import LrfaceError

SETS = {"ijbb": "IJBB", "ijbc": "IJBC"}
OFFICIAL_COUNTS = {
    "ijbb": {"images": 227_630, "templates": 12_115, "pairs": 8_010_270},
    "ijbc": {"images": 469_375, "templates": 23_124, "pairs": 15_658_489},
}
GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
PAIR_CHUNK = 100_000

WEIGHTINGS = (
    ("feature length x detector score (InsightFace N1D1F1)", True, True),
    ("feature length", True, False),
    ("detector score", False, True),
    ("mean", False, False),
)
"""Name of a row, whether features keep their length, whether the detector's score weighs them."""


@dataclass(frozen=True)
class TemplateSet:
    """Images of templates. ``templates`` and ``media`` int64 [n], ``landmarks`` float64 [n, 5, 2] in pixels of the
    loose crop, ``scores`` float64 [n]."""

    name: str
    meta: Path
    images: Path
    paths: list[str]
    templates: NDArray[np.int64]
    media: NDArray[np.int64]
    landmarks: NDArray[np.float64]
    scores: NDArray[np.float64]

    def faces(self) -> Faces:
        """The images aligned by their five points; where the points are unusable, the middle of the image."""
        from lrface.align.warp import central_landmarks, warp_face

        centred = self.landmarks - self.landmarks.mean(axis=1, keepdims=True)
        usable = np.isfinite(self.landmarks).all(axis=(1, 2)) & (np.square(centred).sum(axis=(1, 2)) > 1e-3)

        def make(index: int, photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
            points = self.landmarks[index] if usable[index] else central_landmarks(*photo.shape[:2])
            return warp_face(photo, points, size=CROP_SIZE)

        return FileFaces(self.images, self.paths, make, usable, self.scores)

    def deviations(self, pairs: int | None = None) -> list[str]:
        """How this set differs from the official one, in words."""
        official = OFFICIAL_COUNTS[self.name]
        counts = {"images": len(self.paths), "templates": len(np.unique(self.templates))}
        if pairs is not None:
            counts["pairs"] = pairs
        return [
            f"{count:,} {what}, {official[what]:,} in the official set"
            for what, count in counts.items()
            if count != official[what]
        ]


@dataclass(frozen=True)
class Enrolment:
    """Templates with their subjects: both int64 [t], each template once."""

    name: str
    templates: NDArray[np.int64]
    subjects: NDArray[np.int64]


def _columns(file: Path, kinds: Sequence[str], header: bool = False, delimiter: str = " ") -> list[Any]:
    """The first columns of a text table as arrays (Arrow's reader: 15 million lines in seconds).

    Raises:
        LrfaceError: the file is missing, has fewer columns, or something else than these types in them.
    """
    import pyarrow as pa
    from pyarrow import csv

    types = {"int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            first = opened.readline().rstrip("\r\n")
    except OSError as error:
        raise LrfaceError(f"{file}: cannot be read: {error.strerror or error}") from error
    found = len(first.split(delimiter))
    if found < len(kinds) or (found > len(kinds) and not header):
        raise LrfaceError(f"{file}, line 1: {len(kinds)} fields are expected, found {found}: {first[:120]!r}")
    names = [f"c{number}" for number in range(found)]
    try:
        table = csv.read_csv(
            file,
            read_options=csv.ReadOptions(column_names=names, skip_rows=1 if header else 0),
            parse_options=csv.ParseOptions(delimiter=delimiter),
            convert_options=csv.ConvertOptions(
                column_types={name: types[kind] for name, kind in zip(names, kinds, strict=False)},
                include_columns=names[: len(kinds)],
                null_values=[],
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise LrfaceError(f"{file}: {str(error).splitlines()[0][:300]}") from error
    if not table.num_rows:
        raise LrfaceError(f"{file}: it has no entries")
    return [
        column.to_pylist() if kind == "text" else column.to_numpy()
        for column, kind in zip(table.columns, kinds, strict=True)
    ]


def find_ijb(name: str, data: str | Path | None = None) -> Path:
    """The folder with ``meta`` and ``loose_crop`` of "ijbb" or "ijbc".

    Raises:
        LrfaceError: it is nowhere; the message says where it was looked for and how it should be laid out.
    """
    title = SETS[name]
    looked = []
    for _, root in data_roots(data):
        for folder in (root, root / title, root / name, root / "ijb" / title):
            looked.append(folder)
            if (folder / "meta" / f"{name}_face_tid_mid.txt").is_file():
                return folder
    places = "\n".join(f"  {folder}/meta/{name}_face_tid_mid.txt" for folder in looked)
    raise LrfaceError(
        f"{title} was not found. Looked for:\n{places}\nGet it from InsightFace's evaluation archive (its IJB page "
        f"lists it; images are given out by NIST) and unpack it so that {title}/meta and {title}/loose_crop are there"
    )


def read_ijb(folder: str | Path, name: str) -> TemplateSet:
    """Read which images make which templates, and their five points.

    Raises:
        LrfaceError: a file is missing or broken, the two lists disagree, or images are not there.
    """
    root = Path(folder)
    meta, images = root / "meta", root / "loose_crop"
    list_file, points_file = meta / f"{name}_face_tid_mid.txt", meta / f"{name}_name_5pts_score.txt"
    names, templates, media = _columns(list_file, ["text", "int", "int"])
    names_again, *numbers = _columns(points_file, ["text"] + ["float"] * 11)
    if names != names_again:
        different = [
            index for index, pair in enumerate(zip(names, names_again, strict=False)) if pair[0] != pair[1]
        ]
        where = (different or [min(len(names), len(names_again))])[0] + 1
        raise LrfaceError(
            f"{points_file}, line {where}: it should name the same images in the same order as {list_file.name} "
            f"({len(names)} and {len(names_again)} images)"
        )
    bad = next((text for text in names if "/" in text or "\\" in text or text in ("", ".", "..")), None)
    if bad is not None:
        raise LrfaceError(f"{list_file}: {bad[:100]!r} is no name of an image")
    try:
        there = {entry.name for entry in images.iterdir()}
    except OSError as error:
        raise LrfaceError(f"{images}: cannot be listed: {error.strerror or error}") from error
    missing = [text for text in names if text not in there]
    if missing:
        raise LrfaceError(
            f"{list_file}: {len(missing)} images that it names are not in {images}, the first: "
            f"{', '.join(missing[:5])[:300]}"
        )
    points = np.stack(numbers[:10], axis=1).reshape(-1, 5, 2)
    scores = np.asarray(numbers[10], dtype=np.float64)
    if not np.isfinite(scores).all() or (scores < 0).any():
        line = int(np.argmin(np.isfinite(scores) & (scores >= 0))) + 1
        raise LrfaceError(f"{points_file}, line {line}: the detector's score is {scores[line - 1]}")
    return TemplateSet(name, meta, images, names, templates, media, points, scores)


def read_pairs(found: TemplateSet) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The pairs of templates of the 1:1 protocol: left, right int64 [p] (template numbers) and same bool [p]."""
    file = found.meta / f"{found.name}_template_pair_label.txt"
    left, right, label = _columns(file, ["int", "int", "int"])
    if not np.isin(label, (0, 1)).all():
        line = int(np.argmin(np.isin(label, (0, 1)))) + 1
        raise LrfaceError(f"{file}, line {line}: the label is {label[line - 1]}; 0 or 1 is expected")
    return left, right, label == 1


def read_enrolment(found: TemplateSet, which: str) -> Enrolment:
    """Templates of ``gallery_G1``, ``gallery_G2`` (IJB-B: S1, S2) or ``probe_mixed`` with their subjects.

    Raises:
        LrfaceError: the file is missing or broken, or a template has two subjects.
    """
    file = found.meta / f"{found.name}_1N_{which}.csv"
    templates, subjects = _columns(file, ["int", "int"], header=True, delimiter=",")
    numbers, first, inverse = np.unique(templates, return_index=True, return_inverse=True)
    if (subjects[first][inverse] != subjects).any():
        row = int(np.argmax(subjects[first][inverse] != subjects))
        raise LrfaceError(f"{file}, line {row + 2}: template {templates[row]} has two subjects")
    return Enrolment(which, numbers, subjects[first])


def pool_media(
    features: NDArray[np.float32],
    templates: NDArray[np.int64],
    media: NDArray[np.int64],
    keep_length: bool = True,
    weights: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors float32 [t, d] of templates and their numbers int64 [t], sorted.

    Each feature float [n, d] (scaled to unit length unless ``keep_length``) is multiplied by its weight; features of
    one media of a template are averaged, the averages added up and scaled to unit length.

    Raises:
        LrfaceError: a feature is zero where its direction is needed, or a template's features add up to zero.
    """
    order = np.lexsort((media, templates))
    sorted_templates, sorted_media = templates[order], media[order]
    new_template = np.append(True, np.diff(sorted_templates) != 0)
    new_media = new_template | np.append(True, np.diff(sorted_media) != 0)
    media_of = np.cumsum(new_media) - 1
    share = 1.0 / np.bincount(media_of)[media_of]
    if weights is not None:
        share = share * weights[order]
    starts = np.append(np.flatnonzero(new_template), len(order))
    pooled = np.empty((len(starts) - 1, features.shape[1]), dtype=np.float32)
    numbers = sorted_templates[starts[:-1]]
    for row, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        rows = order[start:stop]
        vectors = features[rows].astype(np.float64)
        if not keep_length:
            lengths = np.linalg.norm(vectors, axis=1)
            if not lengths.all():
                raise LrfaceError(
                    f"the feature of image {int(rows[np.argmin(lengths)])} is zero and has no direction"
                )
            vectors /= lengths[:, None]
        total = share[start:stop] @ vectors
        length = float(np.linalg.norm(total))
        if length == 0:
            raise LrfaceError(f"template {numbers[row]}: its faces add up to zero")
        pooled[row] = total / length
    return pooled, numbers


def template_rows(numbers: NDArray[np.int64], wanted: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """Where the templates ``wanted`` stand among the sorted ``numbers``: int64. Raises LrfaceError for one without
    images."""
    rows = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    without = numbers[rows] != wanted
    if without.any():
        raise LrfaceError(
            f"{where}: {len(np.unique(wanted[without]))} templates have no images, the first: "
            f"{', '.join(map(str, np.unique(wanted[without])[:5]))}"
        )
    return np.asarray(rows, dtype=np.int64)


def pair_scores(
    pooled: NDArray[np.float32], left: NDArray[np.int64], right: NDArray[np.int64], chunk: int = PAIR_CHUNK
) -> NDArray[np.float64]:
    """Cosines float64 [p] of rows of unit vectors, in chunks: only the scores are ever held for all pairs."""
    scores = np.empty(len(left))
    for start in range(0, len(left), chunk):
        part = slice(start, start + chunk)
        scores[part] = np.einsum("pd,pd->p", pooled[left[part]], pooled[right[part]], dtype=np.float64)
    return scores


def accept_rates(
    scores: NDArray[np.float64], same: NDArray[np.bool_], rates: Sequence[float] = FALSE_ACCEPT_RATES
) -> dict[str, float | None]:
    """TAR at each FAR, as :func:`lrface.benchmarks.metrics.true_accept_rate` defines it, with one sort for all; None
    where the pairs are too few."""
    strangers = np.sort(scores[~same])[::-1]
    mates = scores[same]
    found: dict[str, float | None] = {}
    for rate in rates:
        allowed = int(np.floor(rate * len(strangers) + 1e-9))
        found[rate_name(rate)] = (
            float(np.mean(mates > strangers[allowed])) if allowed >= 1 and len(mates) else None
        )
    return found
