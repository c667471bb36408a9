"""Heads with and without a margin. Angles are always computed in float32, whatever the autocast precision:
in bfloat16 a cosine near 1 has steps of 1/256, wider than the margins that are taught."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_sizes(embedding_size: int, identities: int) -> None:
    if embedding_size < 1 or identities < 2:
        raise UsageError(
            f"a head needs an embedding of at least 1 value and at least 2 identities; "
            f"found {embedding_size} and {identities}"
        )


class _CosineHead(nn.Module):
    """Cosines between embeddings and class weights; what the margins act on."""

    def __init__(self, embedding_size: int, identities: int, scale: float, margin: float):
        super().__init__()
        _check_sizes(embedding_size, identities)
        if scale <= 0 or margin < 0:
            raise UsageError(
                f"head.scale must be above 0 and head.margin at least 0; found {scale} and {margin}"
            )
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(identities, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    def cosines(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(
                F.normalize(at_least_float32(embeddings)), F.normalize(at_least_float32(self.weight))
            )

    def extra_repr(self) -> str:
        identities, embedding_size = self.weight.shape
        return f"{embedding_size} -> {identities}, scale={self.scale}, margin={self.margin}"


class CosFace(_CosineHead):
    """Large margin cosine loss (Wang et al., CVPR 2018, eq. 4): logits s (cos(theta_j) - m [j = y]).

    Args:
        embedding_size: width of the embedding.
        identities: number of classes.
        scale: s, 30 in QualNet (paper 001, section 4.1).
        margin: m, 0.25 in QualNet.

    ``forward(embeddings float [n, d], labels int64 [n])`` gives logits [n, identities], at least float32, for
    a plain cross-entropy.
    """

    def __init__(self, embedding_size: int, identities: int, scale: float = 30.0, margin: float = 0.25):
        super().__init__(embedding_size, identities, scale, margin)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = self.cosines(embeddings)
        target = torch.zeros_like(cosine).scatter_(1, labels[:, None], self.margin)
        return self.scale * (cosine - target)


class ArcFace(_CosineHead):
    """Additive angular margin (Deng et al., CVPR 2019, eq. 3): logits s cos(theta_y + m), s cos(theta_j).

    Where theta_y + m passes pi, cos(theta + m) would rise again; there the logit goes on linearly as
    cos(theta) - m sin(m), as the authors' code does.

    ``forward(embeddings float [n, d], labels int64 [n])`` gives logits [n, identities], at least float32.
    """

    def __init__(self, embedding_size: int, identities: int, scale: float = 64.0, margin: float = 0.5):
        super().__init__(embedding_size, identities, scale, margin)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = self.cosines(embeddings)
        target = cosine.gather(1, labels[:, None])
        # The root's slope is infinite at |cos| = 1: the floor keeps the gradient finite there.
        sine = torch.sqrt((1.0 - target * target).clamp_min(1e-9))
        shifted = target * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = target - self.margin * math.sin(self.margin)
        shifted = torch.where(target > math.cos(math.pi - self.margin), shifted, beyond)
        return self.scale * cosine.scatter(1, labels[:, None], shifted)


class Softmax(nn.Module):
    """A plain linear classifier: ``forward(embeddings float [n, d], labels)`` gives logits [n, identities],
    at least float32."""

    def __init__(self, embedding_size: int, identities: int):
        super().__init__()
        _check_sizes(embedding_size, identities)
        self.linear = nn.Linear(embedding_size, identities)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return at_least_float32(self.linear(embeddings))
