"""i-RevNets: the inverse, gradients without stored activations, and the decoder that their inverse is."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.models import BACKBONES, build_backbone, build_decoder, build_decoder_for, irevnet
from lrface.models.blocks import batchnorm_eval, parameter_count
from lrface.models.irevnet import BLOCKS, IRevNet, ReversibleBlock
from lrface.models.memory import recompute_activations

BIJECTIVE = dict(blocks=[2, 2, 1], strides=[2, 1, 2], channels=[24, 24, 96], down_sampling=2, input_size=32)
PADDED = dict(blocks=[2, 1, 2], strides=[1, 2, 2], channels=[4, 16, 64], input_size=16)


def network(seed: int = 0, **arguments) -> IRevNet:
    torch.manual_seed(seed)
    built = build_backbone("irevnet", **arguments)
    assert isinstance(built, IRevNet)
    for part in (
        built.modules()
    ):  # not the statistics and weights of a fresh BatchNorm, which does nothing in eval mode
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    return built


def images(arguments: dict, n: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = arguments["input_size"]
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def settle(encoder: IRevNet, x: torch.Tensor) -> IRevNet:
    """Running statistics as after training: those of ``x``."""
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        encoder.train()(x)
    return encoder.eval()


@pytest.mark.parametrize(
    "name, size, channels, side, layers",
    [(f"irevnet{depth}", 224, 3072, 7, depth) for depth in (45, 78, 150, 300, 450)]
    + [("irevnet_cifar", 32, 512, 8, 162), ("irevnet_face", 112, 768, 7, 150)],
)
def test_named_networks(name, size, channels, side, layers):
    with torch.device("meta"):
        encoder = build_backbone(name)
        feature_map = encoder.features(torch.rand(2, 3, size, size))
        assert feature_map.shape == (2, channels, side, side)
        assert encoder.embed(feature_map).shape == (2, channels)
        assert encoder.inverse(feature_map).shape == (2, 3, size, size)
    assert (encoder.input_size, encoder.feature_channels, encoder.feature_size) == (size, channels, side)
    assert encoder.embedding_size == channels
    assert sum(isinstance(part, nn.Conv2d) for part in encoder.modules()) == layers
    if name != "irevnet_cifar":  # bijective: not a number is added to the image's
        assert channels * side**2 == 3 * size**2


def test_the_network_of_the_paper():
    assert BLOCKS[300] == (6, 16, 72, 6)
    with torch.device("meta"):
        encoder = build_backbone("irevnet300")
    strides = [block.stride for block in encoder.body]
    assert [number for number, stride in enumerate(strides) if stride == 2] == [0, 6, 22, 94]
    assert [encoder.body[last].residual[-1].out_channels for last in (5, 21, 93, 99)] == [24, 96, 384, 1536]

    def convolutions(
        inputs, outputs
    ):  # of one block, by hand: the inner two layers have a quarter of the channels
        return 9 * (inputs * (outputs // 4) + (outputs // 4) ** 2 + (outputs // 4) * outputs)

    weights, norms, half = 0, 0, 6
    for blocks, outputs in zip(BLOCKS[300], (24, 96, 384, 1536), strict=True):
        weights += convolutions(half, outputs) + (blocks - 1) * convolutions(outputs, outputs)
        norms += half + (blocks - 1) * outputs + blocks * 2 * (outputs // 4)
        half = outputs
    norms += 3072 - 6  # the one before pooling; the very first block begins without
    assert parameter_count(encoder) == weights + 2 * norms


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block = ReversibleBlock(4, stride=2).eval()
    x1, x2 = torch.randn(2, 3, 4, 8, 8).unbind()
    y1, y2 = block(x1, x2)
    assert y1.shape == y2.shape == (3, 16, 4, 4)

    def rearranged(x):  # channel 4 c + 2 i + j of a pixel is row i, column j of channel c's 2 x 2 pixels
        return torch.stack([x[:, c, i::2, j::2] for c in range(4) for i in range(2) for j in range(2)], 1)

    norm, _, first, inner, _, second, last, _, third = block.residual
    x = first(torch.relu(norm(x2)))
    x = third(torch.relu(last(second(torch.relu(inner(x))))))
    torch.testing.assert_close(y1, rearranged(x2))
    torch.testing.assert_close(y2, rearranged(x1) + x)
    back = block.inverse(y1, y2)
    torch.testing.assert_close(back[0], x1)
    torch.testing.assert_close(back[1], x2)


def test_the_first_block_sees_the_image_itself():
    encoder = network(**BIJECTIVE)
    first, second = encoder.body[0].residual, encoder.body[1].residual
    assert isinstance(first[0], nn.Conv2d) and isinstance(second[0], nn.BatchNorm2d)


@pytest.mark.parametrize("arguments", [BIJECTIVE, PADDED])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_inverse_gives_the_image_back(arguments, recompute):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x = images(arguments, dtype=dtype)
        encoder = settle(network(**arguments, recompute=recompute).to(dtype), x)
        feature_map = encoder.features(x)
        assert feature_map.std() > 0.1 and feature_map.dtype == dtype
        assert (encoder.inverse(feature_map) - x).abs().max() < tolerance
        # In eval mode an image's inverse is its own affair.
        torch.testing.assert_close(encoder.inverse(feature_map[:1]), encoder.inverse(feature_map)[:1])


@pytest.mark.parametrize("arguments", [BIJECTIVE, PADDED])
def test_in_training_mode_the_inverse_belongs_to_the_batch(arguments):
    x = images(arguments, dtype=torch.float64)
    encoder = network(**arguments).double().train()
    with torch.no_grad():
        feature_map = encoder.features(x)
        before = copy.deepcopy(encoder.state_dict())
        assert (encoder.inverse(feature_map) - x).abs().max() < 1e-9
        assert (encoder.inverse(feature_map[:2]) - x[:2]).abs().max() > 1e-3
        assert (
            encoder.eval().inverse(feature_map) - x
        ).abs().max() > 1e-3  # the statistics of another moment
    after = encoder.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)  # nothing was counted on the way back


def test_a_bijective_network_is_one_the_other_way_too():
    """Every feature map is that of one image; only where channels were padded there are maps of none."""
    for arguments, onto in ((BIJECTIVE, True), (PADDED, False)):
        x = images(arguments, dtype=torch.float64)
        encoder = settle(network(**arguments).double(), x)
        with torch.no_grad():
            any_map = torch.randn_like(encoder.features(x))
            difference = (encoder.features(encoder.inverse(any_map)) - any_map).abs().max()
        assert bool(difference < 1e-8) is onto


def test_three_hundred_layers_in_float32_and_bfloat16():
    arguments = dict(
        blocks=BLOCKS[300],
        strides=[2, 2, 2, 2],
        channels=[24, 96, 384, 1536],
        down_sampling=2,
        input_size=64,
        bottleneck=64,
    )
    x = images(arguments)
    encoder = settle(network(**arguments), x)
    with torch.no_grad():
        exact = encoder.features(x)
        error = encoder.inverse(exact) - x
        assert error.norm() / x.norm() < 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            feature_map = encoder.features(x)
            rough = encoder.inverse(feature_map)
            assert torch.equal(encoder.inverse(exact) - x, error)  # the inverse itself is not rounded
        assert feature_map.dtype == rough.dtype == torch.float32  # the halves; only F was of low precision
        assert (feature_map - exact).abs().mean() > 1e-3 * exact.abs().mean()
        assert (rough - x).abs().mean() > 100 * error.abs().mean()


def gradients(encoder: IRevNet, x: torch.Tensor, inverse: bool = False, autocast: bool = False):
    """Of a loss that weighs every output differently: each parameter's, and the input's."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = encoder.inverse(x) if inverse else encoder(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        (out * weights).sum().backward()
    found = {key: value.grad for key, value in encoder.named_parameters() if value.grad is not None}
    return {**found, "input": x.grad}


def distance(found: dict, expected: dict) -> float:
    """Of all gradients together, relative to their length."""
    assert found.keys() == expected.keys()
    apart = sum((found[key] - expected[key]).square().sum().item() for key in expected)
    return math.sqrt(apart / sum(value.square().sum().item() for value in expected.values()))


@pytest.mark.parametrize("arguments", [BIJECTIVE, PADDED])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen batchnorm"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_recomputed_gradients_are_those_of_autograd(arguments, mode, dtype, tolerance):
    x = images(arguments, dtype=dtype)
    found, buffers = [], []
    for recompute in (True, False):
        encoder = settle(network(**arguments, recompute=recompute).to(dtype), x)
        encoder.train(mode != "eval")
        if mode == "frozen batchnorm":
            batchnorm_eval(encoder)
        found.append(gradients(encoder, x + 0.1))
        buffers.append(dict(encoder.named_buffers()))
    assert len(found[0]) == len(list(encoder.parameters())) + 1
    assert distance(*found) < tolerance
    assert all(
        torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[1]
    )  # no batch is counted twice
    if mode == "train":
        assert all(
            int(value) == 2 for key, value in buffers[0].items() if key.endswith("num_batches_tracked")
        )


def through(encoder: IRevNet, feature_map: torch.Tensor, way: str, autocast: bool = False):
    """The image of a feature map and the gradient of its weighted sum: by the masks of ReLU, by computing again, or by
    autograd alone."""
    with pytest.MonkeyPatch.context() as patch:
        if way != "masks":
            patch.setattr(irevnet, "masks_suffice", lambda blocks: False)
        patch.setattr(encoder, "recompute", way == "recompute")
        used = []
        for name in ("_FrozenInverse", "_Reversible"):
            kind = getattr(irevnet, name)
            patch.setattr(kind, "apply", lambda *a, f=kind.apply, n=name: used.append(n) or f(*a))
        feature_map = feature_map.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image = encoder.inverse(feature_map)
            weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(2), dtype=image.dtype)
            (image * weights).sum().backward()
        assert used == {"masks": ["_FrozenInverse"], "recompute": ["_Reversible"], "autograd": []}[way]
    return image.detach(), feature_map.grad


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("arguments", [BIJECTIVE, PADDED])
def test_gradients_through_the_inverse(arguments):
    x = images(arguments, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        encoder = settle(network(**arguments, recompute=recompute).double(), x)
        with torch.no_grad():
            feature_map = encoder.features(x)
        found.append(gradients(encoder, feature_map + 0.1, inverse=True))
    assert len(found[0]) > 1 and distance(*found) < 1e-10
    assert found[0]["input"].abs().max() > 0


ODD = dict(
    blocks=[2, 1], strides=[1, 2], channels=[5, 20], input_size=6
)  # masks that do not fill their last byte


@pytest.mark.parametrize("arguments", [BIJECTIVE, PADDED, ODD])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_through_the_frozen_inverse(arguments, layout, dtype, tolerance):
    x = images(arguments, n=3, dtype=dtype)
    encoder = settle(network(**arguments).to(dtype), x).requires_grad_(False).to(memory_format=layout)
    with torch.no_grad():
        feature_map = (encoder.features(x) + 0.1).contiguous(memory_format=layout)
    before = copy.deepcopy(encoder.state_dict())
    found = {way: through(encoder, feature_map, way) for way in ("masks", "recompute", "autograd")}
    for way in ("masks", "recompute"):
        assert torch.equal(found[way][0], found["autograd"][0])  # to the bit
        if way == "masks" or dtype == torch.float64:  # what float32 computes again may pass another ReLU
            assert apart(found[way][1], found["autograd"][1]) < tolerance
    assert found["masks"][1].abs().max() > 0
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_the_frozen_inverse_through_three_hundred_layers():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = images(DEEP, n=2, dtype=dtype)
        encoder = settle(network(**DEEP).to(dtype), x).requires_grad_(False)
        with torch.no_grad():
            feature_map = encoder.features(x)
        image, gradient = through(encoder, feature_map, "masks")
        error = image - x
        assert error.abs().max() < 1e-9 if dtype == torch.float64 else error.norm() / x.norm() < 1e-3
        expected = through(encoder, feature_map, "autograd")
        assert torch.equal(image, expected[0]) and apart(gradient, expected[1]) < tolerance


def test_the_frozen_inverse_keeps_float32_under_autocast():
    x = images(BIJECTIVE)
    encoder = settle(network(**BIJECTIVE), x).requires_grad_(False)
    with torch.no_grad():
        feature_map = encoder.features(x)
    plain, rough = (through(encoder, feature_map, "masks", autocast) for autocast in (False, True))
    assert torch.equal(plain[0], rough[0]) and torch.equal(plain[1], rough[1])
    image, gradient = through(encoder, feature_map.bfloat16(), "masks", True)
    assert image.dtype == torch.float32 and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["one weight is trained", "training mode", "no gradient is wanted"])
def test_masks_are_kept_only_where_they_suffice(change):
    x = images(BIJECTIVE, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        encoder = settle(network(**BIJECTIVE, recompute=recompute).double(), x).requires_grad_(False)
        feature_map = encoder.features(x).detach()
        if change == "no gradient is wanted":
            assert not encoder.inverse(feature_map).requires_grad
            continue
        if change == "training mode":
            encoder.train()
        else:
            encoder.body[1].residual[3].bias.requires_grad_(True)
        assert not irevnet.masks_suffice(encoder.body)
        found.append(gradients(encoder, feature_map + 0.1, inverse=True))
    assert not found or distance(*found) < 1e-10


@pytest.mark.parametrize("part", ["weight of a convolution", "statistics", "scale"])
def test_a_frozen_network_changed_before_the_backward_pass_is_noticed(part):
    encoder = network(**BIJECTIVE).eval().requires_grad_(False)
    image = encoder.inverse(torch.randn(2, 192, 4, 4, requires_grad=True))
    norm = encoder.body[1].residual[3]
    changed = {"statistics": norm.running_var, "scale": norm.weight}
    changed.get(part, encoder.body[1].residual[2].weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        image.sum().backward()


def test_the_frozen_inverse_is_differentiated_once():
    encoder = network(**BIJECTIVE).eval().requires_grad_(False)
    feature_map = torch.randn(2, 192, 4, 4, requires_grad=True)
    image = encoder.inverse(feature_map)
    (gradient,) = torch.autograd.grad(image.square().sum(), feature_map, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_take_a_bit_an_element(count, layout):
    generator = torch.Generator().manual_seed(count)
    mask = torch.rand(2, count, 3, 5, generator=generator).contiguous(memory_format=layout) > 0.5
    expected, layout_of = mask.clone(), (mask.shape, mask.stride())
    packed = irevnet._pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-30 * count // 8),)
    assert torch.equal(irevnet._unpack(packed, *layout_of), expected)


@pytest.mark.parametrize("trained", ["none of the first block", "one weight"])
def test_parameters_that_are_not_trained_get_no_gradient(trained):
    x = images(BIJECTIVE, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        encoder = network(**BIJECTIVE, recompute=recompute).double()
        if trained == "one weight":
            encoder.requires_grad_(False)
            encoder.body[2].residual[2].weight.requires_grad_(True)
        else:
            encoder.body[0].requires_grad_(False)
        found.append(gradients(encoder, x))
    assert len(found[0]) == (2 if trained == "one weight" else len(list(encoder.body[1:].parameters())) + 3)
    assert distance(*found) < 1e-10


def test_bfloat16_autocast():
    x = images(BIJECTIVE)
    exact = gradients(network(**BIJECTIVE), x)
    plain = gradients(network(**BIJECTIVE, recompute=False), x, autocast=True)
    recomputed = gradients(network(**BIJECTIVE), x, autocast=True)
    assert 1e-4 < distance(plain, exact) < 0.3  # what low precision itself costs
    assert distance(recomputed, plain) < 2 * distance(plain, exact)


DEEP = dict(
    blocks=BLOCKS[300],
    strides=[2, 2, 2, 2],
    channels=[24, 96, 384, 1536],
    down_sampling=2,
    input_size=64,
    bottleneck=64,
)


def test_three_hundred_layers_in_float64():
    x = images(DEEP, n=2, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        encoder = settle(network(**DEEP, recompute=recompute).double(), x)
        with torch.no_grad():
            assert (encoder.inverse(encoder.features(x)) - x).abs().max() < 1e-9
        found.append(gradients(encoder.train(), x))
    assert distance(*found) < 1e-8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_is_computed_again_to_the_bit(layout, monkeypatch):
    """However deep: what float32 rounds once would be another feature map after some dozen blocks in bfloat16."""
    arguments = dict(blocks=[12, 12, 12], strides=[1, 2, 2], channels=[8, 32, 128], input_size=32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 257, (4, 3, 32, 32), generator=generator).float() / 256  # exact after normalisation
    x = x.contiguous(memory_format=layout)

    def of(recompute):
        encoder = network(**arguments, recompute=recompute).to(memory_format=layout)
        return gradients(encoder, x, autocast=True)

    recomputed = of(True)

    def on_grid(self, x1, x2):  # the same network for autograd, gradients passing the rounding
        x2 = x2.contiguous(memory_format=layout)
        value = self.residual(x2).float()
        rounded = value + (torch.round(value * 4096) / 4096 - value).detach()
        return self.squeeze(x2), self.squeeze(x1) + rounded

    monkeypatch.setattr(ReversibleBlock, "forward", on_grid)
    assert distance(recomputed, of(False)) < 1e-6


def test_the_backward_pass_has_the_precision_of_the_forward_pass():
    """Whatever autocast is set to when it runs."""
    x = images(BIJECTIVE)
    found = []
    for outside in (None, torch.bfloat16, torch.float16):
        encoder = network(**BIJECTIVE)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        loss = (out * weights).sum()
        with torch.autocast("cpu", outside, enabled=outside is not None):
            loss.backward()
        found.append({key: value.grad for key, value in encoder.named_parameters()})
    assert distance(found[1], found[0]) == distance(found[2], found[0]) == 0


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_undone_is_computed_without_tf32(recompute, monkeypatch):
    """PyTorch has it on for convolutions of a GPU, where ten bits would draw another image."""
    cudnn, seen = torch.backends.cudnn, []
    if not hasattr(cudnn, "conv"):
        pytest.skip("PyTorch before 2.9 has another flag")
    encoder = network(**BIJECTIVE, recompute=recompute)
    before = cudnn.allow_tf32
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda *_: seen.append(cudnn.conv.fp32_precision))
    feature_map = encoder.features(images(BIJECTIVE))
    encoder.inverse(feature_map).sum().backward()
    convolutions = 3 * sum(BIJECTIVE["blocks"])
    assert seen == ["ieee"] * convolutions * (4 if recompute else 2)
    assert cudnn.allow_tf32 is before is True  # what others do is as it was
    seen.clear()
    encoder.eval().requires_grad_(False)
    transposed = F.conv_transpose2d
    monkeypatch.setattr(
        F, "conv_transpose2d", lambda *a: seen.append(cudnn.conv.fp32_precision) or transposed(*a)
    )
    encoder.inverse(feature_map.detach().requires_grad_()).sum().backward()
    assert seen == ["ieee"] * convolutions * 2 and cudnn.allow_tf32 is before
    with pytest.raises(RuntimeError):
        encoder.features(torch.rand(2, 5, 32, 32))
    assert cudnn.allow_tf32 is before


def test_autocast_hands_on_no_weights_that_were_cast_without_gradients():
    encoder, x = network(**BIJECTIVE), images(BIJECTIVE)
    expected = gradients(network(**BIJECTIVE), x, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            encoder.inverse(encoder.features(x).detach())
        encoder.load_state_dict(network(**BIJECTIVE).state_dict())
        assert distance(gradients(encoder, x, autocast=True), expected) < 1e-6


class Kept:
    """Bytes that autograd keeps for the backward pass beside the parameters, each storage once."""

    def __init__(self, encoder: nn.Module):
        self.own = {value.untyped_storage().data_ptr() for value in encoder.state_dict().values()}
        self.storages: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_kept_does_not_grow_with_depth(inverse):
    kept = {}
    for recompute in (True, False):
        for depth in (2, 12):
            arguments = {**BIJECTIVE, "blocks": [depth, depth, depth], "recompute": recompute}
            encoder = network(**arguments).train(not inverse)
            x = images(arguments)
            if inverse:
                with torch.no_grad():
                    x = encoder.features(x)
                x.requires_grad_()
            with Kept(encoder) as memory:
                out = encoder.inverse(x) if inverse else encoder(x)
                kept[recompute, depth] = memory.bytes
            del out
    assert kept[True, 12] == kept[True, 2] < kept[False, 2]
    assert kept[False, 12] > 4 * kept[False, 2]


@pytest.mark.parametrize("recompute", [True, False])
def test_the_frozen_inverse_keeps_a_bit_for_each_value_of_a_relu(recompute, monkeypatch):
    """And no activation."""
    encoder = network(**BIJECTIVE, recompute=recompute).eval().requires_grad_(False)
    x = images(BIJECTIVE)
    feature_map = encoder.features(x).detach().requires_grad_()
    values: list[int] = []
    for part in encoder.body.modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_hook(lambda module, given, out: values.append(out.numel()))
    with Kept(encoder) as memory:
        out = encoder.inverse(feature_map)
    assert len(values) == 3 * 5 - 1 and memory.bytes == sum(-(-count // 8) for count in values)
    assert sorted(memory.storages.values()) == sorted(-(-count // 8) for count in values)
    del out
    monkeypatch.setattr(irevnet, "masks_suffice", lambda blocks: False)
    monkeypatch.setattr(encoder, "recompute", False)
    with Kept(encoder) as by_autograd:
        encoder.inverse(feature_map)
    assert memory.bytes < by_autograd.bytes / 32


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    encoder = network(**BIJECTIVE)
    loss = encoder(images(BIJECTIVE)).sum()
    with torch.no_grad():
        encoder.body[0].residual[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_channels_last():
    x = images(BIJECTIVE, dtype=torch.float64)
    plain = gradients(network(**BIJECTIVE).double(), x)
    encoder = network(**BIJECTIVE).double().to(memory_format=torch.channels_last)
    assert distance(gradients(encoder, x.to(memory_format=torch.channels_last)), plain) < 1e-10


@pytest.mark.slow
def test_compiled():
    """The compiler takes the place of the recomputation, in one graph."""
    x = images(BIJECTIVE, dtype=torch.float64)
    encoder = network(**BIJECTIVE).double()
    expected = gradients(network(**BIJECTIVE).double(), x)
    encoder.forward = torch.compile(encoder.forward, backend="aot_eager", fullgraph=True)
    assert distance(gradients(encoder, x), expected) < 1e-10
    encoder.eval().requires_grad_(False)
    feature_map = encoder.features(x)
    plain = through(encoder, feature_map, "masks")
    encoder.inverse = torch.compile(encoder.inverse, backend="aot_eager", fullgraph=True)
    compiled = through(encoder, feature_map, "autograd")
    assert apart(compiled[0], plain[0]) < 1e-12 and apart(compiled[1], plain[1]) < 1e-12


@pytest.mark.parametrize("recompute", [True, False])
def test_with_activation_checkpoints(recompute):
    """trainer.checkpoint_activations: nothing is left to save where the network computes again itself."""
    x = images(BIJECTIVE, dtype=torch.float64)
    encoder = network(**BIJECTIVE, recompute=recompute).double()
    plain = copy.deepcopy(encoder)
    recompute_activations(encoder)
    assert distance(gradients(encoder, x), gradients(plain, x)) < 1e-10
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in encoder.named_buffers())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks": []}, r"backbone.blocks must list a whole number of at least 1 a stage; found \[\]"),
        ({"blocks": [1, 0, 2]}, r"backbone.blocks must list .*found \[1, 0, 2\]"),
        (
            {"strides": [1, 2]},
            r"backbone.strides must have an entry for each of the 3 stages .*found \[1, 2\]",
        ),
        ({"strides": [1, 2, 4]}, r"backbone.strides must be 1 or 2; found \[1, 2, 4\]"),
        ({"channels": [4, 16, 32]}, "a stage of stride 2 after 16 channels has 64; found 32"),
        ({"channels": [1, 4, 16]}, "the image has 3 channels after down-sampling by 1.*at least 2; found 1"),
        ({"down_sampling": 2}, "the image has 12 channels after down-sampling by 2.*at least 6; found 4"),
        ({"input_size": 18}, "backbone.input_size must be a multiple of 4, .*found 18"),
        ({"bottleneck": 0}, "backbone.bottleneck must be at least 1; found 0"),
        ({"depth": 3}, "unknown key backbone.depth"),
    ],
)
def test_numbers_that_do_not_fit(change, message):
    with pytest.raises(UsageError, match=message):
        build_backbone("irevnet", **{**PADDED, **change})


def test_a_feature_map_of_another_network():
    with pytest.raises(UsageError, match=r"of shape \[n, 128, h, w\]; found \[1, 3, 4, 4\]"):
        network(**PADDED).inverse(torch.zeros(1, 3, 4, 4))


NETWORK = {"name": "irevnet", **PADDED}


def test_the_decoder_is_a_connector_and_a_frozen_inverse():
    torch.manual_seed(0)
    decoder = build_decoder("irevnet_inverse", 6, in_size=4, out_size=16, network=NETWORK).train()
    assert not any(part.training for part in decoder.network.modules()) and decoder.connector.training
    assert {key for key, value in decoder.named_parameters() if value.requires_grad} == {
        "connector.0.weight",
        "connector.0.bias",
    }
    assert decoder.connector[0].weight.shape == (128, 6, 3, 3)
    feature_map = torch.randn(2, 6, 4, 4, requires_grad=True)
    image = decoder(feature_map)
    assert image.shape == (2, 3, 16, 16)
    torch.testing.assert_close(image, decoder.network.inverse(decoder.connector[0](feature_map)))
    before = copy.deepcopy(decoder.network.state_dict())
    image.sum().backward()
    assert feature_map.grad.abs().sum() > 0 and decoder.connector[0].weight.grad.abs().sum() > 0
    assert all(value.grad is None for value in decoder.network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in decoder.network.state_dict().items())


def test_a_classifier_with_a_smaller_feature_map():
    """Four times the channels become 2 x 2 pixels."""
    encoder = build_backbone("cifar_resnet18", width=4)
    network = {**NETWORK, "input_size": 32}
    decoder = build_decoder_for(encoder, "irevnet_inverse", network=network)
    assert decoder.connector[0].out_channels == 4 * 128
    assert decoder(encoder.features(torch.rand(2, 3, 32, 32))).shape == (2, 3, 32, 32)


def test_the_connector_can_say_what_the_encoder_saw():
    """Where the classifier is the i-RevNet itself and the connector the identity, the picture is the image."""
    x = images(PADDED, dtype=torch.float64)
    encoder = settle(network(**PADDED).double(), x)
    decoder = build_decoder("irevnet_inverse", 128, in_size=4, out_size=16, network=NETWORK).double()
    decoder.network.load_state_dict(encoder.state_dict())
    nn.init.dirac_(decoder.connector[0].weight)
    nn.init.zeros_(decoder.connector[0].bias)
    with torch.no_grad():
        assert (decoder(encoder.features(x)) - x).abs().max() < 1e-9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"out_size": 112},
            "draws images of 16 x 16 pixels, the classifier takes 112 x 112; choose an i-RevNet for 112 pixels",
        ),
        ({"in_size": 3}, "the i-RevNet's feature map has 4 x 4 pixels, the classifier's 3 x 3"),
        ({"in_size": 8}, "the i-RevNet's feature map has 4 x 4 pixels, the classifier's 8 x 8"),
        ({"network": "ir18"}, "decoder.network must be an i-RevNet, which has an inverse; found 'ir18'"),
        ({"network": {"blocks": [1]}}, "decoder.network must be the name of an i-RevNet, or a mapping"),
        (
            {"network": "irevnet301"},
            "decoder.network: unknown backbone 'irevnet301' .did you mean 'irevnet30",
        ),
    ],
)
def test_a_decoder_that_does_not_fit(arguments, message):
    with pytest.raises(UsageError, match=message):
        build_decoder("irevnet_inverse", 6, **{"in_size": 4, "out_size": 16, "network": NETWORK, **arguments})


def test_names():
    assert {"irevnet", "irevnet_cifar", "irevnet_face", *(f"irevnet{depth}" for depth in BLOCKS)} <= set(
        BACKBONES.names()
    )
