import cv2
import numpy as np
import pytest
import torch

from lrface.data.dataset import (
    CachedDataset,
    FaceDataset,
    StepSampler,
    as_float,
    batch_seed,
    batches,
    cache_size,
    epoch_order,
    fit_image,
)
from lrface.errors import LrfaceError


class Noise:
    """Random faces: image k is the same whenever it is asked for."""

    def __init__(self, images: int, identities: int = 3, side: int = 12):
        self.identities = [f"person {k}" for k in range(identities)]
        self.labels = np.arange(images, dtype=np.int64) % identities
        self.side = side

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3)).astype(np.uint8)


def test_every_epoch_shows_each_image_once():
    sampler = list(StepSampler(n=20, batch_size=5, seed=3, first=0, last=12))
    orders = []
    for epoch in range(3):
        seen = [index for batch in sampler[4 * epoch : 4 * epoch + 4] for index in batch]
        assert sorted(seen) == list(range(20))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_rest_of_an_epoch_that_fills_no_batch_is_left_out():
    sampler = list(StepSampler(n=22, batch_size=5, seed=3, first=0, last=8))
    assert all(len(batch) == 5 for batch in sampler)
    for epoch in range(2):
        seen = [index for batch in sampler[4 * epoch : 4 * epoch + 4] for index in batch]
        assert len(set(seen)) == 20
    left_out = [set(range(22)) - {i for batch in sampler[4 * e : 4 * e + 4] for i in batch} for e in range(2)]
    assert left_out[0] != left_out[1]


def test_a_step_depends_on_the_seed_and_the_step_alone():
    whole = list(StepSampler(n=23, batch_size=4, seed=9, first=0, last=30))
    for first in (1, 5, 6, 17, 29):
        sampler = StepSampler(n=23, batch_size=4, seed=9, first=first, last=30)
        assert list(sampler) == whole[first:] and len(sampler) == 30 - first
    torch.manual_seed(1)
    np.random.seed(1)
    assert list(StepSampler(n=23, batch_size=4, seed=9, first=0, last=30)) == whole
    assert list(StepSampler(n=23, batch_size=4, seed=10, first=0, last=30)) != whole


def test_orders_and_seeds_are_the_same_on_every_machine():
    # Fixed values: a change would break the resume of every run that exists.
    assert epoch_order(8, seed=1, epoch=2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]
    assert (batch_seed(0, 0), batch_seed(7, 123)) == (7896617691693857887, 310515619614408894)
    assert batch_seed(0, 0) != batch_seed(0, 1) != batch_seed(1, 1)
    assert all(0 <= batch_seed(seed, step) < 2**63 for seed in range(3) for step in range(50))


def test_batches_hold_the_images_they_say():
    source = Noise(20)
    stream = list(batches(FaceDataset(source, 12), 6, seed=5, first=2, last=7))
    for step, batch, indices in zip(range(2, 7), stream, StepSampler(20, 6, 5, 2, 7), strict=True):
        assert set(batch) == {"image", "label", "seed"}
        assert batch["image"].shape == (6, 3, 12, 12) and batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [i % 3 for i in indices]
        assert batch["seed"] == batch_seed(5, step)
        for row, index in enumerate(indices):
            assert np.array_equal(batch["image"][row].permute(1, 2, 0).numpy(), source.image(index))


def same(one, other) -> bool:
    return all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) and a["seed"] == b["seed"]
        for a, b in zip(one, other, strict=True)
    )


def test_batches_do_not_depend_on_workers_or_the_cache():
    source = Noise(20)
    plain = list(batches(FaceDataset(source, 12), 6, seed=5, first=1, last=6))
    cached = CachedDataset(source, 12, show_progress=False)
    assert same(plain, list(batches(cached, 6, seed=5, first=1, last=6)))
    loaded = [
        {"image": batch["image"].clone(), "label": batch["label"].clone(), "seed": batch["seed"]}
        for batch in batches(FaceDataset(source, 12), 6, seed=5, first=1, last=6, workers=2)
    ]
    assert same(plain, loaded)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_alone(workers):
    # Dropout after a resume is exact only when reading draws nothing.
    torch.manual_seed(4)
    before = torch.get_rng_state()
    list(batches(FaceDataset(Noise(8), 12), 4, seed=0, first=0, last=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(
        LrfaceError, match="holds 5 images, fewer than one batch of 6; set data.batch_size to 5 or less"
    ):
        next(batches(FaceDataset(Noise(5), 12), 6, seed=0, first=0, last=1))


def test_crops_of_another_size_are_fitted():
    dataset = FaceDataset(Noise(4, side=24), 12)
    batch = dataset.__getitems__([2, 0])
    expected = cv2.resize(dataset.source.image(2), (12, 12), interpolation=cv2.INTER_AREA)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), expected)
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert fit_image(image, 4) is image
    assert np.array_equal(fit_image(image, 8), cv2.resize(image, (8, 8), interpolation=cv2.INTER_LINEAR))


def test_one_item_is_a_batch_of_one():
    item = FaceDataset(Noise(4), 12)[3]
    assert item["image"].shape == (1, 3, 12, 12) and item["label"].tolist() == [0]


def test_cache_size_counts_bytes():
    source = Noise(20)
    assert cache_size(source, 12) == CachedDataset(source, 12, show_progress=False).images.nbytes


def test_as_float():
    torch.testing.assert_close(
        as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0.0, 0.2, 1.0])
    )
    values = torch.rand(3)
    assert as_float(values) is values


class BrokenAt5(Noise):
    def image(self, index: int) -> np.ndarray:
        if index == 5:
            raise LrfaceError("a.jpg cannot be decoded")
        return super().image(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_was_written(workers):
    with pytest.raises(LrfaceError) as caught:
        list(batches(FaceDataset(BrokenAt5(8), 12), 4, seed=0, first=0, last=2, workers=workers))
    assert str(caught.value) == "a.jpg cannot be decoded"
