"""Classification whose predictions for degraded views of an image agree with those for the clean one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrface.data.dataset import as_float
from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.heads import Head
from lrface.heads.margin import Softmax
from lrface.losses import jensen_shannon
from lrface.methods.base import Method, StepOutput, drawn, without_seed
from lrface.models.blocks import FaceBackbone


class Consistency(Method):
    """Cross-entropy on the clean images + lambda * the Jensen-Shannon divergence of the predictions for them and for two
    degraded views of each (Hendrycks et al., "AugMix", ICLR 2020, eq. 3). The paper's policy is augmix; any will do.

    All views of an image are mirrored and cropped alike, and go through the encoder as one batch.

    Args:
        encoder: backbone.
        head: a linear classifier (softmax): the divergence is one of its class probabilities.
        policy: what the views are drawn from.
        weight: lambda, 12 in the paper.
        views: degraded views of an image, 2 in the paper.

    Raises:
        UsageError: a negative weight, no views, another head.
    """

    def __init__(
        self, encoder: FaceBackbone, head: Head, policy: Policy, weight: float = 12.0, views: int = 2
    ):
        super().__init__()
        check_consistency(head, weight, views, "weight")
        self.encoder = encoder
        self.head = head
        self.policy = policy
        self.weight = weight
        self.views = views

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        parameters = drawn(batch, self.policy, self.views)
        hq = self.policy.frame(as_float(batch["image"]), parameters[0])
        views = {f"view {number}": self.policy.degrade(hq, own) for number, own in enumerate(parameters)}
        return {**without_seed(batch), "image": hq, "hq": hq, **views}

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        views = [batch["hq"], *(batch[f"view {number}"] for number in range(self.views))]
        return consistent_step(self.encoder, self.head, views, batch["label"], self.weight)


def check_consistency(head: Head, weight: float, views: int, name: str) -> None:
    """Raises UsageError for what :class:`Consistency` refuses; ``name`` is that of the argument ``weight``."""
    if not 0 <= weight < float("inf"):
        raise UsageError(f"method.{name} (lambda) must be at least 0; found {weight}")
    if views < 1:
        raise UsageError(f"method.views must be at least 1; found {views}")
    if not isinstance(head, Softmax):
        raise UsageError(
            "consistency compares class probabilities, which a linear classifier gives; set head: softmax"
        )


def consistent_step(
    encoder: nn.Module, head: Head, views: Sequence[Tensor], labels: Tensor, weight: float
) -> StepOutput:
    """Cross-entropy on the first of an image's views + ``weight`` times the divergence of the predictions for all.

    Args:
        views: float [n, c, h, w] each; one batch to the encoder.
        labels: int64 [n].
    """
    count = len(views[0])
    embeddings = encoder(torch.cat(list(views)))
    recognition = head.loss(embeddings[:count], labels)
    logits = head(embeddings, labels.repeat(len(views)))
    divergence = jensen_shannon(logits.split(count))
    return StepOutput(
        recognition.loss + weight * divergence,
        {
            "recognition": recognition.loss.detach(),
            "divergence": divergence.detach(),
            "accuracy": recognition.accuracy,
            **recognition.logs,
        },
    )
