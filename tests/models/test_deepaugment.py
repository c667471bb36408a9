import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models.compressive_autoencoder import CompressiveAutoencoder
from lrface.models.deepaugment import CAE_EDITS, EDSR_EDITS, draw_edited, edited
from lrface.models.edsr import EDSR


def edsr(blocks: int = 16) -> EDSR:
    torch.manual_seed(0)
    return EDSR(blocks=blocks, features=8, scale=2).eval().requires_grad_(False)


def cae() -> CompressiveAutoencoder:
    torch.manual_seed(0)
    return CompressiveAutoencoder(width=8, code=8).eval().requires_grad_(False)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def changed(before: nn.Module, after: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    old, new = before.state_dict(), after.state_dict()
    return {name: (old[name], new[name]) for name in old if not torch.equal(old[name], new[name])}


def one_change(network, name, seed=0):
    """The tensors that one edit changed, by the layers they are in."""
    made, names = edited(network, rng(seed), [name])
    assert names == [name]
    return changed(network, made)


@pytest.mark.parametrize("name", EDSR_EDITS)
def test_every_edit_of_edsr_changes_residual_blocks_and_nothing_else(name):
    network = edsr()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    found = one_change(network, name)
    assert found and all(key.startswith("blocks.") for key in found)
    assert len({key.split(".")[1] for key in found}) <= (
        5 if name in ("rotate", "random_signs", "drop_weights", "negate_filters", "keep_largest") else 1
    )
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", CAE_EDITS)
def test_every_edit_of_the_autoencoder_changes_layers_around_its_code(name):
    found = one_change(cae(), name)
    layers = {key.rpartition(".")[0] for key in found}
    assert found and len(layers) <= (2 if name == "multiply" else 1)
    assert all(
        layer in ("to_code", "from_code", "enlarge_first") or layer.startswith("decoder_blocks")
        for layer in layers
    )


def test_edits_of_edsr_by_their_formulas():
    network = edsr()

    def pair(name, kind):
        (found,) = [values for key, values in one_change(network, name).items() if key.endswith(kind)]
        return found

    old, new = pair("negate", "0.weight")
    assert torch.equal(new, -old)
    old, new = pair("negate", "0.bias")
    assert torch.equal(new, -old)
    _, new = pair("zero", "0.weight")
    assert not new.any()
    old, new = pair("flip_filters", "2.weight")
    assert torch.equal(new, old.flip(0))
    old, new = pair("negative_gelu", "0.weight")
    torch.testing.assert_close(new, -old * 0.5 * (1 + torch.erf(old / 2**0.5)))
    old, new = pair("laplacian_4", "weight")
    assert torch.equal(new[:, :, 1, 1], -4 * old[:, :, 1, 1]) and torch.equal(
        new[:, :, 0, 1], old[:, :, 0, 1]
    )
    assert not new[:, :, 0, 0].any()
    old, new = pair("laplacian_8", "weight")
    assert torch.equal(new[:, :, 1, 1], 8 * old[:, :, 1, 1]) and torch.equal(
        new[:, :, 0, 0], -old[:, :, 0, 0]
    )
    old, new = pair("multiply", "2.weight")
    assert float((new / old).min()) >= 1 and float((new / old).max()) < 5 and float((new / old).std()) > 0.01
    old, new = pair("mirror", "0.weight")
    assert torch.equal(new, old.flip(-1))
    old, new = pair("mirror", "2.weight")
    assert torch.equal(new, -old)
    old, new = pair("add_noise", "2.weight")
    assert float((new - old).abs().max()) <= 0.5 and abs(float((new - old).mean())) < 0.05
    for values in one_change(network, "random_signs").values():
        assert torch.equal(values[0].abs(), values[1].abs())
    for old, new in one_change(network, "drop_weights").values():
        assert bool(((new == old) | (new == 0)).all()) and 0.2 < float((new == 0).float().mean()) < 0.95
    for old, new in one_change(network, "keep_largest").values():
        flat = new.flatten(2)
        assert bool(((flat != 0).sum(2) == 1).all())
        assert torch.equal(flat.sum(2), old.flatten(2).amax(2))
    for old, new in one_change(network, "rotate").values():
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_convolved_kernels():
    """A shift takes for each filter the sum of its kernels, each moved by at most a pixel and with a sign of its own."""
    network = edsr()
    ((old, new),) = one_change(network, "shift").values()
    # Convolving is linear, and mixes the kernels of one filter with each other: the same for each filter.
    made, _ = edited(network, rng(0), ["shift"])
    (key,) = changed(network, made)
    probe = edsr()
    layer = probe.get_submodule(key.rpartition(".")[0])
    layer.weight.zero_()
    layer.weight[0, 3, 1, 1] = 1.0
    after = edited(probe, rng(0), ["shift"])[0].get_parameter(key)
    assert not after[1:].any() and bool((after[0].flatten(1) != 0).sum(1).eq(1).all())
    assert sorted(set(after[0][after[0] != 0].tolist())) in ([-1.0], [1.0])
    assert new.shape == old.shape
    ((old, new),) = one_change(network, "blur").values()
    assert new.abs().mean() > 0 and not torch.equal(old, new)


@pytest.mark.parametrize("make", [edsr, cae])
def test_draws_are_a_function_of_the_generator(make):
    network = make()
    images = torch.rand(3, 3, 32, 32)
    first, names = edited(network, rng(7))
    again, same = edited(network, rng(7))
    assert names == same and len(names) == (3 if make is edsr else 1)
    assert not changed(first, again)
    drawn = draw_edited(first, images, [rng(1, row) for row in range(3)])
    assert torch.equal(drawn, draw_edited(again, images, [rng(1, row) for row in range(3)]))
    alone = torch.cat([draw_edited(first, images[row : row + 1], [rng(1, row)]) for row in range(3)])
    torch.testing.assert_close(drawn, alone, atol=1e-5, rtol=0)
    assert drawn.shape == images.shape and 0 <= float(drawn.min()) and float(drawn.max()) <= 1


def test_every_edit_is_drawn_in_time():
    network = edsr(blocks=2)
    seen = {name for seed in range(60) for name in edited(network, rng(seed))[1]}
    assert seen == set(EDSR_EDITS)
    small = cae()
    assert {edited(small, rng(seed))[1][0] for seed in range(80)} == set(CAE_EDITS)


class Fixed:
    """A generator whose whole numbers are given."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)
        self.rng = np.random.default_rng(0)

    def integers(self, *bounds, size=None):
        return next(self.numbers) if size is None else self.rng.integers(*bounds, size=size)

    def uniform(self, *arguments):
        return self.rng.uniform(*arguments)


def by_hand(network: EDSR, images, at_five=lambda x: x):
    x = passed = network.head(images * 255 - network.mean)
    for number, block in enumerate(network.blocks):
        passed = passed + block(passed)
        if number == 4:
            passed = at_five(passed)
    drawn = network.output(network.enlarge(network.gather(passed) + x)) + network.mean
    return F.avg_pool2d((drawn / 255).clamp(0, 1), 2)


def test_signals_of_edsr():
    network, images = edsr(), torch.rand(1, 3, 32, 32)
    plain = draw_edited(network, images, [Fixed(4, 5)])
    torch.testing.assert_close(plain, network(images))
    torch.testing.assert_close(
        draw_edited(network, images, [Fixed(4, 1)]), by_hand(network, images, torch.neg)
    )
    torch.testing.assert_close(
        draw_edited(network, images, [Fixed(4, 2, 1)]), by_hand(network, images, F.relu)
    )
    torch.testing.assert_close(
        draw_edited(network, images, [Fixed(4, 2, 0)]), by_hand(network, images, F.gelu)
    )
    mirrored = by_hand(network, images, lambda x: x.flip([1, 3]))
    torch.testing.assert_close(draw_edited(network, images, [Fixed(4, 3, 2)]), mirrored)
    for kind in (1, 2, 3):
        drawn = draw_edited(network, images, [Fixed(kind, 5)])
        assert not torch.allclose(drawn, plain)
    # None of the first layers but one alone, on the signal that came in.
    x = network.head(images * 255 - network.mean)
    drawn = network.output(network.enlarge(network.gather(x) + x)) + network.mean
    expected = F.avg_pool2d((drawn / 255).clamp(0, 1), 2)
    skipping = Fixed(4, 4)
    skipping.rng = np.random.default_rng(5)
    assert 16 not in np.random.default_rng(5).integers(2, 17, size=3)
    torch.testing.assert_close(draw_edited(network, images, [skipping]), expected)


def test_a_network_of_few_blocks():
    network = edsr(blocks=1)
    for seed in range(40):
        made, _ = edited(network, rng(seed))
        assert bool(torch.isfinite(draw_edited(made, torch.rand(1, 3, 32, 32), [rng(seed, 1)])).all())


def test_what_cannot_be_edited():
    with pytest.raises(
        UsageError, match="DeepAugment edits an EDSR or a compressive autoencoder; found Linear"
    ):
        edited(nn.Linear(2, 2), rng())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="found 'melt'"):
        edited(edsr(), rng(), ["melt"])
