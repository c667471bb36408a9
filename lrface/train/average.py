"""Averaged weights: what a stage exports when it keeps an exponential moving average of what it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrface.train.checkpoint import tensors


class AveragedWeights:
    """Exponential moving average of a method's trained parameters and of its buffers (Polyak averaging).

    After step t (from 0) the average moves to ``d average + (1 - d) weights`` with d = min(``decay``,
    (1 + t) / (10 + t)), so that the first steps do not stay in it for long. Buffers that are no floats are copied;
    what is frozen is not stored twice.

    Args:
        method: what is trained, on its device already.
        decay: from 0 to below 1.
        state: averages to go on from, by name; what is missing starts at the method's own value.
    """

    def __init__(self, method: nn.Module, decay: float, state: dict[str, Tensor] | None = None):
        self.method = method
        self.decay = decay
        kept = tensors(method)
        self._parameters = {
            name: parameter
            for name, parameter in method.named_parameters()
            if parameter.requires_grad and name in kept
        }
        # By their place: a head puts new tensors where its running statistics are.
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for name, _ in method.named_buffers():
            if name in kept:
                owner, _, own = name.rpartition(".")
                self._buffers[name] = (method.get_submodule(owner), own)
        self.values = {key: value.detach().clone() for key, value in self.live.items()}
        if state is not None:
            for key, value in self.values.items():
                if key in state:
                    value.copy_(state[key])

    @property
    def live(self) -> dict[str, Tensor]:
        """What is averaged, as it is now."""
        buffers = {key: getattr(owner, own) for key, (owner, own) in self._buffers.items()}
        return {**self._parameters, **buffers}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        live = self.live
        floats = [key for key, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[key] for key in floats], [live[key] for key in floats], weight)
        for key, value in self.values.items():
            if not value.is_floating_point():
                value.copy_(live[key])

    def state(self) -> dict[str, Tensor]:
        """All tensors of the method by name, averaged where they are trained."""
        return {**tensors(self.method), **self.values}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The method has the averaged weights in here: what is exported is what is to be validated."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for key, value in self.live.items():
            value.data, self.values[key].data = self.values[key].data, value.data
