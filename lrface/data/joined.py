"""Several sources of the same classes as one: a training set and what was made from it."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from lrface.data.source import FaceSource
from lrface.errors import LrfaceError


class JoinedSource:
    """The images of ``sources`` one after another, a :class:`~lrface.data.source.FaceSource`; nothing is copied.

    Args:
        sources: at least one.
        names: what each is called, for messages.

    Raises:
        LrfaceError: two of them have other identities, so that a label would mean two things.
    """

    def __init__(self, sources: Sequence[FaceSource], names: Sequence[str]):
        self.parts = list(sources)
        first = self.parts[0]
        self.format = " + ".join(dict.fromkeys(source.format for source in self.parts))
        self.identities = first.identities
        for source, name in zip(self.parts, names, strict=True):
            if source.identities != first.identities:
                pairs = zip(source.identities, first.identities, strict=False)
                at = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
                differ = (
                    f"{len(source.identities)} and {len(first.identities)} identities"
                    if at is None
                    else f"label {at} is {source.identities[at]!r} and {first.identities[at]!r}"
                )
                raise LrfaceError(
                    f"data.path: {name} and {names[0]} cannot be joined: {differ}. Name sets of the same identities in the "
                    "same order, such as a set and what `lrface deepaugment` made from it"
                )
        self.labels = np.concatenate([source.labels for source in self.parts])
        self._ends = np.cumsum([len(source) for source in self.parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[FaceSource, int]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, position)
        return self.parts[number], position - (self._ends[number - 1] if number else 0)

    def image(self, index: int) -> np.ndarray:
        source, place = self._locate(index)
        return source.image(place)

    def encoded(self, index: int) -> bytes | None:
        source, place = self._locate(index)
        return source.encoded(place)

    def sources(self) -> list[str]:
        """Each part's names behind its number, so that none comes twice."""
        return [f"{number}/{name}" for number, source in enumerate(self.parts) for name in source.sources()]
