"""Loss of resolution: images shrunk to a size and enlarged back. Pure functions on batches of tensors."""

from torch import Tensor
from torch.nn import functional as F

from lrface.errors import UsageError

KERNELS = ("nearest", "area", "bilinear", "bicubic")


def check_kernel(kernel: str, field: str) -> str:
    """Return ``kernel``; raises UsageError naming ``field`` when it is not one of :data:`KERNELS`."""
    if kernel not in KERNELS:
        raise UsageError(f"{field} must be one of {', '.join(KERNELS)}; found {kernel!r}")
    return kernel


def resize(images: Tensor, size: int, kernel: str) -> Tensor:
    """Resize square or other images to ``size`` x ``size``.

    Pixel grids follow OpenCV and PyTorch (align_corners off; nearest takes floor(i * scale)). Shrinking by
    bilinear or bicubic is antialiased, as in Pillow and MATLAB; area is the mean over the covered source
    pixels, and equals nearest when enlarging. Bicubic results are clipped to [0, 1], which they overshoot.

    Args:
        images: float [n, c, h, w] in [0, 1].
        size: target side in pixels.
        kernel: nearest, area, bilinear or bicubic.

    Returns:
        float [n, c, size, size] in [0, 1].
    """
    check_kernel(kernel, "kernel")
    if images.shape[-2:] == (size, size):
        return images
    if kernel in ("nearest", "area"):
        return F.interpolate(images, (size, size), mode=kernel)
    shrinking = size < max(images.shape[-2:])
    out = F.interpolate(images, (size, size), mode=kernel, align_corners=False, antialias=shrinking)
    return out.clamp(0.0, 1.0) if kernel == "bicubic" else out


def resample(images: Tensor, size: int, down: str = "nearest", up: str = "bilinear") -> Tensor:
    """Shrink to ``size`` x ``size``, then enlarge back to the original size.

    The defaults are the paper's low-resolution images (001, section 4.4: nearest down; the paper does not
    name the kernel of the way up, bilinear is lrface's choice).

    Args:
        images: float [n, c, h, h] in [0, 1], square.
        size: side of the low-resolution image in pixels; at or above the image's own side the images are
            returned as they are.
        down: kernel of the way down: nearest, area, bilinear or bicubic.
        up: kernel of the way up.

    Returns:
        float [n, c, h, h] in [0, 1].

    Raises:
        UsageError: an unknown kernel, a size below 1, or images that are not square.
    """
    height, width = images.shape[-2:]
    check_kernel(down, "down")
    check_kernel(up, "up")
    if height != width:
        raise UsageError(f"resample takes square images; found {height} x {width}")
    if size < 1:
        raise UsageError(f"a resolution must be at least 1 pixel; found {size}")
    if size >= height:
        return images
    return resize(resize(images, size, down), height, up)
