"""Knowledge distillation from a frozen teacher that sees the clean images (paper 001, Table 1 and section 3.4)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.heads import Head
from lrface.heads.margin import Softmax
from lrface.losses.distillation import Shape, build_distillation
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.methods.ranks import of_all_ranks, ranks
from lrface.models import build_backbone
from lrface.models.blocks import FaceBackbone


class Distil(Method):
    """L_softmax + weight * L(student's of the degraded image, teacher's of its clean original).

    The teacher is the classifier of stage 1, "under the same knowledge" as QualNet's decoder (paper 001, section 4.2): it
    is loaded by the stage (``load: [{from: encoder, to: teacher}]``, for kd also ``{from: head, to: teacher_head}``),
    frozen and in eval mode. It is no part of what is exported.

    A loss that compares the images of a batch with each other (pkt, sp) compares those of all ranks: a run of several
    takes the steps of one process.

    Args:
        encoder: backbone, the student.
        head: ``head.loss(embeddings, labels) -> HeadLoss``; a linear classifier (softmax) for kd, which compares logits.
        policy: what the student sees.
        teacher: the name of a backbone, or a mapping of its name and arguments.
        loss: kd, fitnet, pkt, vid or sp, or a mapping of the name and arguments, with ``at: features`` or
            ``at: embedding`` where it can compare both; see :mod:`lrface.losses.distillation`.
        weight: of the loss; by default the published one.

    Raises:
        UsageError: a negative weight, a teacher of other images, an unknown teacher or loss, kd without logits.
    """

    def __init__(
        self,
        encoder: FaceBackbone,
        head: Head,
        policy: Policy,
        teacher: Any,
        loss: Any,
        weight: float | None = None,
    ):
        super().__init__()
        self.encoder: FaceBackbone = encoder
        self.head = head
        self.policy = policy
        self.teacher: FaceBackbone = build_teacher(teacher).requires_grad_(False)
        if self.teacher.input_size != encoder.input_size:
            raise UsageError(
                f"method.teacher takes images of {self.teacher.input_size} x {self.teacher.input_size} pixels, the "
                f"student {encoder.input_size} x {encoder.input_size}; both see the same ones"
            )
        if self.teacher.channels != encoder.channels:
            raise UsageError("method.teacher and the student must both take RGB, or both grey images")
        shapes = {
            "features": (_shape_of_map(encoder), _shape_of_map(self.teacher)),
            "embedding": (Shape(encoder.embedding_size), Shape(self.teacher.embedding_size)),
        }
        if isinstance(head, Softmax):
            classes = Shape(head.linear.out_features)
            shapes["logits"] = (classes, classes)
        self.distillation, self.layer = build_distillation(loss, shapes)
        self.must_load = {"teacher": "encoder"}
        if self.layer == "logits":
            self.teacher_head = Softmax(self.teacher.embedding_size, shapes["logits"][1].channels)
            self.teacher_head.requires_grad_(False)
            self.must_load["teacher_head"] = "head"
        self.weight = self.distillation.published_weight if weight is None else weight
        if not 0 <= self.weight < float("inf"):
            raise UsageError(f"method.weight must be at least 0; found {weight}")
        self.accumulable = not self.distillation.relational
        self.teacher.eval()

    def train(self, mode: bool = True) -> "Distil":
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        labels = batch["label"]
        feature_map = self.encoder.features(batch["image"])
        embedding = self.encoder.embed(feature_map)
        recognition = self.head.loss(embedding, labels)
        own = self._compared(feature_map, embedding, self.head, labels)
        with (
            torch.no_grad()
        ):  # here and not in prepare, so that autocast, compilation and FSDP reach the teacher
            feature_map = self.teacher.features(batch["hq"])
            embedding = feature_map if self.layer == "features" else self.teacher.embed(feature_map)
            wanted = self._compared(feature_map, embedding, getattr(self, "teacher_head", None), labels)
        if self.distillation.relational and ranks() > 1:
            own, wanted = of_all_ranks(own), of_all_ranks(wanted)
        distillation = self.distillation(own, wanted)
        return StepOutput(
            recognition.loss + self.weight * distillation,
            {
                "recognition": recognition.loss.detach(),
                "distillation": distillation.detach(),
                "accuracy": recognition.accuracy,
                **recognition.logs,
            },
        )

    def _compared(
        self, feature_map: Tensor, embedding: Tensor, head: nn.Module | None, labels: Tensor
    ) -> Tensor:
        """What the loss sees of a network."""
        if self.layer == "logits":
            assert head is not None
            return head(embedding, labels)
        return feature_map if self.layer == "features" else embedding


def build_teacher(teacher: Any) -> FaceBackbone:
    """The backbone of this name, or of a mapping with a name and arguments. Raises UsageError."""
    named = {"name": teacher} if isinstance(teacher, str) else teacher
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(
            f"method.teacher must be the name of a backbone, or a mapping with a name and arguments; found {teacher!r}"
        )
    try:
        return build_backbone(**named)
    except UsageError as error:
        raise UsageError(f"method.teacher: {error}") from error


def _shape_of_map(network: FaceBackbone) -> Shape:
    return Shape(network.feature_channels, network.feature_size)
