"""The seam between methods and the trainer: what one training step computes."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lrface.data.dataset import as_float
from lrface.degrade.policy import Policy, rows_of


@dataclass
class StepOutput:
    """What a training step gives back.

    loss: scalar; the trainer calls backward on it.
    logs: detached scalars that are only shown.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A training method. It knows no configuration, command line, logger or rank.

    Attributes:
        encoder: what is exported and evaluated.
        needs: batch keys it reads; the trainer checks them once at the start.
        accumulable: whether the gradient of a batch is the mean of those of its equal parts, so that a trainer may
            take them one after the other. False where a loss compares the images of a batch with each other; then
            ``not_accumulable_because`` says so to the user.
        must_load: parts that mean nothing with fresh weights, such as a teacher, and what part of the stage before each
            usually comes from: a stage has to load them.
        splittable: whether FSDP may spread the weights over ranks, which are then whole within ``forward`` alone. False
            where ``prepare`` computes with them.
        teacher_share: of the weights of ``teacher``, which has the shapes of ``encoder``, in what is exported; see
            lrface.train.average.BlendedWeights.
        epoch_steps: steps in an epoch of the run, told before the first step; None where nobody did.
        autocast: gives the precision of the run for networks that ``prepare`` runs; the training step sets it.
    """

    encoder: nn.Module
    needs: tuple[str, ...] = ("image", "label", "seed")
    accumulable: bool = True
    not_accumulable_because: str = "its loss compares the images of a batch with each other"
    must_load: Mapping[str, str] = MappingProxyType({})
    splittable: bool = True
    teacher_share: float = 0.0
    epoch_steps: int | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def filled(self, parts: Collection[str]) -> list[str]:
        """Called before the first step of a run, when weights lie where its recipe wants them; not when it is resumed.

        Args:
            parts: names of those that the stage loads.

        Returns:
            What was done, a line each.
        """
        return []

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augmentation on the device, outside of autograd; returns the batch."""
        return batch

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        raise TypeError(f"{type(self).__name__} must define forward(batch)")

    def param_groups(self) -> list[dict[str, Any]]:
        """Every parameter the main optimiser owns: weights with decay, BatchNorm, bias and PReLU without."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for _, parameter in self._trainable():
            (decayed if parameter.ndim > 1 else plain).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def degrade_batch(batch: dict[str, Any], policy: Policy) -> dict[str, Any]:
    """Frame and degrade a batch of uint8 or [0, 1] images.

    Args:
        batch: ``image`` uint8 or float [n, 3, h, h], ``seed`` int: the seed this batch's parameters come from. Where it
            is a rank's share of a batch, ``part`` (rank, ranks): parameters are drawn for the whole batch and shared.

    Returns:
        The batch with ``image`` float32 [n, 3, h, h] (degraded) and ``hq`` (its clean original).
    """
    images = as_float(batch["image"])
    (parameters,) = drawn(batch, policy)
    degraded, hq = policy.apply(images, parameters)
    return {**without_seed(batch), "image": degraded, "hq": hq}


def drawn(batch: dict[str, Any], policy: Policy, times: int = 1) -> list[Any]:
    """The policy's parameters for a batch as in :func:`degrade_batch`, ``times`` of them, one after another."""
    images = batch["image"]
    generator = torch.Generator().manual_seed(int(batch["seed"]))
    rank, ranks = batch.get("part", (0, 1))
    own = slice(rank * len(images), (rank + 1) * len(images))
    whole = [policy.sample(len(images) * ranks, images.shape[-1], generator) for _ in range(times)]
    return [rows_of(parameters, own) for parameters in whole]


def without_seed(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as ``forward`` gets it, without its images: "seed", a number that changes each step, would make a compiled
    forward compile each step."""
    return {key: value for key, value in batch.items() if key not in ("image", "seed", "part")}
