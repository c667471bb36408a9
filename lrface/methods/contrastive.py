"""A student that recovers a frozen teacher's embedding of the clean image from a degraded one (paper 002)."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.losses.contrastive import check_contrastive, contrastive_loss
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.methods.distil import build_teacher
from lrface.methods.ranks import of_all_ranks, ranks
from lrface.models.blocks import FaceBackbone
from lrface.models.onnx_network import OnnxBackbone
from lrface.models.onnx_teacher import OnnxTeacher
from lrface.registry import Registry

STARTS = ("teacher", "fresh")

TEACHERS: Registry[FaceBackbone] = Registry("method.teacher")
"""Teachers that are no backbones: they are never trained."""
TEACHERS.register("onnx", OnnxTeacher)


class Contrastive(Method):
    """The loss of lrface.losses.contrastive between the student's embeddings of degraded images and the teacher's of their
    clean originals, which are mirrored and cropped alike.

    No labels are read, and there is no head. The images of all ranks are contrasted with each other, so that a run of
    several takes the steps of one process.

    The teacher is what the stage loads: ``load: [{from: encoder, to: teacher}]`` from the stage before,
    ``{path: RUN, to: teacher}`` from a run, or the file that a library's backbone names with ``weights``. It stays
    frozen and in eval mode, and is no part of what is exported.

    Args:
        encoder: backbone, the student.
        policy: the forward operator A: what the student sees.
        teacher: the name of a backbone, or a mapping of its name and arguments; ``{name: onnx, path: FILE}`` for an ONNX
            file (:class:`~lrface.models.onnx_teacher.OnnxTeacher`, or a PyTorch network where the student is one of an
            ONNX file and starts from it). By default a network as the student's, with its weights where a file has them.
        variant: student_teacher (the paper's), student_student, student_both, nt_xent or mse.
        temperature: tau, 0.1 in the paper.
        start: "teacher" copies the teacher's weights to the student once they are loaded, as in the paper, unless the
            stage loads the student too; "fresh" leaves the student as it is.
        chunk: side of a block of similarities; see :func:`~lrface.losses.contrastive.contrastive_loss`.

    Where the student's embedding is of another width, a linear projection that is trained with it follows.

    Raises:
        UsageError: an unknown variant, teacher or start, a temperature that is not above 0, a teacher of other images,
            a student that cannot start from the teacher.
    """

    needs = ("image", "seed")

    def __init__(
        self,
        encoder: FaceBackbone,
        policy: Policy,
        teacher: Any = None,
        variant: str = "student_teacher",
        temperature: float = 0.1,
        start: str = "teacher",
        chunk: int = 1024,
    ):
        super().__init__()
        check_contrastive(variant, temperature, chunk)
        if start not in STARTS:
            raise UsageError(f"method.start must be {' or '.join(STARTS)}; found {start!r}")
        self.encoder: FaceBackbone = encoder
        self.policy = policy
        self.teacher = teacher_for(encoder, teacher, start).requires_grad_(False)
        self.variant, self.temperature, self.start, self.chunk = variant, temperature, start, chunk
        for what, own, wanted in (
            ("pixels of a side", encoder.input_size, self.teacher.input_size),
            ("channels", encoder.channels, self.teacher.channels),
        ):
            if own != wanted:
                raise UsageError(
                    f"method.teacher takes images of {wanted} {what}, the student of {own}; both see the same ones"
                )
        if start == "teacher" and _shapes(encoder) != _shapes(self.teacher):
            raise UsageError(
                "method.start: the student is of another architecture than the teacher and cannot start from its weights; "
                "take the teacher's network as backbone, or set method.start=fresh"
            )
        self.projection: nn.Module = nn.Identity()
        if encoder.embedding_size != self.teacher.embedding_size:
            self.projection = nn.Linear(encoder.embedding_size, self.teacher.embedding_size)
        # An ONNX file brings its weights.
        self.must_load = {} if isinstance(self.teacher, OnnxTeacher) else {"teacher": "encoder"}
        self.accumulable = variant == "mse"
        self.teacher.eval()

    def train(self, mode: bool = True) -> "Contrastive":
        super().train(mode)
        self.teacher.eval()
        return self

    def filled(self, parts: Collection[str]) -> list[str]:
        if self.start == "fresh" or any(part.partition(".")[0] == "encoder" for part in parts):
            return []
        self.encoder.load_state_dict(self.teacher.state_dict())
        return ["encoder starts from the teacher"]

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        own = self.projection(self.encoder(batch["image"]))
        with (
            torch.no_grad()
        ):  # here and not in prepare, so that autocast, compilation and FSDP reach the teacher
            wanted = self.teacher(batch["hq"])
        if self.variant != "mse" and ranks() > 1:
            own, wanted = of_all_ranks(own), of_all_ranks(wanted)
        found = contrastive_loss(own, wanted, self.temperature, self.variant, self.chunk)
        logs = {} if self.variant == "mse" else {"pull": found.pull.detach(), "push": found.push.detach()}
        scale = 1.0 if self.variant == "mse" else self.temperature
        return StepOutput(found.loss, {**logs, "similarity": -scale * found.pull.detach()})


def teacher_for(encoder: FaceBackbone, teacher: Any, start: str) -> FaceBackbone:
    """A recipe's ``method.teacher``: None for a copy of the encoder; see :class:`Contrastive`."""
    if teacher is None:
        return copy.deepcopy(encoder)
    # A student that is an ONNX file's network can start from such a teacher's weights only where it is one as well.
    same = isinstance(encoder, OnnxBackbone) and start == "teacher"
    if not same and isinstance(teacher, Mapping) and teacher.get("name") in TEACHERS.names():
        return TEACHERS.build(**teacher)
    return build_teacher(teacher)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}
