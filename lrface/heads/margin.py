"""The seam of classification heads, and the heads with a fixed margin or none.

A head owns the class weights. What it does to the cosines is apart from the weights, in :meth:`MarginHead.margin`,
which works on any subset of the classes: a head that holds only a shard or a sample of them calls the same method.

Angles are always computed in float32 (float64 for float64), whatever the autocast precision: in bfloat16 a cosine
near 1 has steps of 1/256, wider than the margins that are taught. No margin is detached: gradients are those of
the formulas, except at angles of 0 and pi, where the sine has none in the cosine and 0 stands for its slope.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.heads.base import Head, HeadLoss, accuracy, at_least_float32, check_range, check_sizes

# An embedding shorter than this has no direction: its cosines are 0 and pass no gradient on, instead of one of 1e12.
SHORTEST = 1e-6
# Bound of DiscFace's xi.
LONGEST_XI = 0.05


def unit(embeddings: Tensor, norms: Tensor) -> Tensor:
    """Embeddings [n, d] of length 1, from their ``norms`` [n]; 0 with no gradient where there is no direction."""
    norms = norms[:, None]
    return torch.where(norms < SHORTEST, torch.zeros_like(embeddings), embeddings / norms.clamp_min(SHORTEST))


def sine(cosine: Tensor) -> Tensor:
    """The sine, at least 3e-5, of an angle in [0, pi] with this cosine.

    The root's slope is infinite at a cosine of +-1: the floor keeps the gradient finite there (it is 0).
    """
    return torch.sqrt((1.0 - cosine * cosine).clamp_min(1e-9))


def angle(cosine: Tensor) -> Tensor:
    """The angle in [3e-5, pi - 3e-5] of a cosine, with a finite gradient everywhere."""
    return torch.atan2(sine(cosine), cosine)


def shifted_cosine(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """cos(theta + margin) of a cosine of theta [n], for a margin in [0, pi), a number or one a sample [n].

    Where theta + margin passes pi, where cos(theta + margin) would rise again, it is
    cos(theta) - margin sin(margin), as in the authors' code of ArcFace: it goes on falling, with the slope of the
    plain cosine.
    """
    cosine_margin: Tensor | float = margin.cos() if isinstance(margin, Tensor) else math.cos(margin)
    sine_margin: Tensor | float = margin.sin() if isinstance(margin, Tensor) else math.sin(margin)
    shifted = cosine * cosine_margin - sine(cosine) * sine_margin
    return torch.where(cosine > -cosine_margin, shifted, cosine - margin * sine_margin)


def falling_cosine(phi: Tensor) -> Tensor:
    """A-Softmax's psi: (-1)^k cos(phi) - 2k with k = floor(phi / pi), the cosine that never rises; phi at least 0."""
    turns = torch.floor(phi.detach() / math.pi)
    return (1.0 - 2.0 * torch.remainder(turns, 2.0)) * torch.cos(phi) - 2.0 * turns


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over the processes of a distributed run; ``values`` itself in one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values


class MarginHead(Head):
    """Cosines between embeddings and class weights, a margin at the true class, and the loss of the outcome.

    Who holds only some of the classes (a shard, a sample) uses, with ``cosine`` [n, c] of all n samples to its c
    classes and ``target`` int64 [n], the column of the true class or -1 where that is not among them:

    1. ``statistics(cosine, target, norms)``, in training only: to be summed over the shards, for ``update``.
    2. ``margin(cosine, target, norms, target_cosine)``: the logits of these columns.
    3. ``penalty(embeddings, weight, target)``: a further loss a sample, or None; to be summed over the shards,
       then averaged over the samples.

    For heads that are not ``softmax`` the loss of the whole is the sum of the shards' ``criterion``.

    Args:
        embedding_size: d, width of the embedding.
        identities: number of classes.
        scale: s, what the cosines are multiplied by.
        label_smoothing: share of the target probability that is spread over all classes (Szegedy et al., CVPR 2016,
            section 7), in [0, 1).
        discrepancy: lambda of DiscFace's term, see :meth:`penalty`; 0 leaves it out.

    Attributes:
        weight: [identities, embedding_size], one row a class; only its direction counts. None where another module
            holds the weights (:func:`lrface.heads.build_margin`): then only the three methods above and
            ``update`` work.
        needs_target_cosine: whether ``margin`` reads ``target_cosine`` for samples whose target is -1.
        softmax: whether the loss is the cross-entropy of the softmax over all classes.

    Raises:
        UsageError: a value out of range, by name.
    """

    needs_target_cosine = False
    softmax = True
    xi: nn.Parameter | None

    def __init__(
        self, embedding_size: int, identities: int, scale: float, label_smoothing: float, discrepancy: float
    ):
        super().__init__()
        check_sizes(embedding_size, identities)
        check_range("label_smoothing", label_smoothing, 0, 1, "[)")
        check_range("scale", scale, 0, math.inf, "()")
        check_range("discrepancy", discrepancy, 0, math.inf, "[)")
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.discrepancy = discrepancy
        self.register_parameter("xi", nn.Parameter(torch.zeros(embedding_size)) if discrepancy else None)
        self.weight = nn.Parameter(torch.empty(identities, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """What stands in place of the cosine to the true class: [n] -> [n]. ``norms`` [n]: of the embeddings."""
        raise TypeError(f"{type(self).__name__} must define at_true_class or margin")

    def margin(
        self, cosine: Tensor, target: Tensor, norms: Tensor, target_cosine: Tensor | None = None
    ) -> Tensor:
        """Logits of some classes. Changes nothing: buffers are read only.

        Args:
            cosine: float32 or float64 [n, c], cosines to these c classes, c at least 1.
            target: int64 [n], column of the true class, -1 where it is not among these columns.
            norms: [n], lengths of the embeddings, not detached (MagFace's margin has a gradient through them).
            target_cosine: [n], the plain cosine to the true class wherever that lies. Read only by heads that have
                ``needs_target_cosine``, and there needed by samples whose target is -1.

        Returns:
            [n, c], of cosine's dtype.
        """
        column = target.clamp_min(0)[:, None]
        own = cosine.gather(1, column)
        changed = torch.where(target[:, None] >= 0, self.at_true_class(own[:, 0], norms)[:, None], own)
        return self.scale * cosine.scatter(1, column, changed)

    @torch.no_grad()
    def statistics(self, cosine: Tensor, target: Tensor, norms: Tensor) -> Tensor:
        """What ``update`` learns from this batch: sums, float64 [k], over the samples whose target is not -1.

        So each sample counts once however the classes are split, and the sum of this over shards and ranks is
        that of the whole batch. k is 0 for a head that keeps no statistics.
        """
        return torch.zeros(0, dtype=torch.float64, device=cosine.device)

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move the running statistics (buffers, saved with checkpoints) by those of a batch, summed over all ranks.

        A head puts new tensors in place of the buffers instead of writing into them: a compiled backward pass may
        compute anew from a buffer what the forward pass made of it, and must find the value of then.
        """

    def penalty(self, embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor | None:
        """A further loss of each sample whose true class is here, 0 for the others, or None for a head without one.

        Here DiscFace's (Kim et al., ACCV 2020), which any of these heads can have: the length of
        x/|x| - w_y/|w_y| - xi, times lambda: what one learned vector xi, the same for all classes and of a length
        of at most 0.05, leaves of the way from the class to the sample.

        Args:
            embeddings: float [n, d], as the encoder gave them.
            weight: float [c, d], these classes' weights.
            target: int64 [n], as in ``margin``.

        Returns:
            [n], at least float32.
        """
        if self.xi is None:
            return None
        embeddings, own = at_least_float32(embeddings), at_least_float32(weight)[target.clamp_min(0)]
        xi = self.xi * (LONGEST_XI / self.xi.norm().clamp_min(LONGEST_XI))
        left = unit(embeddings, embeddings.norm(dim=1)) - F.normalize(own) - xi
        return torch.where(target >= 0, self.discrepancy * left.norm(dim=1), 0.0)

    def logs(self, norms: Tensor) -> dict[str, Tensor]:
        """What is worth showing of the running statistics and the embeddings' lengths [n]: detached scalars."""
        return {}

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of the logits [n, identities] of all classes."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Cosines [n, identities] between embeddings [n, d] and the class weights, at least float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = at_least_float32(embeddings)
            return F.linear(
                unit(embeddings, embeddings.norm(dim=1)), F.normalize(at_least_float32(self.weight))
            )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Logits [n, identities], at least float32, of embeddings [n, d] with labels int64 [n]; no statistics move."""
        with torch.autocast(embeddings.device.type, enabled=False):
            norms = at_least_float32(embeddings).norm(dim=1)
            return self.margin(self.cosines(embeddings), labels, norms)

    def loss(self, embeddings: Tensor, labels: Tensor) -> HeadLoss:
        """The loss of a batch: embeddings float [n, d], labels int64 [n]. In training mode statistics move first."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = at_least_float32(embeddings)
            norms = embeddings.norm(dim=1)
            cosine = self.cosines(embeddings)
            if self.training:
                statistics = self.statistics(cosine, labels, norms)
                if len(statistics):
                    self.update(sum_over_ranks(statistics))
            logits = self.margin(cosine, labels, norms)
            loss = self.criterion(logits, labels)
            logs = self.logs(norms)
            penalty = self.penalty(embeddings, self.weight, labels)
            if penalty is not None:
                loss = loss + penalty.mean()
                logs["penalty"] = penalty.detach().mean()
            return HeadLoss(loss, accuracy(logits, labels), logs)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape) if self.weight is not None else None}, scale={self.scale}"


class CosFace(MarginHead):
    """Large margin cosine loss (Wang et al., CVPR 2018, eq. 4): logits s (cos(theta_j) - m [j = y]).

    Args:
        scale: s, 30 in QualNet (paper 001, section 4.1).
        margin: m, 0.25 in QualNet. The CosFace paper has 64 and 0.35.

    The rest as in :class:`MarginHead`.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 30.0,
        margin: float = 0.25,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("margin", margin, 0, 2)
        self.margin_size = margin

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - self.margin_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin_size}"


class ArcFace(MarginHead):
    """Additive angular margin (Deng et al., CVPR 2019, eq. 3): logits s cos(theta_y + m), s cos(theta_j).

    Where theta_y + m passes pi: see :func:`shifted_cosine`. The gradient is that of the formula: for the true class
    d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta), not 1 as where the margin is computed without
    autograd (arcface_torch's ``with torch.no_grad()``).

    Args:
        scale: s, 64 in the paper (section 3.2).
        margin: m, radians, 0.5 in the paper.

    The rest as in :class:`MarginHead`.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("margin", margin, 0, math.pi, "[)")
        self.margin_size = margin

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return shifted_cosine(cosine, self.margin_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin_size}"


class DiscFace(ArcFace):
    """ArcFace with DiscFace's discrepancy term (Kim et al., ACCV 2020): see :meth:`MarginHead.penalty`.

    Args:
        discrepancy: lambda. Its default and the bound of xi are those of a public re-implementation, in want of the
            authors'.

    The rest as in :class:`ArcFace`. Every other margin head takes ``discrepancy`` as well.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.5,
    ):
        super().__init__(embedding_size, identities, scale, margin, label_smoothing, discrepancy)


class CombinedMargin(MarginHead):
    """The margins of SphereFace, ArcFace and CosFace in one (Deng et al., CVPR 2019, eq. 4).

    Logits s (cos(m1 theta_y + m2) - m3), s cos(theta_j). Where phi = m1 theta_y + m2 passes pi, cos(phi) is
    replaced by (-1)^k cos(phi) - 2k with k = floor(phi / pi), which goes on falling without a jump
    (:func:`falling_cosine`). (1, 0, m) is CosFace; (1, m, 0) is ArcFace up to that place.

    Args:
        scale: s, 64 in the paper.
        m1: factor of the angle, above 0.
        m2: added angle, radians.
        m3: taken off the cosine. The defaults (1, 0.3, 0.2) are the paper's CM1 (Table 2); CM2 is (0.9, 0.4, 0.15).

    The rest as in :class:`MarginHead`.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("m1", m1, 0, math.inf, "()")
        check_range("m2", m2, 0, math.pi, "[)")
        check_range("m3", m3, 0, 2)
        self.m1, self.m2, self.m3 = m1, m2, m3

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        if self.m1 == 1 and self.m2 == 0:  # no way round by the angle, whose slope is infinite at its ends
            return cosine - self.m3
        return falling_cosine(self.m1 * angle(cosine) + self.m2) - self.m3

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, m1={self.m1}, m2={self.m2}, m3={self.m3}"


class Softmax(Head):
    """A plain linear classifier: ``forward(embeddings float [n, d], labels)`` gives logits [n, identities],
    at least float32.

    Args:
        label_smoothing: as in :class:`MarginHead`.
    """

    def __init__(self, embedding_size: int, identities: int, label_smoothing: float = 0.0):
        super().__init__()
        check_sizes(embedding_size, identities)
        check_range("label_smoothing", label_smoothing, 0, 1, "[)")
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(embedding_size, identities)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return at_least_float32(self.linear(embeddings))

    def loss(self, embeddings: Tensor, labels: Tensor) -> HeadLoss:
        """The cross-entropy of a batch: embeddings float [n, d], labels int64 [n]."""
        logits = self(embeddings, labels)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return HeadLoss(loss, accuracy(logits, labels))
