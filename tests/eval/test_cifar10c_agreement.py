"""The reference code driven with other constants than those written into it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lrface.degrade import corruptions

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "cifar10c_agreement.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10c_agreement", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCALE = 10


def example(x: float, severity: int = 1) -> float:
    c = [0.1, 0.2, 0.3][severity - 1]
    return x * c * SCALE + 2.5


def test_numbers_of_a_function_are_exchanged(script: ModuleType) -> None:
    changed = script.with_constants(example, {(0.1, 0.2, 0.3): (4.0, 5.0, 6.0), 2.5: 1.0}, {"SCALE": 100})
    assert changed(2.0, severity=3) == 2 * 6 * 100 + 1
    assert changed(2.0) == 2 * 4 * 100 + 1  # defaults stay
    assert example(2.0, severity=3) == 2 * 0.3 * 10 + 2.5 and SCALE == 10


def test_a_number_that_is_not_there(script: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"example of imagecorruptions holds no \[7.5\]: another version\?"):
        script.with_constants(example, {7.5: 1.0}, {})


def test_the_reference_has_the_constants_of_cifar(script: ModuleType) -> None:
    """Where a corruption draws nothing, lrface's set "cifar" is what the reference makes of CIFAR-10-C's numbers."""
    pytest.importorskip("imagecorruptions", reason="imagecorruptions-imaug is not installed")
    reference = script.reference_functions()
    assert set(reference) == set(corruptions.CORRUPTIONS)
    coarse = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=32, mode="bilinear")
    images = smooth.round().to(torch.uint8)
    pixels = images[0].permute(1, 2, 0).numpy()
    for name in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):
        for severity in (1, 5):
            ours = corruptions.corrupt(images, name, severity, "cifar")[0].permute(1, 2, 0).numpy()
            theirs = reference[name](pixels, severity)
            assert np.abs(ours.astype(float) - theirs).mean() <= 1, (name, severity)
            assert np.abs(theirs.astype(float) - pixels).mean() > 0.2
    for name in ("frost", "elastic_transform", "snow", "fog"):
        assert reference[name](pixels, 5).shape == (32, 32, 3)
