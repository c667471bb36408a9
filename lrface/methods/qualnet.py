"""QualNet: recognition and reconstruction of the clean image from one feature map, in two stages.

Stage 1 of QualNet-LM (paper 000, appendix D): encoder and decoder on clean images, nothing frozen. Stage 2
(paper 001, Algorithm 1): the decoder frozen, the encoder from stage 1 with its BatchNorm frozen, clean and
low-resolution images, loss L_softmax + lambda L_quality (eq. 6).

QualNet for classification (paper 001, section 3.3): stage 1 classifies clean images with an i-RevNet, by the method
``classify``. Stage 2 is this one with a fresh encoder, lambda 0.1, and the decoder ``irevnet_inverse``: a 3x3 convolution
that is trained and the i-RevNet's inverse, which freezes itself.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.heads import Head
from lrface.losses import build_quality
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.models.blocks import FaceBackbone, batchnorm_eval, freeze_batchnorm
from lrface.models.irevnet import IRevNetInverse

FREEZABLE = ("decoder", "batchnorm")


class QualNet(Method):
    """Encoder, head and decoder on one batch: L_softmax + lambda L_quality (paper 001, eq. 6).

    Args:
        encoder: face backbone; its ``features`` feed the decoder.
        head: ``head.loss(embeddings, labels) -> HeadLoss``.
        decoder: feature map -> image [n, 3, h, w].
        policy: clean images only in stage 1; clean and low-resolution ones in stage 2.
        quality_weight: lambda, 1.0 for QualNet-LM (Table 4), 0.1 for QualNet.
        quality: L_quality, a name in :data:`lrface.losses.QUALITY` or a mapping of it and arguments (Table C.1).
        clip: clip the reconstruction to [0, 1] before the distance (appendix A); for stage 2.
        freeze: any of "decoder" (parameters and statistics) and "batchnorm" (the encoder's statistics and
            affine parameters).

    Raises:
        UsageError: a negative lambda, an unknown part to freeze or an unknown loss.
    """

    def __init__(
        self,
        encoder: FaceBackbone,
        head: Head,
        decoder: nn.Module,
        policy: Policy,
        quality_weight: float = 1.0,
        clip: bool = True,
        freeze: Iterable[str] = (),
        quality: Any = "l1",
    ):
        super().__init__()
        if quality_weight < 0:
            raise UsageError(f"quality_weight (lambda) must be at least 0; found {quality_weight}")
        self.frozen = (freeze,) if isinstance(freeze, str) else tuple(freeze)
        for part in self.frozen:
            if part not in FREEZABLE:
                raise UsageError(f"freeze takes {' and '.join(FREEZABLE)}; found {part!r}")
        self.encoder: FaceBackbone = encoder
        self.head = head
        self.decoder = decoder
        self.policy = policy
        self.quality_weight = quality_weight
        self.clip = clip
        self.quality_loss = build_quality(quality)
        if isinstance(decoder, IRevNetInverse):
            self.must_load = {"decoder.network": "encoder"}
        elif "decoder" in self.frozen:
            self.must_load = {"decoder": "decoder"}
        if "decoder" in self.frozen:
            self.decoder.requires_grad_(False)
        if "batchnorm" in self.frozen:
            freeze_batchnorm(self.encoder)

    def train(self, mode: bool = True) -> "QualNet":
        super().train(mode)
        if "decoder" in self.frozen:
            self.decoder.eval()
        if "batchnorm" in self.frozen:
            batchnorm_eval(self.encoder)
        return self

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        ready = degrade_batch(batch, self.policy)
        if self.training and self.quality_loss.learns:
            self.eval()  # what BatchNorm counts, it counts in the step itself
            drawn = self.decoder(self.encoder.features(ready["image"]))
            self.train()
            self.quality_loss.learn(drawn, ready["hq"], self.clip)
        return ready

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        feature_map = self.encoder.features(batch["image"])
        recognition = self.head.loss(self.encoder.embed(feature_map), batch["label"])
        quality = self.quality_loss(self.decoder(feature_map), batch["hq"], self.clip)
        return StepOutput(
            recognition.loss + self.quality_weight * quality,
            {
                "recognition": recognition.loss.detach(),
                "quality": quality.detach(),
                "accuracy": recognition.accuracy,
                **recognition.logs,
            },
        )
