import pytest
import torch

from lrface.degrade.framing import Frame, Framing
from lrface.errors import UsageError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crops_and_mirrors_pixel_by_pixel():
    images = torch.rand(3, 3, 6, 7, generator=seeded(0))
    frame = Frame(torch.tensor([False, True, True]), torch.tensor([2, 0, 4]), torch.tensor([2, 3, 0]))
    done = Framing(crop_padding=2).apply(images, frame)
    assert torch.equal(done[0], images[0])
    for row in range(3):
        padded = torch.zeros(3, 10, 11)
        padded[:, 2:8, 2:9] = images[row]
        top, left = int(frame.top[row]), int(frame.left[row])
        crop = padded[:, top : top + 6, left : left + 7]
        assert torch.equal(done[row], crop.flip(-1) if frame.mirror[row] else crop)


def test_without_padding_images_are_only_mirrored():
    images = torch.rand(40, 3, 5, 5, generator=seeded(0))
    framing = Framing(mirror=0.5)
    frame = framing.sample(40, seeded(1))
    done = framing.apply(images, frame)
    assert bool((frame.top == 0).all()) and bool((frame.left == 0).all())
    assert 5 < int(frame.mirror.sum()) < 35
    for row in range(40):
        assert torch.equal(done[row], images[row].flip(-1) if frame.mirror[row] else images[row])


def test_places_are_uniform():
    frame = Framing(mirror=0.25, crop_padding=4).sample(9000, seeded(2))
    for places in (frame.top, frame.left):
        counts = torch.bincount(places)
        assert len(counts) == 9 and bool(((counts - 1000).abs() < 5 * 30).all())
    assert abs(int(frame.mirror.sum()) - 2250) < 5 * 42
    assert not torch.equal(frame.top, frame.left)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"crop_padding": -1}, "degrade.crop_padding must be at least 0 pixels; found -1"),
        ({"mirror": 2.0}, "degrade.mirror must be between 0 and 1; found 2.0"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(UsageError, match=message):
        Framing(**arguments)
