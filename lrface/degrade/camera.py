"""What real cameras do to faces: noise of the sensor, shaken exposures, turbulent air, low light, compressed video.

Each degradation takes a strength from 0 (hardly visible) to 1 (severe), which may differ from image to image;
severities 1 to 5 are the strengths 0.2 to 1. Lengths are in parts of sqrt(height * width), so that a face of 112
pixels is degraded as one of 224 pixels. :data:`CHAIN` applies blur, loss of resolution, noise and JPEG one after the
other in a random order, the practical degradation model of K. Zhang et al., "Designing a Practical Degradation Model
for Deep Blind Image Super-Resolution", ICCV 2021.

Parameters are drawn first, then applied; what happens to an image is a function of its strength and its seed alone.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import blur_separably, correlate
from lrface.degrade.corruptions.jpeg import jpeg
from lrface.errors import LrfaceError, UsageError

CHAIN = "chain"

# Levels float32 [n, 3, h, w] from 0 to 255 (may be overwritten), strengths [n], random numbers -> levels.
Kernel = Callable[[Tensor, Tensor, Draws], Tensor]


@dataclass(frozen=True)
class CameraParameters:
    """What happens to each of n images. The tensors lie on the CPU.

    name: a key of :data:`DEGRADATIONS`.
    size: (height, width) in pixels.
    strength: float32 [n], 0 to 1.
    seed: int64 [n].
    """

    name: str
    size: tuple[int, int]
    strength: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return len(self.strength)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _between(strength: Tensor, weak: float, severe: float) -> Tensor:
    """From ``weak`` at strength 0 to ``severe`` at 1, by equal factors."""
    return weak * (severe / weak) ** strength


def _side(levels: Tensor) -> float:
    return math.sqrt(levels.shape[-2] * levels.shape[-1])


def _to_light(levels: Tensor) -> Tensor:
    """From sRGB levels to linear light from 0 to 1 (a plain power of 2.2)."""
    return (levels / 255).clamp_(0, 1).pow_(2.2)


def _to_levels(light: Tensor) -> Tensor:
    return light.clamp_(0, 1).pow_(1 / 2.2).mul_(255)


def _expose(light: Tensor, photons: Tensor, read_noise: Tensor, normal: Tensor) -> Tensor:
    """Poisson-Gaussian noise: a variance of signal / photons, and of read_noise squared. The Poisson part is taken
    as normal (A. Foi et al., "Practical Poissonian-Gaussian noise modeling", 2008)."""
    return light.addcmul(normal, (light / photons + read_noise**2).sqrt_())


def sensor_noise(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Shot noise and read noise in linear light: 5,000 to 40 photons at full white, read noise 0.1 to 3 %."""
    photons = _per_image(_between(strength, 5000, 40))
    read_noise = _per_image(_between(strength, 0.001, 0.03))
    normal = draws.normal("sensor", *levels.shape[1:])
    return _to_levels(_expose(_to_light(levels), photons, read_noise, normal))


def low_light(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """An exposure 0.5 to 5 stops too short: noise, a converter of 10 bits, half of the stops given back by gain."""
    stops = _per_image(0.5 + 4.5 * strength)
    light = _to_light(levels) * 2**-stops
    normal = draws.normal("sensor", *levels.shape[1:])
    light = _expose(light, _per_image(_between(strength, 8000, 1500)), torch.tensor(0.002), normal)
    light = light.clamp_(0, 1).mul_(1023).round_().div_(1023)
    return _to_levels(light * 2 ** (stops / 2))


def trajectory_kernels(strength: Tensor, side: float, draws: Draws) -> Tensor:
    """Point spread functions of a camera that is shaken while it exposes.

    A point moves with inertia, is pulled back to where it started and is jerked now and then (after G. Boracchi and
    A. Foi, "Modeling the performance of image restoration from motion blur", 2012). Its path spans up to 3 to 20 % of
    ``side`` pixels.

    Returns:
        float32 [n, k, k], each of sum 1 with its centre of mass in the middle; k is odd.
    """
    count, steps = len(strength), 64
    spans = side * (0.03 + 0.17 * strength)
    normal = draws.normal("shake", steps, 2)
    jerks = (draws.uniform("jerks", steps, 1) < 0.04) * draws.normal("jerk", steps, 2)
    turn = draws.uniform("start", 1).mul_(2 * math.pi)
    speed = torch.cat([turn.cos(), turn.sin()], dim=1)
    place = torch.zeros_like(speed)
    path = []
    for step in range(steps):
        speed = 0.97 * speed + 0.15 * normal[:, step] + 2 * jerks[:, step] - 0.01 * place
        place = place + speed
        path.append(place)
    points = torch.stack(path, dim=1)
    points = points - points.mean(1, keepdim=True)
    length = (points.amax(1) - points.amin(1)).amax(1).clamp_(min=1e-6)
    points = points * (spans / length)[:, None, None]
    reach = math.ceil(0.2 * side) + 1
    size = 2 * reach + 1
    kernels = torch.zeros(count, size * size, device=strength.device)
    corner = points.floor()
    share = points - corner
    for row in (0, 1):
        for column in (0, 1):
            weight = (share[..., 0] - (1 - row)).abs() * (share[..., 1] - (1 - column)).abs()
            index = (corner[..., 0] + row + reach) * size + corner[..., 1] + column + reach
            kernels.scatter_add_(1, index.long().clamp_(0, size * size - 1), weight)
    return kernels.div_(kernels.sum(1, keepdim=True)).view(count, size, size)


def motion_blur(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Blur along the path of a shaken camera."""
    kernels = trajectory_kernels(strength, _side(levels), draws)
    middle = kernels.shape[-1] // 2
    return correlate(levels, kernels, (middle, middle), "nearest")


def _smooth_field(draws: Draws, stream: str, channels: int, levels: Tensor, scale: float) -> Tensor:
    """Smooth noise of deviation 1, float32 [n, channels, h, w]; ``scale`` is its width in pixels."""
    height, width = levels.shape[-2:]
    rows, columns = max(2, round(height / scale) + 3), max(2, round(width / scale) + 3)
    coarse = draws.normal(stream, channels, rows, columns)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return field / field.std(dim=(2, 3), keepdim=True, correction=0).clamp_(min=1e-6)


def turbulence(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Hot air: the image is warped by smooth displacements, and blurred more in some places than in others."""
    count, _, height, width = levels.shape
    side = _side(levels)
    # Cells of air of two sizes; the small ones displace less.
    displacement = _smooth_field(draws, "large cells", 2, levels, side / 6)
    displacement = displacement + 0.4 * _smooth_field(draws, "small cells", 2, levels, side / 20)
    displacement = displacement * _per_image(side * 0.02 * strength)
    rows = torch.arange(height, device=levels.device)[:, None] + displacement[:, 0]
    columns = torch.arange(width, device=levels.device) + displacement[:, 1]
    grid = torch.stack([(columns + 0.5) * (2 / width) - 1, (rows + 0.5) * (2 / height) - 1], dim=-1)
    warped = F.grid_sample(levels, grid, padding_mode="reflection", align_corners=False)
    # Blur between no blur and the two strengths around what a pixel is to get.
    widest = 0.02 * side
    half, full = (blur_separably(warped, (sigma, sigma)) for sigma in (widest / 2, widest))
    amount = torch.sigmoid(1.5 * _smooth_field(draws, "blur", 1, levels, side / 4)) * 2 * _per_image(strength)
    blurred = torch.where(
        amount < 1, warped.lerp(half, amount.clamp(0, 1)), half.lerp(full, (amount - 1).clamp(0, 1))
    )
    return blurred.view(count, -1, height, width)


def _encode(image: np.ndarray, quality: int) -> np.ndarray:
    """The last of three frames of an H.264 video that shows the image. uint8 [h, w, 3] -> the same; sides even."""
    import io

    import av

    stored = io.BytesIO()
    with av.open(stored, mode="w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "preset": "veryfast", "bf": "0", "threads": "1"}
        # The scene comes to rest: blocks are coded from blocks of the frame before.
        for shift in (2, 1, 0):
            frame = av.VideoFrame.from_ndarray(np.roll(image, shift, axis=1), format="rgb24")
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    stored.seek(0)
    with av.open(stored, mode="r") as coded:
        frames = [frame.to_ndarray(format="rgb24") for frame in coded.decode(video=0)]
    return frames[-1]


def video(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """H.264 by x264 through PyAV, constant rate factor 24 to 42. Runs on the CPU, on as many threads as torch has.

    Raises:
        LrfaceError: PyAV is not installed or has no x264.
    """
    try:
        import av

        av.codec.Codec("libx264", "w")
    except ImportError as error:
        raise LrfaceError(
            "degrading by video needs PyAV; install it with: pip install lrface[video] (or av)"
        ) from error
    except ValueError as error:
        raise LrfaceError(f"degrading by video needs PyAV with the encoder libx264 ({error})") from error
    height, width = levels.shape[-2:]
    # x264 wants even sides, and at least a macroblock.
    size = max(16, height + height % 2), max(16, width + width % 2)
    stacked = levels.reshape(1, -1, height, width)
    padded = F.pad(stacked, (0, size[1] - width, 0, size[0] - height), mode="replicate").view(-1, 3, *size)
    pixels = padded.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    factors = (24 + 18 * strength).round().int().tolist()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        coded = np.stack(list(pool.map(_encode, pixels, factors)))
    done = torch.from_numpy(coded)[:, :height, :width].permute(0, 3, 1, 2)
    return done.to(levels.device).float()


def _gaussian_kernels(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Gaussians of two widths at any angle: float32 [n, k, k]."""
    widest = 0.03 * _side(levels)
    chance = draws.uniform("gaussian", 3)
    across = (0.2 + widest * strength * chance[:, 0])[:, None, None]
    along = (0.2 + widest * strength * chance[:, 1])[:, None, None]
    turn = (chance[:, 2] * math.pi)[:, None, None]
    reach = max(1, math.ceil(3 * (0.2 + widest)))
    places = torch.arange(-reach, reach + 1, device=levels.device).float()
    x = places * turn.cos() + places[:, None] * turn.sin()
    y = places[:, None] * turn.cos() - places * turn.sin()
    kernels = torch.exp(-0.5 * ((x / across) ** 2 + (y / along) ** 2))
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def blur(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """A Gaussian of two widths, each up to 3 % of the side, at any angle: a lens out of focus."""
    kernels = _gaussian_kernels(levels, strength, draws)
    middle = kernels.shape[-1] // 2
    return correlate(levels, kernels, (middle, middle), "nearest")


_KERNELS = ("area", "bilinear", "bicubic")
_STEPS = 8


def loss_of_resolution(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Shrink, at most to 1/8, by one of three kernels and enlarge back by another.

    Factors are rounded to eight to the octave, so that images of a batch share their sizes.
    """
    chance = draws.uniform("resize", 3).cpu()
    octaves = (strength.cpu() * 3 * chance[:, 0] * _STEPS).round().long()
    keys = torch.stack([octaves, (chance[:, 1] * 3).long(), (chance[:, 2] * 3).long()], dim=1)
    size = levels.shape[-2:]
    out = levels.clone()
    for octave, down, up in keys.unique(dim=0).tolist():
        smaller = [max(1, round(side * 2 ** (-octave / _STEPS))) for side in size]
        if tuple(smaller) == tuple(size):
            continue
        chosen = (keys == torch.tensor([octave, down, up])).all(1).nonzero().squeeze(1).to(levels.device)
        part = _resize(levels.index_select(0, chosen), smaller, _KERNELS[down])
        out.index_copy_(0, chosen, _resize(part, list(size), _KERNELS[up]))
    return out


def _resize(levels: Tensor, size: list[int], kernel: str) -> Tensor:
    if kernel == "area":
        return F.interpolate(levels, size, mode="area")
    return F.interpolate(levels, size, mode=kernel, align_corners=False, antialias=True).clamp_(0, 255)


def noise(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Gaussian noise of up to 25 levels, alike in all channels for some images; or the noise of a sensor."""
    chance = draws.uniform("noise", 2)
    normal = draws.normal("noise field", *levels.shape[1:])
    grey = _per_image(chance[:, 0] < 0.4)
    normal = torch.where(grey, normal[:, :1], normal)
    plain = levels + normal * _per_image(25 * strength * chance[:, 1])
    return torch.where(
        _per_image(chance[:, 0] > 0.7), sensor_noise(levels, strength * chance[:, 1], draws), plain
    )


def jpeg_compression(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """JPEG of quality 95 down to 30, in steps of 5."""
    chance = draws.uniform("quality", 1).squeeze(1)
    quality = 95 - 5 * (13 * strength * chance).round().long().cpu()
    out = torch.empty_like(levels)
    for each in quality.unique().tolist():
        chosen = (quality == each).nonzero().squeeze(1).to(levels.device)
        out.index_copy_(0, chosen, jpeg(levels.index_select(0, chosen).clamp_(0, 255), each))
    return out


_LINKS: tuple[Kernel, ...] = (blur, loss_of_resolution, noise, jpeg_compression)


def chain(levels: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Blur, loss of resolution, noise and JPEG, each image in its own random order, each with its own strength."""
    order = draws.uniform("order", len(_LINKS)).argsort(dim=1).cpu()
    for position in range(len(_LINKS)):
        for number, link in enumerate(_LINKS):
            chosen = (order[:, position] == number).nonzero().squeeze(1).to(levels.device)
            if len(chosen) == 0:
                continue
            part = Draws(draws.seeds.index_select(0, chosen))
            done = link(levels.index_select(0, chosen), strength.index_select(0, chosen), part)
            levels.index_copy_(0, chosen, done.clamp_(0, 255))
    return levels


DEGRADATIONS: dict[str, Kernel] = {
    "sensor_noise": sensor_noise,
    "low_light": low_light,
    "motion_blur": motion_blur,
    "turbulence": turbulence,
    "video": video,
    "blur": blur,
    "loss_of_resolution": loss_of_resolution,
    "noise": noise,
    "jpeg_compression": jpeg_compression,
    CHAIN: chain,
}


def sample(
    name: str,
    n: int,
    size: tuple[int, int],
    generator: torch.Generator,
    strength: tuple[float, float] | Tensor = (0.0, 1.0),
) -> CameraParameters:
    """Draw the parameters of ``n`` images.

    Args:
        name: a key of :data:`DEGRADATIONS`.
        size: (height, width) of the images in pixels.
        generator: on the CPU.
        strength: the range it is drawn from uniformly, or a tensor [n]; 0 to 1.

    Raises:
        UsageError: an unknown name, strengths outside 0 to 1, a size below 1.
    """
    if name not in DEGRADATIONS:
        raise UsageError(f"no degradation of cameras is called {name!r}; there are {', '.join(DEGRADATIONS)}")
    if min(size) < 1:
        raise UsageError(f"size must be at least 1 x 1 pixel; found {size[0]} x {size[1]}")
    seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    if isinstance(strength, Tensor):
        strengths = strength.detach().to("cpu", torch.float32)
        if strengths.shape != (n,):
            raise UsageError(
                f"strength must have one value for each of {n} images; found {tuple(strength.shape)}"
            )
    else:
        low, high = strength
        if not low <= high:
            raise UsageError(f"strength must be a range (low, high); found ({low}, {high})")
        strengths = torch.rand(n, generator=generator) * (high - low) + low
        if low < 0 or high > 1:
            raise UsageError(f"strength must lie between 0 and 1; found {low:g} to {high:g}")
    if not ((strengths >= 0) & (strengths <= 1)).all():
        raise UsageError(
            f"strength must lie between 0 and 1; found {strengths.min():g} to {strengths.max():g}"
        )
    return CameraParameters(name, (size[0], size[1]), strengths, seed)


# A batch on the CPU is worked on in parts of about this many values, which stay in the processor's caches.
_PART = 1 << 21


@torch.no_grad()
def apply(images: Tensor, parameters: CameraParameters) -> Tensor:
    """Degrade a batch.

    Args:
        images: [n, 3, h, w] RGB, uint8 or float in [0, 1], on any device.
        parameters: what :func:`sample` drew for these images.

    Returns:
        The same shape, dtype and device; uint8 rounded.

    Raises:
        UsageError: a wrong dtype, number of channels or shape.
        LrfaceError: "video" without PyAV.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be RGB [n, 3, height, width]; found {found}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UsageError(f"images must be uint8, or float in [0, 1]; found {images.dtype}")
    if tuple(images.shape[2:]) != parameters.size or len(images) != len(parameters):
        raise UsageError(
            f"parameters were drawn for {len(parameters)} images of {parameters.size[0]} x {parameters.size[1]}; "
            f"found {len(images)} of {images.shape[2]} x {images.shape[3]}"
        )
    kernel = DEGRADATIONS[parameters.name]
    whole = images.dtype == torch.uint8
    seeds = parameters.seed.to(images.device, non_blocking=True)
    strengths = parameters.strength.to(images.device, non_blocking=True)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    step = len(images) if images.device.type != "cpu" else max(1, _PART // max(1, images[:1].numel()))
    for start in range(0, len(images), max(1, step)):
        part = slice(start, start + step)
        levels = images[part].float() if whole else images[part].float() * 255
        levels = kernel(levels.contiguous(), strengths[part], Draws(seeds[part])).clamp_(0, 255)
        out[part] = levels.round_() if whole else levels.mul_(1 / 255)
    return out


def degrade(
    images: Tensor, name: str = CHAIN, strength: tuple[float, float] | Tensor = (0.0, 1.0), seed: int = 0
) -> Tensor:
    """Draw and apply in one call: the same arguments give the same result. See :func:`sample` and :func:`apply`."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images must be RGB [n, 3, height, width]; found {found}")
    generator = torch.Generator().manual_seed(seed)
    size = images.shape[2], images.shape[3]
    return apply(images, sample(name, len(images), size, generator, strength))
