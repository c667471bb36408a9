"""Images of any kind as pixels: paths, encoded bytes, PIL images, numpy arrays and tensors."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lrface.errors import UsageError


class _Unusable(Exception):
    """This one image cannot be embedded; the message is the reason."""


@dataclass
class _Item:
    """One input image: its position, what it is called in messages, and the thing itself."""

    index: int
    label: str
    value: Any


@dataclass
class _Face:
    """One face on its way to the network: float32 [3, s, s] in [0, 1] and where it came from."""

    pixels: Tensor
    box: np.ndarray
    score: float
    landmarks: np.ndarray
    resolution: float
    source: int


def _items(images: Any) -> list[_Item]:
    """Whatever :meth:`FaceEmbedder.embed` takes, as single images."""
    values: list[Any]
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        values = [images]
    elif isinstance(images, np.ndarray | Tensor):
        if images.ndim not in (2, 3, 4):
            raise UsageError(f"an image has 2 or 3 axes, a batch 4; found shape {list(images.shape)}")
        values = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Iterable):
        values = list(images)
    else:
        raise UsageError(f"embed takes images or a list of them; found {type(images).__name__}")
    items = []
    for index, value in enumerate(values):
        if isinstance(value, str | os.PathLike):
            label = os.fspath(value)
        elif isinstance(value, bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor):
            label = f"image {index}"
        else:
            raise UsageError(
                f"image {index} is a {type(value).__name__}; embed takes paths, bytes, PIL images, numpy "
                "arrays [h, w, 3] and tensors [3, h, w]"
            )
        items.append(_Item(index, str(label), value))
    return items


def _decode(item: _Item) -> np.ndarray | Tensor:
    """uint8 [h, w, 3], or float32 [3, h, w] in [0, 1] for an image that came in floating point.

    Raises _Unusable.
    """
    value = item.value
    if isinstance(value, Tensor):
        return _from_channels_first(value.detach().cpu())
    if isinstance(value, np.ndarray):
        return _from_array(value)
    from lrface.align.pipeline import UnreadableImage, read_photo

    try:
        if isinstance(value, Image.Image):
            return read_photo(value)
        return read_photo(Path(value) if isinstance(value, str | os.PathLike) else bytes(value))
    except UnreadableImage as error:
        raise _Unusable(str(error)) from error


def _from_array(array: np.ndarray) -> np.ndarray | Tensor:
    """numpy [h, w], [h, w, 1] or [h, w, 3] as :func:`_decode` gives it. Raises _Unusable."""
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise _Unusable(f"an array must be RGB [h, w, 3] or grey [h, w]; found shape {shape}")
    if array.dtype == np.uint8:
        return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise _Unusable(f"an array must be uint8, or floating point in [0, 1]; found {array.dtype}")
    return _from_channels_first(
        torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
    )


def _from_channels_first(tensor: Tensor) -> np.ndarray | Tensor:
    """A tensor [3, h, w], [1, h, w] or [h, w] as :func:`_decode` gives it. Raises _Unusable."""
    shape = list(tensor.shape)
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise _Unusable(f"a tensor must be RGB [3, h, w] or grey [1, h, w]; found shape {shape}")
    tensor = tensor.expand(3, *tensor.shape[1:])
    if tensor.dtype == torch.uint8:
        return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())
    if not tensor.is_floating_point():
        raise _Unusable(f"a tensor must be uint8, or floating point in [0, 1]; found {tensor.dtype}")
    tensor = tensor.float()
    low, high = float(tensor.min()), float(tensor.max())
    # What enlarging by bicubic overshoots, or rounding, is forgiven; 0 to 255 and [-1, 1] are not.
    if not (low >= -0.1 and high <= 1.1):
        raise _Unusable(f"floating point pixels must lie in [0, 1]; found {low:g} to {high:g}")
    return tensor.clamp(0.0, 1.0)


def _sides(image: np.ndarray | Tensor) -> tuple[int, int]:
    """Height and width of what :func:`_decode` gives."""
    return (
        (image.shape[0], image.shape[1])
        if isinstance(image, np.ndarray)
        else (image.shape[1], image.shape[2])
    )


def _as_tensor(image: np.ndarray | Tensor) -> Tensor:
    """float32 [3, h, w] in [0, 1]."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(
        np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
    )


def _as_photo(image: np.ndarray | Tensor) -> np.ndarray:
    """uint8 [h, w, 3]: what the detector takes."""
    if isinstance(image, np.ndarray):
        return image
    return np.ascontiguousarray((image * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _attempt(item: _Item) -> np.ndarray | Tensor | _Unusable:
    try:
        return _decode(item)
    except _Unusable as reason:
        return reason


def _decoded(items: Sequence[_Item], workers: int) -> Iterator[tuple[_Item, np.ndarray | Tensor | _Unusable]]:
    """Every item with its pixels, in order; files are read a few ahead on ``workers`` threads."""
    encoded = any(not isinstance(item.value, np.ndarray | Tensor) for item in items)
    if workers < 2 or len(items) < 2 or not encoded:
        for item in items:
            yield item, _attempt(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lrface-decode")
    pending: deque[tuple[_Item, Future[np.ndarray | Tensor | _Unusable]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(_attempt, item)))
            if len(pending) > 4 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
