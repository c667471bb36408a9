from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lrface.benchmarks.cache import FeatureStore
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.metrics import contiguous_folds, fold_accuracy
from lrface.benchmarks.verification import VerificationSet, evaluate_verification, load_benchmark
from lrface.degrade.ops import jpeg
from lrface.degrade.resolution import resample
from lrface.errors import LrfaceError, UsageError

ROW_KEYS = {
    "benchmark",
    "gallery_size",
    "probe_size",
    "gallery_losses",
    "probe_losses",
    "accuracy",
    "accuracy_interval",
    "accuracy_std",
    "accuracy_insightface",
    "auc",
    "auc_interval",
    "eer",
    "eer_interval",
    "tar_at_far",
    "tar_interval",
    "threshold",
    "pairs",
    "images",
    "unaligned",
    "folds",
    "down",
    "up",
    "flip",
    "by_native_size",
}


def noise_set(identities: int = 20, size: int = 112, noise: float = 40.0, seed: int = 0) -> VerificationSet:
    """Two noisy copies of each of some random patterns; fine patterns are lost at low resolution."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(0, 256, (identities, 1, size, size, 3)).astype(np.float64)
    copies = patterns + generator.normal(0, noise, (identities, 2, size, size, 3))
    images = np.clip(copies, 0, 255).astype(np.uint8).reshape(-1, size, size, 3)
    first = np.arange(identities) * 2
    left = np.concatenate((first, first))
    right = np.concatenate((first + 1, np.roll(first, -1)))
    same = np.arange(2 * identities) < identities
    order = generator.permutation(2 * identities)
    return VerificationSet(
        "noise", images, left[order], right[order], same[order], contiguous_folds(2 * identities)
    )


def projection(dimension: int = 32, size: int = 112) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3 * size * size, dimension, generator=generator)


def embedder(weight: torch.Tensor):
    return lambda images: (images - 0.5).flatten(1) @ weight


def by_hand(benchmark: VerificationSet, weight: torch.Tensor, gallery: int, probe: int, flip: bool) -> float:
    """The protocol written out pair by pair."""
    scores = []
    for left, right in zip(benchmark.left, benchmark.right, strict=True):
        vectors = []
        for index, size in ((left, gallery), (right, probe)):
            image = torch.from_numpy(benchmark.images[index]).permute(2, 0, 1)[None].float() / 255
            image = resample(image, size, down="nearest", up="bilinear")
            vector = embedder(weight)(image)
            if flip:
                vector = vector + embedder(weight)(image.flip(-1))
            vectors.append(vector[0] / vector.norm())
        scores.append(float(vectors[0] @ vectors[1]))
    return 100 * fold_accuracy(scores, benchmark.same, benchmark.folds).mean


@pytest.mark.parametrize("flip", [True, False])
def test_rows_equal_the_protocol_written_out(flip):
    benchmark, weight = noise_set(), projection()
    rows = evaluate_verification(
        embedder(weight), benchmark, (112, 28), flip=flip, cross=True, batch_size=7, progress=False
    ).rows
    assert [(row["gallery_size"], row["probe_size"]) for row in rows] == [(112, 112), (28, 28), (112, 28)]
    for row in rows:
        expected = by_hand(benchmark, weight, row["gallery_size"], row["probe_size"], flip)
        assert row["accuracy"] == pytest.approx(expected, abs=1e-3)
        assert set(row) == ROW_KEYS
        assert row["pairs"] == 40 and row["images"] == 40 and row["folds"] == 10
        assert (row["down"], row["up"], row["flip"]) == ("nearest", "bilinear", flip)
        assert set(row["tar_at_far"]) == {f"1e-{k}" for k in range(1, 7)}
        assert row["tar_at_far"]["1e-3"] is None and row["tar_at_far"]["1e-1"] is not None
    assert rows[0]["accuracy"] > 90 and rows[0]["auc"] > 0.95


def test_batch_size_does_not_matter():
    benchmark, weight = noise_set(6), projection()
    first = evaluate_verification(embedder(weight), benchmark, (112, 14), batch_size=1, progress=False).rows
    second = evaluate_verification(embedder(weight), benchmark, (112, 14), batch_size=64, progress=False).rows
    for one, other in zip(first, second, strict=True):
        for key in ("accuracy", "threshold", "auc", "eer"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)


def test_each_image_is_embedded_once_a_resolution_and_in_batches():
    benchmark = noise_set(6)
    benchmark.left[:] = 0  # the pairs share one image
    calls = []

    def embed(images):
        calls.append(len(images))
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 112, 112)
        assert 0 <= float(images.min()) and float(images.max()) <= 1
        assert not torch.is_grad_enabled()
        return images.mean(dim=(2, 3)) + 0.1

    evaluate_verification(
        embed, benchmark, (112, 56, 14), flip=True, batch_size=5, progress=False, cross=True
    )
    assert max(calls) == 5
    assert sum(calls) == 12 * 2 * 3


def test_flip_adds_the_features_of_the_mirror():
    """A model that sees only the left half tells mirrored faces apart; with flip fusion it cannot."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    images[1], images[3] = images[0, :, ::-1], images[2, :, ::-1]
    benchmark = VerificationSet("mirrors", images, [0, 0, 2, 2], [1, 2, 3, 0], [1, 0, 1, 0], [0, 0, 1, 1])
    weight = projection(64, 112)
    weight.view(3, 112, 112, 64)[:, :, 56:] = 0
    with_flip = evaluate_verification(embedder(weight), benchmark, (112,), flip=True, progress=False).rows[0]
    without = evaluate_verification(embedder(weight), benchmark, (112,), flip=False, progress=False).rows[0]
    assert with_flip["accuracy"] == 100.0 and with_flip["auc"] == 1.0
    assert without["auc"] < 1.0


def test_colours_arrive_as_red_green_blue():
    images = np.zeros((2, 112, 112, 3), dtype=np.uint8)
    images[0, :, :, 0] = 255
    benchmark = VerificationSet("red", images, [0, 1], [1, 0], [True, False], [0, 1])
    seen = []

    def embed(batch):
        seen.append(batch.clone())
        return torch.ones(len(batch), 2)

    evaluate_verification(embed, benchmark, (112,), flip=False, progress=False)
    assert float(seen[0][0, 0].min()) == 1.0 and float(seen[0][0, 1:].max()) == 0.0


def test_kernels_are_passed_on():
    benchmark, weight = noise_set(8), projection()
    nearest = evaluate_verification(embedder(weight), benchmark, (28,), progress=False).rows[0]
    area = evaluate_verification(
        embedder(weight), benchmark, (28,), down="area", up="bicubic", progress=False
    ).rows[0]
    assert (area["down"], area["up"]) == ("area", "bicubic")
    assert nearest["threshold"] != area["threshold"]
    with pytest.raises(UsageError, match="down"):
        evaluate_verification(embedder(weight), benchmark, (28,), down="lanczos", progress=False)


def test_cross_rows_without_the_full_size_among_the_resolutions():
    benchmark, weight = noise_set(6), projection()
    rows = evaluate_verification(embedder(weight), benchmark, (56,), cross=True, progress=False).rows
    assert [(row["gallery_size"], row["probe_size"]) for row in rows] == [(56, 56), (112, 56)]
    assert rows[1]["accuracy"] == pytest.approx(by_hand(benchmark, weight, 112, 56, True), abs=1e-3)


def test_features_that_are_not_finite_stop_with_the_image():
    benchmark = noise_set(6)
    state = SimpleNamespace(seen=0)

    def embed(images):
        vectors = images.mean(dim=(2, 3))
        if state.seen == 5:
            vectors[2] = float("nan")
        state.seen += len(images)
        return vectors

    with pytest.raises(LrfaceError, match=r"noise at 56 pixels.*not finite \(first for image 7 of 12\)"):
        evaluate_verification(embed, benchmark, (56,), flip=False, batch_size=5, progress=False)


def test_features_of_the_wrong_shape_stop():
    with pytest.raises(LrfaceError, match=r"\[12, 3, 112, 112\] for 12 images"):
        evaluate_verification(lambda images: images, noise_set(6), (112,), progress=False)
    with pytest.raises(LrfaceError, match=r"\[3, 4\]"):
        evaluate_verification(lambda images: torch.ones(3, 4), noise_set(6), (112,), progress=False)


@pytest.mark.parametrize("bad", [(0,), (113,), (-5,), (28.0,), (True,), ()])
def test_resolutions_are_checked_before_anything_is_embedded(bad):
    def embed(images):
        raise AssertionError("called")

    with pytest.raises(UsageError, match="resolutions"):
        evaluate_verification(embed, noise_set(4), bad, progress=False)


def test_repeated_resolutions_give_one_row():
    rows = evaluate_verification(embedder(projection()), noise_set(4), (112, 112), progress=False).rows
    assert len(rows) == 1


def test_from_source_reads_only_what_the_pairs_name():
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 256, (50, 112, 112, 3), dtype=np.uint8)
    read = []

    class Source:
        identities = ["a"]
        labels = np.zeros(50, dtype=np.int64)

        def __len__(self):
            return 50

        def image(self, index):
            read.append(index)
            return stored[index]

    benchmark = VerificationSet.from_source(Source(), [40, 3, 40], [3, 7, 9], [True, False, True], "held out")
    assert read == [3, 7, 9, 40] and len(benchmark.images) == 4
    for position, (left, right) in enumerate([(40, 3), (3, 7), (40, 9)]):
        assert np.array_equal(benchmark.images[benchmark.left[position]], stored[left])
        assert np.array_equal(benchmark.images[benchmark.right[position]], stored[right])
    assert sorted(benchmark.folds) == [0, 1, 2]
    with pytest.raises(LrfaceError, match="name images 3 to 50, the source has 50"):
        VerificationSet.from_source(Source(), [3], [50], [True], "outside")
    with pytest.raises(LrfaceError, match="no pairs"):
        VerificationSet.from_source(Source(), [], [], [], "none")


def test_from_source_refuses_mixed_sizes():
    class Source:
        identities = ["a"]
        labels = np.zeros(2, dtype=np.int64)

        def __len__(self):
            return 2

        def image(self, index):
            return np.zeros((112 - index, 112 - index, 3), dtype=np.uint8)

    with pytest.raises(LrfaceError, match="image 1 is 111x111, image 0 is 112x112"):
        VerificationSet.from_source(Source(), [0], [1], [True], "mixed")


def test_a_set_is_checked():
    images = np.zeros((2, 112, 112, 3), dtype=np.uint8)
    good = {"left": [0, 0], "right": [1, 1], "same": [True, False], "folds": [0, 1]}
    VerificationSet("good", images, **good)
    for change, found in [
        ({"left": [0, 2]}, "left indexes images 0 to 2, but there are 2"),
        ({"right": [-1, 0]}, "right indexes images -1"),
        ({"same": [True]}, "one entry a pair"),
        ({"left": [], "right": [], "same": [], "folds": []}, "no pairs"),
    ]:
        with pytest.raises(LrfaceError, match=found):
            VerificationSet("bad", images, **(good | change))
    with pytest.raises(LrfaceError, match="shape"):
        VerificationSet("bad", images[:, :50], **good)
    with pytest.raises(LrfaceError, match="uint8"):
        VerificationSet("bad", images.astype(np.float32), **good)


def test_progress_goes_to_standard_error_only(capsys):
    evaluate_verification(embedder(projection()), noise_set(4), (112,), progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "verify noise" in printed.err


def test_load_benchmark_reads_the_real_pack(shared):
    benchmark = load_benchmark(shared / "data/formats/small_lfw.bin")
    rows = evaluate_verification(embedder(projection()), benchmark, (112, 14), progress=False).rows
    # all pairs of this little pack are same pairs
    assert rows[0]["auc"] is None and rows[0]["eer"] is None and rows[0]["accuracy"] <= 100
    assert all(value is None for value in rows[0]["tar_at_far"].values())


def test_the_matrix_has_every_gallery_size_against_every_probe_size():
    benchmark, weight = noise_set(6), projection()
    rows = evaluate_verification(embedder(weight), benchmark, (112, 28, 14), matrix=True, progress=False).rows
    sizes = [(row["gallery_size"], row["probe_size"]) for row in rows]
    assert sorted(sizes) == sorted((g, p) for g in (112, 28, 14) for p in (112, 28, 14))
    for row in rows:
        expected = by_hand(benchmark, weight, row["gallery_size"], row["probe_size"], flip=True)
        assert row["accuracy"] == pytest.approx(expected, abs=1e-3)


def test_further_conditions_get_rows_of_their_own():
    benchmark, weight = noise_set(6), projection()
    degrade = [Condition.parse("jpeg=10"), Condition.parse("size=28,noise=20")]
    seen = []

    def embed(images):
        seen.append(images.clone())
        return embedder(weight)(images)

    found = evaluate_verification(
        embed, benchmark, (112,), flip=False, cross=True, degrade=degrade, batch_size=64, progress=False
    )
    rows = [(r["gallery_size"], r["gallery_losses"], r["probe_size"], r["probe_losses"]) for r in found.rows]
    assert rows == [
        (112, "", 112, ""),
        (112, "jpeg=10", 112, "jpeg=10"),
        (112, "", 112, "jpeg=10"),
        (28, "noise=20", 28, "noise=20"),
        (112, "", 28, "noise=20"),
    ]
    assert len(seen) == 3  # every condition is embedded once
    torch.testing.assert_close(seen[1], jpeg(seen[0], 10))
    again = evaluate_verification(
        embedder(weight), benchmark, (), flip=False, degrade=degrade, batch_size=5, progress=False
    )
    assert again.rows[1]["accuracy"] == found.rows[3]["accuracy"]  # noise does not depend on the batch


def test_kept_features_are_used_and_are_the_same(tmp_path):
    benchmark, weight = noise_set(6), projection()
    calls = []

    def embed(images):
        calls.append(len(images))
        return embedder(weight)(images)

    def run(images=None):
        if images is not None:
            benchmark.images = images
        return evaluate_verification(
            embed,
            benchmark,
            (112, 14),
            progress=False,
            store=lambda condition: FeatureStore(tmp_path, "model", {"condition": str(condition)}),
        ).rows

    first = run()
    computed = sum(calls)
    calls.clear()
    assert run() == first and not calls
    changed = benchmark.images.copy()
    changed[3] = 255 - changed[3]
    run(changed)
    assert sum(calls) == computed // len(changed)  # one image, both sizes, both mirror sides
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    calls.clear()
    run()
    assert sum(calls) == computed  # damaged files are computed again


def test_native_bins_by_hand():
    benchmark = noise_set()
    benchmark.native = np.full(len(benchmark.images), 40, dtype=np.float32)
    small, unknown = benchmark.left[0], benchmark.right[1]
    benchmark.native[small], benchmark.native[unknown] = 15.9, np.nan
    matrix = projection()
    found = evaluate_verification(
        lambda images: images.flatten(1) @ matrix, benchmark, (), native=True, progress=False
    )
    (row,) = found.rows
    assert row["gallery_size"] == row["probe_size"] == 112
    pair_size = np.minimum(benchmark.native[benchmark.left], benchmark.native[benchmark.right])
    chosen = {
        (12, 16): pair_size < 16,
        (32, 48): pair_size == 40,
        (None, None): np.isnan(pair_size),
    }
    bins = row["by_native_size"]
    assert [(part["smallest"], part["largest"]) for part in bins] == list(chosen)
    for part, pairs in zip(bins, chosen.values(), strict=True):
        assert part["pairs"] == pairs.sum() and part["same"] == benchmark.same[pairs].sum()
        assert part["accuracy"] == round(100 * found.right[0][pairs].mean(), 4)
    assert sum(part["pairs"] for part in bins) == len(benchmark)
    assert sum(part["pairs"] * part["accuracy"] for part in bins) == pytest.approx(
        100 * found.right[0].sum(), abs=0.01
    )
    both = evaluate_verification(
        lambda images: images.flatten(1) @ matrix, benchmark, (112, 28), native=True, progress=False
    )
    assert [row["by_native_size"] is None for row in both.rows] == [False, True]


def test_native_sizes_that_nobody_knows_are_refused():
    with pytest.raises(UsageError, match="--resolutions native: how large the faces of noise"):
        evaluate_verification(lambda images: images.flatten(1), noise_set(2), (), native=True, progress=False)
    with pytest.raises(LrfaceError, match="native sizes need one entry an image"):
        noise = noise_set(2)
        VerificationSet(
            "noise",
            noise.images,
            noise.left,
            noise.right,
            noise.same,
            noise.folds,
            native=np.zeros(3, np.float32),
        )
