import pytest
import torch
from torch.nn import functional as F

from lrface.models.blocks import GlobalDepthwise, PReLU, StridedDepthwise


def layer(channels: int) -> PReLU:
    module = PReLU(channels)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.5, 0.9, channels))
    return module


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 1, 1), (3, 1, 4, 4), (2, 16, 7, 7)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_prelu_is_pytorchs_in_every_memory_order(shape, order):
    torch.manual_seed(0)
    module = layer(shape[1])
    x = torch.randn(shape).contiguous(memory_format=order).requires_grad_()
    y = x.detach().clone().contiguous().requires_grad_()
    weight = module.weight.detach().clone().requires_grad_()
    upstream = torch.randn(shape)
    mine, theirs = module(x), F.prelu(y, weight)
    assert torch.equal(mine, theirs)
    mine.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(x.grad, y.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)
    assert mine.is_contiguous(memory_format=order)


def test_prelu_of_vectors():
    module = layer(5)
    x = torch.randn(4, 5)
    assert torch.equal(module(x), torch.where(x > 0, x, x * module.weight))


def test_prelu_gradient():
    module = layer(3).double()
    x = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )

    def apply(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(apply, (x, module.weight))
    assert torch.autograd.gradgradcheck(apply, (x, module.weight))


def test_prelu_of_half_precision():
    module = layer(8)
    x = torch.randn(2, 8, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.prelu(x.float(), module.weight), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_depthwise_convolution_with_a_stride_is_pytorchs(precision):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    module = StridedDepthwise(4, 4, 3, 2, 1, groups=4)
    module.load_state_dict(plain.state_dict())
    images = torch.randn(2, 4, 8, 8)
    found = []
    for layer in (module, plain):
        x = images.to(precision).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = layer(x)
        assert y.dtype == precision
        y.float().square().sum().backward()
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    close = {"rtol": 1e-5, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 9])
def test_a_depthwise_convolution_of_the_whole_map_is_pytorchs(precision, size):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 6, 7, groups=6)
    module = GlobalDepthwise(6, 6, 7, groups=6)
    module.load_state_dict(plain.state_dict())
    images = torch.randn(3, 6, size, size)
    found = []
    for layer in (module, plain):
        x = images.to(precision).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            y = layer(x)
        assert y.dtype == precision
        y.float().square().sum().backward()
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    close = {"rtol": 1e-5, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
