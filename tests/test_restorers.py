"""Non-Local Means and the Deep Decoder on images that are known."""

import pytest
import torch
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.deep_decoder import DeepDecoder, upsamplings
from lrface.restorers import build_restorer, noise_level


def pictures(count: int = 2, side: int = 32) -> torch.Tensor:
    """Smooth colours with an edge."""
    generator = torch.Generator().manual_seed(3)
    small = torch.rand(count, 3, 4, 4, generator=generator)
    found = F.interpolate(small, size=(side, side), mode="bicubic").clamp(0.05, 0.95)
    found[:, :, side // 4 : side // 2, side // 4 : 3 * side // 4] = 0.9
    return found


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def psnr(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10((found - truth).square().mean(dim=(1, 2, 3)))


def test_the_level_of_noise_is_found():
    flat = torch.full((3, 3, 64, 64), 0.5)
    for sigma in (0.02, 0.1):
        assert noise_level(noisy(flat, sigma)).tolist() == pytest.approx([sigma] * 3, rel=0.05)
    assert float(noise_level(flat).max()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_non_local_means_takes_noise_away(sigma):
    truth = pictures()
    seen = noisy(truth, sigma)
    restored = build_restorer("nlm")(seen)
    assert restored.shape == seen.shape and restored.dtype == torch.float32
    assert 0 <= float(restored.min()) and float(restored.max()) <= 1
    assert bool((psnr(restored, truth) > psnr(seen, truth) + 3).all())
    assert torch.equal(build_restorer("nlm")(seen[1:]), restored[1:])


def test_the_deep_decoder_fills_in_missing_pixels():
    truth = pictures(2, 16)
    mask = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(5)) > 0.5
    seen = truth * mask
    restored = build_restorer("deep_decoder", steps=200, channels=8)(seen)
    assert bool((psnr(restored, truth) > psnr(seen, truth) + 6).all())
    # Black pixels that count are reproduced, not filled in.
    counted = build_restorer("deep_decoder", steps=200, channels=8, missing=False)(seen)
    assert bool((psnr(counted, truth) < psnr(restored, truth) - 3).all())


def test_the_deep_decoder_takes_noise_away():
    truth = pictures(1, 32)
    seen = noisy(truth, 0.3)
    restored = build_restorer("deep_decoder", steps=200, channels=6, missing=False)(seen)
    assert bool((psnr(restored, truth) > psnr(seen, truth) + 3).all())


def test_an_image_is_fitted_by_itself():
    truth = pictures(3, 16)
    fit = build_restorer("deep_decoder", steps=20, channels=4)
    alone = build_restorer("deep_decoder", steps=20, channels=4, together=1)
    torch.testing.assert_close(fit(truth), alone(truth), atol=1e-4, rtol=0)


def test_the_network_is_the_papers():
    """One image's decoder, layer by layer with PyTorch's own convolutions, in the authors' order: doubled, then mixed."""
    decoder = DeepDecoder(2, 32, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder.scale += 0.3
        decoder.shift -= 0.1
        values = decoder.input[1].view(1, 5, 4, 4)
        for layer, mix in enumerate(decoder.mix):
            values = F.interpolate(values, scale_factor=2, mode="bilinear")
            values = F.relu(F.conv2d(values, mix[1][:, :, None, None]))
            values = F.batch_norm(
                values,
                None,
                None,
                decoder.scale[layer, 1, :, 0],
                decoder.shift[layer, 1, :, 0],
                training=True,
            )
        expected = torch.sigmoid(F.conv2d(values, decoder.last[1][:, :, None, None]))
        torch.testing.assert_close(decoder()[1:], expected, atol=1e-5, rtol=0)


def test_its_width_follows_from_the_image():
    assert [upsamplings(side) for side in (8, 32, 112, 224, 512, 30)] == [1, 3, 4, 5, 5, 1]
    generator = torch.Generator().manual_seed(0)
    wide = DeepDecoder(1, 224, generator=generator)
    assert wide.last.shape == (1, 3, 128) and wide.input.shape == (1, 128, 49)
    small = DeepDecoder(1, 32, generator=generator)
    assert sum(mix.numel() for mix in small.mix) <= 0.55 * 3 * 32 * 32
    with pytest.raises(UsageError, match="an even side of 8 pixels or more; found 31"):
        DeepDecoder(1, 31, generator=generator)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nml", {}, r"unknown restore 'nml' \(did you mean 'nlm'\?\)"),
        ("nlm", {"strength": 0.0}, "restore.strength must be above 0"),
        ("nlm", {"search": 12}, "restore.search must be an odd number"),
        ("deep_decoder", {"steps": 0}, "restore.steps must be at least 1"),
        ("deep_decoder", {"learning_rate": 0.0}, "restore.learning_rate must be above 0"),
        ("deep_decoder", {"rate": 1}, "unknown key restore.rate"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        build_restorer(name, **arguments)
