"""Learning rates as functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrface.errors import UsageError

KINDS = ("multistep", "cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Factor on the base learning rate at each step.

    kind: "multistep" multiplies by ``gamma`` at each milestone; "cosine" falls from 1 to ``final``;
        "constant" stays at 1.
    milestones: steps at which "multistep" falls.
    warmup_steps: the factor first rises linearly over so many steps.
    final: the factor "cosine" ends at.

    Raises:
        UsageError: an unknown kind, milestones out of order, negative values.
    """

    kind: str = "multistep"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"schedule.kind must be one of {', '.join(KINDS)}; found {self.kind!r}")
        if list(self.milestones) != sorted(self.milestones):
            raise UsageError(f"schedule.milestones must rise; found {list(self.milestones)}")
        if self.warmup_steps < 0 or self.gamma <= 0 or self.final < 0:
            raise UsageError("schedule: warmup_steps and final must be at least 0 and gamma above 0")

    def factor(self, step: int, steps: int) -> float:
        """The factor at ``step`` (from 0) of ``steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "multistep":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if self.kind == "cosine":
            part = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part))
        return 1.0
