"""Images restored in pixel space before a network sees them: the baselines of Tables 7 and 8 of paper 002.

nlm            Non-Local Means (Buades, Coll and Morel, IPOL 2011), OpenCV's
deep_decoder   a small untrained network fitted to each image (Heckel and Hand, ICLR 2019)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.deep_decoder import DeepDecoder
from lrface.registry import Registry

Restorer = Callable[[Tensor], Tensor]
"""float32 [n, 3, s, s] in [0, 1], degraded -> the same, restored; each image by itself."""

RESTORERS: Registry[Restorer] = Registry("restore")


def noise_level(images: Tensor) -> Tensor:
    """Standard deviation of white noise in each image, estimated from its second differences, in units of [0, 1]
    (J. Immerkaer, "Fast Noise Variance Estimation", CVIU 1996).

    Args:
        images: float [n, c, h, w], h and w at least 3.

    Returns:
        float [n].
    """
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]], dtype=images.dtype)
    channels = images.shape[1]
    found = F.conv2d(images, kernel.to(images.device).expand(channels, 1, 3, 3), groups=channels)
    return found.abs().mean(dim=(1, 2, 3)) * (torch.pi / 2) ** 0.5 / 6


class NonLocalMeans:
    """OpenCV's fastNlMeansDenoising on colours: each pixel becomes a mean of pixels whose surroundings are alike.

    Args:
        strength: the filter's h over the noise's standard deviation, which is estimated for each image.
        patch, search: side in pixels of the surroundings and of the window they are looked for in, both odd.

    Raises:
        UsageError: a strength that is not above 0, an even side.
    """

    def __init__(self, strength: float = 1.0, patch: int = 5, search: int = 13):
        if not strength > 0:
            raise UsageError(f"restore.strength must be above 0; found {strength}")
        for name, side in (("patch", patch), ("search", search)):
            if side < 1 or side % 2 == 0:
                raise UsageError(f"restore.{name} must be an odd number of pixels; found {side}")
        self.strength, self.patch, self.search = strength, patch, search

    def __call__(self, images: Tensor) -> Tensor:
        import cv2

        pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        levels = (noise_level(images) * 255 * self.strength).tolist()

        def restored(image: NDArray[np.uint8], level: float) -> NDArray[Any]:
            return cv2.fastNlMeansDenoising(image, None, level, self.patch, self.search)

        done = np.stack([restored(np.ascontiguousarray(i), h) for i, h in zip(pixels, levels, strict=True)])
        return torch.from_numpy(done).permute(0, 3, 1, 2).float().div(255).to(images.device)


class DeepDecoderRestorer:
    """Each image as the Deep Decoder that was fitted to it gives it; Adam on the mean squared error of what was measured.

    Args:
        steps: of Adam; 5000 in paper 002.
        learning_rate: 0.01, the authors'.
        channels: see :class:`~lrface.models.deep_decoder.DeepDecoder`.
        missing: black pixels were not measured and do not count (inpainting); else all do (denoising).
        together: images fitted at once; the result does not depend on it but for rounding.

    Raises:
        UsageError: a number below 1, or a learning rate that is not above 0.
    """

    def __init__(
        self,
        steps: int = 5000,
        learning_rate: float = 0.01,
        channels: int | None = None,
        missing: bool = True,
        together: int = 64,
    ):
        for name, value in (("steps", steps), ("channels", channels), ("together", together)):
            if value is not None and value < 1:
                raise UsageError(f"restore.{name} must be at least 1; found {value}")
        if not learning_rate > 0:
            raise UsageError(f"restore.learning_rate must be above 0; found {learning_rate}")
        self.steps, self.learning_rate, self.channels = steps, learning_rate, channels
        self.missing, self.together = missing, together

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._fit(part) for part in images.split(self.together)])

    def _fit(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            decoder = DeepDecoder(len(images), images.shape[-1], self.channels, generator=generator)
            decoder.to(images.device)
            measured = torch.ones_like(images[:, :1])
            if self.missing:
                measured = (images > 0).any(dim=1, keepdim=True).to(images.dtype)
            # A mean over each image, a sum over images: the weights of one image know nothing of the others.
            weight = measured / measured.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1) / 3
            optimiser = torch.optim.Adam(decoder.parameters(), lr=self.learning_rate)
            for _ in range(self.steps):
                optimiser.zero_grad(set_to_none=True)
                ((decoder() - images).square() * weight).sum().backward()
                optimiser.step()
        with torch.no_grad():
            return decoder()


RESTORERS.register("nlm", NonLocalMeans)
RESTORERS.register("deep_decoder", DeepDecoderRestorer)


def build_restorer(name: str, **arguments: Any) -> Restorer:
    """The restorer ``name``. Raises UsageError for an unknown name, or arguments that it does not take."""
    return RESTORERS.build(name, **arguments)
