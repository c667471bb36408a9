"""Heads with a multiplicative margin, and the one that asks of each class apart: the SphereFace family."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.heads.base import check_range
from lrface.heads.margin import MarginHead, angle, falling_cosine


class SphereFace(MarginHead):
    """Angular softmax (Liu et al., CVPR 2017, eq. 7): logits |x| psi(theta_y), |x| cos(theta_j).

    psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m]. There is no scale: the length
    of the embedding stands for it. As psi alone rarely converges, the authors' code trains towards it: at the true
    class stands |x| (b cos(theta_y) + psi(theta_y)) / (1 + b), with b = max(start / (1 + decay * steps), end).

    Args:
        margin: m, a whole number; 4 in the paper.
        blend_start, blend_decay, blend_end: of b; the authors' training settings. Zeros are the bare formula.

    ``steps`` (buffer) counts the training batches. The rest as in :class:`MarginHead`.
    """

    steps: Tensor

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        margin: int = 4,
        blend_start: float = 1000.0,
        blend_decay: float = 0.12,
        blend_end: float = 5.0,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, 1.0, label_smoothing, discrepancy)
        check_range("margin", margin, 1, math.inf, "[)")
        for name, value in (
            ("blend_start", blend_start),
            ("blend_decay", blend_decay),
            ("blend_end", blend_end),
        ):
            check_range(name, value, 0, math.inf, "[)")
        self.multiplier = margin
        self.blend_start, self.blend_decay, self.blend_end = blend_start, blend_decay, blend_end
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def blend(self) -> Tensor:
        """b, a scalar."""
        return (self.blend_start / (1.0 + self.blend_decay * self.steps.double())).clamp_min(self.blend_end)

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        blend = self.blend().to(cosine.dtype)
        return (blend * cosine + falling_cosine(self.multiplier * angle(cosine))) / (1.0 + blend)

    def margin(
        self, cosine: Tensor, target: Tensor, norms: Tensor, target_cosine: Tensor | None = None
    ) -> Tensor:
        return norms[:, None] * super().margin(cosine, target, norms)

    @torch.no_grad()
    def statistics(self, cosine: Tensor, target: Tensor, norms: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.float64, device=cosine.device)  # that there was a batch is all

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        self.steps = self.steps + 1

    def logs(self, norms: Tensor) -> dict[str, Tensor]:
        return {"blend": self.blend()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.multiplier}"


class SphereFaceR(MarginHead):
    """SphereFace-R v1 (Liu et al., "SphereFace Revived", TPAMI 2022).

    Logits s cos(min(m theta_y, pi)), s cos(theta_j), with embeddings of fixed length ("hard feature
    normalisation"). The gradient is that of the formula; the authors' "characteristic gradient detachment", which
    takes the gradient of the plain cosine instead, is not used. Beyond theta_y = pi / m the true class has no
    gradient.

    Args:
        scale: s, 30 in the authors' code.
        margin: m, at least 1; 1.5 in the authors' code.

    The rest as in :class:`MarginHead`.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 30.0,
        margin: float = 1.5,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("margin", margin, 1, math.inf, "[)")
        self.multiplier = margin

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return torch.cos((self.multiplier * angle(cosine)).clamp_max(math.pi))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.multiplier}"


def starting_bias(identities: int, scale: float, margin: float, balance: float, power: float) -> float:
    """The b of SphereFace2 with which, at cosines of 0, the pull of the true class equals the push of all others."""
    # With u = exp(b), y and o the logits without b and z = balance / ((1 - balance) (identities - 1)),
    # z / (1 + u exp(y)) = u exp(o) / (1 + u exp(o)) is quadratic in u.
    similarity = 2.0 * 0.5**power - 1.0
    own, others = scale * (similarity - margin), scale * (similarity + margin)
    ratio = balance / ((1.0 - balance) * (identities - 1))
    rest = 1.0 - ratio
    root = math.sqrt(rest * rest + 4.0 * ratio * math.exp(own - others))
    if rest >= 0:
        return math.log(2.0 * ratio) - others - math.log(rest + root)
    return math.log((root - rest) / 2.0) - own  # the same, without the difference of nearly equal numbers


class SphereFace2(MarginHead):
    """SphereFace2-C (Wen et al., ICLR 2022, eq. 5): one binary classifier a class instead of a softmax.

    Logits z_y = r (g(cos(theta_y)) - m) + b and z_j = r (g(cos(theta_j)) + m) + b with g(c) = 2 ((c + 1) / 2)^t -
    1; the loss of a sample is w / r (lambda log(1 + exp(-z_y)) + (1 - lambda) sum_j log(1 + exp(z_j))). It is a
    sum over classes: that of shards (``criterion`` with -1 for a class that is elsewhere) adds up to that of the
    whole.

    ``bias`` (b, learned) starts where at cosines of 0 the pull of the true class equals the push of all others.

    Args:
        scale: r, 40 in the authors' code. margin: m, 0.4. balance: lambda, 0.7. power: t, 3. loss_weight: w, 50
        in the authors' code, 1 in the equation. Learning rates for a softmax head fit the former.

    The rest as in :class:`MarginHead`, without ``label_smoothing``.
    """

    softmax = False

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 40.0,
        margin: float = 0.4,
        balance: float = 0.7,
        power: float = 3.0,
        loss_weight: float = 50.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, 0.0, discrepancy)
        check_range("margin", margin, 0, 2)
        check_range("balance", balance, 0, 1, "()")
        check_range("power", power, 1, math.inf, "[)")
        check_range("loss_weight", loss_weight, 0, math.inf, "()")
        self.margin_size, self.balance, self.power, self.loss_weight = margin, balance, power, loss_weight
        bias = starting_bias(identities, scale, margin, balance, power)
        self.bias = nn.Parameter(torch.full((1,), bias))

    def margin(
        self, cosine: Tensor, target: Tensor, norms: Tensor, target_cosine: Tensor | None = None
    ) -> Tensor:
        column = target.clamp_min(0)[:, None]
        similarity = 2.0 * ((cosine + 1.0) / 2.0).clamp_min(0.0) ** self.power - 1.0
        logits = self.scale * (similarity + self.margin_size) + self.bias
        own = logits.gather(1, column)
        return logits.scatter(
            1, column, torch.where(target[:, None] >= 0, own - 2 * self.scale * self.margin_size, own)
        )

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        column = labels.clamp_min(0)[:, None]
        own = logits.gather(1, column)
        here = labels[:, None] >= 0
        pushed = (1.0 - self.balance) * F.softplus(logits).sum(1, keepdim=True)
        # The true class is taken out of the sum by what it put in, which keeps the sum a single pass.
        pulled = self.balance * F.softplus(-own) - (1.0 - self.balance) * F.softplus(own)
        return self.loss_weight / self.scale * (pushed + torch.where(here, pulled, 0.0)).mean()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, margin={self.margin_size}, balance={self.balance}, power={self.power}"
        )
