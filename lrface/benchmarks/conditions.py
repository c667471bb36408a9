"""What is done to a benchmark's images before the model sees them: a resolution, and losses of quality beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrface.benchmarks.corrupted import known_corruption, known_severity
from lrface.degrade.corruptions import CORRUPTIONS, HELD_OUT, CorruptionParameters
from lrface.degrade.corruptions import apply as apply_corruption
from lrface.degrade.ops import gaussian_blur, gaussian_noise, jpeg
from lrface.degrade.resolution import resample, resize
from lrface.errors import UsageError


@dataclass(frozen=True)
class Condition:
    """One condition of the images. Losses come in the order in which a camera makes them: blur, the sensor's
    resolution, noise, JPEG; the last two therefore act on the small image, before it is enlarged again. A corruption of
    the ImageNet-C family comes before all of them, on the full-size image.

    Attributes:
        size: side in pixels that images are brought down to; None leaves them at their own.
        blur: Gaussian sigma in pixels of the full-size image.
        noise: Gaussian sigma in 8-bit levels.
        jpeg: quality, 1 to 100.
        corruption: one of the 19; None for none.
        severity: of it, 1 to 5.
    """

    size: int | None = None
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int | None = None
    corruption: str | None = None
    severity: int = 0

    @property
    def losses(self) -> str:
        """What is done beside the resolution, "blur=2,jpeg=30" as ``parse`` takes it or "fog:3"; empty for nothing."""
        parts = [f"{self.corruption}:{self.severity}"] if self.corruption else []
        parts += [f"blur={self.blur:g}"] if self.blur else []
        parts += [f"noise={self.noise:g}"] if self.noise else []
        parts += [f"jpeg={self.jpeg}"] if self.jpeg is not None else []
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """ "jpeg=30", "size=28,noise=8,blur=1.5" -> Condition. Raises UsageError naming the part that is wrong."""
        kinds = {"size": int, "blur": float, "noise": float, "jpeg": int}
        found: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in kinds or name in found:
                raise UsageError(
                    f"--degrade {text!r}: found {part.strip()!r}; give {', '.join(f'{k}=NUMBER' for k in kinds)}, "
                    "each at most once, with commas between"
                )
            try:
                found[name] = kinds[name](value)
            except ValueError as error:
                raise UsageError(f"--degrade {text!r}: {name} takes a number, found {value!r}") from error
        condition = cls(**found)  # type: ignore[arg-type]
        if not (condition.size is None or condition.size >= 1):
            raise UsageError(f"--degrade {text!r}: size must be at least 1 pixel")
        if (
            condition.blur < 0
            or condition.noise < 0
            or not (condition.jpeg is None or 1 <= condition.jpeg <= 100)
        ):
            raise UsageError(
                f"--degrade {text!r}: blur and noise are at least 0, jpeg lies between 1 and 100"
            )
        return condition

    def apply(self, images: Tensor, down: str, up: str, seeds: list[int], set: str = "face") -> Tensor:
        """float [n, 3, s, s] RGB in [0, 1] -> the same. ``seeds`` are those of the images' noise and corruption, ``set``
        names the corruption's constants."""
        full = images.shape[-1]
        if self.corruption is not None:
            severity = torch.full((len(images),), self.severity)
            parameters = CorruptionParameters(
                self.corruption,
                set,
                (full, full),
                severity,
                torch.tensor(seeds, dtype=torch.int64),
            )
            images = apply_corruption(images, parameters)
        images = gaussian_blur(images, self.blur)
        small = self.size is not None and self.size < full
        if not (self.noise or self.jpeg is not None):
            return resample(images, self.size, down, up) if self.size is not None and small else images
        if small:
            assert self.size is not None
            images = resize(images, self.size, down)
        if self.noise:
            images = gaussian_noise(images, self.noise, seeds)
        if self.jpeg is not None:
            images = jpeg(images, self.jpeg)
        return resize(images, full, up) if small else images


def parse_corruptions(texts: Sequence[str]) -> list[Condition]:
    """What ``--corruption`` takes -> conditions: "fog" (severities 1 to 5), "fog:3", "all" (the 15), "all:3",
    "held-out" (the further four), "held-out:3".

    Raises:
        UsageError: an unknown corruption, with the nearest name, or a severity that is not 1 to 5.
    """
    groups = {"all": CORRUPTIONS, "held-out": HELD_OUT, "held_out": HELD_OUT}
    known = (*CORRUPTIONS, *HELD_OUT)
    found: list[Condition] = []
    for text in texts:
        name, colon, level = text.strip().partition(":")
        where = f"--corruption {text!r}"
        severities = [1, 2, 3, 4, 5]
        if colon:
            try:
                severities = [known_severity(int(level), where)]
            except ValueError as error:
                raise UsageError(
                    f"{where}: a severity is a whole number from 1 to 5; found {level!r}"
                ) from error
        names = groups[name] if name in groups else [known_corruption(name, known, where)]
        found += [Condition(corruption=each, severity=severity) for each in names for severity in severities]
    return list(dict.fromkeys(found))
