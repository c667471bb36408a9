"""Noise generators: their size, their start, and that a pixel's noise is its own."""

import pytest
import torch

from lrface.errors import UsageError
from lrface.models.noise import NOISE_GENERATORS, NoiseGenerator


def trained(name: str = "noise1x1", **arguments) -> NoiseGenerator:
    """A generator that is no longer at its start."""
    generator = NOISE_GENERATORS.build(name, **arguments).double()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.5)
    return generator


def normal(n: int = 2, channels: int = 3, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("depth, parameters", [(1, 12), (2, 143), (3, 563), (4, 983), (5, 1403)])
def test_parameters_are_those_of_table_16(depth, parameters):
    assert sum(p.numel() for p in NOISE_GENERATORS.build("noise1x1", depth=depth).parameters()) == parameters


def test_layers_are_those_of_tables_6_and_7():
    for name, sides in (("noise1x1", [1, 1, 1, 1]), ("noise3x3", [1, 3, 1, 1])):
        layers = list(NOISE_GENERATORS.build(name).convolutions)
        assert [layer.kernel_size for layer in layers] == [(side, side) for side in sides]
        assert [layer.out_channels for layer in layers] == [20, 20, 20, 3]
    assert NOISE_GENERATORS.build("noise3x3", depth=1).convolutions[0].kernel_size == (3, 3)


@pytest.mark.parametrize("name", NOISE_GENERATORS.names())
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_fresh_generator_gives_gaussian_noise_and_can_learn(name, depth):
    generator = NOISE_GENERATORS.build(name, depth=depth)
    z = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = generator(z)
    assert torch.equal(noise, z)
    (noise * z.square()).sum().backward()
    last = generator.convolutions[-1]
    assert float(last.weight.grad.abs().max()) > 0 and float(last.bias.grad.abs().max()) > 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_with_one_pixel_kernels_each_pixel_is_drawn_by_itself(depth):
    """The Jacobian has no entry between two pixels, and a permutation of the pixels before or after is the same."""
    generator, z = trained(depth=depth), normal(1)
    jacobian = torch.autograd.functional.jacobian(generator, z).reshape(3, 36, 3, 36)
    between = jacobian.permute(1, 3, 0, 2).flatten(2).abs().amax(2)
    assert bool((between[torch.eye(36) == 0] == 0).all()) and bool((between.diagonal() > 0).all())
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    permuted = z.flatten(2)[:, :, order].view_as(z)
    torch.testing.assert_close(generator(permuted), generator(z).flatten(2)[:, :, order].view_as(z))
    assert not torch.equal(generator(z), z)


def test_with_a_kernel_of_three_pixels_noise_depends_on_its_neighbours_alone():
    generator, z = trained("noise3x3"), normal(1)
    jacobian = torch.autograd.functional.jacobian(generator, z).abs().amax((0, 1, 4, 5))  # [h, w, h, w]
    for row in range(6):
        for column in range(6):
            near = torch.zeros(6, 6, dtype=torch.bool)
            near[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
            assert torch.equal(jacobian[row, column] > 0, near)


@pytest.mark.parametrize("name", NOISE_GENERATORS.names())
@pytest.mark.parametrize("depth", [1, 4])
def test_noise_of_many_generators_at_once(name, depth):
    generators = [NOISE_GENERATORS.build(name, depth=depth, seed=seed) for seed in range(5)]
    for number, generator in enumerate(generators):
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(0.1 * number)
    z = normal(5).float()
    states = torch.stack([generator.state() for generator in generators])
    found = generators[0].noise_of(states, z)
    wanted = torch.cat([generator(z[row : row + 1]) for row, generator in enumerate(generators)])
    torch.testing.assert_close(found, wanted)
    assert states.shape == (5, sum(p.numel() for p in generators[0].parameters()))


def test_a_state_is_a_copy_and_comes_back():
    first, second = trained().float(), NOISE_GENERATORS.build("noise1x1", seed=9)
    state = first.state()
    with torch.no_grad():
        first.convolutions[0].weight.zero_()
    second.load(state)
    assert torch.equal(second.state(), state) and not torch.equal(first.state(), state)


def test_the_seed_decides_the_start():
    states = [NOISE_GENERATORS.build("noise1x1", seed=seed).state() for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    again = NOISE_GENERATORS.build("noise1x1", seed=1)
    before = torch.get_rng_state()
    again.reset(0)
    assert torch.equal(again.state(), states[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"width": 0}, {"depth": 0}])
def test_values_out_of_range(arguments):
    (name,) = arguments
    with pytest.raises(UsageError, match=f"generator.{name} must be at least 1"):
        NOISE_GENERATORS.build("noise1x1", **arguments)
    with pytest.raises(UsageError, match="generator.kernel must be 1 or 3"):
        NoiseGenerator(kernel=5)
