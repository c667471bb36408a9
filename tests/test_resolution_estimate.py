"""Effective resolution measured on pixels: within a quarter on degraded faces, drawn ones and real ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.resolution import resample, resize
from lrface.embed.resolution import (
    CANDIDATES,
    MEASURES,
    SIDE,
    effective_resolutions,
    likely,
    measured_resolutions,
    measures,
)

CELEBA = Path(__file__).resolve().parents[2] / "shared" / "data" / "celeba300_112"
KERNELS = [(down, up) for down in ("nearest", "area") for up in ("nearest", "bilinear", "bicubic")]


def rounded(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round() / 255


def errors(images: torch.Tensor, size: int, down: str, up: str) -> np.ndarray:
    """How far off the estimate is for each face, brought to ``size`` and back, as a share of ``size``."""
    degraded = rounded(resample(images, size, down, up))
    found = effective_resolutions(degraded, np.full(len(images), images.shape[-1], np.float32))
    assert found.dtype == np.float32 and found.shape == (len(images),)
    return np.abs(found / size - 1)


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """Procedural faces, which are smoother than photographs and as sharp at their edges."""
    faces = SyntheticFaces(20, 1, seed=3)
    images = np.stack([faces.image(index) for index in range(20)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """Faces of people that the constants were not fitted to: every third (see eval/fit_resolution.py)."""
    if not CELEBA.is_dir():
        pytest.skip(f"{CELEBA} is not there")
    folders = sorted(path for path in CELEBA.iterdir() if path.is_dir())[::3]
    paths = [sorted(folder.iterdir())[-1] for folder in folders[:40]]
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255 for path in paths]
    )


@pytest.mark.parametrize("size", [10, 14, 20, 28, 40, 56, 80, 112])
def test_degraded_photographs_within_a_quarter(real, size):
    found = np.stack([errors(real, size, *kernels) for kernels in KERNELS])
    assert np.median(found) < 0.1
    assert (np.median(found, axis=1) <= 0.25).all()
    assert (found <= 0.25).mean() > 0.85, dict(zip(KERNELS, (found <= 0.25).mean(axis=1), strict=True))


@pytest.mark.parametrize("size", [10, 14, 20, 28, 40, 56])
def test_degraded_drawings_within_a_quarter(drawn, size):
    found = np.stack([errors(drawn, size, *kernels) for kernels in KERNELS])
    assert (np.median(found, axis=1) <= 0.25).all(), np.median(found, axis=1)
    assert (found <= 0.25).mean() > 0.8


def test_measures_by_hand():
    """A wave of 10 cycles has its power there; blocks of 4 pixels beat 28 times."""
    wave = 100 + 50 * np.sin(2 * np.pi * 10 * np.arange(SIDE) / SIDE)
    picture = np.broadcast_to(wave[None] + wave[:, None], (1, SIDE, SIDE)).astype(np.float32)
    found = measures(picture)
    assert found.shape == (1, MEASURES) and found.dtype == np.float32
    assert found[0, :56].argmax() == 9
    generator = np.random.default_rng(0)
    blocks = np.kron(generator.uniform(0, 255, (28, 28)), np.ones((4, 4)))[None].astype(np.float32)
    beat = measures(blocks)[0, 56:112]
    assert beat.argmax() in (27, 55) and beat[27] > np.median(beat) + 2
    turned = measures(np.ascontiguousarray(blocks.transpose(0, 2, 1)))
    np.testing.assert_allclose(turned, measures(blocks), atol=1e-3)  # rows and columns count alike


def test_the_likeliest_size():
    logits = np.full((2, len(CANDIDATES)), -20, np.float32)
    logits[0, 10] = 5
    logits[1, [20, 21]] = 5
    logits[1, 40] = 5.3  # the single highest, but two neighbours are likelier together
    found = likely(logits)
    assert found[0] == pytest.approx(CANDIDATES[10], rel=1e-3)
    assert found[1] == pytest.approx(np.sqrt(CANDIDATES[20] * CANDIDATES[21]), rel=1e-3)


def test_what_a_file_spans_is_the_most_it_can_have(drawn):
    spans = np.array([14, 28, 56, 200, 112], np.float32)
    sizes = (14, 28, 56, 112, 112)
    crops = torch.cat(
        [resize(resize(drawn[i : i + 1], s, "area"), SIDE, "bilinear") for i, s in enumerate(sizes)]
    )
    found = effective_resolutions(crops, spans)
    assert (found <= spans).all()
    np.testing.assert_array_equal(found[:3], spans[:3])  # an error of some percent takes nothing away
    # enlarged before it was shrunk to a file of 56 pixels
    twice = resize(resize(resize(drawn[:8], 14, "area"), 56, "bicubic"), SIDE, "bilinear")
    assert np.median(effective_resolutions(twice, np.full(8, 56, np.float32))) == pytest.approx(14, rel=0.35)


def test_pictures_without_detail_keep_their_span_and_none_is_none():
    flat = torch.full((1, 3, SIDE, SIDE), 0.5)
    assert effective_resolutions(flat, np.array([77], np.float32)).tolist() == [77]
    assert effective_resolutions(flat[:0], np.zeros(0, np.float32)).shape == (0,)
    assert measured_resolutions(np.zeros((0, SIDE, SIDE), np.float32)).shape == (0,)


def test_an_estimate_does_not_depend_on_the_batch_or_the_network(drawn):
    degraded = rounded(resample(drawn, 20, "area", "bicubic"))
    spans = np.full(len(drawn), SIDE, np.float32)
    together = effective_resolutions(degraded, spans)
    alone = np.concatenate([effective_resolutions(each[None], spans[:1]) for each in degraded])
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    larger = effective_resolutions(resize(degraded, 160, "bilinear"), spans)
    assert np.median(larger) == pytest.approx(20, rel=0.3)
