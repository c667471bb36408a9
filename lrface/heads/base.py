"""What every classification head gives to a method."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrface.errors import UsageError


@dataclass
class HeadLoss:
    """What a head makes of a batch.

    loss: scalar to minimise, at least float32, with the head's own terms.
    accuracy: detached scalar, see :func:`accuracy`.
    logs: detached scalars of the head's own that are only shown; the same keys in every step.
    """

    loss: Tensor
    accuracy: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Class weights and a loss on them. It knows no method, configuration or trainer."""

    def loss(self, embeddings: Tensor, labels: Tensor) -> HeadLoss:
        """The loss of a batch: embeddings float [n, d] as the encoder gave them, labels int64 [n]."""
        raise TypeError(f"{type(self).__name__} must define loss(embeddings, labels)")


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of a batch whose largest logit is the label's; with a margin head this is the margin's accuracy."""
    return (logits.detach().argmax(1) == labels).float().mean()


def check_sizes(embedding_size: int, identities: int) -> None:
    """Raises UsageError unless there is something to classify."""
    if embedding_size < 1 or identities < 2:
        raise UsageError(
            f"a head needs an embedding of at least 1 value and at least 2 identities; "
            f"found {embedding_size} and {identities}"
        )


def check_range(name: str, value: float, low: float, high: float, closed: str = "[]") -> None:
    """Raises UsageError, naming head.``name``, unless ``value`` lies between ``low`` and ``high``.

    closed: which ends belong to the range, as in [low, high), "[)".
    """
    above = value >= low if closed[0] == "[" else value > low
    below = value <= high if closed[1] == "]" else value < high
    if not (above and below):
        raise UsageError(f"head.{name} must lie in {closed[0]}{low:g}, {high:g}{closed[1]}; found {value}")
