"""Drawing corruptions and applying them to batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrface.degrade.corruptions import blur, digital, mnist, noise, weather
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.jpeg import jpeg_compression
from lrface.degrade.corruptions.pictures import Work, each_picture, jpeg_picture, pixelate_picture
from lrface.degrade.corruptions.spatter import spatter
from lrface.degrade.corruptions.tables import SETS, CorruptionSet
from lrface.errors import UsageError

# Levels (float32 [n, c, h, w], 0 to 255, may be overwritten), a severity's constants, random numbers -> levels, which
# may lie outside 0 to 255.
Kernel = Callable[[Tensor, Any, Draws], Tensor]

KERNELS: dict[str, Kernel] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "speckle_noise": noise.speckle_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "gaussian_blur": blur.gaussian_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": jpeg_compression,
    "saturate": digital.saturate,
    "spatter": spatter,
}

# MNIST-C has corruptions of its own, and some that share only their name with ImageNet-C's.
MNIST_KERNELS: dict[str, Kernel] = KERNELS | {
    "glass_blur": mnist.glass_blur,
    "fog": mnist.fog,
    "spatter": mnist.spatter,
    "shear": mnist.shear,
    "rotate": mnist.rotate,
    "scale": mnist.scale,
    "translate": mnist.translate,
    "stripe": mnist.stripe,
    "dotted_line": mnist.dotted_line,
    "zigzag": mnist.zigzag,
    "canny_edges": mnist.canny_edges,
}

# A batch on the CPU is worked on in parts of about this many values, which stay in the processor's caches.
PART = 1 << 20

# On the CPU libraries are faster at these than tensors, except for images so small that calls cost more than work.
PICTURES: dict[str, Callable[[Any], Work]] = {
    "jpeg_compression": jpeg_picture,
    "pixelate": pixelate_picture,
}
SMALL = 64 * 64


@dataclass(frozen=True)
class CorruptionParameters:
    """What happens to each of n images. The tensors lie on the CPU.

    name: the corruption.
    set: the set of constants, a key of :data:`lrface.degrade.corruptions.SETS`.
    size: (height, width) of the images in pixels.
    severity: int64 [n], 1 to 5, or 0 for an image that stays clean.
    seed: int64 [n]; every random number of an image is a function of its seed alone.
    """

    name: str
    set: str
    size: tuple[int, int]
    severity: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return len(self.severity)


def check_set(set: str) -> CorruptionSet:
    """The set of this name; raises UsageError naming those there are."""
    if set not in SETS:
        raise UsageError(f"no set of corruptions is called {set!r}; there are {', '.join(SETS)}")
    return SETS[set]


def check_name(name: str, set: str) -> str:
    """``name``; raises UsageError when ``set`` has no such corruption."""
    names = check_set(set).names
    if name not in names:
        raise UsageError(f"no corruption of the set {set!r} is called {name!r}; there are {', '.join(names)}")
    return name


def sample(
    name: str, severity: Tensor, size: tuple[int, int], set: str, generator: torch.Generator
) -> CorruptionParameters:
    """Draw the parameters of a batch.

    Args:
        name: a corruption of the set: :data:`CORRUPTIONS`, :data:`HELD_OUT`, or for "mnist" MNIST-C's.
        severity: whole numbers [n], 1 (weak) to 5 (strong); 0 leaves an image clean.
        size: (height, width) of the images in pixels.
        set: constants, a key of :data:`SETS`.
        generator: on the CPU; one 64-bit seed is drawn from it for each image.

    Raises:
        UsageError: an unknown name or set, a severity outside 0 to 5 or not whole, a size below 1.
    """
    check_name(name, set)
    if (
        severity.dim() != 1
        or severity.is_floating_point()
        or severity.is_complex()
        or severity.dtype == torch.bool
    ):
        raise UsageError(
            f"severity must be a tensor of whole numbers, one an image; found {severity.dtype} of shape "
            f"{tuple(severity.shape)}"
        )
    severity = severity.detach().to("cpu", torch.int64)
    outside = (severity < 0) | (severity > 5)
    if outside.any():
        raise UsageError(
            f"severity must be 1 to 5 (0: clean); found {int(severity[outside][0])} for image "
            f"{int(outside.nonzero()[0])}"
        )
    height, width = size
    if height < 1 or width < 1:
        raise UsageError(f"size must be at least 1 x 1 pixel; found {height} x {width}")
    seed = torch.randint(-(2**63), 2**63 - 1, (len(severity),), generator=generator)
    return CorruptionParameters(name, set, (height, width), severity, seed)


def _check_images(images: Tensor, parameters: CorruptionParameters) -> None:
    channels = check_set(parameters.set).channels
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be a tensor [n, {channels}, height, width]; found {found}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UsageError(f"images must be uint8, or float in [0, 1]; found {images.dtype}")
    if images.shape[1] != channels:
        advice = {
            (1, 3): "repeat the grey channel (images.expand(-1, 3, -1, -1)) or use the set 'mnist'",
            (4, 3): "leave the alpha channel out (images[:, :3])",
            (3, 1): "the set 'mnist' is for grey images",
        }.get((images.shape[1], channels), f"the set {parameters.set!r} takes {channels}")
        raise UsageError(f"images must have {channels} channels; found {images.shape[1]}: {advice}")
    if tuple(images.shape[2:]) != parameters.size or len(images) != len(parameters):
        raise UsageError(
            f"parameters were drawn for {len(parameters)} images of {parameters.size[0]} x {parameters.size[1]}; "
            f"found {len(images)} of {images.shape[2]} x {images.shape[3]}"
        )


@torch.no_grad()
def apply(images: Tensor, parameters: CorruptionParameters) -> Tensor:
    """Corrupt a batch.

    Args:
        images: [n, 3, h, w] RGB ([n, 1, h, w] for the set "mnist"), uint8, or float in [0, 1]; on any device.
        parameters: what :func:`sample` drew for these n images.

    Returns:
        The same shape, dtype and device. uint8 results are cut to whole levels, as the published sets are (MNIST-C's
        rounded); floats are not rounded, except by what rounds by its nature (JPEG, pixelate, glass blur). Clean
        images come back as they are.

    Raises:
        UsageError: a wrong dtype, number of channels or shape.
    """
    _check_images(images, parameters)
    severities = parameters.severity.unique().tolist()
    if severities in ([], [0]):
        return images.clone()
    seeds = parameters.seed.to(images.device, non_blocking=True)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for severity in severities:
        if len(severities) == 1:
            _corrupt_alike(images, severity, parameters, Draws(seeds), out)
            break
        chosen = (parameters.severity == severity).nonzero().squeeze(1).to(images.device, non_blocking=True)
        part = images.index_select(0, chosen)
        done = part
        if severity > 0:
            done = torch.empty_like(part, memory_format=torch.contiguous_format)
            _corrupt_alike(part, severity, parameters, Draws(seeds.index_select(0, chosen)), done)
        out.index_copy_(0, chosen, done)
    return out


def _corrupt_alike(
    images: Tensor, severity: int, parameters: CorruptionParameters, draws: Draws, out: Tensor
) -> None:
    """Corrupt images that have one severity, into ``out``."""
    set = SETS[parameters.set]
    constants = set.constants(parameters.name, severity, parameters.size)
    kernel = (MNIST_KERNELS if set.channels == 1 else KERNELS)[parameters.name]
    step, whole = len(images), images.dtype == torch.uint8
    if images.device.type == "cpu":
        if parameters.name in PICTURES and parameters.size[0] * parameters.size[1] > SMALL:
            pictures = images if whole else images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
            done = out if whole else torch.empty_like(pictures)
            each_picture(pictures.contiguous(), PICTURES[parameters.name](constants), done)
            if not whole:
                out.copy_(done.float().mul_(1 / 255))
            return
        step = max(1, PART // max(1, images[0].numel()))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        levels = images[part].float() if whole else images[part].float() * 255
        levels = kernel(levels, constants, draws[part]).clamp_(0, 255)
        if whole and set.channels == 1:
            levels.round_()
        out[part] = levels if whole else levels.mul_(1 / 255)


def corrupt(
    images: Tensor, name: str, severity: int | Tensor, set: str = "imagenet", seed: int = 0
) -> Tensor:
    """Draw and apply in one call: the same arguments give the same result.

    Args:
        images: [n, 3, h, w] RGB, uint8 or float in [0, 1], on any device.
        name: the corruption.
        severity: 0 to 5, one number for all images or a tensor [n].
        set: constants, a key of :data:`SETS`.
        seed: of the generator that the parameters are drawn from.

    Returns:
        The same shape, dtype and device.

    Raises:
        UsageError: as :func:`sample` and :func:`apply`.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be a tensor [n, 3, height, width]; found {found}")
    if not isinstance(severity, Tensor):
        if isinstance(severity, bool) or not isinstance(severity, int):
            raise UsageError(f"severity must be a whole number, 1 to 5 (0: clean); found {severity!r}")
        severity = torch.full((len(images),), severity)
    generator = torch.Generator().manual_seed(seed)
    size = images.shape[2], images.shape[3]
    return apply(images, sample(name, severity, size, set, generator))
