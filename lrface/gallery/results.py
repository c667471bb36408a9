"""What a gallery answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lrface.gallery.faces import Candidate


@dataclass
class Enrolment:
    """What :meth:`Gallery.add` did.

    Attributes:
        images: how many were given.
        enrolled: how many of them are new in the gallery.
        already: how many were in it for the same person.
        new_people: how many people were not there before.
        failures: ``(image, reason)`` of every other image: not readable, no face found, enrolled as somebody else.
        seconds: wall time.
    """

    images: int = 0
    enrolled: int = 0
    already: int = 0
    new_people: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def no_face(self) -> int:
        """How many of the failures are photographs without a face."""
        return sum(reason.startswith("no face found") for _, reason in self.failures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "no_face": self.no_face}

    def __str__(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        return (
            f"{self.enrolled} of {self.images} images enrolled, {self.new_people} new people, in {self.seconds:.1f} s "
            f"({rate:.0f} images/s); {self.already} were there already, {len(self.failures)} failed "
            f"({self.no_face} without a face)"
        )


@dataclass(frozen=True)
class Match:
    """One face that was looked for.

    Attributes:
        source: position of its image among the probes.
        name: who it is; None: nobody in the gallery is like it enough.
        candidates: the people most like it, best first, whoever reaches the threshold or not.
        thresholds: the cosine that each candidate has to reach, chosen by the effective resolutions of the probe and
            of the candidate's images.
        threshold_from: "given", "card" (measured for this model) or "default" (neither: uncalibrated).
        box: left, top, right, bottom in the photograph; None for a crop.
        effective_resolution: of the probe, in pixels.
    """

    source: int
    name: str | None
    candidates: list[Candidate]
    thresholds: list[float]
    threshold_from: str
    box: tuple[float, float, float, float] | None
    effective_resolution: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values; each candidate says whether it is ``accepted``."""
        return {
            "source": self.source,
            "name": self.name,
            "box": self.box,
            "effective_resolution": self.effective_resolution,
            "threshold_from": self.threshold_from,
            "candidates": [
                {**asdict(each), "threshold": threshold, "accepted": each.similarity >= threshold}
                for each, threshold in zip(self.candidates, self.thresholds, strict=True)
            ],
        }


@dataclass(frozen=True)
class Search:
    """Faces found in the probes, in the order of the images, and ``(position, reason)`` of images that gave none."""

    matches: list[Match]
    failures: list[tuple[int, str]]


@dataclass(frozen=True)
class Removal:
    """``removed``: how many images were deleted of each person; ``absent``: names that nobody in the gallery has."""

    removed: dict[str, int]
    absent: list[str]


def matches_text(found: Search, files: Sequence[str]) -> str:
    """One line for each face: image, verdict, and the candidates."""
    lines = []
    for match in found.matches:
        others = (
            ", ".join(f"{each.name} {each.similarity:.3f}" for each in match.candidates) or "nobody enrolled"
        )
        at = f"{match.thresholds[0]:.3f} ({match.threshold_from})" if match.thresholds else "none"
        lines.append(
            f"{files[match.source]}: {match.name or 'unknown'} [{others}; threshold {at} at "
            f"{match.effective_resolution:.0f} pixels]"
        )
    return "\n".join(lines)
