import numpy as np
import pytest

from lrface.data.crop import RandomResizedCrop
from lrface.data.dataset import CachedDataset, CroppedDataset, batches
from lrface.data.source import FaceSource, check_source
from lrface.data.subset import ChosenDataset, IdentitySubset, drop_small_identities, label_rows
from lrface.errors import LrfaceError


class Numbers:
    """Image k shows the number k."""

    format = "numbers"

    def __init__(self, labels: list[int]):
        self.labels = np.array(labels, dtype=np.int64)
        self.identities = [f"person {k}" for k in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        return np.full((2, 2, 3), index, dtype=np.uint8)

    def encoded(self, index: int) -> bytes | None:
        return bytes([index])

    def sources(self) -> list[str]:
        return [f"{k}.png" for k in range(len(self))]


def test_a_subset_is_a_source_with_labels_of_its_own():
    source = Numbers([0, 1, 2, 3, 0, 1, 2, 3, 3])
    subset = IdentitySubset(source, [1, 3])
    assert isinstance(subset, FaceSource)
    check_source(subset, "subset")
    assert subset.identities == ["person 1", "person 3"] and subset.format == "numbers"
    assert subset.labels.tolist() == [0, 1, 0, 1, 1] and len(subset) == 5
    assert [int(subset.image(k)[0, 0, 0]) for k in range(5)] == [1, 3, 5, 7, 8]
    assert subset.encoded(2) == bytes([5]) and subset.sources()[4] == "8.png"


def test_small_identities_are_dropped_and_counted():
    source = Numbers([0, 0, 0, 1, 2, 2, 3, 3, 3])
    kept, identities, images = drop_small_identities(source, 3, "data")
    assert (identities, images) == (2, 3)
    assert kept.identities == ["person 0", "person 3"] and kept.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert drop_small_identities(source, 1, "data") == (source, 0, 0)
    with pytest.raises(
        LrfaceError, match="data: 0 of 4 identities have at least data.sampling.minimum=4 .*has 3"
    ):
        drop_small_identities(source, 4, "data")


def test_chosen_images_come_as_their_dataset_gives_them():
    source = Numbers([0, 1] * 20)
    rows = label_rows(source.labels, 0.3, seed=0)
    assert len(rows) == 12 and np.bincount(source.labels[rows]).tolist() == [6, 6]
    chosen = ChosenDataset(CachedDataset(source, 2, show_progress=False), rows)
    assert len(chosen) == 12 and chosen.labels.tolist() == source.labels[rows].tolist()
    seen = np.concatenate([batch["image"][:, 0, 0, 0].numpy() for batch in batches(chosen, 4, 0, 0, 3)])
    assert sorted(seen.tolist()) == rows.tolist()
    # What is drawn for a batch is drawn for its places, and reaches the dataset that cuts.
    cut = ChosenDataset(CroppedDataset(source, 4, RandomResizedCrop()), rows)
    for one, other in zip(batches(cut, 4, 0, 0, 3), batches(chosen, 4, 0, 0, 3), strict=True):
        assert one["image"][:, 0, 0, 0].tolist() == other["image"][:, 0, 0, 0].tolist()
