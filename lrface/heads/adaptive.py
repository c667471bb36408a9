"""Heads whose margin follows the sample: its quality (the length of its embedding) or the state of training."""

import math

import torch
from torch import Tensor

from lrface.errors import UsageError
from lrface.heads.base import at_least_float32, check_range
from lrface.heads.margin import MarginHead, shifted_cosine, sine


class AdaFace(MarginHead):
    """Quality adaptive margin (AdaFace, Kim et al., CVPR 2022, eqs. 16-19).

    Logits s (cos(theta_y + g_angle) - g_add), s cos(theta_j). With z = (|x| - mean) / (std / h), clipped to
    [-1, 1] and without a gradient: g_angle = -m z, g_add = m z + m. mean and std are running ones of the lengths
    of the embeddings of a batch, lengths being clipped to [0.001, 100] as in the authors' code. theta_y + g_angle
    is clipped to [0, pi], and has no gradient where it is.

    Args:
        scale: s, 64.
        margin: m, 0.4 in the paper.
        concentration: h, 0.333 in the paper: lengths within 3 standard deviations are not clipped.
        momentum: share of the running statistics that a batch leaves, 0.99 in the paper.

    ``norm_mean`` and ``norm_std`` (buffers) start as 20 and 100, as in the authors' code. Over ranks they are
    those of the whole batch. The rest as in :class:`MarginHead`.
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.99,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("margin", margin, 0, 1)
        check_range("concentration", concentration, 0, math.inf, "()")
        check_range("momentum", momentum, 0, 1, "[)")
        self.margin_size, self.concentration, self.momentum = margin, concentration, momentum
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    def quality(self, norms: Tensor) -> Tensor:
        """z in [-1, 1] of lengths [n], detached."""
        deviation = norms.detach().clamp(1e-3, 100.0) - self.norm_mean
        return (deviation * self.concentration / (self.norm_std + 1e-3)).clamp(-1.0, 1.0).to(norms.dtype)

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        quality = self.quality(norms)
        turn = -self.margin_size * quality
        turned = cosine * turn.cos() - sine(cosine) * turn.sin()
        # Past 0: theta < -turn; past pi: theta > pi - turn.
        turned = torch.where((turn < 0) & (cosine > turn.cos()), 1.0, turned)
        turned = torch.where((turn > 0) & (cosine < -turn.cos()), -1.0, turned)
        return turned - (self.margin_size * quality + self.margin_size)

    @torch.no_grad()
    def statistics(self, cosine: Tensor, target: Tensor, norms: Tensor) -> Tensor:
        here = (target >= 0).double()
        norms = norms.double().clamp(1e-3, 100.0)
        return torch.stack([here.sum(), (here * norms).sum(), (here * norms * norms).sum()])

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        count, total, squares = statistics.unbind()
        mean = total / count.clamp_min(1.0)
        variance = (squares - mean * total).clamp_min(0.0) / (count - 1.0).clamp_min(1.0)
        # A single embedding has no deviation, none has no mean: then the running value stays.
        mean = torch.where(count > 0, mean, self.norm_mean)
        deviation = torch.where(count > 1, variance.sqrt(), self.norm_std)
        self.norm_mean = self.norm_mean.lerp(mean.to(self.norm_mean.dtype), 1.0 - self.momentum)
        self.norm_std = self.norm_std.lerp(deviation.to(self.norm_std.dtype), 1.0 - self.momentum)

    def logs(self, norms: Tensor) -> dict[str, Tensor]:
        return {"norm_mean": self.norm_mean, "norm_std": self.norm_std}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin_size}, concentration={self.concentration}"


class MagFace(MarginHead):
    """Magnitude-aware margin (MagFace, Meng et al., CVPR 2021, section 3.2).

    Logits s cos(theta_y + m(a)), s cos(theta_j); lambda_g g(a) is added to the loss. a = |x| clipped to
    [lower_norm, upper_norm]; m(a) rises linearly from lower_margin to upper_margin over that range; g(a) = 1/a +
    a/upper_norm^2 (:meth:`penalty`) falls with a and makes good faces long. Both have a gradient through the
    length; a clipped length has none. Where theta_y + m(a) passes pi: see :func:`shifted_cosine`.

    The range of lengths suits embeddings of 512 values; a narrow embedding may lie below it and then learns as with
    ArcFace with lower_margin.

    Args:
        scale: s, 64.
        lower_norm, upper_norm: l_a and u_a, 10 and 110 in the paper.
        lower_margin, upper_margin: l_m and u_m, radians, 0.45 and 0.8 in the paper.
        norm_weight: lambda_g, 35 in the paper.

    The rest as in :class:`MarginHead`.
    """

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        lower_norm: float = 10.0,
        upper_norm: float = 110.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        norm_weight: float = 35.0,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("lower_norm", lower_norm, 0, math.inf, "()")
        check_range("lower_margin", lower_margin, 0, math.pi, "[)")
        check_range("upper_margin", upper_margin, 0, math.pi, "[)")
        check_range("norm_weight", norm_weight, 0, math.inf, "[)")
        if not lower_norm < upper_norm < math.inf:
            raise UsageError(
                f"head.upper_norm must be above head.lower_norm; found {upper_norm} and {lower_norm}"
            )
        self.lower_norm, self.upper_norm = lower_norm, upper_norm
        self.lower_margin, self.upper_margin = lower_margin, upper_margin
        self.norm_weight = norm_weight

    def at_true_class(self, cosine: Tensor, norms: Tensor) -> Tensor:
        slope = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        excess = norms.clamp(self.lower_norm, self.upper_norm) - self.lower_norm
        return shifted_cosine(cosine, self.lower_margin + slope * excess)

    def penalty(self, embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        norms = at_least_float32(embeddings).norm(dim=1).clamp(self.lower_norm, self.upper_norm)
        own = torch.where(target >= 0, self.norm_weight * (1.0 / norms + norms / self.upper_norm**2), 0.0)
        discrepancy = super().penalty(embeddings, weight, target)
        return own if discrepancy is None else own + discrepancy

    def logs(self, norms: Tensor) -> dict[str, Tensor]:
        return {"norm": norms.detach().mean()}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, norms={self.lower_norm}..{self.upper_norm}, "
            f"margins={self.lower_margin}..{self.upper_margin}, norm_weight={self.norm_weight}"
        )


class CurricularFace(MarginHead):
    """Curriculum over hard negatives (CurricularFace, Huang et al., CVPR 2020, section 3.2).

    Logits s cos(theta_y + m), s N(t, cos(theta_j)). N is cos(theta_j) for an easy class, one with cos(theta_j) <=
    cos(theta_y + m), and cos(theta_j) (t + cos(theta_j)) for a hard one. t follows the mean cosine to the true
    class, so hard classes count less early in training and more late. Where theta_y + m passes pi: see
    :func:`shifted_cosine`.

    Args:
        scale: s, 64.
        margin: m, radians, 0.5.
        momentum: share of t that a batch leaves, 0.99 in the authors' code (its 1 - alpha; the paper
            writes eq. 9 the other way round).

    ``t`` (buffer) starts as 0; over ranks it is that of the whole batch. The rest as in :class:`MarginHead`.
    """

    needs_target_cosine = True
    t: Tensor

    def __init__(
        self,
        embedding_size: int,
        identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        momentum: float = 0.99,
        label_smoothing: float = 0.0,
        discrepancy: float = 0.0,
    ):
        super().__init__(embedding_size, identities, scale, label_smoothing, discrepancy)
        check_range("margin", margin, 0, math.pi, "[)")
        check_range("momentum", momentum, 0, 1, "[)")
        self.margin_size, self.momentum = margin, momentum
        self.register_buffer("t", torch.tensor(0.0))

    def margin(
        self, cosine: Tensor, target: Tensor, norms: Tensor, target_cosine: Tensor | None = None
    ) -> Tensor:
        column, here = target.clamp_min(0)[:, None], target[:, None] >= 0
        # Without the cosine of a class that is elsewhere nothing here counts as hard.
        elsewhere = torch.ones_like(norms) if target_cosine is None else target_cosine.to(cosine.dtype)
        shifted = shifted_cosine(
            torch.where(here, cosine.gather(1, column), elsewhere[:, None]), self.margin_size
        )
        negatives = torch.where(cosine > shifted, cosine * (self.t.to(cosine.dtype) + cosine), cosine)
        own = torch.where(here, shifted, negatives.gather(1, column))
        return self.scale * negatives.scatter(1, column, own)

    @torch.no_grad()
    def statistics(self, cosine: Tensor, target: Tensor, norms: Tensor) -> Tensor:
        here = target >= 0
        own = cosine.gather(1, target.clamp_min(0)[:, None])[:, 0].double()
        return torch.stack([here.double().sum(), torch.where(here, own, 0.0).sum()])

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        count, total = statistics.unbind()
        mean = torch.where(count > 0, total / count.clamp_min(1.0), self.t)
        self.t = self.t.lerp(mean.to(self.t.dtype), 1.0 - self.momentum)

    def logs(self, norms: Tensor) -> dict[str, Tensor]:
        return {"t": self.t}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin_size}, momentum={self.momentum}"
