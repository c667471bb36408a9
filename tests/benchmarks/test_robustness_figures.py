import numpy as np
import pytest

from lrface.benchmarks.imagenet_lists import IMAGENET_100_SHIFT
from lrface.benchmarks.robustness import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    BENCHMARKS,
    MISSING,
    Judged,
    class_subset,
    corruption_errors,
    error_of,
    image_subset,
    imagenet_classes,
    robustness_figures,
)
from lrface.degrade.corruptions import CORRUPTIONS, HELD_OUT
from lrface.errors import LrfaceError, UsageError

IMAGENET_C, CIFAR_C, MNIST_C = (BENCHMARKS[name] for name in ("imagenet_c", "cifar10_c", "mnist_c"))


def test_alexnet_against_itself():
    errors = {name: [value] * 5 for name, value in ALEXNET_ERRORS.items()}
    found = corruption_errors(errors, IMAGENET_C, ALEXNET_CLEAN_ERROR, alexnet=True)
    assert all(value == pytest.approx(1) for value in [*found["ce"].values(), *found["relative_ce"].values()])
    for key in ("mce", "mce_without_noise", "relative_mce", "relative_mce_without_noise"):
        assert found[key] == pytest.approx(1)
    assert list(errors) == list(CORRUPTIONS)
    # The table of the paper, in percent: 88.6, 89.4, 92.3, ... ; its mean is what an mCE is measured in.
    assert [round(100 * ALEXNET_ERRORS[name], 1) for name in ("gaussian_noise", "fog", "pixelate")] == [
        88.6,
        81.9,
        71.8,
    ]
    assert found["mean_error"] == pytest.approx(sum(ALEXNET_ERRORS.values()) / 15)


def test_figures_by_hand():
    errors = {name: [0.5] * 5 for name in CORRUPTIONS} | {
        "gaussian_noise": [0.5, 0.6, 0.7, 0.8, 0.9],
        "spatter": [0.2] * 5,
    }
    found = corruption_errors(errors, IMAGENET_C, 0.25, alexnet=True)
    assert found["error"]["gaussian_noise"] == pytest.approx(0.7)
    assert found["ce"]["gaussian_noise"] == pytest.approx(0.7 / 0.886428)
    assert found["relative_ce"]["gaussian_noise"] == pytest.approx((0.7 - 0.25) / (0.886428 - 0.43478))
    assert found["ce"]["spatter"] is None and found["held_out_mean_error"] == pytest.approx(0.2)
    others = [0.5 / ALEXNET_ERRORS[name] for name in CORRUPTIONS[1:]]
    assert found["mce"] == pytest.approx((0.7 / 0.886428 + sum(others)) / 15)
    assert found["mce_without_noise"] == pytest.approx(sum(others[2:]) / 12)
    assert found["mean_error"] == pytest.approx((0.7 + 14 * 0.5) / 15)
    assert found["mean_error_without_noise"] == pytest.approx(0.5)
    assert found["by_group"] == pytest.approx({"noise": 1.7 / 3, "blur": 0.5, "weather": 0.5, "digital": 0.5})


def test_what_cannot_be_normalised_is_not():
    some = {name: [0.5] * 5 for name in CORRUPTIONS[:14]}
    found = corruption_errors(some, IMAGENET_C, None, alexnet=True)
    assert (
        found["mce"] is None and found["relative_mce"] is None and found["mean_error"] == pytest.approx(0.5)
    )
    assert found["ce"]["fog"] is not None and found["relative_ce"]["fog"] is None
    found = corruption_errors({name: [0.5] * 5 for name in CORRUPTIONS}, CIFAR_C, 0.1)
    assert (
        found["mce"] is None
        and set(found["ce"].values()) == {None}
        and found["mean_error"] == pytest.approx(0.5)
    )
    found = corruption_errors({"spatter": [0.4], "zigzag": [0.2]}, MNIST_C)
    assert found["mean_error"] == pytest.approx(0.3) and found["held_out_mean_error"] is None


def test_figures_from_what_was_judged():
    right = {
        ("fog", 1): np.array([1, 1, 0, 0], np.uint8),
        ("fog", 2): np.array([1, 0, 0, MISSING], np.uint8),
        ("snow", 1): np.array([0, 0, 0, 0], np.uint8),
        ("snow", 2): np.array([0, 0, 0, 1], np.uint8),
    }
    five = {key: np.ones(4, np.uint8) for key in right}
    judged = Judged(right, five, np.array([1, 1, 1, 0], np.uint8), np.ones(4, np.uint8))
    found = robustness_figures(judged, CIFAR_C, alexnet=False, samples=200)
    fog, snow = found["corruptions"]
    assert fog["errors"] == [50.0, pytest.approx(66.6667)] and fog["severities"] == [1, 2]
    assert fog["error"] == pytest.approx(58.3333, abs=1e-3) and snow["error"] == 87.5
    assert found["clean_error"] == 25.0 and found["clean_top5_error"] == 0.0 and fog["top5_error"] == 0.0
    assert found["mean_error"] == pytest.approx((58.3333 + 87.5) / 2, abs=1e-3)
    assert fog["error_interval"][0] < fog["error"] < fog["error_interval"][1]
    assert found["mce"] is None and fog["alexnet_error"] is None
    assert found == robustness_figures(judged, CIFAR_C, alexnet=False, samples=200)
    with pytest.raises(LrfaceError, match="at least one readable"):
        error_of(np.array([MISSING], np.uint8))


def test_an_interval_is_that_of_a_proportion():
    rng = np.random.default_rng(0)
    right = (rng.random(2000) < 0.8).astype(np.uint8)
    found = robustness_figures(Judged({("fog", 1): right}), CIFAR_C, alexnet=False)
    low, high = found["corruptions"][0]["error_interval"]
    half = 196 * np.sqrt(0.2 * 0.8 / 2000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_lists_of_classes_and_images():
    classes = imagenet_classes()
    assert len(classes) == len(set(classes)) == 1000 and list(classes) == sorted(classes)
    for name, count in (("imagenet100", 100), ("imagenet100b", 100), ("imagenet200", 200)):
        subset = class_subset(name)
        assert len(set(subset)) == count and set(subset) <= set(classes)
    assert "n02124075" in class_subset("imagenet200")  # the first of Tiny-ImageNet, Egyptian cat
    inside = set(class_subset("imagenet100"))
    assert not inside & set(class_subset("imagenet100b")) and "n02281787" in class_subset("imagenet100b")
    assert set(IMAGENET_100_SHIFT.values()) <= inside
    assert set(IMAGENET_100_SHIFT) <= set(classes) - inside
    chosen = image_subset("robustbench5000")
    names = [f"n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    assert sum(map(chosen, names)) == 5000 and chosen("n09468604/ILSVRC2012_val_00015253.JPEG")


def test_imagenet_classes_are_those_of_real_photographs(shared):
    found = sorted(path.name[:9] for path in (shared / "data/imagenet_sample").glob("*.jpg"))
    assert tuple(found) == imagenet_classes()


def test_lists_of_the_users(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("# mine\nb/2.png\n\n3\n")
    assert class_subset(str(file)) == ("b/2.png", "3")
    chosen = image_subset(str(file))
    assert chosen("b/2.JPEG") and chosen("a/3.jpg") and not chosen("c/2.png") and not chosen("b/1.png")
    for call in (class_subset, image_subset):
        with pytest.raises(UsageError, match="no such file"):
            call(str(tmp_path / "nothing"))
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no names"):
        class_subset(str(file))


def test_held_out_corruptions_are_known():
    assert IMAGENET_C.held_out == HELD_OUT and not MNIST_C.held_out
    assert MNIST_C.strength("brightness", 1) == 5 and CIFAR_C.strength("brightness", 1) == 1
