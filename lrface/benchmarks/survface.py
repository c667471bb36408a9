"""QMUL-SurvFace as its authors give it out: faces of surveillance cameras, about 24 x 20 pixels, not aligned.

Layout, confirmed in public evaluations that read it (bob.bio.face's SurvFace database for the verification lists, and
several readers of the identification lists):

- ``Face_Verification_Test_Set``: ``verification_images/*.jpg``, ``positive_pairs_names.mat`` and
  ``negative_pairs_names.mat``, each with a cell array [p, 2] of names under the name of the file;
- ``Face_Identification_Test_Set``: ``gallery``, ``mated_probe`` and ``unmated_probe`` with images, and
  ``gallery_img_ID_pairs.mat`` (``gallery_set``, ``gallery_ids``) and ``mated_probe_img_ID_pairs.mat``
  (``mated_probe_set``, ``mated_probe_ids``); some copies have the two lists in ``Face_Identification_Evaluation``.
  Unmated probes are in no list: they are of nobody in the gallery.

Crops are enlarged whole to the network's input: at this size no detector finds landmarks worth aligning by. They all
count as unaligned. The authors' figure (Cheng, Zhu and Gong, Surveillance Face Recognition Challenge, 2018) is
TPIR20@FPIR: the share of mated probes whose mate is among the 20 best and reaches the threshold at which that share of
the unmated probes has a candidate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.faces import enlarged_faces, read_faces
from lrface.benchmarks.lfw import native_sides
from lrface.benchmarks.locate import data_roots
from lrface.benchmarks.metrics import stratified_folds
from lrface.benchmarks.tinyface import _identities, _images, _names
from lrface.benchmarks.verification import VerificationSet
from lrface.data.matlab import read_matlab
from lrface.errors import LrfaceError

VERIFICATION, IDENTIFICATION = "Face_Verification_Test_Set", "Face_Identification_Test_Set"
OFFICIAL_COUNTS = {"gallery": 60_294, "mated_probe": 60_423, "unmated_probe": 121_736}
_FOLDERS = ("QMUL-SurvFace", "survface", "SurvFace")
UNMATED = -1


@dataclass(frozen=True)
class SurvFace:
    """The identification test: paths below ``images``, int64 identities; -1 for probes of nobody in the gallery."""

    images: Path
    gallery_paths: list[str]
    gallery_ids: NDArray[np.int64]
    probe_paths: list[str]
    probe_ids: NDArray[np.int64]

    def deviations(self) -> list[str]:
        """How this set differs from the official one, in words."""
        unmated = int((self.probe_ids == UNMATED).sum())
        counts = {
            "gallery": len(self.gallery_paths),
            "mated_probe": len(self.probe_paths) - unmated,
            "unmated_probe": unmated,
        }
        return [
            f"{part}: {count:,} images, {OFFICIAL_COUNTS[part]:,} in the official set"
            for part, count in counts.items()
            if count != OFFICIAL_COUNTS[part]
        ]


def find_survface(part: str, data: str | Path | None = None) -> Path:
    """The folder of one test of QMUL-SurvFace.

    Raises:
        LrfaceError: it is nowhere; the message says where it was looked for.
    """
    looked = []
    for _, root in data_roots(data):
        for folder in (root, *(root / name for name in _FOLDERS), *(root / name / name for name in _FOLDERS)):
            looked.append(folder / part)
            if looked[-1].is_dir():
                return looked[-1]
    places = "\n".join(f"  {place}" for place in looked)
    raise LrfaceError(
        f"QMUL-SurvFace was not found. Looked for:\n{places}\nGet it from its authors (QMUL-SurvFace of Queen Mary "
        "University of London) and unpack it there"
    )


def read_survface(folder: str | Path) -> SurvFace:
    """Read the identification test from ``Face_Identification_Test_Set``.

    Raises:
        LrfaceError: a list or a folder is missing or broken, or images that a list names are not there.
    """
    root = Path(folder)
    paths: dict[str, list[str]] = {}
    identities: dict[str, NDArray[np.int64]] = {}
    for part in ("gallery", "mated_probe"):
        name = f"{part}_img_ID_pairs.mat"
        places = (root / name, root.parent / "Face_Identification_Evaluation" / name)
        file = next((place for place in places if place.is_file()), places[0])
        variables = read_matlab(file)
        stems = _names(file, f"{part}_set", variables.get(f"{part}_set"))
        identities[part] = _identities(file, f"{part}_ids", variables.get(f"{part}_ids"), len(stems))
        there = _images(root / part)
        missing = [stem for stem in stems if stem not in there]
        if missing:
            raise LrfaceError(
                f"{file}: {len(missing)} images that it names are not in {root / part}, the first: "
                f"{', '.join(missing[:5])[:300]}"
            )
        paths[part] = [f"{part}/{there[stem]}" for stem in stems]
    unmated = [f"unmated_probe/{name}" for name in sorted(_images(root / "unmated_probe").values())]
    return SurvFace(
        images=root,
        gallery_paths=paths["gallery"],
        gallery_ids=identities["gallery"],
        probe_paths=paths["mated_probe"] + unmated,
        probe_ids=np.concatenate((identities["mated_probe"], np.full(len(unmated), UNMATED))),
    )


def load_survface_pairs(folder: str | Path, show_progress: bool = True) -> VerificationSet:
    """The verification test from ``Face_Verification_Test_Set``: positive pairs, then negative ones, in the lists'
    order, dealt evenly into ten folds (the authors report one ROC curve over all pairs).

    Raises:
        LrfaceError: a list is missing or broken, or images that it names are not there.
    """
    root = Path(folder)
    pairs: list[tuple[str, str]] = []
    counts = []
    there = set(_images(root / "verification_images").values())
    for kind in ("positive", "negative"):
        variable = f"{kind}_pairs_names"
        file = root / f"{variable}.mat"
        found = _pairs(file, variable, read_matlab(file).get(variable))
        missing = sorted({name for pair in found for name in pair} - there)
        if missing:
            raise LrfaceError(
                f"{file}: {len(missing)} images that it names are not in {root / 'verification_images'}, the first: "
                f"{', '.join(missing[:5])[:300]}"
            )
        counts.append(len(found))
        pairs += found
    names = sorted({name for pair in pairs for name in pair})
    position = {name: index for index, name in enumerate(names)}
    images = read_faces(enlarged_faces(root / "verification_images", names), "survface", show_progress)
    same = np.repeat([True, False], counts)
    return VerificationSet(
        name="survface",
        images=images,
        left=np.array([position[left] for left, _ in pairs], dtype=np.int64),
        right=np.array([position[right] for _, right in pairs], dtype=np.int64),
        same=same,
        folds=stratified_folds(same),
        unaligned=len(names),
        origin=str(root),
        native=native_sides(root / "verification_images", names),
    )


def _pairs(file: Path, variable: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, np.ndarray) or value.dtype != object or value.ndim != 2 or value.shape[1] != 2:
        found = f"shape {list(value.shape)}" if isinstance(value, np.ndarray) else "nothing of that name"
        raise LrfaceError(f"{file}: '{variable}' with two names a row is expected, found {found}")
    if not len(value):
        raise LrfaceError(f"{file}: '{variable}' has no pairs")
    pairs = []
    for row in range(len(value)):
        names = [value[row, 0], value[row, 1]]
        if not all(isinstance(name, str) and name.strip() and "/" not in name for name in names):
            raise LrfaceError(
                f"{file}: row {row + 1} of '{variable}' should be two names, found {str(names)[:120]}"
            )
        pairs.append((names[0].strip(), names[1].strip()))
    return pairs
