"""Benchmarks of photographs or crops in folders: photographs are aligned once, and the result is kept.

LFW, CFP, AgeDB-30, CALFW and CPLFW as their authors give them out, and any folder with pairs; what the files of
pairs look like is in :mod:`lrface.benchmarks.protocols`.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrface.benchmarks.locate import FoundBenchmark, cache_root
from lrface.benchmarks.protocols import (
    IMAGE_SUFFIXES,
    Pairs,
    Photograph,
    is_image_name,
    is_number,
    read_protocol,
)
from lrface.benchmarks.verification import VerificationSet
from lrface.data.packed import PackedSource
from lrface.errors import LrfaceError, UsageError

CROP_SIZE = 112
MAXIMUM_UNALIGNED = 0.05
"""Where more photographs than this share lack a face, the data is wrong and no figure is given."""

GREY_CROP = np.full((CROP_SIZE, CROP_SIZE, 3), 128, dtype=np.uint8)


def _join(folder: str, file_name: str) -> str:
    return f"{folder}/{file_name}" if folder else file_name


class _Resolver:
    """Finds the file of a photograph among relative paths ``FOLDER/FILE``."""

    def __init__(self, list_folder: Callable[[str], Iterable[str]]):
        self._list = list_folder
        self._known: dict[str, dict[str, str]] = {}

    def __call__(self, photograph: Photograph) -> str | None:
        folder, token = photograph
        if folder not in self._known:
            by_name: dict[str, str] = {}
            for file_name in sorted(self._list(folder)):
                by_name[file_name] = file_name
                stem, suffix = os.path.splitext(file_name)
                if suffix.lower() in IMAGE_SUFFIXES:
                    by_name.setdefault(stem, file_name)
            self._known[folder] = by_name
        known = self._known[folder]
        name = f"{folder}_{int(token):04d}" if folder and is_number(token) else token
        found = known.get(name)
        if found is None and is_image_name(name):  # crops in another format than the photographs
            found = known.get(os.path.splitext(name)[0])
        return None if found is None else _join(folder, found)


def _files_in(root: Path) -> Callable[[str], list[str]]:
    def listing(folder: str) -> list[str]:
        # a folder of the protocol is one below the root, never a way out of it
        if folder and any(part in ("", ".", "..") or os.sep in part for part in folder.split("/")):
            return []
        try:
            return os.listdir(root / folder)
        except (OSError, ValueError):  # not there, not a folder, or no possible name
            return []

    return listing


def missing_photographs(pairs: Pairs, root: str | Path) -> list[str]:
    """What a protocol names and the folder lacks: 'NAME 4' or 'FOLDER/FILE', each once, in order."""
    return _missing(pairs, _Resolver(_files_in(Path(root))))


def _missing(pairs: Pairs, resolver: _Resolver) -> list[str]:
    named = dict.fromkeys((*pairs.left, *pairs.right))
    return [
        " ".join(photograph) if is_number(photograph[1]) else _join(*photograph)
        for photograph in named
        if resolver(photograph) is None
    ]


def _resolve(pairs: Pairs, resolver: _Resolver, pairs_file: Path, where: Path) -> tuple[list[str], list[int]]:
    """Distinct relative paths in sorted order, and for left then right of each pair the index of its path."""
    missing = _missing(pairs, resolver)
    if missing:
        raise LrfaceError(
            f"{pairs_file}: {len(missing)} photographs that it names are not in {where}, the first: "
            f"{', '.join(missing[:5])[:300]}. Photograph 'NAME 4' is expected as NAME/NAME_0004.jpg, 'FILE' as "
            "FILE or FILE.jpg (or .png, .webp, .bmp); get the whole set of images"
        )
    paths = [path for path in map(resolver, (*pairs.left, *pairs.right)) if path is not None]
    distinct = sorted(set(paths))
    position = {path: index for index, path in enumerate(distinct)}
    return distinct, [position[path] for path in paths]


def load_pairs_folder(
    found: FoundBenchmark,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    native: bool = False,
) -> VerificationSet:
    """The pairs of a folder or a packed directory as a :class:`VerificationSet` of 112x112 crops.

    Only photographs that a pair names are used. Where all of them are 112x112 pixels they are taken as
    aligned crops; with ``native``, images that are all at most that large are faces, enlarged whole; otherwise they
    are aligned, once: the packed result is kept in ``CACHE/aligned/NAME-HASH``,
    and the hash covers the photographs' names and sizes and the settings. (To align all of a set, use
    ``lrface align``, put ``pairs.txt`` beside the result, and name that folder.)

    A photograph without a face that the detector finds is cut at the median landmarks of the others, since
    benchmark photographs are centred; from packed data, which has no photographs, it is a grey crop. Both are
    counted in ``unaligned``, and their pairs count like all others.

    Raises:
        LrfaceError: broken pairs, photographs that are missing, more than 5 % of photographs without a face.
    """
    from lrface.benchmarks.faces import FileFaces, as_crop, enlarged_faces, read_faces

    if found.pairs is None:
        raise UsageError(f"benchmark {found.name}: {found.path} needs a pairs file")
    pairs = read_protocol(found.pairs)
    sizes: NDArray[np.float32] | None = None
    if found.kind == "packed":
        images, indices, unaligned, sizes = _from_packed(found, pairs)
    else:
        paths, indices = _resolve(pairs, _Resolver(_files_in(found.path)), found.pairs, found.path)
        if _all_sizes(found.path, paths, lambda size: size == (CROP_SIZE, CROP_SIZE)):
            images = read_faces(FileFaces(found.path, paths, as_crop), found.name, show_progress)
            unaligned = 0
        elif native and _all_sizes(found.path, paths, lambda size: max(size) <= CROP_SIZE):
            sizes = native_sides(found.path, paths)
            faces = enlarged_faces(found.path, paths)
            images, unaligned = read_faces(faces, found.name, show_progress), len(paths)
        else:
            images, unaligned, sizes = _align(found, paths, cache, workers, show_progress)
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
        native=sizes,
    )


def _check_share(found: FoundBenchmark, without: Sequence[str], total: int) -> None:
    if len(without) > max(1, MAXIMUM_UNALIGNED * total):
        raise LrfaceError(
            f"benchmark {found.name}: {len(without)} of {total} photographs that the pairs name have no "
            f"face in {found.path} (the first: {', '.join(list(without)[:3])}). At most "
            f"{MAXIMUM_UNALIGNED:.0%} may lack one; check that images and pairs belong together"
        )


def _native_sizes(landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Effective resolution of faces by landmarks [n, 5, 2]; not a number where these are unknown or coincide."""
    from lrface.align.warp import effective_resolution

    sizes = np.full(len(landmarks), np.nan, dtype=np.float32)
    for index, points in enumerate(landmarks):
        with suppress(ValueError):
            sizes[index] = effective_resolution(points, CROP_SIZE)
    return sizes


def _from_packed(
    found: FoundBenchmark, pairs: Pairs
) -> tuple[NDArray[np.uint8], list[int], int, NDArray[np.float32] | None]:
    source = PackedSource(found.path)
    if len(source) == 0:
        raise LrfaceError(f"{found.path}: the packed data has no images")
    first_face = np.flatnonzero(source.column("face") == 0)
    sources = source.sources()
    identities = source.column("identity")
    # a photograph's folder may be called by the identity, or by any end of its path: all of a set may have
    # been packed from further up
    row_of: dict[str, int] = {}
    by_folder: dict[str, list[str]] = {}
    for row in first_face:
        *folders, file_name = sources[row].split("/")
        ends = ["/".join(folders[start:]) for start in range(len(folders) + 1)]
        for folder in dict.fromkeys((*ends, identities[row])):
            name = _join(folder, file_name)
            if name not in row_of:
                row_of[name] = int(row)
                by_folder.setdefault(folder, []).append(file_name)
    resolver = _Resolver(lambda name: by_folder.get(name, ()))

    images: list[NDArray[np.uint8]] = []
    landmarks = source.column("landmarks")
    unknown = np.full((5, 2), np.nan, dtype=np.float32)
    places: list[NDArray[np.float32]] = []
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
                places.append(unknown)
            else:
                image = source.image(row_of[path])
                if image.shape != (CROP_SIZE, CROP_SIZE, 3):
                    raise LrfaceError(
                        f"{found.path}: crops are {image.shape[1]}x{image.shape[0]} pixels, 112x112 are "
                        "needed; align again with that size"
                    )
                images.append(image)
                places.append(landmarks[row_of[path]])
        indices.append(positions[key])
    _check_share(found, without, len(images))
    sizes = _native_sizes(np.stack(places))
    return np.stack(images), indices, len(without), None if np.isnan(sizes).all() else sizes


def native_sides(root: Path, paths: Sequence[str]) -> NDArray[np.float32]:
    """Shorter sides of image files in pixels, float32 [n]; reads headers. Raises LrfaceError naming a broken file."""
    sides = np.empty(len(paths), dtype=np.float32)
    for index, path in enumerate(paths):
        try:
            with Image.open(root / path) as header:
                sides[index] = min(header.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LrfaceError(f"{root / path}: not an image that can be read ({error})") from error
    return sides


def _all_sizes(root: Path, paths: Sequence[str], fits: Callable[[tuple[int, int]], bool]) -> bool:
    """Whether the (width, height) of all images that can be read ``fits``; reads headers, up to the first that does
    not."""
    for path in paths:
        try:
            with Image.open(root / path) as header:
                if not fits(header.size):
                    return False
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # whoever reads the pixels names it
    return True


def cache_name(name: str, root: Path, paths: Sequence[str], how: str = "") -> str:
    """A name for aligned photographs that changes with them: their folder, names, sizes, the crop, the detector's
    version, and ``how`` they were aligned where that is not the usual way."""
    from lrface.align.mtcnn import CASCADE_VERSION

    digest = hashlib.sha256(f"{CASCADE_VERSION} {CROP_SIZE} {how}{root.resolve()}\n".encode())
    for path in paths:
        digest.update(f"{path}\t{(root / path).stat().st_size}\n".encode())
    return f"{name}-{digest.hexdigest()[:16]}"


def _below_identity(path: str) -> str:
    """The aligner wants a folder for every identity; photographs that all lie in one folder get one."""
    return path if "/" in path else f"photographs/{path}"


def _link_photographs(found: FoundBenchmark, paths: Sequence[str], folder: Path) -> None:
    """A folder with links to just these photographs, which is what gets aligned; links that exist are
    kept.
    """
    root = found.path.resolve()
    try:
        for path in paths:
            link = folder / _below_identity(path)
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
) -> tuple[NDArray[np.uint8], int, NDArray[np.float32]]:
    """The aligned photographs, uint8 [n, 112, 112, 3] in the order of ``paths``; how many have no face; the native
    sizes of the faces, not a number where none was found."""
    from lrface.align.pipeline import align_folder

    folder = cache_root(cache) / "aligned"
    packed = folder / cache_name(found.name, found.path, paths)
    if not (packed / "index.json").is_file():
        links = folder / f"{packed.name}.photographs"
        _link_photographs(found, paths, links)
        align_folder(links, packed, workers=workers, show_progress=show_progress)
        shutil.rmtree(links)

    source = PackedSource(packed)
    rows = np.flatnonzero(source.column("face") == 0)
    names = source.sources()
    aligned = {names[row]: int(row) for row in rows}
    row_of = {path: aligned[name] for path in paths if (name := _below_identity(path)) in aligned}
    without = [path for path in paths if path not in row_of]
    _check_share(found, without, len(paths))
    places = _usual_landmarks(found.path, source, row_of) if without else None
    images = np.empty((len(paths), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
    landmarks = np.full((len(paths), 5, 2), np.nan, dtype=np.float32)
    found_at = source.column("landmarks")
    for index, path in enumerate(paths):
        if path in row_of:
            images[index] = source.image(row_of[path])
            landmarks[index] = found_at[row_of[path]]
        else:
            assert places is not None
            images[index] = _cut_at(found.path / path, places)
    return images, len(without), _native_sizes(landmarks)


def _usual_landmarks(root: Path, source: PackedSource, row_of: dict[str, int]) -> NDArray[np.float64]:
    """Where landmarks usually are, float64 [5, 2] in shares of width and height: medians."""
    from lrface.align.pipeline import read_photo

    landmarks, paths = source.column("landmarks"), list(row_of)
    shares = []
    for index in np.unique(np.linspace(0, len(paths) - 1, 200).round().astype(int)):
        height, width = read_photo(root / paths[index]).shape[:2]
        shares.append(landmarks[row_of[paths[index]]].astype(np.float64) / (width, height))
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
