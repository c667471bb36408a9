"""How often images are shown: exact counts, small classes, resume at any step, named errors."""

from collections import Counter

import numpy as np
import pytest

from lrface.data.dataset import FaceDataset, StepSampler, batches, epoch_order
from lrface.data.sampling import EpochOrders, Sampling
from lrface.errors import LrfaceError, UsageError

SIZES = [40, 1, 7, 3, 20, 2, 11, 5]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
N = len(LABELS)
ALL_KINDS = [
    Sampling(),
    Sampling(maximum=4),
    Sampling("class_balanced"),
    Sampling("weighted", beta=0.5),
    Sampling("weighted", beta=0.9, weights="effective_number"),
    Sampling("weighted", beta=0.5, maximum=9),
    Sampling("identities", identities=3, images=4),
]


def shown(sampling: Sampling, epoch: int = 0, seed: int = 5) -> tuple[EpochOrders, np.ndarray]:
    orders = EpochOrders(sampling, LABELS, seed)
    order = orders.order(epoch)
    assert order.dtype == np.int64 and order.shape == (orders.length,)
    assert order.min() >= 0 and order.max() < N
    return orders, order


def per_identity(order: np.ndarray) -> np.ndarray:
    return np.bincount(LABELS[order], minlength=len(SIZES))


def test_shuffle_is_the_order_that_runs_before_had():
    for epoch in range(3):
        assert np.array_equal(shown(Sampling(), epoch)[1], epoch_order(N, 5, epoch))
    plain = list(StepSampler(N, 8, 5, 0, 30))
    assert list(StepSampler(N, 8, 5, 0, 30, EpochOrders(Sampling(), LABELS, 5))) == plain


@pytest.mark.parametrize("sampling", ALL_KINDS, ids=repr)
def test_an_order_depends_on_seed_and_epoch_alone(sampling):
    first, _ = shown(sampling)
    wanted = [first.order(epoch) for epoch in range(4)]
    again = EpochOrders(sampling, LABELS.copy(), 5)
    np.random.seed(3)
    for epoch in (3, 1, 2, 0):
        assert np.array_equal(again.order(epoch), wanted[epoch])
    assert not np.array_equal(wanted[0], wanted[1])
    assert not np.array_equal(EpochOrders(sampling, LABELS, 6).order(0), wanted[0])


@pytest.mark.parametrize("sampling", ALL_KINDS, ids=repr)
def test_a_run_goes_on_at_any_step(sampling):
    orders = EpochOrders(sampling, LABELS, 5)
    batch = sampling.batch_size or 8
    steps = 3 * (orders.length // batch) + 1
    whole = list(StepSampler(N, batch, 5, 0, steps, orders))
    assert all(len(indices) == batch for indices in whole)
    for first in range(steps):
        assert list(StepSampler(N, batch, 5, first, steps, orders)) == whole[first:]


def test_a_cap_shows_others_each_epoch_and_none_twice():
    seen: set[int] = set()
    for epoch in range(40):
        orders, order = shown(Sampling(maximum=4), epoch)
        assert per_identity(order).tolist() == [min(size, 4) for size in SIZES]
        assert len(set(order.tolist())) == len(order) == orders.length
        seen |= set(order.tolist())
    assert seen == set(range(N))


def test_class_balanced_shows_identities_equally_often_whatever_their_size():
    share = N / len(SIZES)
    totals = np.zeros(len(SIZES))
    for epoch in range(200):
        _, order = shown(Sampling("class_balanced"), epoch)
        counts = per_identity(order)
        assert counts.sum() == N and set(counts.tolist()) <= {int(share), int(share) + 1}
        totals += counts
        # All images of an identity are shown before one comes a second time.
        times = Counter(order.tolist())
        for label, size in enumerate(SIZES):
            own = [times[index] for index in np.flatnonzero(LABELS == label)]
            assert max(own) - min(own) <= 1 and sum(own) == counts[label] and len(own) == size
    # Which identity gets the one image more is drawn fairly: 200 epochs of a share of 11.125.
    assert np.abs(totals / 200 - share).max() < 0.1


@pytest.mark.parametrize("beta, weights", [(0.5, "power"), (1.7, "power"), (0.9, "effective_number")])
def test_weighted_frequencies_are_those_of_the_formula(beta, weights):
    sizes = np.array(SIZES, dtype=float)
    weight = sizes**-beta if weights == "power" else (1 - beta) / (1 - beta**sizes)
    share = N * sizes * weight / (sizes * weight).sum()
    totals = np.zeros(len(SIZES))
    for epoch in range(400):
        _, order = shown(Sampling("weighted", beta=beta, weights=weights), epoch)
        counts = per_identity(order)
        assert counts.sum() == N
        assert (np.floor(share) <= counts).all() and (counts <= np.ceil(share)).all()
        totals += counts
    assert np.abs(totals / 400 - share).max() < 0.1


def test_weights_have_their_known_limits():
    for beta, weights in ((0.0, "power"), (0.0, "effective_number")):
        _, order = shown(Sampling("weighted", beta=beta, weights=weights))
        assert sorted(order.tolist()) == list(range(N))
    one, balanced = (
        shown(sampling)[1] for sampling in (Sampling("weighted", beta=1.0), Sampling("class_balanced"))
    )
    assert np.abs(per_identity(one) - per_identity(balanced)).max() <= 1
    # Near 1 the effective number of images is their number: every identity alike.
    _, order = shown(Sampling("weighted", beta=1 - 1e-9, weights="effective_number"))
    assert per_identity(order).max() - per_identity(order).min() <= 1


def test_a_cap_holds_with_weights():
    for epoch in range(100):
        orders, order = shown(Sampling("weighted", beta=0.5, maximum=9), epoch)
        assert per_identity(order).max() <= 9 and len(order) == orders.length


@pytest.mark.parametrize("people, each", [(3, 4), (8, 2), (2, 1), (5, 3)])
def test_identity_batches(people, each):
    sampling = Sampling("identities", identities=people, images=each)
    shown_to = np.zeros(len(SIZES))
    for epoch in range(100):
        orders, order = shown(sampling, epoch)
        assert orders.length == N // (people * each) * (people * each)
        for batch in order.reshape(-1, people, each):
            labels = LABELS[batch]
            assert (labels == labels[:, :1]).all() and len(set(labels[:, 0].tolist())) == people
            for images, label in zip(batch, labels[:, 0], strict=True):
                # As many different images as there are, up to K; a small class repeats its own evenly.
                times = Counter(images.tolist())
                assert len(times) == min(each, SIZES[label])
                assert max(times.values()) - min(times.values()) <= 1
        shown_to += per_identity(order) / each
    share = shown_to.sum() / len(SIZES)
    assert np.abs(shown_to / share - 1).max() < 0.2


def test_identity_batches_show_all_images_of_an_identity_before_one_again():
    labels = np.repeat([0, 1], 6)
    order = EpochOrders(Sampling("identities", identities=2, images=3), labels, 1).order(0)
    assert sorted(order.tolist()) == list(range(12))


def test_labels_with_gaps_are_never_drawn():
    labels = np.array([0, 0, 5, 5, 5, 9])
    for sampling in (Sampling("class_balanced"), Sampling("identities", identities=3, images=2)):
        orders = EpochOrders(sampling, labels, 0)
        assert set(labels[orders.order(0)].tolist()) == {0, 5, 9}


class Still:
    """Images of one colour each."""

    identities = [f"person {k}" for k in range(len(SIZES))]
    labels = LABELS

    def __len__(self) -> int:
        return N

    def image(self, index: int) -> np.ndarray:
        return np.full((4, 4, 3), index, dtype=np.uint8)


def test_batches_follow_the_sampling_with_any_number_of_workers():
    sampling = Sampling("identities", identities=3, images=4)
    plain, loaded = (
        [
            (batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist(), batch["seed"])
            for batch in batches(FaceDataset(Still(), 4), 12, 7, 2, 12, workers, sampling=sampling)
        ]
        for workers in (0, 2)
    )
    assert plain == loaded and len(plain) == 10
    expected = StepSampler(N, 12, 7, 2, 12, EpochOrders(sampling, LABELS, 7))
    assert [indices for indices, _, _ in plain] == list(expected)
    assert all(LABELS[indices].tolist() == labels for indices, labels, _ in plain)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "balanced"}, r"data.sampling.kind must be one of .*; found 'balanced' \(did you mean"),
        ({"kind": "weighted"}, "data.sampling.beta is missing"),
        ({"kind": "weighted", "beta": -1.0}, "data.sampling.beta must be at least 0 with weights power"),
        ({"kind": "weighted", "beta": float("nan")}, "data.sampling.beta must be at least 0"),
        ({"kind": "weighted", "beta": 1.0, "weights": "effective_number"}, "at least 0 and below 1"),
        ({"kind": "weighted", "beta": 0.5, "weights": "n"}, "weights must be power or effective_number"),
        ({"weights": "effective_number"}, "data.sampling.weights belongs to kind weighted, not to shuffle"),
        ({"beta": 0.5}, "data.sampling.beta belongs to kind weighted, not to shuffle; remove it"),
        ({"kind": "class_balanced", "maximum": 3}, "belongs to kind shuffle and weighted, not to class_b"),
        ({"kind": "identities", "images": 4}, "sampling.identities must be at least 2 .*; found None"),
        ({"kind": "identities", "identities": 4}, "sampling.images must be at least 1 .*; found None"),
        ({"kind": "identities", "identities": 1, "images": 4}, "sampling.identities must be at least 2"),
        ({"maximum": 0}, "data.sampling.maximum must be at least 1; found 0"),
        ({"minimum": 0}, "data.sampling.minimum must be at least 1; found 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)


def test_what_does_not_fit_the_data_or_the_batch_is_named():
    sampling = Sampling("identities", identities=9, images=4)
    with pytest.raises(LrfaceError, match="holds 8 identities, fewer than data.sampling.identities=9"):
        EpochOrders(sampling, LABELS, 0)
    with pytest.raises(UsageError, match="batches of 36, data.batch_size is 32; set data.batch_size=36"):
        sampling.check_batch_size(32)
    sampling.check_batch_size(36)
    Sampling().check_batch_size(7)
    with pytest.raises(LrfaceError, match="an epoch of data.sampling shows 8 images, fewer than one batch"):
        next(batches(FaceDataset(Still(), 4), 12, 0, 0, 1, sampling=Sampling(maximum=1)))


def test_a_million_images_of_a_hundred_thousand_identities():
    random = np.random.default_rng(0)
    sizes = np.minimum(random.zipf(1.6, 100_000), 2000)
    labels = random.permutation(np.repeat(np.arange(100_000), sizes))[:1_000_000]
    labels = np.unique(labels, return_inverse=True)[1]
    for sampling in (
        Sampling(),
        Sampling(maximum=20),
        Sampling("class_balanced"),
        Sampling("weighted", beta=0.5),
        Sampling("identities", identities=64, images=4),
    ):
        orders = EpochOrders(sampling, labels, 0)
        order = orders.order(1)
        assert len(order) == orders.length
        if sampling.maximum is not None:
            assert np.bincount(labels[order]).max() <= 20
