"""AdA's inner maximisation (Calian et al., "Defending Against Image Corruptions Through Adversarial Augmentations", ICLR
2022; paper 003): each image goes through a corruption network whose weights are perturbed, within a radius, so that a
classifier errs on what comes out.

    perturb             the attack, and the limit on how much of an image it may destroy
    random_start, ascend, project, corrupted
                        its parts, on the perturbations of a batch: by parameter name, float [n, *shape]
    limit_similarity    the approximate line search of appendix G

A block is one parameter: the weight of a layer, or its bias (section 2). Its radius is ``radius`` times the l2 norm of the
trained parameter; a parameter of zeros has none and stays as it is.
"""

import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions.draws import Draws
from lrface.errors import UsageError
from lrface.losses.ssim import RaySimilarity
from lrface.models.per_example import CorruptionNetwork, run_with

Loss = Callable[[Tensor, Tensor], Tensor]
Perturbation = dict[str, Tensor]
GAMMAS = 9


@dataclass
class Attack:
    """How AdA searches (paper 003, appendix A).

    radius: nu, the radius of each block relative to its norm.
    steps: of iterated FGSM.
    step_size: of a step, relative to the median radius of the blocks.
    chunk: images that are attacked at once; it bounds memory and changes nothing else.
    precision: "float32", or "bfloat16" for autocast in network and classifier; perturbations are float32 in both.

    Raises:
        UsageError: a value out of range.
    """

    radius: float = 0.015
    steps: int = 10
    step_size: float = 0.25
    chunk: int = 32
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("radius", self.radius), ("step_size", self.step_size)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"method.{name} must be at least 0; found {value}")
        if self.steps < 0 or self.chunk < 1:
            raise UsageError(
                f"method.steps must be at least 0 and method.chunk at least 1; found {self.steps} and {self.chunk}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"method.precision must be float32 or bfloat16; found {self.precision!r}")


@dataclass
class Perturbed:
    """What the attack came to for n images. Everything is detached.

    images: [n, 3, h, w] in [0, 1], of the network's dtype.
    losses: float32 [steps, n], the classifier's loss before each step; the first is that of the random start.
    share: float32 [n, blocks], the norm of each perturbation relative to its radius, at most 1 up to rounding; 0 for a
        block without a radius.
    similarity: float32 [n], SSIM with the clean image before the limit.
    gamma: float32 [n], how far each image went from the clean one to the attack's, 1 where the limit did not act.
    perturbation: by name, float32 [n, *shape]; None unless asked for.
    """

    images: Tensor
    losses: Tensor
    share: Tensor
    similarity: Tensor
    gamma: Tensor
    perturbation: Perturbation | None = None


def radii(network: CorruptionNetwork, radius: float) -> dict[str, float]:
    """The radius of each block: ``radius`` times the l2 norm of the parameter."""
    return {name: radius * float(value.detach().norm()) for name, value in network.named_parameters()}


def random_start(network: CorruptionNetwork, seeds: Tensor, radius: float) -> Perturbation:
    """A perturbation for each image, each block of it uniform in its ball.

    Args:
        seeds: int64 [n], on the device of the network; all random numbers of an image are functions of its seed.
    """
    draws, bounds = Draws(seeds), radii(network, radius)
    start = {}
    for name, value in network.named_parameters():
        direction = draws.normal(f"direction {name}", *value.shape)
        length = bounds[name] * draws.uniform(f"length {name}", 1) ** (1 / value.numel())
        norm = direction.flatten(1).norm(dim=1, keepdim=True)
        start[name] = direction.mul_((length / norm).view(-1, *[1] * value.ndim))
    return start


@torch.no_grad()
def project(perturbation: Perturbation, bounds: Mapping[str, float]) -> None:
    """Scale every block of every image that lies outside of its ball to the ball's surface, in place."""
    for name, value in perturbation.items():
        norm = value.flatten(1).norm(dim=1)
        factor = (bounds[name] / norm.clamp_min(1e-30)).clamp_max(1)
        value.mul_(factor.view(-1, *[1] * (value.ndim - 1)))


def corrupted(network: CorruptionNetwork, perturbation: Perturbation, images: Tensor) -> Tensor:
    """The images through the network with each image's own perturbed weights: [n, 3, h, w] in [0, 1]."""
    own = dict(network.named_parameters())
    weights = {name: own[name].detach() + value for name, value in perturbation.items()}
    return run_with(network, weights, images)


def ascend(
    network: CorruptionNetwork,
    perturbation: Perturbation,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    attack: Attack,
) -> Tensor:
    """Iterated FGSM: each step adds its size with the sign of the gradient, then projects. Changes ``perturbation``.

    Args:
        loss: of images float [n, 3, h, w] in [0, 1] and labels [n] -> [n], that of each image by itself. It must not
            depend on the other images of the batch: put a classifier's BatchNorm into eval mode.

    Returns:
        float32 [steps, n], the losses before each step.
    """
    bounds = radii(network, attack.radius)
    step = attack.step_size * statistics.median(bounds.values())
    names = list(perturbation)
    seen = []
    for _ in range(attack.steps):
        with torch.enable_grad(), _precision(images, attack):
            leaves = {name: perturbation[name].detach().requires_grad_() for name in names}
            each = loss(_channels_last(corrupted(network, leaves, images)), labels)
            # With respect to the perturbations alone: the classifier's weights get no gradient.
            gradients = torch.autograd.grad(each.sum(), list(leaves.values()))
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                perturbation[name].add_(gradient.sign(), alpha=step)
            project(perturbation, bounds)
        seen.append(each.detach().float())
    return torch.stack(seen) if seen else images.new_zeros(0, len(images))


def perturb(
    images: Tensor,
    labels: Tensor,
    classifier: Callable[[Tensor], Tensor],
    network: CorruptionNetwork,
    seeds: Tensor,
    attack: Attack | None = None,
    similarity: float | None = 0.3,
    keep: bool = False,
) -> Perturbed:
    """Adversarial corruptions of a batch: :func:`perturb_against` with the cross-entropy of a classifier's logits.

    Args:
        classifier: images float [n, 3, h, w] in [0, 1] -> logits [n, classes], each image by itself: in eval mode. Its
            gradients and statistics stay as they are.
    """

    def loss(corrupted: Tensor, labels: Tensor) -> Tensor:
        logits = classifier(corrupted)
        # Sums of half precision would be too rough.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, reduction="none")

    return perturb_against(loss, images, labels, network, seeds, attack, similarity, keep)


def perturb_against(
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    network: CorruptionNetwork,
    seeds: Tensor,
    attack: Attack | None = None,
    similarity: float | None = 0.3,
    keep: bool = False,
) -> Perturbed:
    """Corruptions of a batch that raise ``loss``.

    Args:
        loss: see :func:`ascend`.
        images: RGB float [n, 3, h, w] in [0, 1].
        labels: int64 [n].
        network: as trained, in eval mode.
        seeds: int64 [n] on any device, one for the random numbers of each image.
        attack: :class:`Attack`, by default the paper's.
        similarity: least SSIM with the clean image; see :func:`limit_similarity`. None for no limit.
        keep: also give the perturbations, as large as n networks.
    """
    attack = attack or Attack()
    parts = [
        _perturb_chunk(*chunk, network, loss, attack, similarity, keep)
        for chunk in zip(
            images.split(attack.chunk),
            labels.split(attack.chunk),
            seeds.to(images.device).split(attack.chunk),
            strict=True,
        )
    ]
    kept = [part.perturbation for part in parts if part.perturbation is not None]
    return Perturbed(
        torch.cat([part.images for part in parts]),
        torch.cat([part.losses for part in parts], dim=1),
        torch.cat([part.share for part in parts]),
        torch.cat([part.similarity for part in parts]),
        torch.cat([part.gamma for part in parts]),
        {name: torch.cat([one[name] for one in kept]) for name in kept[0]} if kept else None,
    )


@torch.no_grad()
def _perturb_chunk(
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    network: CorruptionNetwork,
    loss: Loss,
    attack: Attack,
    similarity: float | None,
    keep: bool,
) -> Perturbed:
    images = images.to(next(network.parameters()).dtype).contiguous()
    perturbation = random_start(network, seeds, attack.radius)
    losses = ascend(network, perturbation, images, labels, loss, attack)
    with _precision(images, attack):
        found = corrupted(network, perturbation, images)
    bounds = radii(network, attack.radius)
    share = [value.flatten(1).norm(dim=1) / (bounds[name] or 1.0) for name, value in perturbation.items()]
    limited, gamma, measured = limit_similarity(images, found, similarity)
    return Perturbed(limited, losses, torch.stack(share, 1), measured, gamma, perturbation if keep else None)


def _precision(images: Tensor, attack: Attack) -> torch.autocast | nullcontext[None]:
    if attack.precision == "float32":
        return torch.autocast(images.device.type, enabled=False)
    return torch.autocast(images.device.type, torch.bfloat16)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def limit_similarity(
    clean: Tensor, found: Tensor, threshold: float | None = 0.3, passes: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Images that have lost too much are mixed with their clean originals: the line search of paper 003, appendix G.

    x_gamma = (1 - gamma) clean + gamma found. For an image whose SSIM with its original is below the threshold, nine
    gammas, 0 to 1 in equal steps, are looked at, a quadratic polynomial is fitted to SSIM - threshold there, and the root
    nearest to 1 is taken: about the most corrupted image that is similar enough. That is the paper's procedure; it ends up
    to 0.07 away from the threshold, and a second pass of it on the eighth to either side ends within 0.01. All images at
    once.

    Args:
        clean, found: float [n, 3, h, w] in [0, 1], at least float32.
        threshold: least SSIM; None leaves everything as it is.
        passes: 1 for the paper's procedure alone.

    Returns:
        (images [n, 3, h, w], gamma [n], SSIM of ``found`` [n]).
    """
    ray = RaySimilarity(clean, found)
    gamma = torch.ones(len(clean)).to(clean)
    measured = ray(gamma)
    if threshold is None:
        return found, gamma, measured
    places = torch.linspace(0, 1, GAMMAS, dtype=torch.float64, device=clean.device)
    powers = places[:, None] ** torch.arange(3, device=clean.device)
    fit = torch.linalg.pinv(powers).T
    low, high = torch.zeros_like(gamma, dtype=torch.float64), torch.ones_like(gamma, dtype=torch.float64)
    for _ in range(passes):
        at = low[:, None] + (high - low)[:, None] * places
        constant, slope, curve = ((ray(at.to(clean)).double() - threshold) @ fit).unbind(1)
        root = low + (high - low) * nearest_root(curve, slope, constant)
        width = (high - low) / (GAMMAS - 1)
        low, high = (root - width).clamp(0, 1), (root + width).clamp(0, 1)
    gamma = torch.where(measured < threshold, root.to(gamma), gamma)
    mix = gamma[:, None, None, None]
    # torch.where, so that images within the limit stay the same to the bit.
    return torch.where(mix < 1, clean + mix * (found - clean), found), gamma, measured


def nearest_root(curve: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """The root of curve g^2 + slope g + constant in [0, 1] that is nearest to 1; float64 [n] each.

    Where there is none in [0, 1]: 1 if the polynomial is positive at 1, else 0. (The paper clips all roots to [0, 1]
    first. A root above 1, which every polynomial that opens upwards and falls through 0 has, would then win as 1.)
    """
    discriminant = slope.square() - 4 * curve * constant
    # The sum of two numbers of one sign: nothing cancels, and the other root follows from the product of both.
    half = -0.5 * (slope + torch.where(slope < 0, -1.0, 1.0) * discriminant.clamp_min(0).sqrt())
    # A division by 0 says that there is no such root: the polynomial is a line, or 0.
    roots = torch.stack([half / curve, constant / half])
    inside = (roots >= 0) & (roots <= 1) & (discriminant >= 0)
    nearest = torch.where(inside, roots, -1.0).amax(0)
    return torch.where(nearest >= 0, nearest, (curve + slope + constant > 0).to(nearest))
