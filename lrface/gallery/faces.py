"""What a gallery holds: enrolled images, and one pooled vector (template) for each person."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.identification import pool_templates
from lrface.errors import UsageError

POOLINGS = ("mean", "norm")
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
INDEXES = ("auto", "exact", "hnsw", "ivf")


@dataclass(frozen=True)
class EnrolledFaces:
    """n images of enrolled people.

    Attributes:
        names: whose image each is.
        sha256: 32 bytes each, of the image's content.
        paths: where each was read from; empty where it came from memory.
        vectors: float32 [n, d], of unit length.
        quality: float32 [n], lengths of the features.
        resolution: float32 [n], effective resolution in pixels.
    """

    names: list[str]
    sha256: list[bytes]
    paths: list[str]
    vectors: NDArray[np.float32]
    quality: NDArray[np.float32]
    resolution: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Templates:
    """n people: ``names``, ``vectors`` float32 [n, d] of unit length, ``images`` int32 [n] pooled into each and
    ``resolution`` float32 [n], the largest of them."""

    names: list[str]
    vectors: NDArray[np.float32]
    images: NDArray[np.int32]
    resolution: NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """A person that a probe resembles: ``similarity`` is the cosine to the template, which ``images`` images were
    pooled into, the clearest of ``resolution`` pixels."""

    name: str
    similarity: float
    images: int
    resolution: float


class Store(Protocol):
    """Where a gallery keeps its people: a folder, or Milvus. ``header`` says what was settled when it was made:
    ``model``, ``pooling``, ``flip`` and ``index``."""

    header: dict[str, Any]

    def enrolled(self, sha256: Sequence[bytes]) -> dict[bytes, str]:
        """Which of these images are enrolled, and as whom."""

    def add(self, faces: EnrolledFaces) -> int:
        """Enrol, and say how many of the people are new. On return it is stored whatever happens to this process."""

    def remove(self, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """Images deleted of each person, and the names that nobody has."""

    def search(self, vectors: NDArray[np.float32], k: int) -> list[list[Candidate]]:
        """The ``k`` people most like each of the vectors float32 [n, d] of unit length, best first."""

    def names(self) -> dict[str, int]:
        """Everybody, and how many images each has."""

    def info(self) -> dict[str, Any]:
        """Plain values for people."""

    def close(self) -> None: ...


def templates_of(faces: EnrolledFaces, pooling: str) -> Templates:
    """One template for each person, in the order of their first images.

    ``pooling`` "mean": of the unit vectors; "norm": weighed by the length of the features, as
    :func:`lrface.benchmarks.identification.pool_templates` does.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(faces.names))}
    person = np.array([numbers[name] for name in faces.names])
    features = faces.vectors if pooling == "mean" else faces.vectors * faces.quality[:, None]
    vectors, _ = pool_templates(features, person, pooling)
    resolution = np.zeros(len(numbers), np.float32)
    np.maximum.at(resolution, person, faces.resolution)
    return Templates(list(numbers), vectors, np.bincount(person).astype(np.int32), resolution)


def joined(parts: Sequence[EnrolledFaces]) -> EnrolledFaces:
    """All of at least one part, in order."""
    return EnrolledFaces(
        [name for part in parts for name in part.names],
        [digest for part in parts for digest in part.sha256],
        [path for part in parts for path in part.paths],
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.quality for part in parts]),
        np.concatenate([part.resolution for part in parts]),
    )


def check_name(name: Any) -> str:
    """The name of a person as it is kept: without blanks around it, composed (NFC), so that a name typed in and the same
    name read from a folder on another system are one. Raises UsageError for one that is empty, longer than 500 characters
    or holds control characters."""
    if isinstance(name, str):
        kept = unicodedata.normalize("NFC", name).strip()
        if 0 < len(kept) <= 500 and not any(unicodedata.category(each) in _NO_TEXT for each in kept):
            return kept
    raise UsageError(
        f"a person's name is text of 1 to 500 characters without control characters; found {name!r}"
    )
