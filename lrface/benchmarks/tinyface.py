"""TinyFace as its authors give it out: which images are gallery and probe, and who is on them.

``Testing_Set`` holds the images in ``Gallery_Match``, ``Gallery_Distractor`` and ``Probe``, and two lists of
MATLAB: ``gallery_match_img_ID_pairs.mat`` (``gallery_set``, names of files, and ``gallery_ids``) and
``probe_img_ID_pairs.mat`` (``probe_set``, ``probe_ids``). Distractors are in no list; the authors' evaluation
gives them the identity -100. ``Training_Set`` is a plain folder of identity folders, for ``lrface align`` or
training.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.locate import data_roots
from lrface.benchmarks.protocols import is_image_name
from lrface.data.matlab import read_matlab
from lrface.errors import LrfaceError

DISTRACTOR = -100
"""The identity of a distractor, as in the authors' evaluation."""

TESTING_SET = "Testing_Set"
PROBE, GALLERY_MATCH, GALLERY_DISTRACTOR = "Probe", "Gallery_Match", "Gallery_Distractor"
OFFICIAL_COUNTS = {PROBE: 3_728, GALLERY_MATCH: 4_443, GALLERY_DISTRACTOR: 153_428}
_LISTS = {
    GALLERY_MATCH: ("gallery_match_img_ID_pairs.mat", "gallery_set", "gallery_ids"),
    PROBE: ("probe_img_ID_pairs.mat", "probe_set", "probe_ids"),
}
_FOLDERS = ("tinyface", "TinyFace")


@dataclass(frozen=True)
class TinyFace:
    """The identification test of TinyFace.

    Attributes:
        images: the folder below which images are named (``Testing_Set``, or crops laid out like it).
        probe_paths: ``Probe/NAME.jpg``, in the order of the authors' list.
        probe_ids: int64 [p].
        gallery_paths: those of ``Gallery_Match`` in the order of the authors' list, then the distractors by
            name.
        gallery_ids: int64 [g]; -100 for a distractor.
        unlisted: images that are in ``Probe`` or ``Gallery_Match`` and in no list, which are left out.
    """

    images: Path
    probe_paths: list[str]
    probe_ids: NDArray[np.int64]
    gallery_paths: list[str]
    gallery_ids: NDArray[np.int64]
    unlisted: int = 0

    def counts(self) -> dict[str, int]:
        """Number of images in each of the three parts."""
        matched = int((self.gallery_ids != DISTRACTOR).sum())
        return {
            PROBE: len(self.probe_paths),
            GALLERY_MATCH: matched,
            GALLERY_DISTRACTOR: len(self.gallery_paths) - matched,
        }

    def deviations(self) -> list[str]:
        """How this set differs from the official one, in words; empty where it does not. For reports."""
        found = [
            f"{part}: {count:,} images, {OFFICIAL_COUNTS[part]:,} in the official set"
            for part, count in self.counts().items()
            if count != OFFICIAL_COUNTS[part]
        ]
        if self.unlisted:
            found.append(f"{self.unlisted:,} images of {PROBE} and {GALLERY_MATCH} are in no list")
        if self.unmatched:
            found.append(f"{self.unmatched:,} probes are of nobody in the gallery")
        return found

    @property
    def unmatched(self) -> int:
        """How many probes are of nobody in the gallery; none in the official set."""
        return int((~np.isin(self.probe_ids, self.gallery_ids)).sum())


def find_tinyface(data: str | Path | None = None) -> Path:
    """The folder of TinyFace: in ``data``, else ``$LRFACE_DATA``, else ``~/.cache/lrface``.

    Raises:
        LrfaceError: it is in none of them; the message says what to put where.
    """
    roots = data_roots(data)
    looked = []
    for _, root in roots:
        for folder in (root, *(root / name for name in _FOLDERS)):
            looked.append(folder / TESTING_SET)
            if looked[-1].is_dir():
                return folder
    target = shlex.quote(str(roots[0][1]))
    places = "\n".join(f"  {place}" for place in looked)
    raise LrfaceError(
        f"TinyFace was not found. Looked for:\n{places}\nGet it from its authors (QMUL-TinyFace of Queen Mary "
        "University of London), unpack it, and let a script of lrface's repository check it and put it there:\n"
        f"  python data_prep/tinyface.py UNPACKED {target}"
    )


def read_tinyface(folder: str | Path, images: str | Path | None = None) -> TinyFace:
    """Read TinyFace's lists and find the images that they name.

    Args:
        folder: the one that holds ``Testing_Set``, or that one itself.
        images: aligned crops laid out like ``Testing_Set`` (Gallery_Match, Gallery_Distractor, Probe); they
            may be of another format than the photographs.

    Raises:
        LrfaceError: a list or a folder is missing or broken, or images that a list names are not there. Other
            numbers than the official ones are no error: see :meth:`TinyFace.deviations`.
    """
    root = Path(folder)
    testing = root / TESTING_SET if (root / TESTING_SET).is_dir() else root
    place = Path(images) if images is not None else testing
    paths: dict[str, list[str]] = {}
    identities: dict[str, NDArray[np.int64]] = {}
    unlisted = 0
    for part, (name, set_name, ids_name) in _LISTS.items():
        file = testing / name
        variables = read_matlab(file)
        names = _names(file, set_name, variables.get(set_name))
        identities[part] = _identities(file, ids_name, variables.get(ids_name), len(names))
        there = _images(place / part)
        paths[part] = [f"{part}/{there[stem]}" for stem in names if stem in there]
        missing = [stem for stem in names if stem not in there]
        if missing:
            raise LrfaceError(
                f"{file}: {len(missing)} images that it names are not in {place / part}, the first: "
                f"{', '.join(missing[:5])[:300]}"
            )
        unlisted += len(there.keys() - set(names))
    distractors = [
        f"{GALLERY_DISTRACTOR}/{file}" for file in sorted(_images(place / GALLERY_DISTRACTOR).values())
    ]
    return TinyFace(
        images=place,
        probe_paths=paths[PROBE],
        probe_ids=identities[PROBE],
        gallery_paths=paths[GALLERY_MATCH] + distractors,
        gallery_ids=np.concatenate((identities[GALLERY_MATCH], np.full(len(distractors), DISTRACTOR))),
        unlisted=unlisted,
    )


def _images(folder: Path) -> dict[str, str]:
    """Files of a folder by their names without suffix."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_image_name(entry.name))
    except OSError as error:
        raise LrfaceError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return {os.path.splitext(name)[0]: name for name in names}


def _names(file: Path, variable: str, value: Any) -> list[str]:
    cells = value.flatten(order="F") if isinstance(value, np.ndarray) and value.dtype == object else ()
    names = [name.strip() if isinstance(name, str) else "" for name in cells]
    for index, name in enumerate(names):
        if not is_image_name(name) or "/" in name or "\\" in name or "\0" in name:
            raise LrfaceError(
                f"{file}: entry {index + 1} of '{variable}' is no name of an image: {name[:100]!r}"
            )
    if not names:
        raise LrfaceError(f"{file}: '{variable}' with names of images is expected")
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) != len(stems):
        raise LrfaceError(f"{file}: '{variable}' names {len(stems) - len(set(stems))} images twice")
    return stems


def _identities(file: Path, variable: str, value: Any, expected: int) -> NDArray[np.int64]:
    if not isinstance(value, np.ndarray) or value.dtype == object or value.size != expected:
        found = f"{value.size} entries" if isinstance(value, np.ndarray) else "nothing"
        raise LrfaceError(f"{file}: '{variable}' with {expected} identities is expected, found {found}")
    numbers = value.flatten(order="F")
    if (
        not np.isfinite(numbers).all()
        or (numbers < 0).any()
        or (numbers > 2**53).any()
        or (numbers % 1).any()
    ):
        raise LrfaceError(f"{file}: '{variable}' holds numbers that are no identities")
    return numbers.astype(np.int64)
