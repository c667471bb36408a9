import math

import pytest
import torch
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.heads import HEADS, build_head


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.pow(2).sum(1, keepdim=True).sqrt()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.tensor([0, 3, 1, 2, 3, 0])


def test_names():
    assert {"arcface", "cosface", "softmax"} <= set(HEADS.names())


def test_cosface_is_the_published_formula(batch):
    embeddings, labels = batch
    torch.manual_seed(1)
    head = build_head("cosface", 5, 4)
    assert (head.scale, head.margin_size) == (30.0, 0.25)
    cosine = unit(embeddings) @ unit(head.weight.detach()).T
    expected = torch.empty(6, 4)
    for row in range(6):
        for column in range(4):
            margin = 0.25 if column == labels[row] else 0.0
            expected[row, column] = 30.0 * (cosine[row, column] - margin)
    torch.testing.assert_close(head(embeddings, labels), expected, rtol=1e-5, atol=1e-5)


def test_arcface_is_the_published_formula(batch):
    embeddings, labels = batch
    torch.manual_seed(1)
    head = build_head("arcface", 5, 4, scale=16, margin=0.5)
    angle = torch.acos(unit(embeddings).double() @ unit(head.weight.detach()).double().T)
    expected = 16.0 * torch.cos(angle)
    for row in range(6):
        theta = angle[row, labels[row]]
        assert theta + 0.5 < math.pi  # the case that the paper's formula covers
        expected[row, labels[row]] = 16.0 * torch.cos(theta + 0.5)
    torch.testing.assert_close(head(embeddings, labels).double(), expected, rtol=1e-4, atol=1e-4)


def test_arcface_goes_on_falling_where_the_angle_passes_pi():
    head = build_head("arcface", 2, 2, scale=1.0, margin=0.5)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    angles = torch.linspace(0.0, math.pi, 181)
    embeddings = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    target = head(embeddings, torch.zeros(181, dtype=torch.long))[:, 0].detach()
    assert bool((target[1:] < target[:-1]).all())
    theta = torch.tensor(3.0)
    beyond = head(torch.stack([theta.cos(), theta.sin()])[None], torch.tensor([0]))[0, 0].item()
    assert beyond == pytest.approx(math.cos(3.0) - 0.5 * math.sin(0.5), abs=1e-5)


def test_softmax_is_a_linear_layer(batch):
    embeddings, labels = batch
    head = build_head("softmax", 5, 4)
    with torch.no_grad():
        head.linear.bias.copy_(torch.arange(4.0))
    expected = embeddings @ head.linear.weight.T + torch.arange(4.0)
    torch.testing.assert_close(head(embeddings, labels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosface", "arcface", "softmax"])
def test_gradients_are_those_of_the_logits(name, batch):
    embeddings, labels = batch
    torch.manual_seed(2)
    head = build_head(name, 5, 4).double()
    embeddings = embeddings.double().requires_grad_()
    weights = dict(head.named_parameters())

    def loss(embeddings, *values):
        logits = torch.func.functional_call(
            head, dict(zip(weights, values, strict=True)), (embeddings, labels)
        )
        return F.cross_entropy(logits, labels)

    assert torch.autograd.gradcheck(loss, (embeddings, *weights.values()))


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_gradient_is_finite_when_embedding_and_class_coincide(name):
    head = build_head(name, 3, 2)
    embeddings = head.weight.detach().clone().requires_grad_()
    F.cross_entropy(head(embeddings, torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    assert bool(torch.isfinite(embeddings.grad).all()) and bool(torch.isfinite(head.weight.grad).all())


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_angles_stay_in_float32_under_bfloat16_autocast(name):
    torch.manual_seed(3)
    head = build_head(name, 64, 10)
    embeddings, labels = torch.randn(8, 64), torch.arange(8)
    exact = head(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # What autocast does to a plain product of these, so that the comparison below means something.
        coarse = F.linear(F.normalize(embeddings), F.normalize(head.weight))
        mixed = head(embeddings, labels)
    assert coarse.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)
    half = head(embeddings.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_softmax_gives_float32_logits_under_autocast():
    head = build_head("softmax", 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(2, 8), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize("name", ["cosface", "arcface", "softmax"])
@pytest.mark.parametrize("embedding_size, identities", [(0, 4), (8, 1), (8, 0)])
def test_bad_sizes_are_refused(name, embedding_size, identities):
    with pytest.raises(UsageError, match=f"found {embedding_size} and {identities}"):
        build_head(name, embedding_size, identities)


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("cosface", {"scale": 0.0}, r"head.scale must lie in \(0, inf\); found 0.0"),
        ("cosface", {"scale": math.nan}, "head.scale must lie in .0, inf.; found nan"),
        ("cosface", {"margin": -0.1}, r"head.margin must lie in \[0, 2\]; found -0.1"),
        ("arcface", {"margin": 3.2}, r"head.margin must lie in \[0, 3.14159\); found 3.2"),
        ("softmax", {"label_smoothing": 1.0}, r"head.label_smoothing must lie in \[0, 1\); found 1.0"),
    ],
)
def test_wrong_values_are_named(name, arguments, told):
    with pytest.raises(UsageError, match=told):
        build_head(name, 8, 4, **arguments)


def test_wrong_name_and_argument_name_the_nearest():
    with pytest.raises(UsageError, match="unknown head 'cosfase' .did you mean 'cosface'"):
        build_head("cosfase", 8, 4)
    with pytest.raises(UsageError, match="head.margn .*did you mean 'margin'"):
        build_head("cosface", 8, 4, margn=0.2)
