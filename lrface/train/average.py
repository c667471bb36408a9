"""Averaged weights: what a stage exports when that is not what it trains, but an average over steps, or with its teacher."""

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


class BlendedWeights:
    """Weights between those that a method trains and those of its frozen teacher, parameter by parameter: (1 - s) encoder +
    s teacher with s the method's ``teacher_share`` (WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models",
    CVPR 2022). The interface is that of :class:`AveragedWeights`.

    Args:
        method: with ``encoder`` and a ``teacher`` of the same shapes.
    """

    def __init__(self, method: nn.Module, share: float):
        self.method, self.share = method, share
        teacher = dict(method.get_submodule("teacher").named_parameters())
        own = method.get_submodule("encoder").named_parameters()
        self._pairs = {f"encoder.{name}": (parameter, teacher[name]) for name, parameter in own}

    def update(self, step: int) -> None:
        """Nothing is to be remembered of a step."""

    def state(self) -> dict[str, Tensor]:
        """All tensors of the method by name, blended where encoder and teacher have them."""
        return {**tensors(self.method), **self._blended()}

    @torch.no_grad()
    def _blended(self) -> dict[str, Tensor]:
        return {
            name: own.detach().lerp(other.detach(), self.share) for name, (own, other) in self._pairs.items()
        }

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The method's encoder has the blended weights in here."""
        own = {name: parameter.data for name, (parameter, _) in self._pairs.items()}
        for name, value in self._blended().items():
            self._pairs[name][0].data = value
        try:
            yield
        finally:
            for name, value in own.items():
                self._pairs[name][0].data = value
