"""Spatter of water or mud. Levels are float32 [n, c, h, w] from 0 to 255."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor

from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.corruptions.filters import blur_separably

_WATER = (175.0, 238.0, 238.0)
_MUD = (63.0, 42.0, 20.0)
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)


def _drops(liquid: np.ndarray) -> np.ndarray:
    """How strongly water shows: drops lit from one side. float32 [h, w] -> float32 [h, w] from 0 to 1."""
    layer = (liquid * 255).astype(np.int32).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    lit = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, _EMBOSS)
    drops = layer * cv2.blur(lit, (3, 3)).astype(np.float32)
    most = drops.max()
    return drops / most if most > 0 else drops


def spatter(levels: Tensor, constants: tuple[float, float, float, float, float, int], draws: Draws) -> Tensor:
    """Severities 1 to 3: pale water; 4 and 5: mud. The shading of water is computed on the CPU."""
    mean, deviation, sigma, threshold, strength, mud = constants
    height, width = levels.shape[-2:]
    liquid = draws.normal("liquid", 1, height, width).mul_(deviation).add_(mean)
    liquid = blur_separably(liquid, (sigma, sigma))
    if mud:
        cover = blur_separably((liquid > threshold).float(), (strength, strength))
        cover = cover.masked_fill_(cover < 0.8, 0)
        return levels.mul_(1 - cover).add_(cover * _colour(_MUD, levels))
    layers = liquid.masked_fill_(liquid < threshold, 0).squeeze(1).cpu().numpy()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        drops = np.stack(list(pool.map(_drops, layers)))
    shown = torch.from_numpy(drops)[:, None].to(levels.device).mul_(strength)
    return levels.add_((shown * _colour(_WATER, levels)).clamp_(0, 255))


def _colour(rgb: tuple[float, float, float], levels: Tensor) -> Tensor:
    return torch.tensor(rgb, device=levels.device).view(1, 3, 1, 1)
