"""Classification of identities: vanilla, specialised and naive augmentation are degrade policies of it."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lrface.degrade.policy import ResolutionPolicy
from lrface.methods.base import Method, StepOutput, accuracy, degrade_batch
from lrface.models.blocks import FaceBackbone


class Classify(Method):
    """Cross-entropy on the head's logits (paper 001, eq. 2).

    Args:
        encoder: face backbone.
        head: ``head(embeddings, labels) -> logits``.
        policy: what the encoder sees. All clean is the vanilla network, one low resolution for every image a
            specialised one, half clean and half mixed the naive augmentation of paper 001, section 4.1.
    """

    def __init__(self, encoder: FaceBackbone, head: nn.Module, policy: ResolutionPolicy):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.policy = policy

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        logits = self.head(self.encoder(batch["image"]), batch["label"])
        loss = F.cross_entropy(logits, batch["label"])
        return StepOutput(loss, {"accuracy": accuracy(logits, batch["label"])})
