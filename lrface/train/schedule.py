"""Learning rates as functions of the step: nothing to save, nothing to restore."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrface.errors import UsageError

KINDS = ("multistep", "cosine", "poly", "constant")


@dataclass(frozen=True)
class Schedule:
    """Factor on the base learning rate at each step.

    kind: "multistep" multiplies by ``gamma`` at each milestone (QualNet's, paper 001, section 4.1); "cosine" falls
        from 1 to ``final`` along half a wave (Loshchilov and Hutter, ICLR 2017, eq. 5, without restarts); "poly"
        falls as (1 - t)^``power``, t from 0 after the warm-up to 1 at the end; "constant" stays at 1.
    milestones: steps at which "multistep" falls; or ``milestone_epochs``: the same in epochs.
    warmup_steps: the factor first rises linearly over so many steps; or ``warmup_epochs``.
    final: the factor that "cosine" and "poly" end at.
    power: of "poly"; 1 is a straight line.

    Raises:
        UsageError: an unknown kind, milestones out of order, negative values, the same thing by step and by epoch.
    """

    kind: str = "multistep"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    final: float = 0.0
    power: float = 2.0
    milestone_epochs: Sequence[float] = ()
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"schedule.kind must be one of {', '.join(KINDS)}; found {self.kind!r}")
        for name in ("milestones", "milestone_epochs"):
            values = list(getattr(self, name))
            if values != sorted(values):
                raise UsageError(f"schedule.{name} must rise; found {values}")
        if min(self.warmup_steps, self.warmup_epochs, self.final) < 0 or self.gamma <= 0:
            raise UsageError(
                "schedule: warmup_steps, warmup_epochs and final must be at least 0 and gamma above 0"
            )
        if not 0 < self.power < math.inf:
            raise UsageError(f"schedule.power must be above 0; found {self.power}")
        for steps, epochs in (("milestones", "milestone_epochs"), ("warmup_steps", "warmup_epochs")):
            if getattr(self, steps) and getattr(self, epochs):
                raise UsageError(f"schedule: give {steps} or {epochs}, not both")

    def in_steps(self, steps_per_epoch: int) -> "Schedule":
        """This schedule with everything that was given in epochs as the nearest step."""
        return dataclasses.replace(
            self,
            milestones=self.milestones or [round(epoch * steps_per_epoch) for epoch in self.milestone_epochs],
            warmup_steps=self.warmup_steps or round(self.warmup_epochs * steps_per_epoch),
            milestone_epochs=(),
            warmup_epochs=0.0,
        )

    def factor(self, step: int, steps: int) -> float:
        """The factor at ``step`` (from 0) of ``steps``.

        Raises:
            UsageError: something is in epochs: see :meth:`in_steps`.
        """
        if self.milestone_epochs or self.warmup_epochs:
            raise UsageError("schedule: milestone_epochs and warmup_epochs need the length of an epoch")
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "multistep":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        part = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        if self.kind == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part))
        if self.kind == "poly":
            return self.final + (1 - self.final) * max(0.0, 1 - part) ** self.power
        return 1.0
