"""From a source of faces to training batches: order, decoding, batches of uint8 tensors."""

import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lrface.data.crop import RandomResizedCrop, read_crop
from lrface.data.sampling import EpochOrders, Sampling
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError
from lrface.progress import progress


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the ``n`` images in ``epoch``, int64 [n]: a function of its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_seed(seed: int, step: int) -> int:
    """The seed of one step's augmentation, so that any batch can be replayed by itself."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


class StepSampler(Sampler[list[int]]):
    """Batches of indices for steps ``first`` to ``last`` (excluded).

    Every epoch is a fresh permutation without repetition; its last images that do not fill a batch are left
    out. A step's batch depends on (seed, step) alone, so a run can start again at any step. ``orders`` gives
    epochs of another kind (:mod:`lrface.data.sampling`), then of ``orders.length`` images.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, first: int, last: int, orders: EpochOrders | None = None
    ):
        self.n, self.batch_size, self.seed, self.first, self.last = n, batch_size, seed, first, last
        self.orders = orders
        if orders is not None:
            self.n = orders.length

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.n // self.batch_size
        order, epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.first, self.last):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                known = self.orders
                order = epoch_order(self.n, self.seed, epoch) if known is None else known.order(epoch)
            start = step % per_epoch * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class PartSampler(Sampler[list[int]]):
    """What rank ``rank`` of ``ranks`` takes of each batch of ``batches``: an equal share, in the batch's order."""

    def __init__(self, batches: StepSampler, rank: int, ranks: int):
        self.batches, self.rank, self.ranks = batches, rank, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches:
            share = len(indices) // self.ranks
            yield indices[self.rank * share : (self.rank + 1) * share]


class SeededBatch(list[int]):
    """Indices of images, and what is drawn for them: rows ``first`` and following of what ``seed`` gives for a batch of
    ``whole`` images."""

    def __init__(self, indices: Sequence[int], seed: int, first: int, whole: int):
        super().__init__(indices)
        self.seed, self.first, self.whole = seed, first, whole


class SeededSampler(Sampler[list[int]]):
    """The batches of ``sampler`` with the seeds of their steps; see :class:`SeededBatch`."""

    def __init__(self, sampler: Sampler[list[int]], seed: int, first: int, part: tuple[int, int]):
        self.sampler, self.seed, self.first, self.part = sampler, seed, first, part

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = self.part
        for step, indices in enumerate(self.sampler, start=self.first):
            share = len(indices)
            yield SeededBatch(indices, batch_seed(self.seed, step), rank * share, ranks * share)


def fit_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an aligned crop to ``size`` x ``size`` (area when shrinking, bilinear when enlarging)."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    shrinking = size < max(height, width)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def in_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [h, w, 3] RGB as it is, or for one channel as grey [h, w, 1] (BT.601; equal channels keep their values)."""
    return image if channels == 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]


class FaceDataset(Dataset[dict[str, Any]]):
    """Batches of decoded faces: uint8 [n, channels, size, size], RGB or grey, and labels int64 [n]."""

    seeded = False
    """Whether it draws something for each batch and must be asked with :class:`SeededBatch`."""

    def __init__(self, source: FaceSource, size: int, channels: int = 3):
        self.source = source
        self.size = size
        self.channels = channels
        self.labels = torch.from_numpy(np.ascontiguousarray(source.labels))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        images = np.empty((len(indices), self.size, self.size, self.channels), dtype=np.uint8)
        for row, index in enumerate(indices):
            images[row] = in_channels(fit_image(self.source.image(int(index)), self.size), self.channels)
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "label": self.labels[torch.as_tensor(indices)],
        }


class CroppedDataset(FaceDataset):
    """Batches of crops: every image is cut anew each time it is shown, as the step's seed says; decoded as it goes.

    Its batches are asked for with :class:`SeededBatch`, which :func:`batches` does.
    """

    seeded = True

    def __init__(self, source: FaceSource, size: int, crop: RandomResizedCrop, channels: int = 3):
        super().__init__(source, size, channels)
        self.crop = crop

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        if not isinstance(indices, SeededBatch):
            raise TypeError("crops are drawn from a step's seed: ask with a SeededBatch")
        images = np.empty((len(indices), self.size, self.size, self.channels), dtype=np.uint8)
        numbers = self.crop.draw(indices.whole, indices.seed)[indices.first :]
        for row, index in enumerate(indices):
            found = read_crop(self.source, int(index), self.crop, numbers[row], self.size)
            images[row] = in_channels(found, self.channels)
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "label": self.labels[torch.as_tensor(list(indices))],
        }


class CachedDataset(FaceDataset):
    """All faces decoded once into memory: uint8 [n, size, size, channels]."""

    def __init__(self, source: FaceSource, size: int, show_progress: bool = True, channels: int = 3):
        super().__init__(source, size, channels)
        self.images = torch.empty((len(source), size, size, channels), dtype=torch.uint8)
        target = self.images.numpy()
        with progress(len(source), "decoding", enabled=show_progress) as bar:
            for index in range(len(source)):
                target[index] = in_channels(fit_image(source.image(index), size), channels)
                bar.advance()

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = torch.as_tensor(indices)
        return {"image": self.images[chosen].permute(0, 3, 1, 2), "label": self.labels[chosen]}


def _same(batch: Any) -> Any:
    return batch


def _outlive_signals(_worker: int) -> None:
    """Let a scheduler's signal to the whole job, or Ctrl-C, reach the main process only: it saves, then ends this one.

    Five minutes after it a worker ends all the same, in case nobody else ends it.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name) and hasattr(signal, "alarm"):
            signal.signal(getattr(signal, name), lambda *_: signal.alarm(300))


def _from_workers(loader: "DataLoader[Any]") -> Generator[Any, None, None]:
    """What ``loader`` gives; the death of a worker always as the RuntimeError "DataLoader worker ..." of PyTorch.

    Tensors are fetched from the worker that made them: when it dies just then, what comes is an error of a socket.
    """
    try:
        yield from loader
        return
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if str(error).startswith("Caught "):  # raised by a worker that lives
            raise
        # The system's own notice is a moment behind, and PyTorch raises wherever it comes: let it come here.
        with suppress(RuntimeError):
            time.sleep(1.0)
    # Out here the first error is gone, and with it the loader, which would raise again when any child process ends.
    raise RuntimeError("DataLoader worker died while it handed images over")


class _ForWorkers(Dataset[Any]):
    """Hands an error written for users over as a value: raised in a worker, it would arrive inside a traceback."""

    def __init__(self, dataset: FaceDataset):
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any] | LrfaceError:
        try:
            return self.dataset.__getitems__(indices)
        except LrfaceError as error:
            return error


def cache_size(source: FaceSource, size: int) -> int:
    """Bytes that the decoded faces take in memory."""
    return len(source) * size * size * 3


def batches(
    dataset: FaceDataset,
    batch_size: int,
    seed: int,
    first: int,
    last: int,
    workers: int = 0,
    pin_memory: bool = False,
    sampling: Sampling | None = None,
    part: tuple[int, int] = (0, 1),
) -> Generator[dict[str, Any], None, None]:
    """Training batches of steps ``first`` to ``last`` (excluded), each a dict of

    image: uint8 [n, channels, size, size], RGB or grey; label: int64 [n]; seed: int, of this step's augmentation.

    With ``part`` (rank, ranks) it is the rank's equal share of a step's ``batch_size`` images, and the dict also has
    part: what one process sees as a batch, the ranks see together, augmentation included.

    The images are in channels_last order. Their content does not depend on ``workers``. ``sampling`` says how often
    the images of each identity are shown; without it every epoch shows every image once.

    Raises:
        LrfaceError: fewer images than a batch; an image that cannot be decoded.
    """
    if len(dataset) < batch_size:
        raise LrfaceError(
            f"the data holds {len(dataset)} images, fewer than one batch of {batch_size}; "
            f"set data.batch_size to {len(dataset)} or less"
        )
    orders = None if sampling is None else EpochOrders(sampling, dataset.labels.numpy(), seed)
    if orders is not None and orders.length < batch_size:
        raise LrfaceError(
            f"an epoch of data.sampling shows {orders.length} images, fewer than one batch of {batch_size}; raise "
            f"data.sampling.maximum or set data.batch_size to {orders.length} or less"
        )
    steps = StepSampler(len(dataset), batch_size, seed, first, last, orders)
    sampler: Sampler[list[int]] = steps if part == (0, 1) else PartSampler(steps, *part)
    if dataset.seeded:
        sampler = SeededSampler(sampler, seed, first, part)
    if workers == 0:
        stream: Any = (dataset.__getitems__(indices) for indices in sampler)
    else:
        loader = DataLoader(
            _ForWorkers(dataset),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=pin_memory,
            prefetch_factor=4,
            # Without one of its own the loader draws from the global generator, and dropout after a resume differs.
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_outlive_signals,
        )
        stream = _from_workers(loader)
    for step, batch in enumerate(stream, start=first):
        if isinstance(batch, LrfaceError):
            raise batch
        batch["seed"] = batch_seed(seed, step)
        if part != (0, 1):
            batch["part"] = part
        yield batch


def as_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [0, 1]; float tensors pass as they are."""
    return images.float().div_(255.0) if images.dtype == torch.uint8 else images
