"""Classification of identities: vanilla, specialised and naive augmentation are degrade policies of it."""

from typing import Any

import torch

from lrface.degrade.policy import Policy
from lrface.heads import Head
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.models.blocks import FaceBackbone


class Classify(Method):
    """The head's loss: cross-entropy on its logits (paper 001, eq. 2), for most.

    Args:
        encoder: face backbone.
        head: ``head.loss(embeddings, labels) -> HeadLoss``.
        policy: what the encoder sees. All clean is the vanilla network, one low resolution for every image a
            specialised one, half clean and half mixed the naive augmentation of paper 001, section 4.1.
    """

    def __init__(self, encoder: FaceBackbone, head: Head, policy: Policy):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.policy = policy

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        recognition = self.head.loss(self.encoder(batch["image"]), batch["label"])
        return StepOutput(recognition.loss, {"accuracy": recognition.accuracy, **recognition.logs})
