"""Some identities of a source as a source of their own, and a share of each one's images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrface.data.dataset import FaceDataset, SeededBatch
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError


class IdentitySubset:
    """The images of chosen identities of ``source``, in its order, labels numbered anew without gaps.

    A :class:`~lrface.data.source.FaceSource`; nothing is copied.

    Args:
        source: where the images are.
        chosen: labels of ``source``, ascending.
    """

    def __init__(self, source: FaceSource, chosen: Sequence[int]):
        self.source = source
        self.format = source.format
        self.identities = [source.identities[label] for label in chosen]
        new_label = np.full(len(source.identities), -1, dtype=np.int64)
        new_label[list(chosen)] = np.arange(len(chosen))
        labels = new_label[source.labels]
        self.indices = np.flatnonzero(labels >= 0)
        self.labels = labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> np.ndarray:
        return self.source.image(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        return self.source.encoded(int(self.indices[index]))

    def sources(self) -> list[str]:
        names = self.source.sources()
        return [names[index] for index in self.indices.tolist()]


def label_rows(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Places of a share of each class (one image at least), ascending; a smaller share's are among a larger one's.

    Probes and training draw alike: from labels that are numbered alike, the same places.

    Args:
        labels: int64 [n], of all images.
        share: above 0 to 1.
    """
    chosen = []
    for label in np.unique(labels):
        own = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        chosen.append(own[: max(1, round(share * len(own)))])
    return np.sort(np.concatenate(chosen))


class ChosenDataset(FaceDataset):
    """Batches of the images ``rows``, int64 [k], of ``dataset``: they are decoded and kept as it does."""

    def __init__(self, dataset: FaceDataset, rows: NDArray[np.int64]):
        super().__init__(dataset.source, dataset.size, dataset.channels)
        self.dataset, self.rows, self.seeded = dataset, rows, dataset.seeded
        self.labels = self.labels[torch.from_numpy(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = self.rows[list(indices)].tolist()
        if isinstance(indices, SeededBatch):
            chosen = SeededBatch(chosen, indices.seed, indices.first, indices.whole)
        return self.dataset.__getitems__(chosen)


def choose_classes(source: FaceSource, names: Sequence[str], name: str, option: str) -> FaceSource:
    """The images of the classes ``names``; ``source`` itself where it has no others.

    Raises:
        LrfaceError: ``source`` lacks some of them; says how many and the first.
    """
    places = {identity: label for label, identity in enumerate(source.identities)}
    missing = [each for each in names if each not in places]
    if missing:
        raise LrfaceError(
            f"{name} lacks {len(missing)} of the {len(names)} classes of {option}, the first is {missing[0]}; it has "
            f"{len(places)}, such as {source.identities[0]}"
        )
    if len(names) == len(places):
        return source
    return IdentitySubset(source, sorted(places[each] for each in names))


def drop_small_identities(source: FaceSource, minimum: int, name: str) -> tuple[FaceSource, int, int]:
    """``source`` without identities of fewer than ``minimum`` images, how many they are, and their images.

    Raises:
        LrfaceError: fewer than two identities are left.
    """
    sizes = np.bincount(source.labels, minlength=len(source.identities))
    chosen = np.flatnonzero(sizes >= minimum)
    if len(chosen) == len(sizes):
        return source, 0, 0
    if len(chosen) < 2:
        raise LrfaceError(
            f"{name}: {len(chosen)} of {len(sizes)} identities have at least data.sampling.minimum={minimum} images "
            f"(the largest has {sizes.max()}); training needs two: lower it"
        )
    kept = IdentitySubset(source, chosen.tolist())
    return kept, len(sizes) - len(chosen), len(source) - len(kept)
