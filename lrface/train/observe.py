"""What watches a stage: the trainer tells it what happens. It is no part of what is learned."""

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lrface.train.checkpoint import random_state, restore_random_state

if TYPE_CHECKING:
    from lrface.methods.base import Method


class Observer:
    """Called by the trainer around a stage; every call may be left as it is.

    A step is counted by the steps that are done: 0 before the first one. Every rank of a distributed run calls its
    observers alike, since a network may be spread over the ranks; rank 0 alone writes.
    """

    def begin(self, step: int, method: "Method", folder: Path) -> None:
        """A stage starts or goes on after ``step`` steps; ``folder`` is the stage's."""

    def logged(self, step: int, values: dict[str, float]) -> None:
        """A row of the log: ``step`` as metrics.csv counts it, from 0."""

    def due(self, step: int) -> bool:
        """Whether :meth:`after_step` has anything to do at ``step``; asked after every step, so it must be quick."""
        return False

    def after_step(self, step: int, method: "Method") -> bool:
        """``step`` steps are done. True asks for a checkpoint now."""
        return False

    def kept(self) -> Collection[int]:
        """Steps whose checkpoints stay although newer ones push them out."""
        return ()

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint of ``step`` was written."""

    def end(self) -> None:
        """The stage is over, however it ended."""


class Observers(Observer):
    """Several observers as one, which leave training as it was: random generators, and modules in their mode."""

    def __init__(self, members: Sequence[Observer]):
        self.members = list(members)

    def begin(self, step: int, method: "Method", folder: Path) -> None:
        with untouched(method):
            for member in self.members:
                member.begin(step, method, folder)

    def logged(self, step: int, values: dict[str, float]) -> None:
        for member in self.members:
            member.logged(step, values)

    def after_step(self, step: int, method: "Method") -> bool:
        due = [member for member in self.members if member.due(step)]
        if not due:
            return False
        with untouched(method):
            return any([member.after_step(step, method) for member in due])

    def kept(self) -> Collection[int]:
        return {step for member in self.members for step in member.kept()}

    def saved(self, step: int, checkpoint: Path) -> None:
        for member in self.members:
            member.saved(step, checkpoint)

    def end(self) -> None:
        for member in self.members:
            member.end()


def can_draw() -> bool:
    """Whether matplotlib is here, which pictures need and training does not."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def untouched(method: nn.Module) -> Iterator[None]:
    """Random generators and the training mode of every module come back as they were."""
    random = random_state()
    modes = [(module, module.training) for module in method.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        restore_random_state(random)
