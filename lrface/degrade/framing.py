"""What an image and its clean original have in common: mirroring, and cropping from a padded image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.degrade.policy import check_share
from lrface.errors import UsageError


@dataclass
class Frame:
    """How n images are framed. All tensors have shape [n] and live on the CPU.

    mirror: bool, flipped left to right.
    top, left: int64, where the crop begins in the padded image; the padding's width is the image as it was.
    """

    mirror: Tensor
    top: Tensor
    left: Tensor


class Framing:
    """Mirrors images, and moves them by up to ``crop_padding`` pixels up, down, left and right over black.

    Args:
        mirror: probability of a left-right flip.
        crop_padding: pixels of black around an image before a crop of its own size is taken from a random place (4 for
            CIFAR-10); 0 does not crop.

    Raises:
        UsageError: a probability outside [0, 1], a padding below 0.
    """

    def __init__(self, mirror: float = 0.5, crop_padding: int = 0):
        check_share("mirror", mirror)
        if crop_padding < 0:
            raise UsageError(f"degrade.crop_padding must be at least 0 pixels; found {crop_padding}")
        self.mirror = mirror
        self.padding = crop_padding

    def sample(self, n: int, generator: torch.Generator) -> Frame:
        """Draw for ``n`` images from a CPU ``generator``."""
        mirror = torch.rand(n, generator=generator) < self.mirror
        top, left = torch.randint(2 * self.padding + 1, (2, n), generator=generator)
        return Frame(mirror, top, left)

    def apply(self, images: Tensor, frame: Frame) -> Tensor:
        """float [n, c, h, w] -> the same, framed."""
        height, width = images.shape[-2:]
        if not self.padding:
            return torch.where(frame.mirror.to(images.device)[:, None, None, None], images.flip(-1), images)
        rows = frame.top[:, None] + torch.arange(height)
        columns = torch.where(frame.mirror[:, None], torch.arange(width).flip(0), torch.arange(width))
        columns = columns + frame.left[:, None]
        pixels = F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1)
        places = (torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :])
        return pixels[tuple(place.to(images.device) for place in places)].permute(0, 3, 1, 2)
