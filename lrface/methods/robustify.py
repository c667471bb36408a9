"""A recogniser that exists, made robust to low resolution: a decoder for its feature map, then QualNet with the recogniser
itself as teacher.

Stage 1, ``reconstruct``, trains a decoder with the encoder frozen: what the images look like that the recogniser's own map
of features says (paper 000, appendix D, with the encoder kept). Stage 2, ``robustify``, trains the encoder on degraded
images with up to four losses, each with a weight:

    distillation    1 - cos(S_i, R_i): the embedding of the degraded image against the untouched recogniser's of its clean
                    original
    contrast        KL(p_i | q_i) of p_ij = softmax_j(cos(R_i, R_j) / tau), q_ij = softmax_j(cos(S_i, R_j) / tau): degraded
                    faces relate to the other clean ones as their originals do. j runs over the batch and over the
                    recogniser's embeddings of the images before, which do not age, because it does not change. It is
                    InfoNCE (paper 002, eq. 2) with the recogniser's own view of who is like whom for a target, so that
                    two images of one person are not pushed apart; its minimum is S = R.
    quality         L1(D(f(S)), x): QualNet's (paper 001, eq. 4), with the decoder frozen
    recognition     the head's, where there are labels
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.data.dataset import as_float
from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.heads import Head
from lrface.heads.base import at_least_float32
from lrface.heads.margin import unit
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.methods.contrastive import teacher_for
from lrface.methods.ranks import of_all_ranks, ranks
from lrface.models.blocks import FaceBackbone, batchnorm_eval, freeze_batchnorm
from lrface.models.onnx_teacher import OnnxTeacher

MIXING = 0x6D6978
"""Sets the draws of blended images apart from the policy's, which the same seed begins."""


class Reconstruct(Method):
    """The distance L1 between what the decoder draws of the frozen encoder's feature map and the image; no labels.

    Args:
        encoder: backbone; neither its weights nor its statistics change.
        decoder: feature map -> image [n, 3, h, w].
        policy: what the encoder sees; clean images, for most.
    """

    needs = ("image", "seed")

    def __init__(self, encoder: FaceBackbone, decoder: nn.Module, policy: Policy):
        super().__init__()
        self.encoder: FaceBackbone = encoder.requires_grad_(False)
        self.decoder = decoder
        self.policy = policy
        if encoder.weights is None:
            self.must_load = {"encoder": "encoder"}

    def train(self, mode: bool = True) -> "Reconstruct":
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        with torch.no_grad():
            feature_map = self.encoder.features(batch["image"])
        drawn, wanted = self.decoder(feature_map).float(), batch["hq"]
        error = F.mse_loss(drawn.detach().clamp(0, 1), wanted)
        return StepOutput(F.l1_loss(drawn, wanted), {"psnr": -10 * error.clamp_min(1e-10).log10()})


class Robustify(Method):
    """The losses of this module.

    The teacher is a copy of the encoder as the stage finds it, loaded or from the backbone's file, or another network; it
    stays frozen, and is no part of what is exported. The decoder is what the stage loads, frozen.

    Args:
        encoder: backbone, the student.
        policy: what the student sees; the teacher sees the clean originals, mirrored and cropped alike.
        head: None where ``recognition_weight`` is 0.
        decoder: None where ``quality_weight`` is 0.
        distillation_weight, contrast_weight, quality_weight, recognition_weight: of the losses; at least one of the
            first two is above 0.
        temperature: tau of the contrast.
        queue: embeddings of earlier images that the contrast compares with, besides the batch.
        quality_share: the part of the batch that is drawn again for the quality loss: a decoder costs time.
        mixed_share: the part of the images that is blended with another of the batch before it is degraded, by a weight
            from 0 to 1: faces of nobody, for which the teacher has an embedding all the same (Beyer et al. 2022,
            "Knowledge distillation: A good teacher is patient and consistent"). They have no label, and no part in the
            recognition loss.
        teacher: None for the encoder as it was; else as of :class:`~lrface.methods.contrastive.Contrastive`, with
            embeddings of as many values as the encoder's, which may then start from nothing.
        teacher_share: how much of the weights as they were there is in what is exported, from 0 to below 1: on the way
            back from the trained weights to those, clean faces gain before small ones lose (Wortsman et al. 2022, "Robust
            fine-tuning of zero-shot models"). Only where the teacher is the encoder as it was.
        freeze: ["batchnorm"] keeps statistics and weights of the encoder's BatchNorm, as QualNet's stage 2 does; [] for an
            encoder that starts from nothing.

    Raises:
        UsageError: a value out of range, or a teacher that does not fit the encoder.
    """

    needs: tuple[str, ...] = ("image", "seed")
    remembered: Tensor
    count: Tensor

    def __init__(
        self,
        encoder: FaceBackbone,
        policy: Policy,
        head: Head | None = None,
        decoder: nn.Module | None = None,
        distillation_weight: float = 1.0,
        contrast_weight: float = 0.1,
        quality_weight: float = 0.1,
        recognition_weight: float = 0.0,
        temperature: float = 0.1,
        queue: int = 4096,
        quality_share: float = 1.0,
        mixed_share: float = 0.0,
        teacher: Any = None,
        teacher_share: float = 0.0,
        freeze: Sequence[str] = ("batchnorm",),
    ):
        super().__init__()
        weights = {
            "distillation": distillation_weight,
            "contrast": contrast_weight,
            "quality": quality_weight,
            "recognition": recognition_weight,
        }
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"method.{name}_weight must be at least 0; found {value}")
        if not distillation_weight and not contrast_weight:
            raise UsageError("method.distillation_weight and contrast_weight must not both be 0")
        if not 0 < temperature < float("inf"):
            raise UsageError(f"method.temperature must be above 0; found {temperature}")
        if queue < 0:
            raise UsageError(f"method.queue must be at least 0 embeddings; found {queue}")
        if not 0 < quality_share <= 1:
            raise UsageError(f"method.quality_share must be above 0 and at most 1; found {quality_share}")
        if not 0 <= mixed_share <= (0.9 if recognition_weight else 1):
            raise UsageError(
                f"method.mixed_share must be from 0 to 1, and at most 0.9 with a recognition loss; found {mixed_share}"
            )
        for name, part in (("quality", decoder), ("recognition", head)):
            if weights[name] and part is None:
                raise UsageError(
                    f"method.{name}_weight is {weights[name]}, and there is nothing to compute it with"
                )
        self.encoder: FaceBackbone = encoder
        self.policy = policy
        self.follows = teacher is None
        self.teacher: FaceBackbone = teacher_for(encoder, teacher, "fresh").requires_grad_(False)
        if self.follows:
            self.teacher.weights = None  # they are the encoder's, whatever that starts from
        for what in ("input_size", "channels", "embedding_size"):
            own, others = getattr(encoder, what), getattr(self.teacher, what)
            if own != others:
                raise UsageError(f"method.teacher has {what} {others}, the encoder {own}; they must agree")
        self.loss_weights = weights
        if not 0 <= teacher_share < 1 or (teacher_share and teacher is not None):
            raise UsageError(
                "method.teacher_share must be from 0 to below 1, and 0 with another network for a teacher; "
                f"found {teacher_share}"
            )
        self.teacher_share = float(teacher_share)
        if list(freeze) not in ([], ["batchnorm"]):
            raise UsageError(f"method.freeze must be [batchnorm] or []; found {freeze!r}")
        self.freeze = tuple(freeze)
        self.temperature, self.quality_share, self.mixed_share = temperature, quality_share, mixed_share
        self.register_buffer("remembered", torch.zeros(queue, encoder.embedding_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        if head is not None and recognition_weight:
            self.head: Head = head
            self.needs = ("image", "label", "seed")
        if decoder is not None and quality_weight:
            self.decoder = decoder.requires_grad_(False)
            self.must_load = {"decoder": "decoder"}
        if self.follows and encoder.weights is None:
            self.must_load = {**self.must_load, "encoder": "encoder"}
        if not self.follows and not isinstance(self.teacher, OnnxTeacher):
            self.must_load = {**self.must_load, "teacher": "encoder"}
        self.accumulable = not contrast_weight
        if freeze:
            freeze_batchnorm(encoder)
        self.train()

    def train(self, mode: bool = True) -> "Robustify":
        super().train(mode)
        self.teacher.eval()
        if hasattr(self, "decoder"):
            self.decoder.eval()
        if self.freeze:
            batchnorm_eval(self.encoder)
        return self

    def filled(self, parts: Collection[str]) -> list[str]:
        if not self.follows:
            return []
        self.teacher.load_state_dict(self.encoder.state_dict())
        return ["the encoder as it is now is the teacher"]

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(self._mixed(batch), self.policy)

    def _mixed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the last ``mixed_share`` of its images blended with others of this rank's."""
        images = as_float(batch["image"])
        n, unmixed = len(images), self._unmixed(len(images))
        if unmixed == n:
            return batch
        generator = torch.Generator().manual_seed(int(batch["seed"]) ^ MIXING)
        weight = torch.rand(n - unmixed, 1, 1, 1, generator=generator).to(images)
        other = torch.randint(n, (n - unmixed,), generator=generator).to(images.device)
        blended = images[unmixed:].lerp(images[other], weight)
        return {**batch, "image": torch.cat([images[:unmixed], blended])}

    def _unmixed(self, n: int) -> int:
        """How many of a batch of ``n`` are faces of somebody."""
        return n - round(n * self.mixed_share)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        feature_map = self.encoder.features(batch["image"])
        embedding = self.encoder.embed(feature_map)
        with (
            torch.no_grad()
        ):  # here and not in prepare, so that autocast, compilation and FSDP reach the teacher
            wanted = self.teacher(batch["hq"])
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        weights = self.loss_weights
        with torch.autocast(embedding.device.type, enabled=False):
            own, wanted = _directions(embedding), _directions(wanted)
            losses["distillation"] = 1 - (own * wanted).sum(1).mean()
            if weights["contrast"]:
                losses["contrast"] = self._contrast(own, wanted)
        if weights["quality"]:
            shown = max(1, round(len(own) * self.quality_share))
            drawn = self.decoder(feature_map[:shown]).float().clamp(0, 1)
            losses["quality"] = F.l1_loss(drawn, batch["hq"][:shown])
        if weights["recognition"]:
            somebody = self._unmixed(len(embedding))
            recognition = self.head.loss(embedding[:somebody], batch["label"][:somebody])
            losses["recognition"] = recognition.loss
            logs = {"accuracy": recognition.accuracy, **recognition.logs}
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return StepOutput(loss, {**{name: value.detach() for name, value in losses.items()}, **logs})

    def _contrast(self, own: Tensor, wanted: Tensor) -> Tensor:
        """KL of the relations to the batch and to the images before; these then remember the batch."""
        batch = of_all_ranks(wanted) if ranks() > 1 else wanted
        others = torch.cat([self.remembered.to(wanted.dtype), batch])
        # The newest are last; places that nothing has filled yet come first.
        empty = torch.arange(len(others), device=own.device) < len(self.remembered) - self.count
        relations = [
            ((each @ others.T) / self.temperature).masked_fill(empty, -1e4).log_softmax(1)
            for each in (own, wanted)
        ]
        if self.training:
            with torch.no_grad():
                self.count.add_(len(batch)).clamp_(max=len(self.remembered))
                self.remembered.copy_(others[len(batch) :])
        return F.kl_div(relations[0], relations[1], reduction="batchmean", log_target=True)


def _directions(embedding: Tensor) -> Tensor:
    """Embeddings [n, d] of length 1, at least float32."""
    embedding = at_least_float32(embedding)
    return unit(embedding, embedding.norm(dim=1))
