"""One training step: degrade, forward, backward, optimiser. The loop takes it, the profile takes its time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lrface.methods.base import Method, StepOutput
from lrface.train.distributed import clip_gradients, mean_output


def batch_length(batch: dict[str, Any]) -> int:
    """The number of images in a batch: the length of its first tensor."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)


def split_batch(batch: dict[str, Any], size: int, parts: int) -> list[dict[str, Any]]:
    """A batch of ``size`` images as ``parts`` batches in the same order.

    Tensors whose first dimension is ``size`` are split, everything else goes into each part as it is.
    """
    if parts == 1:
        return [batch]
    pieces = {
        key: value.tensor_split(parts)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.shape[:1] == (size,)
    }
    return [{**batch, **{key: values[part] for key, values in pieces.items()}} for part in range(parts)]


def without_phases(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


class TrainingStep:
    """What happens to a batch.

    Args:
        fabric: carries the precision and the device.
        model: the method as Fabric wraps it.
        method: the method itself.
        optimiser: PyTorch's; ``wrapped`` is Fabric's for it.
        accumulate: parts a batch is split into for forward and backward; the gradient is the whole batch's.
        clip_norm: largest norm of the whole gradient, or None.

    A step whose loss is not finite never moves the weights, nor does any step after it: reading the loss makes the
    host wait for a GPU, so that it may be looked at some steps later (:meth:`first_bad`).
    """

    def __init__(
        self,
        fabric: Any,
        model: nn.Module,
        method: Method,
        optimiser: torch.optim.Optimizer,
        wrapped: Any,
        accumulate: int = 1,
        clip_norm: float | None = None,
    ):
        self.fabric, self.model, self.method = fabric, model, method
        self.optimiser, self.wrapped = optimiser, wrapped
        self.accumulate, self.clip_norm = accumulate, clip_norm
        method.autocast = fabric.autocast
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.phase: Callable[[str], AbstractContextManager[Any]] = without_phases
        self._taken = 0
        # Steps before the first one whose loss was not finite; on the device.
        self._good = torch.zeros((), dtype=torch.int64, device=fabric.device)
        self._all_good = torch.ones((), dtype=torch.bool, device=fabric.device)
        self._loss = torch.zeros((), device=fabric.device)

    def gradients(self, batch: dict[str, Any]) -> StepOutput:
        """Fill the gradients for ``batch``; the loss and the logs are means over its parts and over ranks."""
        with self.phase("prepare"):
            batch = self.method.prepare(self.to_device(batch))
        self.optimiser.zero_grad(set_to_none=True)
        parts = split_batch(batch, batch_length(batch), self.accumulate)
        outputs: list[StepOutput] = []
        for index, part in enumerate(parts):
            with self.fabric.no_backward_sync(self.model, enabled=index + 1 < len(parts)):
                with self.phase("forward"):
                    output = self.model(part)
                with self.phase("backward"):
                    self.fabric.backward(output.loss / len(parts))
            outputs.append(StepOutput(output.loss.detach(), output.logs))
        if len(parts) == 1:
            output = outputs[0]
        else:
            logs = {
                key: torch.stack([other.logs[key].float() for other in outputs]).mean()
                for key in outputs[0].logs
            }
            output = StepOutput(torch.stack([other.loss for other in outputs]).mean(), logs)
        output = mean_output(output)
        self._loss = torch.where(self._all_good, output.loss, self._loss)
        self._all_good = self._all_good & torch.isfinite(output.loss)
        self._good = self._good + self._all_good
        self._taken += 1
        return output

    def update(self) -> None:
        """Clip the gradients and move the weights."""
        with self.phase("optimiser"):
            if self.clip_norm is not None:
                if self.scaler is not None:
                    self.scaler.unscale_(self.optimiser)
                clip_gradients(self.parameters, self.clip_norm)
            if self.scaler is None and self.optimiser.defaults.get("fused"):
                # Fused optimisers leave the weights alone where this says so: no waiting for the device.
                self.optimiser.found_inf = (~self._all_good).float()  # type: ignore[attr-defined]
                self.optimiser.grad_scale = None  # type: ignore[attr-defined]
            self.wrapped.step()

    def first_bad(self) -> tuple[int, float] | None:
        """How many steps ago the loss first was not finite, 0 for the last one, and that loss; None if it always was."""
        return None if bool(self._all_good) else (self._taken - int(self._good) - 1, float(self._loss))

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.fabric.device
        if device.type == "cpu":
            return batch
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
