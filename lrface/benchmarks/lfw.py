"""LFW, and any folder with pairs in LFW's format: photographs are aligned once, and the result is kept.

The format of ``pairs.txt`` is that of LFW's View 2. The first line is ``folds <tab> pairs``: so many folds of
so many same and as many different pairs, one fold after the other (a single number, or no such line, means
that the file names no folds). A line of three fields is a same pair, ``NAME 1 4``: the photographs
``NAME/NAME_0001.jpg`` and ``NAME/NAME_0004.jpg``. A line of four fields is a different pair, ``NAME 1 OTHER
3``. In place of a number the name of a file in the identity's folder may stand.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrface.benchmarks.locate import FoundBenchmark, cache_root
from lrface.benchmarks.metrics import stratified_folds
from lrface.benchmarks.verification import VerificationSet
from lrface.data.packed import PackedSource
from lrface.errors import LrfaceError, UsageError
from lrface.progress import progress

CROP_SIZE = 112
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAXIMUM_UNALIGNED = 0.05
"""Where more photographs than this share lack a face, the data is wrong and no figure is given."""

CACHE_VERSION = 1
"""Raised when alignment changes, so that photographs aligned before are not taken for new ones."""

GREY_CROP = np.full((CROP_SIZE, CROP_SIZE, 3), 128, dtype=np.uint8)

Photograph = tuple[str, str]
"""Identity and number or file name, as a pairs file names a photograph."""


@dataclass(frozen=True)
class Pairs:
    """A pairs file: two photographs a pair, bool [p] ``same`` and int64 [p] ``folds``."""

    left: list[Photograph]
    right: list[Photograph]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]


def read_pairs(path: str | Path) -> Pairs:
    """Read a pairs file in LFW's format (see the text of this module).

    Raises:
        LrfaceError: the file is missing, empty or no text, a line has neither three nor four fields, or there
            are not as many lines as the first one says. The message has the line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LrfaceError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LrfaceError(
            f"{file}: not a text file in UTF-8 ({error.reason}); a pairs file is expected"
        ) from error
    rows = [
        (number, line.rstrip().split("\t") if "\t" in line else line.split())
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise LrfaceError(f"{file}: the file is empty; pairs in LFW's format are expected")

    declared: list[int] | None = None
    number, fields = rows[0]
    if len(fields) <= 2:
        if not all(field.strip().isdigit() and int(field) > 0 for field in fields):
            raise LrfaceError(
                f"{file}, line {number}: the first line is 'folds <tab> pairs', for example '10\\t300'; "
                f"found {fields}"
            )
        declared = [int(field) for field in fields]
        rows = rows[1:]

    left: list[Photograph] = []
    right: list[Photograph] = []
    same: list[bool] = []
    for number, fields in rows:
        fields = [field.strip() for field in fields]
        if len(fields) not in (3, 4) or not all(fields):
            raise LrfaceError(
                f"{file}, line {number}: a pair is 'NAME 1 4' (same) or 'NAME 1 OTHER 3' (different), "
                f"three or four fields between tabs; found {len(fields)}: {' | '.join(fields)[:120]}"
            )
        left.append((fields[0], fields[1]))
        right.append((fields[-2] if len(fields) == 4 else fields[0], fields[-1]))
        same.append(len(fields) == 3)
    labels = np.array(same, dtype=bool)

    if declared is not None and len(declared) == 2:
        fold_count, kind = declared
        expected = 2 * fold_count * kind
        if len(labels) != expected:
            raise LrfaceError(
                f"{file}: line 1 announces {fold_count} folds of {kind} same and {kind} different pairs, "
                f"{expected} in all; {len(labels)} found. The file is cut short or not the official one"
            )
        folds = np.repeat(np.arange(fold_count, dtype=np.int64), 2 * kind)
        for fold in range(fold_count):
            positives = int(labels[folds == fold].sum())
            if positives != kind:
                raise LrfaceError(
                    f"{file}: fold {fold + 1} has {positives} same and {2 * kind - positives} different "
                    f"pairs; line 1 announces {kind} of each"
                )
        if fold_count == 1:
            folds = stratified_folds(labels)
    else:
        if declared is not None and len(labels) != 2 * declared[0]:
            raise LrfaceError(
                f"{file}: line 1 announces {declared[0]} same and as many different pairs; {len(labels)} "
                "pairs found"
            )
        folds = stratified_folds(labels)
    if len(labels) < 2:
        raise LrfaceError(f"{file}: {len(labels)} pairs; at least two are needed to choose a threshold")
    return Pairs(left, right, labels, folds)


class _Resolver:
    """Finds the file of a photograph among relative paths ``NAME/FILE``."""

    def __init__(self, list_identity: Callable[[str], Sequence[str]]):
        self._list = list_identity
        self._known: dict[str, dict[str, str]] = {}

    def __call__(self, photograph: Photograph) -> str | None:
        identity, token = photograph
        if identity not in self._known:
            by_name: dict[str, str] = {}
            for file_name in sorted(self._list(identity)):
                by_name[file_name] = file_name
                stem, suffix = os.path.splitext(file_name)
                if suffix.lower() in IMAGE_SUFFIXES:
                    by_name.setdefault(stem, file_name)
            self._known[identity] = by_name
        name = f"{identity}_{int(token):04d}" if token.isdigit() else token
        found = self._known[identity].get(name)
        return None if found is None else f"{identity}/{found}"


def _files_in(root: Path) -> Callable[[str], list[str]]:
    def listing(identity: str) -> list[str]:
        # an identity is one folder below the root, never a way out of it
        if identity in (".", "..") or "/" in identity or os.sep in identity or not (root / identity).is_dir():
            return []
        return os.listdir(root / identity)

    return listing


def _resolve(pairs: Pairs, resolver: _Resolver, pairs_file: Path, where: Path) -> tuple[list[str], list[int]]:
    """Distinct relative paths in sorted order, and for left then right of each pair the index of its path."""
    paths: list[str] = []
    missing: list[str] = []
    for photograph in (*pairs.left, *pairs.right):
        path = resolver(photograph)
        if path is None:
            missing.append(" ".join(photograph))
        else:
            paths.append(path)
    if missing:
        names = ", ".join(list(dict.fromkeys(missing))[:5])
        raise LrfaceError(
            f"{pairs_file}: {len(set(missing))} photographs that it names are not in {where}, the first: "
            f"{names}. Photograph 'NAME 4' is expected as NAME/NAME_0004.jpg (or .png, .webp, .bmp); get "
            "the whole set of images"
        )
    distinct = sorted(set(paths))
    position = {path: index for index, path in enumerate(distinct)}
    return distinct, [position[path] for path in paths]


def load_pairs_folder(
    found: FoundBenchmark,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
) -> VerificationSet:
    """The pairs of a folder or a packed directory as a :class:`VerificationSet` of 112x112 crops.

    Only photographs that a pair names are used. Where all of them are 112x112 pixels they are taken as
    aligned crops; otherwise they are aligned, once: the packed result is kept in ``CACHE/aligned/NAME-HASH``,
    and the hash covers the photographs' names and sizes and the settings. (To align all of a set, use
    ``lrface align``, put ``pairs.txt`` beside the result, and name that folder.)

    A photograph without a face that the detector finds is cut at the median landmarks of the others, since
    benchmark photographs are centred; from packed data, which has no photographs, it is a grey crop. Both are
    counted in ``unaligned``, and their pairs count like all others.

    Raises:
        LrfaceError: broken pairs, photographs that are missing, more than 5 % of photographs without a face.
    """
    if found.pairs is None:
        raise UsageError(f"benchmark {found.name}: {found.path} needs a pairs file")
    pairs = read_pairs(found.pairs)
    if found.kind == "packed":
        images, indices, unaligned = _from_packed(found, pairs)
    else:
        paths, indices = _resolve(pairs, _Resolver(_files_in(found.path)), found.pairs, found.path)
        if _are_crops(found.path, paths):
            images, unaligned = _read_crops(found, paths, show_progress), 0
        else:
            images, unaligned = _align(found, paths, cache, workers, show_progress)
    count = len(pairs.same)
    return VerificationSet(
        name=found.name,
        images=images,
        left=np.array(indices[:count], dtype=np.int64),
        right=np.array(indices[count:], dtype=np.int64),
        same=pairs.same,
        folds=pairs.folds,
        unaligned=unaligned,
        origin=str(found.path),
    )


def _check_share(found: FoundBenchmark, without: Sequence[str], total: int) -> None:
    if len(without) > max(1, MAXIMUM_UNALIGNED * total):
        raise LrfaceError(
            f"benchmark {found.name}: {len(without)} of {total} photographs that the pairs name have no "
            f"face in {found.path} (the first: {', '.join(list(without)[:3])}). At most "
            f"{MAXIMUM_UNALIGNED:.0%} may lack one; check that images and pairs belong together"
        )


def _from_packed(found: FoundBenchmark, pairs: Pairs) -> tuple[NDArray[np.uint8], list[int], int]:
    source = PackedSource(found.path)
    if len(source) == 0:
        raise LrfaceError(f"{found.path}: the packed data has no images")
    first_face = np.flatnonzero(source.column("face") == 0)
    sources = source.sources()
    identities = source.column("identity")
    # NAME/FILE, with NAME the identity, or the folder of the file where all of it was packed from further up
    row_of: dict[str, int] = {}
    for row in first_face:
        folders, _, file_name = sources[row].rpartition("/")
        for name in (identities[row], folders.rpartition("/")[2]):
            row_of.setdefault(f"{name}/{file_name}", int(row))
    by_identity: dict[str, list[str]] = {}
    for known in row_of:
        identity, _, file_name = known.rpartition("/")
        by_identity.setdefault(identity, []).append(file_name)
    resolver = _Resolver(lambda name: by_identity.get(name, ()))

    images: list[NDArray[np.uint8]] = []
    positions: dict[str, int] = {}
    indices: list[int] = []
    without: list[str] = []
    for photograph in (*pairs.left, *pairs.right):
        path = resolver(photograph)
        key = " ".join(photograph) if path is None else path
        if key not in positions:
            positions[key] = len(images)
            if path is None:
                without.append(key)
                images.append(GREY_CROP)
            else:
                image = source.image(row_of[path])
                if image.shape != (CROP_SIZE, CROP_SIZE, 3):
                    raise LrfaceError(
                        f"{found.path}: crops are {image.shape[1]}x{image.shape[0]} pixels, 112x112 are "
                        "needed; align again with that size"
                    )
                images.append(image)
        indices.append(positions[key])
    _check_share(found, without, len(images))
    return np.stack(images), indices, len(without)


def _are_crops(root: Path, paths: Sequence[str]) -> bool:
    """Whether all images are 112x112 pixels; reads headers, up to the first that says otherwise."""
    for path in paths:
        try:
            with Image.open(root / path) as header:
                if header.size != (CROP_SIZE, CROP_SIZE):
                    return False
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False  # the aligner lists what it cannot read, with the reason
    return True


def _read_crops(found: FoundBenchmark, paths: Sequence[str], show_progress: bool) -> NDArray[np.uint8]:
    from lrface.align.pipeline import read_photo

    images = np.empty((len(paths), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
    with progress(len(paths), f"read {found.name}", enabled=show_progress) as bar:
        for index, path in enumerate(paths):
            images[index] = read_photo(found.path / path)
            bar.advance()
    return images


def _cache_name(found: FoundBenchmark, paths: Sequence[str]) -> str:
    """A name for the aligned photographs that changes with them: their folder, names, sizes, and the crop."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {CROP_SIZE} {found.path.resolve()}\n".encode())
    for path in paths:
        digest.update(f"{path}\t{(found.path / path).stat().st_size}\n".encode())
    return f"{found.name}-{digest.hexdigest()[:16]}"


def _link_photographs(found: FoundBenchmark, paths: Sequence[str], folder: Path) -> None:
    """A folder with links to just these photographs, which is what gets aligned; links that exist are
    kept.
    """
    root = found.path.resolve()
    try:
        for path in paths:
            link = folder / path
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(root / path)
    except OSError as error:
        raise LrfaceError(
            f"{folder}: cannot be written: {error.strerror or error}. Aligned photographs are kept there; "
            "set $LRFACE_CACHE to a folder with room"
        ) from error


def _align(
    found: FoundBenchmark,
    paths: Sequence[str],
    cache: str | Path | None,
    workers: int | None,
    show_progress: bool,
) -> tuple[NDArray[np.uint8], int]:
    """The aligned photographs, uint8 [n, 112, 112, 3] in the order of ``paths``; how many have no face."""
    from lrface.align.pipeline import align_folder

    folder = cache_root(cache) / "aligned"
    packed = folder / _cache_name(found, paths)
    if not (packed / "index.json").is_file():
        links = folder / f"{packed.name}.photographs"
        _link_photographs(found, paths, links)
        align_folder(links, packed, workers=workers, show_progress=show_progress)
        shutil.rmtree(links)

    source = PackedSource(packed)
    rows = np.flatnonzero(source.column("face") == 0)
    names = source.sources()
    row_of = {names[row]: int(row) for row in rows}
    without = [path for path in paths if path not in row_of]
    _check_share(found, without, len(paths))
    places = _usual_landmarks(found.path, source, rows) if without else None
    images = np.empty((len(paths), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
    for index, path in enumerate(paths):
        if path in row_of:
            images[index] = source.image(row_of[path])
        else:
            assert places is not None
            images[index] = _cut_at(found.path / path, places)
    return images, len(without)


def _usual_landmarks(root: Path, source: PackedSource, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where landmarks usually are, float64 [5, 2] in shares of width and height: medians."""
    from lrface.align.pipeline import read_photo

    landmarks, names = source.column("landmarks"), source.sources()
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, 200).round().astype(int))]
    shares = []
    for row in chosen:
        height, width = read_photo(root / names[row]).shape[:2]
        shares.append(landmarks[row].astype(np.float64) / (width, height))
    return np.asarray(np.median(shares, axis=0))


def _cut_at(path: Path, places: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The crop of a photograph without a detected face at the usual place; grey where it cannot be read."""
    from lrface.align.pipeline import UnreadableImage, read_photo
    from lrface.align.warp import warp_face

    try:
        photo = read_photo(path)
    except UnreadableImage:
        return GREY_CROP.copy()
    return warp_face(photo, places * (photo.shape[1], photo.shape[0]), size=CROP_SIZE)
