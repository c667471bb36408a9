"""Knowledge distillation, the baselines of paper 001's Table 1: a student learns from what a frozen teacher makes of images.

    kd      softened class probabilities                            Hinton et al., NIPS workshop 2014
    fitnet  feature maps, by a distance                             Romero et al., ICLR 2015, as paper 001, eq. (3), has it
    pkt     which images of a batch are near each other             Passalis and Tefas, ECCV 2018
    vid     a Gaussian around the teacher's features                Ahn et al., CVPR 2019
    sp      similarities of the images of a batch                   Tung and Mori, ICCV 2019

Paper 001 says of them only that "the reported hyperparameters are used" (section 4.1). The defaults and the weights here
are those of the publications where these state them and otherwise those of the comparison by Tian et al. (ICLR 2020,
"RepDistiller"), by whose code the field compares such methods; each docstring says which.

Each is a module called with what the student and the teacher give, built for the shapes of both. The teacher's is not
differentiated. Everything is computed in float32 at least, under autocast too; only a regressor's convolutions are left
to it.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.heads.base import at_least_float32
from lrface.heads.margin import unit
from lrface.registry import Registry


class Shape(NamedTuple):
    """What an image becomes: a map [channels, size, size], or a vector [channels] where size is None."""

    channels: int
    size: int | None = None


class DistillationLoss(nn.Module):
    """``loss(student, teacher)``: float [n, ...] of the two shapes that it was built for -> scalar, at least float32.

    Attributes:
        layers: of "features" (the final map), "embedding" and "logits" those that it can compare, the usual one first.
        published_weight: what the loss is multiplied by where it is added to the softmax loss.
        relational: whether it compares the images of a batch with each other, so that it needs the batch as a whole.
    """

    layers: tuple[str, ...] = ("features", "embedding")
    published_weight: float = 1.0
    relational = False

    def __init__(self, student: Shape, teacher: Shape):
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward()")


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's dtype, at least float32, the teacher's without a gradient."""
    student = at_least_float32(student)
    return student, teacher.detach().to(student.dtype)


def _exactly(values: Tensor) -> AbstractContextManager[None]:
    """A block without autocast, whose products would be of half precision."""
    return torch.autocast(values.device.type, enabled=False)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over images of KL(p_teacher || p_student), p = softmax(logits / T): Hinton et al., section 2.

    The paper's cross-entropy with soft targets is this and the teacher's entropy, which has no gradient. T^2 keeps the
    size of the gradients the same at any temperature.

    Args:
        student, teacher: logits float [n, classes]. The teacher's has no gradient.
    """
    with _exactly(student):
        student, teacher = _pair(student, teacher)
        own, wanted = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
        return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def neighbour_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """How much the student's neighbourhoods differ from the teacher's: Passalis and Tefas, eq. (3) to (7).

    p_ij = K(x_i, x_j) / sum over k != i of K(x_i, x_k) with the cosine kernel K(a, b) = (cos(a, b) + 1) / 2 is the
    probability that i chooses j for its neighbour. The loss is the sum over i != j of p log(p / q), p the teacher's and
    q the student's, divided by n^2 as in the authors' code. Vectors without a direction have a cosine of 0 to all.

    Args:
        student, teacher: float [n, ...], flattened; of any two widths. The teacher's has no gradient.

    Raises:
        UsageError: fewer than 2 images.
    """
    count = _whole_batch("pkt", student)
    with _exactly(student):
        student, teacher = _pair(student, teacher)
        wanted, own = _neighbours(teacher), _neighbours(student)
        return (wanted * (wanted / own).log()).sum() / count**2


def _neighbours(values: Tensor) -> Tensor:
    """The probabilities p_ij for i != j: [n, n - 1]."""
    values = values.flatten(1)
    count = len(values)
    directions = unit(values, values.norm(dim=1))
    # An opposite direction has a probability of 0, whose logarithm there is none of: the authors' 1e-7 instead.
    kernel = ((directions @ directions.T + 1.0) / 2.0).clamp_min(1e-7)
    others = ~torch.eye(count, dtype=torch.bool, device=values.device)
    kernel = kernel[others].reshape(count, count - 1)
    return kernel / kernel.sum(dim=1, keepdim=True)


def similarity_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """1/n^2 |G_teacher - G_student|_F^2, eq. (1) to (4) of Tung and Mori: G = Q Q^T with rows of length 1, Q [n, c h w].

    A row of an image whose features are all 0 is 0.

    Args:
        student, teacher: float [n, ...], flattened; of any two widths. The teacher's has no gradient.

    Raises:
        UsageError: fewer than 2 images.
    """
    count = _whole_batch("sp", student)
    with _exactly(student):
        student, teacher = _pair(student, teacher)
        return (_similarities(teacher) - _similarities(student)).square().sum() / count**2


def _similarities(values: Tensor) -> Tensor:
    values = values.flatten(1)
    # Scaled first, which the rows' lengths undo: squares of squares of large features are beyond float32.
    values = values / values.detach().abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
    gram = values @ values.T
    return unit(gram, gram.norm(dim=1))


def _whole_batch(name: str, values: Tensor) -> int:
    """The number of images. Raises UsageError where there is no other to compare with."""
    if len(values) < 2:
        raise UsageError(
            f"the distillation loss {name} compares the images of a batch with each other and needs at least 2; found "
            f"{len(values)}"
        )
    return len(values)


class SoftTargets(DistillationLoss):
    """:func:`softened_divergence` ("original KD" in Table 1).

    Hinton et al., section 4.1, weigh the hard targets by 0.5 relative to the soft ones: 2 for these where the softmax
    loss has 1. They tried temperatures 1, 2, 5 and 10; that 2 was the best of them is from memory of their text.

    Args:
        temperature: T, above 0.

    Raises:
        UsageError: a temperature that is not above 0, or other classes.
    """

    layers = ("logits",)
    published_weight = 2.0

    def __init__(self, student: Shape, teacher: Shape, temperature: float = 2.0):
        super().__init__(student, teacher)
        if not 0 < temperature < math.inf:
            raise UsageError(f"loss.temperature must be above 0; found {temperature}")
        if student.channels != teacher.channels:
            raise UsageError(
                f"the teacher knows {teacher.channels} classes, the student {student.channels}; kd compares the "
                "probabilities of the same ones"
            )
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return softened_divergence(student, teacher, self.temperature)


class FitNet(DistillationLoss):
    """d(f_teacher(x), f_student(x~)), eq. (3) of paper 001: mean absolute (l1) or squared (l2) difference.

    The mean is over images, channels and pixels, as in the quality loss (eq. 4). The weight, which the paper does not
    give, is its lambda of 0.1 (eq. 6, section 4.1), in whose place this loss stands.

    Where the shapes differ, the student's goes through a regressor, which is trained along: one 3x3 convolution without
    BatchNorm or ReLU (1x1 for vectors), the same as QualNet's connector, so that Table 1 compares what the loss sees and
    not what it sees it through. Towards a larger map it gives more channels, whose groups become pixels; towards a
    smaller one it has a stride.

    Args:
        distance: "l1", the paper's example, or "l2".

    Raises:
        UsageError: another distance, or sizes of which neither is a multiple of the other.
    """

    published_weight = 0.1

    def __init__(self, student: Shape, teacher: Shape, distance: str = "l1"):
        super().__init__(student, teacher)
        if distance not in ("l1", "l2"):
            raise UsageError(f"loss.distance must be l1 or l2; found {distance!r}")
        self.distance = distance
        self.regressor = nn.Identity() if student == teacher else _connector(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _pair(self.regressor(_as_map(student)), _as_map(teacher))
        difference = student - teacher
        return (difference.abs() if self.distance == "l1" else difference.square()).mean()


def _as_map(values: Tensor) -> Tensor:
    """Vectors [n, d] as maps of one pixel [n, d, 1, 1]."""
    return values[:, :, None, None] if values.ndim == 2 else values


def _connector(student: Shape, teacher: Shape) -> nn.Module:
    if student.size is None or teacher.size is None:
        return nn.Conv2d(student.channels, teacher.channels, 1)
    small, large = sorted((student.size, teacher.size))
    scale = large // small
    if scale * small != large:
        raise UsageError(
            f"the teacher's feature map has {teacher.size} x {teacher.size} pixels, the student's {student.size} x "
            f"{student.size}; fitnet needs one to be a multiple of the other"
        )
    if teacher.size < student.size:
        return nn.Conv2d(student.channels, teacher.channels, 3, scale, 1)
    return nn.Sequential(
        nn.Conv2d(student.channels, teacher.channels * scale**2, 3, 1, 1), nn.PixelShuffle(scale)
    )


class NeighbourProbabilities(DistillationLoss):
    """:func:`neighbour_divergence` (PKT), of embeddings as the authors have it.

    They train by this loss alone and give no weight against a softmax loss. 30000 is that of Tian et al., in batches of
    64; the loss is a mean over n^2 pairs and falls as 1/n with the batch.
    """

    layers = ("embedding", "features")
    published_weight = 30_000.0
    relational = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return neighbour_divergence(student, teacher)


class VariationalInformation(DistillationLoss):
    """Negative log-likelihood of the teacher's features under a Gaussian around what a regressor makes of the student's
    (VID): the mean over all values t of log(sigma_c) + (t - mu)^2 / (2 sigma_c^2), Ahn et al., eq. (5).

    sigma_c^2 = softplus(alpha_c) + epsilon is learned for each channel (eq. 6) and the same for all images and pixels; mu
    is the regressor: three 1x1 convolutions without bias and ReLU between them, as wide as the teacher's map. The
    constant log(2 pi) / 2 is left out. Where the maps differ in size, the larger is averaged to the smaller. The layers
    of the regressor, the beginning at a variance of 5, epsilon and the mean instead of a sum are those of the authors'
    code as Tian et al. have it, with a weight of 1. The paper takes several layers; this is the last map alone, as for
    the other losses here and in paper 001's eq. (3).

    Args:
        variance: sigma^2 at the beginning.
        epsilon: the smallest sigma^2.

    Raises:
        UsageError: an epsilon that is not above 0, or a variance that is not above it.
    """

    def __init__(self, student: Shape, teacher: Shape, variance: float = 5.0, epsilon: float = 1e-5):
        super().__init__(student, teacher)
        if not 0 < epsilon < variance < math.inf:
            raise UsageError(
                f"loss.variance must be above loss.epsilon, and that above 0; found {variance} and {epsilon}"
            )
        self.epsilon = epsilon
        width = teacher.channels
        self.regressor = nn.Sequential(
            nn.Conv2d(student.channels, width, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.alpha = nn.Parameter(torch.full((width,), _inverse_softplus(variance - epsilon)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _as_map(student), _as_map(teacher)
        size = min(student.shape[-1], teacher.shape[-1])
        student, teacher = (F.adaptive_avg_pool2d(values, size) for values in (student, teacher))
        with _exactly(student):
            variance = F.softplus(at_least_float32(self.alpha)) + self.epsilon
        mean, teacher = _pair(self.regressor(student), teacher)
        variance = variance[:, None, None]
        return (variance.log() + (teacher - mean).square() / variance).mean() / 2.0


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


class Similarities(DistillationLoss):
    """:func:`similarity_difference` (SP), of the last map, with the gamma of 3000 of Tung and Mori's section 4.1 (from
    memory of it; Tian et al. have the same)."""

    published_weight = 3000.0
    relational = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_difference(student, teacher)


LOSSES: dict[str, type[DistillationLoss]] = {
    "kd": SoftTargets,
    "fitnet": FitNet,
    "pkt": NeighbourProbabilities,
    "vid": VariationalInformation,
    "sp": Similarities,
}
DISTILLATION: Registry[DistillationLoss] = Registry("loss")
for _name, _loss in LOSSES.items():
    DISTILLATION.register(_name, _loss)


def build_distillation(loss: Any, shapes: Mapping[str, tuple[Shape, Shape]]) -> tuple[DistillationLoss, str]:
    """A loss and the layer it compares.

    Args:
        loss: a name, or a mapping of it and arguments; ``at`` among them chooses the layer where there is a choice.
        shapes: of the student and the teacher, by layer; without "logits" where there are none.

    Raises:
        UsageError: unknown name or arguments, a layer that the loss cannot compare, or none to compare.
    """
    named = {"name": loss} if isinstance(loss, str) else loss
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(f"loss must be a name, or a mapping with a name and arguments; found {loss!r}")
    arguments = {key: value for key, value in named.items() if key not in ("name", "at")}
    for key in ("student", "teacher"):
        if key in arguments:
            raise UsageError(f"loss.{key} follows from the networks; remove it")
    name = named["name"]
    if name not in LOSSES:
        DISTILLATION.build(name)  # which says what is known
    layers = LOSSES[name].layers
    layer = named.get("at", layers[0])
    if layer not in layers:
        raise UsageError(f"loss.at of {name} must be {' or '.join(layers)}; found {layer!r}")
    if layer not in shapes:
        raise UsageError(
            f"the loss {name} compares class probabilities, which a linear classifier gives; set head: softmax, or take a "
            f"loss of features: {', '.join(sorted(set(LOSSES) - {name}))}"
        )
    student, teacher = shapes[layer]
    return DISTILLATION.build(name, student=student, teacher=teacher, **arguments), layer
