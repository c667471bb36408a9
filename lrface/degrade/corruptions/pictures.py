"""Handing images one by one to libraries that take them one by one, on several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lrface.errors import LrfaceError

# uint8 [h, w, 3] RGB -> the same shape.
Work = Callable[[np.ndarray], np.ndarray]


def each_picture(images: Tensor, work: Work, out: Tensor) -> None:
    """Apply ``work`` to every image, on as many threads as torch has.

    Args:
        images: uint8 [n, 3, h, w] on the CPU.
        out: the same, written.
    """
    planes, done = images.numpy(), out.numpy()

    def run(index: int) -> None:
        cv2.split(work(cv2.merge(list(planes[index]))), list(done[index]))

    threads = torch.get_num_threads()
    if threads > 1 and len(planes) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(len(planes))))
    else:
        for index in range(len(planes)):
            run(index)


def jpeg_picture(quality: int) -> Work:
    """JPEG by OpenCV's libjpeg."""

    def code(picture: np.ndarray) -> np.ndarray:
        # Red and blue change places twice: OpenCV takes blue first.
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        done, stored = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded = cv2.imdecode(stored, cv2.IMREAD_COLOR) if done else None
        if decoded is None:
            raise LrfaceError(
                f"an image of {picture.shape[0]} x {picture.shape[1]} could not be coded as JPEG"
            )
        return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)

    return code


def pixelate_picture(ratio: float) -> Work:
    """Shrinking and enlarging by Pillow."""

    def shrink(picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        small = max(1, int(width * ratio)), max(1, int(height * ratio))
        shrunk = Image.fromarray(picture).resize(small, Image.Resampling.BOX)
        return np.asarray(shrunk.resize((width, height), Image.Resampling.NEAREST))

    return shrink
