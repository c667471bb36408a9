"""Quality losses of QualNet: how far the reconstruction is from the clean image (paper 000, Table C.1).

    l1           mean absolute difference, eq. (4) of paper 001: what the papers use everywhere else
    l2           mean squared difference
    likelihood   negative log-likelihood of the clean image under a Gaussian a pixel, whose mean and standard deviation
                 two convolutions behind the decoder give (Kingma and Welling, ICLR 2014)
    perceptual   mean squared difference of VGG16's features (Johnson et al., ECCV 2016)
    adversarial  what a discriminator, trained along, takes for a reconstruction (Goodfellow et al., NIPS 2014)

Each is a module called with the reconstruction, the clean image and whether to clip the reconstruction first.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.errors import LrfaceError, UsageError
from lrface.registry import Registry


def _pair(reconstruction: Tensor, hq: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32, the first clipped where wanted. Raises UsageError where shapes differ."""
    if reconstruction.shape != hq.shape:
        raise UsageError(
            f"the decoder's output {tuple(reconstruction.shape)} and the clean image {tuple(hq.shape)} differ in shape"
        )
    if reconstruction.dtype in (torch.float16, torch.bfloat16):
        reconstruction = reconstruction.float()
    if clip:
        reconstruction = reconstruction.clamp(0.0, 1.0)
    return reconstruction, hq.to(reconstruction.dtype)


def quality_loss(reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
    """L_quality, eq. (4) of paper 001: mean absolute difference to the clean (HQ) image.

    The mean is over images, channels and pixels, so that lambda does not depend on the image size.

    Args:
        reconstruction: float [n, 3, h, w], the decoder's output.
        hq: float [n, 3, h, w] in [0, 1], the clean images.
        clip: clip the reconstruction to [0, 1] first, "for stable training" (paper 000, appendix A). A
            clipped pixel has no gradient.

    Returns:
        Scalar, float32 (float64 for float64).

    Raises:
        UsageError: shapes differ.
    """
    reconstruction, hq = _pair(reconstruction, hq, clip)
    return (reconstruction - hq).abs().mean()


class QualityLoss(nn.Module):
    """``loss(reconstruction, hq, clip)``: scalar, at least float32; arguments as of :func:`quality_loss`.

    Attributes:
        learns: whether the loss has a network of its own to teach: ``learn(reconstruction, hq, clip)`` is then called
            once before each step.
    """

    learns = False

    def learn(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> None:
        """Nothing to learn."""

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward()")


class L1(QualityLoss):
    """:func:`quality_loss`."""

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        return quality_loss(reconstruction, hq, clip)


class L2(QualityLoss):
    """Mean squared difference over images, channels and pixels."""

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        reconstruction, hq = _pair(reconstruction, hq, clip)
        return (reconstruction - hq).square().mean()


class Likelihood(QualityLoss):
    """Mean over all values x of log(sigma) + (x - mu)^2 / (2 sigma^2) + log(2 pi) / 2.

    mu and log sigma are 3x3 convolutions of the decoder's output. They start as mu = output and sigma = 1, where the
    gradient is that of half the squared difference. Of the clipping, mu gets it.

    Args:
        minimum: sigma is at least this, so that a pixel that is drawn exactly does not weigh without bound.

    Raises:
        UsageError: a minimum that is not above 0.
    """

    def __init__(self, minimum: float = 0.01):
        super().__init__()
        if not minimum > 0:
            raise UsageError(f"quality.minimum must be above 0; found {minimum}")
        self.log_minimum = math.log(minimum)
        self.mean = nn.Conv2d(3, 3, 3, 1, 1)
        self.log_deviation = nn.Conv2d(3, 3, 3, 1, 1)
        nn.init.dirac_(self.mean.weight)
        nn.init.zeros_(self.log_deviation.weight)
        for part in (self.mean, self.log_deviation):
            assert part.bias is not None
            nn.init.zeros_(part.bias)

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        mean, hq = _pair(self.mean(reconstruction), hq, clip)
        log_deviation = self.log_deviation(reconstruction).to(mean.dtype).clamp_min(self.log_minimum)
        scaled = (hq - mean) * torch.exp(-log_deviation)
        return (log_deviation + scaled.square() / 2).mean() + math.log(2 * math.pi) / 2


# VGG16 up to its seventh convolution and ReLU (relu3_3): channels of the convolutions, "M" for max-pooling.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256)
_VGG16_FILE = "vgg16-397923af.pth"


class Perceptual(QualityLoss):
    """Mean squared difference of the features of VGG16 (relu3_3), which is not trained.

    Paper 000 does not say which layer it takes; this one is the content layer of Johnson et al. Images are normalised
    with ImageNet's means and deviations first.

    Args:
        weights: VGG16 of torchvision, trained on ImageNet: a state dict as .pth, or .safetensors. By default the file
            that torchvision has left in its own cache; nothing is downloaded.

    Raises:
        LrfaceError: no such file, or one that does not hold VGG16.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs in _VGG16:
            if isinstance(outputs, int):
                layers += [nn.Conv2d(channels, outputs, 3, 1, 1), nn.ReLU(inplace=True)]
                channels = outputs
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))
        self.features.load_state_dict(_vgg16_state(weights, self.features.state_dict()))
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        reconstruction, hq = _pair(reconstruction, hq, clip)
        with torch.no_grad():
            wanted = self.features((hq - self.mean) / self.deviation)
        found = self.features((reconstruction - self.mean) / self.deviation)
        found, wanted = _pair(found, wanted, clip=False)
        return (found - wanted).square().mean()


def _vgg16_state(weights: str | None, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of VGG16's first layers by their names in ``own``."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / _VGG16_FILE if weights is None else Path(weights)
    if not path.is_file():
        raise LrfaceError(
            f"{path}: no such file; the perceptual loss needs VGG16 trained on ImageNet. Download torchvision's "
            f"{_VGG16_FILE} and name it with quality.weights (nothing is downloaded for you)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "it is broken or holds something other than tensors" if refused else error
        raise LrfaceError(
            f"{path} cannot be read ({reason}); the perceptual loss needs VGG16's weights"
        ) from error
    for key, value in own.items():
        found = state.get(f"features.{key}") if isinstance(state, Mapping) else None
        if not isinstance(found, Tensor) or found.shape != value.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else "missing"
            raise LrfaceError(
                f"{path} is not torchvision's VGG16: features.{key} must be of shape {tuple(value.shape)}; found "
                f"{shape}"
            )
    return {key: state[f"features.{key}"] for key in own}


class Adversarial(QualityLoss):
    """Mean of -log D(reconstruction), D the probability of a clean image (Goodfellow et al., section 3).

    Paper 000 says no more than that there is a discriminator. This one judges patches: ``depth`` convolutions of 4x4
    pixels and stride 2 with LeakyReLU, of width, 2 width, 4 width ... channels, then one logit a pixel. It learns by a
    step of Adam (betas 0.5 and 0.999) before each step of the classifier to tell clean images from reconstructions, which
    are drawn for it in eval mode. Its weights are no parameters of the main optimiser; they and Adam's moments are part
    of the state that is stored. On several ranks its gradients are averaged.

    Args:
        width, depth: of the discriminator.
        learning_rate: its own.

    Raises:
        UsageError: a value out of range, or images smaller than the discriminator's patches.
    """

    learns = True
    steps: Tensor

    def __init__(self, width: int = 64, depth: int = 3, learning_rate: float = 2e-4):
        super().__init__()
        for name, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise UsageError(f"quality.{name} must be at least 1; found {value}")
        if not 0 < learning_rate < math.inf:
            raise UsageError(f"quality.learning_rate must be above 0; found {learning_rate}")
        self.depth = depth
        self.learning_rate = learning_rate
        layers: list[nn.Module] = []
        channels = 3
        for level in range(depth):
            layers += [nn.Conv2d(channels, width * 2**level, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
            channels = width * 2**level
        self.discriminator = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, 1, 1)).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        for number, weight in enumerate(self.discriminator.parameters()):
            self.register_buffer(f"first_{number}", torch.zeros_like(weight))
            self.register_buffer(f"second_{number}", torch.zeros_like(weight))

    def _logits(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 2**self.depth:
            raise UsageError(
                f"quality.depth {self.depth} needs images of at least {2**self.depth} pixels; found "
                f"{images.shape[-2]} x {images.shape[-1]}"
            )
        logits = self.discriminator(images * 2.0 - 1.0)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def forward(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> Tensor:
        reconstruction, _ = _pair(reconstruction, hq, clip)
        return F.softplus(-self._logits(reconstruction)).mean()

    def learn(self, reconstruction: Tensor, hq: Tensor, clip: bool = True) -> None:
        """A step of the discriminator's own optimiser on -log D(hq) - log(1 - D(reconstruction))."""
        reconstruction, hq = _pair(reconstruction.detach(), hq, clip)
        weights = list(self.discriminator.parameters())
        with torch.enable_grad():
            self.discriminator.requires_grad_(True)
            loss = F.softplus(-self._logits(hq)).mean() + F.softplus(self._logits(reconstruction)).mean()
            gradients = torch.autograd.grad(loss, weights)
            self.discriminator.requires_grad_(False)
        with torch.no_grad():
            self.steps += 1
            for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                self._step(weight, _averaged(gradient), number)

    def _step(self, weight: Tensor, gradient: Tensor, number: int) -> None:
        """Adam (Kingma and Ba, ICLR 2015, Algorithm 1). Its moments are buffers, so that a run resumes exactly."""
        first, second = self.get_buffer(f"first_{number}"), self.get_buffer(f"second_{number}")
        first.lerp_(gradient, 0.5)
        second.lerp_(gradient.square(), 0.001)
        unbiased = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        weight.sub_(self.learning_rate * first / (1 - 0.5**self.steps) / unbiased)


def _averaged(gradient: Tensor) -> Tensor:
    """The mean over the ranks of a run."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return gradient


QUALITY: Registry[QualityLoss] = Registry("quality")
QUALITY.register("l1", L1)
QUALITY.register("l2", L2)
QUALITY.register("likelihood", Likelihood)
QUALITY.register("perceptual", Perceptual)
QUALITY.register("adversarial", Adversarial)


def build_quality(quality: Any) -> QualityLoss:
    """The loss of this name, or of a mapping with a name and arguments.

    Raises:
        UsageError: unknown name or arguments. LrfaceError: see :class:`Perceptual`.
    """
    named = {"name": quality} if isinstance(quality, str) else quality
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise UsageError(f"quality must be a name, or a mapping with a name and arguments; found {quality!r}")
    return QUALITY.build(**named)
