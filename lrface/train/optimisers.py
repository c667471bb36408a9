"""What moves the weights: settings of an optimiser, building it, bringing it back from a checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from lrface.errors import LrfaceError, UsageError
from lrface.methods.base import Method
from lrface.registry import nearest


@dataclass(frozen=True)
class Layer:
    """Settings of the parameters whose names ``match``.

    match: a pattern of the shell over names such as ``encoder.body.0.residual.1.weight``: ``encoder.*``.
    learning_rate_factor: on the learning rate of these parameters.
    weight_decay: theirs; None leaves what they would have.

    Raises:
        UsageError: a value out of range.
    """

    match: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "match" and value is not None and not 0 <= value < math.inf:
                raise UsageError(f"optimiser.layers {self.match!r}: {name} must be at least 0; found {value}")


@dataclass
class Optimiser:
    """What moves the weights.

    name: "sgd" (with ``momentum`` and ``nesterov``) or "adamw" (with ``betas`` and ``eps``; learns faster in very
        short runs), or "adam", whose weight decay is a part of the gradient (L2 regularisation).
    decay_norms: weight decay also on biases, norms and PReLU slopes.
    clip_norm: largest norm of the whole gradient, or None.
    layers: settings of single layers; of several whose pattern matches a parameter, the first counts.

    Raises:
        UsageError: an unknown name, a value out of range, or Nesterov momentum without momentum.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    clip_norm: float | None = None
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_norms: bool = False
    layers: Sequence[Layer] = ()

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam", "adamw"):
            raise UsageError(f"optimiser.name must be sgd, adam or adamw; found {self.name!r}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"optimiser.{name} must be a number of at least 0; found {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"optimiser.clip_norm must be above 0; found {self.clip_norm}")
        if self.nesterov and self.momentum == 0:
            raise UsageError("optimiser.nesterov needs optimiser.momentum above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                f"optimiser.betas must be two numbers from 0 to below 1; found {list(self.betas)}"
            )
        if not 0 < self.eps < math.inf:
            raise UsageError(f"optimiser.eps must be above 0; found {self.eps}")


def parameter_groups(method: Method, settings: Optimiser) -> list[dict[str, Any]]:
    """The method's parameter groups, parted further where ``settings`` say so.

    A group's ``learning_rate_factor`` is what the schedule's rate is multiplied by for it.

    Raises:
        UsageError: a pattern of ``settings.layers`` matches no trainable parameter.
        LrfaceError: the method's groups are not its trainable parameters.
    """
    groups = method.param_groups()
    check_param_groups(method, groups)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    trained = [names[id(parameter)] for group in groups for parameter in group["params"]]
    for layer in settings.layers:
        if not any(fnmatchcase(name, layer.match) for name in trained):
            known = sorted({name.rpartition(".")[0] + ".*" for name in trained})
            raise UsageError(
                f"optimiser.layers: {layer.match!r} matches no parameter that this stage trains"
                f"{nearest(layer.match, known)}; they are named such as {trained[0]} and {trained[-1]}"
            )
    parted: list[dict[str, Any]] = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        if settings.decay_norms and rest.get("weight_decay") == 0.0:
            del rest["weight_decay"]
        by_layer: dict[int, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            place = next((i for i, layer in enumerate(settings.layers) if fnmatchcase(name, layer.match)), -1)
            by_layer.setdefault(place, []).append(parameter)
        for place, parameters in sorted(by_layer.items()):
            own = dict(rest)
            if place >= 0:
                layer = settings.layers[place]
                own["learning_rate_factor"] = layer.learning_rate_factor * rest.get(
                    "learning_rate_factor", 1.0
                )
                if layer.weight_decay is not None:
                    own["weight_decay"] = layer.weight_decay
            parted.append({"params": parameters, **own})
    return parted


def build_optimiser(settings: Optimiser, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` describe, over parameter ``groups``; ``fused`` takes PyTorch's fused one."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "fused": fused,
    }
    if settings.name in ("adam", "adamw"):
        kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        return kind(groups, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, **common)
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Let every group learn at ``rate`` times its own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("learning_rate_factor", 1.0)


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any], checkpoint: Path | None) -> None:
    """Momentum from a checkpoint; learning rate, momentum factor and weight decay stay the recipe's.

    Raises:
        LrfaceError: the checkpoint's optimiser had other parameters.
    """
    own = optimiser.state_dict()
    kinds = [_kind(groups["param_groups"][0]) for groups in (saved, own)]
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


def _kind(group: dict[str, Any]) -> str:
    if "betas" not in group:
        return "sgd"
    return "adamw" if group.get("decoupled_weight_decay", True) else "adam"


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
