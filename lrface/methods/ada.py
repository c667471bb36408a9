"""AdversarialAugment (paper 003): each image is corrupted so that the classifier as it is errs, and is learned from."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.data.dataset import as_float
from lrface.degrade.adversarial import Attack, Perturbed, perturb_against
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.heads import Head, PartialHead
from lrface.methods.base import Method, StepOutput, drawn, without_seed
from lrface.methods.consistency import check_consistency, consistent_step
from lrface.models import build_corruption_network
from lrface.models.blocks import FaceBackbone


class AdA(Method):
    """The head's loss on images that went through a corruption network with perturbed weights (paper 003, eq. 3).

    The stages of the paper's pipeline (appendix A): images are framed (cropped and mirrored), attacked, mixed with
    their clean originals where they have lost too much, and then degraded by the policy: nothing more with ``clean``,
    AugMix with ``augmix``, lower resolution with the policy of faces. What DeepAugment makes is a training set.

    In the attack the classifier is in eval mode: each image is attacked by itself, and no statistics move. With a margin
    head the attack maximises the loss that is learned, margin included.

    Args:
        encoder: backbone.
        head: one with a softmax over all classes in this process.
        policy: frames images before the attack and degrades them after it.
        network: the corruption network, a name in :data:`lrface.models.CORRUPTION_NETWORKS` or a mapping with its
            arguments and, for published weights, ``weights``: a file.
        radius: nu, how far each block's weights go, relative to their norm.
        steps, step_size, chunk, precision: see :class:`~lrface.degrade.adversarial.Attack`.
        similarity: least SSIM of an attacked image with its original (appendix G); -1 for no limit.
        consistency: weight of the Jensen-Shannon divergence between the predictions for the attacked image and for
            ``views`` degraded views of it, as AugMix has it (lrface.methods.consistency); 0, as in paper 003, trains on
            one degraded view.
        views: degraded views of an image where ``consistency`` is above 0.

    Raises:
        UsageError: a value out of range, a head that does not fit, an unknown network.
    """

    splittable = False

    def __init__(
        self,
        encoder: FaceBackbone,
        head: Head,
        policy: Policy,
        network: Any = "edsr",
        radius: float = 0.015,
        steps: int = 10,
        step_size: float = 0.25,
        chunk: int = 32,
        precision: str = "float32",
        similarity: float = 0.3,
        consistency: float = 0.0,
        views: int = 2,
    ):
        super().__init__()
        self.attack = Attack(radius, steps, step_size, chunk, precision)
        if not -1 <= similarity <= 1:
            raise UsageError(f"method.similarity must be between -1 and 1; found {similarity}")
        if consistency:
            check_consistency(head, consistency, views, "consistency")
        if isinstance(head, PartialHead) or not getattr(head, "softmax", True):
            raise UsageError(
                f"the method ada maximises the cross-entropy over all classes, which {type(head).__name__} does not give; "
                "choose a head such as softmax or cosface"
            )
        self.encoder = encoder
        self.head = head
        self.policy = policy
        self.corruption_network = build_corruption_network(network).eval().requires_grad_(False)
        if isinstance(network, str) or "weights" not in network:
            self.must_load = {"corruption_network": "encoder"}
        self.similarity = similarity
        self.consistency = consistency
        self.views = views

    def train(self, mode: bool = True) -> "AdA":
        super().train(mode)
        self.corruption_network.eval()
        return self

    def attacked(self, images: Tensor, labels: Tensor, seeds: Tensor) -> Perturbed:
        """The attack on framed images float [n, 3, h, w] with labels [n]; seeds int64 [n] of their random starts."""

        def loss(corrupted: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.encoder(corrupted), labels), labels, reduction="none")

        training = self.training
        self.eval()
        try:
            return perturb_against(
                loss, images, labels, self.corruption_network, seeds, self.attack, self.similarity
            )
        finally:
            self.train(training)

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        parameters = drawn(batch, self.policy, self.views if self.consistency else 1)
        hq = self.policy.frame(as_float(batch["image"]), parameters[0])
        found = self.attacked(hq, batch["label"], image_seeds(batch).to(hq.device))
        views = [self.policy.degrade(found.images, own) for own in parameters]
        ready = {
            **without_seed(batch),
            "image": views[0],
            "hq": hq,
            "similarity": found.similarity,
            "limited": (found.gamma < 1).float(),
            "start": found.losses[0] if len(found.losses) else torch.zeros_like(found.similarity),
        }
        if self.consistency:
            ready["image"] = found.images
            ready |= {f"view {number}": view for number, view in enumerate(views)}
        return ready

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        if self.consistency:
            views = [batch[f"view {number}"] for number in range(self.views)]
            output = consistent_step(
                self.encoder, self.head, [batch["image"], *views], batch["label"], self.consistency
            )
        else:
            recognition = self.head.loss(self.encoder(batch["image"]), batch["label"])
            output = StepOutput(recognition.loss, {"accuracy": recognition.accuracy, **recognition.logs})
        shown = {key: batch[key].mean() for key in ("similarity", "limited", "start")}
        return StepOutput(output.loss, {**output.logs, **shown})


def image_seeds(batch: dict[str, Any]) -> Tensor:
    """A seed for each image of a batch or of a rank's share of it (``part``), a function of ``seed``: int64 [n]."""
    count = len(batch["image"])
    rank, ranks = batch.get("part", (0, 1))
    whole = Draws(torch.tensor([int(batch["seed"])])).bits("AdA", count * ranks)[0].long()
    return whole[rank * count : (rank + 1) * count]
