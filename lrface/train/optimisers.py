"""What moves the weights: settings of an optimiser, building it, bringing it back from a checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrface.errors import LrfaceError, UsageError
from lrface.methods.base import Method


@dataclass
class Optimiser:
    """What moves the weights.

    name: "sgd" (with ``momentum`` and ``nesterov``) or "adamw" (which learns faster in very short runs).
    clip_norm: largest norm of the whole gradient, or None.

    Raises:
        UsageError: an unknown name, a value out of range, or Nesterov momentum without momentum.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise UsageError(f"optimiser.name must be sgd or adamw; found {self.name!r}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"optimiser.{name} must be a number of at least 0; found {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"optimiser.clip_norm must be above 0; found {self.clip_norm}")
        if self.nesterov and self.momentum == 0:
            raise UsageError("optimiser.nesterov needs optimiser.momentum above 0")


def build_optimiser(settings: Optimiser, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` describe, over parameter ``groups``."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "fused": fused,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **common)
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any], checkpoint: Path | None) -> None:
    """Momentum from a checkpoint; learning rate, momentum factor and weight decay stay the recipe's.

    Raises:
        LrfaceError: the checkpoint's optimiser had other parameters.
    """
    own = optimiser.state_dict()
    kinds = ["adamw" if "betas" in groups["param_groups"][0] else "sgd" for groups in (saved, own)]
    if kinds[0] != kinds[1]:
        raise LrfaceError(
            f"checkpoint {checkpoint} was written with optimiser {kinds[0]}, the recipe now says {kinds[1]}: choose "
            "another place with out=DIR, or --restart"
        )
    if [group["params"] for group in own["param_groups"]] != [
        group["params"] for group in saved["param_groups"]
    ]:
        raise LrfaceError(
            f"checkpoint {checkpoint} was written with other parameters trained or frozen; a stage that changes what "
            "is frozen starts anew: choose another place with out=DIR, or --restart"
        )
    optimiser.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})


def check_param_groups(method: Method, groups: list[dict[str, Any]]) -> None:
    """Trainable parameters and the optimiser's must be the same ones.

    Raises:
        LrfaceError: names a parameter that would not be trained, or one that is frozen yet handed over.
    """
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    given = [parameter for group in groups for parameter in group["params"]]
    identities = {id(parameter) for parameter in given}
    if len(identities) != len(given):
        raise LrfaceError(f"{type(method).__name__}.param_groups() lists a parameter twice")
    for parameter in given:
        if not parameter.requires_grad:
            raise LrfaceError(
                f"{type(method).__name__}.param_groups() holds the frozen parameter {names.get(id(parameter))}"
            )
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and id(parameter) not in identities:
            raise LrfaceError(
                f"{type(method).__name__}.param_groups() leaves out the trainable parameter {name}"
            )
